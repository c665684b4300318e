//! Launching a kernel: its shape and its arguments.

use std::ffi::c_void;

use cudarc::driver::sys::{CUdeviceptr, CUstream};

use super::CudaError;
use super::context::Context;
use super::driver::call;
use crate::{View, ViewMut};

/// Threads of a block, for nearly all kernels.
pub(super) const THREADS: u32 = 256;

/// How many blocks run a kernel, of how many threads.
#[derive(Clone, Copy)]
pub(super) struct Shape {
    pub(super) grid: [u32; 2],
    pub(super) threads: u32,
    /// Bytes of dynamic shared memory.
    pub(super) shared: u32,
}

impl Shape {
    /// `blocks` blocks of [`THREADS`] threads.
    pub(super) fn blocks(blocks: usize) -> Shape {
        Shape::grid(blocks, 1)
    }

    /// `x · y` blocks of [`THREADS`] threads.
    pub(super) fn grid(x: usize, y: usize) -> Shape {
        assert!(x < 1 << 31 && y < 1 << 16, "{x} × {y} blocks are more than a GPU starts at once");
        Shape { grid: [x as u32, y as u32], threads: THREADS, shared: 0 }
    }

    /// One block of one warp.
    pub(super) fn warp() -> Shape {
        Shape::blocks(1).with_threads(32)
    }

    /// As many blocks as it takes for `len` elements, of which a block has `each`.
    pub(super) fn for_elements(len: usize, each: usize) -> Shape {
        Shape::blocks(len.div_ceil(each))
    }

    pub(super) fn with_threads(self, threads: u32) -> Shape {
        Shape { threads, ..self }
    }

    pub(super) fn with_shared(self, bytes: usize) -> Shape {
        Shape { shared: bytes as u32, ..self }
    }
}

/// An argument of a kernel. The driver reads as many of its bytes as the kernel's parameter has,
/// from the lowest on.
#[derive(Clone, Copy)]
pub(super) struct Argument(u64);

macro_rules! arguments {
    ($($number:ty),*) => {$(
        impl From<$number> for Argument {
            fn from(number: $number) -> Argument {
                Argument(u64::from(number))
            }
        }
    )*};
}
arguments!(u32, u64);

impl From<f32> for Argument {
    fn from(number: f32) -> Argument {
        Argument(u64::from(number.to_bits()))
    }
}

impl From<f64> for Argument {
    fn from(number: f64) -> Argument {
        Argument(number.to_bits())
    }
}

impl From<&View<'_>> for Argument {
    fn from(view: &View<'_>) -> Argument {
        Argument(view.raw().pointer.as_ptr().expose_provenance() as u64)
    }
}

impl From<&ViewMut<'_>> for Argument {
    fn from(view: &ViewMut<'_>) -> Argument {
        Argument(view.raw().pointer.as_ptr().expose_provenance() as u64)
    }
}

/// Where memory of the GPU starts.
pub(super) fn address(view: &View<'_>) -> CUdeviceptr {
    Argument::from(view).0
}

/// As [`address`].
pub(super) fn address_mut(view: &ViewMut<'_>) -> CUdeviceptr {
    Argument::from(view).0
}

/// Most parameters that a kernel has.
const MOST: usize = 20;

/// Addresses that a kernel takes as one parameter: `reduce::Sources` of `kernels/cuda/reduce.cu`.
pub(super) type Sources = [CUdeviceptr; 32];

/// Enqueues a kernel, which reads `latch` before its own arguments.
///
/// # Safety
/// The arguments are those of the kernel, in order, and the memory that they name stays valid until
/// the stream has run it.
pub(super) unsafe fn launch(
    context: &Context,
    stream: CUstream,
    kernel: &str,
    shape: Shape,
    latch: CUdeviceptr,
    arguments: &[Argument],
) -> Result<(), CudaError> {
    // SAFETY: the caller's promise.
    unsafe { launch_with(context, stream, kernel, shape, latch, None, arguments) }
}

/// As [`launch`], for a kernel that takes `sources` between the latch and its other arguments.
///
/// # Safety
/// As for [`launch`].
pub(super) unsafe fn launch_with(
    context: &Context,
    stream: CUstream,
    kernel: &str,
    shape: Shape,
    latch: CUdeviceptr,
    sources: Option<&Sources>,
    arguments: &[Argument],
) -> Result<(), CudaError> {
    fn pointer<T>(argument: &T) -> *mut c_void {
        std::ptr::from_ref(argument).cast_mut().cast()
    }
    let latch = Argument(latch);
    let mut pointers = [std::ptr::null_mut(); MOST];
    let all = [pointer(&latch)].into_iter().chain(sources.map(pointer)).chain(arguments.iter().map(pointer));
    pointers.iter_mut().zip(all).for_each(|(place, argument)| *place = argument);
    assert!(arguments.len() + 2 <= MOST, "{kernel} has {} arguments", arguments.len());
    let Shape { grid: [x, y], threads, shared } = shape;
    let (function, pointers) = (context.functions.get(kernel), pointers.as_mut_ptr());
    // SAFETY: the driver copies the arguments before it returns, and only reads them; the rest is
    // the caller's promise.
    unsafe { call!(cuLaunchKernel(function, x, y, 1, threads, 1, 1, shared, stream, pointers, std::ptr::null_mut())) }
}
