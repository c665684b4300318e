//! The parsers of what comes to the place where ranks meet, and from it, for fuzzers.

use rustix::net::{AddressFamily, SocketFlags, SocketType};

use super::Participant;
use super::socket::Socket;
use crate::memory::fork::Guarded;
use crate::terms::Terms;

/// The ends of a connection that never blocks.
fn pair() -> (Socket, Socket) {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    rustix::net::socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None)
        .map(|(one, other)| (Guarded::new(one), Guarded::new(other)))
        .expect("a socket")
}

fn place(rank: usize, world: usize) -> Participant<'static> {
    let terms = Terms::default();
    Participant { name: "fuzzing", rank, world, global_rank: rank, global_world: world, terms }
}

/// What a rank says to rank 0.
pub mod rendezvous_greeting {
    use super::super::message::{GIVES_UP, GREETING, bytes, check_magic};
    use super::super::serve::{Arrival, Connection, arrival};
    use super::{pair, place};
    use crate::terms::Terms;

    /// A greeting, and one of a rank that cannot join.
    pub fn seeds() -> Vec<Vec<u8>> {
        let gives_up = bytes([2 | GIVES_UP, 99], &Terms::default());
        vec![place(1, 3).greeting().to_vec(), gives_up.to_vec()]
    }

    /// Only a missing rank joins, however its greeting is cut into pieces.
    pub fn check(data: &[u8]) {
        const WORLD: usize = 3;
        for missing in [&[1, 2][..], &[2], &[]] {
            let (ours, theirs) = pair();
            let mut connection = Connection::new(ours);
            let mut read = Ok(false);
            for piece in data.chunks(7) {
                rustix::io::write(&theirs, piece).expect("a short piece");
                read = connection.read();
                if read != Ok(false) {
                    break;
                }
            }
            if read == Ok(false) {
                drop(theirs);
                assert!(data.len() < GREETING && connection.read().is_err());
                continue;
            }
            assert_eq!(read.is_ok(), check_magic(&data[..data.len().min(GREETING)]).is_ok());
            let Some(greeting) = data.first_chunk::<GREETING>().filter(|_| read.is_ok()) else { continue };
            match arrival(greeting, &place(0, WORLD), missing) {
                Ok(Arrival::Joined(rank)) => {
                    assert!(missing.contains(&rank));
                    assert_eq!(greeting, &place(rank, WORLD).greeting());
                }
                Ok(Arrival::GivesUp(rank, digest)) => {
                    assert!((1..WORLD).contains(&rank));
                    let start = bytes([rank as u64 | GIVES_UP, digest], &Terms::default());
                    assert_eq!(greeting[..24], start[..24]);
                }
                Err(_) => {}
            }
        }
    }
}

/// What rank 0 answers.
pub mod rendezvous_answer {
    use std::io::IoSlice;
    use std::mem::MaybeUninit;
    use std::os::fd::AsFd;
    use std::time::Duration;

    use rustix::fs::MemfdFlags;
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};

    use super::super::message::{Refusal, WELCOME, bytes};
    use super::super::socket::peer;
    use super::super::{Attempt, ask};
    use super::{pair, place};
    use crate::memory::mapping::{self, PAGE, Shape};
    use crate::patience::Patience;
    use crate::terms::Terms;

    const SHAPE: Shape = Shape { world: 2, reserve: 4 * PAGE };

    /// A first byte that says which file comes along, and an answer.
    pub fn seeds() -> Vec<Vec<u8>> {
        let seed = |file: u8, answer: [u64; 2]| [&[file][..], &bytes(answer, &Terms::default())].concat();
        let refusals = [Refusal::World, Refusal::Taken, Refusal::GaveUp, Refusal::NoSuchRank];
        let refused = refusals.into_iter().map(|refusal| seed(2, [refusal as u64, 3]));
        refused.chain((0..3).map(|file| seed(file, [WELCOME, SHAPE.reserve]))).collect()
    }

    /// Memory is mapped only where its size is the one that the answer says.
    pub fn check(data: &[u8]) {
        let Some((&kind, answer)) = data.split_first() else { return };
        let (ours, theirs) = pair();
        let file = match kind {
            0 => mapping::create(SHAPE).expect("memory"),
            _ => rustix::fs::memfd_create("fuzzing", MemfdFlags::CLOEXEC).expect("memory"),
        };
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut message = SendAncillaryBuffer::new(&mut space);
        let files = [file.as_fd()];
        if kind < 2 {
            message.push(SendAncillaryMessage::ScmRights(&files));
        }
        let _ = rustix::net::sendmsg(&theirs, &[IoSlice::new(answer)], &mut message, SendFlags::NOSIGNAL);
        let _ = rustix::net::shutdown(&theirs, rustix::net::Shutdown::Write);
        let peer = peer(&ours).expect("this process");
        let mut patience = Patience::new(1, Duration::ZERO, Duration::MAX);
        if let Ok(Attempt::Joined(mapping)) = ask(&place(1, 2), &ours, &peer, &mut patience, &mut |_| Ok(())) {
            assert_eq!((kind, mapping.shape()), (0, SHAPE));
            assert_eq!(answer[..24], bytes([WELCOME, SHAPE.reserve], &Terms::default())[..24]);
        }
    }
}
