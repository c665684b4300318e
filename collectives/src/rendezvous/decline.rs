//! A rank that cannot join tells the others at the place where they would meet, so that they end at
//! once instead of at their deadline. Rank 0 tells each rank that comes, every other rank tells
//! rank 0. It needs no shared memory.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, SocketAddrUnix, SocketFlags};

use super::message::{ANSWER, GIVES_UP, GREETING, Refusal, bytes, check_magic, number};
use super::serve::{Connection, listen};
use super::socket::{Socket, dial, peer, wait};
use super::{Participant, RETRY_EVERY};
use crate::Error;
use crate::memory::fork::Guarded;

/// How long rank 0 waits for the others to come and be told.
const LISTEN_FOR: Duration = Duration::from_secs(10);
/// How long another rank tries to tell rank 0: less than our launcher's grace period, since this
/// rank prints its message afterwards.
const TELL_FOR: Duration = Duration::from_secs(4);

/// Tells the other ranks that this one cannot join, for a reason with this digest. Returns whether
/// rank 0 gives up for the same reason, so that this rank need not say it again.
pub(crate) fn decline(place: &Participant<'_>, digest: u64) -> bool {
    let Ok(address) = place.address() else { return false };
    match (place.world, place.rank) {
        (1, _) => false,
        (_, 0) => {
            // This rank ends because of its own error, not because of one in telling it.
            let _ = listen(place, &address, Instant::now() + LISTEN_FOR)
                .and_then(|listener| tell(place, &listener, (1..place.world as u64).collect(), digest));
            false
        }
        _ => tell_rank_zero(place, &address, digest),
    }
}

/// Answers whoever greets, until each of the `missing` ranks has.
pub(super) fn tell(
    place: &Participant<'_>,
    listener: &Socket,
    mut missing: BTreeSet<u64>,
    digest: u64,
) -> Result<(), Error> {
    let deadline = Instant::now() + LISTEN_FOR;
    let mut waiting: Vec<Connection> = Vec::new();
    while !missing.is_empty() && Instant::now() < deadline {
        let sockets = std::iter::once(listener).chain(waiting.iter().map(Connection::socket));
        let mut events: Vec<PollFd<'_>> = sockets.map(|socket| PollFd::new(socket, PollFlags::IN)).collect();
        wait(&mut events, deadline)?;
        waiting.retain_mut(|connection| match connection.read() {
            Ok(false) => true,
            Ok(true) => {
                missing.remove(&(connection.word(1) & !GIVES_UP));
                let _ = connection.answer([Refusal::GaveUp as u64, digest], place, None);
                false
            }
            Err(_) => false,
        });
        match rustix::net::accept_with(listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
            Ok(socket) if peer(&socket).is_ok_and(|peer| peer.is_ours()) => {
                waiting.push(Connection::new(Guarded::new(socket)))
            }
            Ok(_) | Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => {}
            Err(errno) => return Err(Error::system("accepting a connection")(errno)),
        }
    }
    Ok(())
}

fn tell_rank_zero(place: &Participant<'_>, address: &SocketAddrUnix, digest: u64) -> bool {
    let deadline = Instant::now() + TELL_FOR;
    while Instant::now() < deadline {
        if let Some(answer) = tell_once(place, address, digest, deadline) {
            return number(&answer, 1) == Refusal::GaveUp as u64 && number(&answer, 2) == digest;
        }
        std::thread::sleep(RETRY_EVERY);
    }
    false
}

/// Rank 0's answer, if it listens and gives one.
fn tell_once(
    place: &Participant<'_>,
    address: &SocketAddrUnix,
    digest: u64,
    deadline: Instant,
) -> Option<[u8; ANSWER]> {
    let socket = dial(address).ok()?;
    if !peer(&socket).ok()?.is_ours() {
        return None;
    }
    let greeting = bytes([place.rank as u64 | GIVES_UP, digest], &place.terms);
    rustix::net::send(&socket, &greeting, SendFlags::NOSIGNAL).ok().filter(|&sent| sent == GREETING)?;
    let (mut answer, mut received) = ([0; ANSWER], 0);
    while received < ANSWER && Instant::now() < deadline {
        match rustix::net::recv(&socket, &mut answer[received..], RecvFlags::empty()) {
            Ok((count, _)) if count > 0 => received += count,
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => wait(&mut [PollFd::new(&socket, PollFlags::IN)], deadline).ok()?,
            Ok(_) | Err(_) => return None,
        }
        check_magic(&answer[..received]).ok()?;
    }
    (received == ANSWER).then_some(answer)
}
