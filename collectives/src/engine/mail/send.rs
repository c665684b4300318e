//! A message that this rank sends.

use std::sync::atomic::Ordering;
use std::task::Waker;

use pillion_kernels::cpu::non_temporal;
use pillion_kernels::{Span, exclusive};

use super::{Address, Common, FAR, FAR_PIECE, Head, ON_WIRE, PIECE, SMALLEST_PIECE, Way};
use crate::Error;
use crate::engine::group::Group;
use crate::engine::watch::Watch;
use crate::memory::control::{MAIL_BELL, subject};
use crate::memory::lent::Lent;
use crate::memory::place::Place;
use crate::memory::protocol::publish;
use crate::wire::{Receipt, Wire};

pub(crate) struct SendFlight {
    /// The receiver, as the communicator counts.
    to: usize,
    number: u64,
    /// Elements that have been put out.
    moved: usize,
    begun: bool,
    /// Whether the receiver reads the buffer itself.
    in_place: bool,
    /// The buffer, while the receiver may read it in private memory.
    shown: Option<Lent<Span>>,
    /// What is on the wire to another host.
    on_wire: Option<OnWire>,
    /// Dropped last.
    pub(super) common: Common,
}

/// The head and the elements, and who keeps them while they travel.
struct OnWire {
    receipts: Vec<Receipt>,
    lent: Lent<(Box<[u64; 3]>, Span)>,
}

impl SendFlight {
    pub(super) fn new(group: &Group, common: Common, to: usize) -> SendFlight {
        let number = group.mail.lines[to].0.fetch_add(1, Ordering::Relaxed);
        SendFlight { to, number, moved: 0, begun: false, in_place: false, shown: None, on_wire: None, common }
    }

    fn address(&self) -> Address {
        Address { way: Way::To, peer: Some(self.to), number: self.number }
    }

