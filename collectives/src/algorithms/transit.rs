//! Messages of an operation to and from other hosts, and the greeting with which it starts there.
//!
//! Rank l of a host talks to rank l of every other host, its *column*; so the ranks of a host share the work of the wire evenly.
//! Before any data, the ranks of a column tell each other what they called, like headers do on a host: the hosts' own headers agree, so
//! if columns agree, all ranks do.

use std::mem::ManuallyDrop;

use crate::Error;
use crate::call::describe;
use crate::shm::control::Call;
use crate::shm::flight::Peers;
use crate::wire::Request;

/// Messages under way, and the memory that they use, which is not given back before they are complete.
pub(super) struct Transit<M> {
    pub(super) memory: ManuallyDrop<M>,
    waiting: Vec<Waiting>,
    /// A message that did not start may still have parts under way.
    failed: bool,
}

/// A message, the other rank, and what it belongs to.
struct Waiting {
    rank: usize,
    request: Request,
    group: usize,
}

impl<M> Drop for Transit<M> {
    /// After a failure the transport may still use the memory at any time, so it is never given back.
    fn drop(&mut self) {
        if self.waiting.is_empty() && !self.failed {
            // SAFETY: dropped here, once.
            unsafe { ManuallyDrop::drop(&mut self.memory) };
        }
    }
}

impl<M> Transit<M> {
    pub(super) fn new(memory: M) -> Transit<M> {
        Transit { memory: ManuallyDrop::new(memory), waiting: Vec::new(), failed: false }
    }

    /// Starts sending to a rank of another host.
    ///
    /// # Safety
    /// The bytes lie in `memory`, or in something that it keeps alive, and nobody changes them until [`Transit::poll`] returns `None`.
    pub(super) unsafe fn send(
        &mut self,
        peers: &mut Peers<'_>,
        to: usize,
        data: *const u8,
        len: usize,
        group: usize,
    ) -> Result<(), Error> {
        let tag = peers.channel as u8;
        // SAFETY: the caller's promise, and `Drop`.
        let request = unsafe { peers.wire.as_deref_mut().expect(NO_WIRE).send(to, tag, data, len) };
        let request = request.inspect_err(|_| self.failed = true)?;
        self.waiting.push(Waiting { rank: to, request, group });
        Ok(())
    }

    /// Starts receiving from a rank of another host.
    ///
    /// # Safety
    /// As for [`Transit::send`], and nobody else reads the bytes either.
    pub(super) unsafe fn receive(
        &mut self,
        peers: &mut Peers<'_>,
        from: usize,
        data: *mut u8,
        len: usize,
        group: usize,
    ) -> Result<(), Error> {
        let tag = peers.channel as u8;
        // SAFETY: the caller's promise, and `Drop`.
        let request = unsafe { peers.wire.as_deref_mut().expect(NO_WIRE).receive(from, tag, data, len) };
        let request = request.inspect_err(|_| self.failed = true)?;
        self.waiting.push(Waiting { rank: from, request, group });
        Ok(())
    }

    /// A rank whose message of a group is still under way, if there is one.
    pub(super) fn poll(&mut self, peers: &mut Peers<'_>, group: usize) -> Result<Option<usize>, Error> {
        let wire = peers.wire.as_deref_mut().expect(NO_WIRE);
        let mut index = 0;
        while index < self.waiting.len() {
            if wire.test(&self.waiting[index].request)? {
                self.waiting.swap_remove(index);
            } else {
                index += 1;
            }
        }
        Ok(self.waiting.iter().find(|waiting| waiting.group == group).map(|waiting| waiting.rank))
    }
}

const NO_WIRE: &str = "an operation between hosts runs on the thread that owns the wire";

/// Words of a greeting's head: the call, whether this host stages, and the number of words that follow.
const HEAD: usize = 8;

/// What the ranks of a column tell each other first.
pub(super) struct Greeting {
    transit: Transit<Words>,
    phase: Phase,
    /// What every host said, by host: whether it stages.
    staged: bool,
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
    /// By host.
    heads: Box<[[u64; HEAD]]>,
    bodies: Box<[Box<[u64]>]>,
}

impl Greeting {
    /// `body` has as many words on every rank; `staged` says whether anybody on this host stages.
    pub(super) fn new(call: Call, staged: bool, body: Vec<u64>) -> Greeting {
        let mut head = [0; HEAD];
        head[..6].copy_from_slice(&call.words());
        (head[6], head[7]) = (u64::from(staged), body.len() as u64);
        let words = Words { head: head.into(), body: body.into(), heads: Box::default(), bodies: Box::default() };
        Greeting { transit: Transit::new(words), phase: Phase::Unsent, staged }
    }

    /// A rank that is still waited for; none once all have been heard.
    pub(super) fn poll(&mut self, peers: &mut Peers<'_>) -> Result<Option<usize>, Error> {
        let column = column(peers);
        if self.phase == Phase::Unsent {
            self.phase = Phase::Heads;
            let hosts = peers.shared.hosts.ranks.len();
            let words = &mut *self.transit.memory;
            words.heads = vec![[0; HEAD]; hosts].into();
            words.bodies = vec![words.body.clone(); hosts].into();
            let (head, body) = (words.head.as_ptr().cast::<u8>(), words.body.as_ptr().cast::<u8>());
            let bytes = 8 * words.body.len();
            for &(host, rank) in &column {
                let into = self.transit.memory.heads[host].as_mut_ptr().cast();
                // SAFETY: the words are the transit's, and are not touched before it is complete.
                unsafe {
                    self.transit.receive(peers, rank, into, 8 * HEAD, 0)?;
                    self.transit.send(peers, rank, head, 8 * HEAD, 0)?;
                    self.transit.send(peers, rank, body, bytes, 0)?;
                }
            }
        }
        loop {
            if let Some(rank) = self.transit.poll(peers, 0)? {
                return Ok(Some(rank));
            }
            if self.phase == Phase::Bodies {
                return Ok(None);
            }
            self.phase = Phase::Bodies;
            for &(host, rank) in &column {
                let words = &mut *self.transit.memory;
                let theirs: [u64; HEAD] = words.heads[host];
                let call = Call::from_words(theirs[..6].try_into().expect("six words"));
                if !call.agrees_with(&peers.call) || theirs[7] != words.body.len() as u64 {
                    return Err(Error::Mismatch { ours: describe(peers.call), theirs: describe(call), peer: rank });
                }
                self.staged |= theirs[6] != 0;
                let (into, bytes) = (words.bodies[host].as_mut_ptr().cast(), 8 * words.body.len());
                // SAFETY: as above.
                unsafe { self.transit.receive(peers, rank, into, bytes, 0)? };
            }
        }
    }

    /// Whether anybody on any host stages.
    pub(super) fn staged(&self) -> bool {
        self.staged
    }

    /// What a host said; this rank's own words for its own.
    pub(super) fn body(&self, host: usize) -> &[u64] {
        &self.transit.memory.bodies[host]
    }
}

/// The other ranks of this rank's column, each with its host.
pub(super) fn column(peers: &Peers<'_>) -> Vec<(usize, usize)> {
    let hosts = &peers.shared.hosts;
    let others = (0..hosts.ranks.len()).filter(|&host| host != hosts.own);
    others.map(|host| (host, hosts.ranks[host][peers.rank()])).collect()
}
