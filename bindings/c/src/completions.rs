//! Where works say that they have ended, for programs in which no foreign thread may run code.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use pillion_collectives::Error;

use crate::arguments::place;
use crate::status::{Failed, guard};
use crate::work::Work;

/// A queue of works that have ended. Any thread may use it at any time.
pub struct Completions {
    queue: Arc<Queue>,
}

#[derive(Default)]
struct Queue {
    ended: Mutex<VecDeque<(u64, Result<(), Error>)>>,
    some: Condvar,
}

impl Queue {
    fn put(&self, token: u64, result: Result<(), Error>) {
        self.ended.lock().push_back((token, result));
        self.some.notify_one();
    }
}

impl Completions {
    /// # Safety
    /// NULL, or completions that have not been freed, by the promise of the library's caller.
    unsafe fn of<'a>(completions: *const Completions) -> Result<&'a Completions, Failed> {
        // SAFETY: the caller's promise.
        unsafe { completions.as_ref() }.ok_or_else(|| Failed::Invalid("completions is NULL".to_owned()))
    }
}

/// Makes an empty queue of works that have ended. Only this rank calls.
///
/// # Safety
/// `completions` is a place for a pointer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pillion_completions_new(completions: *mut *mut Completions) -> i32 {
    guard(|| {
        let place = place(completions, "completions")?;
        let new = Box::new(Completions { queue: Arc::default() });
        // SAFETY: the caller's promise.
        unsafe { place.write(Box::into_raw(new)) };
        Ok(())
    })
}

/// Puts `token` into the queue once the work has ended. The work may be released before. Only this
/// rank calls.
///
/// # Safety
/// `work` has not been released, and `completions` not been freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pillion_notify(work: *const Work, completions: *const Completions, token: u64) -> i32 {
    guard(|| {
        // SAFETY: the caller's promise.
        let (work, completions) = unsafe { (Work::of(work)?, Completions::of(completions)?) };
        let queue = completions.queue.clone();
        work.when_ended(move |result| queue.put(token, result));
        Ok(())
    })
}

/// Puts `token` into the queue now, as that of a work that ended well. Only this rank calls.
///
/// # Safety
/// `completions` has not been freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pillion_wake(completions: *const Completions, token: u64) -> i32 {
    guard(|| {
        // SAFETY: the caller's promise.
        let queue = unsafe { Completions::of(completions) }?.queue.clone();
        // Whoever takes the token may free the completions before this returns.
        queue.put(token, Ok(()));
        Ok(())
    })
}

/// Waits until the queue has a token, or for `limit_ms` milliseconds: then PILLION_UNDER_WAY.
/// Otherwise takes the first token out, writes it, and returns how its work ended. Only this rank
/// calls.
///
/// # Safety
/// `completions` has not been freed; `token` is a place for a number.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pillion_next(completions: *const Completions, limit_ms: u64, token: *mut u64) -> i32 {
    guard(|| {
        // SAFETY: the caller's promise.
        let queue = &unsafe { Completions::of(completions) }?.queue;
        let place = place(token, "token")?;
        let until = Instant::now().checked_add(Duration::from_millis(limit_ms));
        let mut ended = queue.ended.lock();
        while ended.is_empty() {
            match until {
                Some(until) if queue.some.wait_until(&mut ended, until).timed_out() && ended.is_empty() => {
                    return Err(Failed::UnderWay);
                }
                Some(_) => {}
                // Later than the clock can say.
                None => queue.some.wait(&mut ended),
            }
        }
        let (token, result) = ended.pop_front().expect("it is not empty");
        // SAFETY: the caller's promise.
        unsafe { place.write(token) };
        Ok(result?)
    })
}

/// Frees the queue. Works that it waits for go on. NULL does nothing. Only this rank calls.
///
/// # Safety
/// `completions` has not been freed before, and no thread uses it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pillion_completions_free(completions: *mut Completions) -> i32 {
    guard(|| {
        if !completions.is_null() {
            // SAFETY: made by pillion_completions_new, and freed once.
            drop(unsafe { Box::from_raw(completions) });
        }
        Ok(())
    })
}
