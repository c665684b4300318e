//! A message that this rank receives.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::Waker;

use pillion_kernels::cpu::non_temporal;
use pillion_kernels::{Span, exclusive};

use super::matching::{Early, Found, Posting, Wanted};
use super::{Address, Common, FAR_PIECE, Head, ON_WIRE, PIECE, Way};
use crate::Error;
use crate::engine::group::Group;
use crate::memory::control::{MAIL_BELL, state, subject};
use crate::memory::lent::Lent;
use crate::memory::place::Place;
use crate::memory::protocol::publish;
use crate::wire::{Receipt, Wire};

pub(crate) struct ReceiveFlight {
    wanted: Wanted,
    /// Where the sender's rank is told.
    sender: Option<Arc<AtomicUsize>>,
    number: u64,
    /// What had come when this last looked (see [`super::Mailroom::news`]).
    news: u64,
    phase: Phase,
    /// Dropped last.
    pub(super) common: Common,
}

/// How far it has come.
enum Phase {
    /// Its message came before it.
    There(Early),
    /// It waits for its message, with this ticket.
    Waiting(u64),
    /// Its message is at the front, and `moved` bytes of it are here.
    Taking {
        from: usize,
        moved: usize,
    },
    /// The same, over the wire.
    OnWire {
        from: usize,
        receipt: Receipt,
        lent: Lent<Span>,
    },
    Done,
}

impl Phase {
    /// The ticket of one whose message has not come.
    fn ticket(&self) -> Option<u64> {
        match self {
            Phase::Waiting(ticket) => Some(*ticket),
            _ => None,
        }
    }
}

impl ReceiveFlight {
    pub(super) fn new(
        group: &Group,
        common: Common,
        from: Option<usize>,
        sender: Option<Arc<AtomicUsize>>,
    ) -> ReceiveFlight {
        let wanted = Wanted { from, tag: common.tag };
        let (number, posted) = group.mail.matching.lock().post(wanted);
        let phase = match posted {
            Posting::Early(early) => Phase::There(early),
            Posting::Waits(ticket) => Phase::Waiting(ticket),
        };
        ReceiveFlight { wanted, sender, number, news: group.mail.news(wanted), phase, common }
    }

    /// From the rank from which it comes, where that is known.
    fn address(&self) -> Address {
        let peer = match &self.phase {
            Phase::There(early) => Some(early.from),
            Phase::Taking { from, .. } | Phase::OnWire { from, .. } => Some(*from),
            Phase::Waiting(_) | Phase::Done => self.wanted.from,
        };
        Address { way: Way::From, peer, number: self.number }
    }

