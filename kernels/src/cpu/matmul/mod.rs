//! Matrix products: cut among threads here, into blocks that fit the caches ([`blocks`]), packed into panels ([`pack`]), multiplied
//! tile by tile ([`tile`], [`amx`]).
//!
//! A sum runs along the inner dimension in order, block by block; so it is the same wherever its
//! element lies in the output, whatever part of the output a call or a thread computes.

#[cfg(target_arch = "x86_64")]
mod amx;
mod blocks;
#[cfg(all(test, target_arch = "x86_64"))]
mod emulator;
mod pack;
mod panels;
pub(super) mod peak;
#[cfg(test)]
mod tests;
mod tile;

use super::isa::{Isa, vectorized};
use super::team::Team;
use super::value::Value;
use blocks::{Region, blocks};
use pack::Lines;
pub(super) use panels::{Panels, Right};
use tile::Tile;

/// A matrix inside a slice: element (i, j) at `i·row_stride + j·column_stride`.
#[derive(Clone, Copy)]
pub(super) struct Matrix<S> {
    pub(super) data: S,
    pub(super) rows: usize,
    pub(super) columns: usize,
    pub(super) row_stride: usize,
    pub(super) column_stride: usize,
}

impl<S> Matrix<S> {
    /// Row-major without gaps.
    pub(super) fn dense(data: S, rows: usize, columns: usize) -> Self {
        Matrix { data, rows, columns, row_stride: columns, column_stride: 1 }
    }

    /// Row-major, rows `row_stride` apart.
    pub(super) fn strided(data: S, rows: usize, columns: usize, row_stride: usize) -> Self {
        Matrix { data, rows, columns, row_stride, column_stride: 1 }
    }

    /// Rows and columns exchanged.
    pub(super) fn transposed(self) -> Self {
        Matrix {
            data: self.data,
            rows: self.columns,
            columns: self.rows,
            row_stride: self.column_stride,
            column_stride: self.row_stride,
        }
    }

    /// One more than the largest index.
    fn extent(&self) -> usize {
        if self.rows == 0 || self.columns == 0 {
            return 0;
        }
        (self.rows - 1) * self.row_stride + (self.columns - 1) * self.column_stride + 1
    }
}

impl<T> Matrix<&[T]> {
    /// Some rows, from a column on. They must exist.
    fn lines(&self, row: usize, count: usize, column: usize, depth: usize) -> Lines<T> {
        let first = row * self.row_stride + column * self.column_stride;
        let data = self.data[first..].as_ptr();
        Lines { data, count, stride: self.row_stride, step: self.column_stride, depth }
    }
}

/// What a product is added to.
#[derive(Clone, Copy)]
pub(super) enum Start<'a> {
    /// Nothing: the output is overwritten.
    Zero,
    /// The output.
    Output,
    /// A matrix that lies like the output.
    From(&'a [f32]),
}

/// out = start + alpha · a·b, in f32 and rounded once if the output is narrower. Rows of `out` are contiguous.
///
/// # Panics
/// When shapes disagree, a matrix reaches beyond its slice, or a narrow output is to be added to.
pub(super) fn product<O: Value, A: Value, B: Value>(
    team: &Team,
    out: Matrix<&mut [O]>,
    start: Start<'_>,
    a: Matrix<&[A]>,
    b: Right<'_, B>,
    alpha: f32,
) {
    product_on(Isa::current(), team, out, start, a, b, alpha);
}

fn product_on<O: Value, A: Value, B: Value>(
    isa: Isa,
    team: &Team,
    out: Matrix<&mut [O]>,
    start: Start<'_>,
    a: Matrix<&[A]>,
    b: Right<'_, B>,
    alpha: f32,
) {
    match &b {
        Right::Matrix(b) => {
            assert!(b.extent() <= b.data.len(), "a matrix reaches beyond its slice");
            assert!(
                out.columns == b.columns && a.columns == b.rows,
                "a product [{}, {}] · [{}, {}] into [{}, {}]",
                a.rows,
                a.columns,
                b.rows,
                b.columns,
                out.rows,
                out.columns
            );
        }
        &Right::Panels { panels, row, column } => {
            panels.check::<A, B>(isa, row..row + a.columns, column..column + out.columns);
        }
    }
    assert_eq!(out.rows, a.rows, "rows of a product and of its left operand");
    let from = if let Start::From(from) = start { from.len() } else { usize::MAX };
    assert!(
        a.extent() <= a.data.len() && out.extent() <= out.data.len().min(from),
        "a matrix reaches beyond its slice"
    );
    assert!(
        out.column_stride == 1 && out.row_stride >= out.columns,
        "an output's rows are contiguous and do not overlap"
    );
    assert!(!O::NARROW || matches!(start, Start::Zero), "sums are not kept in narrow elements");
    let region = Region::new(out, start, alpha);
    tile::with_tile!(isa, A::NARROW && B::NARROW, tile => cut(team, tile, region, a, b));
}

/// Gives each thread a part of the output, of whole tiles. What a part's rows and columns need of the operands is packed by each
/// thread for itself, so the grid is the one with the shortest borders.
fn cut<L: Tile, O: Value, A: Value, B: Value>(
    team: &Team,
    tile: L,
    region: Region<'_, O>,
    a: Matrix<&[A]>,
    b: Right<'_, B>,
) {
    let (rows, columns) = (region.rows, region.columns);
    if rows == 0 || columns == 0 {
        return;
    }
    let (tall, wide) = (rows.div_ceil(L::ROWS), columns.div_ceil(L::COLUMNS));
    // Below a million multiplications a hand-over takes longer than it saves.
    let threads = if rows * columns * a.columns < 1 << 20 { 1 } else { team.threads() };
    // As many threads as have a tile each, in rows and columns of parts.
    let grids = (1..=threads.min(tall)).map(|down| (down, (threads / down).min(wide)));
    let border = |&(down, across): &(usize, usize)| {
        let unused = threads - down * across;
        (unused, tall.div_ceil(down) * L::ROWS + wide.div_ceil(across) * L::COLUMNS)
    };
    let (down, across) = grids.min_by_key(border).unwrap_or((1, 1));
    let part = |index: usize, parts: usize, tiles: usize, size: usize, most: usize| {
        (index * tiles / parts * size).min(most)..((index + 1) * tiles / parts * size).min(most)
    };
    team.run(down * across, |index| {
        let (row, column) = (index / across, index % across);
        // SAFETY: parts of the grid are disjoint.
        let part = unsafe {
            region.part(part(row, down, tall, L::ROWS, rows), part(column, across, wide, L::COLUMNS, columns))
        };
        blocks(tile, part, a, b);
    });
}
