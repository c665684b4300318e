//! Messages between two ranks: a mailbox for each ordered pair. A long message passes in one piece
//! where the receiver can read it in place, in the sender's arena or, if the system allows it, in
//! its private memory. Any other passes in pieces through a stage of the sender, who then need not
//! wait for the receiver.
//!
//! ```text
//! sender      while fewer than two pieces are out: describe the next, sent += 1;   done once all is staged, or taken = sent
//! receiver    while taken < sent: check the description, copy, taken += 1;         done once all elements are there
//!             where the description is of another message: say what was expected, so that both fail
//! ```
//!
//! Bytes: the receiver reads S and writes S, the lower bound for a copy; through a stage the sender reads and writes S more, which
//! stays in the cache. To another host: S on the wire, after a header of three words.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::Waker;

use parking_lot::Mutex;
use pillion_kernels::cpu::non_temporal;
use pillion_kernels::{DType, Event, Span, exclusive};

use super::group::Group;
use super::inbox::Inbox;
use super::start::StartEvent;
use super::watch::Watch;
use crate::Error;
use crate::call::{Detail, Kind, call, describe};
use crate::memory::control::{Call, MAIL_BELL, subject};
use crate::memory::place::Place;
use crate::memory::protocol::publish;
use crate::memory::ranges::Range;
use crate::outcome::{Ending, Outcome};
use crate::request::{Direction, Message};
use crate::transport::Limit;
use crate::wire::{Receipt, Wire};

/// Bytes of a staged piece at most; a stage holds two.
const PIECE: usize = 256 << 10;
/// And at least: a page.
const SMALLEST_PIECE: usize = 4096;
/// Messages up to this many bytes are staged even where the receiver could read them in place: the sender need not wait for it then.
const SHORT: usize = 64 << 10;
/// Messages from this many bytes on are read in place also in private memory. Shorter ones pass
/// through a stage sooner, since both ranks copy at the same time.
const FAR: usize = 1 << 20;
/// The tag of messages on the wire.
const TAG: u8 = 16;

impl Direction {
    /// How messages say it of this rank, and of the other.
    fn words(self) -> (&'static str, &'static str) {
        match self {
            Direction::Send => ("to", "from"),
            Direction::Receive => ("from", "to"),
        }
    }
}

/// This rank's messages.
pub(crate) struct Mailroom {
    pub(crate) inbox: Inbox<MailFlight>,
    /// For each rank and direction: messages submitted, and messages complete. A message's turn comes once those before it are complete.
    lines: Vec<[(AtomicU64, AtomicU64); 2]>,
    /// Where pieces for each rank of this host are staged, by the rank and the bytes of a piece: messages of a few bytes take little memory.
    stages: Mutex<HashMap<(usize, usize), Range>>,
}

impl Mailroom {
    /// For a communicator of `world` ranks.
    pub(crate) fn new(world: usize) -> Mailroom {
        let lines = (0..world).map(|_| Default::default()).collect();
        Mailroom { inbox: Inbox::default(), lines, stages: Mutex::default() }
    }

    /// The memory of its stages, which it does not use any more.
    pub(crate) fn take_stages(&mut self) -> Vec<Range> {
        self.stages.get_mut().drain().map(|(_, range)| range).collect()
    }
}

/// A message on its way.
pub(crate) struct MailFlight {
    direction: Direction,
    /// The other rank, as the communicator counts.
    peer: usize,
    buffer: Span,
    after: StartEvent,
    number: u64,
    /// Elements that have been put out or taken.
    moved: usize,
    begun: bool,
    /// Whether the receiver reads the buffer itself.
    in_place: bool,
    /// Whether messages on the wire may still use the buffer.
    lent: bool,
    watch: Watch,
    limit: Limit,
    wire: Vec<Receipt>,
    /// The header on the wire: length and type.
    words: Box<[u64; 2]>,
    /// Dropped last.
    ending: Ending,
}

impl Drop for MailFlight {
    /// What a message on the wire may still touch stays.
    fn drop(&mut self) {
        if self.lent {
            std::mem::forget(self.buffer.clone());
            std::mem::forget(std::mem::take(&mut self.words));
        }
    }
}

