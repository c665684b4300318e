//! Rank 0's side of the store: the values, and the thread that serves them.

use std::collections::{BTreeMap, VecDeque};
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rustix::event::{PollFd, PollFlags, Timespec};

use super::super::folder::sum;
use super::message::{ADD, DONE, FAILED, GET, HEAD, NOTHING, SET, VALUE, answer, lengths, words};
use super::{Error, failed};
use crate::limits::{explain, explain_thread};
use crate::memory::fork::{Guarded, Maker};
use crate::wire::tcp::greeting::{Arriving, Refusal, STORE};
use crate::wire::tcp::meeting::{WELCOME, accept_some, count, listen, port_of};
use crate::wire::tcp::network::digest;

const RETRY_EVERY: Duration = Duration::from_millis(20);
/// Most bytes of all keys and values.
const MOST_BYTES: usize = 256 << 20;
/// What an entry costs beyond its key and its value, about.
const ENTRY: usize = 128;
/// Most bytes that pass one connection before others have their turn.
const TURN: usize = 1 << 20;

/// What the serving thread shares with the rank's own calls.
#[derive(Debug, Default)]
pub(super) struct Values {
    values: BTreeMap<String, Vec<u8>>,
    counts: BTreeMap<String, i64>,
    bytes: usize,
    refused: BTreeMap<Refusal, usize>,
}

pub(super) struct Server {
    values: Arc<Mutex<Values>>,
    /// The thread ends when this closes.
    bell: Guarded<UnixStream>,
    thread: Option<JoinHandle<()>>,
    maker: Maker,
}

impl std::fmt::Debug for Server {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Server").finish_non_exhaustive()
    }
}

impl Server {
    pub(super) fn open(address: &str, secret: &str, limit: Duration) -> Result<Server, Error> {
        let port = port_of(address).map_err(failed)?;
        let started = Instant::now();
        let listener = loop {
            match listen(port) {
                Ok(listener) => break listener,
                Err(error) if started.elapsed() >= limit => {
                    return Err(failed(format!(
                        "rank 0 cannot listen at port {port}: {}; choose another port",
                        explain(&error)
                    )));
                }
                Err(_) => std::thread::sleep(RETRY_EVERY),
            }
        };
        let failed_to = |error: std::io::Error| failed(format!("listening at port {port}: {}", explain(&error)));
        listener.set_nonblocking(true).map_err(failed_to)?;
        let (bell, rung) = UnixStream::pair().map_err(failed_to)?;
        let (bell, rung) = (Guarded::new(bell), Guarded::new(rung));
        let (values, token) = (Arc::<Mutex<Values>>::default(), digest(secret));
        let shared = values.clone();
        let thread = std::thread::Builder::new().name("pillion-store".into());
        let thread = thread.spawn(move || serve(&listener, &rung, token, &shared));
        let thread =
            thread.map_err(|error| Error::System { what: "starting a thread", reason: explain_thread(&error) })?;
        Ok(Server { values, bell, thread: Some(thread), maker: Maker::this() })
    }

    /// # Errors
    /// In a forked child, which has no thread that serves, and in which a lock may stay taken.
    fn check(&self) -> Result<(), Error> {
        if self.maker.is_another() {
            let reason = "the process that serves it forked this one, in which it is not served: visit it from here, \
                          or start other programs with exec";
            return Err(failed(reason.to_owned()));
        }
        Ok(())
    }

    pub(super) fn set(&self, key: &str, value: &[u8]) -> Result<(), Error> {
        self.check()?;
        self.values.lock().set(key, value.to_vec()).map_err(failed)
    }

    pub(super) fn get(&self, key: &str) -> Result<Option<Vec<u8>>, Error> {
        self.check()?;
        Ok(self.values.lock().values.get(key).cloned())
    }

    pub(super) fn add(&self, key: &str, amount: i64) -> Result<i64, Error> {
        self.check()?;
        self.values.lock().add(key, amount).map_err(failed)
    }

    pub(super) fn refusals(&self) -> Option<String> {
        self.check().ok()?;
        let text = count(&self.values.lock().refused);
        (!text.is_empty()).then(|| text.trim_start_matches("; ").to_owned())
    }
}

#[cfg(test)]
impl Server {
    pub(super) fn values(&self) -> &Arc<Mutex<Values>> {
        &self.values
    }

