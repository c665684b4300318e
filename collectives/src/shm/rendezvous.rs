//! How the ranks of a host find each other: a unix socket in the abstract name space, named after the job, on which rank 0
//! hands out the job's memfd. The name vanishes with rank 0's process, so nothing stale can be left.

use std::io::{ErrorKind, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::time::{Duration, Instant};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
};

use super::arena::{self, Mapping, Shape};
use crate::{Error, Launch};

/// First bytes of a greeting; the digit is the version of the protocol and of the shared words' layout.
const MAGIC: [u8; 8] = *b"pillion1";
/// A connection that has not greeted by then is dropped.
const GREETING_LIMIT: Duration = Duration::from_millis(500);
const RETRY_EVERY: Duration = Duration::from_millis(5);

/// Joins the job: every rank of the host returns a mapping of the same memory.
pub(crate) fn join(launch: &Launch, limit: Duration) -> Result<std::sync::Arc<Mapping>, Error> {
    let fail =
        |reason: String| Error::Rendezvous { rank: launch.rank, world: launch.world, job: launch.job.clone(), reason };
    if launch.local_world != launch.world {
        return Err(fail(format!(
            "only {} of its {} ranks are on this host, and this version joins ranks of one host: start all ranks on one host",
            launch.local_world, launch.world
        )));
    }
    if launch.world == 1 {
        let shape = Shape::of_host(1);
        return Mapping::new(arena::create(shape)?, shape);
    }
    let name = format!("pillion/{}", launch.job);
    let address = SocketAddr::from_abstract_name(&name).map_err(|error| fail(format!("the name `{name}`: {error}")))?;
    let deadline = Instant::now() + limit;
    if launch.rank == 0 { serve(launch, &address, deadline, fail) } else { connect(launch, &address, deadline, fail) }
}

/// What a rank says of itself: magic, rank, world.
fn greeting(launch: &Launch) -> [u8; 24] {
    let mut bytes = [0; 24];
    bytes[..8].copy_from_slice(&MAGIC);
    bytes[8..16].copy_from_slice(&(launch.rank as u64).to_le_bytes());
    bytes[16..].copy_from_slice(&(launch.world as u64).to_le_bytes());
    bytes
}

fn serve(
    launch: &Launch,
    address: &SocketAddr,
    deadline: Instant,
    fail: impl Fn(String) -> Error,
) -> Result<std::sync::Arc<Mapping>, Error> {
    let listener = UnixListener::bind_addr(address).map_err(|error| match error.kind() {
        ErrorKind::AddrInUse => fail("another running job has the same name: give each job its own id".to_owned()),
        _ => fail(format!("listening: {error}")),
    })?;
    listener.set_nonblocking(true).map_err(|error| fail(format!("listening: {error}")))?;
    let shape = Shape::of_host(launch.world);
    let file = arena::create(shape)?;
    let mut missing: Vec<usize> = (1..launch.world).collect();
    while !missing.is_empty() {
        match listener.accept() {
            Ok((stream, _)) => {
                if let Some(rank) = admit(launch, stream, &file, shape, &missing) {
                    missing.retain(|&other| other != rank);
                }
            }
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {
                if Instant::now() > deadline {
                    return Err(fail(format!(
                        "ranks {missing:?} did not come: were they started, with the same job id?"
                    )));
                }
                std::thread::sleep(RETRY_EVERY);
            }
            Err(error) => return Err(fail(format!("accepting: {error}"))),
        }
    }
    Mapping::new(file, shape)
}

/// Gives the memory to a process of the same user that greets as a missing rank of this job; anyone else is turned away.
fn admit(launch: &Launch, mut stream: UnixStream, file: &OwnedFd, shape: Shape, missing: &[usize]) -> Option<usize> {
    let user = rustix::net::sockopt::socket_peercred(&stream).ok()?.uid;
    if user != rustix::process::getuid() {
        return None;
    }
    stream.set_nonblocking(false).ok()?;
    stream.set_read_timeout(Some(GREETING_LIMIT)).ok()?;
    let mut bytes = [0; 24];
    stream.read_exact(&mut bytes).ok()?;
    let rank = u64::from_le_bytes(bytes[8..16].try_into().ok()?) as usize;
    let expected = greeting(&Launch { rank, ..launch.clone() });
    if bytes != expected || !missing.contains(&rank) {
        return None;
    }
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut message = SendAncillaryBuffer::new(&mut space);
    let files = [file.as_fd()];
    message.push(SendAncillaryMessage::ScmRights(&files));
    let sizes = [shape.reserve.to_le_bytes(), shape.heap.to_le_bytes()].concat();
    rustix::net::sendmsg(&stream, &[IoSlice::new(&sizes)], &mut message, SendFlags::NOSIGNAL).ok()?;
    Some(rank)
}

fn connect(
    launch: &Launch,
    address: &SocketAddr,
    deadline: Instant,
    fail: impl Fn(String) -> Error,
) -> Result<std::sync::Arc<Mapping>, Error> {
    let mut stream = loop {
        match UnixStream::connect_addr(address) {
            Ok(stream) => break stream,
            Err(error) if Instant::now() > deadline => {
                return Err(fail(format!("rank 0 did not come ({error}): was it started, with the same job id?")));
            }
            Err(_) => std::thread::sleep(RETRY_EVERY),
        }
    };
    let user = rustix::net::sockopt::socket_peercred(&stream).map_err(Error::system("asking who rank 0 is"))?.uid;
    if user != rustix::process::getuid() {
        return Err(fail("the job's socket belongs to another user".to_owned()));
    }
    stream.write_all(&greeting(launch)).map_err(|error| fail(format!("greeting rank 0: {error}")))?;
    stream
        .set_read_timeout(Some(deadline.saturating_duration_since(Instant::now()).max(RETRY_EVERY)))
        .map_err(|error| fail(format!("greeting rank 0: {error}")))?;
    let mut sizes = [0; 16];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut message = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::WAITALL;
    let received = rustix::io::retry_on_intr(|| {
        rustix::net::recvmsg(&stream, &mut [IoSliceMut::new(&mut sizes)], &mut message, flags)
    })
    .map_err(|error| fail(format!("waiting for rank 0's answer: {error}")))?;
    let file = message.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut files) => files.next(),
        _ => None,
    });
    let (Some(file), 16) = (file, received.bytes) else {
        return Err(fail(format!(
            "rank 0 refused this process: does its job have {} ranks, each started once, by the same program?",
            launch.world
        )));
    };
    let size = |at: usize| u64::from_le_bytes(sizes[at..at + 8].try_into().expect("8 bytes"));
    Mapping::new(file, Shape { world: launch.world, reserve: size(0), heap: size(8) })
}
