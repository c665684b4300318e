//! Operations that move elements.
//!
//! In all of them, `limit_ms` is 0 for the communicator's own limit. `work` is NULL for a call that
//! returns once the operation is complete; otherwise the call returns at once, and writes a work
//! there, which pillion_release gives up.

use std::ptr::NonNull;

use pillion_kernels::{Buffer, DType};

use crate::arguments::place;
use crate::communicator::Communicator;
use crate::memory::{Tensor, apart};
use crate::status::{Failed, guard};
use crate::work::{Work, operate};

/// A tensor that only the root has: others give any, with no element.
///
/// # Safety
/// As for [`Tensor::buffer`].
pub(crate) unsafe fn of_root(is_root: bool, tensor: &Tensor, what: &str) -> Result<Option<Buffer>, Failed> {
    // SAFETY: the caller's promise.
    is_root.then(|| unsafe { tensor.buffer(what) }).transpose()
}

/// output[p * n ...] = the shard of rank p. shard: n elements; output: world * n. The shard may lie
/// at its place in the output.
///
/// # Safety
/// The communicator is open; the tensors' memory is there, and stays as it is until the operation
/// has ended; `work` is NULL or a place for a pointer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pillion_all_gather(
    communicator: *const Communicator,
    shard: Tensor,
    output: Tensor,
    limit_ms: u64,
    work: *mut *mut Work,
) -> i32 {
    // SAFETY: the caller's promise, for all of this body.
    unsafe {
        operate(communicator, limit_ms, work, |ranks, start| {
            output.is_divided(&shard, ranks.world(), "output", "shard")?;
            if output.holds(&shard, ranks.rank())? {
                return Ok(ranks.all_gather_in_place(output.buffer("output")?, start).map(drop));
            }
            apart(&[("shard", &shard), ("output", &output)])?;
            Ok(ranks.all_gather(shard.buffer("shard")?, output.buffer("output")?, start).map(drop))
        })
    }
}

/// The tensor = that of rank `root`.
///
/// # Safety
/// As for pillion_all_gather.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pillion_broadcast(
    communicator: *const Communicator,
    tensor: Tensor,
    root: usize,
    limit_ms: u64,
    work: *mut *mut Work,
) -> i32 {
    // SAFETY: the caller's promise, for all of this body.
    unsafe {
        operate(communicator, limit_ms, work, |ranks, start| {
            Ok(ranks.broadcast(tensor.buffer("tensor")?, root, start).map(drop))
        })
    }
}

/// The root's output[p * n ...] = the shard of rank p. shard: n elements; output: world * n on the
/// root, ignored elsewhere.
///
/// # Safety
/// As for pillion_all_gather.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pillion_gather(
    communicator: *const Communicator,
    shard: Tensor,
    output: Tensor,
    root: usize,
    limit_ms: u64,
    work: *mut *mut Work,
) -> i32 {
    // SAFETY: the caller's promise, for all of this body.
    unsafe {
        operate(communicator, limit_ms, work, |ranks, start| {
            let is_root = ranks.rank() == root;
            if is_root {
                apart(&[("shard", &shard), ("output", &output)])?;
            }
            Ok(ranks.gather(shard.buffer("shard")?, of_root(is_root, &output, "output")?, root, start).map(drop))
        })
    }
}

/// output = part r of the root's input, on rank r. input: world * n elements on the root, ignored
/// elsewhere; output: n.
///
/// # Safety
/// As for pillion_all_gather.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pillion_scatter(
    communicator: *const Communicator,
    input: Tensor,
    output: Tensor,
    root: usize,
    limit_ms: u64,
    work: *mut *mut Work,
) -> i32 {
    // SAFETY: the caller's promise, for all of this body.
    unsafe {
        operate(communicator, limit_ms, work, |ranks, start| {
            let is_root = ranks.rank() == root;
            if is_root {
                apart(&[("input", &input), ("output", &output)])?;
            }
            Ok(ranks.scatter(of_root(is_root, &input, "input")?, output.buffer("output")?, root, start).map(drop))
        })
    }
}

