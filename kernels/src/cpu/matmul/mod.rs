//! Matrix products: blocks that fit the caches ([`product`]), packed into panels ([`pack`]), multiplied tile by tile ([`tile`]).
//!
//! A sum runs along the inner dimension in order, block by block; so it is the same wherever its element lies in the output, whatever part of
//! the output a call computes.

mod pack;
mod tile;

use std::cell::RefCell;

use super::isa::Isa;
use pack::Lines;
pub(super) use pack::Source;
#[cfg(target_arch = "x86_64")]
use tile::{Avx2, Avx512};
use tile::{Out, Portable, Tile};

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

/// out = alpha · a·b, or out += that. Rows of `out` are contiguous.
///
/// # Panics
/// When shapes disagree or a matrix reaches beyond its slice.
pub(super) fn product<A: Source, B: Source>(
    out: Matrix<&mut [f32]>,
    a: Matrix<&[A]>,
    b: Matrix<&[B]>,
    alpha: f32,
    accumulate: bool,
) {
    product_on(Isa::current(), out, a, b, alpha, accumulate);
}

fn product_on<A: Source, B: Source>(
    isa: Isa,
    out: Matrix<&mut [f32]>,
    a: Matrix<&[A]>,
    b: Matrix<&[B]>,
    alpha: f32,
    accumulate: bool,
) {
    assert!(
        out.rows == a.rows && out.columns == b.columns && a.columns == b.rows,
        "a product [{}, {}] · [{}, {}] into [{}, {}]",
        a.rows,
        a.columns,
        b.rows,
        b.columns,
        out.rows,
        out.columns
    );
    assert!(
        out.extent() <= out.data.len() && a.extent() <= a.data.len() && b.extent() <= b.data.len(),
        "a matrix reaches beyond its slice"
    );
    assert!(
        out.column_stride == 1 && out.row_stride >= out.columns,
        "an output's rows are contiguous and do not overlap"
    );
    match isa {
        Isa::Portable => blocks(Portable, out, a, b, alpha, accumulate),
        // SAFETY: the processor has these instructions.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => blocks(unsafe { Avx2::new() }, out, a, b, alpha, accumulate),
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => blocks(unsafe { Avx512::new() }, out, a, b, alpha, accumulate),
        #[cfg(not(target_arch = "x86_64"))]
        Isa::Avx2 | Isa::Avx512 => unreachable!("a processor of another architecture"),
    }
}

/// Steps of the inner dimension in a block: a tile's panels stay in the first-level cache.
const DEPTH: usize = 256;
/// Elements of the left operand's packed block, which stays in the second-level cache.
const LEFT: usize = 144 * DEPTH;
/// Columns of the right operand's, which stays in the third-level one.
const RIGHT: usize = 2048;

/// Packed blocks start at cache lines.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([f32; 16]);

thread_local! {
    /// This thread's packed blocks of the left and the right operand.
    static PACKED: RefCell<[Vec<Line>; 2]> = const { RefCell::new([Vec::new(), Vec::new()]) };
}

