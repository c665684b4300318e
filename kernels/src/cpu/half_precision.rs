//! IEEE binary16 to f32 and back, without branches, so that loops over them are vectorized.

use half::f16;

/// The value of `x`, exactly; NaN stays NaN.
#[inline(always)]
pub(super) fn widen(x: f16) -> f32 {
    /// The difference of the two exponents' biases, and the exponent of 2⁻¹⁴, where f32 has them.
    const BIAS: u32 = (127 - 15) << 23;
    const LEAST: u32 = (127 - 14) << 23;
    let bits = u32::from(x.to_bits());
    let (sign, rest) = ((bits & 0x8000) << 16, (bits & 0x7fff) << 13);
    let normal = rest.wrapping_add(BIAS);
    // Below 2⁻¹⁴ there is no leading one: 2⁻¹⁴ is added in front of the digits, and taken away.
    let small = (f32::from_bits(rest | LEAST) - f32::from_bits(LEAST)).to_bits();
    let special = rest | 0x7f80_0000;
    let finite = if rest < 1 << 23 { small } else { normal };
    f32::from_bits(sign | if rest >= 31 << 23 { special } else { finite })
}

/// The f16 nearest to `x`, ties to even: an infinity from 65,520 on; NaN stays NaN.
#[inline(always)]
pub(super) fn narrow(x: f32) -> f16 {
    let bits = x.to_bits();
    let (sign, rest) = ((bits >> 16) & 0x8000, bits & 0x7fff_ffff);
    // Adding half of the last digit that stays, less for ties, carries where it must.
    let odd = (rest >> 13) & 1;
    let normal = rest.wrapping_sub((127 - 15) << 23).wrapping_add(0xfff + odd) >> 13;
    // Below 2⁻¹⁴: the last digit of f16 is that of 0.5 in f32, so that an addition rounds.
    let small = (f32::from_bits(rest) + 0.5).to_bits().wrapping_sub(0.5f32.to_bits());
    let special = if rest > 0x7f80_0000 { 0x7e00 } else { 0x7c00 };
    let finite = if rest < (127 - 14) << 23 { small } else { normal };
    f16::from_bits((sign | if rest >= (127 + 16) << 23 { special } else { finite }) as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conversions_are_those_of_the_crate_half() {
        for bits in 0..=u16::MAX {
            let (ours, theirs) = (widen(f16::from_bits(bits)), f16::from_bits(bits).to_f32());
            assert!(ours.to_bits() == theirs.to_bits() || (ours.is_nan() && theirs.is_nan()), "{bits:#x}");
            assert!(narrow(ours).to_bits() == bits || (narrow(ours).is_nan() && ours.is_nan()), "{bits:#x}");
        }
        for upper in 0..=u16::MAX {
            // The digits that f16 lacks: none, less than half, half, more, and what is next to
            // them.
            for lower in [0u32, 1, 0xfff, 0x1000, 0x1001, 0x1fff, 0x2000, 0x3000, 0x7fff, 0x8000, 0xf000, 0xffff] {
                let x = f32::from_bits(u32::from(upper) << 16 | lower);
                let (ours, theirs) = (narrow(x), f16::from_f32(x));
                assert!(ours.to_bits() == theirs.to_bits() || (ours.is_nan() && theirs.is_nan()), "{x:e}");
            }
        }
    }
}
