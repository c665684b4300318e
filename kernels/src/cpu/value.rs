//! The types of activations, gradients and weights: f32, and bf16, which kernels widen when they read and round when they write.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

use half::bf16;

use super::maths::{narrow_one, widen_one};
use crate::Element;

/// An element of activations, gradients or weights.
pub(super) trait Value: Element {
    /// Whether f32 has more digits.
    const NARROW: bool;
    /// 0.
    const ZERO: Self;

    /// Its value.
    fn widen(self) -> f32;

    /// The nearest one, ties to even.
    fn narrow(x: f32) -> Self;

    /// to = from, each rounded to the nearest.
    #[inline(always)]
    fn round(to: &mut [Self], from: &[f32]) {
        for (to, &from) in to.iter_mut().zip(from) {
            *to = Self::narrow(from);
        }
    }

    /// Eight of them.
    ///
    /// # Safety
    /// `from` is readable for eight elements, and the processor has AVX2.
    #[cfg(target_arch = "x86_64")]
    unsafe fn load8(from: *const Self) -> __m256;
}

impl Value for f32 {
    const NARROW: bool = false;
    const ZERO: f32 = 0.0;

    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }

    #[inline(always)]
    fn narrow(x: f32) -> f32 {
        x
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn load8(from: *const f32) -> __m256 {
        // SAFETY: the caller's promise.
        unsafe { _mm256_loadu_ps(from) }
    }
}

impl Value for bf16 {
    const NARROW: bool = true;
    const ZERO: bf16 = bf16::ZERO;

    #[inline(always)]
    fn widen(self) -> f32 {
        widen_one(self)
    }

    #[inline(always)]
    fn narrow(x: f32) -> bf16 {
        narrow_one(x)
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn load8(from: *const bf16) -> __m256 {
        // SAFETY: the caller's promise.
        unsafe {
            let narrow = _mm_loadu_si128(from.cast());
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(narrow)))
        }
    }
}
