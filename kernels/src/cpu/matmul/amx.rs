//! The tile of a processor with AMX: 32 × 32 elements of the output in four tile registers, bf16 operands, f32 sums (Intel 64 and IA-32
//! Architectures Software Developer's Manual, volume 1, chapter 18).
//!
//! A tile register is 16 rows of 64 bytes: 16 × 32 elements of the left operand, or 16 pairs of steps × 16 columns of the right one, or
//! 16 × 16 sums. Each step of 32 along the inner dimension loads two registers of each operand for four products, the least that eight
//! registers allow. A panel is a sequence of such steps, each 2 KiB: the left one's registers are its rows 0–15 and 16–31, the right
//! one's columns 0–15 and 16–31, pairs of steps side by side.
//!
//! Packing uses AVX2, so this path can be tested on a processor that has no more, with the tile instructions emulated
//! (`emulator.rs`).

use std::arch::asm;
use std::arch::x86_64::*;
use std::marker::PhantomData;

use half::bf16;

use super::pack::{Lines, transpose};
use super::tile::{Out, Tile};
use super::vectorized;
use crate::cpu::value::Value;

/// A processor with AMX for bf16, which this process may use.
#[derive(Clone, Copy)]
pub(super) struct Amx(());

impl Amx {
    /// # Safety
    /// The processor has AMX-BF16 and AVX2, and this process the system's permission for tile registers.
    pub(super) unsafe fn new() -> Amx {
        Amx(())
    }
}

/// Elements in a step of a panel.
const STEP: usize = 32 * 32;

/// While this lives, the thread's tile registers are in use.
pub(super) struct Configured(PhantomData<*const ()>);

impl Drop for Configured {
    fn drop(&mut self) {
        // SAFETY: made by `start` alone, on this thread, which it cannot leave. Frees what `ldtilecfg` took.
        unsafe { asm!("tilerelease", options(nomem, nostack)) }
    }
}

impl Tile for Amx {
    const ROWS: usize = 32;
    const COLUMNS: usize = 32;
    type Panel = bf16;
    const STEPS: usize = 32;
    /// A left panel of 44 KiB.
    const DEPTH: usize = 704;
    /// One panel, which stays in the first-level cache: tiles walk along the right operand's block, which passes it by.
    const LEFT: usize = 32;
    /// A block of 1 MiB, in the second-level cache.
    const RIGHT: usize = 736;
    type Running = Configured;

    fn start(self) -> Configured {
        #[repr(align(64))]
        struct Configuration([u8; 64]);
        let mut configuration = Configuration([0; 64]);
        configuration.0[0] = 1;
        for register in 0..8 {
            configuration.0[16 + 2 * register] = 64;
            configuration.0[48 + register] = 16;
        }
        // SAFETY: whoever made `self` knew that tiles exist and may be used; the configuration is palette 1, 16 rows of 64 bytes each.
        unsafe { asm!("ldtilecfg [{}]", in(reg) configuration.0.as_ptr(), options(readonly, nostack)) };
        Configured(PhantomData)
    }

    #[inline(always)]
    unsafe fn multiply(self, depth: usize, left: *const bf16, right: *const bf16, out: Out) {
        let steps = depth / 32;
        if out.alpha == 1.0 {
            // SAFETY: the caller's promise.
            return unsafe { sums(steps, left, right, out) };
        }
        let mut stage = std::mem::MaybeUninit::<[f32; STEP]>::uninit();
        let stage: *mut f32 = stage.as_mut_ptr().cast();
        // SAFETY: the stage holds a tile, which `sums` fills; the rest is the caller's promise.
        unsafe {
            sums(steps, left, right, Out { data: stage, stride: 32, add: std::ptr::null(), add_stride: 0, alpha: 1.0 });
            vectorized(
                #[inline(always)]
                || scale(stage, out),
            );
        }
    }

    #[inline(always)]
    unsafe fn pack_left<T: Value>(self, lines: Lines<T>, panel: *mut bf16) {
        assert!(T::NARROW, "tiles multiply bf16");
        // SAFETY: bf16 is the narrow element; the caller's promise.
        unsafe { pack_left(lines.cast(), panel) }
    }

    #[inline(always)]
    unsafe fn pack_right<T: Value>(self, lines: Lines<T>, panel: *mut bf16) {
        assert!(T::NARROW, "tiles multiply bf16");
        // SAFETY: as above.
        unsafe { pack_right(lines.cast(), panel) }
    }
}

