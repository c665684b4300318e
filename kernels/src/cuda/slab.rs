//! The memory of one rank on its GPU: one allocation, from which every buffer is cut.
//!
//! One allocation can be shared with other processes by one handle and registered with NCCL by one
//! call. It is mapped by handle (`cuMemCreate`), because memory of `cudaIpc` cannot be shared in
//! part and dies with the process that made it.

use std::any::Any;
use std::ptr::NonNull;
use std::sync::Arc;

use cudarc::driver::sys::{self, CUdeviceptr, CUmemGenericAllocationHandle};
use parking_lot::Mutex;

use super::context::Context;
use super::driver::call;
use super::{CudaError, Inner};
use crate::{Range, Ranges, Region, Space};

/// Buffers start at multiples of this many bytes: any vector access and cuBLAS's fastest kernels
/// are aligned then.
const PAGE: u64 = 256;

/// One mapped allocation.
pub(super) struct Slab {
    context: Arc<Context>,
    start: CUdeviceptr,
    bytes: u64,
    handle: CUmemGenericAllocationHandle,
    ranges: Mutex<InUse>,
}

struct InUse {
    ranges: Ranges,
    used: u64,
    /// Ranges whose buffers are gone, but which enqueued work may still touch.
    dropped: Vec<Range>,
}

impl Slab {
    /// Maps `bytes` bytes or a little more: the driver maps whole granules of 2 MiB.
    pub(super) fn map(context: &Arc<Context>, bytes: u64) -> Result<Slab, CudaError> {
        context.bind()?;
        let location =
            sys::CUmemLocation { type_: sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE, id: context.device };
        // SAFETY: a structure of numbers and a null pointer, for which zeros are values.
        let mut kind: sys::CUmemAllocationProp = unsafe { std::mem::zeroed() };
        kind.type_ = sys::CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED;
        kind.requestedHandleTypes = sys::CUmemAllocationHandleType::CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
        kind.location = location;
        let access = accesses(context)?;
        let recommended = sys::CUmemAllocationGranularity_flags::CU_MEM_ALLOC_GRANULARITY_RECOMMENDED;
        let (mut granule, mut handle, mut start) = (0, 0, 0);
        // SAFETY: pointers to locals of the types that the driver writes and reads. Each step that
        // fails undoes those before it, so a handle and a range of addresses are given back once.
        unsafe {
            call!(cuMemGetAllocationGranularity(&mut granule, &kind, recommended))?;
            let bytes = bytes.max(1).checked_next_multiple_of(granule.max(1) as u64).unwrap_or(u64::MAX);
            call!(cuMemCreate(&mut handle, bytes as usize, &kind, 0)).map_err(|error| match error {
                CudaError::Call { code, .. } if code == "CUDA_ERROR_OUT_OF_MEMORY" => {
                    CudaError::NoRoom { ordinal: context.ordinal, bytes, used: 0, slab: 0 }
                }
                other => other,
            })?;
            let mapped = call!(cuMemAddressReserve(&mut start, bytes as usize, 0, 0, 0)).and_then(|()| {
                let mapped = call!(cuMemMap(start, bytes as usize, 0, handle, 0)).and_then(|()| {
                    call!(cuMemSetAccess(start, bytes as usize, access.as_ptr(), access.len())).inspect_err(|_| {
                        let _ = call!(cuMemUnmap(start, bytes as usize));
                    })
                });
                mapped.inspect_err(|_| {
                    let _ = call!(cuMemAddressFree(start, bytes as usize));
                })
            });
            if let Err(error) = mapped {
                let _ = call!(cuMemRelease(handle));
                return Err(error);
            }
            let ranges = InUse { ranges: Ranges::new(PAGE, PAGE), used: 0, dropped: Vec::new() };
            Ok(Slab { context: context.clone(), start, bytes, handle, ranges: Mutex::new(ranges) })
        }
    }

    /// Bytes of the whole.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Whether these bytes are of this slab.
    pub(super) fn contains(&self, address: CUdeviceptr, bytes: u64) -> bool {
        address >= self.start && bytes <= self.bytes && address - self.start <= self.bytes - bytes
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
        let ordinal = self.context.ordinal;
        let refused = || CudaError::NoRoom { ordinal, bytes, used: self.used(), slab: self.bytes };
        self.find(bytes).ok_or_else(refused)
    }

    /// A free range, if there is one.
    fn find(&self, bytes: u64) -> Option<Range> {
        if bytes > self.bytes {
            return None;
        }
        let mut state = self.ranges.lock();
        let range = state.ranges.take(bytes);
        if range.offset + range.bytes > self.bytes {
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
        Ok(self.start)
    }

    fn put_back(&self, range: Range) {
        let mut state = self.ranges.lock();
        state.used -= range.bytes;
        state.dropped.push(range);
    }
}

impl Drop for Slab {
    fn drop(&mut self) {
        // Errors have nobody to go to; at the end of the process the driver may be gone.
        if self.context.bind().is_ok() {
            // SAFETY: mapped in `Slab::map`, given back once. No work touches it any more: streams
            // and buffers hold the `Inner` that owns this, and a stream waits for its work when it
            // is dropped.
            unsafe {
                let _ = call!(cuMemUnmap(self.start, self.bytes as usize));
                let _ = call!(cuMemAddressFree(self.start, self.bytes as usize));
                let _ = call!(cuMemRelease(self.handle));
            }
        }
    }
}

/// Every GPU of this process that can read and write memory of `context`'s.
fn accesses(context: &Context) -> Result<Vec<sys::CUmemAccessDesc>, CudaError> {
    let mut all = Vec::new();
    for ordinal in 0..super::context::count()? {
        let (mut device, mut reaches) = (0, 0);
        // SAFETY: pointers to locals, and GPUs that exist.
        unsafe {
            call!(cuDeviceGet(&mut device, ordinal as i32))?;
            if device != context.device {
                call!(cuDeviceCanAccessPeer(&mut reaches, device, context.device))?;
            }
        }
        if device == context.device || reaches != 0 {
            let location =
                sys::CUmemLocation { type_: sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE, id: device };
            let flags = sys::CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
            all.push(sys::CUmemAccessDesc { location, flags });
        }
    }
    Ok(all)
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
    let start = std::ptr::with_exposed_provenance_mut((inner.slab.start + range.offset) as usize);
    let start = NonNull::new(start).expect("the driver maps nothing at 0");
    // SAFETY: the range is of the slab, which `owner` keeps mapped, and nobody else's: `Slab::take`
    // hands out each byte once at a time. `Ranges` are whole pages, at least `bytes` long.
    let region = unsafe { Region::from_raw(start, bytes as usize, Space::Device(inner.context.ordinal), owner) };
    Ok(region.deferred())
}
