//! Events of streams, and the thread that watches them.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::task::{Poll, Wake, Waker};
use std::thread::Thread;
use std::time::{Duration, Instant};

use cudarc::driver::sys::{CUevent, CUevent_flags, CUresult, CUstream, cuEventQuery};
use parking_lot::Mutex;

use super::context::Context;
use super::driver::{call, check};
use super::patience::Patience;
use super::{CudaError, Inner};
use crate::{Completion, Event, Failure, Status};

/// How long a waiting thread asks again and again before it sleeps in between.
const SPIN: Duration = Duration::from_micros(20);
/// How long it sleeps.
const NAP: Duration = Duration::from_micros(20);

/// Events of a GPU that are not in use.
pub(super) struct Pool {
    context: Arc<Context>,
    /// Of the driver, for new events.
    flags: CUevent_flags,
    free: Mutex<Vec<Handle>>,
    patience: Patience,
}

struct Handle(CUevent);

// SAFETY: the driver's handles may be used from any thread.
unsafe impl Send for Handle {}
// SAFETY: as above.
unsafe impl Sync for Handle {}

impl Pool {
    /// Of events that have no times, because recording those takes longer.
    pub(super) fn new(context: &Arc<Context>) -> Arc<Pool> {
        Pool::with(context, CUevent_flags::CU_EVENT_DISABLE_TIMING)
    }

    /// The GPU's number.
    pub(super) fn ordinal(&self) -> u32 {
        self.context.ordinal
    }

    /// How long the host waits for a GPU that comes to none of these events.
    pub(super) fn patience(&self) -> &Patience {
        &self.patience
    }

    /// Of events that have times.
    pub(super) fn timed(context: &Arc<Context>) -> Arc<Pool> {
        Pool::with(context, CUevent_flags::CU_EVENT_DEFAULT)
    }

    fn with(context: &Arc<Context>, flags: CUevent_flags) -> Arc<Pool> {
        Arc::new(Pool { context: context.clone(), flags, free: Mutex::default(), patience: Patience::default() })
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        if self.context.may_release() {
            for Handle(event) in self.free.get_mut().drain(..) {
                // SAFETY: created in `Recorder::record`, destroyed once.
                unsafe {
                    let _ = call!(cuEventDestroy_v2(event));
                }
            }
        }
    }
}

/// A moment of a stream, as the driver knows it. It goes back to its pool with the last reference:
/// work that waits for it has taken the moment over when it was enqueued.
#[derive(Clone)]
pub(super) struct Recorded(Arc<Record>);

pub(super) struct Record {
    pool: Arc<Pool>,
    event: Handle,
    happened: AtomicBool,
}

impl Drop for Record {
    fn drop(&mut self) {
        self.pool.free.lock().push(Handle(self.event.0));
    }
}

impl Record {
    /// Whether somebody has seen that it has happened.
    pub(super) fn is_known(&self) -> bool {
        self.happened.load(Ordering::Acquire)
    }
}

impl From<Arc<Record>> for Recorded {
    fn from(record: Arc<Record>) -> Recorded {
        Recorded(record)
    }
}

impl Recorded {
    pub(super) fn event(&self) -> CUevent {
        self.0.event.0
    }

    /// Whether the stream has come so far.
    pub(super) fn has_happened(&self) -> Result<bool, CudaError> {
        if self.0.is_known() {
            return Ok(true);
        }
        self.0.pool.context.bind()?;
        // SAFETY: the event lives.
        match unsafe { cuEventQuery(self.event()) } {
            CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            result => {
                check("cuEventQuery", result)?;
                if !self.0.happened.swap(true, Ordering::Release) {
                    self.0.pool.patience.progress();
                }
                Ok(true)
            }
        }
    }

    /// Whether it is known that the stream has come so far, or that it will be asked in vain.
    pub(super) fn has_ended(&self) -> bool {
        !matches!(self.has_happened(), Ok(false))
    }

