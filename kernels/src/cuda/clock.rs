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
/// minute is exact to 4 µs.
const AGE: Duration = Duration::from_secs(10);

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
        let anchor = Mutex::new(Arc::new(Anchor::drop_at(&pool, idle)?));
        Ok(Clock { pool, anchor })
    }

    /// Begins to count from now, if the anchor is old. `idle` is a stream whose work has all run.
    pub(super) fn renew(&self, idle: CUstream) -> Result<(), CudaError> {
        let mut anchor = self.anchor.lock();
        if anchor.time.elapsed() > AGE {
            *anchor = Arc::new(Anchor::drop_at(&self.pool, idle)?);
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
    fn drop_at(pool: &Arc<Pool>, idle: CUstream) -> Result<Anchor, CudaError> {
        let recorded = Recorder { pool, stream: idle }.record()?;
        recorded.wait()?;
        Ok(Anchor { recorded, time: Instant::now() })
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
