//! Where the operands of an operation lie, for this rank and for its peers.
//!
//! An operand is a row of chunks of equal length (the last may be short), or a row of [`Sections`],
//! each a row of chunks. An element of a chunk has the same number on either side of an operation.
//! Peers find an operand in the header itself, in the rank's arena, or, where it is private memory,
//! in the rank's stage, which holds one piece (the same range of elements of every chunk) while the
//! next is being copied in. Where the system lets ranks read each other's private memory, they find
//! it where it lies, unless it is short.

use std::ops::Range;

use pillion_kernels::Span;
use pillion_kernels::cpu::non_temporal;

use super::lists::{Lists, Table};
use crate::call::describe;
use crate::engine::flight::Peers;
use crate::memory::place::Place;
use crate::{Error, Sections};

/// Bytes of one staged piece of one operand; a stage holds two of each operand. Small enough for a core's second-level cache.
pub(super) const PIECE: usize = 256 << 10;
/// Bytes of a channel's stage.
pub(super) const STAGE: u64 = 4 * PIECE as u64;
/// Bytes of a chunk from which on ranks read private memory where it lies: a shorter one is copied
/// to a stage in less time than the system takes to find its pages.
pub(super) const FAR: usize = 16 << 10;
/// The same for a chunk of a result that every rank then reads from there, too.
pub(super) const FAR_RESULT: usize = 256 << 10;

/// Where elements are found.
#[derive(Clone, Copy, Debug)]
pub(super) enum Source {
    /// In memory that this rank sees.
    Here(*const u8),
    /// At an address of the process of a rank of this host.
    Private { rank: usize, address: u64 },
}

impl Source {
    /// Copies the elements, `bytes` long, to where this rank alone uses them.
    ///
    /// # Safety
    /// The elements stay as they are meanwhile; `to` is writable for `bytes`, and does not overlap
    /// them.
    pub(super) unsafe fn copy(self, peers: &Peers<'_>, to: *mut u8, bytes: usize, streams: bool) -> Result<(), Error> {
        match self {
            // SAFETY: the caller's promise.
            Source::Here(from) => unsafe { non_temporal::copy(from, to, bytes, streams) },
            Source::Private { rank, address } => {
                let op = || describe(peers.call);
                // SAFETY: the caller's promise.
                unsafe { peers.group.read_private(rank, address, to, bytes, &op)? };
            }
        }
        Ok(())
    }

    /// Where they are, if this rank sees them.
    pub(super) fn here(self) -> Option<*const u8> {
        match self {
            Source::Here(from) => Some(from),
            Source::Private { .. } => None,
        }
    }

    /// Elements behind these, so many bytes on.
    pub(super) fn after(self, bytes: usize) -> Source {
        match self {
            Source::Here(from) => Source::Here(from.wrapping_add(bytes)),
            Source::Private { rank, address } => Source::Private { rank, address: address + bytes as u64 },
        }
    }
}

/// Which operand.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum End {
    #[default]
    Input,
    Output,
}

/// One operand of this rank, or its shape where this rank has none.
#[derive(Clone)]
pub(super) struct Side {
    pub(super) span: Option<Span>,
    /// Number of chunks.
    pub(super) chunks: usize,
    /// The number of the first of them that it has.
    pub(super) first: usize,
    /// Bytes of an element.
    pub(super) width: usize,
    /// Whether peers use it.
    pub(super) shared: bool,
}

/// Elements `elements` of every chunk, the `index`-th such piece.
#[derive(Clone, Debug)]
pub(super) struct Piece {
    pub(super) index: usize,
    pub(super) elements: Range<usize>,
}

/// The operands of an operation, and how they are cut.
pub(super) struct Sides {
    pub(super) input: Side,
    pub(super) output: Side,
    /// Elements from one chunk to the next.
    pub(super) chunk: usize,
    /// Elements of all chunks: the last ones may be short.
    pub(super) len: usize,
    /// Elements of a chunk in one piece.
    pub(super) piece: usize,
    /// Where a full operand has several sections.
    pub(super) sections: Option<Sections>,
    /// Words of the payload in front of an operand that travels in the header: the sideband.
    pub(super) head: usize,
    /// Where chunks have lengths and places of their own.
    pub(super) lists: Option<Box<Lists>>,
}

impl Sides {
    pub(super) fn side(&self, end: End) -> &Side {
        match end {
            End::Input => &self.input,
            End::Output => &self.output,
        }
    }

    /// The elements of a chunk that belong to a piece and exist.
    pub(super) fn range(&self, end: End, chunk: usize, piece: &Piece) -> Range<usize> {
        let exist = match &self.lists {
            None => self.len.saturating_sub(chunk * self.chunk).min(self.chunk),
            Some(lists) => lists.of(end)[chunk].len(),
        };
        piece.elements.start.min(exist)..piece.elements.end.min(exist)
    }

    /// Elements of a chunk in parts that lie in one place in any operand.
    pub(super) fn parts(&self, elements: Range<usize>) -> impl Iterator<Item = Range<usize>> {
        let whole = if self.sections.is_none() { Some(elements.clone()) } else { None };
        let cut = self.sections.iter().flat_map(move |sections| sections.cut(elements.clone()));
        whole.into_iter().filter(|part| !part.is_empty()).chain(cut)
    }

    /// The section of an element of a chunk.
    pub(super) fn section(&self, element: usize) -> usize {
        self.sections.as_ref().map_or(0, |sections| sections.of(element))
    }

