//! Rank 0's side: it gives the memory to each rank that greets, and turns everybody else away.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags};

use super::decline::tell;
use super::message::{GIVES_UP, GREETING, Refusal, WELCOME, bytes, check_magic, number, terms};
use super::socket::{Socket, dial, is_ready, peer, socket, wait};
use super::{ASK_EVERY, GoOn, Participant, RETRY_EVERY};
use crate::Error;
use crate::memory::fork::Guarded;
use crate::memory::mapping::{self, Mapping, Shape};
use crate::patience::Patience;

/// A connection that has not greeted by then is dropped. Its rank, if it is one, comes again.
const GREETING_LIMIT: Duration = Duration::from_secs(5);
/// Connections that may be waiting for their greeting to arrive; one more pushes out the oldest.
const MOST_WAITING: usize = 256;

/// How many connections were turned away, and why.
#[derive(Default)]
struct Refused(BTreeMap<Refusal, usize>);

impl Refused {
    fn count(&mut self, refusal: Refusal) {
        *self.0.entry(refusal).or_default() += 1;
    }
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let total: usize = self.0.values().sum();
        if total > 0 {
            write!(f, "; {total} {} refused: ", if total == 1 { "connection was" } else { "connections were" })?;
            let each: Vec<String> = self.0.iter().map(|(refusal, count)| format!("{count} {refusal}")).collect();
            f.write_str(&each.join(", "))?;
        }
        Ok(())
    }
}

/// What a greeting says.
#[derive(Clone, Copy)]
pub(super) enum Arrival {
    /// This rank was missing, and joins.
    Joined(usize),
    /// This rank cannot join, for a reason with this digest.
    GivesUp(usize, u64),
}

/// Why not all ranks came.
struct Failure {
    error: Error,
    /// Where a rank gave up: the digest of its reason, and the ranks that have not been told.
    gave_up: Option<(u64, BTreeSet<u64>)>,
}

impl From<Error> for Failure {
    fn from(error: Error) -> Failure {
        Failure { error, gave_up: None }
    }
}

/// A connection of a process of this user that has not greeted yet.
pub(super) struct Connection {
    socket: Socket,
    until: Instant,
    greeting: [u8; GREETING],
    received: usize,
}

impl Connection {
    pub(super) fn new(socket: Socket) -> Connection {
        let until = Instant::now() + GREETING_LIMIT;
        Connection { socket, until, greeting: [0; GREETING], received: 0 }
    }

    /// A word of the greeting.
    pub(super) fn word(&self, word: usize) -> u64 {
        number(&self.greeting, word)
    }

    pub(super) fn socket(&self) -> &Socket {
        &self.socket
    }

    /// Reads what has come. Returns whether the greeting is whole.
    pub(super) fn read(&mut self) -> Result<bool, Refusal> {
        while self.received < GREETING {
            match rustix::io::read(&self.socket, &mut self.greeting[self.received..]) {
                Ok(0) => return Err(Refusal::HungUp),
                Ok(count) => self.received += count,
                Err(Errno::AGAIN) => return Ok(false),
                Err(Errno::INTR) => {}
                Err(_) => return Err(Refusal::HungUp),
            }
            check_magic(&self.greeting[..self.received])?;
        }
        Ok(true)
    }

    /// Who greeted here; `None` while the greeting is not whole.
    fn admit(
        &mut self,
        place: &Participant<'_>,
        missing: &[usize],
        file: &OwnedFd,
        shape: Shape,
    ) -> Result<Option<Arrival>, Refusal> {
        if !self.read()? {
            return Ok(None);
        }
        let arrival = arrival(&self.greeting, place, missing)?;
        if let Arrival::Joined(_) = arrival {
            self.answer([WELCOME, shape.reserve], place, Some(file)).map_err(|_| Refusal::HungUp)?;
        }
        Ok(Some(arrival))
    }

