//! The processor as a device: running work at once, on the caller's thread ([`Cpu`]) or on several ([`Cores`]), and as late as
//! allowed ([`LazyCpu`]).
//!
//! Each subject is a file of plain functions on slices; `stream.rs` and `kernels.rs`
//! here bind them to the traits [`Stream`] and [`Kernels`](crate::Kernels).

pub(crate) mod adamw;
mod attention;
pub mod compare;
mod embedding;
mod half_precision;
mod isa;
mod kernels;
mod lazy;
mod loss;
mod maths;
mod matmul;
mod mlp;
pub mod non_temporal;
mod norm;
pub mod observe;
mod profile;
pub mod reduce;
mod rope;
mod scratch;
pub(crate) mod square_norm;
mod stream;
mod team;
mod value;

pub use isa::Isa;
pub use lazy::LazyCpu;
pub use profile::{KernelTime, Profile};

use crate::buffer::byte_count;
use crate::{Buffer, DType, Device, Element, Error, Failure, Region, Span, Stream, View, ViewMut, with_element};
use isa::vectorized;
use lazy::LazyStream;
use std::cell::{Cell, OnceCell};
use std::sync::Arc;
use team::Team;

/// Elements below which a thread more does not pay for a kernel that does little with each.
const SHARE: usize = 1 << 16;

/// The processor; a kernel has run when its call returns, on the thread that calls.
#[derive(Clone, Copy, Debug, Default)]
pub struct Cpu;

// SAFETY: streams of the host run work within the call, and the region comes back as it was.
unsafe impl Device for Cpu {
    fn name(&self) -> &'static str {
        "cpu"
    }

    fn allocate(&self, dtype: DType, len: usize) -> Result<Buffer, Error> {
        Buffer::whole(Region::heap(self.name(), byte_count(self.name(), dtype, len)?)?, dtype)
    }

    fn stream(&self) -> Box<dyn Stream> {
        Cores::default().stream()
    }

    fn take_in(&self, region: Region) -> Result<Region, Error> {
        Ok(region)
    }
}

/// As [`Cpu`], with several threads for a kernel, and a record of how long each takes.
#[derive(Clone, Default)]
pub struct Cores {
    team: Team,
    profile: Option<Arc<Profile>>,
}

impl Cores {
    /// A device that starts and keeps this many threads; with one, kernels run on the thread that calls. They run on the processors that
    /// the calling thread may run on. Results do not depend on their number.
    ///
    /// # Errors
    /// [`Error::Threads`].
    pub fn new(threads: usize) -> Result<Cores, Error> {
        Ok(Cores { team: Team::new(threads)?, profile: None })
    }

    /// Floating-point operations a second that the device's threads reach together in products of numbers of `dtype`, f32 or bf16,
    /// that lie in registers: the measure for what kernels reach. Takes some ten milliseconds.
    pub fn peak(&self, dtype: DType) -> f64 {
        matmul::peak::measure(&self.team, dtype)
    }

    /// Threads that run a kernel.
    pub fn threads(&self) -> usize {
        self.team.threads()
    }

    /// The same device, whose streams add the time of each kernel to `profile`.
    pub fn profiled(self, profile: Arc<Profile>) -> Cores {
        Cores { profile: Some(profile), ..self }
    }
}

// SAFETY: as for `Cpu`.
unsafe impl Device for Cores {
    fn name(&self) -> &'static str {
        Cpu.name()
    }

    fn allocate(&self, dtype: DType, len: usize) -> Result<Buffer, Error> {
        Cpu.allocate(dtype, len)
    }

    fn stream(&self) -> Box<dyn Stream> {
        Box::new(HostStream::new(None, self.team.clone(), self.profile.clone()))
    }

    fn take_in(&self, region: Region) -> Result<Region, Error> {
        Ok(region)
    }
}

/// A stream of the host: runs its work now, or hands it to the [`LazyCpu`].
struct HostStream {
    lazy: Option<LazyStream>,
    /// Why this stream runs nothing any more. A [`LazyStream`] keeps its own.
    failure: OnceCell<Failure>,
    team: Team,
    profile: Option<Arc<Profile>>,
    /// See [`Stream::host_waits`](crate::Stream::host_waits).
    waits: Cell<u64>,
}

