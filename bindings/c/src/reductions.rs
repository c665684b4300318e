//! Operations that combine the ranks' elements, in order of rank.

use pillion_collectives::{Reduce, Reduction};

use crate::communicator::Communicator;
use crate::memory::{Tensor, apart};
use crate::operations::of_root;
use crate::status::Failed;
use crate::work::{Work, operate};

/// The sum.
pub const PILLION_SUM: i32 = 0;
/// The sum, divided by the number of ranks; integers are rounded towards zero.
pub const PILLION_AVG: i32 = 1;
/// The product.
pub const PILLION_PROD: i32 = 2;
/// The smallest; NaN where there is one.
pub const PILLION_MIN: i32 = 3;
/// The largest; NaN where there is one.
pub const PILLION_MAX: i32 = 4;
/// Bits that all have. Not of floats.
pub const PILLION_BIT_AND: i32 = 5;
/// Bits that one has. Not of floats.
pub const PILLION_BIT_OR: i32 = 6;
/// Bits that an odd number has. Not of floats.
pub const PILLION_BIT_XOR: i32 = 7;
/// The sum of elements times `factor`, which is the same on all ranks. Of floats.
pub const PILLION_PREMUL_SUM: i32 = 8;

pub(crate) fn reduction(code: i32, factor: f64) -> Result<Reduction, Failed> {
    Ok(match code {
        PILLION_SUM => Reduction::Sum,
        PILLION_AVG => Reduction::Avg,
        PILLION_PROD => Reduction::Prod,
        PILLION_MIN => Reduction::Min,
        PILLION_MAX => Reduction::Max,
        PILLION_BIT_AND => Reduction::BitAnd,
        PILLION_BIT_OR => Reduction::BitOr,
        PILLION_BIT_XOR => Reduction::BitXor,
        PILLION_PREMUL_SUM => Reduction::PremulSum(factor),
        _ => {
            let text = format!("there is no reduction {code}: give PILLION_SUM to PILLION_PREMUL_SUM");
            return Err(Failed::Invalid(text));
        }
    })
}

/// output = the ranks' inputs combined. Both: n elements; output of the input's type, or f32 for
/// 16-bit floats. They may be the same memory. `factor` matters for PILLION_PREMUL_SUM alone.
///
/// # Safety
/// As for pillion_all_gather.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pillion_all_reduce(
    communicator: *const Communicator,
    input: Tensor,
    output: Tensor,
    op: i32,
    factor: f64,
    limit_ms: u64,
    work: *mut *mut Work,
) -> i32 {
    // SAFETY: the caller's promise, for all of this body.
    unsafe {
        operate(communicator, limit_ms, work, |ranks, start| {
            let reduction = reduction(op, factor)?;
            if input.is(&output) {
                return Ok(ranks.all_reduce(output.buffer("output")?, reduction, start).map(drop));
            }
            apart(&[("input", &input), ("output", &output)])?;
            Ok(ranks.all_reduce_into(input.buffer("input")?, output.buffer("output")?, reduction, start).map(drop))
        })
    }
}

/// output = part r of the ranks' inputs combined, on rank r. input: world * n elements; output: n,
/// of the input's type, or f32 for 16-bit floats. The output may lie at its place in the input,
/// whose other parts are unchanged then.
///
/// # Safety
/// As for pillion_all_gather.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pillion_reduce_scatter(
    communicator: *const Communicator,
    input: Tensor,
    output: Tensor,
    op: i32,
    factor: f64,
    limit_ms: u64,
    work: *mut *mut Work,
) -> i32 {
    // SAFETY: the caller's promise, for all of this body.
    unsafe {
        operate(communicator, limit_ms, work, |ranks, start| {
            let reduction = reduction(op, factor)?;
            input.is_divided(&output, ranks.world(), "input", "output")?;
            if input.holds(&output, ranks.rank())? {
                return Ok(ranks.reduce_scatter_in_place(input.buffer("input")?, reduction, start).map(drop));
            }
            apart(&[("input", &input), ("output", &output)])?;
            let (input, output) = (input.buffer("input")?, output.buffer("output")?);
            let reduce = Reduce { input, sections: None, output, reduction, accumulate: false, sideband: None };
            Ok(ranks.reduce_scatter(reduce, start).map(drop))
        })
    }
}

/// The root's output = the ranks' inputs combined. input: n elements; output: n of its type on the
/// root, ignored elsewhere.
///
/// # Safety
/// As for pillion_all_gather.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pillion_reduce(
    communicator: *const Communicator,
    input: Tensor,
    output: Tensor,
    op: i32,
    factor: f64,
    root: usize,
    limit_ms: u64,
    work: *mut *mut Work,
) -> i32 {
    // SAFETY: the caller's promise, for all of this body.
    unsafe {
        operate(communicator, limit_ms, work, |ranks, start| {
            let (reduction, is_root) = (reduction(op, factor)?, ranks.rank() == root);
            if is_root {
                apart(&[("input", &input), ("output", &output)])?;
            }
            let (input, output) = (input.buffer("input")?, of_root(is_root, &output, "output")?);
            Ok(ranks.reduce(input, output, reduction, root, start).map(drop))
        })
    }
}