/// out = add + alpha · stage.
///
/// # Safety
/// The stage is a tile without gaps; of `out` as for [`Tile::multiply`].
#[inline(always)]
unsafe fn scale(stage: *const f32, out: Out) {
    for row in 0..32 {
        for column in 0..32 {
            // SAFETY: an element of the tile.
            unsafe {
                let product = out.alpha * *stage.add(row * 32 + column);
                *out.data.add(row * out.stride + column) = match out.add.is_null() {
                    true => product,
                    false => *out.add.add(row * out.add_stride + column) + product,
                };
            }
        }
    }
}

/// out = add + left·right. The registers' contents live in this one block of instructions; only their configuration outlives it.
///
/// # Safety
/// As for [`Tile::multiply`], for `steps` steps of 32; `alpha` is not applied.
unsafe fn sums(steps: usize, left: *const bf16, right: *const bf16, out: Out) {
    // After some two thousand cycles without a store the next one takes several hundred: a store to nowhere every eight steps
    // prevents that.
    let mut nowhere = std::mem::MaybeUninit::<[u8; 1024]>::uninit();
    // The right operand is read with a hint that it will not be read again soon, so that it does not drive the left panel out of
    // the first-level cache.
    // SAFETY: reads `steps` steps of both panels and, unless null, two by two registers of `add`; writes as many of `out`, and
    // `nowhere`. The configuration is in force (`Running`), and says 16 rows of 64 bytes for each register.
    unsafe {
        asm!(
            "test {add}, {add}",
            "jz 2f",
            "tileloadd tmm0, [{add} + 1*{add_stride}]",
            "tileloadd tmm1, [{add} + 1*{add_stride} + 64]",
            "tileloadd tmm2, [{add_low} + 1*{add_stride}]",
            "tileloadd tmm3, [{add_low} + 1*{add_stride} + 64]",
            "jmp 3f",
            "2:",
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            "3:",
            "tileloaddt1 tmm6, [{right} + 1*{line}]",
            "tileloadd tmm4, [{left} + 1*{line}]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm5, [{left} + 1*{line} + 1024]",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tileloaddt1 tmm7, [{right} + 1*{line} + 1024]",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "add {left}, 2048",
            "add {right}, 2048",
            "dec {steps}",
            "jz 4f",
            "test {steps}, 7",
            "jnz 3b",
            "tilestored [{nowhere} + 1*{line}], tmm4",
            "jmp 3b",
            "4:",
            "tilestored [{out} + 1*{stride}], tmm0",
            "tilestored [{out} + 1*{stride} + 64], tmm1",
            "tilestored [{out_low} + 1*{stride}], tmm2",
            "tilestored [{out_low} + 1*{stride} + 64], tmm3",
            add = in(reg) out.add,
            add_low = in(reg) out.add.wrapping_add(16 * out.add_stride),
            add_stride = in(reg) 4 * out.add_stride,
            left = inout(reg) left => _,
            right = inout(reg) right => _,
            steps = inout(reg) steps => _,
            line = in(reg) 64usize,
            nowhere = in(reg) nowhere.as_mut_ptr(),
            out = in(reg) out.data,
            out_low = in(reg) out.data.wrapping_add(16 * out.stride),
            stride = in(reg) 4 * out.stride,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        );
    }
}

impl<T: Value> Lines<T> {
    /// The same lines of bf16.
    ///
    /// # Safety
    /// They are.
    unsafe fn cast(self) -> Lines<bf16> {
        let Lines { data, count, stride, step, depth } = self;
        Lines { data: data.cast(), count, stride, step, depth }
    }
}

impl Lines<bf16> {
    /// An element, or zero where there is none.
    ///
    /// # Safety
    /// The lines are readable.
    #[inline(always)]
    unsafe fn element(&self, line: usize, step: usize) -> bf16 {
        if line < self.count && step < self.depth {
            // SAFETY: it exists.
            unsafe { *self.data.add(line * self.stride + step * self.step) }
        } else {
            bf16::ZERO
        }
    }

    /// Whether a step of 32 of all 32 lines exists.
    #[inline(always)]
    fn is_whole(&self, first: usize) -> bool {
        self.count == 32 && first + 32 <= self.depth
    }
}