    /// Blocks the host until then, or until the GPU has made no progress for the pool's patience.
    /// It asks and sleeps in turn, so that an error of the GPU ends the wait: a bare
    /// synchronisation may never return.
    pub(super) fn wait(&self) -> Result<(), CudaError> {
        let (began, pool) = (Instant::now(), &self.0.pool);
        let mut stall = pool.patience.stall();
        while !self.has_happened()? {
            if began.elapsed() < SPIN {
                std::hint::spin_loop();
                continue;
            }
            std::thread::sleep(NAP);
            if let Some(waited) = stall.is_over() {
                pool.context.hang();
                return Err(CudaError::Hung { ordinal: pool.context.ordinal, seconds: waited.as_secs_f64() });
            }
        }
        Ok(())
    }

    /// The same moment, for as long as somebody else keeps it.
    fn downgrade(&self) -> Weak<Record> {
        Arc::downgrade(&self.0)
    }
}

/// Records moments of one stream.
pub(super) struct Recorder<'a> {
    pub(super) pool: &'a Arc<Pool>,
    pub(super) stream: CUstream,
}

impl Recorder<'_> {
    pub(super) fn record(&self) -> Result<Recorded, CudaError> {
        // An event is of the context that is current when it is made.
        self.pool.context.bind()?;
        let reused = self.pool.free.lock().pop();
        let event = match reused {
            Some(event) => event,
            None => {
                let mut event = std::ptr::null_mut();
                // SAFETY: a pointer to a local.
                unsafe { call!(cuEventCreate(&mut event, self.pool.flags as u32))? };
                Handle(event)
            }
        };
        let record = Record { pool: self.pool.clone(), event, happened: AtomicBool::new(false) };
        // SAFETY: the event is in nobody else's hands, and the stream lives.
        unsafe { call!(cuEventRecord(record.event.0, self.stream))? };
        let recorded = Recorded(Arc::new(record));
        self.pool.patience.expect(recorded.downgrade());
        Ok(recorded)
    }
}

/// A moment of a stream, as an event: it fails where the work before it did not run.
pub(super) struct Moment {
    pub(super) recorded: Recorded,
    inner: Arc<Inner>,
    ended: OnceLock<Result<(), Failure>>,
}

impl Moment {
    pub(super) fn event(recorded: Recorded, inner: &Arc<Inner>) -> Event {
        Event::new(Arc::new(Moment { recorded, inner: inner.clone(), ended: OnceLock::new() }))
    }

    /// The rank whose stream it is of.
    pub(super) fn rank(&self) -> &Arc<Inner> {
        &self.inner
    }
}

impl Completion for Moment {
    fn status(&self) -> Status {
        if let Some(result) = self.ended.get() {
            return Poll::Ready(result.clone());
        }
        let result = match self.recorded.has_happened() {
            Ok(false) => return Poll::Pending,
            // What has run may have done nothing, because the latch was set.
            Ok(true) => self.inner.healthy(),
            Err(error) => Err(self.inner.fail(error)),
        };
        Poll::Ready(self.ended.get_or_init(|| result).clone())
    }

    fn call_back(&self, waker: &Waker) {
        match self.status() {
            Poll::Ready(_) => waker.wake_by_ref(),
            Poll::Pending => {
                watcher().add(|lists| lists.moments.push((self.recorded.clone(), waker.clone())));
            }
        }
    }

    fn wait(&self) -> Result<(), Failure> {
        // The status says what the wait has seen.
        let waited = self.recorded.wait();
        match self.status() {
            Poll::Ready(result) => result,
            Poll::Pending => Err(self.inner.fail(waited.expect_err("a wait without an error ends with the moment"))),
        }
    }

    fn origin(&self) -> &dyn Any {
        self
    }
}

