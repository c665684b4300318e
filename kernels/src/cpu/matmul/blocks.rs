//! The loops around a tile, after Goto and van de Geijn 2008: for each block of the right operand, for each block of the left one, all tiles.
//! Both are packed once for each block of the other that they meet; the right one may have been packed before ([`Panels`]).

use std::cell::RefCell;
use std::marker::PhantomData;
use std::ops::Range;

use super::pack::{self, Lines};
use super::tile::{self, Out, Tile};
use super::{Isa, Matrix, Start, vectorized};
use crate::cpu::value::Value;

/// The right operand of a product.
pub(in crate::cpu) enum Right<'a, T> {
    /// To be packed on the way.
    Matrix(Matrix<&'a [T]>),
    /// Packed before: as many rows and columns as the product needs, from these on.
    Panels {
        /// All of them.
        panels: &'a Panels,
        /// A multiple of [`GROUP`].
        row: usize,
        /// As well.
        column: usize,
    },
}

impl<T> Clone for Right<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Right<'_, T> {}

/// A part of an output that one thread computes.
pub(super) struct Region<'a, O> {
    /// Its first element.
    data: *mut O,
    /// What is added to it, which lies like it; null for nothing.
    add: *const f32,
    stride: usize,
    pub(super) rows: usize,
    pub(super) columns: usize,
    /// Where it lies in the whole.
    first: (usize, usize),
    alpha: f32,
    _borrow: PhantomData<&'a mut [O]>,
}

// SAFETY: a region is an exclusive borrow of its elements, and a shared one of what is added.
unsafe impl<O: Send> Send for Region<'_, O> {}
// SAFETY: through a shared region elements are reached by `part` alone, whose caller sees to it that parts are disjoint.
unsafe impl<O: Send> Sync for Region<'_, O> {}

impl<'a, O: Value> Region<'a, O> {
    /// All of an output.
    pub(super) fn new(out: Matrix<&'a mut [O]>, start: Start<'a>, alpha: f32) -> Region<'a, O> {
        let data = out.data.as_mut_ptr();
        let add = match start {
            Start::Zero => std::ptr::null(),
            Start::Output => data.cast_const().cast(),
            Start::From(from) => from.as_ptr(),
        };
        let (rows, columns, stride) = (out.rows, out.columns, out.row_stride);
        Region { data, add, stride, rows, columns, first: (0, 0), alpha, _borrow: PhantomData }
    }

    /// Some rows and columns.
    ///
    /// # Safety
    /// Parts that are used at the same time are disjoint.
    pub(super) unsafe fn part(&self, rows: Range<usize>, columns: Range<usize>) -> Region<'_, O> {
        assert!(rows.end <= self.rows && columns.end <= self.columns);
        let offset = rows.start * self.stride + columns.start;
        Region {
            data: self.data.wrapping_add(offset),
            add: if self.add.is_null() { self.add } else { self.add.wrapping_add(offset) },
            first: (self.first.0 + rows.start, self.first.1 + columns.start),
            rows: rows.len(),
            columns: columns.len(),
            _borrow: PhantomData,
            ..*self
        }
    }
}

/// Packed blocks start at cache lines.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Line([u8; 64]);

/// This thread's working memory.
struct Scratch {
    left: Vec<Line>,
    right: Vec<Line>,
    /// Sums of a narrow output, where they are not complete.
    partial: Vec<Line>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> =
        const { RefCell::new(Scratch { left: Vec::new(), right: Vec::new(), partial: Vec::new() }) };
}

/// Memory for `elements` and what packing may write behind them.
fn reserve<T>(memory: &mut Vec<Line>, elements: usize) -> *mut T {
    let lines = (elements + pack::SLACK).div_ceil(64 / size_of::<T>());
    if memory.len() < lines {
        memory.resize(lines, Line([0; 64]));
    }
    memory.as_mut_ptr().cast()
}

/// Rows of a narrow output whose incomplete sums exist at a time.
const PARTIAL_ROWS: usize = 1024;

