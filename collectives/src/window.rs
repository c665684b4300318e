//! Memory that all ranks of a host read in place.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use pillion_kernels::{Buffer, DType, Device, Event, Span, View, ViewMut};

use crate::checks::expect;
use crate::engine::Engine;
use crate::engine::group::Group;
use crate::memory::control::{WINDOW_BELL, subject};
use crate::memory::mapping::{Mapping, PAGE};
use crate::memory::protocol::publish;
use crate::memory::ranges::Range;
use crate::{Error, Sections};

/// A full-length buffer that every rank of the host can read and whose own shard each rank writes.
///
/// It is in one of two states, the same on every rank up to the order of calls:
/// *writable* (at first), where this rank may write its own shard, and, after [`crate::Communicator::gather_window`], *gathered*, where it may
/// read the whole. [`Window::release`] ends its reading; [`Window::shard_mut`] waits until every rank has released, so no rank
/// ever writes what another reads.
pub struct Window {
    buffer: Buffer,
    /// Its number among those of its communicator.
    number: u64,
    words: Words,
    group: Arc<Group>,
    sections: Option<Sections>,
    gathers: u64,
    gathered: bool,
}

/// Rank `rank`'s chunk of a section of `len` elements of `world` ranks.
pub(crate) fn chunk(
    sections: Option<&Sections>,
    len: usize,
    section: usize,
    world: usize,
    rank: usize,
) -> std::ops::Range<usize> {
    match sections {
        Some(sections) => sections.in_full(section, world, rank),
        None => {
            assert!(section == 0, "section {section} of a window that has one");
            rank * (len / world)..(rank + 1) * (len / world)
        }
    }
}

impl Window {
    /// Of memory that every rank has reserved its part of.
    ///
    /// # Errors
    /// Where `device` cannot use it.
    pub(crate) fn new(
        group: Arc<Group>,
        device: &dyn Device,
        dtype: DType,
        (number, memory): (u64, Memory),
        sections: Option<Sections>,
    ) -> Result<Window, Error> {
        let Memory { leader, words, data } = memory;
        let words = Words { leader, offset: words.offset };
        let (engine, place) = (group.engine.clone(), (leader, data.offset, data.bytes));
        let lease = Lease { memory, group: group.clone() };
        let buffer = engine.buffer(device, dtype, place, lease)?;
        Ok(Window { buffer, number, words, group, sections, gathers: 0, gathered: false })
    }

    /// Number of elements of the whole.
    pub fn len(&self) -> usize {
        self.buffer.len()
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.buffer.is_empty()
    }

    /// The whole, for reading.
    ///
    /// # Panics
    /// When it has not been gathered since the last release.
    pub fn view(&self) -> View<'_> {
        assert!(self.gathered, "a window is gathered before it is read");
        self.buffer.view()
    }

    pub(crate) fn span(&self) -> Span {
        self.buffer.span()
    }

    /// Its number among those of its communicator: the same on every rank.
    pub(crate) fn number(&self) -> u64 {
        self.number
    }

    pub(crate) fn sections(&self) -> Option<Sections> {
        self.sections.clone()
    }

    /// This rank's chunk of a section, for reading: nobody else writes it. A window that was made
    /// without sections has one, number 0.
    pub fn shard(&self, section: usize) -> View<'_> {
        self.buffer.slice(self.own(section))
    }

    fn own(&self, section: usize) -> std::ops::Range<usize> {
        let (world, rank) = (self.group.hosts.world(), self.group.name(self.group.rank));
        chunk(self.sections.as_ref(), self.buffer.len(), section, world, rank)
    }

    /// This rank's chunk of a section, for writing; blocks until every rank has released the last
    /// gather. The next gather starts after an event that follows the writes.
    ///
    /// # Errors
    /// When a rank is lost or does not release before the deadline; [`Error::Misuse`] when this
    /// rank itself has not released, or for a section that there is not.
    pub fn shard_mut(&mut self, section: usize) -> Result<ViewMut<'_>, Error> {
        expect(!self.gathered, || "a window is released before it is written".to_owned())?;
        let count = self.sections.as_ref().map_or(1, Sections::count);
        expect(section < count, || format!("section {section} of a window of {count}: they are counted from 0"))?;
        let (group, gathers) = (&self.group, self.gathers);
        let late = |rank: usize| self.released(rank).load(Ordering::Acquire) < gathers;
        group.wait_for_ranks("writing a window", group.options.timeout, late)?;
        let own = self.own(section);
        Ok(self.buffer.slice_mut(own))
    }

    /// Ends this rank's reading: blocks until `after`, which follows the last read, then tells the others.
    ///
    /// # Errors
    /// When `after` fails. The window then stays gathered, because work that reads it may not have
    /// run.
    pub fn release(&mut self, after: &Event) -> Result<(), Error> {
        if self.gathered {
            after.wait()?;
            self.gathered = false;
            publish(self.released(self.group.rank), self.gathers);
            for rank in (0..self.group.world()).filter(|&rank| rank != self.group.rank) {
                self.group.ring_rank(rank, WINDOW_BELL, subject::WINDOW);
            }
        }
        Ok(())
    }

    /// Starts a gather by the ranks of `shared`; the caller has every rank do the same and waits for all before anyone reads.
    pub(crate) fn begin_gather(&mut self, group: &Arc<Group>) -> Result<(), Error> {
        let own = Arc::ptr_eq(&self.group, group);
        expect(own, || "a window is gathered by the communicator that made it".to_owned())?;
        expect(!self.gathered, || "a window is released before it is gathered again".to_owned())?;
        self.gathers += 1;
        self.gathered = true;
        Ok(())
    }

    fn released(&self, rank: usize) -> &AtomicU64 {
        self.words.of(&self.group.engine.map, rank, RELEASED)
    }
}

