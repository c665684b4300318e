//! The processor as a device, once running work at once ([`Cpu`]) and once as late as allowed ([`LazyCpu`]).
//!
//! Each subject is a file of plain functions on slices; `queue.rs` here binds them to the trait [`Queue`].

mod adamw;
mod attention;
mod embedding;
mod isa;
mod lazy;
mod loss;
mod maths;
mod matmul;
mod mlp;
mod norm;
mod queue;
pub mod reduce;
mod rope;
pub mod stream;

pub use isa::Isa;
pub use lazy::LazyCpu;

use crate::{Buffer, DType, Device, Element, Error, Queue, Span, View, ViewMut};
use isa::vectorized;
use lazy::LazyQueue;

/// The processor; a kernel has run when its call returns.
#[derive(Clone, Copy, Debug, Default)]
pub struct Cpu;

impl Device for Cpu {
    fn name(&self) -> &'static str {
        "cpu"
    }

    fn allocate(&self, dtype: DType, len: usize) -> Result<Buffer, Error> {
        Buffer::heap(self.name(), dtype, len, self.deferred())
    }

    fn queue(&self) -> Box<dyn Queue> {
        Box::new(HostQueue { lazy: None })
    }

    fn deferred(&self) -> bool {
        false
    }
}

/// A queue of the host: runs its work now, or hands it to the [`LazyCpu`].
struct HostQueue {
    lazy: Option<LazyQueue>,
}

/// Elements a kernel writes.
struct Output<'a>(&'a Span);

/// Elements a kernel reads.
struct Input<'a>(&'a Span);

impl HostQueue {
    /// Enqueues `kernel` with its outputs and inputs as slices.
    fn run<const W: usize, const R: usize>(
        &self,
        writes: [ViewMut<'_>; W],
        reads: [View<'_>; R],
        kernel: impl FnOnce([Output<'_>; W], [Input<'_>; R]) + Send + 'static,
    ) {
        let writes = writes.map(ViewMut::into_span);
        let reads = reads.map(View::into_span);
        for span in writes.iter().chain(&reads) {
            assert_eq!(span.deferred(), self.lazy.is_some(), "a queue was given a buffer of another device");
        }
        let work = move || kernel(writes.each_ref().map(Output), reads.each_ref().map(Input));
        match &self.lazy {
            None => work(),
            Some(lazy) => lazy.push(Box::new(work)),
        }
    }
}

impl<'a> Output<'a> {
    fn of<T: Element>(self) -> &'a mut [T] {
        // SAFETY: `Output` is made only in `HostQueue::run`, from a `ViewMut`: while the views lived, the borrow checker excluded every
        // other view of these elements, and the kernel's other arguments with them.
        // On `Cpu` the views outlive the kernel. On `LazyCpu` the kernel runs later, but spans of a deferring device are only ever
        // accessed under `exclusive` (by `LazyQueue` around each kernel, by collectives around each access), and `Cpu` refuses them
        // above; so no two accesses are ever simultaneous, and within one kernel the arguments are disjoint as before.
        // An operation of a communicator owns its buffers until it is complete, and lends out views only afterwards.
        unsafe { self.0.as_mut_slice() }
    }

    fn bytes(self) -> &'a mut [u8] {
        match self.0.dtype() {
            DType::F32 => bytemuck::cast_slice_mut(self.of::<f32>()),
            DType::Bf16 => bytemuck::cast_slice_mut(self.of::<half::bf16>()),
            DType::F64 => bytemuck::cast_slice_mut(self.of::<f64>()),
            DType::U32 => bytemuck::cast_slice_mut(self.of::<u32>()),
            DType::I64 => bytemuck::cast_slice_mut(self.of::<i64>()),
        }
    }
}

impl<'a> Input<'a> {
    fn of<T: Element>(self) -> &'a [T] {
        // SAFETY: as in `Output::of`; a `View` excludes writers.
        unsafe { self.0.as_slice() }
    }

    fn bytes(self) -> &'a [u8] {
        match self.0.dtype() {
            DType::F32 => bytemuck::cast_slice(self.of::<f32>()),
            DType::Bf16 => bytemuck::cast_slice(self.of::<half::bf16>()),
            DType::F64 => bytemuck::cast_slice(self.of::<f64>()),
            DType::U32 => bytemuck::cast_slice(self.of::<u32>()),
            DType::I64 => bytemuck::cast_slice(self.of::<i64>()),
        }
    }

    /// Weights as f32: in place when they are, else widened into `scratch`.
    fn widened(self, scratch: &'a mut Vec<f32>) -> &'a [f32] {
        match self.0.dtype() {
            DType::F32 => self.of(),
            DType::Bf16 => {
                scratch.resize(self.0.len(), 0.0);
                maths::widen(scratch, self.of());
                scratch
            }
            other => panic!("weights are f32 or bf16, not {other}"),
        }
    }
}