    pub(super) fn answer(
        &self,
        numbers: [u64; 2],
        place: &Participant<'_>,
        file: Option<&OwnedFd>,
    ) -> rustix::io::Result<usize> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut message = SendAncillaryBuffer::new(&mut space);
        let files = file.map(|file| [file.as_fd()]);
        if let Some(files) = &files {
            message.push(SendAncillaryMessage::ScmRights(files));
        }
        let bytes = bytes(numbers, &place.terms);
        rustix::net::sendmsg(&self.socket, &[IoSlice::new(&bytes)], &mut message, SendFlags::NOSIGNAL)
    }

    fn overdue(&self) -> Refusal {
        if self.received == 0 { Refusal::Silent } else { Refusal::Unfinished }
    }
}

/// Who greets rank 0 at `place`, where these ranks are `missing`.
pub(super) fn arrival(
    greeting: &[u8; GREETING],
    place: &Participant<'_>,
    missing: &[usize],
) -> Result<Arrival, Refusal> {
    let (world, rank, number) = (place.world, number(greeting, 1), number(greeting, 2));
    let rank_of = |word: u64| usize::try_from(word).ok().filter(|rank| (1..world).contains(rank));
    if rank & GIVES_UP != 0
        && let Some(rank) = rank_of(rank & !GIVES_UP)
    {
        return Ok(Arrival::GivesUp(rank, number));
    }
    if number != world as u64 {
        return Err(Refusal::World);
    }
    match rank_of(rank) {
        None => Err(Refusal::NoSuchRank),
        Some(rank) if !missing.contains(&rank) => Err(Refusal::Taken),
        Some(_) if terms(greeting) != place.terms => Err(Refusal::Terms),
        Some(rank) => Ok(Arrival::Joined(rank)),
    }
}

pub(super) fn serve(
    place: &Participant<'_>,
    address: &SocketAddrUnix,
    patience: &mut Patience,
    go_on: &mut GoOn<'_>,
) -> Result<Arc<Mapping>, Error> {
    let shape = Shape::of_host(place.world);
    // Before anybody is admitted: whoever comes later can then be told that this rank gives up.
    let mapping = Mapping::new(mapping::create(shape)?, shape, place.rank)?;
    let listener = listen(place, address, patience.deadline)?;
    let admitted = admit_all(place, &listener, mapping.file(), shape, patience, go_on);
    let Err(Failure { error, gave_up }) = admitted else { return Ok(mapping) };
    // Ranks that were admitted wait for this one now, and would name it at their deadline.
    mapping.group(shape.all(), 0).abort(&error.to_string());
    if let Some((digest, untold)) = gave_up {
        // This rank ends because of that error, not because of one in passing it on.
        let _ = tell(place, &listener, untold, digest);
    }
    Err(error)
}