/// Computes a region. `a` and `b` are the whole operands.
pub(super) fn blocks<L: Tile, O: Value, A: Value, B: Value>(
    tile: L,
    region: Region<'_, O>,
    a: Matrix<&[A]>,
    b: Right<'_, B>,
) {
    let inner = a.columns;
    if inner == 0 {
        return without_products(region);
    }
    // Narrow elements are written once, when their sums are complete.
    let partial = O::NARROW && inner > L::DEPTH;
    let (first_row, first_column) = region.first;
    SCRATCH.with_borrow_mut(|scratch| {
        let depth = L::DEPTH.min(inner.next_multiple_of(L::STEPS));
        let height = (L::LEFT / L::ROWS * L::ROWS).min(region.rows.next_multiple_of(L::ROWS));
        let width = (L::RIGHT / L::COLUMNS * L::COLUMNS).min(region.columns.next_multiple_of(L::COLUMNS));
        let chunk = if partial { PARTIAL_ROWS / L::ROWS * L::ROWS } else { region.rows.max(1) };
        let left: *mut L::Panel = reserve(&mut scratch.left, height * depth);
        let block: *mut L::Panel = match b {
            Right::Matrix(_) => reserve(&mut scratch.right, width * depth),
            Right::Panels { .. } => std::ptr::null_mut(),
        };
        let sums: *mut f32 =
            if partial { reserve(&mut scratch.partial, chunk.min(region.rows) * width) } else { std::ptr::null_mut() };
        let _running = tile.start();
        for chunk_row in (0..region.rows).step_by(chunk) {
            let chunk_end = (chunk_row + chunk).min(region.rows);
            for block_column in (0..region.columns).step_by(width) {
                let width = width.min(region.columns - block_column);
                for first_step in (0..inner).step_by(L::DEPTH) {
                    let depth = L::DEPTH.min(inner - first_step);
                    let padded = depth.next_multiple_of(L::STEPS);
                    let last = first_step + depth == inner;
                    if let Right::Matrix(b) = b {
                        let b = b.transposed();
                        for column in (0..width).step_by(L::COLUMNS) {
                            let lines = b.lines(
                                first_column + block_column + column,
                                L::COLUMNS.min(width - column),
                                first_step,
                                depth,
                            );
                            // SAFETY: the lines lie in the slice; the block holds this panel and what packing may write behind it.
                            unsafe { tile.pack_right(lines, block.add(column * padded)) };
                        }
                    }
                    for block_row in (chunk_row..chunk_end).step_by(height) {
                        let height = height.min(chunk_end - block_row);
                        for row in (0..height).step_by(L::ROWS) {
                            let lines =
                                a.lines(first_row + block_row + row, L::ROWS.min(height - row), first_step, depth);
                            // SAFETY: as above.
                            unsafe { tile.pack_left(lines, left.add(row * padded)) };
                        }
                        for column in (0..width).step_by(L::COLUMNS) {
                            // SAFETY: the panel has been packed: just now, or all steps of all columns before.
                            let right = unsafe {
                                match b {
                                    Right::Matrix(_) => block.add(column * padded).cast_const(),
                                    Right::Panels { panels, row, column: first } => panels
                                        .panel::<L>(row + first_step, first + first_column + block_column + column),
                                }
                            };
                            for row in (0..height).step_by(L::ROWS) {
                                let (i, j) = (block_row + row, block_column + column);
                                let shape = (L::ROWS.min(region.rows - i), L::COLUMNS.min(region.columns - j));
                                let at = i * region.stride + j;
                                // SAFETY: the tile's elements exist, in rows that do not overlap, and the region is exclusive; so do
                                // those of what is added, and the sums of this chunk and this block of columns.
                                unsafe {
                                    let to = region.data.add(at);
                                    let sums = if partial { sums.add((i - chunk_row) * width + column) } else { sums };
                                    let add = if first_step == 0 && region.add.is_null() {
                                        Add { from: std::ptr::null(), stride: 0 }
                                    } else if first_step == 0 {
                                        Add { from: region.add.add(at), stride: region.stride }
                                    } else if partial {
                                        Add { from: sums, stride: width }
                                    } else {
                                        Add { from: to.cast_const().cast(), stride: region.stride }
                                    };
                                    let left = left.add(row * padded).cast_const();
                                    let panels = (padded, left, right);
                                    if partial && !last {
                                        one(tile, panels, (sums, width), add, region.alpha, shape);
                                    } else {
                                        one(tile, panels, (to, region.stride), add, region.alpha, shape);
                                    }
                                }
                            }
                        }
                    }
                }
            }
        }
    });
}

/// Sums that a tile is added to, rows `stride` apart; null for none.
struct Add {
    from: *const f32,
    stride: usize,
}

/// One tile of which the first `shape` (rows, columns) exist.
///
/// # Safety
/// The panels are packed. Those rows and columns of `to`, rows `stride` apart, are writable, those of `add` readable; nobody else touches them.
#[inline(always)]
unsafe fn one<L: Tile, O: Value>(
    tile: L,
    (depth, left, right): (usize, *const L::Panel, *const L::Panel),
    (to, stride): (*mut O, usize),
    add: Add,
    alpha: f32,
    shape: (usize, usize),
) {
    let whole = shape == (L::ROWS, L::COLUMNS);
    if whole && !O::NARROW {
        let out = Out { data: to.cast(), stride, add: add.from, add_stride: add.stride, alpha };
        // SAFETY: the caller's promise; the elements are f32.
        return unsafe { tile.multiply(depth, left, right, out) };
    }
    let mut stage = std::mem::MaybeUninit::<[Line; LARGEST / 16]>::uninit();
    let stage: *mut f32 = stage.as_mut_ptr().cast();
    const { assert!(L::ROWS * L::COLUMNS <= LARGEST && GROUP.is_multiple_of(L::COLUMNS) && GROUP.is_multiple_of(L::STEPS)) };
    // SAFETY: the stage holds a tile, of which the elements that exist are written before they are read: sums by the loop,
    // everything by `multiply`.
    unsafe {
        let mut out = Out { data: stage, stride: L::COLUMNS, add: add.from, add_stride: add.stride, alpha };
        if !whole && !add.from.is_null() {
            stage.write_bytes(0, L::ROWS * L::COLUMNS);
            for row in 0..shape.0 {
                std::ptr::copy_nonoverlapping(add.from.add(row * add.stride), stage.add(row * L::COLUMNS), shape.1);
            }
            (out.add, out.add_stride) = (stage, L::COLUMNS);
        }
        tile.multiply(depth, left, right, out);
        vectorized(
            #[inline(always)]
            || {
                for row in 0..shape.0 {
                    let from = std::slice::from_raw_parts(stage.add(row * L::COLUMNS), shape.1);
                    O::round(std::slice::from_raw_parts_mut(to.add(row * stride), shape.1), from);
                }
            },
        );
    }
}

