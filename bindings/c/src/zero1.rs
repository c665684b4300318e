//! The optimizer of a trainer that has its parameters and gradients in one array each: ZeRO-1.

use std::ffi::c_void;
use std::ptr::NonNull;

use pillion_kernels::Cpu;

use crate::arguments::place;
use crate::communicator::Communicator;
use crate::memory::{PILLION_F32, Tensor, apart};
use crate::status::{Failed, guard};
use crate::training::{Adamw, Report};

/// AdamW's state of the caller's parameters, divided among the ranks. One thread uses it at a time.
pub struct Zero1 {
    zero1: pillion_runtime::Zero1,
    settings: Adamw,
}

impl Zero1 {
    /// # Safety
    /// NULL, or a state that has not been freed, which no other thread uses, by the promise of the
    /// library's caller.
    unsafe fn of<'a>(zero1: *mut Zero1) -> Result<&'a mut Zero1, Failed> {
        // SAFETY: the caller's promise.
        unsafe { zero1.as_mut() }.ok_or_else(|| Failed::Invalid("zero1 is NULL".to_owned()))
    }
}

/// Divides AdamW's state of n parameters among the ranks; the parameters become those of rank 0.
/// Both arrays stay the caller's: it computes gradients into `grads` and calls pillion_step.
///
/// # Safety
/// The communicator is open; `params` and `grads` have n floats until pillion_zero1_free, and
/// nobody touches them during calls; `settings` is a struct and `zero1` a place for a pointer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pillion_zero1_new(
    communicator: *const Communicator,
    params: *mut f32,
    grads: *mut f32,
    n: usize,
    settings: *const Adamw,
    zero1: *mut *mut Zero1,
) -> i32 {
    guard(|| {
        // SAFETY: the caller's promise, for all of this body.
        unsafe {
            let ranks = Communicator::of(communicator)?.ranks.clone();
            let place = place(zero1, "zero1")?;
            let settings = Adamw::read(settings)?;
            let of = |data: *mut f32| Tensor { data: data.cast::<c_void>(), count: n, dtype: PILLION_F32 };
            let (params, grads) = (of(params), of(grads));
            apart(&[("params", &params), ("grads", &grads)])?;
            let (params, grads) = (params.buffer("params")?, grads.buffer("grads")?);
            let zero1 = pillion_runtime::Zero1::new(ranks, &Cpu, params, grads, settings.limit())?;
            place.write(Box::into_raw(Box::new(Zero1 { zero1, settings })));
            Ok(())
        }
    })
}

/// Sums the ranks' gradients, updates the parameters with their mean over tokens, and gathers them.
/// `grads` has the gradient of the loss summed over this rank's `tokens` tokens, and `loss_sum` is
/// that loss. Where gradients are means over as many tokens on every rank, give their mean loss and
/// 1. The gradients are not zeroed. `report` may be NULL.
///
/// PILLION_NO_UPDATE says that no parameter was changed on any rank, and training can go on.
///
/// # Safety
/// `zero1` has not been freed; `report` is NULL or a place for a report.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pillion_step(
    zero1: *mut Zero1,
    lr: f32,
    loss_sum: f64,
    tokens: u64,
    report: *mut Report,
) -> i32 {
    guard(|| {
        // SAFETY: the caller's promise.
        let Zero1 { zero1, settings } = unsafe { Zero1::of(zero1) }?;
        let done = zero1.step(&settings.at(lr)?, loss_sum, tokens)?;
        if let Some(report) = NonNull::new(report) {
            // SAFETY: the caller's promise.
            unsafe { report.write(Report::of(&done)) };
        }
        Ok(())
    })
}

/// What a checkpoint needs besides the parameters: the first and second moments of the parameters
/// first, first + 1, ..., `count` floats each, which this rank updates, and the number of updates.
/// A run that goes on writes the moments, and calls pillion_zero1_resume. Only this rank calls.
///
/// # Safety
/// `zero1` has not been freed; the others are places for the results. The moments last as long as
/// `zero1`, and are not touched during steps.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pillion_zero1_state(
    zero1: *mut Zero1,
    first: *mut usize,
    count: *mut usize,
    m: *mut *mut f32,
    v: *mut *mut f32,
    updates: *mut u64,
) -> i32 {
    guard(|| {
        if first.is_null() || count.is_null() || m.is_null() || v.is_null() || updates.is_null() {
            return Err(Failed::Invalid("a place for a result is NULL".to_owned()));
        }
        // SAFETY: the caller's promise, for all of this block.
        unsafe {
            let Zero1 { zero1, .. } = Zero1::of(zero1)?;
            let own = zero1.own();
            let (own_m, own_v, own_updates) = zero1.state_mut();
            let own_updates = *own_updates;
            first.write(own.start);
            count.write(own.len());
            m.write(own_m.view_mut().raw().pointer.as_ptr().cast());
            v.write(own_v.view_mut().raw().pointer.as_ptr().cast());
            updates.write(own_updates);
        }
        Ok(())
    })
}

/// Says how many updates there have been, before the first step of a run that goes on. Only this
/// rank calls.
///
/// # Safety
/// `zero1` has not been freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pillion_zero1_resume(zero1: *mut Zero1, updates: u64) -> i32 {
    guard(|| {
        // SAFETY: the caller's promise.
        *unsafe { Zero1::of(zero1) }?.zero1.state_mut().2 = updates;
        Ok(())
    })
}

/// Frees the state; the arrays stay the caller's. NULL does nothing. Only this rank calls.
///
/// # Safety
/// `zero1` has not been freed before.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pillion_zero1_free(zero1: *mut Zero1) -> i32 {
    guard(|| {
        if !zero1.is_null() {
            // SAFETY: made by pillion_zero1_new, and freed once.
            drop(unsafe { Box::from_raw(zero1) });
        }
        Ok(())
    })
}
