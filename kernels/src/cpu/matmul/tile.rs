//! The innermost product: a tile of the output in registers, from one panel of each operand.
//!
//! A panel holds the rows (of the left operand) or columns (of the right one) of a tile, element by element of the inner dimension: what
//! one step needs lies side by side. Each step broadcasts the elements of the left panel and multiplies them with vectors of the right
//! one, so a tile of R×C needs R·C/lanes registers for sums, and reads R + C elements for R·C products.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

use super::pack::{self, Lines};
use crate::cpu::value::Value;

/// Instructions that are known to exist, the shape of the tile that suits their registers, and blocks that suit their caches.
pub(super) trait Tile: Copy + Send + Sync {
    /// Rows of the output.
    const ROWS: usize;
    /// Columns of the output.
    const COLUMNS: usize;
    /// Element of a packed panel.
    type Panel: Value;
    /// Steps of a panel come in multiples of this; those behind the last are zero.
    const STEPS: usize = 1;
    /// Steps of the inner dimension in a block: a tile's panels stay in the first-level cache.
    const DEPTH: usize = 256;
    /// Rows in a block of the left operand, which stays in the second-level cache.
    const LEFT: usize = 144;
    /// Columns in a block of the right one, which stays in the third-level one.
    const RIGHT: usize = 2048;

    /// What must live while tiles are multiplied on this thread.
    type Running;

    /// Before the first tile.
    fn start(self) -> Self::Running;

    /// out\[i\]\[j\] = add\[i\]\[j\] + alpha · Σₖ left\[k\]\[i\] · right\[k\]\[j\].
    ///
    /// # Safety
    /// The panels have been packed for `depth` steps, a multiple of [`Tile::STEPS`]. The tile's rows are writable, and readable where it is
    /// added to; nobody else touches them. [`Tile::Running`] lives.
    unsafe fn multiply(self, depth: usize, left: *const Self::Panel, right: *const Self::Panel, out: Out);

    /// Writes a panel of the left operand (see [`pack`]).
    ///
    /// # Safety
    /// As for [`pack::panel`].
    unsafe fn pack_left<T: Value>(self, lines: Lines<T>, panel: *mut Self::Panel);

    /// Writes a panel of the right operand.
    ///
    /// # Safety
    /// As for [`pack::panel`].
    unsafe fn pack_right<T: Value>(self, lines: Lines<T>, panel: *mut Self::Panel);
}

/// Where a tile goes, and how.
#[derive(Clone, Copy)]
pub(super) struct Out {
    pub(super) data: *mut f32,
    /// Elements from one row to the next.
    pub(super) stride: usize,
    /// What is added; null for nothing.
    pub(super) add: *const f32,
    pub(super) add_stride: usize,
    pub(super) alpha: f32,
}

/// `$body` with `$tile` that of a set of instructions, which the processor has; `$narrow`: whether both operands are bf16.
macro_rules! with_tile {
    ($isa:expr, $narrow:expr, $tile:ident => $body:expr) => {
        match $isa {
            $crate::cpu::Isa::Portable => {
                let $tile = $crate::cpu::matmul::tile::Portable;
                $body
            }
            #[cfg(target_arch = "x86_64")]
            $crate::cpu::Isa::Avx2 => {
                // SAFETY: the processor has these instructions.
                let $tile = unsafe { $crate::cpu::matmul::tile::Avx2::new() };
                $body
            }
            #[cfg(target_arch = "x86_64")]
            $crate::cpu::Isa::Amx if $narrow => {
                // SAFETY: as above, and the process has the permission.
                let $tile = unsafe { $crate::cpu::matmul::amx::Amx::new() };
                $body
            }
            #[cfg(target_arch = "x86_64")]
            $crate::cpu::Isa::Avx512 | $crate::cpu::Isa::Amx => {
                // SAFETY: as above.
                let $tile = unsafe { $crate::cpu::matmul::tile::Avx512::new() };
                $body
            }
            #[cfg(not(target_arch = "x86_64"))]
            _ => unreachable!("a processor of another architecture"),
        }
    };
}
pub(super) use with_tile;

/// Any processor.
#[derive(Clone, Copy)]
pub(super) struct Portable;

impl Tile for Portable {
    const ROWS: usize = 4;
    const COLUMNS: usize = 8;
    type Panel = f32;
    type Running = ();

    fn start(self) {}

    unsafe fn multiply(self, depth: usize, left: *const f32, right: *const f32, out: Out) {
        let mut sums = [[0.0f32; 8]; 4];
        for step in 0..depth {
            // SAFETY: step < depth.
            let (left, right) =
                unsafe { (&*left.add(4 * step).cast::<[f32; 4]>(), &*right.add(8 * step).cast::<[f32; 8]>()) };
            for (sums, &left) in sums.iter_mut().zip(left) {
                for (sum, &right) in sums.iter_mut().zip(right) {
                    *sum += left * right;
                }
            }
        }
        for (row, sums) in sums.iter().enumerate() {
            for (column, &sum) in sums.iter().enumerate() {
                let product = out.alpha * sum;
                // SAFETY: an element of the tile.
                unsafe {
                    *out.data.add(row * out.stride + column) = match out.add.is_null() {
                        true => product,
                        false => *out.add.add(row * out.add_stride + column) + product,
                    };
                }
            }
        }
    }