/// What a kernel is called and does.
#[derive(Clone, Copy)]
struct Work {
    name: &'static str,
    /// Floating-point operations of matrix products; other kernels are bound by memory.
    flops: u64,
}

impl Work {
    fn moves(name: &'static str) -> Work {
        Work { name, flops: 0 }
    }

    /// A product takes a multiplication and an addition.
    fn products(name: &'static str, products: usize) -> Work {
        Work { name, flops: 2 * products as u64 }
    }
}

/// Elements a kernel writes.
struct Output<'a>(&'a Span);

/// Elements a kernel reads.
struct Input<'a>(&'a Span);

impl HostStream {
    fn new(lazy: Option<LazyStream>, team: Team, profile: Option<Arc<Profile>>) -> HostStream {
        HostStream { lazy, failure: OnceCell::new(), team, profile, waits: Cell::new(0) }
    }

    /// Enqueues `kernel` with its outputs and inputs as slices.
    fn run<const W: usize, const R: usize>(
        &self,
        work: Work,
        writes: [ViewMut<'_>; W],
        reads: [View<'_>; R],
        kernel: impl FnOnce(&Team, [Output<'_>; W], [Input<'_>; R]) + Send + 'static,
    ) {
        let Some(lazy) = &self.lazy else { return self.run_now(work, writes, reads, kernel) };
        let (writes, reads) = self.spans(writes, reads);
        lazy.push(Box::new(move || {
            kernel(&Team::default(), writes.each_ref().map(Output), reads.each_ref().map(Input))
        }));
    }

    /// Runs `kernel` before it returns, on a stream that does not defer; unless this stream has
    /// failed.
    fn run_now<const W: usize, const R: usize>(
        &self,
        work: Work,
        writes: [ViewMut<'_>; W],
        reads: [View<'_>; R],
        kernel: impl FnOnce(&Team, [Output<'_>; W], [Input<'_>; R]),
    ) {
        assert!(self.lazy.is_none(), "a stream that defers runs nothing at once");
        let (writes, reads) = self.spans(writes, reads);
        if self.failure.get().is_some() {
            return;
        }
        let run = || kernel(&self.team, writes.each_ref().map(Output), reads.each_ref().map(Input));
        match &self.profile {
            None => run(),
            Some(profile) => {
                let bytes = writes.iter().chain(&reads).map(|span| (span.len() * span.dtype().bytes()) as u64).sum();
                profile.time(work, bytes, run);
            }
        }
    }

    fn spans<const W: usize, const R: usize>(
        &self,
        writes: [ViewMut<'_>; W],
        reads: [View<'_>; R],
    ) -> ([Span; W], [Span; R]) {
        let (writes, reads) = (writes.map(ViewMut::into_span), reads.map(View::into_span));
        for span in writes.iter().chain(&reads) {
            assert_eq!(span.deferred(), self.lazy.is_some(), "a stream was given a buffer of another device");
        }
        (writes, reads)
    }
}

impl<'a> Output<'a> {
    fn of<T: Element>(self) -> &'a mut [T] {
        // SAFETY: `Output` is made only in `HostStream::run` and `run_now`, from a `ViewMut`: while
        // the views lived, the borrow checker excluded every other view of these elements, and the
        // kernel's other arguments with them. On `Cpu` the views outlive the kernel. On `LazyCpu`
        // the kernel runs later, but spans of a deferring device are only ever accessed under
        // `exclusive` (by `LazyStream` around each kernel, by collectives around each access), and
        // `Cpu` refuses them above; so no two accesses are ever simultaneous, and within one kernel
        // the arguments are disjoint as before. An operation of a communicator owns its buffers
        // until it is complete, and lends out views only afterwards.
        unsafe { self.0.as_mut_slice() }
    }

    fn bytes(self) -> &'a mut [u8] {
        with_element!(self.0.dtype(), T => bytemuck::cast_slice_mut(self.of::<T>()))
    }
}

impl<'a> Input<'a> {
    fn of<T: Element>(self) -> &'a [T] {
        // SAFETY: as in `Output::of`; a `View` excludes writers.
        unsafe { self.0.as_slice() }
    }

    fn bytes(self) -> &'a [u8] {
        with_element!(self.0.dtype(), T => bytemuck::cast_slice(self.of::<T>()))
    }
}
