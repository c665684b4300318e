//! What ranks that are processes share of their GPUs: their slabs, by handle, and words in memory
//! of the host, at which the streams of one wait for the streams of others.
//!
//! A word counts what a rank's stream has done: it goes up by one at each mark that the stream
//! writes, and wraps. A rank that gives up lets the streams go on that wait: its host writes what
//! is far beyond any mark ([`Words::poison`]), and a kernel behind each wait tells one from the
//! other.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use cudarc::driver::sys::{self, CUdeviceptr, CUstreamWaitValue_flags};

use super::Cuda;
use super::context::Context;
use super::driver::call;
use super::launch::{Shape, Sources, launch_with};
use super::mapped::Mapped;
use super::stream::CudaStream;
use crate::{DType, Error, Raw, Space};

/// Memory of a rank that is another process, mapped for a GPU of this one.
pub struct PeerMemory {
    mapped: Mapped,
}

impl PeerMemory {
    /// Elements that start so many bytes after its first; None for more than there is, or where
    /// elements of this type cannot start.
    pub fn elements(&self, offset: u64, len: usize, dtype: DType) -> Option<Raw> {
        let bytes = (len as u64).checked_mul(dtype.bytes() as u64)?;
        let fits = offset.checked_add(bytes)? <= self.mapped.bytes && offset.is_multiple_of(dtype.bytes() as u64);
        let start = std::ptr::with_exposed_provenance_mut(self.mapped.start.checked_add(offset)? as usize);
        let (pointer, space) = (NonNull::new(start)?, Space::Device(self.mapped.ordinal()));
        fits.then_some(Raw { pointer, len, dtype, space })
    }

    /// Its size in bytes.
    pub fn bytes(&self) -> u64 {
        self.mapped.bytes
    }
}

/// Words in memory of the host that several processes map: a page for each rank, in which each of
/// the rank's streams has a word.
pub struct Words {
    context: Arc<Context>,
    start: NonNull<u8>,
    address: CUdeviceptr,
    ranks: usize,
}

// SAFETY: an address range, in which only atomics are accessed.
unsafe impl Send for Words {}
// SAFETY: as above.
unsafe impl Sync for Words {}

impl Words {
    /// Bytes of one rank's words.
    pub const PAGE: usize = 4096;
    /// Words of a rank, on cache lines of their own.
    pub const STREAMS: usize = 32;
    /// How far beyond the last mark a rank writes that gives up. A kernel takes a word for given up
    /// from half of that on, because ranks know marks of a different age.
    const POISON: u32 = 1 << 30;
    /// 4-byte words from one of a stream to the next.
    const STRIDE: usize = Words::PAGE / 4 / Words::STREAMS;

    fn index(&self, rank: usize, stream: usize) -> usize {
        assert!(rank < self.ranks && stream < Words::STREAMS, "stream {stream} of rank {rank} of {}", self.ranks);
        (rank * Words::STREAMS + stream) * Words::STRIDE
    }

    /// The word of a rank's stream, as a GPU sees it.
    fn address(&self, rank: usize, stream: usize) -> CUdeviceptr {
        self.address + 4 * self.index(rank, stream) as u64
    }

    fn word(&self, rank: usize, stream: usize) -> &AtomicU32 {
        // SAFETY: inside the memory, by `index`; it is aligned to a page, accessed as atomics, and
        // mapped as long as this lives.
        unsafe { AtomicU32::from_ptr(self.start.as_ptr().cast::<u32>().add(self.index(rank, stream))) }
    }

    /// The last mark that a rank's stream has written.
    ///
    /// # Panics
    /// Here and below, for a rank or a stream that there is not.
    pub fn get(&self, rank: usize, stream: usize) -> u32 {
        self.word(rank, stream).load(Ordering::Acquire)
    }

    /// What the word of a rank's stream says from now on; for words that no stream uses yet.
    pub fn set(&self, rank: usize, stream: usize, mark: u32) {
        self.word(rank, stream).store(mark, Ordering::Release);
    }

    /// Lets go on whatever waits for a stream of this number of any rank, as failed: `mark` is the
    /// last that this rank has enqueued. To be called again and again until this rank's streams are
    /// idle, because another rank's stream, or its host, may write the words meanwhile.
    pub fn poison(&self, stream: usize, mark: u32) {
        (0..self.ranks).for_each(|rank| self.set(rank, stream, mark.wrapping_add(Words::POISON)));
    }
}

impl Drop for Words {
    fn drop(&mut self) {
        if self.context.may_release() {
            // SAFETY: registered in `Cuda::register`, and mapped until now, by its caller's
            // promise.
            unsafe {
                let _ = call!(cuMemHostUnregister(self.start.as_ptr().cast()));
            }
        }
    }
}

