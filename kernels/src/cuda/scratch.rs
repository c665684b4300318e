//! Working memory of kernels.

use std::cell::RefCell;
use std::sync::Arc;

use cudarc::driver::sys::CUdeviceptr;

use super::{CudaError, Inner, slab};
use crate::Region;

/// Working memory of a stream's kernels, which use it one after the other.
#[derive(Default)]
pub(super) struct Scratch {
    /// Enqueued work may still use those before the last.
    regions: RefCell<Vec<(Region, CUdeviceptr, u64)>>,
}

impl Scratch {
    /// Where `bytes` bytes lie, until the next call. It grows the first time that a kernel of these
    /// shapes runs.
    pub(super) fn take(&self, inner: &Arc<Inner>, bytes: u64) -> Result<CUdeviceptr, CudaError> {
        let mut regions = self.regions.borrow_mut();
        match regions.last() {
            Some((_, start, len)) if *len >= bytes => Ok(*start),
            _ => {
                let region = slab::region(inner, bytes)?;
                let start = region.start().as_ptr().expose_provenance() as CUdeviceptr;
                regions.push((region, start, bytes));
                Ok(start)
            }
        }
    }
}

/// Cuts working memory into pieces that start at multiples of 256 bytes.
#[derive(Default)]
pub(super) struct Pieces(u64);

impl Pieces {
    /// Where a piece of `len` elements of `bytes` bytes starts.
    pub(super) fn next(&mut self, len: usize, bytes: usize) -> u64 {
        let start = self.0;
        self.0 = (start + (len * bytes) as u64).next_multiple_of(256);
        start
    }

    /// Bytes of all pieces.
    pub(super) fn bytes(&self) -> u64 {
        self.0
    }
}
