//! What collectives between GPUs do on a stream: copies between GPUs, and reductions that read the
//! memory of all of them.

use cudarc::driver::sys::CUdeviceptr;

use super::driver::call;
use super::launch::{Shape, Sources, launch_with};
use super::stream::{CudaStream, PARAMETERS_OF_BLOCK, typed};
use crate::cpu::reduce::{Fold, Operator};
use crate::{DType, Raw};

impl CudaStream {
    /// Most inputs of a reduction: the GPUs of a host.
    pub const INPUTS: usize = 32;

    /// Copies elements of any GPU of this process, by a copy engine: no multiprocessor is busy with
    /// it. It runs also where the latch is set.
    ///
    /// # Safety
    /// Both are memory of GPUs that reach each other, of as many bytes, and stay valid until the
    /// stream has run the copy; nobody writes `from` or touches `to` meanwhile.
    ///
    /// # Panics
    /// For lengths that differ.
    pub unsafe fn pull(&self, to: Raw, from: Raw) {
        let bytes = to.len * to.dtype.bytes();
        assert!(bytes == from.len * from.dtype.bytes(), "a copy from {from:?} to {to:?}");
        if bytes > 0 {
            let [to, from] = [to, from].map(|raw| raw.pointer.as_ptr().expose_provenance() as CUdeviceptr);
            // SAFETY: the caller's promise.
            self.enqueue(|stream| unsafe { call!(cuMemcpyDtoDAsync_v2(to, from, bytes, stream)) });
        }
    }

    /// As [`fold`](crate::cpu::reduce::fold), on this stream: reads the inputs in order, adds them
    /// up in the type in which they accumulate, and rounds once. The bits are those of the
    /// processor's. Sums of f32 and bf16, and plain sums of f64, to one output, which may be
    /// exactly an input of its type.
    ///
    /// # Safety
    /// Inputs and the output are memory that this GPU reads and writes, of as many elements, and
    /// stay valid until the stream has run the work; nobody writes the inputs or touches the output
    /// meanwhile.
    ///
    /// # Panics
    /// For other types and operators, for more than [`CudaStream::INPUTS`] inputs, and for what
    /// the processor refuses.
    pub unsafe fn fold(&self, job: &Fold<'_>) {
        let Fold { inputs, outputs, groups, .. } = *job;
        assert!(
            !inputs.is_empty()
                && inputs.len() <= CudaStream::INPUTS
                && groups > 0
                && inputs.len().is_multiple_of(groups),
            "{} inputs in {groups} groups",
            inputs.len()
        );
        assert!(outputs.len() == 1 && CudaStream::folds(job), "a GPU reduces to one sum: {job:?}");
        if job.count == 0 {
            return;
        }
        let mut sources = Sources::default();
        sources.iter_mut().zip(inputs).for_each(|(source, input)| *source = input.expose_provenance() as CUdeviceptr);
        let (count, out, len) = (inputs.len() as u32, outputs[0].expose_provenance() as CUdeviceptr, job.count as u64);
        let accumulate = u32::from(job.accumulate);
        self.enqueue(|stream| {
            let (context, latch) = (&self.inner.context, self.inner.latch.address());
            if job.dtype == DType::F64 {
                let arguments = [count.into(), out.into(), len.into(), accumulate.into()];
                let shape = Shape::for_elements(job.count, 256);
                // SAFETY: sum_numbers(sources, count, out, n, accumulate); the caller's promise.
                return unsafe {
                    launch_with(context, stream, "sum_numbers", shape, latch, Some(&sources), &arguments)
                };
            }
            let kernels = [["reduce_f32_f32", "reduce_f32_bf16"], ["reduce_bf16_f32", "reduce_bf16_bf16"]];
            let kernel = kernels[typed(job.dtype)][typed(job.output)];
            let arguments = [
                count.into(),
                (groups as u32).into(),
                out.into(),
                len.into(),
                accumulate.into(),
                (job.divisor.unwrap_or(0) as u32).into(),
                u32::from(job.factor.is_some()).into(),
                (job.factor.unwrap_or(1.0) as f32).into(),
            ];
            let shape = Shape::for_elements(job.count, PARAMETERS_OF_BLOCK);
            // SAFETY: reduce(sources, count, groups, out, n, accumulate, divisor, has_factor,
            // factor); the caller's promise.
            unsafe { launch_with(context, stream, kernel, shape, latch, Some(&sources), &arguments) }
        });
    }

    /// Writes a rider: whether this rank's work has failed, as a number that is 0 where it has not,
    /// and behind it `own`, numbers of f64.
    ///
    /// # Safety
    /// `out` has one number of f64 more than `own`; both are this GPU's memory and stay valid until
    /// the stream has run this; nobody else uses `out` meanwhile.
    pub unsafe fn write_rider(&self, out: Raw, own: Option<Raw>) {
        let len = own.map_or(0, |own| own.len);
        assert!(out.len == len + 1 && out.dtype == DType::F64, "a rider of {} numbers with {len}", out.len);
        let address = |raw: Raw| raw.pointer.as_ptr().expose_provenance() as u64;
        let (out, own) = (address(out), own.map_or(0, address));
        // SAFETY: write_rider(out, own, n); the caller's promise.
        unsafe { self.kernel("write_rider", Shape::blocks(1), &[out.into(), own.into(), (len as u32).into()]) };
    }

    /// Stops this rank's work where the rider of a rank says that its own has failed. `riders` has
    /// one of `count` ranks after the other.
    ///
    /// # Safety
    /// `riders` is this GPU's memory and stays valid, and as it is, until the stream has run this.
    pub unsafe fn follow_riders(&self, riders: Raw, count: usize) {
        assert!(count > 0 && riders.len.is_multiple_of(count) && riders.dtype == DType::F64, "{riders:?} of {count}");
        let (stride, riders) = (riders.len / count, riders.pointer.as_ptr().expose_provenance() as u64);
        let arguments = [riders.into(), (count as u32).into(), (stride as u32).into()];
        // SAFETY: follow_riders(riders, count, stride); the caller's promise.
        unsafe { self.kernel("follow_riders", Shape::warp(), &arguments) };
    }

    /// Whether [`CudaStream::fold`] has such a reduction.
    pub fn folds(job: &Fold<'_>) -> bool {
        let is_short = |dtype| matches!(dtype, DType::F32 | DType::Bf16);
        let is_plain = job.groups == 1 && job.factor.is_none() && job.divisor.is_none();
        let types = match (job.dtype, job.output) {
            (DType::F64, DType::F64) => is_plain,
            (from, to) => is_short(from) && is_short(to),
        };
        types && job.operator == Operator::Sum && job.supports()
    }
}