impl Cuda {
    /// By what another process maps this rank's memory ([`Cuda::map`]), and its size in bytes.
    ///
    /// # Errors
    /// [`Error::Cuda`] where the driver refuses.
    pub fn export(&self) -> Result<(OwnedFd, u64), Error> {
        let mapped = &self.inner.slab.mapped;
        Ok((mapped.export()?, mapped.bytes))
    }

    /// Maps memory of a rank that is another process, for this rank's GPU: what it exported. No
    /// stream uses the memory when the value is dropped.
    ///
    /// # Errors
    /// [`Error::Cuda`], also where this GPU does not reach that memory.
    pub fn map(&self, file: BorrowedFd<'_>, bytes: u64) -> Result<PeerMemory, Error> {
        Ok(PeerMemory { mapped: Mapped::import(&self.inner.context, file, bytes)? })
    }

    /// Where elements start in this rank's memory, in bytes.
    ///
    /// # Panics
    /// For other memory.
    pub fn offset(&self, raw: Raw) -> u64 {
        assert!(self.inner.owns(raw), "{raw:?} is not this rank's");
        raw.pointer.as_ptr().expose_provenance() as u64 - self.inner.slab.mapped.start
    }

    /// Lets streams write and wait for words of `ranks` ranks, one page after the other.
    ///
    /// # Safety
    /// From `start` on lies a page for each rank, in memory that this process maps, for reading and
    /// writing, until the value is dropped; all processes access it as atomics alone. No stream
    /// uses the words when the value is dropped.
    ///
    /// # Errors
    /// [`Error::Cuda`] where the driver refuses.
    pub unsafe fn register(&self, start: NonNull<u8>, ranks: usize) -> Result<Words, Error> {
        let context = &self.inner.context;
        context.bind()?;
        assert!(start.as_ptr().addr().is_multiple_of(Words::PAGE), "words start with a page");
        let flags = sys::CU_MEMHOSTREGISTER_PORTABLE | sys::CU_MEMHOSTREGISTER_DEVICEMAP;
        // SAFETY: memory that is mapped, by the caller's promise.
        unsafe { call!(cuMemHostRegister_v2(start.as_ptr().cast(), ranks * Words::PAGE, flags))? };
        let mut words = Words { context: context.clone(), start, address: 0, ranks };
        // SAFETY: memory that was registered as mapped, and a pointer to a local.
        unsafe { call!(cuMemHostGetDevicePointer_v2(&mut words.address, start.as_ptr().cast(), 0))? };
        Ok(words)
    }
}

impl CudaStream {
    /// Writes a mark to the word of stream number `stream` of this rank, once this stream comes so
    /// far. Whoever sees the mark sees what this stream has done before.
    ///
    /// # Safety
    /// The words stay registered until the stream has run this.
    pub unsafe fn write_mark(&self, words: &Words, rank: usize, stream: usize, mark: u32) {
        let address = words.address(rank, stream);
        // SAFETY: a word of memory that is registered, by the caller's promise.
        self.enqueue(|stream| unsafe { call!(cuStreamWriteValue32_v2(stream, address, mark, 0)) });
    }

    /// Holds this stream up until the streams of number `stream` of all ranks have written `mark`.
    /// Where one has given up, or its work has failed, this rank's work stops behind the wait.
    /// `memories` has the memory of each rank; None is this one.
    ///
    /// # Safety
    /// The words stay registered, and the memories mapped, until the stream has run this.
    pub unsafe fn wait_for_marks(&self, words: &Words, memories: &[Option<Arc<PeerMemory>>], stream: usize, mark: u32) {
        let mut latches = Sources::default();
        for (latch, memory) in latches.iter_mut().zip(memories) {
            // A slab begins with its rank's latch, and that with its code.
            *latch = memory.as_ref().map_or(self.inner.latch.address(), |memory| memory.mapped.start);
        }
        let at_least = CUstreamWaitValue_flags::CU_STREAM_WAIT_VALUE_GEQ as u32;
        let (first, count) = (words.address(0, stream), memories.len() as u32);
        assert!(memories.len() <= words.ranks && memories.len() <= latches.len(), "{count} ranks");
        self.enqueue(|raw| {
            for (rank, _) in memories.iter().enumerate().filter(|(_, memory)| memory.is_some()) {
                // SAFETY: a word of memory that is registered, by the caller's promise.
                unsafe { call!(cuStreamWaitValue32_v2(raw, words.address(rank, stream), mark, at_least))? };
            }
            let (context, latch) = (&self.inner.context, self.inner.latch.address());
            let own = memories.iter().position(Option::is_none).unwrap_or(memories.len()) as u32;
            let stride = Words::PAGE as u32 / 4;
            let arguments = [count.into(), first.into(), stride.into(), mark.into(), own.into()];
            // SAFETY: follow_marks(codes, count, words, stride, mark, own); the caller's promise.
            unsafe { launch_with(context, raw, "follow_marks", Shape::warp(), latch, Some(&latches), &arguments) }
        });
    }
}