/// output[p * n ...] = part r of the input of rank p, on rank r. Both: world * n elements.
///
/// # Safety
/// As for pillion_all_gather.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pillion_all_to_all(
    communicator: *const Communicator,
    input: Tensor,
    output: Tensor,
    limit_ms: u64,
    work: *mut *mut Work,
) -> i32 {
    // SAFETY: the caller's promise, for all of this body.
    unsafe {
        operate(communicator, limit_ms, work, |ranks, start| {
            apart(&[("input", &input), ("output", &output)])?;
            Ok(ranks.all_to_all(input.buffer("input")?, output.buffer("output")?, start).map(drop))
        })
    }
}

/// Sends a tensor to rank `to`, which receives as many elements of the same type with this tag.
/// Only these two ranks call.
///
/// # Safety
/// As for pillion_all_gather.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pillion_send(
    communicator: *const Communicator,
    tensor: Tensor,
    to: usize,
    tag: u32,
    limit_ms: u64,
    work: *mut *mut Work,
) -> i32 {
    // SAFETY: the caller's promise, for all of this body.
    unsafe {
        operate(communicator, limit_ms, work, |ranks, start| {
            Ok(ranks.send_tagged(tensor.buffer("tensor")?, to, tag, start).map(drop))
        })
    }
}

/// The tensor = what rank `from` sends with this tag. Only these two ranks call.
///
/// # Safety
/// As for pillion_all_gather.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pillion_receive(
    communicator: *const Communicator,
    tensor: Tensor,
    from: usize,
    tag: u32,
    limit_ms: u64,
    work: *mut *mut Work,
) -> i32 {
    // SAFETY: the caller's promise, for all of this body.
    unsafe {
        operate(communicator, limit_ms, work, |ranks, start| {
            Ok(ranks.receive_tagged(tensor.buffer("tensor")?, from, tag, start).map(drop))
        })
    }
}

/// The tensor = the first message with this tag from any rank. Its number is written to `from`
/// before this call returns, or before the call of pillion_wait that finds the work ended. Only
/// this rank and the sender call.
///
/// # Safety
/// As for pillion_all_gather; `from` is NULL, or a place for a number until that is written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pillion_receive_any(
    communicator: *const Communicator,
    tensor: Tensor,
    tag: u32,
    from: *mut usize,
    limit_ms: u64,
    work: *mut *mut Work,
) -> i32 {
    /// A place that the caller of the library lets cross threads.
    struct Place(*mut usize);
    // SAFETY: the caller's promise.
    unsafe impl Send for Place {}
    // SAFETY: the caller's promise, for all of this body.
    unsafe {
        operate(communicator, limit_ms, work, |ranks, start| {
            let place = Place(from);
            let received = ranks.receive_any(tensor.buffer("tensor")?, tag, start);
            Ok(received.map(move |(_, sender)| {
                let place = place;
                if let Some(from) = NonNull::new(place.0) {
                    from.write(sender);
                }
            }))
        })
    }
}

/// A message that has come and has not been received.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Message {
    /// The rank that sent it.
    pub from: usize,
    /// Number of elements.
    pub count: usize,
    /// Their type.
    pub dtype: i32,
}

/// Describes the message that a receive would take now: from rank `from`, or from any where that is
/// SIZE_MAX. PILLION_UNDER_WAY where none has come. Only this rank calls.
///
/// # Safety
/// The communicator is open; `message` is a place for a description.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pillion_probe(
    communicator: *const Communicator,
    from: usize,
    tag: u32,
    message: *mut Message,
) -> i32 {
    guard(|| {
        // SAFETY: the caller's promise.
        let ranks = &unsafe { Communicator::of(communicator) }?.ranks;
        let place = place(message, "message")?;
        let found = ranks.probe((from != usize::MAX).then_some(from), tag)?.ok_or(Failed::UnderWay)?;
        let dtype = DType::ALL.iter().position(|&dtype| dtype == found.dtype).expect("a type is one of all");
        let message = Message { from: found.from, count: found.len, dtype: dtype as i32 };
        // SAFETY: the caller's promise.
        unsafe { place.write(message) };
        Ok(())
    })
}