/// Where a window lies on a host.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Memory {
    /// Whose arena it is in, as the engine counts ranks: the first member's on this host.
    pub(crate) leader: usize,
    /// Two words for each member.
    pub(crate) words: Range,
    /// The whole window.
    pub(crate) data: Range,
}

impl Memory {
    /// Bytes of the words of `members` members.
    pub(crate) fn of_words(members: usize) -> u64 {
        16 * members as u64
    }

    /// For `bytes` bytes, in the arena of this rank. The words are reserved, the rest is each
    /// member's to reserve.
    ///
    /// # Errors
    /// When there is no memory.
    pub(crate) fn make(engine: &Engine, members: usize, bytes: u64) -> Result<Memory, Error> {
        let words = engine.reserve(Memory::of_words(members))?;
        Ok(Memory { leader: engine.rank, words, data: Range { bytes, ..engine.take(bytes) } })
    }

    /// Gives back what [`Memory::make`] took.
    pub(crate) fn give_back(self, engine: &Engine) {
        self.ranges().into_iter().for_each(|range| engine.give_back(range));
    }

    fn ranges(self) -> [Range; 2] {
        let Range { offset, bytes } = self.data;
        [self.words, Range { offset, bytes: bytes.max(1).next_multiple_of(PAGE) }]
    }
}

/// The members' words of a window.
#[derive(Clone, Copy)]
struct Words {
    leader: usize,
    offset: u64,
}

/// The number of gathers that a member has released.
const RELEASED: u64 = 0;
/// Whether a member has dropped the window, and nothing of it is in flight.
const DROPPED: u64 = 1;

impl Words {
    fn of(self, map: &Mapping, member: usize, word: u64) -> &AtomicU64 {
        let address = map.address(self.leader, self.offset + 16 * member as u64 + 8 * word, 8);
        // SAFETY: inside the mapping; aligned to 8, since ranges start at pages; reserved for these
        // words alone, which are only ever accessed as atomics, until every member has dropped the
        // window.
        unsafe { address.cast::<AtomicU64>().as_ref() }
    }
}

/// A window's memory, which every operation on it keeps.
struct Lease {
    memory: Memory,
    group: Arc<Group>,
}

impl Drop for Lease {
    fn drop(&mut self) {
        let (memory, group) = (self.memory, &self.group);
        if group.healthy().is_err() {
            // Members may still be about to use it.
            return;
        }
        let words = Words { leader: memory.leader, offset: memory.words.offset };
        words.of(&group.engine.map, group.rank, DROPPED).store(1, Ordering::Release);
        if group.rank == 0 {
            let members = group.world();
            let is_dropped = move |map: &Mapping| {
                (0..members).all(|member| words.of(map, member, DROPPED).load(Ordering::Acquire) == 1)
            };
            group.engine.retire(memory.ranges().into(), is_dropped, |_| {});
        }
    }
}

impl std::fmt::Debug for Window {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Window({:?})", self.buffer)
    }
}
