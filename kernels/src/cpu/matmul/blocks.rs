//! The loops around a tile, after Goto and van de Geijn 2008: for each block of the right operand, for each block of the left one, all tiles.
//! Both are packed once for each block of the other that they meet; the right one may have been packed before (`panels.rs`).

use std::cell::RefCell;
use std::marker::PhantomData;
use std::ops::Range;
use std::ptr::null_mut;

use super::panels::{GROUP, Line, Plane, Right, reserve};
use super::tile::{Out, Tile};
use super::{Matrix, Start, vectorized};
use crate::cpu::value::Value;

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

    fn output(&self) -> Plane<O> {
        Plane { data: self.data, stride: self.stride, first: (0, 0) }
    }

    fn add(&self) -> Plane<f32> {
        Plane { data: self.add.cast_mut(), stride: self.stride, first: (0, 0) }
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
    let depth = L::DEPTH.min(inner.next_multiple_of(L::STEPS));
    let height = (L::LEFT / L::ROWS * L::ROWS).min(region.rows.next_multiple_of(L::ROWS));
    let width = (L::RIGHT / L::COLUMNS * L::COLUMNS).min(region.columns.next_multiple_of(L::COLUMNS));
    let chunk = if partial { PARTIAL_ROWS / L::ROWS * L::ROWS } else { region.rows.max(1) };
    SCRATCH.with_borrow_mut(|scratch| {
        let left: *mut L::Panel = reserve(&mut scratch.left, height * depth);
        let packed: *mut L::Panel = match b {
            Right::Matrix(_) => reserve(&mut scratch.right, width * depth),
            Right::Panels { .. } => null_mut(),
        };
        let sums = if partial { reserve(&mut scratch.partial, chunk.min(region.rows) * width) } else { null_mut() };
        let _running = tile.start();
        for rows in pieces(0..region.rows, chunk) {
            for columns in pieces(0..region.columns, width) {
                let sums = Plane { data: sums, stride: columns.len(), first: (rows.start, columns.start) };
                for steps in pieces(0..inner, L::DEPTH) {
                    let pass = Pass {
                        depth: steps.len().next_multiple_of(L::STEPS),
                        // What is there already: what the product is added to, or the sums of earlier steps.
                        add: match steps.start {
                            0 => region.add(),
                            _ if partial => sums,
                            _ => region.output().cast(),
                        },
                        sums: (partial && steps.end < inner).then_some(sums),
                    };
                    let right = match b {
                        Right::Matrix(b) => {
                            // SAFETY: the block holds the panels of these columns, and what packing may write behind them.
                            unsafe { pack_right(tile, b, region.first.1, &columns, &steps, packed) };
                            Plane { data: packed, stride: pass.depth, first: (0, columns.start) }
                        }
                        Right::Panels { panels, row, column } => {
                            panels.from::<L>(row + steps.start, column + region.first.1)
                        }
                    };
                    for rows in pieces(rows.clone(), height) {
                        for row in rows.clone().step_by(L::ROWS) {
                            let count = L::ROWS.min(rows.end - row);
                            let lines = a.lines(region.first.0 + row, count, steps.start, steps.len());
                            // SAFETY: the lines lie in the slice; the block holds this panel and what packing may write behind it.
                            unsafe { tile.pack_left(lines, left.add((row - rows.start) * pass.depth)) };
                        }
                        // SAFETY: both operands' panels have been packed; the sums are this chunk's and these columns'.
                        unsafe { tiles(tile, &region, &pass, (&rows, left), (&columns, right)) };
                    }
                }
            }
        }
    });
}

/// A range in pieces of `most`.
fn pieces(range: Range<usize>, most: usize) -> impl Iterator<Item = Range<usize>> {
    let end = range.end;
    range.step_by(most).map(move |first| first..(first + most).min(end))
}

