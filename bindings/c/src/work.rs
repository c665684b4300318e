//! Operations under way.

use std::ffi::c_void;
use std::ptr::NonNull;
use std::time::Duration;

use parking_lot::Mutex;
use pillion_collectives::{Communicator as Ranks, Error, Pending, Start};
use pillion_kernels::Event;

use crate::communicator::Communicator;
use crate::status::{Failed, PILLION_OK, guard};

/// An operation under way. Its memory stays as it is until the work has ended.
pub struct Work {
    process: u32,
    state: Mutex<Option<Pending<()>>>,
    event: Event,
}

/// When an operation starts. `limit_ms`: 0 for the communicator's own limit.
fn start(limit_ms: u64, blocks: bool) -> Start {
    match (limit_ms, blocks) {
        (0, true) => Start::Here,
        (0, false) => Start::After(Event::PAST),
        (limit_ms, _) => Start::Within { event: Event::PAST, limit: Duration::from_millis(limit_ms) },
    }
}

/// An operation, which `run` begins. It is waited for where `work` is NULL, and else handed out.
///
/// # Safety
/// The communicator is open, and `work` is NULL or a place for a pointer, by the promise of the
/// library's caller.
pub(crate) unsafe fn operate(
    communicator: *const Communicator,
    limit_ms: u64,
    work: *mut *mut Work,
    run: impl FnOnce(&Ranks, Start) -> Result<Pending<()>, Failed>,
) -> i32 {
    guard(|| {
        // SAFETY: the caller's promise.
        let ranks = &unsafe { Communicator::of(communicator) }?.ranks;
        let pending = run(ranks, start(limit_ms, work.is_null()))?;
        let Some(place) = NonNull::new(work) else { return Ok(pending.wait()?) };
        let (process, event) = (std::process::id(), pending.event());
        let work = Box::new(Work { process, state: Mutex::new(Some(pending)), event });
        // SAFETY: the caller's promise.
        unsafe { place.write(Box::into_raw(work)) };
        Ok(())
    })
}

impl Work {
    /// # Safety
    /// A work that has not been released, by the promise of the library's caller.
    pub(crate) unsafe fn of<'a>(work: *const Work) -> Result<&'a Work, Failed> {
        // SAFETY: the caller's promise.
        let work = unsafe { work.as_ref() }.ok_or_else(|| Failed::Invalid("work is NULL".to_owned()))?;
        if work.process == std::process::id() { Ok(work) } else { Err(Failed::Forked) }
    }

    /// Calls `then` with the result: on the thread that ends the work, or at once.
    pub(crate) fn when_ended(&self, then: impl FnOnce(Result<(), Error>) + Send + 'static) {
        let state = self.state.lock();
        match &*state {
            Some(pending) => pending.on_complete(then),
            // It has ended before; the event has the result.
            None => then(self.event.wait().map_err(Error::from)),
        }
    }
}

/// Waits until the work has ended, or for `limit_ms` milliseconds: then PILLION_UNDER_WAY, and the
/// work goes on. 0 waits as long as the operation's own limit lets it. May be called again. Only
/// this rank calls.
///
/// # Safety
/// `work` has not been released.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pillion_wait(work: *const Work, limit_ms: u64) -> i32 {
    guard(|| {
        // SAFETY: the caller's promise.
        let work = unsafe { Work::of(work) }?;
        let mut state = work.state.lock();
        let Some(pending) = state.take() else {
            // It has ended before; the event has the result.
            return Ok(work.event.wait().map_err(Error::from)?);
        };
        if limit_ms == 0 {
            return Ok(pending.wait()?);
        }
        match pending.wait_timeout(Duration::from_millis(limit_ms)) {
            Ok(result) => Ok(result?),
            Err(pending) => {
                *state = Some(pending);
                Err(Failed::UnderWay)
            }
        }
    })
}

/// PILLION_OK where the work has ended well, its error where it has failed, and PILLION_UNDER_WAY
/// else. Does not wait. Only this rank calls.
///
/// # Safety
/// `work` has not been released.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pillion_test(work: *const Work) -> i32 {
    guard(|| {
        // SAFETY: the caller's promise.
        let work = unsafe { Work::of(work) }?;
        match work.event.status() {
            std::task::Poll::Pending => Err(Failed::UnderWay),
            std::task::Poll::Ready(result) => Ok(result.map_err(Error::from)?),
        }
    })
}

/// Calls `callback` with `context` and the result's code once the work has ended: on a thread of
/// this library, or at once. The callback returns soon, and neither waits for operations nor
/// starts any. Only this rank calls.
///
/// # Safety
/// `work` has not been released; `callback` may be called on any thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pillion_on_complete(
    work: *const Work,
    callback: Option<unsafe extern "C" fn(*mut c_void, i32)>,
    context: *mut c_void,
) -> i32 {
    /// A pointer that the caller of the library lets cross threads.
    struct Context(*mut c_void);
    // SAFETY: the caller's promise.
    unsafe impl Send for Context {}
    guard(|| {
        // SAFETY: the caller's promise.
        let work = unsafe { Work::of(work) }?;
        let callback = callback.ok_or_else(|| Failed::Invalid("callback is NULL".to_owned()))?;
        let context = Context(context);
        let call = move |code: i32| {
            let context = context;
            // SAFETY: the caller's promise.
            unsafe { callback(context.0, code) };
        };
        work.when_ended(move |result| call(result.map_or_else(|error| error.code(), |()| PILLION_OK)));
        Ok(())
    })
}

/// Gives a work up. Where it is under way, the call waits for it, so that its memory is the
/// caller's again. NULL does nothing. Only this rank calls.
///
/// # Safety
/// `work` has not been released before.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pillion_release(work: *mut Work) -> i32 {
    guard(|| {
        if work.is_null() {
            return Ok(());
        }
        // SAFETY: the caller's promise.
        unsafe { Work::of(work) }?;
        // SAFETY: made by `operate`, and released once.
        drop(unsafe { Box::from_raw(work) });
        Ok(())
    })
}