    pub(super) fn poll(
        &mut self,
        group: &Group,
        mut wire: Option<&mut (dyn Wire + 'static)>,
        waker: Option<&Waker>,
    ) -> Result<bool, Error> {
        let op = self.common.describe(self.address());
        let is_in_vain = is_in_vain(group, self.wanted.from, self.phase.ticket());
        if !self.common.after.has_happened(group, waker, wire.as_deref_mut(), &is_in_vain, &op)? {
            return Ok(false);
        }
        if let Phase::Waiting(ticket) = self.phase {
            let mut matching = group.mail.matching.lock();
            let found = matching.find(group, ticket, self.wanted, wire.as_deref_mut())?;
            match found {
                None => {
                    drop(matching);
                    return self.wait(group, wire, &is_in_vain);
                }
                Some(Found::Early(early)) => self.phase = Phase::There(early),
                Some(Found::Front(from, head)) => {
                    self.phase = Phase::Taking { from, moved: 0 };
                    if head != self.common.head() {
                        return Err(self.refuse(group, from, head));
                    }
                    if self.common.is_short() && group.hosts.host(from) == group.hosts.own {
                        // All of it is in the piece that has come.
                        let done = self.take(group, from, &mut |from| matching.clear_front(from), &is_in_vain)?;
                        assert!(done, "a short message is one piece");
                        return Ok(true);
                    }
                }
            }
        }
        if let Phase::There(early) = &self.phase {
            if early.head != self.common.head() {
                return Err(self.common.disagreement(group, self.address(), early.head));
            }
            let _access = exclusive(self.common.buffer.deferred());
            // SAFETY: the buffer, which this flight owns, has as many bytes, since the heads agree.
            unsafe {
                let to = self.common.buffer.address().as_ptr();
                std::ptr::copy_nonoverlapping(early.bytes.as_ptr(), to, early.bytes.len());
            }
            let from = early.from;
            return Ok(self.complete(group, from));
        }
        let Phase::Taking { from, .. } = self.phase else { return self.pass_wire(group, wire) };
        if group.hosts.host(from) == group.hosts.own {
            let clear = &mut |from| group.mail.matching.lock().clear_front(from);
            return self.take(group, from, clear, &is_in_vain);
        }
        let wire = wire.expect("a rank of another host has a wire");
        let lent = Lent::new(self.common.buffer.clone());
        // SAFETY: the buffer is this flight's until it is complete, and `lent` keeps it for ever if
        // it never is. (Access to a deferring device's memory is not serialised here: such devices
        // are for tests on one host.)
        let receipt = unsafe { wire.receive(from, ON_WIRE, lent.0.address().as_ptr(), self.common.bytes())? };
        self.phase = Phase::OnWire { from, receipt, lent };
        self.common.moved();
        self.pass_wire(group, Some(wire))
    }

    /// The message at the front is not the one that this receive expects: its sender is told.
    fn refuse(&self, group: &Group, from: usize, head: Head) -> Error {
        if group.hosts.host(from) == group.hosts.own {
            let local = group.hosts.place(from);
            let refused = &group.mailbox(local, group.rank).receiver.refused;
            let ours = self.common.head();
            refused[0].store(ours.len, Ordering::Relaxed);
            refused[1].store(self.number, Ordering::Relaxed);
            publish(&refused[2], ours.dtype);
            group.ring_rank(local, MAIL_BELL, subject::MAIL);
        }
        self.common.disagreement(group, self.address(), head)
    }

    /// Takes pieces from a rank of this host, and calls `clear` once it has all.
    fn take(
        &mut self,
        group: &Group,
        from: usize,
        clear: &mut dyn FnMut(usize),
        is_in_vain: &dyn Fn(usize) -> bool,
    ) -> Result<bool, Error> {
        let (local, bytes) = (group.hosts.place(from), self.common.bytes());
        let width = self.common.buffer.dtype().bytes();
        let op = self.common.describe(self.address());
        loop {
            let Phase::Taking { moved, .. } = &mut self.phase else { unreachable!("it is being taken") };
            let at = *moved;
            let access = exclusive(self.common.buffer.deferred());
            // SAFETY: the buffer, which this flight owns, has `bytes` bytes.
            let taken = unsafe {
                let to = self.common.buffer.address().as_ptr().add(at);
                take_piece(group, local, to, bytes - at, width, &op)?
            };
            drop(access);
            let Some(count) = taken else {
                return self.wait(group, None, is_in_vain);
            };
            *moved += count;
            if *moved == bytes {
                clear(from);
                return Ok(self.complete(group, from));
            }
            self.common.moved();
            group.mail.note(from);
        }
    }

    fn pass_wire(&mut self, group: &Group, wire: Option<&mut (dyn Wire + 'static)>) -> Result<bool, Error> {
        let wire = wire.expect("a rank of another host has a wire");
        let Phase::OnWire { from, receipt, .. } = &self.phase else { unreachable!("it is on the wire") };
        let from = *from;
        if !wire.test(receipt)? {
            let op = self.common.describe(self.address());
            self.common.watch.check_wire(group, from, wire, &op)?;
            return Ok(false);
        }
        if let Phase::OnWire { lent, .. } = std::mem::replace(&mut self.phase, Phase::Done) {
            drop(lent.back());
        }
        group.mail.matching.lock().clear_front(from);
        Ok(self.complete(group, from))
    }

    /// All of it is here.
    fn complete(&mut self, group: &Group, from: usize) -> bool {
        self.phase = Phase::Done;
        if let Some(sender) = &self.sender {
            sender.store(from, Ordering::Release);
        }
        // The next message from there may be another thread's.
        group.ring_rank(group.rank, MAIL_BELL, subject::MAIL);
        group.count_message(0);
        true
    }

    /// Waits for the sender, unless it is in vain.
    fn wait(
        &mut self,
        group: &Group,
        wire: Option<&mut (dyn Wire + 'static)>,
        is_in_vain: &dyn Fn(usize) -> bool,
    ) -> Result<bool, Error> {
        let op = self.common.describe(self.address());
        let peer = self.address().peer;
        // What brings other messages from there brings this one nearer.
        let news = group.mail.news(self.wanted);
        if std::mem::replace(&mut self.news, news) != news {
            self.common.moved();
        }
        let watch = &mut self.common.watch;
        match (peer, wire) {
            (Some(peer), Some(wire)) if group.hosts.host(peer) != group.hosts.own => {
                watch.check_wire(group, peer, wire, &op)?;
            }
            (Some(peer), _) => watch.check(group, group.hosts.place(peer), is_in_vain, &op)?,
            // Any of several ranks may still send, on other hosts too.
            (None, Some(wire)) => {
                let remote = group.hosts.remote().next().expect("a wire leads to somebody");
                watch.check_wire(group, remote, wire, &op)?;
            }
            (None, None) => {
                watch.check_any(group, is_in_vain, &op)?;
            }
        }
        Ok(false)
    }
}

/// Tells for a rank of this host that has left whether this is why a message from `from` never
/// comes, for which the receive with this ticket waits: it may have sent all of it before.
fn is_in_vain(group: &Group, from: Option<usize>, ticket: Option<u64>) -> impl Fn(usize) -> bool {
    let wanted = from.map(|from| group.hosts.local().iter().position(|&rank| rank == from));
    move |rank: usize| {
        let Some(ticket) = ticket else { return false };
        if group.mail.matching.lock().is_ready(ticket) {
            return false;
        }
        let is_empty = |rank: usize| !group.mailbox(rank, group.rank).is_full();
        match wanted {
            Some(wanted) => Some(rank) == wanted && is_empty(rank),
            // From any: only once nobody else is left to send.
            None => {
                let has_left = |rank: usize| group.control(rank).state.load(Ordering::Acquire) == state::LEFT;
                let mut others = (0..group.world()).filter(|&other| other != group.rank);
                !group.has_wire() && others.all(|other| has_left(other) && is_empty(other))
            }
        }
    }
}

/// Takes the next piece of the message at the front of the mailbox from a rank of this host, of
/// which `rest` bytes are missing: the number of bytes, or none where no piece waits.
///
/// # Safety
/// `to` is writable for `rest` bytes, which nobody else uses.
pub(super) unsafe fn take_piece(
    group: &Group,
    from: usize,
    to: *mut u8,
    rest: usize,
    width: usize,
    op: &dyn Fn() -> String,
) -> Result<Option<usize>, Error> {
    let mailbox = group.mailbox(from, group.rank);
    let taken = mailbox.receiver.taken.load(Ordering::Relaxed);
    if mailbox.sent.load(Ordering::Acquire) == taken {
        return Ok(None);
    }
    let place = mailbox.place(taken);
    let count = match place {
        Place::Stage(_) => rest.min(PIECE / width * width),
        Place::Private(_) => rest.min(FAR_PIECE / width * width),
        _ => rest,
    };
    match place {
        Place::Arena(offset) | Place::Stage(offset) if group.engine.map.contains(offset, count as u64) => {
            let large = matches!(place, Place::Arena(_)) && non_temporal::pays(2 * count);
            let source = group.address(from, offset, count as u64);
            // SAFETY: the source lies in the sender's arena, and the sender leaves it as it is
            // until this rank has taken the piece; the destination is the caller's promise. They
            // belong to different ranks or different buffers.
            unsafe { non_temporal::copy(source.as_ptr(), to, count, large) };
        }
        // SAFETY: the destination is the caller's promise.
        Place::Private(address) => unsafe { group.read_private(from, address, to, count, op)? },
        _ => {
            let reason = format!("rank {} published a message outside its arena", group.name(from));
            return Err(Error::System { what: "receiving a message", reason });
        }
    }
    publish(&mailbox.receiver.taken, taken + 1);
    group.ring_rank(from, MAIL_BELL, subject::MAIL);
    Ok(Some(count))
}
