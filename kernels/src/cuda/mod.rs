//! NVIDIA's GPUs as devices.
//!
//! A [`Cuda`] is one rank's share of a GPU: one allocation ([`slab`]), from which all its buffers
//! are cut, a [`latch`] that stops its work after a failure, and streams. Ranks that are threads of
//! one process share the GPU's primary context ([`context`]).
//!
//! The kernels are in `kernels/cuda`, in CUDA C++. [`compile`] compiles them at first use; matrix
//! products are cuBLASLt's ([`blas`]). Nothing of NVIDIA's is needed to build this crate:
//! [`library`] finds the libraries when a device is made.
//!
//! Every kernel returns at once and runs when its stream comes to it, so all memory is deferred
//! ([`Region::deferred`]). [`event`] has the moments of a stream, and the thread that watches them
//! for the host.

mod attention;
mod blas;
mod clock;
mod compile;
mod context;
mod driver;
mod error;
mod event;
mod kernels;
mod latch;
mod launch;
mod library;
mod mapped;
mod patience;
mod pinned;
mod processes;
mod reduce;
mod scratch;
mod slab;
mod stream;

use std::sync::{Arc, OnceLock, Weak};
use std::time::{Duration, Instant};

use cudarc::driver::sys::{CUdeviceptr, CUstream, CUstream_flags};
use parking_lot::Mutex;

use crate::buffer::byte_count;
use crate::{AttentionShape, Buffer, DType, Device, Error, Failure, Raw, Region, Space, Stream};
pub use attention::Attention;
use clock::Clock;
use context::Context;
use driver::call;
pub use error::CudaError;
use event::{Pool, Recorder};
use latch::Latch;
pub use processes::{PeerMemory, Words};
use slab::Slab;
pub use stream::CudaStream;

/// One rank's share of a GPU.
#[derive(Clone)]
pub struct Cuda {
    inner: Arc<Inner>,
}

/// Says why another rank has failed, if it has. It must not wait.
pub type Witness = dyn Fn() -> Option<Failure> + Send + Sync;

/// What the buffers and streams of a rank share.
struct Inner {
    context: Arc<Context>,
    slab: Slab,
    latch: Latch,
    events: Arc<Pool>,
    clock: Clock,
    /// The first error of this rank's work.
    failure: OnceLock<Failure>,
    /// Who may know why other ranks failed.
    witnesses: Mutex<Vec<Weak<Witness>>>,
    /// Streams that have not been dropped.
    streams: Mutex<Vec<RawStream>>,
    /// Where new memory is zeroed.
    setup: RawStream,
}

/// A stream of the driver.
#[derive(Clone, Copy, PartialEq, Eq)]
struct RawStream(CUstream);

// SAFETY: the driver's handles may be used from any thread.
unsafe impl Send for RawStream {}
// SAFETY: as above.
unsafe impl Sync for RawStream {}

/// What is known of a GPU.
#[derive(Clone, Debug)]
pub struct CudaInfo {
    /// Its number among those that this process sees.
    pub ordinal: u32,
    /// Its name.
    pub name: String,
    /// What tells it from all others, also in other processes.
    pub uuid: [u8; 16],
    /// Bytes of memory that nobody uses.
    pub free: u64,
    /// Bytes of memory.
    pub total: u64,
    /// Version of the driver's interface: 1000 · major + 10 · minor.
    pub driver: u32,
}

impl Cuda {
    /// Sets `bytes` bytes of the GPU's memory aside for this rank. `ordinal` is the GPU's number
    /// among those that this process sees.
    ///
    /// The first call for a GPU compiles its kernels, or reads what an earlier process has compiled
    /// from the folder PILLION_CUDA_CACHE (by default `pillion/cuda` in the user's cache).
    ///
    /// # Errors
    /// [`Error::Cuda`]: without NVIDIA's libraries, without the GPU, without so much memory.
    pub fn new(ordinal: u32, bytes: u64) -> Result<Cuda, Error> {
        let context = Context::of(ordinal)?;
        let slab = Slab::map(&context, bytes.saturating_add(Latch::BYTES))?;
        let latch = Latch::open(&context, slab.first(Latch::BYTES)?)?;
        let setup = RawStream::create(&context)?;
        let clock = Clock::new(Pool::timed(&context), setup.0)?;
        let inner = Inner {
            events: Pool::new(&context),
            clock,
            context,
            slab,
            latch,
            failure: OnceLock::new(),
            witnesses: Mutex::default(),
            streams: Mutex::default(),
            setup,
        };
        Ok(Cuda { inner: Arc::new(inner) })
    }

