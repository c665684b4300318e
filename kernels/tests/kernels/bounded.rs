//! Running error analysis (Higham 2002, section 3.3): a number that knows how far from it an f32 kernel may be.
//!
//! A reference written with [`Bounded`] reads like the formula. Each operation takes the errors of its arguments through, and adds
//! the rounding of its own result, |fl(x) − x| ≤ u·|x| with u = 2⁻²⁴ (section 2.2). Bounds are worst cases, and so
//! are a small multiple of n·u·Σ|terms|; a kernel that rounds to bf16 where it should not (2⁻⁸) or forgets a term is far outside.
//! Where a kernel does round to bf16, so does the reference ([`Bounded::to`]), and the error does not grow to 2⁻⁸.

use std::ops::{Add, Div, Mul, Neg, Sub};

use half::bf16;
use pillion_kernels::DType;

use crate::devices;

/// Half the distance from 1 to the next f32. The excess covers the reference's own f64 arithmetic, 2²⁹ times finer.
const U: f64 = (1.0 + 1.0 / 65536.0) / (1u64 << 24) as f64;

/// 2⁻¹⁵⁰, half the smallest f32: the rounding of a result too small for the relative bound.
const UNDERFLOW: f64 = f32::from_bits(1) as f64 / 2.0;

/// The exact value of a formula, and a bound on how far from it a kernel's f32 result may lie.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bounded {
    pub(crate) value: f64,
    pub(crate) error: f64,
}

impl Bounded {
    /// A number that the kernel has exactly.
    pub(crate) fn exact(value: impl Into<f64>) -> Bounded {
        Bounded { value: value.into(), error: 0.0 }
    }

    /// A number that the kernel rounds to f32.
    pub(crate) fn rounded(value: f64) -> Bounded {
        Bounded::with(value, 0.0)
    }

    /// The rounding of a result whose arguments' errors come through as `propagated`.
    fn with(value: f64, propagated: f64) -> Bounded {
        Bounded { value, error: propagated + U * (value.abs() + propagated) + UNDERFLOW }
    }

    /// What the kernel has as f32 is rounded to this type of activations here.
    ///
    /// The f32 lies between value − error and value + error. Rounding to the nearest is monotone, so the bf16 lies between those of the
    /// two ends. A bound on an f32 is finer than the spacing of bf16 by some 2¹⁴: nearly always the ends round to the same number, which
    /// then is what the kernel must have, without an error; else to neighbours, subnormal ones too.
    pub(crate) fn to(self, dtype: DType) -> Bounded {
        if dtype == DType::F32 {
            return self;
        }
        // Rounding to f32 first is monotone as well, and leaves what the kernel has as it is.
        let round = |x: f64| f64::from(bf16::from_f32(x as f32));
        let (low, value, high) = (round(self.value - self.error), round(self.value), round(self.value + self.error));
        Bounded { value, error: f64::max(high - value, value - low) }
    }

    pub(crate) fn sqrt(self) -> Bounded {
        let value = self.value.sqrt();
        // √(a+E) − √a ≤ min(E/√a, √E), and the same below.
        Bounded::with(value, (self.error / value).min(self.error.sqrt()))
    }

    pub(crate) fn exp(self) -> Bounded {
        let value = self.value.exp();
        let propagated = value * self.error.exp_m1();
        // The kernels' exponential is within 2 units in the last place, 4u, and 0 below e^−86.9 < 2⁻¹²⁵ (its unit test).
        Bounded { value, error: propagated + 4.0 * U * (value + propagated) + 2f64.powi(-125) }
    }

    /// 2ˣ.
    pub(crate) fn exp2(self) -> Bounded {
        let value = self.value.exp2();
        let propagated = value * (self.error * std::f64::consts::LN_2).exp_m1();
        // CUDA's exp2f is within 2 units in the last place, 4u (CUDA C++ Programming Guide,
        // "Mathematical Functions"); the C library's is within 1. Both have subnormal results.
        Bounded { value, error: propagated + 4.0 * U * (value + propagated) + 2f64.powi(-125) }
    }

    pub(crate) fn ln(self) -> Bounded {
        assert!(self.value > self.error, "the logarithm's argument {self:?} may be 0");
        let value = self.value.ln();
        let propagated = self.error / (self.value - self.error);
        // The C library's logf is within a unit in the last place, 2u.
        Bounded { value, error: propagated + 2.0 * U * (value.abs() + propagated) }
    }
}

