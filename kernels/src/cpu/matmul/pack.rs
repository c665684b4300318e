//! Copies operands into panels: for each step along the inner dimension the elements of all lines of a panel, side by side. Narrow
//! elements are widened on the way, so no wide copy of a matrix ever exists.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

use crate::cpu::value::Value;

/// Some rows of the left operand, or columns of the right one.
#[derive(Clone, Copy)]
pub(super) struct Lines<T> {
    pub(super) data: *const T,
    /// At most as many as a panel is wide; what is missing is zero.
    pub(super) count: usize,
    /// Elements from one line to the next.
    pub(super) stride: usize,
    /// Elements from one step along a line to the next.
    pub(super) step: usize,
    /// Steps.
    pub(super) depth: usize,
}

/// Elements behind a panel that packing may overwrite.
pub(super) const SLACK: usize = 8;

/// panel\[k\]\[i\] = lines\[i\]\[k\].
///
/// # Safety
/// The lines are readable, and the panel is writable for depth · WIDTH + [`SLACK`] elements.
pub(super) unsafe fn panel<T: Value, const WIDTH: usize>(lines: Lines<T>, panel: *mut f32) {
    // SAFETY: the caller's promise.
    unsafe { elements::<T, WIDTH>(lines, panel, 0) }
}

/// The same from step `first` on.
///
/// # Safety
/// As for [`panel`].
#[inline(always)]
unsafe fn elements<T: Value, const WIDTH: usize>(lines: Lines<T>, panel: *mut f32, first: usize) {
    for step in first..lines.depth {
        for line in 0..WIDTH {
            // SAFETY: line < WIDTH, step < depth; a line that does not exist is not read.
            unsafe {
                let value = match line < lines.count {
                    true => (*lines.data.add(line * lines.stride + step * lines.step)).widen(),
                    false => 0.0,
                };
                *panel.add(step * WIDTH + line) = value;
            }
        }
    }
}

/// As [`panel`], with AVX2.
///
/// # Safety
/// As for [`panel`], and the processor has AVX2.
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx2")]
pub(super) unsafe fn panel_avx2<T: Value, const WIDTH: usize>(lines: Lines<T>, panel: *mut f32) {
    // SAFETY: the caller's promise; the functions below say what they touch.
    unsafe {
        if lines.count == WIDTH && lines.step == 1 {
            transposed::<T, WIDTH>(lines, panel);
        } else if lines.count == WIDTH && lines.stride == 1 {
            side_by_side::<T, WIDTH>(lines, panel);
        } else {
            elements::<T, WIDTH>(lines, panel, 0);
        }
    }
}

/// Of lines whose elements follow each other: squares of 8 × 8, transposed in registers.
///
/// # Safety
/// As for [`panel_avx2`]; lines.step is 1 and no line is missing.
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn transposed<T: Value, const WIDTH: usize>(lines: Lines<T>, panel: *mut f32) {
    let mut step = 0;
    while step + 8 <= lines.depth {
        // A square that is wider than what is left of the panel writes into the next step's first elements, which are written after it:
        // within a square rows go from first to last, and squares from last to first.
        for square in (0..WIDTH.div_ceil(8)).rev() {
            // SAFETY: lines beyond the last are replaced by it; the last square of the last step writes into the slack at most.
            unsafe {
                let line = |index: usize| (8 * square + index).min(WIDTH - 1);
                let from =
                    [0, 1, 2, 3, 4, 5, 6, 7].map(|index| T::load8(lines.data.add(line(index) * lines.stride + step)));
                let rows = transpose(from);
                for (index, row) in rows.into_iter().enumerate() {
                    _mm256_storeu_ps(panel.add((step + index) * WIDTH + 8 * square), row);
                }
            }
        }
        step += 8;
    }
    // SAFETY: the caller's promise.
    unsafe { elements::<T, WIDTH>(lines, panel, step) };
}

/// Of lines that lie side by side: each step is a copy.
///
/// # Safety
/// As for [`panel_avx2`]; lines.stride is 1 and no line is missing.
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn side_by_side<T: Value, const WIDTH: usize>(lines: Lines<T>, panel: *mut f32) {
    for step in 0..lines.depth {
        // SAFETY: WIDTH elements of a step of the lines, and of the panel.
        unsafe {
            let (from, to) = (lines.data.add(step * lines.step), panel.add(step * WIDTH));
            if !T::NARROW {
                std::ptr::copy_nonoverlapping(from.cast(), to, WIDTH);
                continue;
            }
            for index in (0..WIDTH / 8 * 8).step_by(8) {
                _mm256_storeu_ps(to.add(index), T::load8(from.add(index)));
            }
            for index in WIDTH / 8 * 8..WIDTH {
                *to.add(index) = (*from.add(index)).widen();
            }
        }
    }
}

/// rows\[j\]\[i\] = columns\[i\]\[j\].
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn transpose(columns: [__m256; 8]) -> [__m256; 8] {
    let c = columns;
    // Pairs of lines, then fours, then eights.
    let pairs = [0, 2, 4, 6].map(|i| [_mm256_unpacklo_ps(c[i], c[i + 1]), _mm256_unpackhi_ps(c[i], c[i + 1])]);
    let fours = [0, 2].map(|i| {
        let [[a, b], [c, d]] = [pairs[i], pairs[i + 1]];
        [
            _mm256_shuffle_ps::<0x44>(a, c),
            _mm256_shuffle_ps::<0xee>(a, c),
            _mm256_shuffle_ps::<0x44>(b, d),
            _mm256_shuffle_ps::<0xee>(b, d),
        ]
    });
    let low = |i: usize| _mm256_permute2f128_ps::<0x20>(fours[0][i], fours[1][i]);
    let high = |i: usize| _mm256_permute2f128_ps::<0x31>(fours[0][i], fours[1][i]);
    [low(0), low(1), low(2), low(3), high(0), high(1), high(2), high(3)]
}
