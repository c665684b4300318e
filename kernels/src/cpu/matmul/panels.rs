//! Packed operands: the memory they lie in, and a right operand that is packed once for several products.

use std::ops::Range;

use super::pack::{self, Lines};
use super::tile::{self, Tile};
use super::{Isa, Matrix};
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

/// Packed blocks start at cache lines.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Line([u8; 64]);

/// Memory for `elements` and what packing may write behind them.
pub(super) fn reserve<T>(memory: &mut Vec<Line>, elements: usize) -> *mut T {
    let lines = (elements + pack::SLACK).div_ceil(64 / size_of::<T>());
    if memory.len() < lines {
        memory.resize(lines, Line([0; 64]));
    }
    memory.as_mut_ptr().cast()
}

/// Memory seen as a matrix, whose element `first` lies at its start; null for none.
pub(super) struct Plane<T> {
    pub(super) data: *mut T,
    pub(super) stride: usize,
    pub(super) first: (usize, usize),
}

impl<T> Clone for Plane<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Plane<T> {}

impl<T> Plane<T> {
    /// Where an element lies, which need not exist; null stays null.
    pub(super) fn at(&self, row: usize, column: usize) -> *mut T {
        match self.data.is_null() {
            true => self.data,
            false => self.data.wrapping_add((row - self.first.0) * self.stride + (column - self.first.1)),
        }
    }

    pub(super) fn cast<U>(self) -> Plane<U> {
        Plane { data: self.data.cast(), stride: self.stride, first: self.first }
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

    /// The panels of a product that takes them from a row and a column on, for the product's columns counted from 0.
    pub(super) fn from<L: Tile>(&self, row: usize, column: usize) -> Plane<L::Panel> {
        let data = self.memory.as_ptr().cast::<L::Panel>().cast_mut();
        Plane { data: data.wrapping_add(column * self.pitch + row * L::COLUMNS), stride: self.pitch, first: (0, 0) }
    }
}