    pub(super) fn bell(&self) -> &UnixStream {
        &self.bell
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // A forked child has no thread to wait for, and its parent's goes on.
        if self.maker.is_another() {
            return;
        }
        // A child that was forked before this was guarded has a copy, which closing would not end.
        let _ = self.bell.shutdown(Shutdown::Both);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Values {
    fn set(&mut self, key: &str, value: Vec<u8>) -> Result<(), String> {
        let old = self.values.get(key).map_or(0, |old| ENTRY + key.len() + old.len());
        let new = ENTRY + key.len() + value.len();
        self.charge(new, old)?;
        self.values.insert(key.to_owned(), value);
        Ok(())
    }

    fn add(&mut self, key: &str, amount: i64) -> Result<i64, String> {
        let before = self.counts.get(key).copied();
        let sum = sum(key, before.unwrap_or(0), amount).map_err(|error| match error {
            Error::Store { reason } => reason,
            error => error.to_string(),
        })?;
        if before.is_none() {
            self.charge(ENTRY + key.len(), 0)?;
        }
        self.counts.insert(key.to_owned(), sum);
        Ok(sum)
    }

    fn charge(&mut self, new: usize, old: usize) -> Result<(), String> {
        let bytes = self.bytes - old + new;
        if bytes > MOST_BYTES {
            return Err(format!("its {MOST_BYTES} bytes are full: set fewer or shorter values"));
        }
        self.bytes = bytes;
        Ok(())
    }

    /// The answer to a whole request, or why it is none.
    pub(super) fn answer_to(&mut self, request: &[u8]) -> Result<Vec<u8>, Refusal> {
        let (head, rest) = request.split_first_chunk().ok_or(Refusal::Garbage)?;
        let (key, _) = lengths(head).ok_or(Refusal::Garbage)?;
        let (key, value) = rest.split_at(key);
        let key = std::str::from_utf8(key).map_err(|_| Refusal::Garbage)?;
        let [kind, ..] = words(head);
        let done = match kind {
            SET => self.set(key, value.to_vec()).map(|()| answer(DONE, &[])),
            GET => Ok(self.values.get(key).map_or_else(|| answer(NOTHING, &[]), |value| answer(VALUE, value))),
            ADD => {
                let amount = i64::from_le_bytes(value.try_into().map_err(|_| Refusal::Garbage)?);
                self.add(key, amount).map(|sum| answer(DONE, &sum.to_le_bytes()))
            }
            _ => return Err(Refusal::Garbage),
        };
        Ok(done.unwrap_or_else(|reason| answer(FAILED, reason.as_bytes())))
    }
}

/// A visitor that knows the secret. Its next request is read when it has the answer to the last.
struct Visitor {
    socket: Guarded<TcpStream>,
    incoming: Vec<u8>,
    outgoing: Vec<u8>,
    sent: usize,
}

impl Visitor {
    fn new(socket: Guarded<TcpStream>) -> Visitor {
        Visitor { socket, incoming: Vec::new(), outgoing: WELCOME.to_le_bytes().to_vec(), sent: 0 }
    }

    /// Does what can be done without waiting. Returns whether the visitor stays.
    ///
    /// # Errors
    /// For a visitor that does not speak as one.
    fn turn(&mut self, values: &Mutex<Values>) -> Result<bool, Refusal> {
        let mut budget = TURN;
        loop {
            while self.sent < self.outgoing.len() {
                if budget == 0 {
                    return Ok(true);
                }
                let rest = &self.outgoing[self.sent..];
                match self.socket.write(&rest[..rest.len().min(budget)]) {
                    Ok(0) => return Ok(false),
                    Ok(count) => {
                        self.sent += count;
                        budget -= count;
                    }
                    Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(true),
                    Err(error) if error.kind() == ErrorKind::Interrupted => {}
                    Err(_) => return Ok(false),
                }
            }
            // An idle visitor keeps no memory for long values.
            (self.outgoing, self.sent) = (Vec::new(), 0);
            let head = self.incoming.first_chunk::<HEAD>().copied();
            let wanted = match head {
                None => HEAD,
                Some(head) => {
                    let (key, value) = lengths(&head).ok_or(Refusal::Garbage)?;
                    HEAD + key + value
                }
            };
            if head.is_some() && self.incoming.len() == wanted {
                self.outgoing = values.lock().answer_to(&self.incoming)?;
                self.incoming = Vec::new();
                continue;
            }
            if budget == 0 {
                return Ok(true);
            }
            // Memory grows with what has come, and not with what was announced.
            let mut piece = [0; 16 << 10];
            let most = piece.len().min(wanted - self.incoming.len()).min(budget);
            match self.socket.read(&mut piece[..most]) {
                Ok(0) => return Ok(false),
                Ok(count) => {
                    self.incoming.extend_from_slice(&piece[..count]);
                    budget -= count;
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(true),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => return Ok(false),
            }
        }
    }
}

fn serve(listener: &TcpListener, rung: &UnixStream, token: u64, values: &Mutex<Values>) {
    let mut waiting: VecDeque<Arriving> = VecDeque::new();
    let mut visitors: Vec<Visitor> = Vec::new();
    loop {
        let Some(is_called) = sleep(listener, rung, &waiting, &visitors) else { return };
        // Where a visitor is there and cannot be accepted, as where no file more can be opened, it
        // stays there.
        if matches!((is_called, accept_some(listener, &mut waiting)), (true, Ok(0)) | (_, Err(_))) {
            std::thread::sleep(RETRY_EVERY);
        }
        for _ in 0..waiting.len() {
            let Some(mut arriving) = waiting.pop_front() else { break };
            let greeting = arriving.read(token).and_then(|greeting| match greeting {
                Some(greeting) if greeting.purpose != STORE => Err(Refusal::NoSuchRank),
                greeting => Ok(greeting),
            });
            // A program gives a store its secret itself.
            let greeting = greeting.map_err(|refusal| match refusal {
                Refusal::Token => Refusal::Secret,
                refusal => refusal,
            });
            match greeting {
                Ok(None) => waiting.push_back(arriving),
                Ok(Some(_)) => {
                    // Answers are waited for.
                    let _ = arriving.socket.set_nodelay(true);
                    visitors.push(Visitor::new(arriving.socket));
                }
                Err(refusal) => {
                    let _ = arriving.socket.write(&(refusal as u64).to_le_bytes());
                    *values.lock().refused.entry(refusal).or_default() += 1;
                }
            }
        }
        visitors.retain_mut(|visitor| match visitor.turn(values) {
            Ok(stays) => stays,
            Err(refusal) => {
                *values.lock().refused.entry(refusal).or_default() += 1;
                false
            }
        });
    }
}

/// Sleeps until there is something to do. Returns whether somebody connects, or `None` when the
/// thread is to end.
fn sleep(
    listener: &TcpListener,
    rung: &UnixStream,
    waiting: &VecDeque<Arriving>,
    visitors: &[Visitor],
) -> Option<bool> {
    let until = waiting.iter().map(|arriving| arriving.until).min();
    let left = until.and_then(|until| Timespec::try_from(until.saturating_duration_since(Instant::now())).ok());
    let mut events = vec![PollFd::new(rung, PollFlags::IN), PollFd::new(listener, PollFlags::IN)];
    events.extend(waiting.iter().map(|arriving| PollFd::new(&arriving.socket, PollFlags::IN)));
    events.extend(visitors.iter().map(|visitor| {
        let wanted = if visitor.outgoing.is_empty() { PollFlags::IN } else { PollFlags::OUT };
        PollFd::new(&visitor.socket, wanted)
    }));
    // An interrupted wait is one that finds nothing, and then everything is looked at.
    let _ = rustix::event::poll(&mut events, left.as_ref());
    events[0].revents().is_empty().then(|| !events[1].revents().is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_visitor_takes_no_longer_turn_by_reading_than_by_writing() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut reader = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (socket, _) = listener.accept().unwrap();
        socket.set_nonblocking(true).unwrap();
        let mut visitor = Visitor::new(Guarded::new(socket));
        let values = Mutex::new(Values::default());
        values.lock().set("key", vec![1; 16 << 20]).unwrap();
        visitor.outgoing = values.lock().answer_to(&super::super::message::bytes(GET, b"key", b"")).unwrap();
        let all = visitor.outgoing.len();
        let reading = std::thread::spawn(move || {
            let mut piece = vec![0; 1 << 20];
            let mut read = 0;
            while read < all {
                read += reader.read(&mut piece).unwrap();
            }
            reader
        });
        while !visitor.outgoing.is_empty() {
            let before = visitor.sent;
            assert!(visitor.turn(&values).unwrap());
            // When all is sent, nothing of it is kept.
            let sent = if visitor.outgoing.is_empty() { all } else { visitor.sent };
            assert!(sent - before <= TURN, "{sent} bytes from {before} on in one turn");
        }
        drop(reading.join().unwrap());
    }

    #[test]
    fn a_store_that_is_full_says_so_and_takes_shorter_values() {
        let mut values = Values::default();
        values.set("key", vec![0; 1000]).unwrap();
        let used = values.bytes;
        // As if other keys had taken the rest.
        values.bytes = MOST_BYTES;
        for refused in [values.set("key", vec![0; 1001]), values.set("other", Vec::new()), values.add("c", 1).map(drop)]
        {
            assert!(refused.unwrap_err().contains("are full"));
        }
        assert_eq!((values.bytes, values.values["key"].len(), values.counts.len()), (MOST_BYTES, 1000, 0));
        values.set("key", Vec::new()).unwrap();
        assert_eq!(values.bytes, MOST_BYTES - 1000);
        values.bytes = used;
        assert_eq!(values.add("c", 1), Ok(1));
        assert_eq!((values.add("c", 2), values.bytes), (Ok(3), used + ENTRY + 1));
    }
}
