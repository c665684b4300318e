//! The P-ary reduction inside reduce-scatter, all-reduce and reduce: every input read once, every result written once.
//!
//! Inputs are combined from first to last. 16-bit floats accumulate in f32, all other types in
//! themselves; integers wrap. The result is rounded once, when it is stored. With more than one
//! group, consecutive inputs form a group's partial result, and the partial results are combined
//! from first to last: the tree that a hierarchy of hosts computes.

mod blocks;
#[cfg(test)]
mod tests;
mod types;

use half::{bf16, f16};

use super::non_temporal;
use crate::{Bool, DType};
use blocks::{SHORT, in_blocks, run};
use types::{Float, Stored, Wide};

/// How two elements are combined.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operator {
    /// Their sum. Of truth values: whether one is true.
    Sum,
    /// Their product. Of truth values: whether both are true.
    Prod,
    /// The smaller; NaN where there is one.
    Min,
    /// The larger; NaN where there is one.
    Max,
    /// Bits that both have. Not for floats.
    And,
    /// Bits that one has. Not for floats.
    Or,
    /// Bits that one has and the other not. Not for floats.
    Xor,
}

/// One reduction: outputs\[·\]\[i\] = combination over k of inputs\[k\]\[i\], for i below `count`.
#[derive(Clone, Debug)]
pub struct Fold<'a> {
    /// Type of the inputs' elements.
    pub dtype: DType,
    /// How they are combined.
    pub operator: Operator,
    /// What each element is multiplied by before it is added, in the type in which sums accumulate.
    /// For sums of floats.
    pub factor: Option<f64>,
    /// What a sum is divided by before it is stored; integers are rounded towards zero. For sums of
    /// numbers. At least 1.
    pub divisor: Option<usize>,
    /// Number of groups; divides the number of inputs.
    pub groups: usize,
    /// Where each input starts; at least one.
    pub inputs: &'a [*const u8],
    /// Where each copy of the result goes.
    pub outputs: &'a [*mut u8],
    /// Type of the result: that of the inputs, or what [`Fold::supports`] says.
    pub output: DType,
    /// Whether the result is combined with what the outputs hold, last, instead of replacing it.
    pub accumulate: bool,
    /// Number of elements.
    pub count: usize,
    /// Whether to store past the caches.
    pub stream: bool,
}

impl Fold<'_> {
    /// A reduction of nothing to nothing, in one type and one group.
    pub fn new(dtype: DType, operator: Operator) -> Fold<'static> {
        let nothing = (&[], &[]);
        Fold {
            dtype,
            operator,
            factor: None,
            divisor: None,
            groups: 1,
            inputs: nothing.0,
            outputs: nothing.1,
            output: dtype,
            accumulate: false,
            count: 0,
            stream: false,
        }
    }

    /// Whether there is such a reduction: a float's result is also f32, which keeps what was
    /// accumulated, and f32 is also rounded to a 16-bit float; a sum of integers that is to be
    /// divided is also i64 ([`wide`]), and an i64 divided is also such an integer.
    pub fn supports(&self) -> bool {
        let Fold { dtype, output, operator, .. } = *self;
        let types = match (dtype, output) {
            (one, other) if one == other => true,
            (DType::F32, DType::Bf16 | DType::F16) | (DType::Bf16 | DType::F16, DType::F32) => true,
            (one, DType::I64) => wide(one, true) == DType::I64 && operator == Operator::Sum,
            (DType::I64, other) => wide(other, true) == DType::I64 && operator == Operator::Sum,
            _ => false,
        };
        let has_bits = !dtype.is_float() || !matches!(operator, Operator::And | Operator::Or | Operator::Xor);
        let scales = self.factor.is_some() || self.divisor.is_some();
        let is_scaled = operator == Operator::Sum
            && dtype != DType::Bool
            && (self.factor.is_none() || dtype.is_float())
            && self.divisor != Some(0);
        types && has_bits && (is_scaled || !scales)
    }
}

/// The type in which elements accumulate; `divided` for a sum that is divided at the end, which
/// therefore must not wrap.
pub fn wide(dtype: DType, divided: bool) -> DType {
    match dtype {
        DType::Bf16 | DType::F16 => DType::F32,
        DType::I8 | DType::U8 | DType::I32 | DType::U32 if divided => DType::I64,
        other => other,
    }
}

