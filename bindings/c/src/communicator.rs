//! Ranks that talk: how they meet and part.

use std::ffi::{CStr, c_char};
use std::ptr::NonNull;
use std::sync::Arc;
use std::time::Duration;

use pillion_collectives::{Communicator as Ranks, Error, Launch, Options as CoreOptions};

use crate::arguments::{array, place};
use crate::status::{Failed, guard};
use crate::store::{Foreign, Store};

/// Ranks that talk. Any thread may use it, one at a time. After an error every call returns that
/// first error.
pub struct Communicator {
    pub(crate) ranks: Arc<Ranks>,
    /// Whose it is.
    process: u32,
}

/// Limits of a communicator. Begin with zeros: 0 is the default of every number.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Options {
    /// sizeof(pillion_options), which tells versions of this struct apart.
    pub size: usize,
    /// Milliseconds after which an operation fails that waits for another rank. Default: 300,000.
    pub timeout_ms: u64,
    /// Milliseconds within which all ranks come. Default: 60,000.
    pub startup_timeout_ms: u64,
    /// Milliseconds after which an operation prints for whom it waits. Default: 10,000.
    pub warn_after_ms: u64,
    /// Groups of ranks in which reductions are computed. Default: 1.
    pub reduce_groups: u64,
}

impl Communicator {
    fn new(ranks: Ranks) -> Communicator {
        Communicator { ranks: Arc::new(ranks), process: std::process::id() }
    }

    /// # Safety
    /// NULL, or a communicator that is open, by the promise of the library's caller.
    pub(crate) unsafe fn of<'a>(communicator: *const Communicator) -> Result<&'a Communicator, Failed> {
        // SAFETY: the caller's promise.
        let communicator = unsafe { communicator.as_ref() };
        let communicator = communicator.ok_or_else(|| Failed::Invalid("communicator is NULL".to_owned()))?;
        if communicator.process == std::process::id() { Ok(communicator) } else { Err(Failed::Forked) }
    }
}

/// # Safety
/// NULL, or options whose first `size` bytes are there, by the promise of the library's caller.
unsafe fn options(given: *const Options) -> Result<CoreOptions, Failed> {
    let defaults = CoreOptions::default();
    // SAFETY: the caller's promise.
    let Some(given) = (unsafe { given.as_ref() }) else { return Ok(defaults) };
    if given.size != size_of::<Options>() {
        let (said, expected) = (given.size, size_of::<Options>());
        return Err(Failed::Invalid(format!("options.size is {said}, and this library has {expected}")));
    }
    let milliseconds = |given: u64, default| if given == 0 { default } else { Duration::from_millis(given) };
    Ok(CoreOptions {
        timeout: milliseconds(given.timeout_ms, defaults.timeout),
        startup_timeout: milliseconds(given.startup_timeout_ms, defaults.startup_timeout),
        warn_after: milliseconds(given.warn_after_ms, defaults.warn_after),
        reduce_groups: given.reduce_groups.max(1) as usize,
        ..defaults
    })
}

/// # Safety
/// A place for a pointer, by the promise of the library's caller.
unsafe fn give(ranks: Ranks, place: NonNull<*mut Communicator>) {
    // SAFETY: the caller's promise.
    unsafe { place.write(Box::into_raw(Box::new(Communicator::new(ranks)))) };
}

/// Joins the ranks of the job that a launcher started (torchrun, mpirun, srun), or a job of this
/// rank alone. `options` may be NULL.
///
/// # Safety
/// `options` is NULL or has its size; `communicator` is a place for a pointer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pillion_connect(given: *const Options, communicator: *mut *mut Communicator) -> i32 {
    guard(|| {
        let place = place(communicator, "communicator")?;
        // SAFETY: the caller's promise.
        let options = unsafe { options(given) }?;
        let launch = Launch::detect().map_err(|error| Failed::Invalid(error.to_string()))?;
        let ranks = Ranks::connect(&launch, options)?;
        // SAFETY: the caller's promise.
        unsafe { give(ranks, place) };
        Ok(())
    })
}

/// Joins `world` ranks, of which this is rank `rank`, through a store of the program. Ranks on
/// several hosts are connected over TCP. `options` may be NULL.
///
/// # Safety
/// As for pillion_connect; the store's functions keep the promises of pillion_store.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pillion_connect_through(
    store: Store,
    rank: usize,
    world: usize,
    given: *const Options,
    communicator: *mut *mut Communicator,
) -> i32 {
    guard(|| {
        // First, because it is released whatever comes next.
        let store = Foreign::new(store).ok_or_else(|| Failed::Invalid("a function of the store is NULL".to_owned()))?;
        let place = place(communicator, "communicator")?;
        // SAFETY: the caller's promise.
        let options = unsafe { options(given) }?;
        let ranks = Ranks::connect_through(Arc::new(store), rank, world, options)?;
        // SAFETY: the caller's promise.
        unsafe { give(ranks, place) };
        Ok(())
    })
}