    /// Sets what NVIDIA's libraries read from the environment, where it is not set and this process
    /// has no other thread yet. To be called before anything else of GPUs, at the start of a
    /// program.
    ///
    /// CUDA_DEVICE_MAX_CONNECTIONS becomes 32: so many queues of a GPU the streams of a process
    /// share, and with fewer queues than streams, a stream waits for others that it has no order
    /// with. NCCL_NVLS_ENABLE becomes 0: sums inside the switches of NVLink vary from call to call.
    ///
    /// Returns how many queues there are, where that is known.
    pub fn prepare() -> Option<u32> {
        const QUEUES: &str = "CUDA_DEVICE_MAX_CONNECTIONS";
        const MOST: u32 = 32;
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        let threads = status.lines().find_map(|line| line.strip_prefix("Threads:"));
        let is_alone = threads.is_some_and(|threads| threads.trim() == "1");
        let set = |name: &str, value: &str| {
            if is_alone && std::env::var_os(name).is_none() {
                // SAFETY: this thread is the only one of the process, so nobody reads the
                // environment meanwhile.
                unsafe { std::env::set_var(name, value) };
            }
        };
        set("NCCL_NVLS_ENABLE", "0");
        set(QUEUES, &MOST.to_string());
        std::env::var(QUEUES).ok()?.parse().ok()
    }

    /// How many GPUs this process sees.
    ///
    /// # Errors
    /// [`Error::Cuda`] without NVIDIA's driver.
    pub fn count() -> Result<u32, Error> {
        Ok(context::count()?)
    }

    /// What is known of a GPU.
    ///
    /// # Errors
    /// As for [`Cuda::new`].
    pub fn info(ordinal: u32) -> Result<CudaInfo, Error> {
        let context = Context::of(ordinal)?;
        let (free, total) = context.memory()?;
        let driver = context::driver_version()?;
        Ok(CudaInfo { ordinal, name: context.name.clone(), uuid: context.uuid, free, total, driver })
    }

    /// A new stream, ordered with nothing else, that also reduces.
    pub fn reducing_stream(&self) -> CudaStream {
        CudaStream::new(&self.inner)
    }

    /// Bytes that a stream takes for itself, beside what is allocated, to run a Llama of this shape
    /// and width in this type: workspace of products and of attention, and partial sums.
    pub fn working_bytes(shape: AttentionShape, width: usize, dtype: DType) -> u64 {
        let tokens = shape.batch * shape.seq;
        let sums = 4 * tokens.div_ceil(kernels::NORM_ROWS) * width + 8 * tokens;
        // A stream that meets a longer shape keeps the memory of the shorter ones.
        blas::WORKSPACE + attention::working_bytes(dtype, shape) + 2 * sums as u64 + (1 << 20)
    }

    /// Bytes that a stream takes beside those of [`Cuda::working_bytes`] for
    /// [`Kernels::attention_from`](crate::Kernels::attention_from): of at most `queries` tokens at a
    /// time, in a text of this shape.
    pub fn writing_bytes(shape: AttentionShape, queries: usize, dtype: DType) -> u64 {
        attention::working_bytes_from(dtype, shape, queries)
    }

    /// From now on a wait of the host fails when nothing of this rank's work has run for so long,
    /// or for the longest time of an earlier call. Before the first call it waits for ever, because
    /// a GPU that hangs reports no error. After such a failure the memory stays mapped until the
    /// process ends.
    pub fn be_patient(&self, least: Duration) {
        self.inner.events.patience().raise(least);
    }

