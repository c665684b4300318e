//! What the runtime and collectives need of a device: order, copies, and arithmetic on flat arrays.
//!
//! Where nothing else is said, every function returns once the work is enqueued, and panics when
//! shapes or types disagree: that is a programmer's error.

use crate::{DType, Element, Event, Failure, Kernels, Stamp, View, ViewMut};

/// Settings of one AdamW update (Loshchilov and Hutter 2019, algorithm 2, with the schedule inside
/// `lr`).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    /// Learning rate of this step.
    pub lr: f32,
    /// Decay of the first moment.
    pub beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// Added to the root of the second moment.
    pub epsilon: f32,
    /// Decoupled weight decay; 0 for tensors that do not decay.
    pub weight_decay: f32,
}

/// An ordered stream of work on one device.
///
/// # Safety
/// Work on memory that is not deferred ([`Region::deferred`](crate::Region::deferred)) has finished
/// when the call that enqueues it returns, or the stream refuses such memory: safe code reads it as
/// slices.
///
/// Whoever lends memory to an operation in flight trusts a stream with it: work that is enqueued
/// after [`Stream::wait_for`] must not touch any memory before the event has happened, nor ever if
/// the event fails. An event of [`Stream::record`] must not end before all work enqueued earlier
/// has finished with its memory, and must fail if any of that work could not run.
pub unsafe trait Stream: Send {
    /// An event that happens once everything enqueued so far has run. It fails if this stream waits
    /// for an event that fails.
    fn record(&self) -> Event;

    /// The place behind everything enqueued so far, for its time. What a stream does not say
    /// otherwise is the time of this call, which is right where work has run when its call returns.
    fn stamp(&self) -> Stamp {
        Stamp::now()
    }

    /// Work enqueued from now on runs after `event`. On a device that runs work at once this blocks
    /// until then.
    ///
    /// If the event fails, this stream runs no more work: everything that is enqueued from now on
    /// comes after the failure.
    fn wait_for(&self, event: &Event);

    /// Blocks the host until everything enqueued so far has run.
    ///
    /// # Errors
    /// The failure of the first event that this stream waited for and that failed.
    fn synchronize(&self) -> Result<(), Failure>;

    /// How often the host has waited for this stream so far: calls of [`Stream::synchronize`] and
    /// [`Stream::read_bytes`].
    fn host_waits(&self) -> u64;

    /// Copies bytes of the host into `out`: exactly its size. The caller may change `bytes` as soon
    /// as the call returns, and does not wait for work that was enqueued before: a device with
    /// memory of its own copies them to pinned memory, and from there when the stream comes to it.
    fn upload_bytes(&self, out: ViewMut<'_>, bytes: &[u8]);

    /// Copies `x` to the host, after everything enqueued before; blocks until then. `out` has
    /// exactly its size.
    ///
    /// # Errors
    /// As for [`Stream::synchronize`]; `out` is then unchanged.
    fn read_bytes(&self, x: View<'_>, out: &mut [u8]) -> Result<(), Failure>;

    /// out = 0.
    fn zero(&self, out: ViewMut<'_>);

    /// out = x, rounded to the nearest even where `out` is narrower. f32 ↔ bf16, or equal types.
    fn cast(&self, out: ViewMut<'_>, x: View<'_>);

    /// out\[0\] = weight · Σ xᵢ² over the finite xᵢ, out\[1\] = number of non-finite xᵢ. `out: [2]`
    /// f64, `x: [n]` f32 or bf16. Products and sums are f64.
    fn square_norm(&self, out: ViewMut<'_>, x: View<'_>, weight: f64);

    /// out = x, of equal types, in memory of any space that the device reaches.
    fn copy(&self, out: ViewMut<'_>, x: View<'_>);

    /// out += x. `out, x: [n]` f32.
    fn accumulate(&self, out: ViewMut<'_>, x: View<'_>);

    /// AdamW's update number `step`, from 1, in one pass: with g = scale · grad, m ← β₁m + (1−β₁)g,
    /// v ← β₂v + (1−β₂)g², master ← master·(1 − lr·decay) − lr/(1−β₁ᵗ) · m / (√v/√(1−β₂ᵗ) + ε) at t
    /// = step, and `weights`, if given, ← master, rounded to its type. `weights` and `grad` are
    /// `[n]` f32 or bf16, `master`, `m` and `v` `[n]` f32. `scale`, which averages and clips, is
    /// `[1]` f32: the device reads it when the update runs.
    #[allow(clippy::too_many_arguments)]
    fn adamw(
        &self,
        weights: Option<ViewMut<'_>>,
        master: ViewMut<'_>,
        m: ViewMut<'_>,
        v: ViewMut<'_>,
        grad: View<'_>,
        scale: View<'_>,
        settings: AdamW,
        step: u64,
    );

    /// The mathematics of a model on this stream, where the device has it.
    fn kernels(&self) -> Option<&dyn Kernels> {
        None
    }
}

impl dyn Stream + '_ {
    /// Copies `data` into `out`: same type, same length.
    pub fn upload<T: Element>(&self, out: ViewMut<'_>, data: &[T]) {
        check(out.dtype(), out.len(), T::DTYPE, data.len());
        self.upload_bytes(out, bytemuck::cast_slice(data));
    }

    /// out += data, added up on the host: for gradients that something else than kernels has
    /// computed. Same type, same length; blocks until everything enqueued before has run.
    ///
    /// # Errors
    /// As for [`Stream::synchronize`].
    pub fn accumulate_from<T: Element + std::ops::AddAssign>(
        &self,
        mut out: ViewMut<'_>,
        data: &[T],
    ) -> Result<(), Failure> {
        check(out.dtype(), out.len(), T::DTYPE, data.len());
        let mut sums: Vec<T> = self.download(out.as_view())?;
        sums.iter_mut().zip(data).for_each(|(sum, &value)| *sum += value);
        self.upload(out.reborrow(), &sums);
        Ok(())
    }

    /// Copies `x` to the host; blocks until everything enqueued before has run.
    ///
    /// # Errors
    /// As for [`Stream::synchronize`].
    pub fn download<T: Element>(&self, x: View<'_>) -> Result<Vec<T>, Failure> {
        let mut data = vec![T::zeroed(); x.len()];
        self.read(x, &mut data)?;
        Ok(data)
    }

    /// The bytes of `x`, copied to the host; blocks until everything enqueued before has run.
    ///
    /// # Errors
    /// As for [`Stream::synchronize`].
    pub fn download_bytes(&self, x: View<'_>) -> Result<Vec<u8>, Failure> {
        let mut data = vec![0; x.len() * x.dtype().bytes()];
        self.read_bytes(x, &mut data)?;
        Ok(data)
    }

    /// As [`Stream::download`], into memory of the caller's: same type, same length.
    ///
    /// # Errors
    /// As for [`Stream::synchronize`].
    ///
    /// [`Stream::download`]: #method.download
    pub fn read<T: Element>(&self, x: View<'_>, out: &mut [T]) -> Result<(), Failure> {
        check(x.dtype(), x.len(), T::DTYPE, out.len());
        self.read_bytes(x, bytemuck::cast_slice_mut(out))
    }
}

fn check(dtype: DType, len: usize, host_dtype: DType, host_len: usize) {
    assert!(dtype == host_dtype && len == host_len, "a transfer between {len} × {dtype} and {host_len} × {host_dtype}");
}
