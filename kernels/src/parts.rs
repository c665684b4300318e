//! Several buffers in one allocation. What it takes is known before a device is asked for it.

use crate::{Buffer, DType, Device, Error};

/// Parts start at multiples of this many bytes from the start of their memory: a cache line.
const ALIGNMENT: usize = 64;

/// What a buffer shall hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// Type of the elements.
    pub dtype: DType,
    /// Number of elements.
    pub len: usize,
}

impl Part {
    /// Bytes from the start of this part to the start of the next; none where an address cannot
    /// count them.
    pub fn bytes(self) -> Option<usize> {
        self.len.checked_mul(self.dtype.bytes())?.checked_next_multiple_of(ALIGNMENT)
    }
}

impl dyn Device + '_ {
    /// A zeroed buffer for each of `parts`, in that order, from one call of [`Device::allocate`].
    /// The call asks for the sum of [`Part::bytes`].
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    pub fn allocate_parts(&self, parts: &[Part]) -> Result<Vec<Buffer>, Error> {
        let bytes = parts.iter().try_fold(0usize, |sum, part| sum.checked_add(part.bytes()?));
        let bytes = bytes.ok_or(Error::OutOfMemory { device: self.name(), bytes: usize::MAX })?;
        // Memory that suits the largest element suits every other.
        self.allocate(DType::F64, bytes / DType::F64.bytes())?.divide(parts)
    }
}

impl Buffer {
    /// The same memory as buffers of their own, one for each of `parts`, in that order. They are
    /// disjoint and may have other types than this buffer. Each starts at a multiple of 64 bytes
    /// from the start of this buffer. Their elements are the bytes that lie there. The memory stays
    /// valid while any of them lives.
    ///
    /// # Errors
    /// [`Error::Misaligned`].
    ///
    /// # Panics
    /// When this buffer is shorter than the sum of [`Part::bytes`].
    pub fn divide(self, parts: &[Part]) -> Result<Vec<Buffer>, Error> {
        let span = self.into_span();
        let mut start = 0usize;
        let part = |part: &Part| {
            let end = part.bytes().and_then(|bytes| start.checked_add(bytes));
            let end = end.expect("parts are longer than any memory");
            // The ranges `start..end` of a call do not overlap, and this buffer, which nothing
            // borrows, is consumed: so no element has two owners.
            let span = span.reinterpreted(start..end, *part)?;
            start = end;
            Ok(Buffer::of(span))
        };
        parts.iter().map(part).collect()
    }
}
