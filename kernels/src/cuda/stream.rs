//! What the runtime and collectives need of a GPU's stream.

use std::cell::{Cell, OnceCell, RefCell};
use std::ffi::c_void;
use std::sync::Arc;
use std::task::Poll;

use cudarc::driver::sys::{CUstream, CUstreamWaitValue_flags};

use super::blas::Products;
use super::driver::call;
use super::event::{Foreign, Moment, Recorded, Recorder};
use super::launch::{Argument, Shape, address, address_mut, launch};
use super::pinned::Ring;
use super::scratch::Scratch;
use super::{CudaError, Inner, RawStream};
use crate::cpu::adamw::Update;
use crate::cpu::square_norm::PART;
use crate::event::All;
use crate::shapes::same;
use crate::{AdamW, DType, Event, Failure, Kernels, Raw, Stamp, Stream, View, ViewMut};

/// A stream of a GPU. Beside what every [`Stream`] does, it reduces.
pub struct CudaStream {
    pub(super) inner: Arc<Inner>,
    pub(super) stream: RawStream,
    /// Why this stream enqueues nothing any more.
    failure: OnceCell<Failure>,
    waits: Cell<u64>,
    /// Through which transfers pass. None where the stream could not be made.
    ring: RefCell<Option<Ring>>,
    /// Ranks whose latch or memory enqueued work may read.
    peers: RefCell<Vec<Arc<Inner>>>,
    pub(super) scratch: Scratch,
    pub(super) products: RefCell<Products>,
}

/// Which of the kernels for f32 and for bf16 serves this type.
///
/// # Panics
/// For other types.
pub(super) fn typed(dtype: DType) -> usize {
    match dtype {
        DType::F32 => 0,
        DType::Bf16 => 1,
        other => panic!("activations and weights are f32 or bf16, not {other}"),
    }
}

impl CudaStream {
    /// A new stream of a rank. Where the driver refuses it, its events fail.
    pub(super) fn new(inner: &Arc<Inner>) -> CudaStream {
        let made = Ring::new(&inner.context).and_then(|ring| Ok((RawStream::create(&inner.context)?, ring)));
        let (stream, ring, failure) = match made {
            Ok((stream, ring)) => {
                inner.streams.lock().push(stream);
                (stream, Some(ring), OnceCell::new())
            }
            Err(error) => (RawStream(std::ptr::null_mut()), None, OnceCell::from(inner.fail(error))),
        };
        CudaStream {
            inner: inner.clone(),
            stream,
            failure,
            waits: Cell::new(0),
            ring: RefCell::new(ring),
            peers: RefCell::default(),
            scratch: Scratch::default(),
            products: RefCell::default(),
        }
    }

    /// Enqueues work, unless this stream has failed; an error fails it.
    pub(super) fn enqueue(&self, work: impl FnOnce(CUstream) -> Result<(), CudaError>) {
        if self.failure.get().is_some() {
            return;
        }
        let enqueued = self.inner.context.bind().and_then(|()| work(self.stream.0));
        if let Err(error) = enqueued {
            let _ = self.failure.set(self.inner.fail(error));
        }
    }

    /// Enqueues one kernel, which writes and reads memory of this GPU.
    ///
    /// # Safety
    /// The arguments are those of the kernel after the latch.
    pub(super) unsafe fn kernel(&self, kernel: &str, shape: Shape, arguments: &[Argument]) {
        self.enqueue(|stream| {
            let (context, latch) = (&self.inner.context, self.inner.latch.address());
            // SAFETY: the caller's promise. Views lend memory of a slab, which stays mapped while
            // this stream lives, and no range of which is handed out again before its work has run.
            unsafe { launch(context, stream, kernel, shape, latch, arguments) }
        });
    }

