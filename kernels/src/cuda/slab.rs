//! The memory of one rank on its GPU: one allocation, from which every buffer is cut. One can be
//! shared with other processes by one handle, and registered with NCCL by one call.

use std::any::Any;
use std::ptr::NonNull;
use std::sync::Arc;

use cudarc::driver::sys::CUdeviceptr;
use parking_lot::Mutex;

use super::context::Context;
use super::mapped::Mapped;
use super::{CudaError, Inner};
use crate::{Range, Ranges, Region, Space};

/// Buffers start at multiples of this many bytes: any vector access and cuBLAS's fastest kernels
/// are aligned then.
const PAGE: u64 = 256;

/// The one allocation of a rank.
pub(super) struct Slab {
    pub(super) mapped: Mapped,
    ranges: Mutex<InUse>,
}

struct InUse {
    ranges: Ranges,
    used: u64,
    /// Ranges whose buffers are gone, but which enqueued work may still touch.
    dropped: Vec<Range>,
}

impl Slab {
    /// Maps `bytes` bytes or a little more.
    pub(super) fn map(context: &Arc<Context>, bytes: u64) -> Result<Slab, CudaError> {
        let ranges = InUse { ranges: Ranges::new(PAGE, PAGE), used: 0, dropped: Vec::new() };
        Ok(Slab { mapped: Mapped::make(context, bytes)?, ranges: Mutex::new(ranges) })
    }

    /// Bytes in use.
    pub(super) fn used(&self) -> u64 {
        self.ranges.lock().used
    }

    /// A range that nobody uses. Its contents are what was there before. Where only dropped ranges
    /// would do, `synchronize` waits for the work that may touch them, and says whether they are
    /// free then.
    fn take(&self, bytes: u64, synchronize: impl FnOnce() -> bool) -> Result<Range, CudaError> {
        if let Some(range) = self.find(bytes) {
            return Ok(range);
        }
        // Without the lock, because other threads drop buffers meanwhile. What they drop now may
        // still be in use after the wait.
        let dropped = std::mem::take(&mut self.ranges.lock().dropped);
        if dropped.is_empty() || !synchronize() {
            self.ranges.lock().dropped.extend(dropped);
        } else {
            let mut state = self.ranges.lock();
            dropped.into_iter().for_each(|range| state.ranges.give_back(range));
        }
        let (ordinal, slab) = (self.mapped.ordinal(), self.mapped.bytes);
        let refused = || CudaError::NoRoom { ordinal, bytes, used: self.used(), slab };
        self.find(bytes).ok_or_else(refused)
    }

    /// A free range, if there is one.
    fn find(&self, bytes: u64) -> Option<Range> {
        if bytes > self.mapped.bytes {
            return None;
        }
        let mut state = self.ranges.lock();
        let range = state.ranges.take(bytes);
        if range.offset + range.bytes > self.mapped.bytes {
            state.ranges.give_back(range);
            return None;
        }
        state.used += range.bytes;
        Some(range)
    }

    /// The first `bytes` bytes, for as long as the slab lives. To be called before anything else is
    /// taken.
    pub(super) fn first(&self, bytes: u64) -> Result<CUdeviceptr, CudaError> {
        let range = self.take(bytes, || false)?;
        assert_eq!(range.offset, 0, "something was taken before");
        Ok(self.mapped.start)
    }

    fn put_back(&self, range: Range) {
        let mut state = self.ranges.lock();
        state.used -= range.bytes;
        state.dropped.push(range);
    }
}

/// A range in use, which goes back to its slab.
struct Owned {
    inner: Arc<Inner>,
    range: Range,
}

impl Drop for Owned {
    fn drop(&mut self) {
        self.inner.slab.put_back(self.range);
    }
}

/// Memory of `bytes` bytes from the slab of a rank, with what was there before.
pub(super) fn region(inner: &Arc<Inner>, bytes: u64) -> Result<Region, CudaError> {
    // Work that is still enqueued may touch a range that was dropped: it is handed out again after
    // that work only, and never after a failure.
    let range = inner.slab.take(bytes, || inner.is_idle())?;
    let owner: Box<dyn Any + Send + Sync> = Box::new(Owned { inner: inner.clone(), range });
    let start = std::ptr::with_exposed_provenance_mut((inner.slab.mapped.start + range.offset) as usize);
    let start = NonNull::new(start).expect("the driver maps nothing at 0");
    // SAFETY: the range is of the slab, which `owner` keeps mapped, and nobody else's: `Slab::take`
    // hands out each byte once at a time. `Ranges` are whole pages, at least `bytes` long.
    let region = unsafe { Region::from_raw(start, bytes as usize, Space::Device(inner.context.ordinal), owner) };
    Ok(region.deferred())
}
