//! The side of the ranks that visit the store.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Ipv6Addr, TcpStream};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::message::{ADD, DONE, FAILED, GET, HEAD, MOST_VALUE, NOTHING, SET, VALUE, bytes, words};
use super::{Error, failed};
use crate::limits::explain;
use crate::memory::fork::{Guarded, Maker};
use crate::terms::Terms;
use crate::wire::tcp::greeting::{Greeting, Refusal, STORE};
use crate::wire::tcp::meeting::{WELCOME, dial, is_out_of_files, port_of};
use crate::wire::tcp::network::digest;

const RETRY_EVERY: Duration = Duration::from_millis(20);
/// How long a listener may take to welcome a connection. Another one may be welcomed sooner.
const WELCOME_WITHIN: Duration = Duration::from_secs(5);
/// Longer limits are no limits, because a clock cannot count them.
const FOREVER: Duration = Duration::from_secs(100 * 365 * 24 * 3600);

#[derive(Debug)]
pub(super) struct Client {
    address: String,
    token: u64,
    limit: Duration,
    connection: Mutex<Option<Connection>>,
    maker: Maker,
}

struct Connection(Guarded<TcpStream>);

impl std::fmt::Debug for Connection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}", *self.0)
    }
}

/// Why a request has no answer.
enum Obstacle {
    /// The next attempt may go better.
    MayGo(String),
    Stays(String),
}

/// A connection until a deadline, which holds for all bytes together. A listener that sends one
/// byte after the other moves no deadline.
struct Until<'a>(&'a TcpStream, Instant);

impl Until<'_> {
    fn left(&self) -> io::Result<Option<Duration>> {
        let left = self.1.saturating_duration_since(Instant::now());
        if left.is_zero() { Err(ErrorKind::TimedOut.into()) } else { Ok(Some(left)) }
    }
}

impl Read for Until<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.0.set_read_timeout(self.left()?)?;
        self.0.read(into)
    }
}

