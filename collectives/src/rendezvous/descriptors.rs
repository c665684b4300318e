//! How ranks of one host give each other file descriptors.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    SocketAddrUnix, SocketFlags,
};

use super::socket::{Socket, dial, peer, socket, wait};
use crate::Error;
use crate::memory::fork::Guarded;

/// How long a rank sleeps at most before it looks at the others.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// A rank whose connection has ended is seen to be dead within this.
const DEATH_SHOWS_WITHIN: Duration = Duration::from_millis(100);

/// A name that the system chose, as a number: 5 hexadecimal digits behind a zero.
fn name(listener: &Socket) -> Result<u64, Error> {
    let failed = Error::system("asking for a socket's name");
    let address = rustix::net::getsockname(listener).map_err(&failed)?;
    let address = SocketAddrUnix::try_from(address).map_err(&failed)?;
    let digits = address.abstract_name().filter(|name| name.len() <= 8).ok_or_else(|| failed(Errno::INVAL))?;
    Ok(digits.iter().fold(0, |word, &byte| word << 8 | u64::from(byte)))
}

fn address(name: u64) -> Result<SocketAddrUnix, Error> {
    let bytes = name.to_be_bytes();
    let start = bytes.iter().position(|&byte| byte != 0).unwrap_or(bytes.len());
    SocketAddrUnix::new_abstract_name(&bytes[start..]).map_err(Error::system("naming a socket"))
}

/// Gives `own` to every other rank and takes theirs, by rank; None is this one. Every rank calls
/// it. `exchange` gives every rank a word of each, in order; `look` fails when another rank has.
///
/// # Errors
/// Theirs; [`Error::System`]; and where a descriptor does not come within `limit`.
pub(crate) fn swap(
    own: BorrowedFd<'_>,
    rank: usize,
    exchange: &dyn Fn(u64) -> Result<Vec<u64>, Error>,
    look: &dyn Fn() -> Result<(), Error>,
    limit: Duration,
) -> Result<Vec<Option<Guarded<OwnedFd>>>, Error> {
    let system = Error::system("passing memory of a GPU to another process");
    // A connection that ends is told from a rank that dies by a second look, because the kernel
    // ends the connection first.
    let failed = |errno: Errno| {
        let until = Instant::now() + DEATH_SHOWS_WITHIN;
        while matches!(errno, Errno::CONNRESET | Errno::PIPE | Errno::CONNREFUSED) && Instant::now() < until {
            if let Err(error) = look() {
                return error;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        look().err().unwrap_or_else(|| system(errno))
    };
    let listener = socket().map_err(&system)?;
    rustix::net::bind(&listener, &SocketAddrUnix::new_unnamed()).map_err(&system)?;
    rustix::net::listen(&listener, i32::from(i16::MAX)).map_err(&system)?;
    // Who has the names finds everybody listening.
    let names = exchange(name(&listener)?)?;
    let until = Instant::now().checked_add(limit);
    let sleep = |socket: &Socket| {
        look()?;
        let now = Instant::now();
        if until.is_some_and(|until| now >= until) {
            return Err(system(Errno::TIMEDOUT));
        }
        wait(&mut [PollFd::new(socket, PollFlags::IN)], now + LOOK_EVERY)
    };
    // A connection is made when it is asked for, and accepted later: nobody waits for anybody here.
    let dialed = names.iter().enumerate().map(|(other, &name)| match other == rank {
        true => Ok(None),
        false => Ok(Some(dial(&address(name)?).map_err(&failed)?)),
    });
    let dialed = dialed.collect::<Result<Vec<Option<Socket>>, Error>>()?;
    let mut given = Vec::new();
    while given.len() + 1 < names.len() {
        match rustix::net::accept_with(&listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
            Ok(connection) => {
                let connection = Guarded::new(connection);
                // A stranger has no business here, and is sent nothing.
                if peer(&connection).is_ok_and(|peer| peer.is_ours()) {
                    send(&connection, own).map_err(&failed)?;
                    given.push(connection);
                }
            }
            Err(Errno::AGAIN) => sleep(&listener)?,
            Err(Errno::INTR | Errno::CONNABORTED) => {}
            Err(errno) => return Err(failed(errno)),
        }
    }
    let taken = dialed.iter().map(|connection| {
        let Some(connection) = connection else { return Ok(None) };
        loop {
            match receive(connection) {
                Ok(descriptor) => return Ok(Some(Guarded::new(descriptor))),
                Err(Errno::AGAIN) => sleep(connection)?,
                Err(Errno::INTR) => {}
                Err(errno) => return Err(failed(errno)),
            }
        }
    });
    let taken = taken.collect::<Result<_, Error>>()?;
    // What is sent and not received goes with its connection.
    exchange(0)?;
    Ok(taken)
}

fn send(connection: &OwnedFd, descriptor: BorrowedFd<'_>) -> rustix::io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut message = SendAncillaryBuffer::new(&mut space);
    let descriptors = [descriptor.as_fd()];
    message.push(SendAncillaryMessage::ScmRights(&descriptors));
    rustix::net::sendmsg(connection, &[IoSlice::new(&[1])], &mut message, SendFlags::NOSIGNAL).map(|_| ())
}

fn receive(connection: &Socket) -> rustix::io::Result<OwnedFd> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut message = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    let into = &mut [IoSliceMut::new(&mut byte)];
    if rustix::net::recvmsg(connection, into, &mut message, RecvFlags::CMSG_CLOEXEC)?.bytes == 0 {
        return Err(Errno::CONNRESET);
    }
    let received = message.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    });
    // A byte without one: this process may open no more files.
    received.ok_or(Errno::MFILE)
}
