//! Which receive takes which message: of those from one rank the first that has its tag, and of
//! several receives that want it the one that was called first.
//!
//! From each rank one message is at the *front*. It goes to the first receive that wants it. Where
//! none does, and some other message from that rank is wanted, it is *early*: it is taken into
//! memory of its own, and the next one comes to the front.

use std::sync::atomic::Ordering;

use pillion_kernels::exclusive;

use super::{Address, Head, ON_WIRE, Way};
use crate::Error;
use crate::engine::group::Group;
use crate::engine::mail::receive::take_piece;
use crate::memory::control::{MAIL_BELL, state, subject};
use crate::memory::lent::Lent;
use crate::wire::{Receipt, Wire};

/// What a rank's receives, and the messages for them, are up to.
pub(super) struct Matching {
    /// Receives that have no message yet, in the order of their calls.
    posted: Vec<Posted>,
    /// In the order in which they came.
    early: Vec<Early>,
    /// Early messages that were taken while their receives were called, with the tickets of these.
    ready: Vec<(u64, Early)>,
    /// By rank of the communicator.
    fronts: Vec<Front>,
    /// Receives so far: from each rank, and from any.
    counts: Vec<u64>,
    tickets: u64,
}

struct Posted {
    ticket: u64,
    wanted: Wanted,
}

/// The messages that a receive takes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wanted {
    /// From this rank, or from any.
    pub(super) from: Option<usize>,
    pub(super) tag: u32,
}

impl Wanted {
    fn accepts(self, from: usize, tag: u32) -> bool {
        self.tag == tag && self.from.is_none_or(|wanted| wanted == from)
    }
}

/// A whole message that came before its receive.
pub(super) struct Early {
    pub(super) from: usize,
    pub(super) head: Head,
    pub(super) bytes: Vec<u8>,
}

/// How far this rank is with the message that is next from another.
#[derive(Default)]
enum Front {
    /// It has not been looked at.
    #[default]
    Unseen,
    /// Its head is on its way over the wire.
    Coming { words: Lent<Box<[u64; 3]>>, receipt: Receipt },
    /// No receive wants it so far.
    Unwanted(Head),
    /// It is that of a receive.
    Matched { ticket: u64, head: Head },
    /// It is being taken into memory of its own, of which `moved` bytes are there.
    Early { head: Head, bytes: Vec<u8>, moved: usize },
    /// The same, over the wire.
    EarlyOnWire { head: Head, bytes: Lent<Vec<u8>>, receipt: Receipt },
}

/// Who looks for a message: the receive with this ticket, or a probe for this tag.
#[derive(Clone, Copy, PartialEq)]
enum Asker {
    Receive(u64),
    Probe(u32),
}

/// What becomes of a receive when it is called.
pub(super) enum Posting {
    /// Its message is there.
    Early(Early),
    /// It waits for its message, with this ticket.
    Waits(u64),
}

/// The message of a receive.
pub(super) enum Found {
    Early(Early),
    /// The one at the front from this rank.
    Front(usize, Head),
}

impl Matching {
    /// For a communicator of `world` ranks.
    pub(super) fn new(world: usize) -> Matching {
        let fronts = (0..world).map(|_| Front::default()).collect();
        let counts = vec![0; world + 1];
        Matching { posted: Vec::with_capacity(4), early: Vec::new(), ready: Vec::new(), fronts, counts, tickets: 0 }
    }

    /// A receive is called: its number among those from the same rank, and what becomes of it.
    pub(super) fn post(&mut self, wanted: Wanted) -> (u64, Posting) {
        let count = &mut self.counts[wanted.from.unwrap_or(self.fronts.len())];
        *count += 1;
        let number = *count - 1;
        let posting = match self.early.iter().position(|early| wanted.accepts(early.from, early.head.tag)) {
            Some(index) => Posting::Early(self.early.remove(index)),
            None => {
                self.tickets += 1;
                self.posted.push(Posted { ticket: self.tickets, wanted });
                Posting::Waits(self.tickets)
            }
        };
        (number, posting)
    }

