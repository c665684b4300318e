//! Memory that the ranks of a host share: buffers in each rank's arena, and windows.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use pillion_kernels::{Buffer, DType, Device, Range};

use super::group::Group;
use super::{Engine, Owned};
use crate::call::Purpose;
use crate::memory::available::available_memory;
use crate::memory::control::{WINDOW_BELL, subject};
use crate::memory::mapping::{Mapping, PAGE};
use crate::memory::protocol::publish;
use crate::transport::{Limit, Transport, Turns};
use crate::window::chunk;
use crate::{Error, Sections};

/// What is allocated.
#[derive(Clone, Copy)]
enum Kind {
    Buffer,
    Window,
}

impl Group {
    pub(super) fn allocate_in_arena(&self, device: &dyn Device, dtype: DType, len: usize) -> Result<Buffer, Error> {
        let bytes = size(dtype, len)?;
        self.agree(Kind::Buffer, bytes, bytes.saturating_mul(self.world() as u64), [0; 2])?;
        self.take_from_arena(device, dtype, bytes).map_err(|error| self.give_up(error))
    }

    fn take_from_arena(&self, device: &dyn Device, dtype: DType, bytes: u64) -> Result<Buffer, Error> {
        let engine = &self.engine;
        let range = engine.reserve(bytes)?;
        let (place, owner) = ((engine.rank, range.offset, bytes), Owned::new(engine.clone(), range));
        engine.buffer(device, dtype, place, owner)
    }

    pub(super) fn allocate_in_own_arena(&self, device: &dyn Device, dtype: DType, len: usize) -> Result<Buffer, Error> {
        self.healthy()?;
        let bytes = size(dtype, len)?;
        let (available, limit) = available_memory();
        if bytes > available {
            return Err(Error::OutOfMemory { bytes, available, limit });
        }
        self.take_from_arena(device, dtype, bytes)
    }

    pub(super) fn make_window(
        self: Arc<Self>,
        device: &dyn Device,
        dtype: DType,
        len: usize,
        sections: Option<&Sections>,
    ) -> Result<(Buffer, Box<dyn Turns>), Error> {
        let bytes = size(dtype, len)?;
        let (engine, hosts) = (self.engine.clone(), &self.hosts);
        let own = match self.rank {
            0 => Some(WindowPlace::make(&engine, self.world(), bytes).map_err(|error| self.give_up(error))?),
            _ => None,
        };
        let places = own.map_or([0; 2], |own| [own.words.offset, own.data.offset]);
        let places = self.agree(Kind::Window, bytes, bytes, places).inspect_err(|_| {
            own.into_iter().for_each(|own| own.give_back(&engine));
        })?;
        let [words, data] = places[hosts.local()[0]];
        let place = own.unwrap_or(WindowPlace {
            leader: self.local(0),
            words: Range { offset: words, bytes: WindowPlace::of_words(self.world()) },
            data: Range { offset: data, bytes },
        });
        // This rank's shard, and those that it receives from other hosts.
        let rank = self.name(self.rank);
        let ranks = || hosts.partnered(rank).chain([rank]);
        let count = sections.map_or(1, Sections::count);
        let mut chunks = (0..count).flat_map(|section| ranks().map(move |rank| (section, rank)));
        let reserved = chunks.try_for_each(|(section, rank)| {
            let chunk = chunk(sections, len, section, hosts.world(), rank);
            let [first, bytes] = [chunk.start, chunk.len()].map(|elements| (elements * dtype.bytes()) as u64);
            engine.map.reserve(place.leader, data + first, bytes)
        });
        let lease = Lease { place, group: self.clone() };
        let buffer =
            reserved.and_then(|()| engine.buffer(device, dtype, (place.leader, data, place.data.bytes), lease));
        let buffer = buffer.map_err(|error| self.give_up(error))?;
        Ok((buffer, Box::new(Released { place, group: self.clone() })))
    }

    /// Gives up because of this rank's own failure, so that no other rank waits for it.
    pub(super) fn give_up(&self, error: Error) -> Error {
        self.abort(&error.to_string());
        error
    }

    /// Checks that every rank asks for the same size, and that the host has memory for all of it:
    /// exceeding it would not fail, but wake the kernel's killer. Asked before any rank takes its
    /// part, so that the answers do not race. Returns every rank's `places`.
    fn agree(&self, kind: Kind, bytes: u64, on_this_host: u64, places: [u64; 2]) -> Result<Vec<[u64; 2]>, Error> {
        let (available, limit) = available_memory();
        let words = [kind as u64, bytes, available, places[0], places[1], on_this_host];
        let gathered = self.exchange(&words, Purpose::Allocate, Limit::within(self.options.timeout))?;
        let values = || gathered.as_chunks::<6>().0.iter();
        if let Some(peer) = values().position(|other| other[..2] != words[..2]) {
            let call = |words: &[u64]| {
                let name = ["an allocation", "a window"][usize::from(words[0] == Kind::Window as u64)];
                format!("{name} of {} bytes", words[1])
            };
            let theirs = call(&gathered[6 * peer..]);
            return Err(self.fail(Error::Mismatch { ours: call(&words), theirs, peer }));
        }
        // Hosts with more ranks need more: all refuse where one has too little.
        if let Some(short) = values().find(|other| other[5] > other[2]) {
            return Err(Error::OutOfMemory { bytes: short[5], available: short[2], limit });
        }
        Ok(values().map(|other| [other[3], other[4]]).collect())
    }
}

