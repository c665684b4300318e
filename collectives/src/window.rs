//! Memory that all ranks of a host read in place.

use std::ops::Range;
use std::sync::Arc;

use pillion_kernels::{Buffer, Event, Span, View, ViewMut};

use crate::checks::expect;
use crate::transport::{Transport, Turns};
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
    turns: Box<dyn Turns>,
    /// What it belongs to.
    transport: Arc<dyn Transport>,
    /// This rank.
    rank: usize,
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
    /// The `number`-th window of a communicator's rank `rank`.
    pub(crate) fn new(
        transport: Arc<dyn Transport>,
        rank: usize,
        number: u64,
        (buffer, turns): (Buffer, Box<dyn Turns>),
        sections: Option<Sections>,
    ) -> Window {
        Window { buffer, number, turns, transport, rank, sections, gathers: 0, gathered: false }
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
    /// # Errors
    /// [`Error::Misuse`] when it has not been gathered since the last release.
    pub fn view(&self) -> Result<View<'_>, Error> {
        expect(self.gathered, || "a window is gathered before it is read".to_owned())?;
        Ok(self.buffer.view())
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
    ///
    /// # Errors
    /// [`Error::Misuse`] for a section that there is not.
    pub fn shard(&self, section: usize) -> Result<View<'_>, Error> {
        Ok(self.buffer.slice(self.own(section)?))
    }

    fn own(&self, section: usize) -> Result<Range<usize>, Error> {
        let count = self.sections.as_ref().map_or(1, Sections::count);
        expect(section < count, || format!("section {section} of a window of {count}: they are counted from 0"))?;
        let world = self.transport.hosts().world();
        Ok(chunk(self.sections.as_ref(), self.buffer.len(), section, world, self.rank))
    }

    /// This rank's chunk of a section, for writing; blocks until every rank has released the last
    /// gather. The next gather starts after an event that follows the writes.
    ///
    /// # Errors
    /// When a rank is lost or does not release before the deadline; [`Error::Misuse`] when this
    /// rank itself has not released, or for a section that there is not.
    pub fn shard_mut(&mut self, section: usize) -> Result<ViewMut<'_>, Error> {
        expect(!self.gathered, || "a window is released before it is written".to_owned())?;
        let own = self.own(section)?;
        self.turns.wait(self.gathers)?;
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
            self.turns.release(self.gathers);
        }
        Ok(())
    }

    /// Starts a gather by the ranks of `transport`; the caller has every rank do the same and waits
    /// for all before anyone reads.
    pub(crate) fn begin_gather(&mut self, transport: &Arc<dyn Transport>) -> Result<(), Error> {
        let own = std::ptr::addr_eq(Arc::as_ptr(&self.transport), Arc::as_ptr(transport));
        expect(own, || "a window is gathered by the communicator that made it".to_owned())?;
        expect(!self.gathered, || "a window is released before it is gathered again".to_owned())?;
        self.gathers += 1;
        self.gathered = true;
        Ok(())
    }
}

impl std::fmt::Debug for Window {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Window({:?})", self.buffer)
    }
}