    /// Tells that this rank's work has come further, where words in memory say so
    /// ([`Words`]): see [`Cuda::be_patient`].
    pub fn has_progressed(&self) {
        self.inner.events.patience().progress();
    }

    /// How this rank computes attention of this type and shape; see PILLION_ATTENTION in
    /// [`Attention`].
    pub fn attention(&self, dtype: DType, shape: AttentionShape) -> Attention {
        self.inner.context.attention.serving(dtype, shape)
    }

    /// Whether nothing of this rank's work has failed so far.
    ///
    /// # Errors
    /// The first failure.
    pub fn healthy(&self) -> Result<(), Failure> {
        self.inner.healthy()
    }

    /// Whether a buffer is this rank's.
    pub fn owns(&self, buffer: &Buffer) -> bool {
        self.inner.owns(buffer.view().raw())
    }

    /// Ends the work of this rank: every event fails with the first failure, and no memory is
    /// handed out twice any more.
    pub fn fail(&self, failure: Failure) {
        self.inner.fail_with(failure);
    }

    /// As [`Cuda::fail`], also for kernels that are enqueued already: those that have not begun 2 s
    /// later do nothing. For work that waits for something which will not come, before it is let go
    /// on.
    ///
    /// # Errors
    /// [`Error::Cuda`] where the driver refuses; then the GPU runs nothing any more.
    pub fn stop(&self, failure: Failure) -> Result<(), Error> {
        let inner = &self.inner;
        inner.fail_with(failure);
        inner.context.bind()?;
        inner.latch.set(inner.setup.0)?;
        let set = Recorder { pool: &inner.events, stream: inner.setup.0 }.record()?;
        // A queue that a blocked stream shares would never come to it. The host knows by now.
        let until = Instant::now() + Duration::from_secs(2);
        while !set.has_happened()? && Instant::now() < until {
            std::thread::sleep(Duration::from_micros(50));
        }
        Ok(())
    }

    /// Makes this GPU the one that the calling thread's calls are for, those of other libraries
    /// too.
    ///
    /// # Errors
    /// [`Error::Cuda`] where the driver refuses.
    pub fn bind(&self) -> Result<(), Error> {
        Ok(self.inner.context.bind()?)
    }

    /// Where this rank's memory lies on the GPU, and its size in bytes.
    pub fn slab(&self) -> (u64, u64) {
        let mapped = &self.inner.slab.mapped;
        (mapped.start, mapped.bytes)
    }

    /// Asks `witness`, while it lives, for the failure of this rank's work where another rank's
    /// failed first: the GPU knows only that one did.
    pub fn ask(&self, witness: &Arc<Witness>) {
        let mut witnesses = self.inner.witnesses.lock();
        witnesses.retain(|witness| witness.strong_count() > 0);
        witnesses.push(Arc::downgrade(witness));
    }

    /// Whether this GPU reads and writes memory of the other.
    pub fn reaches(&self, other: &Cuda) -> bool {
        self.inner.context.reaches(&other.inner.context)
    }

    /// What tells the GPU from all others, also in other processes.
    pub fn uuid(&self) -> [u8; 16] {
        self.inner.context.uuid
    }

    /// The GPU's number.
    pub fn ordinal(&self) -> u32 {
        self.inner.context.ordinal
    }

    /// The GPU's name.
    pub fn gpu(&self) -> &str {
        &self.inner.context.name
    }

    /// Bytes in use, and bytes set aside.
    pub fn memory(&self) -> (u64, u64) {
        (self.inner.slab.used(), self.inner.slab.mapped.bytes)
    }
}

// SAFETY: all memory is marked as deferred. `take_in` accepts this rank's own memory alone, and
// returns it as it was.
unsafe impl Device for Cuda {
    fn name(&self) -> &'static str {
        "cuda"
    }

    fn allocate(&self, dtype: DType, len: usize) -> Result<Buffer, Error> {
        let region = slab::region(&self.inner, byte_count(self.name(), dtype, len)? as u64)?;
        let buffer = Buffer::whole(region, dtype)?;
        self.inner.zero(&buffer)?;
        Ok(buffer)
    }

    fn stream(&self) -> Box<dyn Stream> {
        Box::new(CudaStream::new(&self.inner))
    }

    fn take_in(&self, region: Region) -> Result<Region, Error> {
        let start = region.start().as_ptr().expose_provenance() as CUdeviceptr;
        match region.space() {
            Space::Device(ordinal) if ordinal == self.ordinal() && self.inner.slab.mapped.contains(start, 0) => {
                Ok(region.deferred())
            }
            other => Err(CudaError::Reach { ordinal: self.ordinal(), space: other }.into()),
        }
    }
}

