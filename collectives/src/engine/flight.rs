//! An operation in flight: what was called, which step it is in, and how long it has waited for whom.
//!
//! ```text
//! start     after its event:  write the header, take a step
//! step 0    all ranks there:  compare headers, exchange(0), take a step
//! …
//! last      all ranks there:  exchange(last): done
//! ```
//!
//! An operation whose peers read or write this rank's memory takes one more step after the last access: it says that everybody
//! has finished, so the buffers may change hands.

use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::Waker;
use std::time::Instant;

use pillion_kernels::{Event, Stamp};

use super::group::{Count, Group};
use super::start::StartEvent;
use super::watch::Watch;
use crate::Error;
use crate::algorithms::AnyAlgorithm;
use crate::call::{describe, name};
use crate::memory::control::{BRIEF, Call, Channel, ChannelControl, Header, PAYLOAD};
use crate::memory::place::Place;
use crate::outcome::{Ending, Outcome};
use crate::record::Recorded;
use crate::transport::Limit;
use crate::wire::Wire;

/// What one exchange came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Progress {
    /// Another follows, once every rank has come this far.
    Step,
    /// A message to or from this rank of another host is under way: call again.
    Waiting(usize),
    /// The operation is complete.
    Done,
}

/// What a rank shows the others with its first step.
pub(crate) struct Opening {
    pub(crate) input: Place,
    pub(crate) output: Place,
    /// An operand so brief that it travels beside the steps.
    pub(crate) brief: [u64; BRIEF],
}

impl Opening {
    /// Operands at these places.
    pub(crate) fn new(input: Place, output: Place) -> Opening {
        Opening { input, output, brief: [0; BRIEF] }
    }
}

/// An algorithm: what its header says, and what it does once every rank is there.
pub(crate) trait Algorithm: Send {
    /// What every rank must have called; the sequence number is filled in.
    fn call(&self) -> Call;

    /// Writes what peers will read, and says where they find it.
    fn begin(&mut self, peers: &mut Peers<'_>) -> Result<Opening, Error>;

    /// Moves data; all ranks of this host have taken `step + 1` steps of this operation.
    fn exchange(&mut self, step: u32, peers: &mut Peers<'_>) -> Result<Progress, Error>;

    /// Bytes that other ranks take from this one.
    fn bytes_sent(&self, world: usize) -> u64;
}

/// Access to the other ranks of an operation: those of this host through shared memory, others through the wire.
pub(crate) struct Peers<'a> {
    pub(crate) group: &'a Group,
    pub(crate) channel: Channel,
    pub(crate) call: Call,
    pub(crate) wire: Option<&'a mut (dyn Wire + 'static)>,
    /// Whether a message to or from another host has become complete.
    pub(crate) moved: bool,
}

impl Peers<'_> {
    /// This rank, among those of its host.
    pub(crate) fn rank(&self) -> usize {
        self.group.rank
    }

    /// Number of ranks on this host.
    pub(crate) fn world(&self) -> usize {
        self.group.world()
    }

    /// A rank's header.
    pub(crate) fn header(&self, rank: usize) -> &Header {
        &self.group.control(rank).channels[self.channel as usize].headers[self.parity()]
    }

    /// Which of the two places for what belongs to an operation this one has.
    fn parity(&self) -> usize {
        (self.call.sequence % 2) as usize
    }

    fn own_channel(&self) -> &ChannelControl {
        &self.group.control(self.group.rank).channels[self.channel as usize]
    }

    /// A rank's brief operand, which nobody writes while the operation is under way.
    pub(crate) fn brief(&self, rank: usize) -> &[AtomicU64; BRIEF] {
        &self.group.control(rank).channels[self.channel as usize].brief[self.parity()]
    }

    /// A value from a rank's header.
    pub(crate) fn payload(&self, rank: usize, index: usize) -> u64 {
        self.header(rank).payload[index].load(Ordering::Relaxed)
    }

    /// Puts a value into this rank's header, before its first step.
    pub(crate) fn set_payload(&self, index: usize, value: u64) {
        self.header(self.rank()).payload[index].store(value, Ordering::Relaxed);
    }

    /// Where the payload of a rank's header starts, in bytes that nobody writes while the operation is under way.
    pub(crate) fn payload_address(&self, rank: usize, first: usize) -> *mut u8 {
        assert!(first < PAYLOAD);
        self.header(rank).payload[first..].as_ptr().cast_mut().cast()
    }

    /// The address of bytes of a rank's arena.
    pub(crate) fn address(
        &self,
        rank: usize,
        offset: u64,
        bytes: u64,
        aligned_to: usize,
    ) -> Result<NonNull<u8>, Error> {
        if !self.group.engine.map.contains(offset, bytes) || !offset.is_multiple_of(aligned_to as u64) {
            let reason = format!("rank {} published a buffer outside its arena", self.group.name(rank));
            return Err(Error::System { what: "reading a peer's arena", reason });
        }
        Ok(self.group.address(rank, offset, bytes))
    }
}

