//! Memory that all ranks of a host read in place.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use pillion_kernels::{Buffer, Event, Span, View, ViewMut};

use crate::checks::expect;
use crate::shm::control::{WINDOW_BELL, subject};
use crate::shm::protocol::publish;
use crate::shm::shared::Shared;
use crate::{Error, Sections};

/// A full-length buffer that every rank of the host can read and whose own shard each rank writes.
///
/// It is in one of two states, the same on every rank up to the order of calls:
/// *writable* (at first), where this rank may write its own shard, and, after [`crate::Communicator::gather_window`], *gathered*, where it may
/// read the whole. [`Window::release`] ends its reading; [`Window::shard_mut`] waits until every rank has released, so no rank
/// ever writes what another reads.
pub struct Window {
    buffer: Buffer,
    /// Byte offset, in the windows' heap, of one word for each rank: the number of gathers it has released.
    words: u64,
    shared: Arc<Shared>,
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
) -> Range<usize> {
    match sections {
        Some(sections) => sections.in_full(section, world, rank),
        None => {
            assert!(section == 0, "section {section} of a window that has one");
            rank * (len / world)..(rank + 1) * (len / world)
        }
    }
}

impl Window {
    pub(crate) fn new(buffer: Buffer, words: u64, shared: Arc<Shared>, sections: Option<Sections>) -> Window {
        Window { buffer, words, shared, sections, gathers: 0, gathered: false }
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

    /// Where it lies in the windows' heap: the same on every rank.
    pub(crate) fn place(&self) -> u64 {
        self.words
    }

    pub(crate) fn sections(&self) -> Option<Sections> {
        self.sections.clone()
    }

    /// This rank's chunk of a section, for reading: nobody else writes it. A window that was made
    /// without sections has one, number 0.
    pub fn shard(&self, section: usize) -> View<'_> {
        self.buffer.slice(self.own(section))
    }

    fn own(&self, section: usize) -> Range<usize> {
        let (world, rank) = (self.shared.hosts.world(), self.shared.name(self.shared.rank));
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
        let (shared, gathers) = (&self.shared, self.gathers);
        let late = |rank: usize| self.released(rank).load(Ordering::Acquire) < gathers;
        shared.wait_for_ranks("writing a window", shared.options.timeout, late)?;
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
            publish(self.released(self.shared.rank), self.gathers);
            for rank in (0..self.shared.world()).filter(|&rank| rank != self.shared.rank) {
                self.shared.ring_rank(rank, WINDOW_BELL, subject::WINDOW);
            }
        }
        Ok(())
    }

    /// Starts a gather by the ranks of `shared`; the caller has every rank do the same and waits for all before anyone reads.
    pub(crate) fn begin_gather(&mut self, shared: &Arc<Shared>) -> Result<(), Error> {
        let own = Arc::ptr_eq(&self.shared, shared);
        expect(own, || "a window is gathered by the communicator that made it".to_owned())?;
        expect(!self.gathered, || "a window is released before it is gathered again".to_owned())?;
        self.gathers += 1;
        self.gathered = true;
        Ok(())
    }

    fn released(&self, rank: usize) -> &AtomicU64 {
        let map = &self.shared.map;
        let address = map.address(map.shape().world, self.words + 8 * rank as u64, 8);
        // SAFETY: inside the mapping, which `self.shared` holds; aligned to 8, since allocations start at pages; reserved for these words
        // alone, which are only ever accessed as atomics.
        unsafe { address.cast::<AtomicU64>().as_ref() }
    }
}

impl std::fmt::Debug for Window {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Window({:?})", self.buffer)
    }
}