fn size(dtype: DType, len: usize) -> Result<u64, Error> {
    let bytes = (len as u64).checked_mul(dtype.bytes() as u64).filter(|&bytes| bytes < 1 << 60);
    bytes.ok_or(Error::OutOfMemory { bytes: u64::MAX, available: 1 << 60, limit: "the address space" })
}

/// Where a window lies on a host.
#[derive(Clone, Copy, Debug)]
struct WindowPlace {
    /// Whose arena it is in, as the engine counts ranks: the first member's on this host.
    leader: usize,
    /// Two words for each member.
    words: Range,
    /// The whole window.
    data: Range,
}

impl WindowPlace {
    /// Bytes of the words of `members` members.
    fn of_words(members: usize) -> u64 {
        16 * members as u64
    }

    /// For `bytes` bytes, in the arena of this rank. The words are reserved, the rest is each
    /// member's to reserve.
    ///
    /// # Errors
    /// When there is no memory.
    fn make(engine: &Engine, members: usize, bytes: u64) -> Result<WindowPlace, Error> {
        let words = engine.reserve(WindowPlace::of_words(members))?;
        let place = WindowPlace { leader: engine.rank, words, data: Range { bytes, ..engine.take(bytes) } };
        if !engine.map.contains(place.data.offset, bytes) {
            place.give_back(engine);
            let available = engine.map.shape().reserve.saturating_sub(place.data.offset);
            return Err(Error::OutOfMemory { bytes, available, limit: "the address space" });
        }
        Ok(place)
    }

    /// Gives back what [`WindowPlace::make`] took.
    fn give_back(self, engine: &Engine) {
        self.ranges().into_iter().for_each(|range| engine.give_back(range));
    }

    /// A word of a member.
    fn word(self, map: &Mapping, member: usize, word: u64) -> &AtomicU64 {
        let address = map.address(self.leader, self.words.offset + 16 * member as u64 + 8 * word, 8);
        // SAFETY: inside the mapping; aligned to 8, since ranges start at pages; reserved for these
        // words alone, which are only ever accessed as atomics, until every member has dropped the
        // window.
        unsafe { address.cast::<AtomicU64>().as_ref() }
    }

    fn ranges(self) -> [Range; 2] {
        let Range { offset, bytes } = self.data;
        [self.words, Range { offset, bytes: bytes.max(1).next_multiple_of(PAGE) }]
    }
}

/// The number of gathers that a member has released.
const RELEASED: u64 = 0;
/// Whether a member has dropped the window, and nothing of it is in flight.
const DROPPED: u64 = 1;

/// How far the members are with a window.
struct Released {
    place: WindowPlace,
    group: Arc<Group>,
}

/// A window's memory, which every operation on it keeps.
struct Lease {
    place: WindowPlace,
    group: Arc<Group>,
}

impl Turns for Released {
    fn wait(&self, gathers: u64) -> Result<(), Error> {
        let late = |member: usize| self.of(member).load(Ordering::Acquire) < gathers;
        self.group.wait_for_ranks("writing a window", self.group.options.timeout, late)
    }

    fn release(&self, gathers: u64) {
        if self.group.engine.maker.is_another() {
            return;
        }
        publish(self.of(self.group.rank), gathers);
        for member in (0..self.group.world()).filter(|&member| member != self.group.rank) {
            self.group.ring_rank(member, WINDOW_BELL, subject::WINDOW);
        }
    }
}

impl Released {
    fn of(&self, member: usize) -> &AtomicU64 {
        self.place.word(&self.group.engine.map, member, RELEASED)
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let (place, group) = (self.place, &self.group);
        if group.healthy().is_err() {
            // Members may still be about to use it.
            return;
        }
        place.word(&group.engine.map, group.rank, DROPPED).store(1, Ordering::Release);
        if group.rank == 0 {
            let members = group.world();
            let is_dropped = move |map: &Mapping| {
                (0..members).all(|member| place.word(map, member, DROPPED).load(Ordering::Acquire) == 1)
            };
            group.engine.retire(place.ranges().into(), is_dropped, |_| {});
        }
    }
}