impl MailFlight {
    pub(crate) fn new(
        group: &Group,
        message: Message,
        after: Event,
        limit: Limit,
        outcome: Arc<Outcome>,
    ) -> MailFlight {
        let Message { direction, buffer, peer } = message;
        let number = group.mail.lines[peer][direction as usize].0.fetch_add(1, Ordering::Relaxed);
        let watch = Watch::new(limit);
        let words = Box::new([0; 2]);
        MailFlight {
            direction,
            peer,
            buffer,
            after: StartEvent::new(after, limit),
            limit,
            number,
            moved: 0,
            begun: false,
            in_place: false,
            lent: false,
            watch,
            wire: Vec::new(),
            words,
            ending: Ending::new(outcome, "a message"),
        }
    }

    pub(crate) fn finish(mut self, result: Result<(), Error>) {
        self.ending.set(result);
    }

    /// Whether it fits into one piece and takes no time to copy.
    pub(crate) fn is_short(&self) -> bool {
        self.buffer.len() * self.buffer.dtype().bytes() <= SHORT
    }

    fn call(&self) -> Call {
        let (dtype, len) = (self.buffer.dtype(), self.buffer.len());
        let mut call = call(Kind::Message, Some(dtype), self.buffer.deferred(), len, Detail::None);
        call.sequence = self.number + 1;
        call
    }

    /// This message in words, once somebody wants them: looks at the clock are far more frequent.
    fn describe(&self) -> impl Fn() -> String + use<> {
        let (call, direction, peer) = (self.call(), self.direction, self.peer);
        move || {
            let (way, _) = direction.words();
            format!("{} {way} rank {peer}", describe(call))
        }
    }