/// An event that is no stream's, for which a stream waits at a word of pinned memory.
pub(super) struct Foreign {
    pub(super) event: Event,
    pub(super) inner: Arc<Inner>,
    /// Which word: see [`Latch::word`](super::latch::Latch::word).
    pub(super) word: usize,
}

impl Foreign {
    /// Watches the event until it ends; then writes its word.
    pub(super) fn watch(self) {
        let event = self.event.clone();
        watcher().add(|lists| lists.foreign.push(self));
        event.call_back(&Waker::from(Arc::new(Nudge)));
    }

    /// As [`Foreign::settle`]. A panic of the event's own code ends it with a failure, because
    /// otherwise a stream would wait for ever.
    fn settle_guarded(&self) -> bool {
        catch_unwind(AssertUnwindSafe(|| self.settle())).unwrap_or_else(|_| {
            self.inner.fail_with(Failure::new(std::io::Error::other("an event that a stream waits for panicked")));
            self.inner.latch.release(self.word, false);
            true
        })
    }

    /// Whether the event has ended and its word is written.
    fn settle(&self) -> bool {
        match self.event.advance() {
            Poll::Pending => return false,
            Poll::Ready(Ok(())) => self.inner.latch.release(self.word, true),
            Poll::Ready(Err(failure)) => {
                self.inner.fail_with(failure);
                self.inner.latch.release(self.word, false);
            }
        }
        true
    }
}

/// Tells the watcher that a foreign event may have got further.
struct Nudge;

impl Wake for Nudge {
    fn wake(self: Arc<Self>) {
        watcher().nudge();
    }
}

/// The thread that asks the driver about moments for which somebody wants to be called back, and
/// writes the words of foreign events. The driver's own callbacks may not call the driver, and
/// hold up the stream that calls them.
struct Watcher {
    lists: Mutex<Lists>,
    nudged: AtomicBool,
    thread: OnceLock<Thread>,
}

#[derive(Default)]
struct Lists {
    moments: Vec<(Recorded, Waker)>,
    foreign: Vec<Foreign>,
}

fn watcher() -> &'static Watcher {
    static WATCHER: Watcher = Watcher {
        lists: Mutex::new(Lists { moments: Vec::new(), foreign: Vec::new() }),
        nudged: AtomicBool::new(false),
        thread: OnceLock::new(),
    };
    WATCHER.thread.get_or_init(|| {
        let started = std::thread::Builder::new().name("pillion-cuda-events".to_owned()).spawn(|| WATCHER.run());
        started.expect("the system starts a thread for the events of GPUs").thread().clone()
    });
    &WATCHER
}

impl Watcher {
    fn add(&self, add: impl FnOnce(&mut Lists)) {
        add(&mut self.lists.lock());
        self.nudge();
    }

    fn nudge(&self) {
        self.nudged.store(true, Ordering::Release);
        if let Some(thread) = self.thread.get() {
            thread.unpark();
        }
    }

    fn run(&self) -> ! {
        loop {
            let nudged = self.nudged.swap(false, Ordering::Acquire);
            // Without the lock: events and wakers are foreign code, which may come back here.
            let Lists { mut moments, mut foreign } = std::mem::take(&mut *self.lists.lock());
            if nudged {
                foreign.retain(|event| !event.settle_guarded());
            }
            // An error ends a moment, too, and its status says so.
            let ended = |recorded: &Recorded| !matches!(recorded.has_happened(), Ok(false));
            for (_, waker) in moments.extract_if(.., |(recorded, _)| ended(recorded)) {
                // A waker is foreign code; a panic in it has been printed.
                let _ = catch_unwind(AssertUnwindSafe(|| waker.wake()));
            }
            let watches = !moments.is_empty();
            let mut lists = self.lists.lock();
            lists.moments.append(&mut moments);
            lists.foreign.append(&mut foreign);
            drop(lists);
            if watches { std::thread::park_timeout(NAP) } else { std::thread::park() }
        }
    }
}