    unsafe fn pack_left<T: Value>(self, lines: Lines<T>, panel: *mut f32) {
        // SAFETY: the caller's promise.
        unsafe { pack::panel::<T, 4>(lines, panel) }
    }

    unsafe fn pack_right<T: Value>(self, lines: Lines<T>, panel: *mut f32) {
        // SAFETY: the caller's promise.
        unsafe { pack::panel::<T, 8>(lines, panel) }
    }
}

/// Defines a tile of `$rows` rows and `$vectors` vectors of `$lanes` columns, and its functions for a set of instructions.
#[cfg(target_arch = "x86_64")]
macro_rules! tile {
    (
        $name:ident, $isa:literal, $features:literal, $rows:literal by $vectors:literal of $lanes:literal,
        $zero:ident, $load:ident, $store:ident, $broadcast:ident, $fma:ident, $mul:ident
    ) => {
        #[doc = concat!("A processor with ", $isa, ".")]
        #[derive(Clone, Copy)]
        pub(super) struct $name(());

        impl $name {
            /// # Safety
            #[doc = concat!("The processor has ", $features, ".")]
            pub(super) unsafe fn new() -> $name {
                $name(())
            }

            #[target_feature(enable = $features)]
            unsafe fn tile(depth: usize, mut left: *const f32, mut right: *const f32, out: Out) {
                // SAFETY: the caller's promise (`Tile::multiply`): every access is at one of `depth` steps of a panel or in the tile.
                unsafe {
                    for row in 0..$rows {
                        // What is added is on its way while the sums are made.
                        let add = out.add.wrapping_add(row * out.add_stride);
                        _mm_prefetch(add.cast(), _MM_HINT_T0);
                        _mm_prefetch(add.wrapping_add($vectors * $lanes - 1).cast(), _MM_HINT_T0);
                    }
                    let mut sums = [[$zero(); $vectors]; $rows];
                    for _ in 0..depth {
                        let mut columns = [$zero(); $vectors];
                        for (vector, columns) in columns.iter_mut().enumerate() {
                            *columns = $load(right.add(vector * $lanes));
                        }
                        for row in 0..$rows {
                            let element = $broadcast(*left.add(row));
                            for vector in 0..$vectors {
                                sums[row][vector] = $fma(element, columns[vector], sums[row][vector]);
                            }
                        }
                        left = left.add($rows);
                        right = right.add($vectors * $lanes);
                    }
                    let alpha = $broadcast(out.alpha);
                    for row in 0..$rows {
                        for vector in 0..$vectors {
                            let to = out.data.add(row * out.stride + vector * $lanes);
                            let value = match out.add.is_null() {
                                true => $mul(alpha, sums[row][vector]),
                                false => {
                                    let add = $load(out.add.add(row * out.add_stride + vector * $lanes));
                                    $fma(alpha, sums[row][vector], add)
                                }
                            };
                            $store(to, value);
                        }
                    }
                }
            }

            #[target_feature(enable = "avx2,fma")]
            unsafe fn pack<T: Value, const WIDTH: usize>(lines: Lines<T>, panel: *mut f32) {
                // SAFETY: the caller's promise; AVX2 is among the features.
                unsafe { pack::panel_avx2::<T, WIDTH>(lines, panel) }
            }
        }

        impl Tile for $name {
            const ROWS: usize = $rows;
            const COLUMNS: usize = $vectors * $lanes;
            type Panel = f32;
            type Running = ();

            #[inline(always)]
            fn start(self) {}

            #[inline(always)]
            unsafe fn multiply(self, depth: usize, left: *const f32, right: *const f32, out: Out) {
                // SAFETY: the caller's promise; whoever made `self` knew that the processor has the features.
                unsafe { $name::tile(depth, left, right, out) }
            }

            #[inline(always)]
            unsafe fn pack_left<T: Value>(self, lines: Lines<T>, panel: *mut f32) {
                // SAFETY: as above.
                unsafe { $name::pack::<T, $rows>(lines, panel) }
            }

            #[inline(always)]
            unsafe fn pack_right<T: Value>(self, lines: Lines<T>, panel: *mut f32) {
                // SAFETY: as above.
                unsafe { $name::pack::<T, { $vectors * $lanes }>(lines, panel) }
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
tile!(
    Avx2, "AVX2 and FMA", "avx2,fma", 6 by 2 of 8,
    _mm256_setzero_ps, _mm256_loadu_ps, _mm256_storeu_ps, _mm256_set1_ps, _mm256_fmadd_ps, _mm256_mul_ps
);

#[cfg(target_arch = "x86_64")]
tile!(
    Avx512, "AVX-512", "avx512f,avx2,fma", 12 by 2 of 16,
    _mm512_setzero_ps, _mm512_loadu_ps, _mm512_storeu_ps, _mm512_set1_ps, _mm512_fmadd_ps, _mm512_mul_ps
);
