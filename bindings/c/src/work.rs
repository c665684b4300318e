//! Operations under way.

use std::ffi::c_void;
use std::ptr::NonNull;
use std::sync::Arc;
use std::task::{Poll, Wake, Waker};
use std::time::{Duration, Instant};

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
        // Kept while the operation runs, whatever another thread closes meanwhile.
        // SAFETY: the caller's promise.
        let ranks = unsafe { Communicator::of(communicator) }?.ranks.clone();
        let pending = run(&ranks, start(limit_ms, work.is_null()))?;
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
        let ended = WhenEnded { event: self.event.clone(), then: Mutex::new(Some(Box::new(then))) };
        self.event.call_back(&Waker::from(Arc::new(ended)));
    }

    /// Whether the work has ended within `limit`; without one, once it has. Any number of threads
    /// may wait at a time.
    fn ends_within(&self, limit: Option<Duration>) -> Result<bool, Failed> {
        // The first one waits as a caller that drives the operation; its memory is the work's.
        let pending = self.state.lock().take();
        let ended = match (pending, limit) {
            (Some(pending), None) => return Ok(pending.wait().map(|()| true)?),
            (Some(pending), Some(limit)) => match pending.wait_timeout(limit) {
                Ok(result) => return Ok(result.map(|()| true)?),
                Err(pending) => {
                    *self.state.lock() = Some(pending);
                    false
                }
            },
            (None, None) => {
                self.event.wait().map_err(Error::from)?;
                true
            }
            (None, Some(limit)) => {
                let since = Instant::now();
                while self.event.status().is_pending() && since.elapsed() < limit {
                    std::thread::sleep(LOOK_EVERY);
                }
                let status = self.event.status();
                match status {
                    Poll::Ready(result) => result.map(|()| true).map_err(Error::from)?,
                    Poll::Pending => false,
                }
            }
        };
        Ok(ended)
    }
}

/// How often a thread looks at a work that another one drives.
const LOOK_EVERY: Duration = Duration::from_micros(100);

type Then = Box<dyn FnOnce(Result<(), Error>) + Send>;

/// What is called once, when an event has ended.
struct WhenEnded {
    event: Event,
    then: Mutex<Option<Then>>,
}

impl Wake for WhenEnded {
    fn wake(self: Arc<Self>) {
        // It may be woken before the event has ended.
        let Poll::Ready(result) = self.event.status() else { return };
        let then = self.then.lock().take();
        if let Some(then) = then {
            then(result.map_err(Error::from));
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
        let limit = (limit_ms > 0).then(|| Duration::from_millis(limit_ms));
        if work.ends_within(limit)? { Ok(()) } else { Err(Failed::UnderWay) }
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
            Poll::Pending => Err(Failed::UnderWay),
            Poll::Ready(result) => Ok(result.map_err(Error::from)?),
        }
    })
}

/// Calls `callback` with `context` and the result's code once the work has ended: on a thread of
/// this library, or at once. The callback returns soon; it neither waits for operations nor starts
/// any, and does not release the work. Only this rank calls.
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