    pub(super) fn recorder(&self) -> Recorder<'_> {
        Recorder { pool: &self.inner.events, stream: self.stream.0 }
    }

    /// The driver's handle, for a library that enqueues work here; the calling thread's calls are
    /// for this GPU then.
    ///
    /// # Errors
    /// Why this stream enqueues nothing any more.
    pub fn handle(&self) -> Result<*mut c_void, Failure> {
        if let Some(failure) = self.failure.get() {
            return Err(failure.clone());
        }
        let bound = self.inner.context.bind();
        bound.map_err(|error| self.failure.get_or_init(|| self.inner.fail(error)).clone())?;
        Ok(self.stream.0.cast())
    }

    /// Whether this stream enqueues what it is given.
    ///
    /// # Errors
    /// Why it does not any more.
    pub fn healthy(&self) -> Result<(), Failure> {
        self.failure.get().cloned().map_or(Ok(()), Err)
    }

    /// Waits until what was enqueued has run, also where this stream or this rank has failed.
    pub fn drain(&self) {
        if self.stream.0.is_null() {
            return;
        }
        if let Ok(moment) = self.inner.context.bind().and_then(|()| self.recorder().record()) {
            let _ = moment.wait();
        }
    }

    /// Begins to count times anew, now and then, while the host waits anyway.
    fn renew_clock(&self) {
        self.enqueue(|_| self.inner.clock.renew(self.inner.setup.0));
    }

    /// A moment behind everything that is enqueued.
    fn moment(&self) -> Result<Recorded, Failure> {
        if let Some(failure) = self.failure.get() {
            return Err(failure.clone());
        }
        let recorded = self.inner.context.bind().and_then(|()| self.recorder().record());
        recorded.map_err(|error| self.failure.get_or_init(|| self.inner.fail(error)).clone())
    }

    /// Panics for memory that is not this rank's: that is a programmer's error. Memory of another
    /// rank on the same GPU could be handed out again while this stream uses it.
    fn own(&self, raw: Raw) {
        let ordinal = self.inner.context.ordinal;
        let is_own = self.inner.owns(raw);
        assert!(is_own, "a stream of GPU {ordinal} was given {} that is not its rank's", raw.space);
    }

    pub(super) fn own_all(&self, writes: &[&ViewMut<'_>], reads: &[&View<'_>]) {
        writes.iter().for_each(|view| self.own(view.raw()));
        reads.iter().for_each(|view| self.own(view.raw()));
    }

    /// Transfers bytes between the GPU and `host` piece by piece, each through the ring.
    fn in_pieces(
        &self,
        bytes: usize,
        mut transfer: impl FnMut(&mut Ring, usize, usize) -> Result<(), CudaError>,
    ) -> Result<(), CudaError> {
        let mut ring = self.ring.borrow_mut();
        let ring = ring.as_mut().expect("a stream that could not be made has failed");
        (0..bytes).step_by(Ring::PIECE).try_for_each(|first| transfer(ring, first, Ring::PIECE.min(bytes - first)))
    }

    /// Orders this stream after a moment of a stream of this process, without the host.
    fn wait_for_moment(&self, moment: &Moment) {
        let (rank, recorded) = (moment.rank(), &moment.recorded);
        self.enqueue(|stream| {
            // SAFETY: the event lives, and the driver takes its moment over now.
            unsafe { call!(cuStreamWaitEvent(stream, recorded.event(), 0)) }?;
            if Arc::ptr_eq(rank, &self.inner) {
                return Ok(());
            }
            // What runs before another rank's moment may have done nothing, because its latch was
            // set.
            let (context, latch, other) = (&self.inner.context, self.inner.latch.address(), rank.latch.address());
            // SAFETY: follow_latch takes the address of a latch's code, which is its first word.
            // The other rank's is in its slab, which stays mapped while this stream keeps the rank.
            unsafe { launch(context, stream, "follow_latch", Shape::warp(), latch, &[other.into()]) }
        });
        let mut peers = self.peers.borrow_mut();
        if !Arc::ptr_eq(rank, &self.inner) && !peers.iter().any(|peer| Arc::ptr_eq(peer, rank)) {
            peers.push(rank.clone());
        }
    }

    /// Holds this stream up at a word of pinned memory until an event has ended that is no moment
    /// of this rank's streams.
    fn wait_at_word(&self, event: &Event) {
        self.enqueue(|stream| {
            let (word, address) = self.inner.latch.word()?;
            let at_least = CUstreamWaitValue_flags::CU_STREAM_WAIT_VALUE_GEQ as u32;
            // SAFETY: the word is of pinned memory that lives as long as `inner`, which the watcher
            // holds until it has written the word.
            let waited = unsafe { call!(cuStreamWaitValue32_v2(stream, address, 1, at_least)) };
            let followed = waited.and_then(|()| {
                let (context, latch) = (&self.inner.context, self.inner.latch.address());
                // SAFETY: `follow_event` takes a word's address.
                unsafe { launch(context, stream, "follow_event", Shape::warp(), latch, &[address.into()]) }
            });
            Foreign { event: event.clone(), inner: self.inner.clone(), word }.watch();
            followed?;
            self.inner.latch.retire(word, self.recorder().record()?);
            Ok(())
        });
    }
}

