//! Elements that hold small integers, whose combinations are known exactly in every type.

use half::{bf16, f16};
use pillion_kernels::{Bool, DType, Element};

/// In outputs before an operation.
pub const POISON: i64 = -1;

/// Largest value of a type, and the largest sum: bfloat16 has all integers up to it.
pub fn largest(dtype: DType) -> usize {
    match dtype {
        DType::Bool => 1,
        DType::I8 | DType::U8 => 127,
        _ => 256,
    }
}

/// An element type that holds small integers.
pub trait Integral: Element + PartialEq {
    /// This integer, exact for −1 to [`largest`]; the lowest digits of a larger one.
    fn of(integer: i64) -> Self;

    /// A sum of so many elements, divided: rounded as the type's reductions are.
    fn quotient(sum: i64, divisor: usize) -> Self;

    /// 2 to a power, or what a product of so many twos comes to.
    fn power(exponent: u32) -> Self;

    /// Whether two elements are not the same.
    fn differs(&self, other: &Self) -> bool {
        self != other
    }
}

macro_rules! floats {
    ($($float:ty, $wide:ty, $narrow:expr);*) => {$(
        impl Integral for $float {
            fn of(integer: i64) -> $float {
                $narrow(integer as $wide)
            }
            fn quotient(sum: i64, divisor: usize) -> $float {
                $narrow(sum as $wide / divisor as $wide)
            }
            fn power(exponent: u32) -> $float {
                $narrow((2.0 as $wide).powi(exponent as i32))
            }
        }
    )*};
}
floats!(
    f32, f32, std::convert::identity;
    f64, f64, std::convert::identity;
    bf16, f32, bf16::from_f32;
    f16, f32, f16::from_f32
);

macro_rules! integers {
    ($($integer:ty),*) => {$(
        impl Integral for $integer {
            fn of(integer: i64) -> $integer {
                integer as $integer
            }
            fn quotient(sum: i64, divisor: usize) -> $integer {
                (sum / divisor as i64) as $integer
            }
            fn power(exponent: u32) -> $integer {
                <$integer>::checked_shl(1, exponent).unwrap_or(0)
            }
        }
    )*};
}
integers!(i8, u8, i32, u32, i64, u64);

/// Poison is true, and not the 1 that a reduction writes.
impl Integral for Bool {
    fn of(integer: i64) -> Bool {
        if integer == POISON { bytemuck::cast(u8::MAX) } else { Bool::from(integer != 0) }
    }
    fn quotient(_sum: i64, _divisor: usize) -> Bool {
        unreachable!("truth values have no averages")
    }
    fn power(_exponent: u32) -> Bool {
        unreachable!("truth values are not twos")
    }
    fn differs(&self, other: &Bool) -> bool {
        bytemuck::bytes_of(self) != bytemuck::bytes_of(other)
    }
}