    /// The message of the receive with this ticket, if it has come.
    pub(super) fn find(
        &mut self,
        group: &Group,
        ticket: u64,
        wanted: Wanted,
        mut wire: Option<&mut (dyn Wire + 'static)>,
    ) -> Result<Option<Found>, Error> {
        let mut lost = Vec::new();
        for from in self.candidates(wanted) {
            match self.advance(group, from, Asker::Receive(ticket), wire.as_deref_mut()) {
                Err(error @ Error::PeerLost { .. }) => lost.push(error),
                result => result?,
            }
            if wanted.from.is_none() && has_left(group, from) {
                lost.push(Error::PeerLost {
                    rank: from,
                    op: "a message from any rank".to_owned(),
                    how: "it left early",
                });
            }
            match self.fronts[from] {
                Front::Matched { ticket: of, head } if of == ticket => return Ok(Some(Found::Front(from, head))),
                _ => {}
            }
            if let Some(index) = self.ready.iter().position(|&(of, _)| of == ticket) {
                return Ok(Some(Found::Early(self.ready.swap_remove(index).1)));
            }
        }
        // Of several others one may still send; this rank itself does not count.
        let others = wanted.from.map_or(self.fronts.len() - 1, |_| 1);
        match lost.pop() {
            Some(error) if lost.len() + 1 >= others => Err(error),
            _ => Ok(None),
        }
    }

    /// Whether the receive with this ticket has its message, or can take it.
    pub(super) fn is_ready(&self, ticket: u64) -> bool {
        let is_front = |front: &Front| matches!(front, Front::Matched { ticket: of, .. } if *of == ticket);
        self.ready.iter().any(|&(of, _)| of == ticket) || self.fronts.iter().any(is_front)
    }

    /// The receive of the message at the front from a rank has all of it.
    pub(super) fn clear_front(&mut self, from: usize) {
        self.fronts[from] = Front::Unseen;
    }

    /// The first message that a receive would take which is called now: whose, and its head.
    pub(super) fn probe(
        &mut self,
        group: &Group,
        wanted: Wanted,
        mut wire: Option<&mut (dyn Wire + 'static)>,
    ) -> Result<Option<(usize, Head)>, Error> {
        let is_wanted = |early: &&Early| wanted.accepts(early.from, early.head.tag);
        if let Some(early) = self.early.iter().find(is_wanted) {
            return Ok(Some((early.from, early.head)));
        }
        for from in self.candidates(wanted) {
            match self.advance(group, from, Asker::Probe(wanted.tag), wire.as_deref_mut()) {
                // From there none comes.
                Err(Error::PeerLost { .. }) => continue,
                result => result?,
            }
            match self.fronts[from] {
                Front::Unwanted(head) if head.tag == wanted.tag => return Ok(Some((from, head))),
                _ => {}
            }
        }
        Ok(None)
    }

    /// An early message is whole.
    fn keep(&mut self, group: &Group, asker: Asker, early: Early) {
        let takes = |posted: &Posted| posted.wanted.accepts(early.from, early.head.tag);
        match self.posted.iter().position(takes) {
            Some(index) => {
                let ticket = self.hand_over(group, asker, index);
                self.ready.push((ticket, early));
            }
            None => self.early.push(early),
        }
    }

    /// A receive has its message: the receive's ticket. It may sleep, unless it is the one that
    /// asks.
    fn hand_over(&mut self, group: &Group, asker: Asker, posted: usize) -> u64 {
        let ticket = self.posted.remove(posted).ticket;
        if asker != Asker::Receive(ticket) {
            group.ring_rank(group.rank, MAIL_BELL, subject::MAIL);
        }
        ticket
    }

    fn candidates(&self, wanted: Wanted) -> std::ops::Range<usize> {
        wanted.from.map_or(0..self.fronts.len(), |from| from..from + 1)
    }

    /// Looks at the messages from a rank until one is at the front that a receive takes, or that a
    /// probe asks for, or none has come.
    fn advance(
        &mut self,
        group: &Group,
        from: usize,
        asker: Asker,
        mut wire: Option<&mut (dyn Wire + 'static)>,
    ) -> Result<(), Error> {
        let local = (group.hosts.host(from) == group.hosts.own).then(|| group.hosts.place(from));
        loop {
            let front = std::mem::take(&mut self.fronts[from]);
            let (front, go_on) = match (front, local) {
                (Front::Unseen, Some(local)) => match waiting_in_mailbox(group, local) {
                    None => (Front::Unseen, false),
                    Some(head) => (Front::Unwanted(head), true),
                },
                (Front::Unseen, None) => {
                    let wire = wire.as_deref_mut().expect(NO_WIRE);
                    match wire.has_come(from, ON_WIRE)? {
                        false => (Front::Unseen, false),
                        true => (ask_for_head(from, wire)?, true),
                    }
                }
                (Front::Coming { words, receipt }, _) => match wire.as_deref_mut().expect(NO_WIRE).test(&receipt)? {
                    false => (Front::Coming { words, receipt }, false),
                    true => (Front::Unwanted(Head::from_words(*words.back())), true),
                },
                (Front::Unwanted(head), _) => {
                    let first = self.posted.iter().position(|posted| posted.wanted.accepts(from, head.tag));
                    match first {
                        Some(index) => (Front::Matched { ticket: self.hand_over(group, asker, index), head }, false),
                        None if asker == Asker::Probe(head.tag) => (Front::Unwanted(head), false),
                        None if local.is_some() => {
                            (Front::Early { head, bytes: memory_for(from, head)?, moved: 0 }, true)
                        }
                        None => (take_early(from, head, wire.as_deref_mut().expect(NO_WIRE))?, true),
                    }
                }
                (Front::Matched { ticket, head }, _) => (Front::Matched { ticket, head }, false),
                (Front::Early { head, mut bytes, moved }, local) => {
                    let local = local.expect("a message of another host comes over the wire");
                    match take_more(group, local, from, head, &mut bytes, moved)? {
                        Some(moved) if moved < bytes.len() => (Front::Early { head, bytes, moved }, true),
                        Some(_) => {
                            self.keep(group, asker, Early { from, head, bytes });
                            (Front::Unseen, true)
                        }
                        None => (Front::Early { head, bytes, moved }, false),
                    }
                }
                (Front::EarlyOnWire { head, bytes, receipt }, _) => {
                    match wire.as_deref_mut().expect(NO_WIRE).test(&receipt)? {
                        false => (Front::EarlyOnWire { head, bytes, receipt }, false),
                        true => {
                            self.keep(group, asker, Early { from, head, bytes: bytes.back() });
                            (Front::Unseen, true)
                        }
                    }
                }
            };
            self.fronts[from] = front;
            if !go_on {
                return Ok(());
            }
            group.mail.note(from);
        }
    }
}

/// Whether another rank of this host has left, and everything that it sent has been taken.
fn has_left(group: &Group, from: usize) -> bool {
    if group.hosts.host(from) != group.hosts.own {
        return false;
    }
    let local = group.hosts.place(from);
    let is_empty = !group.mailbox(local, group.rank).is_full();
    local != group.rank && is_empty && group.control(local).state.load(Ordering::Acquire) == state::LEFT
}

const NO_WIRE: &str = "messages to other hosts are looked at by the thread that owns the wire";

/// The head of the message that waits in the mailbox from a rank of this host.
fn waiting_in_mailbox(group: &Group, local: usize) -> Option<Head> {
    let mailbox = group.mailbox(local, group.rank);
    let taken = mailbox.receiver.taken.load(Ordering::Relaxed);
    mailbox.is_full().then(|| Head::from_words(mailbox.head(taken)))
}

fn ask_for_head(from: usize, wire: &mut (dyn Wire + 'static)) -> Result<Front, Error> {
    let mut words = Lent::new(Box::new([0; 3]));
    // SAFETY: the words stay until the message is complete, or for ever.
    let receipt = unsafe { wire.receive(from, ON_WIRE, words.0.as_mut_ptr().cast(), size_of::<[u64; 3]>())? };
    Ok(Front::Coming { words, receipt })
}

fn take_early(from: usize, head: Head, wire: &mut (dyn Wire + 'static)) -> Result<Front, Error> {
    let mut bytes = Lent::new(memory_for(from, head)?);
    // SAFETY: the bytes stay until the message is complete, or for ever.
    let receipt = unsafe { wire.receive(from, ON_WIRE, bytes.0.as_mut_ptr(), bytes.0.len())? };
    Ok(Front::EarlyOnWire { head, bytes, receipt })
}

/// Memory for a whole message.
fn memory_for(from: usize, head: Head) -> Result<Vec<u8>, Error> {
    let width = head.dtype().map_or(u64::MAX, |dtype| dtype.bytes() as u64);
    let mut memory = Vec::new();
    let len = head.len.checked_mul(width).and_then(|len| usize::try_from(len).ok());
    match len.map(|len| (len, memory.try_reserve_exact(len))) {
        Some((len, Ok(()))) => memory.resize(len, 0),
        _ => {
            let reason = format!("there is no memory for {} elements from rank {from} before their receive", head.len);
            return Err(Error::System { what: "taking a message", reason });
        }
    }
    Ok(memory)
}

/// Takes a piece of an early message from a rank of this host: the bytes that are there then, or
/// none where no piece waits.
fn take_more(
    group: &Group,
    local: usize,
    from: usize,
    head: Head,
    bytes: &mut [u8],
    moved: usize,
) -> Result<Option<usize>, Error> {
    let width = head.dtype().map_or(1, |dtype| dtype.bytes());
    let address = Address { way: Way::From, peer: Some(from), number: 0 };
    let op = || address.describe(head, false);
    let rest = &mut bytes[moved..];
    // It may be memory of a deferring device, on the sender's side.
    let _access = exclusive(true);
    // SAFETY: `rest` is what the message still needs.
    let taken = unsafe { take_piece(group, local, rest.as_mut_ptr(), rest.len(), width, &op)? };
    Ok(taken.map(|count| moved + count))
}