impl Drop for CudaStream {
    fn drop(&mut self) {
        // A forked child leaves it to its parent.
        if self.stream.0.is_null() || self.inner.context.bind().is_err() {
            return;
        }
        // Work that is still enqueued uses memory that this stream keeps.
        self.drain();
        if !self.inner.context.may_release() {
            // Work that hangs may use the memory of these ranks, too.
            self.peers.take().into_iter().for_each(std::mem::forget);
            return;
        }
        let mut streams = self.inner.streams.lock();
        streams.retain(|stream| *stream != self.stream);
        self.stream.destroy();
    }
}

// SAFETY: all memory of a `Cuda` is deferred. The driver runs the work of a stream in order, and
// behind a wait only once what it waits for has ended. Where an event fails, the latch is set
// before the stream goes on, and every kernel returns at once; what copies and products write then
// is memory of the slab, which no safe code reads in place and which `Slab::take` never hands out
// again after a failure. A moment is believed only after a look at the latch.
unsafe impl Stream for CudaStream {
    fn record(&self) -> Event {
        match self.moment() {
            Ok(recorded) => Moment::event(recorded, &self.inner),
            Err(failure) => Event::failed(failure),
        }
    }

    fn stamp(&self) -> Stamp {
        let mut stamp = None;
        self.enqueue(|stream| {
            stamp = Some(self.inner.clock.stamp(stream)?);
            Ok(())
        });
        stamp.map_or_else(Stamp::now, |stamped| Stamp::new(Arc::new(stamped)))
    }

    fn wait_for(&self, event: &Event) {
        if let Some(All(events)) = event.origin() {
            return events.iter().for_each(|event| self.wait_for(event));
        }
        if let Some(moment) = event.origin::<Moment>()
            && self.inner.context.reaches(&moment.rank().context)
        {
            return self.wait_for_moment(moment);
        }
        match event.status() {
            Poll::Ready(Ok(())) => {}
            Poll::Ready(Err(failure)) => {
                let _ = self.failure.set(self.inner.fail_with(failure));
            }
            Poll::Pending => self.wait_at_word(event),
        }
    }

    fn synchronize(&self) -> Result<(), Failure> {
        self.waits.set(self.waits.get() + 1);
        self.record().wait()?;
        self.renew_clock();
        Ok(())
    }

    fn host_waits(&self) -> u64 {
        self.waits.get()
    }

