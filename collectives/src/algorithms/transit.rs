//! Messages of an operation to and from other hosts, and the greeting with which it starts there.
//!
//! Before any data, partners tell each other what they called, like headers do on a host: the
//! hosts' own headers agree, and partners connect all hosts, so if partners agree, all ranks do.

use std::collections::{HashMap, VecDeque};
use std::mem::ManuallyDrop;

use crate::Error;
use crate::call::describe;
use crate::engine::flight::Peers;
use crate::hosts::Hosts;
use crate::memory::control::Call;
use crate::wire::{Receipt, Wire};

/// Longest message, in bytes.
const LONGEST: usize = 1 << 20;
/// Messages under way to one rank, and from it. The two directions keep pace: the message after the window starts once the first in it has
/// gone and the first of the other direction has come. Left to itself, MPI over TCP tends to move one way first and then the other, in
/// twice the time.
const WINDOW: usize = 3;

/// Messages under way or yet to be started, and the memory that they use, which is not given back before they are complete.
pub(super) struct Transit<M> {
    pub(super) memory: ManuallyDrop<M>,
    lines: Vec<Line>,
    /// A message that did not start may still have parts under way.
    failed: bool,
}

/// The messages to and from one rank.
struct Line {
    rank: usize,
    ways: [Way; 2],
    /// Messages of each group that are not complete.
    open: HashMap<usize, usize>,
}

/// The messages of one line in one direction, from first to last.
#[derive(Default)]
struct Way {
    waiting: Vec<(Message, Receipt)>,
    queued: VecDeque<Message>,
    /// Number of messages so far.
    count: usize,
}

/// A part of what was to be sent or received.
struct Message {
    data: *mut u8,
    len: usize,
    /// What it belongs to.
    group: usize,
    /// Its number among those of its way.
    index: usize,
}

// SAFETY: the pointers are to memory that the transit's owner lends it (see `Transit::send`), whichever thread drives it.
unsafe impl Send for Message {}

impl<M> Drop for Transit<M> {
    /// After a failure the transport may still use the memory at any time, so it is never given back.
    fn drop(&mut self) {
        let waiting = self.lines.iter().flat_map(|line| &line.ways).any(|way| !way.waiting.is_empty());
        if !waiting && !self.failed {
            // SAFETY: dropped here, once.
            unsafe { ManuallyDrop::drop(&mut self.memory) };
        }
    }
}

impl<M> Transit<M> {
    pub(super) fn new(memory: M) -> Transit<M> {
        Transit { memory: ManuallyDrop::new(memory), lines: Vec::new(), failed: false }
    }

    /// Will send to a rank of another host, in messages that it receives as one.
    ///
    /// # Safety
    /// The bytes lie in `memory`, or in something that it keeps alive, and nobody changes them until [`Transit::poll`] returns `None`.
    pub(super) unsafe fn send(&mut self, to: usize, data: *const u8, len: usize, group: usize) {
        self.enqueue(to, SENDS, data.cast_mut(), len, group);
    }

    /// Will receive from a rank of another host.
    ///
    /// # Safety
    /// As for [`Transit::send`], and nobody else reads the bytes either.
    pub(super) unsafe fn receive(&mut self, from: usize, data: *mut u8, len: usize, group: usize) {
        self.enqueue(from, RECEIVES, data, len, group);
    }

    fn enqueue(&mut self, rank: usize, way: usize, data: *mut u8, len: usize, group: usize) {
        let known = self.lines.iter().position(|line| line.rank == rank);
        let line = known.unwrap_or_else(|| {
            self.lines.push(Line { rank, ways: Default::default(), open: HashMap::new() });
            self.lines.len() - 1
        });
        let line = &mut self.lines[line];
        let way = &mut line.ways[way];
        for first in (0..len).step_by(LONGEST) {
            let (data, len) = (data.wrapping_add(first), LONGEST.min(len - first));
            way.queued.push_back(Message { data, len, group, index: way.count });
            way.count += 1;
            *line.open.entry(group).or_default() += 1;
        }
    }

    /// Lets messages move; a rank whose message of a group is still under way, if there is one.
    pub(super) fn poll(&mut self, peers: &mut Peers<'_>, group: usize) -> Result<Option<usize>, Error> {
        let tag = peers.channel as u8;
        let wire = peers.wire.as_deref_mut().expect(NO_WIRE);
        for line in &mut self.lines {
            peers.moved |= line.finish(wire)?;
            line.start(wire, tag).inspect_err(|_| self.failed = true)?;
        }
        let is_open = |line: &&Line| line.open.get(&group).is_some_and(|&open| open > 0);
        Ok(self.lines.iter().find(is_open).map(|line| line.rank))
    }
}

impl Line {
    /// Forgets messages that are complete; whether there were any.
    fn finish(&mut self, wire: &mut dyn Wire) -> Result<bool, Error> {
        let mut moved = false;
        for way in &mut self.ways {
            let mut index = 0;
            while let Some((message, request)) = way.waiting.get(index) {
                if wire.test(request)? {
                    *self.open.get_mut(&message.group).expect("counted when enqueued") -= 1;
                    way.waiting.remove(index);
                    moved = true;
                } else {
                    index += 1;
                }
            }
        }
        Ok(moved)
    }

