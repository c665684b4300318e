//! The types in which elements accumulate, and those in which they are kept.

use half::{bf16, f16};

use crate::Bool;
use crate::cpu::{half_precision, maths};

/// A type in which values accumulate. Integers wrap.
pub(super) trait Wide: Copy {
    fn sum(self, other: Self) -> Self;
    fn prod(self, other: Self) -> Self;
    fn min(self, other: Self) -> Self;
    fn max(self, other: Self) -> Self;
    fn divide(self, divisor: usize) -> Self;
}

/// A type in which floating-point values accumulate.
pub(super) trait Float: Wide {
    /// The nearest value.
    fn of(value: f64) -> Self;
}

macro_rules! wide_float {
    ($($float:ty),*) => {$(
        impl Wide for $float {
            #[inline(always)]
            fn sum(self, other: Self) -> Self {
                self + other
            }
            #[inline(always)]
            fn prod(self, other: Self) -> Self {
                self * other
            }
            #[inline(always)]
            fn min(self, other: Self) -> Self {
                if self <= other || self.is_nan() { self } else { other }
            }
            #[inline(always)]
            fn max(self, other: Self) -> Self {
                if self >= other || self.is_nan() { self } else { other }
            }
            #[inline(always)]
            fn divide(self, divisor: usize) -> Self {
                self / divisor as $float
            }
        }

        impl Float for $float {
            #[inline(always)]
            fn of(value: f64) -> Self {
                value as $float
            }
        }
    )*};
}
wide_float!(f32, f64);

macro_rules! wide_integer {
    ($($integer:ty),*) => {$(
        impl Wide for $integer {
            #[inline(always)]
            fn sum(self, other: Self) -> Self {
                self.wrapping_add(other)
            }
            #[inline(always)]
            fn prod(self, other: Self) -> Self {
                self.wrapping_mul(other)
            }
            #[inline(always)]
            fn min(self, other: Self) -> Self {
                Ord::min(self, other)
            }
            #[inline(always)]
            fn max(self, other: Self) -> Self {
                Ord::max(self, other)
            }
            #[inline(always)]
            fn divide(self, divisor: usize) -> Self {
                // A divisor that the type has not is larger than any value of it.
                <$integer>::try_from(divisor).map_or(0, |divisor| self / divisor)
            }
        }
    )*};
}
wide_integer!(i8, u8, i32, u32, i64, u64);

/// Bits that both have.
#[inline(always)]
pub(super) fn and(a: u8, b: u8) -> u8 {
    a & b
}

/// Bits that one has.
#[inline(always)]
pub(super) fn or(a: u8, b: u8) -> u8 {
    a | b
}

/// Bits that one has and the other not.
#[inline(always)]
pub(super) fn xor(a: u8, b: u8) -> u8 {
    a ^ b
}

/// A type in which values of `A` are kept.
pub(super) trait Stored<A>: Copy + Default {
    fn widen(self) -> A;
    /// The nearest value; of an integer, its lowest digits.
    fn narrow(wide: A) -> Self;
}

macro_rules! stored_as_is {
    ($($element:ty),*) => {$(
        impl Stored<$element> for $element {
            #[inline(always)]
            fn widen(self) -> $element {
                self
            }
            #[inline(always)]
            fn narrow(wide: $element) -> $element {
                wide
            }
        }
    )*};
}
stored_as_is!(f32, f64, i8, u8, i32, u32, i64, u64);

macro_rules! stored_in_i64 {
    ($($integer:ty),*) => {$(
        impl Stored<i64> for $integer {
            #[inline(always)]
            fn widen(self) -> i64 {
                i64::from(self)
            }
            #[inline(always)]
            fn narrow(wide: i64) -> $integer {
                wide as $integer
            }
        }
    )*};
}
stored_in_i64!(i8, u8, i32, u32);

impl Stored<f32> for bf16 {
    #[inline(always)]
    fn widen(self) -> f32 {
        maths::widen_one(self)
    }
    #[inline(always)]
    fn narrow(wide: f32) -> bf16 {
        maths::narrow_one(wide)
    }
}

impl Stored<f32> for f16 {
    #[inline(always)]
    fn widen(self) -> f32 {
        half_precision::widen(self)
    }
    #[inline(always)]
    fn narrow(wide: f32) -> f16 {
        half_precision::narrow(wide)
    }
}

/// 1 for true and 0 for false.
impl Stored<u8> for Bool {
    #[inline(always)]
    fn widen(self) -> u8 {
        u8::from(bool::from(self))
    }
    #[inline(always)]
    fn narrow(wide: u8) -> Bool {
        Bool::from(wide != 0)
    }
}
