//! What must not wait behind data: that a rank gives up, that it leaves in order, and, where its
//! connection ends without either, that it is gone.

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;

use super::line::lost;
use crate::Error;
use crate::memory::fork::Guarded;

/// First byte of what is said.
const LEAVES: u8 = 1;
const ABORTS: u8 = 2;
/// Most bytes of a reason.
const REASON: usize = 512;

pub(super) struct Control {
    socket: Guarded<TcpStream>,
    peer: usize,
    /// What has come: one of the bytes above; for [`ABORTS`], two bytes of a length, and the
    /// reason.
    received: Vec<u8>,
    has_aborted: bool,
    ended: bool,
}

impl Control {
    /// For a socket that does not block.
    pub(super) fn new(socket: Guarded<TcpStream>, peer: usize) -> Control {
        Control { socket, peer, received: Vec::new(), has_aborted: false, ended: false }
    }

    /// Whether the other rank has said that it leaves in order.
    pub(super) fn has_left(&self) -> bool {
        self.received.first() == Some(&LEAVES)
    }

    /// Why the other rank has failed, if it has.
    pub(super) fn hear(&mut self) -> Option<Error> {
        while !self.ended {
            let mut bytes = [0; 64];
            match (&*self.socket).read(&mut bytes) {
                Ok(count) => {
                    self.received.extend(&bytes[..count]);
                    self.ended = count == 0 || self.received.len() > 3 + REASON;
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => self.ended = true,
            }
        }
        said(&self.received, self.ended, self.peer)
    }

    /// Says that this rank gives up. What the kernel does not take at once is left out: this rank
    /// has an error already, and its end says the rest.
    pub(super) fn abort(&mut self, reason: &str) {
        if std::mem::replace(&mut self.has_aborted, true) {
            return;
        }
        let _ = (&*self.socket).write(&abort_message(reason));
    }
}

/// Why `peer` has failed, if what has come from it says so.
pub(super) fn said(received: &[u8], ended: bool, peer: usize) -> Option<Error> {
    match received {
        [LEAVES, ..] => None,
        [ABORTS, low, high, reason @ ..] => {
            let len = usize::from(u16::from_le_bytes([*low, *high])).min(REASON);
            let reason = reason.get(..len).or(ended.then_some(reason))?;
            let reason = String::from_utf8_lossy(reason).into_owned();
            Some(Error::Aborted { rank: peer, reason })
        }
        _ => ended.then(|| lost(peer, None)),
    }
}

/// What a rank sends that gives up.
pub(super) fn abort_message(reason: &str) -> Vec<u8> {
    let reason = &reason[..reason.floor_char_boundary(REASON)];
    let [low, high] = (reason.len() as u16).to_le_bytes();
    [&[ABORTS, low, high], reason.as_bytes()].concat()
}

#[cfg(test)]
impl Control {
    /// Ends without a word.
    pub(super) fn vanish(&mut self) {
        self.has_aborted = true;
    }
}

impl Drop for Control {
    /// A rank that panics does not leave in order.
    fn drop(&mut self) {
        if !self.has_aborted && !std::thread::panicking() {
            let _ = (&*self.socket).write(&[LEAVES]);
        }
    }
}
