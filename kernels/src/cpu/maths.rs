//! Elementary functions that vectorise, and conversions between f32 and bf16.

use half::bf16;

/// eˣ in f32, within 2 units in the last place: by range reduction x = n·ln 2 + r, |r| ≤ ln 2 / 2, and the Taylor polynomial of degree 7
/// in r, whose remainder is below 4e-9 of the value there. Below e^−86.9, 1.5 times the smallest normal number, 0; above the largest number, infinity.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    // ln 2 in two parts, so that n · HIGH is exact for |n| < 2⁹.
    const HIGH: f32 = 0.693_359_4;
    const LOW: f32 = -2.121_944_4e-4;
    // Adding and subtracting 1.5·2²³ rounds to the nearest integer, and leaves it in the low bits.
    const MAGIC: f32 = 12_582_912.0;
    // Keeps NaN, which comes through.
    let clamped = x.clamp(-86.9, 88.8);
    let shifted = clamped * std::f32::consts::LOG2_E + MAGIC;
    let n = shifted - MAGIC;
    let r = (clamped - n * HIGH) - n * LOW;
    let mut p = 1.0 / 5040.0;
    for coefficient in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        p = p * r + coefficient;
    }
    // 2 · 2ⁿ⁻¹, since n reaches 128 at the upper end; at the lower one it is −126 + 1 at least, a normal number's exponent.
    let bits = shifted.to_bits() as i32 - MAGIC.to_bits() as i32;
    let value = (p + p) * f32::from_bits(((bits + 126) << 23) as u32);
    if x < -86.9 { 0.0 } else { value }
}

/// 1/(1+e⁻ˣ), where that is a normal number within 6 ulps, and x · sigmoid(x) within 7.
///
/// With u = 2⁻²⁴: the exponential is off by 2 ulps or 4u of it, the sum and the quotient by u each, so together by 6u of the result, and
/// the product with x by one more; u of a number is at most one ulp of it.
#[inline(always)]
pub(super) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// The value of `x`.
#[inline(always)]
pub(super) fn widen_one(x: bf16) -> f32 {
    f32::from_bits(u32::from(x.to_bits()) << 16)
}

/// x rounded to the nearest bf16, ties to even; NaN stays NaN.
#[inline(always)]
pub(super) fn narrow_one(x: f32) -> bf16 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
    let quiet = (bits >> 16) | 0x40;
    bf16::from_bits(if x.is_nan() { quiet } else { rounded } as u16)
}

/// out = x, exactly.
pub(super) fn widen(out: &mut [f32], x: &[bf16]) {
    super::vectorized(
        #[inline(always)]
        || {
            for (out, x) in out.iter_mut().zip(x) {
                *out = widen_one(*x);
            }
        },
    );
}

/// out = x, rounded to the nearest, ties to even.
pub(super) fn narrow(out: &mut [bf16], x: &[f32]) {
    super::vectorized(
        #[inline(always)]
        || {
            for (out, x) in out.iter_mut().zip(x) {
                *out = narrow_one(*x);
            }
        },
    );
}

/// Elements that sums and maxima take at a time, whatever the vectors' width.
pub(super) const LANES: usize = 16;

/// The largest; −∞ of none. NaN counts as smaller than everything.
#[inline(always)]
pub(super) fn max_of(x: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (blocks, tail) = x.as_chunks::<LANES>();
    let larger = |x: f32, y: f32| if y > x { y } else { x };
    for block in blocks {
        for lane in 0..LANES {
            lanes[lane] = larger(lanes[lane], block[lane]);
        }
    }
    lanes.iter().chain(tail).fold(f32::NEG_INFINITY, |x, &y| larger(x, y))
}

/// Σ f(aᵢ, bᵢ) over equally long slices, in [`LANES`] lanes that are added at the end: the same sum whatever the vectors' width.
#[inline(always)]
pub(super) fn sum_of<A: Copy, B: Copy>(a: &[A], b: &[B], f: impl Fn(A, B) -> f32) -> f32 {
    sum_of_three(a, b, b, |a, b, _| f(a, b))
}