    /// Starts the messages that are inside the window, those that are sent first: with receives first, Open MPI over TCP moved one way and then
    /// the other.
    fn start(&mut self, wire: &mut dyn Wire, tag: u8) -> Result<(), Error> {
        let Some(first) = self.ways.iter().filter_map(Way::first).min() else { return Ok(()) };
        for (direction, way) in self.ways.iter_mut().enumerate() {
            while let Some(message) = way.queued.pop_front_if(|message| message.index < first + WINDOW) {
                // SAFETY: by the promise of `send` or `receive`, and since `Drop` keeps the memory.
                let request = unsafe {
                    match direction {
                        SENDS => wire.send(self.rank, tag, message.data, message.len),
                        _ => wire.receive(self.rank, tag, message.data, message.len),
                    }
                };
                way.waiting.push((message, request?));
            }
        }
        Ok(())
    }
}

impl Way {
    /// The number of its first message that is not complete.
    fn first(&self) -> Option<usize> {
        self.waiting.first().map(|(message, _)| message).or(self.queued.front()).map(|message| message.index)
    }
}

/// Places in [`Line::ways`].
const SENDS: usize = 0;
const RECEIVES: usize = 1;

const NO_WIRE: &str = "an operation between hosts runs on the thread that owns the wire";

/// The groups of a greeting's messages.
const HEADS: usize = 0;
const BODIES: usize = 1;
/// Words of a greeting's head: the call, whether this host stages, and the number of words that
/// follow for each rank of the host.
const HEAD: usize = 8;

/// What partners tell each other first.
pub(super) struct Greeting {
    transit: Transit<Words>,
    phase: Phase,
    /// Whether some host stages, of those that have been heard.
    staged: bool,
    /// Whom this rank greets.
    correspondents: Vec<usize>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    Unsent,
    Heads,
    Bodies,
}

struct Words {
    head: Box<[u64]>,
    body: Box<[u64]>,
    /// By correspondent.
    heads: Box<[[u64; HEAD]]>,
    bodies: Box<[Box<[u64]>]>,
}

impl Greeting {
    /// `body` has `words` words for each rank of this host, as many on every host; `staged` says
    /// whether anybody on this host stages.
    pub(super) fn new(peers: &Peers<'_>, staged: bool, body: Vec<u64>) -> Greeting {
        let mut head = [0; HEAD];
        head[..6].copy_from_slice(&peers.call.words());
        (head[6], head[7]) = (u64::from(staged), (body.len() / peers.world()) as u64);
        let correspondents = peers.group.hosts.correspondents(peers.group.name(peers.rank()));
        let words = Words { head: head.into(), body: body.into(), heads: Box::default(), bodies: Box::default() };
        Greeting { transit: Transit::new(words), phase: Phase::Unsent, staged, correspondents }
    }

    /// A rank that is still waited for; none once all have been heard.
    pub(super) fn poll(&mut self, peers: &mut Peers<'_>) -> Result<Option<usize>, Error> {
        let hosts = &peers.group.hosts;
        let words_of_rank = self.transit.memory.head[7];
        if self.phase == Phase::Unsent {
            self.phase = Phase::Heads;
            let words = &mut *self.transit.memory;
            words.heads = vec![[0; HEAD]; self.correspondents.len()].into();
            let ranks = |&rank: &usize| hosts.ranks[hosts.host(rank)].len();
            let empty = |rank| vec![0; ranks(rank) * words_of_rank as usize].into();
            words.bodies = self.correspondents.iter().map(empty).collect();
            let (head, body) = (words.head.as_ptr().cast::<u8>(), words.body.as_ptr().cast::<u8>());
            let bytes = 8 * words.body.len();
            for (index, &rank) in self.correspondents.iter().enumerate() {
                let into = self.transit.memory.heads[index].as_mut_ptr().cast();
                // SAFETY: the words are the transit's, and are not touched before it is complete.
                unsafe {
                    self.transit.receive(rank, into, 8 * HEAD, HEADS);
                    self.transit.send(rank, head, 8 * HEAD, HEADS);
                    // Not complete before the other rank receives it, which it does once it has the head.
                    self.transit.send(rank, body, bytes, BODIES);
                }
            }
        }
        loop {
            let group = if self.phase == Phase::Bodies { BODIES } else { HEADS };
            if let Some(rank) = self.transit.poll(peers, group)? {
                return Ok(Some(rank));
            }
            if self.phase == Phase::Bodies {
                return Ok(None);
            }
            self.phase = Phase::Bodies;
            for (index, &rank) in self.correspondents.iter().enumerate() {
                let words = &mut *self.transit.memory;
                let theirs: [u64; HEAD] = words.heads[index];
                let call = Call::from_words(theirs[..6].try_into().expect("six words"));
                if !call.agrees_with(&peers.call) || theirs[7] != words_of_rank {
                    return Err(Error::Mismatch { ours: describe(peers.call), theirs: describe(call), peer: rank });
                }
                self.staged |= theirs[6] != 0;
                let (into, bytes) = (words.bodies[index].as_mut_ptr().cast(), 8 * words.bodies[index].len());
                // SAFETY: as above.
                unsafe { self.transit.receive(rank, into, bytes, BODIES) };
            }
        }
    }

    /// Whether anybody on any host stages.
    pub(super) fn staged(&self) -> bool {
        self.staged
    }

    /// The words of any rank.
    pub(super) fn words(&self, hosts: &Hosts, rank: usize) -> &[u64] {
        let (host, words) = (hosts.host(rank), &*self.transit.memory);
        let of_host = |&other: &usize| hosts.host(other) == host;
        let body = match self.correspondents.iter().position(of_host) {
            Some(index) => &words.bodies[index],
            None => &words.body,
        };
        let count = words.head[7] as usize;
        &body[hosts.place(rank) * count..][..count]
    }
}
