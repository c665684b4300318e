//! Sockets that never block, and who is at their other end.

use std::fmt;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use crate::Error;
use crate::memory::fork::Guarded;

/// Who is at the other end of a socket, as the kernel recorded it when that process connected or listened.
pub(super) struct Peer {
    pid: libc::pid_t,
    user: libc::uid_t,
}

impl Peer {
    pub(super) fn is_ours(&self) -> bool {
        self.user == rustix::process::geteuid().as_raw()
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.pid {
            0 => write!(f, "a process of user {} outside this PID namespace", self.user),
            pid => write!(f, "process {pid} of user {}", self.user),
        }
    }
}

pub(super) fn peer(socket: &OwnedFd) -> Result<Peer, Error> {
    let mut peer = libc::ucred { pid: 0, uid: 0, gid: 0 };
    let mut size = size_of::<libc::ucred>() as libc::socklen_t;
    // rustix reads the process id as a number that is not zero, which it is for a process outside this PID namespace.
    // SAFETY: the descriptor is open, and the kernel writes at most `size` bytes to `peer`, for which every bit pattern is valid.
    let code = unsafe {
        libc::getsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, libc::SO_PEERCRED, (&raw mut peer).cast(), &raw mut size)
    };
    if code != 0 {
        let reason = std::io::Error::last_os_error().to_string();
        return Err(Error::System { what: "asking who is at the other end of a socket", reason });
    }
    Ok(Peer { pid: peer.pid, user: peer.uid })
}

/// A socket that forked children do not keep.
pub(super) type Socket = Guarded<OwnedFd>;

pub(super) fn socket() -> rustix::io::Result<Socket> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).map(Guarded::new)
}

/// Connects; [`Errno::AGAIN`] where a listener's queue is full.
pub(super) fn dial(address: &SocketAddrUnix) -> rustix::io::Result<Socket> {
    let socket = socket()?;
    rustix::net::connect(&socket, address)?;
    Ok(socket)
}

/// Sleeps until one of the sockets has news, a signal arrives, or the time has come.
pub(super) fn wait(events: &mut [PollFd<'_>], until: Instant) -> Result<(), Error> {
    let left = Timespec::try_from(until.saturating_duration_since(Instant::now())).ok();
    match rustix::event::poll(events, left.as_ref()) {
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(errno) => Err(Error::system("waiting for connections")(errno)),
    }
}

/// Whether there is something to accept or to read.
pub(super) fn is_ready(socket: &OwnedFd) -> Result<bool, Error> {
    let mut events = [PollFd::new(socket, PollFlags::IN)];
    wait(&mut events, Instant::now())?;
    Ok(!events[0].revents().is_empty())
}