/// Goto and van de Geijn 2008: for each block of the right operand, for each block of the left one, all tiles. Both are packed once for
/// each block of the other that they meet.
fn blocks<T: Tile, A: Source, B: Source>(
    tile: T,
    out: Matrix<&mut [f32]>,
    a: Matrix<&[A]>,
    b: Matrix<&[B]>,
    alpha: f32,
    accumulate: bool,
) {
    let (rows, columns, inner) = (out.rows, out.columns, a.columns);
    if inner == 0 && !accumulate {
        out.data.chunks_mut(out.row_stride.max(1)).take(rows).for_each(|row| row[..columns].fill(0.0));
    }
    let height = LEFT / DEPTH / T::ROWS * T::ROWS;
    let width = RIGHT / T::COLUMNS * T::COLUMNS;
    let start = out.data.as_mut_ptr();
    PACKED.with_borrow_mut(|[left, right]| {
        let left = reserve(left, height.min(rows.next_multiple_of(T::ROWS)) * DEPTH.min(inner));
        let right = reserve(right, width.min(columns.next_multiple_of(T::COLUMNS)) * DEPTH.min(inner));
        for first_column in (0..columns).step_by(width) {
            let width = width.min(columns - first_column);
            for first_step in (0..inner).step_by(DEPTH) {
                let depth = DEPTH.min(inner - first_step);
                let accumulate = accumulate || first_step > 0;
                for column in (0..width).step_by(T::COLUMNS) {
                    let lines =
                        b.transposed().lines(first_column + column, T::COLUMNS.min(width - column), first_step, depth);
                    // SAFETY: the lines lie in the slice; the block holds this panel and what packing may write behind it.
                    unsafe { tile.pack_right(lines, right.add(column * depth)) };
                }
                for first_row in (0..rows).step_by(height) {
                    let height = height.min(rows - first_row);
                    for row in (0..height).step_by(T::ROWS) {
                        let lines = a.lines(first_row + row, T::ROWS.min(height - row), first_step, depth);
                        // SAFETY: as above.
                        unsafe { tile.pack_left(lines, left.add(row * depth)) };
                    }
                    for column in (0..width).step_by(T::COLUMNS) {
                        for row in (0..height).step_by(T::ROWS) {
                            let (i, j) = (first_row + row, first_column + column);
                            let shape = (T::ROWS.min(rows - i), T::COLUMNS.min(columns - j));
                            // SAFETY: the panels have been packed; the tile's elements exist, in rows that do not overlap, and `out` is
                            // exclusive.
                            unsafe {
                                let data = start.add(i * out.row_stride + j);
                                let out = Out { data, stride: out.row_stride, alpha, accumulate };
                                let (left, right) = (left.add(row * depth), right.add(column * depth));
                                if shape == (T::ROWS, T::COLUMNS) {
                                    tile.multiply(depth, left, right, out);
                                } else {
                                    edge(tile, depth, left, right, out, shape);
                                }
                            }
                        }
                    }
                }
            }
        }
    });
}

/// A tile of which only the first `shape` (rows, columns) exist.
///
/// # Safety
/// As for [`Tile::multiply`], with those rows and columns only.
unsafe fn edge<T: Tile>(tile: T, depth: usize, left: *const f32, right: *const f32, out: Out, shape: (usize, usize)) {
    const LARGEST: usize = 12 * 32;
    assert!(T::ROWS * T::COLUMNS <= LARGEST);
    let mut whole = [0.0f32; LARGEST];
    let into = Out { data: whole.as_mut_ptr(), stride: T::COLUMNS, accumulate: false, ..out };
    // SAFETY: the panels are whole, and the array holds a tile.
    unsafe { tile.multiply(depth, left, right, into) };
    for (row, values) in whole.chunks_exact(T::COLUMNS).take(shape.0).enumerate() {
        // SAFETY: elements of the output.
        let to = unsafe { std::slice::from_raw_parts_mut(out.data.add(row * out.stride), shape.1) };
        for (to, &value) in to.iter_mut().zip(values) {
            *to = if out.accumulate { *to + value } else { value };
        }
    }
}