/// A sum in any order, with or without fused multiplication: n terms meet at most n − 1 additions
/// each, so |error| ≤ γ·Σ|terms| with γ = (n−1)u/(1−(n−1)u) (Higham 2002, section 4.2).
pub(crate) fn sum(terms: impl IntoIterator<Item = Bounded>) -> Bounded {
    sum_in(terms, U)
}

/// The same where the device's units for matrix products add.
pub(crate) fn sum_of_products(terms: impl IntoIterator<Item = Bounded>) -> Bounded {
    sum_in(terms, devices::UNITS_OF_PRODUCTS * U)
}

/// The same where an addition loses at most `unit` of its result.
fn sum_in(terms: impl IntoIterator<Item = Bounded>, unit: f64) -> Bounded {
    let (mut count, mut value, mut magnitude, mut propagated) = (0.0, 0.0, 0.0, 0.0);
    for term in terms {
        count += 1.0;
        value += term.value;
        magnitude += term.value.abs() + term.error;
        propagated += term.error;
    }
    let additions = f64::max(count - 1.0, 0.0) * unit;
    Bounded { value, error: propagated + additions / (1.0 - additions) * magnitude }
}

/// Σ aᵢ·bᵢ.
pub(crate) fn dot(a: &[Bounded], b: &[Bounded]) -> Bounded {
    assert_eq!(a.len(), b.len());
    sum(a.iter().zip(b).map(|(&a, &b)| a * b))
}

/// The largest, which is no further off than the worst of all.
pub(crate) fn max(numbers: &[Bounded]) -> Bounded {
    Bounded {
        value: numbers.iter().map(|x| x.value).fold(f64::NEG_INFINITY, f64::max),
        error: numbers.iter().map(|x| x.error).fold(0.0, f64::max),
    }
}

/// Numbers that the kernel has exactly.
pub(crate) fn exact(values: &[f32]) -> Vec<Bounded> {
    values.iter().map(|&value| Bounded::exact(value)).collect()
}

/// Results that a kernel rounds to this type of activations.
pub(crate) fn to(dtype: DType, results: &[Bounded]) -> Vec<Bounded> {
    results.iter().map(|x| x.to(dtype)).collect()
}

impl Neg for Bounded {
    type Output = Bounded;
    fn neg(self) -> Bounded {
        Bounded { value: -self.value, error: self.error }
    }
}

impl Add for Bounded {
    type Output = Bounded;
    fn add(self, other: Bounded) -> Bounded {
        Bounded::with(self.value + other.value, self.error + other.error)
    }
}

impl Sub for Bounded {
    type Output = Bounded;
    fn sub(self, other: Bounded) -> Bounded {
        self + -other
    }
}

impl Mul for Bounded {
    type Output = Bounded;
    fn mul(self, other: Bounded) -> Bounded {
        let propagated = self.value.abs() * other.error + other.value.abs() * self.error + self.error * other.error;
        Bounded::with(self.value * other.value, propagated)
    }
}

impl Div for Bounded {
    type Output = Bounded;
    fn div(self, other: Bounded) -> Bounded {
        let (divisor, value) = (other.value.abs(), self.value / other.value);
        assert!(divisor > other.error, "the divisor {other:?} may be 0");
        Bounded::with(value, (self.error + value.abs() * other.error) / (divisor - other.error))
    }
}

#[test]
fn a_rounding_to_bf16_is_certain_unless_both_neighbours_are_in_reach() {
    let spacing = 2f64.powi(-7);
    let near = |value: f64, error: f64| {
        let rounded = Bounded { value, error }.to(DType::Bf16);
        (rounded.value, rounded.error)
    };
    assert_eq!(near(1.0 + 0.4 * spacing, 1e-6), (1.0, 0.0));
    assert_eq!(near(1.0 + 0.6 * spacing, 1e-6), (1.0 + spacing, 0.0));
    assert_eq!(near(1.0 + 0.499_99 * spacing, 1e-6), (1.0, spacing));
    assert_eq!(near(1.0 + 0.500_01 * spacing, 1e-6), (1.0 + spacing, spacing));
    // The smallest bf16 is 2⁻¹³³.
    assert_eq!(near(0.7 * 2f64.powi(-133), 0.1 * 2f64.powi(-133)), (2f64.powi(-133), 0.0));
    assert_eq!(near(1.0 + 0.499_99 * spacing, 0.0), (1.0, 0.0));
    assert_eq!(Bounded { value: 1.001, error: 1e-6 }.to(DType::F32).value, 1.001);
}