/// Σ f(aᵢ, bᵢ, cᵢ), likewise.
#[inline(always)]
pub(super) fn sum_of_three<A: Copy, B: Copy, C: Copy>(a: &[A], b: &[B], c: &[C], f: impl Fn(A, B, C) -> f32) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let ((a, a_tail), (b, b_tail), (c, c_tail)) =
        (a.as_chunks::<LANES>(), b.as_chunks::<LANES>(), c.as_chunks::<LANES>());
    for ((a, b), c) in a.iter().zip(b).zip(c) {
        for lane in 0..LANES {
            lanes[lane] += f(a[lane], b[lane], c[lane]);
        }
    }
    let tail: f32 = a_tail.iter().zip(b_tail).zip(c_tail).map(|((&a, &b), &c)| f(a, b, c)).sum();
    lanes.iter().sum::<f32>() + tail
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_two_ulps_of_f64() {
        // The polynomial's remainder is 4e-9 relative; range reduction and Horner's rule round about three times near the last place.
        for index in -869_000..887_000 {
            let x = index as f32 * 1e-4;
            let exact = f64::from(x).exp();
            let ulp = 2f64.powi(exact.log2().floor() as i32 - 23);
            let error = (f64::from(exp(x)) - exact).abs() / ulp;
            assert!(error < 2.0, "exp({x}) is {error} ulps off");
        }
    }

    /// Distance in units in the last place of the exact number's binade. No number tested here is subnormal.
    fn ulps(got: f32, exact: f64) -> f64 {
        assert!(exact.abs() >= f64::from(f32::MIN_POSITIVE), "{exact:e} is no normal f32");
        (f64::from(got) - exact).abs() / 2f64.powi(exact.abs().log2().floor() as i32 - 23)
    }

    #[test]
    fn sigmoid_and_silu_are_within_their_ulps_of_f64() {
        // From where 1/(1+e⁻ˣ) is a normal number to far beyond where it is 1.
        for index in -873_000..1_000_000 {
            let x = index as f32 * 1e-4;
            let exact = 1.0 / (1.0 + (-f64::from(x)).exp());
            let error = ulps(sigmoid(x), exact);
            assert!(error < 6.0, "sigmoid({x}) is {error} ulps off");
            if x != 0.0 {
                let error = ulps(x * sigmoid(x), f64::from(x) * exact);
                assert!(error < 7.0, "silu({x}) is {error} ulps off");
            }
        }
    }

    #[test]
    fn the_reciprocal_of_a_root_is_within_one_and_a_half_ulps_of_f64() {
        // As RMSNorm computes it, from correctly rounded operations. With √x = m·2ᵏ and 1 < m < 2, the root is off by half an ulp, 2ᵏ⁻²⁴,
        // which changes 2⁻ᵏ/m by 2⁻ᵏ⁻²⁴/m², less than its ulp 2⁻ᵏ⁻²⁴; the quotient's rounding is half an ulp more.
        for index in 0..1_000_000u32 {
            let x = f32::from_bits(f32::MIN_POSITIVE.to_bits() + 2120 * index);
            let error = ulps(1.0 / x.sqrt(), 1.0 / f64::from(x).sqrt());
            assert!(error <= 1.5, "1/√{x} is {error} ulps off");
        }
    }

    #[test]
    fn the_largest_is_that_of_a_plain_fold_without_what_is_no_number() {
        let random = |index: u64| crate::random::normal(1, 7, index) as f32;
        for len in (0usize..=50).chain([257]) {
            for nan in [None, Some(0), Some(len / 2), Some(len.saturating_sub(1))] {
                for sign in [1.0, -1.0] {
                    let mut x: Vec<f32> = (0..len as u64).map(|index| sign * random(index).abs()).collect();
                    if let Some(place) = nan.and_then(|place| x.get_mut(place)) {
                        *place = f32::NAN;
                    }
                    let numbers = x.iter().copied().filter(|x| !x.is_nan());
                    assert_eq!(max_of(&x), numbers.fold(f32::NEG_INFINITY, f32::max), "of {x:?}");
                }
            }
            assert_eq!(max_of(&vec![f32::NAN; len]), f32::NEG_INFINITY);
        }
        assert_eq!(max_of(&[1.0, f32::INFINITY, f32::NAN, 2.0]), f32::INFINITY);
    }

    #[test]
    fn sums_are_those_of_a_plain_fold() {
        let random = |stream: u64, index: u64| crate::random::normal(1, stream, index);
        for len in (0usize..=50).chain([257]) {
            // Integers below 2⁶, 257 products of two: every partial sum is an integer below 2²⁴.
            let integers = |stream: u64| {
                let integer = |index: u64| (16.0 * random(stream, index)).round().clamp(-63.0, 63.0) as f32;
                (0..len as u64).map(integer).collect::<Vec<f32>>()
            };
            let (a, b) = (integers(1), integers(2));
            let exact: f32 = a.iter().zip(&b).map(|(a, b)| a * b).sum();
            assert_eq!(sum_of(&a, &b, |a, b| a * b), exact);

            let x: Vec<f32> = (0..len as u64).map(|index| random(3, index) as f32).collect();
            let exact: f64 = x.iter().map(|&x| f64::from(x)).sum();
            // At most n − 1 additions meet a term (Higham 2002, section 4.2).
            let magnitude: f64 = x.iter().map(|&x| f64::from(x).abs()).sum();
            let bound = len as f64 * 2f64.powi(-24) * magnitude;
            assert!((f64::from(sum_of(&x, &x, |x, _| x)) - exact).abs() <= bound);
        }
        assert!(sum_of(&[1.0, f32::NAN], &[1.0, 1.0], |a, b| a * b).is_nan());
    }

    #[test]
    fn exp_reaches_its_limits() {
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(-100.0), 0.0);
        assert_eq!(exp((-86.9f32).next_down()), 0.0);
        assert!(exp(-86.9).is_normal());
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(89.0), f32::INFINITY);
        assert_eq!(exp(f32::INFINITY), f32::INFINITY);
        assert!(exp(f32::NAN).is_nan());
        assert!(exp(88.7).is_finite());
    }

    #[test]
    fn narrowing_agrees_with_the_crate_half_on_every_upper_half_and_its_neighbours() {
        for upper in 0..=u16::MAX {
            for lower in [0u32, 1, 0x7fff, 0x8000, 0x8001, 0xffff] {
                let x = f32::from_bits(u32::from(upper) << 16 | lower);
                let (ours, theirs) = (narrow_one(x), bf16::from_f32(x));
                assert!(ours.to_bits() == theirs.to_bits() || (ours.is_nan() && theirs.is_nan()), "{x:e}");
            }
        }
    }
}