/// How far an operation has come.
pub(crate) struct Course {
    channel: Channel,
    call: Call,
    /// That of the call, which peers compare.
    digest: u64,
    /// The channel's steps once this rank has taken the operation's newest.
    target: u64,
    /// Steps taken.
    taken: u32,
    /// Ranks known to have made the same call.
    compared: usize,
    /// Whether peers that sleep have yet to be told of the newest step.
    untold: bool,
    watch: Watch,
    limit: Limit,
    /// Where it is recorded.
    started: Option<Instant>,
}

impl Course {
    /// Before the start.
    pub(crate) fn new(call: Call, channel: Channel, limit: Limit) -> Course {
        Course {
            channel,
            call,
            digest: 0,
            target: 0,
            taken: 0,
            compared: 0,
            untold: false,
            watch: Watch::new(Limit::NONE),
            limit,
            started: None,
        }
    }

    /// Goes as far as the other ranks allow; true once complete.
    pub(crate) fn poll(
        &mut self,
        algorithm: &mut dyn Algorithm,
        group: &Group,
        count: &mut Count,
        mut wire: Option<&mut (dyn Wire + 'static)>,
    ) -> Result<bool, Error> {
        if self.taken == 0 {
            self.start(algorithm, group, count)?;
        }
        loop {
            let channel = self.channel as usize;
            let steps = |rank: usize| group.control(rank).channels[channel].steps.load(Ordering::Acquire);
            let is_late = (0..group.world()).any(|rank| steps(rank) < self.target);
            if self.untold {
                // After the first look: the fence in it would otherwise wait for the step to reach memory before the look.
                self.untold = false;
                group.ring_channel(self.channel);
            }
            if self.taken == 1 {
                self.compare(group, steps)?;
            }
            if is_late {
                let (target, call) = (self.target, self.call);
                self.watch.check_step(group, self.channel, target, &|| describe(call))?;
                return Ok(false);
            }
            let mut peers =
                Peers { group, channel: self.channel, call: self.call, wire: wire.as_deref_mut(), moved: false };
            let progress = algorithm.exchange(self.taken - 1, &mut peers)?;
            if peers.moved {
                // Limits are for silence, not for large buffers.
                self.watch = Watch::new(self.limit);
            }
            match progress {
                Progress::Step => self.step(group, count),
                Progress::Waiting(rank) => {
                    let call = self.call;
                    let wire = wire.as_deref_mut().expect("only a wire is waited for");
                    self.watch.check_wire(group, rank, wire, &|| describe(call))?;
                    group.control(group.rank).channels[channel].show_wait(rank);
                    return Ok(false);
                }
                Progress::Done => {
                    let bytes = algorithm.bytes_sent(group.hosts.world());
                    group.count(self.channel, bytes);
                    if let Some(start) = self.started {
                        let (start, end) = (start.into(), Stamp::now());
                        group.record.end(Recorded { operation: name(self.call), start, end, bytes });
                    }
                    return Ok(true);
                }
            }
        }
    }

    fn start(&mut self, algorithm: &mut dyn Algorithm, group: &Group, count: &mut Count) -> Result<(), Error> {
        self.started = group.record.start();
        self.call.sequence = count.sequence + 1;
        self.digest = self.call.digest();
        let mut peers = Peers { group, channel: self.channel, call: self.call, wire: None, moved: false };
        let Opening { input, output, brief } = algorithm.begin(&mut peers)?;
        peers.header(group.rank).write(self.call, input, output);
        // What lies beside the steps is stored together with them: a peer that looks in between would take the cache line away.
        for (word, value) in peers.brief(group.rank).iter().zip(brief) {
            word.store(value, Ordering::Relaxed);
        }
        peers.own_channel().digests[peers.parity()].store(self.digest, Ordering::Relaxed);
        count.sequence += 1;
        self.step(group, count);
        Ok(())
    }

    fn step(&mut self, group: &Group, count: &mut Count) {
        count.steps += 1;
        self.target = count.steps;
        self.taken += 1;
        self.watch = Watch::new(self.limit);
        group.control(group.rank).channels[self.channel as usize].steps.store(count.steps, Ordering::Release);
        self.untold = true;
    }

    /// Compares the calls of ranks that have arrived. A rank further on may already show a mismatch while an earlier one is still
    /// on its way: it is named now.
    fn compare(&mut self, group: &Group, steps: impl Fn(usize) -> u64) -> Result<(), Error> {
        let peers = Peers { group, channel: self.channel, call: self.call, wire: None, moved: false };
        for rank in self.compared..group.world() {
            if steps(rank) < self.target {
                continue;
            }
            let theirs = &group.control(rank).channels[self.channel as usize].digests[peers.parity()];
            if theirs.load(Ordering::Relaxed) != self.digest {
                let (ours, theirs) = (describe(self.call), describe(peers.header(rank).call()));
                return Err(Error::Mismatch { ours, theirs, peer: group.name(rank) });
            }
            if rank == self.compared {
                self.compared += 1;
            }
        }
        Ok(())
    }
}

/// An operation that goes its course while its caller does something else.
pub(crate) struct Flight {
    algorithm: AnyAlgorithm,
    course: Course,
    after: StartEvent,
    delay: Option<Instant>,
    /// Dropped last.
    ending: Ending,
}

impl Flight {
    /// Fails if its event does not happen within `limit` from now.
    pub(crate) fn new(algorithm: AnyAlgorithm, course: Course, after: Event, outcome: Arc<Outcome>) -> Flight {
        let after = StartEvent::new(after, course.limit);
        Flight { algorithm, course, after, delay: None, ending: Ending::new(outcome, "an operation") }
    }

    pub(crate) fn channel(&self) -> Channel {
        self.course.channel
    }

    pub(crate) fn finish(mut self, result: Result<(), Error>) {
        self.ending.set(result);
    }

    /// Goes as far as its event and the other ranks allow; true once complete.
    pub(crate) fn poll(
        &mut self,
        group: &Group,
        count: &mut Count,
        mut wire: Option<&mut (dyn Wire + 'static)>,
        waker: &Waker,
    ) -> Result<bool, Error> {
        if self.course.taken == 0 {
            let Course { channel, call, .. } = self.course;
            let is_late = |rank: usize| {
                group.control(rank).channels[channel as usize].steps.load(Ordering::Acquire) <= count.steps
            };
            let op = || describe(Call { sequence: count.sequence + 1, ..call });
            if !self.after.has_happened(group, Some(waker), wire.as_deref_mut(), &is_late, &op)? {
                return Ok(false);
            }
            // An injected delay, for tests: the operation starts late, everything else goes on.
            let delay = group.options.delay_of(self.course.channel);
            if !delay.is_zero() && self.delay.get_or_insert_with(Instant::now).elapsed() < delay {
                return Ok(false);
            }
        }
        self.course.poll(self.algorithm.as_dyn(), group, count, wire)
    }
}