/// Elements of the largest tile.
const LARGEST: usize = 32 * 32;

/// Of an inner dimension without steps: the start.
fn without_products<O: Value>(region: Region<'_, O>) {
    if region.add.cast() == region.data.cast_const() {
        return;
    }
    for row in 0..region.rows {
        // SAFETY: a row of the region, which is exclusive, and of what is added to it.
        unsafe {
            let to = std::slice::from_raw_parts_mut(region.data.add(row * region.stride), region.columns);
            if region.add.is_null() {
                to.fill(O::ZERO);
            } else {
                O::round(to, std::slice::from_raw_parts(region.add.add(row * region.stride), region.columns));
            }
        }
    }
}

/// What any tile's columns and groups of steps divide.
pub(in crate::cpu) const GROUP: usize = 32;

/// A right operand that has been packed whole, for several products.
pub(in crate::cpu) struct Panels {
    memory: Vec<Line>,
    /// What they are packed for.
    isa: Isa,
    narrow: bool,
    rows: usize,
    columns: usize,
    /// Steps of a panel.
    pitch: usize,
}

impl Panels {
    /// No rows and no columns.
    pub(in crate::cpu) const fn new() -> Panels {
        Panels { memory: Vec::new(), isa: Isa::Portable, narrow: false, rows: 0, columns: 0, pitch: 0 }
    }

    /// From a row and a column on, both multiples of [`GROUP`].
    pub(in crate::cpu) fn part<T: Value>(&self, row: usize, column: usize) -> Right<'_, T> {
        Right::Panels { panels: self, row, column }
    }

    /// Packs `b` instead of what was there.
    pub(in crate::cpu) fn pack<T: Value>(&mut self, b: Matrix<&[T]>) {
        self.pack_on(Isa::current(), b);
    }

    pub(super) fn pack_on<T: Value>(&mut self, isa: Isa, b: Matrix<&[T]>) {
        assert!(b.extent() <= b.data.len(), "a matrix reaches beyond its slice");
        (self.isa, self.narrow, self.rows, self.columns) = (isa, T::NARROW, b.rows, b.columns);
        tile::with_tile!(isa, T::NARROW, tile => self.pack_with(tile, b));
    }

    fn pack_with<L: Tile, T: Value>(&mut self, tile: L, b: Matrix<&[T]>) {
        self.pitch = b.rows.next_multiple_of(L::STEPS);
        let memory: *mut L::Panel = reserve(&mut self.memory, b.columns.next_multiple_of(L::COLUMNS) * self.pitch);
        if b.rows == 0 {
            return;
        }
        for column in (0..b.columns).step_by(L::COLUMNS) {
            let lines: Lines<T> = b.transposed().lines(column, L::COLUMNS.min(b.columns - column), 0, b.rows);
            // SAFETY: the lines lie in the slice, and the memory holds all panels and what packing may write behind them.
            unsafe { tile.pack_right(lines, memory.add(column * self.pitch)) };
        }
    }

    /// That they hold what a product takes.
    pub(super) fn check<A: Value, B: Value>(&self, isa: Isa, rows: Range<usize>, columns: Range<usize>) {
        // Tiles of AMX multiply narrow elements with narrow ones, so their panels suit no wide left operand.
        let suits = self.isa == isa && self.narrow == B::NARROW && (isa != Isa::Amx || A::NARROW == B::NARROW);
        assert!(suits, "panels of another set of instructions or type");
        // Panels may hold their steps in groups: a part of one would bring in what is not asked for.
        let groups = [rows.start, columns.start].iter().all(|start| start.is_multiple_of(GROUP))
            && (rows.end == self.rows || rows.end.is_multiple_of(GROUP));
        assert!(
            rows.end <= self.rows && columns.end <= self.columns && groups,
            "a product with rows {rows:?}, columns {columns:?} of panels of [{}, {}]",
            self.rows,
            self.columns
        );
    }

    /// A panel from a step on.
    ///
    /// # Safety
    /// They exist, and were packed for this tile.
    unsafe fn panel<L: Tile>(&self, step: usize, column: usize) -> *const L::Panel {
        // SAFETY: the caller's promise.
        unsafe { self.memory.as_ptr().cast::<L::Panel>().add(column * self.pitch + step * L::COLUMNS) }
    }
}
