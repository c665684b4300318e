//! Values of every type, and what they come to when they are combined.

use half::{bf16, f16};
use pillion_collectives::Reduction;
use pillion_kernels::{Bool, Element};

/// A type of elements that can be reduced.
pub(crate) trait Number: Element + PartialEq + std::fmt::Debug {
    /// Every reduction that there is of the type.
    const REDUCTIONS: &'static [Reduction];
    fn new(rank: usize, index: usize) -> Self;
    fn combine(values: &[Self], reduction: Reduction, groups: &[usize]) -> Self;
}

/// The tree of the documentation: consecutive groups of these lengths in order, and their partial
/// results in order.
pub(crate) fn tree<T: Copy>(values: &[T], groups: &[usize], combine: impl Fn(T, T) -> T) -> T {
    let mut rest = values.iter().copied();
    let mut partial = |&len: &usize| rest.by_ref().take(len).reduce(&combine).unwrap();
    let partials: Vec<T> = groups.iter().map(&mut partial).collect();
    assert!(rest.next().is_none(), "groups have all ranks");
    partials.into_iter().reduce(&combine).unwrap()
}

/// 64 digits that look random; cheap, since there are millions.
fn digits(rank: usize, index: usize) -> u64 {
    let mixed =
        (rank as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ (index as u64).wrapping_mul(0xd6e8_feb8_6659_fd93);
    mixed.wrapping_mul(mixed | 1)
}

/// Floats, whose arithmetic is that of the type in which they accumulate.
macro_rules! float {
    ($type:ty, $new:expr, $wide:ty, $widen:expr, $narrow:expr) => {
        impl Number for $type {
            const REDUCTIONS: &'static [Reduction] = &[
                Reduction::Sum,
                Reduction::Avg,
                Reduction::Prod,
                Reduction::Min,
                Reduction::Max,
                Reduction::PremulSum(0.3),
            ];
            fn new(rank: usize, index: usize) -> Self {
                // Fractions of 53 bits from −1 to 1, so that sums round.
                $new((digits(rank, index) >> 11) as f64 / (1u64 << 52) as f64 - 1.0)
            }
            fn combine(values: &[Self], reduction: Reduction, groups: &[usize]) -> Self {
                let factor = if let Reduction::PremulSum(factor) = reduction { factor as $wide } else { 1.0 };
                let wide: Vec<$wide> = values.iter().map(|&x| $widen(x) * factor).collect();
                $narrow(match reduction {
                    Reduction::Sum | Reduction::PremulSum(_) => tree(&wide, groups, |a, b| a + b),
                    Reduction::Avg => tree(&wide, groups, |a, b| a + b) / values.len() as $wide,
                    Reduction::Prod => tree(&wide, groups, |a, b| a * b),
                    Reduction::Min => tree(&wide, groups, <$wide>::min),
                    Reduction::Max => tree(&wide, groups, <$wide>::max),
                    other => panic!("{other:?} of floats"),
                })
            }
        }
    };
}
float!(f32, |x: f64| x as f32, f32, |x: f32| x, |x: f32| x);
float!(f64, |x: f64| x, f64, |x: f64| x, |x: f64| x);
float!(bf16, bf16::from_f64, f32, bf16::to_f32, bf16::from_f32);
float!(f16, f16::from_f64, f32, f16::to_f32, f16::from_f32);

/// Integers, whose results are the lowest digits of what they come to without limits.
macro_rules! integer {
    ($($type:ty => $new:expr),*) => {$(
        impl Number for $type {
            const REDUCTIONS: &'static [Reduction] = &[
                Reduction::Sum,
                Reduction::Avg,
                Reduction::Prod,
                Reduction::Min,
                Reduction::Max,
                Reduction::BitAnd,
                Reduction::BitOr,
                Reduction::BitXor,
            ];
            fn new(rank: usize, index: usize) -> Self {
                $new(digits(rank, index))
            }
            fn combine(values: &[Self], reduction: Reduction, groups: &[usize]) -> Self {
                let values: Vec<i128> = values.iter().map(|&x| x.into()).collect();
                (match reduction {
                    Reduction::Sum => values.iter().sum(),
                    Reduction::Avg => values.iter().sum::<i128>() / values.len() as i128,
                    Reduction::Prod => tree(&values, groups, i128::wrapping_mul),
                    Reduction::Min => tree(&values, groups, i128::min),
                    Reduction::Max => tree(&values, groups, i128::max),
                    Reduction::BitAnd => tree(&values, groups, |a, b| a & b),
                    Reduction::BitOr => tree(&values, groups, |a, b| a | b),
                    Reduction::BitXor => tree(&values, groups, |a, b| a ^ b),
                    Reduction::PremulSum(_) => panic!("products of integers and a float"),
                }) as $type
            }
        }
    )*};
}
// Sums of a few integers of 64 bits stay within the type, so that their average is known.
integer!(
    i8 => |x| x as i8, u8 => |x| x as u8, i32 => |x| x as i32, u32 => |x| x as u32,
    i64 => |x| x as i64 / 32, u64 => |x| x / 32
);

impl Number for Bool {
    const REDUCTIONS: &'static [Reduction] = &[
        Reduction::Sum,
        Reduction::Prod,
        Reduction::Min,
        Reduction::Max,
        Reduction::BitAnd,
        Reduction::BitOr,
        Reduction::BitXor,
    ];

    fn new(rank: usize, index: usize) -> Self {
        // Any byte other than 0 is true.
        bytemuck::cast((digits(rank, index) as u8).saturating_sub(128))
    }

    fn combine(values: &[Self], reduction: Reduction, _groups: &[usize]) -> Self {
        let truths: Vec<bool> = values.iter().map(|&x| x.into()).collect();
        Bool::from(match reduction {
            Reduction::Sum | Reduction::Max | Reduction::BitOr => truths.contains(&true),
            Reduction::Prod | Reduction::Min | Reduction::BitAnd => !truths.contains(&false),
            Reduction::BitXor => truths.iter().filter(|&&truth| truth).count() % 2 == 1,
            other => panic!("{other:?} of truth values"),
        })
    }
}