    pub(super) fn poll(
        &mut self,
        group: &Group,
        mut wire: Option<&mut (dyn Wire + 'static)>,
        waker: Option<&Waker>,
    ) -> Result<bool, Error> {
        let completed = &group.mail.lines[self.to].1;
        if completed.load(Ordering::Acquire) != self.number {
            return Ok(false);
        }
        let receiver = group.hosts.local().iter().position(|&rank| rank == self.to);
        let op = self.common.describe(self.address());
        let is_late = |rank: usize| Some(rank) == receiver;
        if !self.common.after.has_happened(group, waker, wire.as_deref_mut(), &is_late, &op)? {
            return Ok(false);
        }
        let done = match receiver {
            Some(receiver) => self.put_out(group, receiver)?,
            None => self.pass_wire(group, wire.expect("a rank of another host has a wire"))?,
        };
        if done {
            drop(self.shown.take().map(Lent::back));
            publish(completed, self.number + 1);
            // The next message of this line may be another thread's.
            group.ring_rank(group.rank, MAIL_BELL, subject::MAIL);
            group.count_message(self.common.bytes() as u64);
        }
        Ok(done)
    }

    /// To a rank of this host.
    fn put_out(&mut self, group: &Group, receiver: usize) -> Result<bool, Error> {
        let mailbox = group.mailbox(group.rank, receiver);
        let (buffer, len) = (&self.common.buffer, self.common.buffer.len());
        let width = buffer.dtype().bytes();
        loop {
            let [refused_len, refused_number, refused_dtype] = &mailbox.receiver.refused;
            let dtype = refused_dtype.load(Ordering::Acquire);
            let (sent, taken) = (mailbox.sent.load(Ordering::Relaxed), mailbox.receiver.taken.load(Ordering::Acquire));
            if dtype != 0 {
                // The piece that was refused has not been taken. It may be that of an earlier
                // message.
                let ours = Head::from_words(mailbox.head(taken));
                let expected = Head { len: refused_len.load(Ordering::Relaxed), dtype, tag: ours.tag };
                let number = refused_number.load(Ordering::Relaxed);
                let address = Address { number, ..self.address() };
                return Err(address.disagreement(group, ours, expected, buffer.deferred()));
            }
            if self.begun && self.moved == len {
                // What is staged needs the buffer no more.
                if !self.in_place || taken == sent {
                    return Ok(true);
                }
            } else if sent - taken < 2 {
                let place = match group.offset_of(buffer.address()) {
                    Some(offset) if !self.common.is_short() => {
                        (self.moved, self.in_place) = (len, true);
                        Place::Arena(offset)
                    }
                    None if len * width >= FAR && group.reads_private() => {
                        let first = buffer.address().addr().get() + self.moved * width;
                        self.moved += (len - self.moved).min(FAR_PIECE / width);
                        self.in_place = true;
                        self.shown.get_or_insert_with(|| Lent::new(buffer.clone()));
                        Place::Private(first as u64)
                    }
                    _ => {
                        let piece = (len * width).next_power_of_two().clamp(SMALLEST_PIECE, PIECE);
                        let at = stage(group, receiver, piece)? + (sent % 2) * piece as u64;
                        let count = (len - self.moved).min(PIECE / width);
                        let _access = exclusive(buffer.deferred());
                        // SAFETY: the range lies in the buffer, which this flight owns, and in this
                        // rank's stage for the receiver; the receiver has taken what stood there,
                        // two pieces ago, since fewer than two are out.
                        unsafe {
                            let from = buffer.address().as_ptr().add(self.moved * width);
                            let to = group.address(group.rank, at, (count * width) as u64);
                            non_temporal::copy(from, to.as_ptr(), count * width, false);
                        }
                        self.moved += count;
                        Place::Stage(at)
                    }
                };
                mailbox.describe(sent, Head::of(buffer, self.common.tag).words(), place);
                self.begun = true;
                publish(&mailbox.sent, sent + 1);
                group.ring_rank(receiver, MAIL_BELL, subject::MAIL);
                self.common.watch = Watch::new(self.common.limit);
                continue;
            }
            let op = self.common.describe(self.address());
            let is_late = |rank| rank == receiver && mailbox.receiver.taken.load(Ordering::Acquire) == taken;
            self.common.watch.check(group, receiver, &is_late, &op)?;
            return Ok(false);
        }
    }

    /// To a rank of another host: the head, then the elements.
    fn pass_wire(&mut self, group: &Group, wire: &mut (dyn Wire + 'static)) -> Result<bool, Error> {
        let Common { buffer, tag, .. } = &self.common;
        let on_wire = match &mut self.on_wire {
            Some(on_wire) => on_wire,
            none => {
                let lent = Lent::new((Box::new(Head::of(buffer, *tag).words()), buffer.clone()));
                let on_wire = none.insert(OnWire { receipts: Vec::with_capacity(2), lent });
                let (words, buffer) = &*on_wire.lent.0;
                // SAFETY: the words and the buffer are this flight's until it is complete, and
                // `Lent` keeps both for ever if it never is. (Access to a deferring device's memory
                // is not serialised here: such devices are for tests on one host.)
                unsafe {
                    on_wire.receipts.push(wire.send(self.to, ON_WIRE, words.as_ptr().cast(), size_of_val(&**words))?);
                    let (data, bytes) = (buffer.address().as_ptr().cast_const(), self.common.bytes());
                    on_wire.receipts.push(wire.send(self.to, ON_WIRE, data, bytes)?);
                }
                on_wire
            }
        };
        while let Some(receipt) = on_wire.receipts.first() {
            if !wire.test(receipt)? {
                let op = self.common.describe(self.address());
                self.common.watch.check_wire(group, self.to, wire, &op)?;
                return Ok(false);
            }
            on_wire.receipts.remove(0);
        }
        drop(self.on_wire.take().map(|on_wire| on_wire.lent.back()));
        Ok(true)
    }
}

/// A stage for two pieces of `piece` bytes.
fn stage(group: &Group, receiver: usize, piece: usize) -> Result<u64, Error> {
    let mut stages = group.mail.stages.lock();
    if let Some(range) = stages.get(&(receiver, piece)) {
        return Ok(range.offset);
    }
    let range = group.engine.reserve(2 * piece as u64)?;
    stages.insert((receiver, piece), range);
    Ok(range.offset)
}