/// Packs some columns of the right operand, counted from column `first` of it, for some steps.
///
/// # Safety
/// `packed` is writable for all of them, whole panels each, and what packing may write behind.
unsafe fn pack_right<L: Tile, B: Value>(
    tile: L,
    b: Matrix<&[B]>,
    first: usize,
    columns: &Range<usize>,
    steps: &Range<usize>,
    packed: *mut L::Panel,
) {
    let (b, depth) = (b.transposed(), steps.len().next_multiple_of(L::STEPS));
    for column in columns.clone().step_by(L::COLUMNS) {
        let lines = b.lines(first + column, L::COLUMNS.min(columns.end - column), steps.start, steps.len());
        // SAFETY: the lines lie in the slice; the rest is the caller's promise.
        unsafe { tile.pack_right(lines, packed.add((column - columns.start) * depth)) };
    }
}

/// What some steps of the inner dimension add to.
struct Pass {
    /// Steps of a panel.
    depth: usize,
    add: Plane<f32>,
    /// Where sums go that are not complete; none when these steps are the last.
    sums: Option<Plane<f32>>,
}

/// All tiles of some rows and columns. The left panels begin with the first of these rows.
///
/// # Safety
/// Panels of all of them have been packed for the pass; its planes hold the elements of the region at these rows and columns.
unsafe fn tiles<L: Tile, O: Value>(
    tile: L,
    region: &Region<'_, O>,
    pass: &Pass,
    (rows, left): (&Range<usize>, *const L::Panel),
    (columns, right): (&Range<usize>, Plane<L::Panel>),
) {
    let output = region.output();
    for column in columns.clone().step_by(L::COLUMNS) {
        // A panel follows the other: each has as many elements a column as it has steps.
        let right = right.data.wrapping_add((column - right.first.1) * right.stride).cast_const();
        for row in rows.clone().step_by(L::ROWS) {
            let left = left.wrapping_add((row - rows.start) * pass.depth);
            let panels = Packed { depth: pass.depth, left, right };
            let shape = (L::ROWS.min(region.rows - row), L::COLUMNS.min(region.columns - column));
            let add = (pass.add.at(row, column).cast_const(), pass.add.stride);
            // SAFETY: the caller's promise; `shape` is what exists of the tile, and the region is exclusive.
            unsafe {
                match pass.sums {
                    Some(sums) => one(tile, panels, (sums.at(row, column), sums.stride), add, region.alpha, shape),
                    None => one(tile, panels, (output.at(row, column), output.stride), add, region.alpha, shape),
                }
            }
        }
    }
}

/// A panel of each operand.
struct Packed<P> {
    depth: usize,
    left: *const P,
    right: *const P,
}

/// One tile of which the first `shape` (rows, columns) exist: to = add + alpha · left · right, with the strides of both sides; null adds nothing.
///
/// # Safety
/// The panels are packed. Those rows and columns of `to` are writable, those of `add` readable; nobody else touches them.
#[inline(always)]
unsafe fn one<L: Tile, O: Value>(
    tile: L,
    Packed { depth, left, right }: Packed<L::Panel>,
    (to, stride): (*mut O, usize),
    (add, add_stride): (*const f32, usize),
    alpha: f32,
    shape: (usize, usize),
) {
    let whole = shape == (L::ROWS, L::COLUMNS);
    if whole && !O::NARROW {
        let out = Out { data: to.cast(), stride, add, add_stride, alpha };
        // SAFETY: the caller's promise; the elements are f32.
        return unsafe { tile.multiply(depth, left, right, out) };
    }
    let mut stage = std::mem::MaybeUninit::<[Line; LARGEST / 16]>::uninit();
    let stage: *mut f32 = stage.as_mut_ptr().cast();
    const { assert!(L::ROWS * L::COLUMNS <= LARGEST && GROUP.is_multiple_of(L::COLUMNS) && GROUP.is_multiple_of(L::STEPS)) };
    // SAFETY: the stage holds a tile. What is added lies in it where the tile is not whole, with zeros where there is nothing, so `multiply`
    // reads what has been written; it writes all of it.
    unsafe {
        let mut out = Out { data: stage, stride: L::COLUMNS, add, add_stride, alpha };
        if !whole && !add.is_null() {
            stage.write_bytes(0, L::ROWS * L::COLUMNS);
            for row in 0..shape.0 {
                std::ptr::copy_nonoverlapping(add.add(row * add_stride), stage.add(row * L::COLUMNS), shape.1);
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
