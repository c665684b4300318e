//! Memory of the host in pages that do not move, which the GPU reads and writes by itself.

use std::collections::VecDeque;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::AtomicU32;

use cudarc::driver::sys::{self, CUdeviceptr};

use super::CudaError;
use super::context::Context;
use super::driver::call;
use super::event::{Recorded, Recorder};

/// An allocation of pinned memory.
pub(super) struct Pinned {
    context: Arc<Context>,
    start: NonNull<u8>,
    bytes: usize,
}

// SAFETY: `Pinned` is an address range. What lies there is accessed through raw pointers, whose
// users order their accesses.
unsafe impl Send for Pinned {}
// SAFETY: as above.
unsafe impl Sync for Pinned {}

impl Pinned {
    /// Memory that every context of the process may use, with anything in it.
    pub(super) fn allocate(context: &Arc<Context>, bytes: usize) -> Result<Pinned, CudaError> {
        context.bind()?;
        let mut start = std::ptr::null_mut();
        let flags = sys::CU_MEMHOSTALLOC_PORTABLE | sys::CU_MEMHOSTALLOC_DEVICEMAP;
        // SAFETY: a pointer to a local.
        unsafe { call!(cuMemHostAlloc(&mut start, bytes, flags))? };
        let start = NonNull::new(start.cast::<u8>()).expect("the driver allocates nothing at 0");
        Ok(Pinned { context: context.clone(), start, bytes })
    }

    /// Where it lies, for a processor.
    pub(super) fn pointer(&self) -> NonNull<u8> {
        self.start
    }

    /// Where it lies, for the GPU.
    pub(super) fn device_address(&self) -> Result<CUdeviceptr, CudaError> {
        self.context.bind()?;
        let mut address = 0;
        // SAFETY: a pointer to a local, and memory that was allocated as mapped.
        unsafe { call!(cuMemHostGetDevicePointer_v2(&mut address, self.start.as_ptr().cast(), 0))? };
        Ok(address)
    }

    /// The word with this number.
    pub(super) fn word(&self, index: usize) -> &AtomicU32 {
        assert!((index + 1) * 4 <= self.bytes, "word {index} of {} bytes", self.bytes);
        // SAFETY: inside the allocation, which is aligned to a page; words are accessed as atomics
        // on this side, and the GPU writes a whole aligned word at a time.
        unsafe { AtomicU32::from_ptr(self.start.as_ptr().cast::<u32>().add(index)) }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        if self.context.may_release() {
            // SAFETY: allocated above, freed once; its owners have waited for the work that uses
            // it.
            unsafe {
                let _ = call!(cuMemFreeHost(self.start.as_ptr().cast()));
            }
        }
    }
}

/// A ring of pinned memory through which a stream's transfers pass, in order.
pub(super) struct Ring {
    memory: Pinned,
    /// Where the next piece starts.
    head: usize,
    /// Pieces whose transfers may not have run, oldest first: where each starts and ends.
    pieces: VecDeque<(usize, usize, Recorded)>,
}

/// Pieces start at multiples of this many bytes.
const ALIGNMENT: usize = 256;

impl Ring {
    /// Bytes of the longest piece.
    pub(super) const PIECE: usize = 1 << 20;

    pub(super) fn new(context: &Arc<Context>) -> Result<Ring, CudaError> {
        let memory = Pinned::allocate(context, 4 * Ring::PIECE)?;
        Ok(Ring { memory, head: 0, pieces: VecDeque::new() })
    }

    /// Lends `bytes` bytes to `transfer`, which enqueues the work that uses them, after the work
    /// that used them before has run. Returns an event behind the new work.
    ///
    /// # Panics
    /// For more than [`Ring::PIECE`] bytes.
    pub(super) fn with(
        &mut self,
        bytes: usize,
        recorder: &Recorder<'_>,
        transfer: impl FnOnce(NonNull<u8>) -> Result<(), CudaError>,
    ) -> Result<Recorded, CudaError> {
        assert!(bytes <= Ring::PIECE, "a piece of {bytes} bytes");
        let len = bytes.max(1).next_multiple_of(ALIGNMENT);
        if self.head + len > self.memory.bytes {
            self.head = 0;
        }
        let (start, end) = (self.head, self.head + len);
        // Pieces end in order: behind the youngest that is in the way, all of them have.
        let in_the_way = self.pieces.iter().rposition(|(first, last, _)| *first < end && start < *last);
        if let Some(index) = in_the_way {
            self.pieces[index].2.wait()?;
            self.pieces.drain(..=index);
        }
        // SAFETY: `start..end` is inside the ring.
        transfer(unsafe { self.memory.pointer().add(start) })?;
        let behind = recorder.record()?;
        self.pieces.push_back((start, end, behind.clone()));
        self.head = end;
        Ok(behind)
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        self.pieces.drain(..).for_each(|(_, _, used)| {
            let _ = used.wait();
        });
    }
}