/// Runs a reduction. Streamed results are complete for other cores once this returns and a release store follows.
///
/// # Safety
/// Every input is readable and every output writable for `count` elements of its type, aligned to it, and nobody else writes the
/// inputs or touches the outputs meanwhile. An output may be exactly an input of the same type, and overlaps no other input.
///
/// # Panics
/// For what [`Fold::supports`] denies, without inputs, and when groups do not divide them.
pub unsafe fn fold(job: &Fold<'_>) {
    assert!(
        !job.inputs.is_empty() && job.groups > 0 && job.inputs.len().is_multiple_of(job.groups),
        "{} inputs in {} groups",
        job.inputs.len(),
        job.groups
    );
    // The plainest needs no look at the others.
    let is_plain = job.operator == Operator::Sum && job.factor.is_none() && job.divisor.is_none();
    assert!(
        is_plain && job.dtype == job.output || job.supports(),
        "no reduction of {} into {} by {:?}",
        job.dtype,
        job.output,
        job.operator
    );
    // SAFETY: the types are those that the job names; the rest is the caller's promise.
    unsafe {
        match (job.dtype, job.output) {
            (DType::F32, DType::F32) => floats::<f32, f32, f32>(job),
            (DType::F32, DType::Bf16) => floats::<f32, bf16, f32>(job),
            (DType::F32, DType::F16) => floats::<f32, f16, f32>(job),
            (DType::Bf16, DType::F32) => floats::<bf16, f32, f32>(job),
            (DType::Bf16, DType::Bf16) => floats::<bf16, bf16, f32>(job),
            (DType::F16, DType::F32) => floats::<f16, f32, f32>(job),
            (DType::F16, DType::F16) => floats::<f16, f16, f32>(job),
            (DType::F64, DType::F64) => floats::<f64, f64, f64>(job),
            (DType::Bool, DType::Bool) => truths(job),
            _ if matches!(job.operator, Operator::And | Operator::Or | Operator::Xor) => bits(job),
            (DType::I8, DType::I8) if job.divisor.is_none() => integers::<i8>(job),
            (DType::U8, DType::U8) if job.divisor.is_none() => integers::<u8>(job),
            (DType::I32, DType::I32) if job.divisor.is_none() => integers::<i32>(job),
            (DType::U32, DType::U32) if job.divisor.is_none() => integers::<u32>(job),
            (DType::I64, DType::I64) => integers::<i64>(job),
            (DType::U64, DType::U64) => integers::<u64>(job),
            (DType::I8, DType::I8) => sum_wide::<i8, i8>(job),
            (DType::U8, DType::U8) => sum_wide::<u8, u8>(job),
            (DType::I32, DType::I32) => sum_wide::<i32, i32>(job),
            (DType::U32, DType::U32) => sum_wide::<u32, u32>(job),
            (DType::I8, DType::I64) => sum_wide::<i8, i64>(job),
            (DType::U8, DType::I64) => sum_wide::<u8, i64>(job),
            (DType::I32, DType::I64) => sum_wide::<i32, i64>(job),
            (DType::U32, DType::I64) => sum_wide::<u32, i64>(job),
            (DType::I64, DType::I8) => sum_wide::<i64, i8>(job),
            (DType::I64, DType::U8) => sum_wide::<i64, u8>(job),
            (DType::I64, DType::I32) => sum_wide::<i64, i32>(job),
            (DType::I64, DType::U32) => sum_wide::<i64, u32>(job),
            _ => unreachable!("`supports` denies it"),
        }
    }
    if job.stream {
        non_temporal::fence();
    }
}

/// # Safety
/// As for [`fold`], with elements of these types.
unsafe fn floats<I: Stored<A>, O: Stored<A>, A: Float>(job: &Fold<'_>) {
    // SAFETY: the caller's promise.
    unsafe {
        match (job.operator, job.factor) {
            (Operator::Sum, None) if job.count <= SHORT => in_blocks::<I, O, A, SHORT>(job, I::widen, A::sum),
            (Operator::Sum, None) => run::<I, O, A>(job, I::widen, A::sum),
            (Operator::Sum, Some(factor)) => {
                let factor = A::of(factor);
                run::<I, O, A>(
                    job,
                    #[inline(always)]
                    |x| x.widen().prod(factor),
                    A::sum,
                )
            }
            (Operator::Prod, _) => run::<I, O, A>(job, I::widen, A::prod),
            (Operator::Min, _) => run::<I, O, A>(job, I::widen, A::min),
            (Operator::Max, _) => run::<I, O, A>(job, I::widen, A::max),
            (Operator::And | Operator::Or | Operator::Xor, _) => unreachable!("`supports` denies it"),
        }
    }
}

/// # Safety
/// As for [`fold`], with elements of this type.
unsafe fn integers<T: Stored<T> + Wide>(job: &Fold<'_>) {
    // SAFETY: the caller's promise.
    unsafe {
        match job.operator {
            Operator::Sum => run::<T, T, T>(job, T::widen, T::sum),
            Operator::Prod => run::<T, T, T>(job, T::widen, T::prod),
            Operator::Min => run::<T, T, T>(job, T::widen, T::min),
            Operator::Max => run::<T, T, T>(job, T::widen, T::max),
            Operator::And | Operator::Or | Operator::Xor => unreachable!("bits are combined in `bits`"),
        }
    }
}

/// Sums that are divided, at this or a later level of the tree.
///
/// # Safety
/// As for [`fold`], with elements of these types.
unsafe fn sum_wide<I: Stored<i64>, O: Stored<i64>>(job: &Fold<'_>) {
    // SAFETY: the caller's promise.
    unsafe { run::<I, O, i64>(job, I::widen, Wide::sum) }
}

/// Combines the bits of elements of any type.
///
/// # Safety
/// As for [`fold`].
unsafe fn bits(job: &Fold<'_>) {
    let job = &Fold { count: job.count * job.dtype.bytes(), ..job.clone() };
    // SAFETY: the caller's promise: an element is so many bytes, and both sides have the same type.
    unsafe {
        match job.operator {
            Operator::And => run::<u8, u8, u8>(job, std::convert::identity, types::and),
            Operator::Or => run::<u8, u8, u8>(job, std::convert::identity, types::or),
            Operator::Xor => run::<u8, u8, u8>(job, std::convert::identity, types::xor),
            _ => unreachable!("numbers are combined in `integers`"),
        }
    }
}

/// # Safety
/// As for [`fold`], with truth values.
unsafe fn truths(job: &Fold<'_>) {
    // SAFETY: the caller's promise.
    unsafe {
        match job.operator {
            Operator::Sum | Operator::Max | Operator::Or => run::<Bool, Bool, u8>(job, Bool::widen, types::or),
            Operator::Prod | Operator::Min | Operator::And => run::<Bool, Bool, u8>(job, Bool::widen, types::and),
            Operator::Xor => run::<Bool, Bool, u8>(job, Bool::widen, types::xor),
        }
    }
}