/// Memory for `elements` and what packing may write behind them.
fn reserve(block: &mut Vec<Line>, elements: usize) -> *mut f32 {
    let lines = (elements + pack::SLACK).div_ceil(16);
    if block.len() < lines {
        block.resize(lines, Line([0.0; 16]));
    }
    block.as_mut_ptr().cast()
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::bf16;
    use proptest::prelude::*;

    /// Awkward lengths, and whatever is around the sizes of tiles and blocks.
    fn length() -> impl Strategy<Value = usize> {
        prop_oneof![1usize..40, Just(105), Just(143), Just(145), Just(255), Just(257), Just(513)]
    }

    fn random(len: usize, stream: u64) -> Vec<f32> {
        (0..len as u64).map(|index| crate::random::normal(1, stream, index) as f32).collect()
    }

    fn matrix<T>(data: &[T], rows: usize, columns: usize, gap: usize, transposed: bool) -> Matrix<&[T]> {
        match transposed {
            true => Matrix::strided(data, columns, rows, rows + gap).transposed(),
            false => Matrix::strided(data, rows, columns, columns + gap),
        }
    }

    /// Compares with f64 on every set of instructions here.
    fn check<A: Source, B: Source>(
        a: Matrix<&[A]>,
        b: Matrix<&[B]>,
        gap: usize,
        accumulate: bool,
    ) -> Result<(), TestCaseError> {
        let (rows, inner, columns) = (a.rows, a.columns, b.columns);
        let before = random(rows * (columns + gap), 3);
        let of_a = |i: usize, k: usize| f64::from(a.data[i * a.row_stride + k * a.column_stride].widen());
        let of_b = |k: usize, j: usize| f64::from(b.data[k * b.row_stride + j * b.column_stride].widen());
        let sets = [Isa::Portable, Isa::Avx2, Isa::Avx512];
        for isa in sets.into_iter().filter(|&isa| isa <= Isa::widest()) {
            let mut out = before.clone();
            product_on(isa, Matrix::strided(&mut out[..], rows, columns, columns + gap), a, b, 0.5, accumulate);
            for (index, (&got, &was)) in out.iter().zip(&before).enumerate() {
                let (row, column) = (index / (columns + gap), index % (columns + gap));
                if column >= columns {
                    prop_assert_eq!(got, was, "a gap between rows was written");
                    continue;
                }
                let terms = (0..inner).map(|k| 0.5 * of_a(row, k) * of_b(k, column));
                let (sum, magnitude) =
                    terms.fold((0.0, 0.0), |(sum, magnitude), term| (sum + term, magnitude + term.abs()));
                let (sum, magnitude) = if accumulate {
                    (sum + f64::from(was), magnitude + f64::from(was).abs())
                } else {
                    (sum, magnitude)
                };
                // A sum of n products in any order is off by at most (n + 1)·u·Σ|terms| (Higham 2002, section 3.1), u = 2⁻²⁴; one more
                // for alpha, and for each block of steps the one more that adds its sum.
                let bound = (inner as f64 + 3.0 + (inner / DEPTH) as f64) * 2f64.powi(-24) * magnitude;
                prop_assert!(
                    (f64::from(got) - sum).abs() <= bound,
                    "{} on {}: {} against {}",
                    index,
                    isa.name(),
                    got,
                    sum
                );
            }
        }
        Ok(())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn products_agree_with_f64(
            rows in length(), inner in prop_oneof![Just(0), length()], columns in length(),
            gap in 0usize..3, transpose_a: bool, transpose_b: bool, narrow: bool, accumulate: bool,
        ) {
            let a = random(rows * (inner + gap) + inner * (rows + gap), 1);
            let b = random(inner * (columns + gap) + columns * (inner + gap), 2);
            let a = matrix(&a[..], rows, inner, gap, transpose_a);
            if narrow {
                let b: Vec<bf16> = b.into_iter().map(bf16::from_f32).collect();
                check(a, matrix(&b[..], inner, columns, gap, transpose_b), gap, accumulate)?;
            } else {
                check(a, matrix(&b[..], inner, columns, gap, transpose_b), gap, accumulate)?;
            }
        }
    }

    #[test]
    fn a_part_of_an_output_has_the_bits_that_it_has_in_the_whole() {
        let (rows, inner, columns) = (50, 300, 70);
        let (a, b) = (random(rows * inner, 1), random(inner * columns, 2));
        let mut whole = vec![0.0; rows * columns];
        let (a, b) = (Matrix::dense(&a[..], rows, inner), Matrix::dense(&b[..], inner, columns));
        product(Matrix::dense(&mut whole[..], rows, columns), a, b, 1.0, false);
        for (first, count) in [(0, 50), (7, 20), (49, 1)] {
            let mut part = vec![0.0; count * columns];
            let a = Matrix::dense(&a.data[first * inner..], count, inner);
            product(Matrix::dense(&mut part[..], count, columns), a, b, 1.0, false);
            assert_eq!(part, whole[first * columns..][..count * columns]);
        }
    }
}
