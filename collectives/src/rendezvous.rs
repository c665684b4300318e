//! How the ranks of a host find each other: a unix socket in the abstract name space, named after the job, on which rank 0
//! hands out the job's memfd. The name vanishes with rank 0's process, so nothing stale can be left.
//!
//! A rank connects and greets; rank 0 answers with the memfd, or with the reason why not. Anybody on the host can connect to the name,
//! or take it first, so both sides ask the kernel whose process is at the other end, and neither waits for one connection while
//! others come: rank 0 polls a bounded number of them, each for a limited time. Whoever is turned away is counted, and the
//! count stands in the error at the deadline. A stranger costs time at most; a process of the same user that contradicts this one (a rank
//! that exists twice, another world, another version) ends the attempt at once, because waiting would not mend it.

use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags, SocketAddrUnix};

pub(crate) use self::decline::decline;
use self::message::{ANSWER, GREETING, Refusal, WELCOME, bytes, check_magic, number, terms};
use self::serve::serve;
use self::socket::{Peer, Socket, dial, peer, wait};
use crate::Error;
use crate::memory::mapping::{self, Mapping, Shape};
use crate::patience::Patience;
use crate::terms::Terms;

mod decline;
#[cfg(feature = "cuda")]
pub(crate) mod descriptors;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
mod message;
mod serve;
mod socket;
#[cfg(test)]
mod tests;

const RETRY_EVERY: Duration = Duration::from_millis(5);
/// No memory that a rank hands out can be larger: the addresses of a process on x86-64.
const MOST_BYTES: u64 = 1 << 47;

/// One of the ranks that meet.
pub(crate) struct Participant<'a> {
    /// Of the meeting: the job's name, with a suffix where not the whole job meets. At most 99 bytes.
    pub(crate) name: &'a str,
    /// This rank, counted among those who meet.
    pub(crate) rank: usize,
    /// How many meet.
    pub(crate) world: usize,
    /// This rank's number in the job, for messages.
    pub(crate) global_rank: usize,
    /// Number of ranks of the job, for messages.
    pub(crate) global_world: usize,
    /// Settings that rank 0 must share.
    pub(crate) terms: Terms,
}

/// Asked now and then whether to go on waiting for ranks, as those who meet count.
pub(crate) type GoOn<'a> = dyn FnMut(&[usize]) -> Result<(), Error> + 'a;

/// How long a rank sleeps at most before it asks [`GoOn`].
const ASK_EVERY: Duration = Duration::from_millis(200);

/// Meets the others within `limit`: each of them returns a mapping of the same memory. A rank that
/// waits longer than `warn_after` says for whom.
///
/// # Errors
/// Those of `go_on`, too.
pub(crate) fn join(
    place: &Participant<'_>,
    limit: Duration,
    warn_after: Duration,
    go_on: &mut GoOn<'_>,
) -> Result<Arc<Mapping>, Error> {
    if place.world == 1 {
        let shape = Shape::of_host(1);
        return Mapping::new(mapping::create(shape)?, shape, 0);
    }
    let address = place.address()?;
    let mut patience = Patience::new(place.global_rank, limit, warn_after);
    match place.rank {
        0 => serve(place, &address, &mut patience, go_on),
        _ => connect(place, &address, &mut patience, go_on),
    }
}

impl Participant<'_> {
    fn address(&self) -> Result<SocketAddrUnix, Error> {
        let name = format!("pillion/{}", self.name);
        SocketAddrUnix::new_abstract_name(name.as_bytes())
            .map_err(|errno| self.fail(format!("the socket's name `{name}`, {} bytes: {errno}", name.len())))
    }

    fn fail(&self, reason: String) -> Error {
        let (rank, world) = (self.global_rank, self.global_world);
        Error::Rendezvous { rank, world, job: self.name.to_owned(), reason }
    }

    /// Says how ranks are counted where that is not how the job counts them.
    fn counting(&self) -> String {
        let some = self.world != self.global_world;
        if some { format!(" (counted among the {} that meet here)", self.world) } else { String::new() }
    }

    fn greeting(&self) -> [u8; GREETING] {
        bytes([self.rank as u64, self.world as u64], &self.terms)
    }
}

/// What came of one connection to the job's name.
enum Attempt {
    Joined(Arc<Mapping>),
    /// Why not; the next one may go better.
    Again(String),
}

fn connect(
    place: &Participant<'_>,
    address: &SocketAddrUnix,
    patience: &mut Patience,
    go_on: &mut GoOn<'_>,
) -> Result<Arc<Mapping>, Error> {
    loop {
        go_on(&[0])?;
        match attempt(place, address, patience, go_on)? {
            Attempt::Joined(mapping) => return Ok(mapping),
            Attempt::Again(obstacle) if Instant::now() >= patience.deadline => {
                return Err(place.fail(format!("rank 0{} did not come: {obstacle}", place.counting())));
            }
            Attempt::Again(obstacle) => {
                patience.warn(|| format!("rank 0{}: {obstacle}", place.counting()));
                std::thread::sleep(RETRY_EVERY);
            }
        }
    }
}