    /// Where an element of a chunk lies in an operand.
    fn index(&self, side: &Side, chunk: usize, element: usize) -> usize {
        match &self.sections {
            None => (chunk - side.first) * self.chunk + element,
            Some(sections) => {
                let Range { start, end } = sections.in_shard(sections.of(element));
                side.chunks * start + chunk * (end - start) + element - start
            }
        }
    }

    /// Number of pieces that every rank makes of this operation.
    pub(super) fn pieces(&self) -> usize {
        self.chunk.div_ceil(self.piece.max(1)).max(1)
    }

    pub(super) fn piece(&self, index: usize) -> Piece {
        let first = (index * self.piece).min(self.chunk);
        Piece { index, elements: first..(first + self.piece).min(self.chunk) }
    }

    /// Decides the length of a piece, once all ranks of this host have published their places: all of it, unless somebody stages.
    pub(super) fn cut(&mut self, staged: bool) {
        if !staged {
            self.piece = self.chunk;
            return;
        }
        let row = (self.input.chunks * self.input.width).max(self.output.chunks * self.output.width).max(1);
        // A multiple of 64 elements keeps pieces aligned to cache lines.
        let elements = PIECE / row / 64 * 64;
        self.piece = if elements == 0 { (PIECE / row).max(1) } else { elements };
    }

    /// This rank's own elements of a chunk, from `at` on, within a section.
    ///
    /// # Panics
    /// When there are fewer than `count`, which would be a mistake of the algorithm.
    pub(super) fn own(&self, end: End, chunk: usize, at: usize, count: usize) -> *mut u8 {
        if let Some(lists) = &self.lists {
            let span = &lists.of(end)[chunk];
            assert!(at + count <= span.len(), "elements {at}..+{count} of a chunk of {}", span.len());
            // SAFETY: inside the span, by the assertion.
            return unsafe { span.address().as_ptr().add(at * self.side(end).width) };
        }
        let span = self.side(end).span.as_ref().expect("an operand that this rank has");
        let first = if count == 0 { 0 } else { self.index(self.side(end), chunk, at) };
        assert!(first + count <= span.len(), "elements {first}..+{count} of an operand of {}", span.len());
        // SAFETY: inside the span, by the assertion.
        unsafe { span.address().as_ptr().add(first * self.side(end).width) }
    }

    /// Elements of a chunk, within a section, of a rank of this host, where others find them.
    /// Where they are staged, they must belong to `piece`.
    pub(super) fn published(
        &self,
        peers: &Peers<'_>,
        rank: usize,
        end: End,
        chunk: usize,
        elements: Range<usize>,
        piece: &Piece,
    ) -> Result<*mut u8, Error> {
        let (side, header) = (self.side(end), peers.header(rank));
        let (place, stage) = match end {
            End::Input => (header.input(), 0),
            End::Output => (header.output(), 2 * PIECE as u64),
        };
        let index =
            if elements.is_empty() || self.lists.is_some() { 0 } else { self.index(side, chunk, elements.start) };
        let whole = index * side.width;
        let offset = match place {
            Place::Arena(_) if self.lists.is_some() => {
                let [offset, _] = Table::of(peers, rank)?.chunk(end, chunk);
                offset + (elements.start * side.width) as u64
            }
            Place::Arena(offset) => offset + whole as u64,
            Place::Stage(offset) => {
                let in_piece = chunk * self.piece + elements.start - piece.elements.start;
                offset + stage + (piece.index % 2 * PIECE + in_piece * side.width) as u64
            }
            Place::Header => {
                // SAFETY: operands in headers fit there, on every rank (`Operation::fits_header`).
                return Ok(unsafe { peers.payload_address(rank, self.head).add(whole) });
            }
            Place::None | Place::Private(_) => {
                let reason = format!("rank {} published no operand", peers.group.name(rank));
                return Err(Error::System { what: "reading a peer's arena", reason });
            }
        };
        peers.address(rank, offset, (elements.len() * side.width) as u64, side.width).map(|address| address.as_ptr())
    }

    /// Elements of a chunk, within a section, of a rank of this host, for reading. Where they are
    /// staged, they must belong to `piece`.
    pub(super) fn source(
        &self,
        peers: &Peers<'_>,
        rank: usize,
        end: End,
        chunk: usize,
        elements: Range<usize>,
        piece: &Piece,
    ) -> Result<Source, Error> {
        let header = peers.header(rank);
        let place = match end {
            End::Input => header.input(),
            End::Output => header.output(),
        };
        let start = match place {
            Place::Private(start) if rank != peers.rank() => start,
            // What others have stored for this rank may still be in its stage.
            Place::Stage(_) if end == End::Output => {
                return Ok(Source::Here(self.published(peers, rank, end, chunk, elements, piece)?));
            }
            _ => return Ok(Source::Here(self.of_rank(peers, rank, end, chunk, elements, piece)?)),
        };
        let (start, index) = match &self.lists {
            Some(_) => (Table::of(peers, rank)?.chunk(end, chunk)[0], elements.start),
            None if elements.is_empty() => (start, 0),
            None => (start, self.index(self.side(end), chunk, elements.start)),
        };
        Ok(Source::Private { rank, address: start.wrapping_add((index * self.side(end).width) as u64) })
    }

    /// As [`Sides::published`], but this rank's own memory for this rank.
    pub(super) fn of_rank(
        &self,
        peers: &Peers<'_>,
        rank: usize,
        end: End,
        chunk: usize,
        elements: Range<usize>,
        piece: &Piece,
    ) -> Result<*mut u8, Error> {
        if rank == peers.rank() {
            return Ok(self.own(end, chunk, elements.start, elements.len()));
        }
        self.published(peers, rank, end, chunk, elements, piece)
    }
}
