//! Operations on parts, one for each rank, of any lengths.
//!
//! Parts are an array of `world` tensors of one type, each with memory of its own. What one rank
//! sends is what another receives; otherwise the operation fails on all with PILLION_MISMATCH or
//! PILLION_ABORTED.

use pillion_collectives::Parts;

use crate::arguments::array;
use crate::communicator::Communicator;
use crate::memory::{Tensor, apart};
use crate::reductions::reduction;
use crate::status::Failed;
use crate::work::{Work, operate};

/// # Safety
/// As for [`Tensor::buffer`], of each part.
unsafe fn parts(tensors: &[Tensor], what: &str) -> Result<Parts, Failed> {
    // SAFETY: the caller's promise.
    let buffers = tensors.iter().map(|tensor| unsafe { tensor.buffer(what) });
    Ok(Parts::list(buffers.collect::<Result<_, _>>()?))
}

/// Refuses operands that share memory.
fn all_apart(first: (&str, &[Tensor]), second: (&str, &[Tensor])) -> Result<(), Failed> {
    let named = [first, second].into_iter().flat_map(|(name, tensors)| tensors.iter().map(move |part| (name, part)));
    apart(&named.collect::<Vec<_>>())
}

/// outputs[p] = the shard of rank p. The shard may be outputs[r], on rank r.
///
/// # Safety
/// The communicator is open; `outputs` has `world` tensors; their memory and the shard's is there,
/// and stays as it is until the operation has ended; `work` is NULL or a place for a pointer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pillion_all_gather_v(
    communicator: *const Communicator,
    shard: Tensor,
    outputs: *const Tensor,
    limit_ms: u64,
    work: *mut *mut Work,
) -> i32 {
    // SAFETY: the caller's promise, for all of this body.
    unsafe {
        operate(communicator, limit_ms, work, |ranks, start| {
            let outputs = array(outputs, ranks.world(), "outputs")?;
            if outputs[ranks.rank()].is(&shard) {
                apart(&outputs.iter().map(|part| ("outputs", part)).collect::<Vec<_>>())?;
                return Ok(ranks.all_gather_v_in_place(parts(outputs, "outputs")?, start).map(drop));
            }
            all_apart(("shard", &[shard]), ("outputs", outputs))?;
            Ok(ranks.all_gather_v(shard.buffer("shard")?, parts(outputs, "outputs")?, start).map(drop))
        })
    }
}

/// The root's outputs[p] = the shard of rank p. `outputs` is ignored on other ranks.
///
/// # Safety
/// As for pillion_all_gather_v; `outputs` may be NULL on ranks that are not the root.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pillion_gather_v(
    communicator: *const Communicator,
    shard: Tensor,
    outputs: *const Tensor,
    root: usize,
    limit_ms: u64,
    work: *mut *mut Work,
) -> i32 {
    // SAFETY: the caller's promise, for all of this body.
    unsafe {
        operate(communicator, limit_ms, work, |ranks, start| {
            let outputs = match ranks.rank() == root {
                true => {
                    let outputs = array(outputs, ranks.world(), "outputs")?;
                    all_apart(("shard", &[shard]), ("outputs", outputs))?;
                    Some(parts(outputs, "outputs")?)
                }
                false => None,
            };
            Ok(ranks.gather_v(shard.buffer("shard")?, outputs, root, start).map(drop))
        })
    }
}

/// output = inputs[r] of the root, on rank r. `inputs` is ignored on other ranks.
///
/// # Safety
/// As for pillion_all_gather_v; `inputs` may be NULL on ranks that are not the root.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pillion_scatter_v(
    communicator: *const Communicator,
    inputs: *const Tensor,
    output: Tensor,
    root: usize,
    limit_ms: u64,
    work: *mut *mut Work,
) -> i32 {
    // SAFETY: the caller's promise, for all of this body.
    unsafe {
        operate(communicator, limit_ms, work, |ranks, start| {
            let inputs = match ranks.rank() == root {
                true => {
                    let inputs = array(inputs, ranks.world(), "inputs")?;
                    all_apart(("inputs", inputs), ("output", &[output]))?;
                    Some(parts(inputs, "inputs")?)
                }
                false => None,
            };
            Ok(ranks.scatter_v(inputs, output.buffer("output")?, root, start).map(drop))
        })
    }
}

/// outputs[p] = inputs[r] of rank p, on rank r.
///
/// # Safety
/// As for pillion_all_gather_v, of `inputs` and `outputs`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pillion_all_to_all_v(
    communicator: *const Communicator,
    inputs: *const Tensor,
    outputs: *const Tensor,
    limit_ms: u64,
    work: *mut *mut Work,
) -> i32 {
    // SAFETY: the caller's promise, for all of this body.
    unsafe {
        operate(communicator, limit_ms, work, |ranks, start| {
            let (inputs, outputs) =
                (array(inputs, ranks.world(), "inputs")?, array(outputs, ranks.world(), "outputs")?);
            all_apart(("inputs", inputs), ("outputs", outputs))?;
            Ok(ranks.all_to_all_v(parts(inputs, "inputs")?, parts(outputs, "outputs")?, start).map(drop))
        })
    }
}

/// output = the ranks' inputs[r] combined, on rank r. Every rank's inputs[p] has as many elements.
/// Operators and types as for pillion_reduce_scatter.
///
/// # Safety
/// As for pillion_all_gather_v, of `inputs`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pillion_reduce_scatter_v(
    communicator: *const Communicator,
    inputs: *const Tensor,
    output: Tensor,
    op: i32,
    factor: f64,
    limit_ms: u64,
    work: *mut *mut Work,
) -> i32 {
    // SAFETY: the caller's promise, for all of this body.
    unsafe {
        operate(communicator, limit_ms, work, |ranks, start| {
            let (inputs, reduction) = (array(inputs, ranks.world(), "inputs")?, reduction(op, factor)?);
            if inputs[ranks.rank()].is(&output) {
                apart(&inputs.iter().map(|part| ("inputs", part)).collect::<Vec<_>>())?;
                return Ok(ranks.reduce_scatter_v_in_place(parts(inputs, "inputs")?, reduction, start).map(drop));
            }
            all_apart(("inputs", inputs), ("output", &[output]))?;
            let (inputs, output) = (parts(inputs, "inputs")?, output.buffer("output")?);
            Ok(ranks.reduce_scatter_v(inputs, output, reduction, start).map(drop))
        })
    }
}