fn admit_all(
    place: &Participant<'_>,
    listener: &Socket,
    file: &OwnedFd,
    shape: Shape,
    patience: &mut Patience,
    go_on: &mut GoOn<'_>,
) -> Result<(), Failure> {
    let deadline = patience.deadline;
    let mut missing: Vec<usize> = (1..place.world).collect();
    // Oldest first.
    let mut waiting: VecDeque<Connection> = VecDeque::new();
    let mut refused = Refused::default();
    while !missing.is_empty() {
        let now = Instant::now();
        while let Some(late) = waiting.pop_front_if(|first| first.until.min(deadline) <= now) {
            refused.count(late.overdue());
        }
        if now >= deadline {
            let reason = format!(
                "ranks {missing:?}{} did not come: were they started on this host, with the same job id?{refused}",
                place.counting()
            );
            return Err(place.fail(reason).into());
        }
        patience.warn(|| format!("ranks {missing:?}{} to come{refused}", place.counting()));
        let sockets = std::iter::once(listener).chain(waiting.iter().map(|connection| &connection.socket));
        let mut events: Vec<PollFd<'_>> = sockets.map(|socket| PollFd::new(socket, PollFlags::IN)).collect();
        go_on(&missing)?;
        let until = patience.next().min(now + ASK_EVERY);
        wait(&mut events, waiting.front().map_or(until, |first| first.until.min(until)))?;
        // The first to give up, and all.
        let (mut gave_up, mut quitters) = (None, BTreeSet::new());
        waiting.retain_mut(|connection| match connection.admit(place, &missing, file, shape) {
            Ok(None) => true,
            Ok(Some(Arrival::Joined(rank))) => {
                missing.retain(|&other| other != rank);
                false
            }
            Ok(Some(Arrival::GivesUp(rank, digest))) => {
                // The first learns that it was heard, the others what the first has said.
                let answer = gave_up.map_or([WELCOME, 0], |(_, first)| [Refusal::GaveUp as u64, first]);
                let _ = connection.answer(answer, place, None);
                gave_up.get_or_insert((rank, digest));
                quitters.insert(rank);
                false
            }
            Err(refusal) => {
                // Whoever does not want to hear it is turned away all the same.
                let _ = connection.answer([refusal as u64, place.world as u64], place, None);
                refused.count(refusal);
                if refusal == Refusal::Terms {
                    patience.complain(connection.word(1), &terms(&connection.greeting), &place.terms);
                }
                false
            }
        });
        if let Some((rank, digest)) = gave_up {
            let error = Error::Aborted { rank, reason: "it cannot join, and has said why".to_owned() };
            let untold = missing.iter().filter(|other| !quitters.contains(other)).map(|&other| other as u64).collect();
            return Err(Failure { error, gave_up: Some((digest, untold)) });
        }
        // No more at once than may wait: one that has greeted is read before newer ones could push it out.
        for accepted in 0..MOST_WAITING {
            // At the limit of open files the system refuses before it looks whether anybody waits.
            if !is_ready(listener)? {
                break;
            }
            let socket = match rustix::net::accept_with(listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
                Ok(socket) => Guarded::new(socket),
                Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => break,
                // Those that came just now may have greeted, and need no file afterwards.
                Err(Errno::MFILE | Errno::NFILE) if accepted > 0 => break,
                // Without the older ones there is room for this one.
                Err(Errno::MFILE | Errno::NFILE) if waiting.pop_front().is_some() => {
                    refused.count(Refusal::PushedOut);
                    continue;
                }
                Err(errno) => return Err(Error::system("accepting a connection of another rank")(errno).into()),
            };
            if !peer(&socket).is_ok_and(|peer| peer.is_ours()) {
                refused.count(Refusal::Stranger);
                continue;
            }
            if waiting.len() == MOST_WAITING {
                waiting.pop_front();
                refused.count(Refusal::PushedOut);
            }
            waiting.push_back(Connection::new(socket));
        }
    }
    Ok(())
}

/// Takes the name. Waits for a stranger to give it up, but not for another job of this user.
pub(super) fn listen(place: &Participant<'_>, address: &SocketAddrUnix, deadline: Instant) -> Result<Socket, Error> {
    let failed = Error::system("listening for the other ranks");
    let listener = socket().map_err(&failed)?;
    loop {
        match rustix::net::bind(&listener, address) {
            Ok(()) => break,
            Err(Errno::ADDRINUSE) => {}
            Err(errno) => return Err(failed(errno)),
        }
        // Where nobody can be asked, the name has just been taken or given up.
        let holder = dial(address).ok().and_then(|socket| peer(&socket).ok());
        if let Some(holder) = holder.as_ref().filter(|holder| holder.is_ours()) {
            return Err(
                place.fail(format!("another running job ({holder}) has the same name: give each job its own id"))
            );
        }
        if Instant::now() >= deadline {
            let holder = holder.map_or_else(|| "a process that accepts nobody".to_owned(), |holder| holder.to_string());
            return Err(place.fail(format!("{holder} has taken this job's name: give the job another id")));
        }
        std::thread::sleep(RETRY_EVERY);
    }
    rustix::net::listen(&listener, i32::from(i16::MAX)).map_err(&failed)?;
    Ok(listener)
}
