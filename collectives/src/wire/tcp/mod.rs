//! A wire over TCP, for clusters without MPI and for builds without it.
//!
//! The ranks of a job meet once, at rank 0 ([`meeting`]) or through a store ([`through_store`]).
//! From then on each rank knows the address and the host of every other ([`Network`]). A
//! communicator's wire has a connection ([`Line`]) to each rank of another host for each tag that
//! the two use, and one for what must not wait behind data ([`Control`]). A message is its length
//! and its bytes. It is read when its receiver has asked for it, into the memory where it belongs;
//! until then it stays in the kernel's buffers, and stops the sender once they are full. So no tag
//! waits for another.

mod control;
mod decline;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
pub(crate) mod greeting;
mod interface;
mod line;
mod lookout;
pub(crate) mod meeting;
pub(crate) mod network;
#[cfg(test)]
mod tests;
pub(crate) mod through_store;

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::poller::Poller;
use super::{Receipt, Wire};
use crate::Error;
use crate::hosts::Hosts;
use control::Control;
pub(crate) use decline::decline;
use line::Line;
pub(crate) use lookout::{Lookout, lost};
pub(crate) use network::{Network, offered_address};
pub(crate) use through_store::attempt::Attempt;
pub(crate) use through_store::{GIVE_UP_WITHIN, decline as decline_through};

/// The tags: that of messages between two ranks, and those of the channels for gathers, reductions
/// and agreements.
const TAGS: [u8; 4] = [16, 0, 1, 2];
/// How many of them ranks use that are no partners: reductions and agreements pass between partners
/// alone.
const ACROSS: usize = 2;

/// How long a rank whose connection has ended may take to say why.
const LAST_WORDS: Duration = Duration::from_millis(200);

/// One rank's end of a communicator's wire.
pub(crate) struct TcpWire {
    /// By member, where this rank talks to it.
    peers: Vec<Option<Peer>>,
    failed: Option<Error>,
    /// What another rank has said, or that it is gone.
    heard: Option<Error>,
    /// Keeps the listener.
    _network: Arc<Network>,
}

/// The connections to another rank.
struct Peer {
    /// By [`TAGS`]; [`ACROSS`] unless they are partners.
    lines: Vec<Line>,
    control: Control,
}

impl TcpWire {
    /// Connects rank `own` of a communicator, whose members have these ranks in the job, to those
    /// on other hosts. `name` tells the job's communicators apart. All of them call.
    ///
    /// # Errors
    /// [`Error::PeerLost`] for a member that has ended; [`Error::Rendezvous`] for those that do not
    /// come within `limit`.
    pub(crate) fn open(
        network: Arc<Network>,
        members: &[usize],
        own: usize,
        hosts: &Hosts,
        name: &str,
        limit: Duration,
    ) -> Result<TcpWire, Error> {
        let correspondents = hosts.correspondents(own);
        let count = |member: usize| if correspondents.contains(&member) { 1 + TAGS.len() } else { 1 + ACROSS };
        let wanted: Vec<(usize, usize)> = hosts.remote().map(|member| (members[member], count(member))).collect();
        let mut connections = network.connect(name, &wanted, limit).map_err(|error| match error {
            Error::PeerLost { rank, op, how } => {
                let rank = members.iter().position(|&member| member == rank).unwrap_or(rank);
                Error::PeerLost { rank, op, how }
            }
            error => error,
        })?;
        let mut peers: Vec<Option<Peer>> = members.iter().map(|_| None).collect();
        for member in hosts.remote() {
            let of_peer = connections.remove(&members[member]).expect("`connect` returns one entry for each");
            let mut of_peer = of_peer.into_iter();
            let control = Control::new(of_peer.next().expect("at least two"), member);
            let lines = of_peer.map(|socket| Line::new(socket, member)).collect();
            peers[member] = Some(Peer { lines, control });
        }
        Ok(TcpWire { peers, failed: None, heard: None, _network: network })
    }

    fn line(&mut self, member: usize, tag: u8) -> (usize, &mut Line) {
        let index = TAGS.iter().position(|&known| known == tag).expect("a known tag");
        let peer = self.peers[member].as_mut().expect("a rank of another host");
        (index, &mut peer.lines[index])
    }

