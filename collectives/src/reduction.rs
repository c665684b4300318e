//! How the ranks' elements are combined.

use pillion_kernels::DType;
use pillion_kernels::cpu::reduce::{Fold, Operator, wide};

/// How elements are combined.
///
/// 16-bit floats accumulate in f32, all other types in themselves, and the result is rounded once.
/// Integers wrap, but not in [`Reduction::Avg`] of 8 and 32 bits, whose sum is wider. Truth values
/// have no average; their sum and maximum say whether one is true, their product and minimum
/// whether all are.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Reduction {
    /// The sum.
    Sum,
    /// The sum, divided by the number of ranks; integers are rounded towards zero.
    Avg,
    /// The product.
    Prod,
    /// The smallest; NaN where there is one.
    Min,
    /// The largest; NaN where there is one.
    Max,
    /// Bits that all have. Not of floats.
    BitAnd,
    /// Bits that one has. Not of floats.
    BitOr,
    /// Bits that an odd number has. Not of floats.
    BitXor,
    /// The sum of elements times this number, which is the same on all ranks. Each product is
    /// rounded to the type in which sums accumulate. Of floats.
    PremulSum(f64),
}

impl Reduction {
    /// Its name in messages.
    pub const fn name(self) -> &'static str {
        NAMES[self.code() as usize]
    }

    /// A number for each kind, below 16.
    pub(crate) const fn code(self) -> u64 {
        match self {
            Reduction::Sum => 0,
            Reduction::Avg => 1,
            Reduction::Prod => 2,
            Reduction::Min => 3,
            Reduction::Max => 4,
            Reduction::BitAnd => 5,
            Reduction::BitOr => 6,
            Reduction::BitXor => 7,
            Reduction::PremulSum(_) => 8,
        }
    }

    /// What else must be equal on all ranks.
    pub(crate) const fn factor_bits(self) -> u64 {
        match self {
            Reduction::PremulSum(factor) => factor.to_bits(),
            _ => 0,
        }
    }

    /// The words for a code, and the bits of its factor.
    pub(crate) fn describe(code: u64, factor: u64) -> String {
        match NAMES.get(code as usize) {
            Some(name) if code == Reduction::PremulSum(0.0).code() => format!("{name} by {}", f64::from_bits(factor)),
            Some(name) => (*name).to_owned(),
            None => "unknown reduction".to_owned(),
        }
    }

    fn operator(self) -> Operator {
        match self {
            Reduction::Sum | Reduction::Avg | Reduction::PremulSum(_) => Operator::Sum,
            Reduction::Prod => Operator::Prod,
            Reduction::Min => Operator::Min,
            Reduction::Max => Operator::Max,
            Reduction::BitAnd => Operator::And,
            Reduction::BitOr => Operator::Or,
            Reduction::BitXor => Operator::Xor,
        }
    }

    /// The type in which elements accumulate.
    pub(crate) fn wide(self, dtype: DType) -> DType {
        wide(dtype, self == Reduction::Avg)
    }

    /// A fold of inputs: their partial result, in [`Reduction::wide`].
    pub(crate) fn first(self, dtype: DType) -> Fold<'static> {
        let factor = match self {
            Reduction::PremulSum(factor) => Some(factor),
            _ => None,
        };
        Fold { factor, output: self.wide(dtype), ..Fold::new(dtype, self.operator()) }
    }

    /// A fold of partial results of `world` ranks to the end.
    pub(crate) fn last(self, dtype: DType, world: usize) -> Fold<'static> {
        let divisor = (self == Reduction::Avg).then_some(world);
        Fold { divisor, ..Fold::new(self.wide(dtype), self.operator()) }
    }

    /// A fold of the inputs of `world` ranks to the end.
    pub(crate) fn whole(self, dtype: DType, world: usize) -> Fold<'static> {
        let Fold { divisor, .. } = self.last(dtype, world);
        Fold { divisor, output: dtype, ..self.first(dtype) }
    }

    /// Whether elements of these types can be combined: the result has the type of the inputs, or,
    /// for 16-bit floats, the one in which they accumulate.
    pub fn supports(self, dtype: DType, output: DType) -> bool {
        let keeps = output == dtype || output == wide(dtype, false);
        keeps && Fold { output, ..self.whole(dtype, 1) }.supports()
    }

    /// Combines numbers in their order.
    pub(crate) fn of_numbers(self, numbers: impl ExactSizeIterator<Item = f64>) -> f64 {
        let count = numbers.len() as f64;
        match self {
            Reduction::Sum => numbers.sum(),
            Reduction::Avg => numbers.sum::<f64>() / count,
            Reduction::PremulSum(factor) => numbers.map(|number| number * factor).sum(),
            Reduction::Prod => numbers.product(),
            Reduction::Min => numbers.fold(f64::INFINITY, |a, b| if a <= b || a.is_nan() { a } else { b }),
            Reduction::Max => numbers.fold(f64::NEG_INFINITY, |a, b| if a >= b || a.is_nan() { a } else { b }),
            Reduction::BitAnd | Reduction::BitOr | Reduction::BitXor => {
                unreachable!("numbers have no bits to combine, which `all_reduce_scalars` says")
            }
        }
    }
}

const NAMES: [&str; 9] = ["sum", "avg", "prod", "min", "max", "band", "bor", "bxor", "premul"];
