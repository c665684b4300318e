//! Times of a GPU, as times of the host.

use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use cudarc::driver::sys::{CUevent, CUresult, CUstream};
use parking_lot::Mutex;

use super::CudaError;
use super::driver::check;
use super::event::{Pool, Recorded, Recorder};
use super::library;
use crate::stamp::Timed;

/// For how long times count from one anchor. The driver gives an f32 of milliseconds, which after a
/// second is exact to 0.1 µs.
const AGE: Duration = Duration::from_secs(1);
/// How exact an anchor should be, how often it is tried, and for how long the host waits for one: an
/// idle stream comes to it at once.
const EXACT: Duration = Duration::from_micros(50);
const TRIES: usize = 3;
const LATE: Duration = Duration::from_millis(1);
/// For how long the host waits for the first one.
const START: Duration = Duration::from_secs(60);

/// A moment whose time is known on the GPU and on the host.
pub(super) struct Anchor {
    recorded: Recorded,
    time: Instant,
}

/// The anchor that times count from now.
pub(super) struct Clock {
    pool: Arc<Pool>,
    anchor: Mutex<Arc<Anchor>>,
}

impl Clock {
    /// `idle` is a stream that nothing is enqueued in.
    pub(super) fn new(pool: Arc<Pool>, idle: CUstream) -> Result<Clock, CudaError> {
        elapsed_time()?;
        let hung = CudaError::Hung { ordinal: pool.ordinal(), seconds: START.as_secs_f64() };
        let anchor = Mutex::new(Arc::new(Anchor::set(&pool, idle, START)?.ok_or(hung)?));
        Ok(Clock { pool, anchor })
    }

    /// Begins to count from now, if the anchor is old. `idle` is a stream whose work has all run.
    pub(super) fn renew(&self, idle: CUstream) -> Result<(), CudaError> {
        let age = self.anchor.lock().time.elapsed();
        if age > AGE
            && let Some(anchor) = Anchor::set(&self.pool, idle, LATE)?
        {
            *self.anchor.lock() = Arc::new(anchor);
        }
        Ok(())
    }

    /// The place behind what is enqueued in a stream.
    pub(super) fn stamp(&self, stream: CUstream) -> Result<Stamped, CudaError> {
        let anchor = self.anchor.lock().clone();
        Ok(Stamped { recorded: Recorder { pool: &self.pool, stream }.record()?, anchor })
    }
}

impl Anchor {
    /// The moment at which an idle stream comes to an event; None where it does not come so far
    /// in time.
    fn set(pool: &Arc<Pool>, idle: CUstream, within: Duration) -> Result<Option<Anchor>, CudaError> {
        let (began, mut best) = (Instant::now(), None);
        for _ in 0..TRIES {
            let recorded = Recorder { pool, stream: idle }.record()?;
            // It happens between two looks, of which the system may keep this thread.
            let mut before = Instant::now();
            while !recorded.has_happened()? {
                if began.elapsed() > within {
                    return Ok(best.map(|(_, anchor)| anchor));
                }
                before = Instant::now();
                std::hint::spin_loop();
            }
            let (time, unsure) = (Instant::now(), before.elapsed());
            if best.as_ref().is_none_or(|&(least, _)| unsure < least) {
                best = Some((unsure, Anchor { recorded, time }));
            }
            if unsure <= EXACT {
                break;
            }
        }
        Ok(best.map(|(_, anchor)| anchor))
    }
}

/// A place in a stream of a GPU.
pub(super) struct Stamped {
    recorded: Recorded,
    anchor: Arc<Anchor>,
}

impl Timed for Stamped {
    fn time(&self) -> Option<Instant> {
        let happened = self.recorded.has_happened();
        if !happened.is_ok_and(|happened| happened) {
            return None;
        }
        let mut milliseconds: f32 = 0.0;
        let (from, to) = (self.anchor.recorded.event(), self.recorded.event());
        // SAFETY: a pointer to a local, and events that live, were recorded and have happened.
        let result = unsafe { elapsed_time().ok()?(&mut milliseconds, from, to) };
        check("cuEventElapsedTime", result).ok()?;
        // What a stream came to before the anchor was made is at the anchor.
        Some(self.anchor.time + Duration::from_secs_f64(f64::from(milliseconds.max(0.0)) / 1e3))
    }
}

type ElapsedTime = unsafe extern "C" fn(*mut f32, CUevent, CUevent) -> CUresult;

/// cuEventElapsedTime. cudarc knows only the name that drivers have since CUDA 12.8.
fn elapsed_time() -> Result<ElapsedTime, CudaError> {
    static FUNCTION: OnceLock<Result<ElapsedTime, CudaError>> = OnceLock::new();
    // SAFETY: the type is that of cuda.h.
    FUNCTION.get_or_init(|| unsafe { library::DRIVER.function("cuEventElapsedTime") }).clone()
}