fn attempt(
    place: &Participant<'_>,
    address: &SocketAddrUnix,
    patience: &mut Patience,
    go_on: &mut GoOn<'_>,
) -> Result<Attempt, Error> {
    let again = |obstacle: String| Ok(Attempt::Again(obstacle));
    let socket = match dial(address) {
        Ok(socket) => socket,
        Err(Errno::AGAIN) => return again("whoever listens for it accepts nobody: is it stopped?".to_owned()),
        Err(errno @ (Errno::MFILE | Errno::NFILE)) => return Err(Error::system("connecting to rank 0")(errno)),
        Err(errno) => {
            return again(format!("nobody listens ({errno}): was it started on this host, with the same job id?"));
        }
    };
    let peer = peer(&socket)?;
    if !peer.is_ours() {
        return again(format!("{peer}, another user, listens under this job's name: give the job another id"));
    }
    ask(place, &socket, &peer, patience, go_on)
}

/// Greets on a connection to `peer`, which may be rank 0, and reads its answer.
fn ask(
    place: &Participant<'_>,
    socket: &Socket,
    peer: &Peer,
    patience: &mut Patience,
    go_on: &mut GoOn<'_>,
) -> Result<Attempt, Error> {
    let again = |obstacle: String| Ok(Attempt::Again(obstacle));
    let hung_up = format!("{peer} hung up without an answer: is it just ending, or another version of this program?");
    let foreign = || {
        place.fail(format!(
            "{peer} listens under this job's name, but does not answer as rank 0 does: give the job another id"
        ))
    };
    if rustix::net::send(socket, &place.greeting(), SendFlags::NOSIGNAL) != Ok(GREETING) {
        return again(hung_up);
    }
    let (mut answer, mut received, mut file) = ([0; ANSWER], 0, None);
    while received < ANSWER {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut message = RecvAncillaryBuffer::new(&mut space);
        let mut into = [IoSliceMut::new(&mut answer[received..])];
        match rustix::net::recvmsg(socket, &mut into, &mut message, RecvFlags::CMSG_CLOEXEC).map(|got| got.bytes) {
            Ok(count) if count > 0 => received += count,
            Err(Errno::INTR) => continue,
            Err(Errno::AGAIN) if Instant::now() >= patience.deadline => {
                return again(format!("{peer} listens for it, but does not answer: is it stopped?"));
            }
            Err(Errno::AGAIN) => {
                patience.warn(|| format!("{peer}, which listens as rank 0 does, to answer"));
                wait(&mut [PollFd::new(socket, PollFlags::IN)], patience.next().min(Instant::now() + ASK_EVERY))?;
                go_on(&[0])?;
                continue;
            }
            Ok(_) | Err(_) if received == 0 => return again(hung_up),
            Ok(_) | Err(_) => return Err(foreign()),
        }
        file = file.or(message.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut files) => files.next(),
            _ => None,
        }));
        match check_magic(&answer[..received]) {
            Err(Refusal::Version) => {
                return Err(place.fail(format!(
                    "{peer} is rank 0 of another version of this program: start every rank from the same build"
                )));
            }
            Err(_) => return Err(foreign()),
            Ok(()) => {}
        }
    }
    let is = |refusal: Refusal| number(&answer, 1) == refusal as u64;
    let reason = match file {
        Some(file) if number(&answer, 1) == WELCOME => {
            return map(place, file, number(&answer, 2)).map(Attempt::Joined);
        }
        None if number(&answer, 1) == WELCOME => {
            return Err(Error::system("receiving the job's shared memory from rank 0")(Errno::MFILE));
        }
        _ if is(Refusal::GaveUp) => {
            return Err(Error::Aborted { rank: 0, reason: "it cannot start, and has said why".to_owned() });
        }
        _ if is(Refusal::Taken) => {
            format!("rank {}{} has come already: start each rank once", place.rank, place.counting())
        }
        _ if is(Refusal::World) => format!(
            "rank 0 expects {} ranks here, this process {}: start every rank with the same number of ranks",
            number(&answer, 2),
            place.world
        ),
        _ if is(Refusal::Terms) => match place.terms.differences("this rank", &terms(&answer)) {
            Some(differences) => differences,
            None => return Err(foreign()),
        },
        _ if is(Refusal::NoSuchRank) => format!("rank {} is none of the {} expected", place.rank, place.world),
        _ => return Err(foreign()),
    };
    Err(place.fail(reason))
}

/// Maps what rank 0 sent, if nobody can shrink it under the mapping: touching what is gone would end the process.
fn map(place: &Participant<'_>, file: OwnedFd, reserve: u64) -> Result<Arc<Mapping>, Error> {
    let bytes = reserve.checked_mul(place.world as u64);
    if !reserve.is_multiple_of(mapping::PAGE) || bytes.is_none_or(|bytes| bytes > MOST_BYTES) {
        return Err(place.fail(format!(
            "rank 0 announced arenas of {reserve} bytes, which cannot be: start every rank from the same build"
        )));
    }
    if !rustix::fs::fcntl_get_seals(&file).is_ok_and(|seals| seals.contains(mapping::SEALS)) {
        return Err(place.fail(
            "rank 0 sent a file that is no memory of sealed size: start every rank from the same build".to_owned(),
        ));
    }
    Mapping::new(file, Shape { world: place.world, reserve }, place.rank)
}
