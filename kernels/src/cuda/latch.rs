//! What stops a rank's work on its GPU: a word that every kernel reads before it does anything.
//!
//! A stream that waits for an event cannot be told that the event has failed: it can only be let
//! go on. So the word that it waits for says how the event ended, a kernel behind the wait sets the
//! latch where it failed, and the kernels after that do nothing. A kernel that meets bad input sets
//! the latch, too. The latch has a mirror in pinned memory, which the host reads before it believes
//! that a moment of a stream has happened.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use cudarc::driver::sys::{CUdeviceptr, CUstream};
use parking_lot::Mutex;

use super::CudaError;
use super::context::Context;
use super::driver::call;
use super::event::Recorded;
use super::pinned::Pinned;

/// The latch of a rank, and the words at which its streams wait for events that are no stream's.
pub(super) struct Latch {
    /// Where the kernels read it: `struct Latch` of `kernels/cuda/common.cuh`.
    address: CUdeviceptr,
    words: Pinned,
    /// Where the GPU sees them.
    words_address: CUdeviceptr,
    state: Mutex<Words>,
}

#[derive(Default)]
struct Words {
    free: Vec<usize>,
    /// Words for which a stream has waited, with a moment behind the wait.
    used: VecDeque<(usize, Recorded)>,
    /// How many words have been handed out at least once.
    made: usize,
}

/// The mirror's word; the others follow on cache lines of their own.
const MIRROR: usize = 0;
/// Words from one to the next that is used: a cache line.
const STRIDE: usize = 16;
/// Bytes of all words: 1,023 waits under way.
const BYTES: usize = 64 << 10;

/// What a word says once its event has ended.
const HAPPENED: u32 = 1;
const FAILED: u32 = 2;

/// The code of a latch that another rank's failure has set: see `kernels/cuda/common.cuh`.
const PEER_FAILED: u32 = 4;

impl Latch {
    /// Bytes of device memory that it takes.
    pub(super) const BYTES: u64 = 16;

    /// The latch at `address`, open.
    pub(super) fn open(context: &Arc<Context>, address: CUdeviceptr) -> Result<Latch, CudaError> {
        let words = Pinned::allocate(context, BYTES)?;
        words.word(MIRROR).store(0, Ordering::Relaxed);
        let words_address = words.device_address()?;
        let image = Pinned::allocate(context, Latch::BYTES as usize)?;
        // SAFETY: 16 bytes of pinned memory, which lives until the copy has run; `address` has as
        // many bytes of device memory.
        unsafe {
            image.pointer().cast::<[u64; 2]>().write([0, words_address]);
            let (to, from) = (address, image.pointer().as_ptr().cast());
            call!(cuMemcpyHtoDAsync_v2(to, from, Latch::BYTES as usize, std::ptr::null_mut()))?;
            call!(cuStreamSynchronize(std::ptr::null_mut()))?;
        }
        Ok(Latch { address, words, words_address, state: Mutex::default() })
    }

    /// Where the kernels read it.
    pub(super) fn address(&self) -> CUdeviceptr {
        self.address
    }

    /// What stops the work: 0 for nothing.
    pub(super) fn code(&self) -> u32 {
        self.words.word(MIRROR).load(Ordering::Acquire)
    }

    /// Sets it from the host, on a stream that nothing holds up.
    pub(super) fn set(&self, stream: CUstream) -> Result<(), CudaError> {
        let mirror = self.words.word(MIRROR);
        // The mirror first, as kernels do: whoever sees the code finds the host told already.
        let _ = mirror.compare_exchange(0, PEER_FAILED, Ordering::AcqRel, Ordering::Acquire);
        // SAFETY: the latch's code, in memory that lives as long as this.
        unsafe { call!(cuMemsetD32Async(self.address, PEER_FAILED, 1, stream)) }
    }

    /// A word that no stream waits for: its number, and where the GPU sees it.
    pub(super) fn word(&self) -> Result<(usize, CUdeviceptr), CudaError> {
        let mut state = self.state.lock();
        let Words { free, used, .. } = &mut *state;
        // A long wait in front must not keep those behind it.
        let mut failed = None;
        used.retain(|(word, behind)| match behind.has_happened() {
            Ok(true) => {
                free.push(*word);
                false
            }
            Ok(false) => true,
            Err(error) => {
                failed = Some(error);
                true
            }
        });
        if let Some(error) = failed {
            return Err(error);
        }
        let word = match state.free.pop() {
            Some(word) => word,
            None if (state.made + 2) * STRIDE * 4 <= BYTES => {
                state.made += 1;
                state.made * STRIDE
            }
            // All are in use: streams are that far behind, and the oldest is let go first.
            None => {
                let Some((word, behind)) = state.used.pop_front() else { return Err(CudaError::Words) };
                // What it waits for may need a word, too.
                drop(state);
                behind.wait()?;
                word
            }
        };
        self.words.word(word).store(0, Ordering::Relaxed);
        Ok((word, self.words_address + 4 * word as u64))
    }

    /// The word is free again after `behind`, a moment behind the wait for it.
    pub(super) fn retire(&self, word: usize, behind: Recorded) {
        self.state.lock().used.push_back((word, behind));
    }

    /// Lets the stream go on that waits at the word.
    pub(super) fn release(&self, word: usize, happened: bool) {
        self.words.word(word).store(if happened { HAPPENED } else { FAILED }, Ordering::Release);
    }
}
