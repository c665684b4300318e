//! The loops of the memory roofline, as safe functions over buffers that this rank alone has.
#![allow(unsafe_code)]

use std::ptr::NonNull;

use pillion_kernels::cpu::non_temporal;
use pillion_kernels::cpu::reduce::{self, Fold, Operator};
use pillion_kernels::{Buffer, DType, Error, Space};

/// Zeroed memory of another allocator: `len` elements, the first at an address that suits it and
/// nothing longer.
///
/// # Errors
/// When there is no memory.
pub(crate) fn foreign(dtype: DType, len: usize) -> Result<Buffer, Error> {
    const LINE: usize = 64;
    let bytes = len.saturating_add(1).saturating_mul(dtype.bytes()).saturating_add(LINE);
    let mut owner: Vec<u8> = Vec::new();
    owner.try_reserve_exact(bytes).map_err(|_| Error::OutOfMemory { device: "foreign", bytes })?;
    owner.resize(bytes, 0);
    let first = owner.as_ptr().align_offset(LINE) + dtype.bytes();
    let pointer = NonNull::new(owner[first..].as_mut_ptr()).expect("a vector has an address");
    // SAFETY: the vector has that many bytes from there, is never resized, and lives in the buffer;
    // nobody else uses it.
    unsafe { Buffer::foreign(pointer, len, dtype, Space::Host, Box::new(owner)) }
}

/// to\[..bytes\] = from\[..bytes\].
///
/// # Panics
/// When either is shorter.
pub(crate) fn copy(from: &Buffer, to: &mut Buffer, bytes: usize, stream: bool) {
    assert!(from.bytes() >= bytes && to.bytes() >= bytes, "a copy of {bytes} bytes from {from:?} to {to:?}");
    // SAFETY: both are that long. They are two buffers, so they do not overlap; `from` is borrowed and `to` exclusively, and no operation
    // owns them meanwhile.
    unsafe { non_temporal::copy(from.span().address().as_ptr(), to.span().address().as_ptr(), bytes, stream) }
}

/// to = from.
///
/// # Panics
/// When their lengths differ.
pub(crate) fn store(from: &[f32], to: &mut [f32], stream: bool) {
    assert_eq!(from.len(), to.len(), "a copy between different lengths");
    // SAFETY: both are that long, and a shared and an exclusive borrow do not overlap.
    unsafe { non_temporal::copy(from.as_ptr().cast(), to.as_mut_ptr().cast(), size_of_val(from), stream) }
}

/// to = 0.
pub(crate) fn clear(to: &mut [f32]) {
    // SAFETY: the slice holds that many f32, of which 0 is all bits zero. A loop over them is not always made the call that this is.
    unsafe { std::ptr::write_bytes(to.as_mut_ptr(), 0, to.len()) }
}

/// The elements of a buffer of the host.
///
/// # Panics
/// For another type than f32, and for memory that work may still use.
pub(crate) fn numbers(buffer: &mut Buffer) -> &mut [f32] {
    let dtype = buffer.dtype();
    let numbers = buffer.view_mut().into_slice();
    numbers.unwrap_or_else(|| panic!("{dtype} that work may still use is not f32 at rest"))
}

/// A sum of parts, of `count` elements of `dtype` each.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sum {
    pub(crate) dtype: DType,
    pub(crate) count: usize,
    /// Parts read.
    pub(crate) inputs: usize,
    /// Parts written, each with the whole sum.
    pub(crate) outputs: usize,
}

/// Adds up the first parts of `from`, and stores the sum as the first parts of `to`, or of `from` itself.
///
/// # Panics
/// When a buffer is shorter, in place with more outputs than inputs, for a type without sums, and without inputs.
pub(crate) fn fold(sum: Sum, from: &mut Buffer, to: Option<&mut Buffer>, stream: bool) {
    let Sum { dtype, count, inputs, outputs } = sum;
    let part = count * dtype.bytes();
    let starts = |buffer: &Buffer, parts: usize| -> Vec<*mut u8> {
        assert!(buffer.bytes() >= parts * part, "{parts} parts of {part} bytes of {buffer:?}");
        (0..parts).map(|index| buffer.span().address().as_ptr().wrapping_add(index * part)).collect()
    };
    assert!(to.is_some() || outputs <= inputs, "in place, every output is an input");
    let inputs: Vec<*const u8> = starts(from, inputs).into_iter().map(<*mut u8>::cast_const).collect();
    let outputs = starts(to.as_deref().unwrap_or(from), outputs);
    let job = Fold { inputs: &inputs, outputs: &outputs, count, stream, ..Fold::new(dtype, Operator::Sum) };
    // SAFETY: each part lies in its buffer, at a multiple of the element's size from a page. Outputs do not overlap each other. They overlap no
    // input when they are another buffer's parts, and are exactly one of the inputs each when they are this one's. The exclusive borrows keep
    // everybody else away.
    unsafe { reduce::fold(&job) }
}