    fn upload_bytes(&self, out: ViewMut<'_>, bytes: &[u8]) {
        assert_eq!(out.len() * out.dtype().bytes(), bytes.len(), "an upload fills its buffer");
        self.own_all(&[&out], &[]);
        let to = address_mut(&out);
        self.enqueue(|stream| {
            self.in_pieces(bytes.len(), |ring, first, len| {
                ring.with(len, &self.recorder(), |piece| {
                    // SAFETY: the piece has `len` bytes that no transfer uses, and the copy reads
                    // them before the ring lends them again; `out` has as many bytes from there.
                    unsafe {
                        piece.as_ptr().copy_from_nonoverlapping(bytes[first..].as_ptr(), len);
                        call!(cuMemcpyHtoDAsync_v2(to + first as u64, piece.as_ptr().cast(), len, stream))
                    }
                })
                .map(drop)
            })
        });
    }

    fn read_bytes(&self, x: View<'_>, out: &mut [u8]) -> Result<(), Failure> {
        assert_eq!(x.len() * x.dtype().bytes(), out.len(), "a download fills its destination");
        self.own_all(&[], &[&x]);
        self.waits.set(self.waits.get() + 1);
        let from = address(&x);
        // What is read before a failure is seen is not what the caller asked for: `out` is
        // written at the end only.
        let mut read = Vec::with_capacity(out.len());
        self.enqueue(|stream| {
            self.in_pieces(out.len(), |ring, first, len| {
                let mut lent = None;
                let behind = ring.with(len, &self.recorder(), |piece| {
                    lent = Some(piece);
                    // SAFETY: the piece has `len` bytes that no transfer uses; so has `x` from
                    // there.
                    unsafe { call!(cuMemcpyDtoHAsync_v2(piece.as_ptr().cast(), from + first as u64, len, stream)) }
                })?;
                behind.wait()?;
                let piece = lent.expect("the ring has lent a piece");
                // SAFETY: the copy has run, so the bytes are there, and nobody writes them now.
                read.extend_from_slice(unsafe { std::slice::from_raw_parts(piece.as_ptr(), len) });
                Ok(())
            })
        });
        self.record().wait()?;
        out.copy_from_slice(&read);
        self.renew_clock();
        Ok(())
    }

    fn zero(&self, out: ViewMut<'_>) {
        self.own_all(&[&out], &[]);
        let bytes = out.len() * out.dtype().bytes();
        if bytes > 0 {
            let shape = Shape::for_elements(bytes, BYTES_OF_BLOCK);
            // SAFETY: zero(out, bytes).
            unsafe { self.kernel("zero", shape, &[(&out).into(), (bytes as u64).into()]) };
        }
    }

    fn cast(&self, out: ViewMut<'_>, x: View<'_>) {
        same("cast", &[out.len(), x.len()]);
        self.own_all(&[&out], &[&x]);
        if x.is_empty() {
            return;
        }
        let (kernel, len) = match (out.dtype(), x.dtype()) {
            (DType::F32, DType::Bf16) => ("cast_bf16_f32", x.len()),
            (DType::Bf16, DType::F32) => ("cast_f32_bf16", x.len()),
            (to, from) if to == from => ("copy", x.len() * to.bytes()),
            (to, from) => panic!("no cast from {from} to {to}"),
        };
        let each = if kernel == "copy" { BYTES_OF_BLOCK } else { ELEMENTS_OF_BLOCK };
        // SAFETY: (out, x, count): elements of a cast, bytes of a copy.
        unsafe {
            let arguments = [(&out).into(), (&x).into(), (len as u64).into()];
            self.kernel(kernel, Shape::for_elements(len, each), &arguments);
        }
    }