    /// Goes as far as the other rank allows; true once complete.
    pub(crate) fn poll(
        &mut self,
        group: &Group,
        mut wire: Option<&mut (dyn Wire + 'static)>,
        waker: Option<&Waker>,
    ) -> Result<bool, Error> {
        let completed = &group.mail.lines[self.peer][self.direction as usize].1;
        if completed.load(Ordering::Acquire) != self.number {
            return Ok(false);
        }
        let local_peer = group.hosts.local().iter().position(|&rank| rank == self.peer);
        let (op, direction) = (self.describe(), self.direction);
        // A sender may put all of a message out and leave before its receiver starts.
        let is_late = |rank: usize| {
            Some(rank) == local_peer && (direction == Direction::Send || !group.mailbox(rank, group.rank).is_full())
        };
        if !self.after.has_happened(group, waker, wire.as_deref_mut(), &is_late, &op)? {
            return Ok(false);
        }
        let done = match (local_peer, self.direction) {
            (Some(peer), Direction::Send) => self.send(group, peer)?,
            (Some(peer), Direction::Receive) => self.receive(group, peer)?,
            (None, _) => self.pass_wire(group, wire.expect("a rank of another host has a wire"))?,
        };
        self.lent &= !done;
        if done {
            publish(completed, self.number + 1);
            // The next message of this line may be another thread's.
            group.ring_rank(group.rank, MAIL_BELL, subject::MAIL);
            let sent =
                if self.direction == Direction::Send { self.buffer.len() * self.buffer.dtype().bytes() } else { 0 };
            group.count_message(sent as u64);
        }
        Ok(done)
    }

    fn send(&mut self, group: &Group, peer: usize) -> Result<bool, Error> {
        let mailbox = group.mailbox(group.rank, peer);
        let (len, width) = (self.buffer.len(), self.buffer.dtype().bytes());
        loop {
            let [refused_len, refused_number, refused_dtype] = &mailbox.receiver.refused;
            let dtype = refused_dtype.load(Ordering::Acquire);
            let (sent, taken) = (mailbox.sent.load(Ordering::Relaxed), mailbox.receiver.taken.load(Ordering::Acquire));
            if dtype != 0 {
                // The piece that was refused has not been taken. It may be that of an earlier message.
                let ours = mailbox.pieces[(taken % 2) as usize].each_ref().map(|word| word.load(Ordering::Relaxed));
                let expected = (refused_len.load(Ordering::Relaxed), dtype);
                let number = refused_number.load(Ordering::Relaxed);
                return Err(self.disagreement(group, number, (ours[0], ours[1]), expected));
            }
            if self.begun && self.moved == len {
                // What is staged needs the buffer no more.
                if !self.in_place || taken == sent {
                    return Ok(true);
                }
            } else if sent - taken < 2 {
                let place = match group.offset_of(self.buffer.address()) {
                    Some(offset) if !self.is_short() => {
                        (self.moved, self.in_place) = (len, true);
                        Place::Arena(offset)
                    }
                    None if len * width >= FAR && group.reads_private() => {
                        (self.moved, self.in_place) = (len, true);
                        Place::Private(self.buffer.address().addr().get() as u64)
                    }
                    _ => {
                        let piece = (len * width).next_power_of_two().clamp(SMALLEST_PIECE, PIECE);
                        let at = self.stage(group, peer, piece)? + (sent % 2) * piece as u64;
                        let count = (len - self.moved).min(PIECE / width);
                        let _access = exclusive(self.buffer.deferred());
                        // SAFETY: the range lies in the buffer, which this flight owns, and in this rank's stage for the peer; the
                        // peer has taken what stood there, two pieces ago, since fewer than two are out.
                        unsafe {
                            let from = self.buffer.address().as_ptr().add(self.moved * width);
                            let to = group.address(group.rank, at, (count * width) as u64);
                            non_temporal::copy(from, to.as_ptr(), count * width, false);
                        }
                        self.moved += count;
                        Place::Stage(at)
                    }
                };
                let words = [len as u64, 1 + self.buffer.dtype() as u64, place.to_word()];
                for (word, value) in mailbox.pieces[(sent % 2) as usize].iter().zip(words) {
                    word.store(value, Ordering::Relaxed);
                }
                self.begun = true;
                publish(&mailbox.sent, sent + 1);
                group.ring_rank(peer, MAIL_BELL, subject::MAIL);
                self.watch = Watch::new(self.limit);
                continue;
            }
            let unchanged = || mailbox.receiver.taken.load(Ordering::Acquire) == taken;
            return self.wait_for(group, peer, &unchanged);
        }
    }

    fn receive(&mut self, group: &Group, peer: usize) -> Result<bool, Error> {
        let mailbox = group.mailbox(peer, group.rank);
        let (len, width) = (self.buffer.len(), self.buffer.dtype().bytes());
        loop {
            if self.begun && self.moved == len {
                return Ok(true);
            }
            let (sent, taken) = (mailbox.sent.load(Ordering::Acquire), mailbox.receiver.taken.load(Ordering::Relaxed));
            if taken == sent {
                return self.wait_for(group, peer, &|| mailbox.sent.load(Ordering::Acquire) == sent);
            }
            let words = mailbox.pieces[(taken % 2) as usize].each_ref().map(|word| word.load(Ordering::Relaxed));
            if let Err(error) = self.check(group, words[0], words[1]) {
                let (ours, refused) = (self.call(), &mailbox.receiver.refused);
                refused[0].store(ours.count, Ordering::Relaxed);
                refused[1].store(self.number, Ordering::Relaxed);
                publish(&refused[2], ours.dtype);
                group.ring_rank(peer, MAIL_BELL, subject::MAIL);
                return Err(error);
            }
            let place = Place::from_word(words[2]);
            let (offset, count) = match place {
                Place::Arena(offset) => (offset, len),
                Place::Stage(offset) => (offset, (len - self.moved).min(PIECE / width)),
                Place::Private(address) => (address, len),
                Place::None | Place::Header => (u64::MAX, 0),
            };
            let is_private = matches!(place, Place::Private(_));
            if !is_private && !group.engine.map.contains(offset, (count * width) as u64) {
                let reason = format!("rank {} published a message outside its arena", self.peer);
                return Err(Error::System { what: "receiving a message", reason });
            }
            let large = non_temporal::pays(2 * len * width) && count == len;
            let _access = exclusive(self.buffer.deferred());
            // SAFETY: the source lies in the peer's arena, or is for the system to find, and the
            // peer leaves it as it is until this rank has taken the piece; the destination lies in
            // the buffer, which this flight owns. They belong to different ranks or different
            // buffers.
            unsafe {
                let to = self.buffer.address().as_ptr().add(self.moved * width);
                if is_private {
                    group.read_private(peer, offset, to, count * width, &self.describe())?;
                } else {
                    let from = group.address(peer, offset, (count * width) as u64);
                    non_temporal::copy(from.as_ptr(), to, count * width, large);
                }
            }
            self.moved += count;
            self.begun = true;
            publish(&mailbox.receiver.taken, taken + 1);
            group.ring_rank(peer, MAIL_BELL, subject::MAIL);
            self.watch = Watch::new(self.limit);
        }
    }

    /// A stage for two pieces of `piece` bytes.
    fn stage(&self, group: &Group, peer: usize, piece: usize) -> Result<u64, Error> {
        let mut stages = group.mail.stages.lock();
        if let Some(range) = stages.get(&(peer, piece)) {
            return Ok(range.offset);
        }
        let range = group.engine.reserve(2 * piece as u64)?;
        stages.insert((peer, piece), range);
        Ok(range.offset)
    }

    /// Waits for the other rank, as long as it is `late`: asked once it is seen to have left, since its last act may have been to serve
    /// this message.
    fn wait_for(&mut self, group: &Group, peer: usize, late: &dyn Fn() -> bool) -> Result<bool, Error> {
        let op = self.describe();
        self.watch.check(group, peer, &|rank| rank == peer && late(), &op)?;
        Ok(false)
    }

    /// Whether sender and receiver mean the same message.
    fn check(&self, group: &Group, len: u64, dtype: u64) -> Result<(), Error> {
        let ours = self.call();
        let ours = (ours.count, ours.dtype);
        if (len, dtype) == ours { Ok(()) } else { Err(self.disagreement(group, self.number, ours, (len, dtype))) }
    }

    /// The error when the other rank means another message, each given by length and type.
    fn disagreement(&self, group: &Group, number: u64, ours: (u64, u64), theirs: (u64, u64)) -> Error {
        let message = |(count, dtype)| describe(Call { count, dtype, sequence: number + 1, ..self.call() });
        let (way, back) = self.direction.words();
        Error::Mismatch {
            ours: format!("{} {way} rank {}", message(ours), self.peer),
            theirs: format!("{} {back} rank {}", message(theirs), group.name(group.rank)),
            peer: self.peer,
        }
    }

    /// To or from another host: the header, then, once it is there and right, the data.
    fn pass_wire(&mut self, group: &Group, wire: &mut (dyn Wire + 'static)) -> Result<bool, Error> {
        let (peer, bytes) = (self.peer, self.buffer.len() * self.buffer.dtype().bytes());
        let (data, words) = (self.buffer.address().as_ptr(), self.words.as_mut_ptr().cast::<u8>());
        if !self.begun {
            (self.begun, self.lent) = (true, true);
            // SAFETY: the buffer is this flight's until it is complete, the words too; `Drop` keeps both for ever if it never is.
            // (Access to a deferring device's memory is not serialised here: such devices are for tests on one host.)
            unsafe {
                match self.direction {
                    Direction::Send => {
                        *self.words = [self.buffer.len() as u64, 1 + self.buffer.dtype() as u64];
                        self.wire.push(wire.send(peer, TAG, words, 16)?);
                        self.wire.push(wire.send(peer, TAG, data, bytes)?);
                    }
                    Direction::Receive => self.wire.push(wire.receive(peer, TAG, words, 16)?),
                }
            }
        }
        while let Some(request) = self.wire.first() {
            if !wire.test(request)? {
                let op = self.describe();
                self.watch.check_wire(group, peer, wire, &op)?;
                return Ok(false);
            }
            self.wire.remove(0);
            self.watch = Watch::new(self.limit);
            if self.direction == Direction::Receive && self.moved == 0 {
                self.check(group, self.words[0], self.words[1])?;
                self.moved = self.buffer.len().max(1);
                // SAFETY: as above.
                self.wire.push(unsafe { wire.receive(peer, TAG, data, bytes)? });
            }
        }
        Ok(true)
    }
}

/// Where elements of a type may lie in a piece: pieces hold whole elements.
const _: () = assert!(PIECE.is_multiple_of(DType::F64.bytes()));