impl Inner {
    /// Zeroes a new buffer, and waits for that.
    fn zero(&self, buffer: &Buffer) -> Result<(), CudaError> {
        if buffer.is_empty() {
            return Ok(());
        }
        let zero = || {
            self.context.bind()?;
            // SAFETY: the buffer's memory, which nobody else uses. Where the wait fails, the rank
            // has failed, and its memory is not handed out again.
            unsafe { call!(cuMemsetD8Async(launch::address(&buffer.view()), 0, buffer.bytes(), self.setup.0))? };
            Recorder { pool: &self.events, stream: self.setup.0 }.record()?.wait()
        };
        zero().inspect_err(|error: &CudaError| drop(self.fail(error.clone())))
    }

    /// Whether these elements lie in this rank's slab.
    fn owns(&self, raw: Raw) -> bool {
        let address = raw.pointer.as_ptr().expose_provenance() as CUdeviceptr;
        let bytes = (raw.len * raw.dtype.bytes()) as u64;
        raw.space == Space::Device(self.context.ordinal) && self.slab.mapped.contains(address, bytes)
    }

    /// The first error of this rank's work, if there was one.
    fn healthy(&self) -> Result<(), Failure> {
        if let Some(failure) = self.failure.get() {
            return Err(failure.clone());
        }
        // A forked child may not even read pinned memory.
        self.context.check().map_err(|error| Failure::new(Error::from(error)))?;
        match self.latch.code() {
            0 => Ok(()),
            code => match CudaError::of_latch(code) {
                Some(CudaError::Peer) => {
                    let witnesses: Vec<Arc<Witness>> = self.witnesses.lock().iter().filter_map(Weak::upgrade).collect();
                    let known = witnesses.iter().find_map(|witness| witness());
                    Err(self.fail_with(known.unwrap_or_else(|| Failure::new(Error::from(CudaError::Peer)))))
                }
                Some(error) => Err(self.fail(error)),
                // Whoever lets a stream go on after a failed event keeps the failure first.
                None => Err(self.failure.get().cloned().expect("a failure is kept before the latch is set")),
            },
        }
    }

    /// Remembers an error of this rank's work; returns the first one.
    fn fail(&self, error: CudaError) -> Failure {
        self.fail_with(Failure::new(Error::from(error)))
    }

    fn fail_with(&self, failure: Failure) -> Failure {
        self.failure.get_or_init(|| failure).clone()
    }

    /// Waits for everything that is enqueued; whether nothing has failed.
    fn is_idle(&self) -> bool {
        let streams = self.streams.lock();
        let moments: Result<Vec<_>, _> =
            streams.iter().map(|stream| Recorder { pool: &self.events, stream: stream.0 }.record()).collect();
        // A stream is dropped under this lock.
        let waited = moments.and_then(|moments| moments.iter().try_for_each(|moment| moment.wait()));
        waited.map_err(|error| self.fail(error)).is_ok() && self.healthy().is_ok()
    }
}

impl RawStream {
    fn create(context: &Context) -> Result<RawStream, CudaError> {
        context.bind()?;
        let mut stream = std::ptr::null_mut();
        let flags = CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: a pointer to a local.
        unsafe { call!(cuStreamCreateWithPriority(&mut stream, flags, 0))? };
        Ok(RawStream(stream))
    }

    /// Gives the stream back; its work has run.
    fn destroy(self) {
        // SAFETY: created above, and destroyed once, by its owner.
        unsafe {
            let _ = call!(cuStreamDestroy_v2(self.0));
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        if self.context.may_release() {
            self.setup.destroy();
        }
    }
}