impl Write for Until<'_> {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        self.0.set_write_timeout(self.left()?)?;
        self.0.write(from)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Client {
    pub(super) fn new(address: &str, secret: &str, limit: Duration) -> Result<Client, Error> {
        port_of(address).map_err(failed)?;
        let (address, token, connection) = (address.to_owned(), digest(secret), Mutex::default());
        Ok(Client { address, token, limit, connection, maker: Maker::this() })
    }

    pub(super) fn set(&self, key: &str, value: &[u8]) -> Result<(), Error> {
        self.ask(SET, key, value).map(drop)
    }

    pub(super) fn get(&self, key: &str) -> Result<Option<Vec<u8>>, Error> {
        let (kind, value) = self.ask(GET, key, &[])?;
        Ok((kind == VALUE).then_some(value))
    }

    pub(super) fn add(&self, key: &str, amount: i64) -> Result<i64, Error> {
        let (_, value) = self.ask(ADD, key, &amount.to_le_bytes())?;
        let sum = value.first_chunk().copied().ok_or_else(|| failed(self.foreign()))?;
        Ok(i64::from_le_bytes(sum))
    }

    fn ask(&self, kind: u64, key: &str, value: &[u8]) -> Result<(u64, Vec<u8>), Error> {
        if self.maker.is_another() {
            // Its parent has the connection, and perhaps the lock.
            let reason = "the process that visits it forked this one: visit it anew here, at the same address";
            return Err(failed(reason.to_owned()));
        }
        let request = bytes(kind, key.as_bytes(), value);
        let started = Instant::now();
        let left = || self.limit.saturating_sub(started.elapsed()).max(Duration::from_millis(1));
        let mut connection = self.connection.lock();
        // A refusal tells more than a connection that nobody accepts afterwards.
        let mut refusal = None;
        loop {
            let obstacle = match connection.take() {
                Some(open) => match self.exchange(&open.0, kind, &request, left()) {
                    Ok((FAILED, reason)) => {
                        *connection = Some(open);
                        return Err(failed(String::from_utf8_lossy(&reason).into_owned()));
                    }
                    Ok(answer) => {
                        *connection = Some(open);
                        return Ok(answer);
                    }
                    Err(Obstacle::MayGo(reason)) if kind == ADD => {
                        return Err(failed(format!("{reason}, and nobody knows whether `add` was counted")));
                    }
                    Err(obstacle) => obstacle,
                },
                None => match self.connect(left(), &mut refusal) {
                    Ok(open) => {
                        *connection = Some(Connection(open));
                        continue;
                    }
                    Err(obstacle) => obstacle,
                },
            };
            match obstacle {
                Obstacle::Stays(reason) => return Err(failed(reason)),
                Obstacle::MayGo(reason) if started.elapsed() >= self.limit => {
                    return Err(failed(refusal.unwrap_or(reason)));
                }
                Obstacle::MayGo(_) => std::thread::sleep(RETRY_EVERY.min(left())),
            }
        }
    }

    fn connect(&self, left: Duration, refusal: &mut Option<String>) -> Result<Guarded<TcpStream>, Obstacle> {
        let address = &self.address;
        let failed = |error: io::Error| {
            let reason = format!("rank 0 does not serve it at {address}: {}", explain(&error));
            if is_out_of_files(&error) { Obstacle::Stays(reason) } else { Obstacle::MayGo(reason) }
        };
        let socket = dial(address, left).map_err(failed)?;
        let (terms, own, host) = (Terms::default(), Ipv6Addr::UNSPECIFIED.into(), String::new());
        let greeting =
            Greeting { token: self.token, purpose: STORE, rank: 0, number: 0, terms, port: 0, address: own, host };
        let mut first = [0; 8];
        let mut until = Until(&socket, Instant::now() + left.min(WELCOME_WITHIN));
        let welcomed = socket.set_nodelay(true).and_then(|()| {
            until.write_all(&greeting.bytes())?;
            until.read_exact(&mut first)
        });
        welcomed.map_err(|error| {
            Obstacle::MayGo(match error.kind() {
                ErrorKind::WouldBlock | ErrorKind::TimedOut => {
                    format!("whoever listens at {address} does not answer: is it another program, or stopped?")
                }
                _ => format!("whoever listens at {address} hung up: is it another program, or just ending? ({error})"),
            })
        })?;
        match (u64::from_le_bytes(first), Refusal::of(u64::from_le_bytes(first))) {
            (WELCOME, _) => Ok(socket),
            (_, Some(why @ Refusal::Version)) => {
                Err(Obstacle::Stays(format!("rank 0 at {address} refused this rank: it was taken for one {why}")))
            }
            (_, Some(why)) => {
                // The job before, at the same address, may just be ending.
                let reason = format!("rank 0 at {address} refused this rank: it was taken for one {why}");
                Err(Obstacle::MayGo(refusal.insert(reason).clone()))
            }
            (_, None) => Err(Obstacle::MayGo(self.foreign())),
        }
    }

    /// Sends a request of the kind `asked`, and reads the answer.
    fn exchange(
        &self,
        socket: &TcpStream,
        asked: u64,
        request: &[u8],
        left: Duration,
    ) -> Result<(u64, Vec<u8>), Obstacle> {
        let address = &self.address;
        let ended = |error: io::Error| {
            Obstacle::MayGo(match error.kind() {
                ErrorKind::WouldBlock | ErrorKind::TimedOut => {
                    format!("rank 0, which serves it at {address}, does not answer: is it stopped?")
                }
                _ => format!("rank 0, which served it at {address}, is gone ({error})"),
            })
        };
        let mut socket = Until(socket, Instant::now() + left.min(FOREVER));
        let mut head = [0; HEAD];
        socket.write_all(request).and_then(|()| socket.read_exact(&mut head)).map_err(ended)?;
        let [kind, len, zero] = words(&head);
        let is_answer = match asked {
            GET => matches!(kind, NOTHING | VALUE | FAILED),
            _ => matches!(kind, DONE | FAILED),
        };
        if !is_answer || len > MOST_VALUE as u64 || zero != 0 {
            return Err(Obstacle::Stays(self.foreign()));
        }
        let mut value = vec![0; len as usize];
        socket.read_exact(&mut value).map_err(ended)?;
        Ok((kind, value))
    }

    fn foreign(&self) -> String {
        format!("whoever listens at {} does not answer as rank 0 does: choose another port", self.address)
    }
}