    fn square_norm(&self, out: ViewMut<'_>, x: View<'_>, weight: f64) {
        assert_eq!(out.len(), 2, "square_norm writes a sum and a count");
        assert!(out.dtype() == DType::F64, "square_norm writes f64, not {}", out.dtype());
        self.own_all(&[&out], &[&x]);
        let kernel = ["square_norm_parts_f32", "square_norm_parts_bf16"][typed(x.dtype())];
        let parts = x.len().div_ceil(PART);
        self.enqueue(|stream| {
            let (context, latch) = (&self.inner.context, self.inner.latch.address());
            let sums = self.scratch.take(&self.inner, 12 * parts as u64)?;
            let counts = sums + 8 * parts as u64;
            // SAFETY: parts(sums, counts, x, n), with a block for each part and room for each
            // block's sum and count; total(out, sums, counts, parts, weight).
            unsafe {
                if parts > 0 {
                    let arguments = [sums.into(), counts.into(), (&x).into(), (x.len() as u64).into()];
                    launch(context, stream, kernel, Shape::blocks(parts), latch, &arguments)?;
                }
                let arguments = [(&out).into(), sums.into(), counts.into(), (parts as u32).into(), weight.into()];
                launch(context, stream, "square_norm_total", Shape::blocks(1), latch, &arguments)
            }
        });
    }

    fn copy(&self, out: ViewMut<'_>, x: View<'_>) {
        assert!(out.dtype() == x.dtype(), "a copy from {} to {}", x.dtype(), out.dtype());
        self.cast(out, x);
    }

    fn accumulate(&self, out: ViewMut<'_>, x: View<'_>) {
        same("accumulate", &[out.len(), x.len()]);
        assert!(out.dtype() == DType::F32 && x.dtype() == DType::F32, "accumulate adds f32 to f32");
        self.own_all(&[&out], &[&x]);
        if x.is_empty() {
            return;
        }
        let arguments = [(&out).into(), (&x).into(), (x.len() as u64).into()];
        // SAFETY: accumulate(out, x, n).
        unsafe { self.kernel("accumulate", Shape::for_elements(x.len(), ELEMENTS_OF_BLOCK), &arguments) };
    }

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
    ) {
        same("adamw", &[master.len(), m.len(), v.len(), grad.len()]);
        assert!(scale.len() == 1, "adamw: a scale of {} numbers", scale.len());
        let states = [master.dtype(), m.dtype(), v.dtype(), scale.dtype()];
        assert!(states.iter().all(|&dtype| dtype == DType::F32), "adamw: state and scale are f32, not {states:?}");
        self.own_all(&[&master, &m, &v], &[&grad, &scale]);
        let kernels = match &weights {
            None => ["adamw_none_f32", "adamw_none_bf16"],
            Some(weights) => {
                same("adamw weights", &[weights.len(), master.len()]);
                self.own_all(&[weights], &[]);
                [["adamw_f32_f32", "adamw_f32_bf16"], ["adamw_bf16_f32", "adamw_bf16_bf16"]][typed(weights.dtype())]
            }
        };
        if master.is_empty() {
            return;
        }
        let update = Update::new(settings, step);
        let arguments = [
            weights.as_ref().map_or(0u64.into(), Argument::from),
            (&master).into(),
            (&m).into(),
            (&v).into(),
            (&grad).into(),
            (&scale).into(),
            (master.len() as u64).into(),
            update.keep.into(),
            update.rate.into(),
            update.root.into(),
            settings.beta1.into(),
            settings.beta2.into(),
            settings.epsilon.into(),
        ];
        // SAFETY: adamw(weights, master, m, v, grad, scale, n, keep, rate, root, β₁, β₂, ε).
        unsafe {
            self.kernel(
                kernels[typed(grad.dtype())],
                Shape::for_elements(master.len(), PARAMETERS_OF_BLOCK),
                &arguments,
            )
        };
    }

    fn kernels(&self) -> Option<&dyn Kernels> {
        Some(self)
    }
}

/// Elements that a block casts or adds: sixteen a thread.
pub(super) const ELEMENTS_OF_BLOCK: usize = 4096;
/// Bytes that a block copies or clears: four times 16 a thread.
pub(super) const BYTES_OF_BLOCK: usize = 16 << 10;
/// Parameters that a block updates, and elements that it reduces: eight a thread.
pub(super) const PARAMETERS_OF_BLOCK: usize = 2048;