/// panel\[step\]\[i\]\[k\] = lines\[i\]\[32·step + k\].
///
/// # Safety
/// The lines are readable, the panel is writable for all steps, and the processor has AVX2.
#[target_feature(enable = "avx2")]
unsafe fn pack_left(lines: Lines<bf16>, panel: *mut bf16) {
    for first in (0..lines.depth).step_by(32) {
        // SAFETY: a step of the panel; of lines, what exists.
        unsafe {
            let to = panel.add(first * 32);
            let from = lines.data.add(first * lines.step);
            if lines.is_whole(first) && lines.step == 1 {
                for line in 0..32 {
                    let from = from.add(line * lines.stride).cast::<__m256i>();
                    let to = to.add(line * 32).cast::<__m256i>();
                    _mm256_storeu_si256(to, _mm256_loadu_si256(from));
                    _mm256_storeu_si256(to.add(1), _mm256_loadu_si256(from.add(1)));
                }
            } else if lines.is_whole(first) && lines.stride == 1 {
                for (line, step) in squares() {
                    let rows = [0, 1, 2, 3, 4, 5, 6, 7]
                        .map(|index| _mm_loadu_si128(from.add((step + index) * lines.step + line).cast()));
                    for (index, row) in transpose_narrow(rows).into_iter().enumerate() {
                        _mm_storeu_si128(to.add((line + index) * 32 + step).cast(), row);
                    }
                }
            } else {
                for line in 0..32 {
                    for step in 0..32 {
                        *to.add(line * 32 + step) = lines.element(line, first + step);
                    }
                }
            }
        }
    }
}

/// panel\[step\]\[half\]\[pair\]\[j\]\[parity\] = lines\[16·half + j\]\[32·step + 2·pair + parity\].
///
/// # Safety
/// As for [`pack_left`].
#[target_feature(enable = "avx2")]
unsafe fn pack_right(lines: Lines<bf16>, panel: *mut bf16) {
    for first in (0..lines.depth).step_by(32) {
        // SAFETY: a step of the panel; of lines, what exists.
        unsafe {
            let to = panel.add(first * 32);
            let from = lines.data.add(first * lines.step);
            if lines.is_whole(first) && lines.stride == 1 {
                for pair in 0..16 {
                    let (even, odd) = (from.add(2 * pair * lines.step), from.add((2 * pair + 1) * lines.step));
                    for eight in 0..4 {
                        let even = _mm_loadu_si128(even.add(8 * eight).cast());
                        let odd = _mm_loadu_si128(odd.add(8 * eight).cast());
                        let to = to.add(eight / 2 * 512 + pair * 32 + eight % 2 * 16).cast::<__m128i>();
                        _mm_storeu_si128(to, _mm_unpacklo_epi16(even, odd));
                        _mm_storeu_si128(to.add(1), _mm_unpackhi_epi16(even, odd));
                    }
                }
            } else if lines.is_whole(first) && lines.step == 1 {
                // A pair of steps is as wide as an f32.
                for line in (0..32).step_by(8) {
                    for pair in [0, 8] {
                        let columns = [0, 1, 2, 3, 4, 5, 6, 7]
                            .map(|index| _mm256_loadu_ps(from.add((line + index) * lines.stride + 2 * pair).cast()));
                        for (index, row) in transpose(columns).into_iter().enumerate() {
                            let to = to.add(line / 16 * 512 + (pair + index) * 32 + line % 16 * 2);
                            _mm256_storeu_ps(to.cast(), row);
                        }
                    }
                }
            } else {
                for line in 0..32 {
                    for step in 0..32 {
                        let at = line / 16 * 512 + step / 2 * 32 + line % 16 * 2 + step % 2;
                        *to.add(at) = lines.element(line, first + step);
                    }
                }
            }
        }
    }
}

/// Where the squares of 8 × 8 in 32 × 32 start.
fn squares() -> impl Iterator<Item = (usize, usize)> {
    (0..16).map(|square| (square / 4 * 8, square % 4 * 8))
}

/// rows\[j\]\[i\] = columns\[i\]\[j\], of 16-bit elements.
#[inline]
#[target_feature(enable = "avx2")]
fn transpose_narrow(columns: [__m128i; 8]) -> [__m128i; 8] {
    let c = columns;
    // Pairs of lines, then fours, then eights.
    let pairs = [0, 2, 4, 6].map(|i| [_mm_unpacklo_epi16(c[i], c[i + 1]), _mm_unpackhi_epi16(c[i], c[i + 1])]);
    let fours = [0, 2].map(|i| {
        let [[a, b], [c, d]] = [pairs[i], pairs[i + 1]];
        [_mm_unpacklo_epi32(a, c), _mm_unpackhi_epi32(a, c), _mm_unpacklo_epi32(b, d), _mm_unpackhi_epi32(b, d)]
    });
    let low = |i: usize| _mm_unpacklo_epi64(fours[0][i], fours[1][i]);
    let high = |i: usize| _mm_unpackhi_epi64(fours[0][i], fours[1][i]);
    [low(0), high(0), low(1), high(1), low(2), high(2), low(3), high(3)]
}