    fn enqueue(&mut self, way: Way, member: usize, tag: u8, data: *mut u8, len: usize) -> Result<Receipt, Error> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        let (index, line) = self.line(member, tag);
        let number = match way {
            Way::Send => line.send(data, len),
            Way::Receive => line.receive(data, len),
        };
        Ok(Ticket { way, member, index, number }.pack())
    }

    /// Why a rank whose connection has ended gave up, if it has said so: on another connection,
    /// which may be slower.
    fn last_words(&mut self, member: usize) -> Option<Error> {
        let started = Instant::now();
        loop {
            let said = self.listen();
            // What has left in order says nothing more.
            let has_left = self.peers[member].as_ref().is_some_and(|peer| peer.control.has_left());
            match said {
                None if !has_left && started.elapsed() < LAST_WORDS => std::thread::sleep(Duration::from_millis(1)),
                said => return said,
            }
        }
    }

    /// What another rank has said on its control connection, or that it is gone.
    fn listen(&mut self) -> Option<Error> {
        if self.heard.is_none() {
            let controls = self.peers.iter_mut().flatten().map(|peer| &mut peer.control);
            self.heard = controls.filter_map(Control::hear).next();
        }
        self.heard.clone()
    }
}

impl Wire for TcpWire {
    unsafe fn send(&mut self, to: usize, tag: u8, data: *const u8, len: usize) -> Result<Receipt, Error> {
        self.enqueue(Way::Send, to, tag, data.cast_mut(), len)
    }

    unsafe fn receive(&mut self, from: usize, tag: u8, data: *mut u8, len: usize) -> Result<Receipt, Error> {
        self.enqueue(Way::Receive, from, tag, data, len)
    }

    fn has_come(&mut self, from: usize, tag: u8) -> Result<bool, Error> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        let (_, line) = self.line(from, tag);
        match line.has_come() {
            Err(lost) => Err(self.last_words(from).unwrap_or(lost)),
            come => come,
        }
    }

    fn test(&mut self, request: &Receipt) -> Result<bool, Error> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        let Ticket { way, member, index, number } = Ticket::unpack(request);
        let line = &mut self.peers[member].as_mut().expect("the request was made with it").lines[index];
        // SAFETY: `Wire::send` and `Wire::receive` promise memory until this says that it is free.
        let complete = unsafe {
            match way {
                Way::Send => line.has_sent(number),
                Way::Receive => line.has_received(number),
            }
        };
        complete.map_err(|error| {
            let said = matches!(error, Error::PeerLost { .. }).then(|| self.last_words(member)).flatten();
            self.failed.insert(said.unwrap_or(error)).clone()
        })
    }

    fn abort(&mut self, reason: &str) {
        self.peers.iter_mut().flatten().for_each(|peer| peer.control.abort(reason));
    }

    fn failure(&mut self) -> Option<Error> {
        self.listen()
    }

    fn has_sockets(&self) -> bool {
        true
    }

    fn arm(&mut self, poller: &Poller) -> bool {
        let mut lines = self.peers.iter_mut().flatten().flat_map(|peer| &mut peer.lines);
        lines.all(|line| line.arm(poller).is_ok())
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Way {
    Send,
    Receive,
}

/// A message in flight: the `number`-th of its way on a line.
struct Ticket {
    way: Way,
    member: usize,
    index: usize,
    number: u64,
}

impl Ticket {
    /// Digits of the number.
    const NUMBER: u32 = 40;

    fn pack(self) -> Receipt {
        assert!(self.number < 1 << Ticket::NUMBER && self.member < 1 << 20, "more messages than can be counted");
        let place = (self.member as u64) << 3 | (self.index as u64) << 1 | u64::from(self.way == Way::Send);
        Receipt(place << Ticket::NUMBER | self.number)
    }

    fn unpack(&Receipt(word): &Receipt) -> Ticket {
        let (place, number) = (word >> Ticket::NUMBER, word & ((1 << Ticket::NUMBER) - 1));
        let way = if place & 1 == 1 { Way::Send } else { Way::Receive };
        Ticket { way, member: (place >> 3) as usize, index: (place >> 1 & 3) as usize, number }
    }
}