/// Makes a communicator of some of the ranks, in this order. Only they call.
///
/// # Safety
/// `communicator` is open; `members` has `count` numbers; `group` is a place for a pointer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pillion_group(
    communicator: *const Communicator,
    members: *const usize,
    count: usize,
    group: *mut *mut Communicator,
) -> i32 {
    guard(|| {
        let place = place(group, "group")?;
        // SAFETY: the caller's promise.
        let communicator = unsafe { Communicator::of(communicator) }?;
        // SAFETY: the caller's promise.
        let members = unsafe { array(members, count, "members") }?;
        let ranks = communicator.ranks.group(members)?;
        // SAFETY: the caller's promise.
        unsafe { give(ranks, place) };
        Ok(())
    })
}

/// This rank's number, from 0; SIZE_MAX for no communicator. Only this rank calls.
///
/// # Safety
/// `communicator` is NULL or open.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pillion_rank(communicator: *const Communicator) -> usize {
    // SAFETY: the caller's promise.
    unsafe { communicator.as_ref() }.map_or(usize::MAX, |communicator| communicator.ranks.rank())
}

/// The number of ranks; 0 for no communicator. Only this rank calls.
///
/// # Safety
/// `communicator` is NULL or open.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pillion_world(communicator: *const Communicator) -> usize {
    // SAFETY: the caller's promise.
    unsafe { communicator.as_ref() }.map_or(0, |communicator| communicator.ranks.world())
}

/// The number of hosts that the ranks are on; 0 for no communicator. Only this rank calls.
///
/// # Safety
/// `communicator` is NULL or open.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pillion_hosts(communicator: *const Communicator) -> usize {
    // SAFETY: the caller's promise.
    unsafe { communicator.as_ref() }.map_or(0, |communicator| communicator.ranks.hosts())
}

/// The communicator's first error, if there was one. Only this rank calls.
///
/// # Safety
/// `communicator` is open.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pillion_health(communicator: *const Communicator) -> i32 {
    guard(|| {
        // SAFETY: the caller's promise.
        Ok(unsafe { Communicator::of(communicator) }?.ranks.healthy()?)
    })
}

/// Gives up: calls here, and on every other rank once it next waits, return PILLION_ABORTED with
/// this reason. Only this rank calls.
///
/// # Safety
/// `communicator` is open; `reason` is NULL or ends with a zero byte.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pillion_abort(communicator: *const Communicator, reason: *const c_char) -> i32 {
    guard(|| {
        // SAFETY: the caller's promise.
        let communicator = unsafe { Communicator::of(communicator) }?;
        // SAFETY: the caller's promise.
        let reason = NonNull::new(reason.cast_mut()).map(|reason| unsafe { CStr::from_ptr(reason.as_ptr()) });
        communicator.ranks.abort(&reason.unwrap_or(c"no reason given").to_string_lossy());
        Ok(())
    })
}

/// Waits for the operations under way, and leaves. NULL does nothing; a forked child leaves it to
/// its parent.
///
/// # Safety
/// `communicator` is open, and no thread uses it. Works of it may be released later.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pillion_close(communicator: *mut Communicator) -> i32 {
    guard(|| {
        if communicator.is_null() {
            return Ok(());
        }
        // SAFETY: the caller's promise.
        match unsafe { Communicator::of(communicator) } {
            Err(Failed::Forked) => return Ok(()),
            known => known?,
        };
        // SAFETY: made by `give`, and closed once.
        drop(unsafe { Box::from_raw(communicator) });
        Ok(())
    })
}

/// Blocks until every rank has called. `limit_ms`: 0 for the communicator's own limit.
///
/// # Safety
/// `communicator` is open.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pillion_barrier(communicator: *const Communicator, limit_ms: u64) -> i32 {
    guard(|| {
        // SAFETY: the caller's promise.
        let ranks = &unsafe { Communicator::of(communicator) }?.ranks;
        let barrier: Result<(), Error> = match limit_ms {
            0 => ranks.barrier(),
            limit_ms => ranks.barrier_within(Duration::from_millis(limit_ms)),
        };
        Ok(barrier?)
    })
}
