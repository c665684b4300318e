//! A communicator of NCCL's, whose calls return at once and are asked about until they are done.
//!
//! This rank's memory is registered as a buffer, and not as a symmetric window: in a window,
//! buffers of an operation have to lie at the same place on every rank, and ranks allocate as they
//! like.

use std::ffi::{c_int, c_void};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use pillion_kernels::{Cuda, DType, Raw as Elements};

use super::library::{Config, IN_PROGRESS, Library, Raw, SUCCESS, UniqueId};
use crate::Error;
use crate::memory::fork::Maker;

/// How often NCCL is asked whether it is done.
const ASK_EVERY: Duration = Duration::from_micros(50);
/// How long it may take to end a communicator, or to break it off.
const END_WITHIN: Duration = Duration::from_secs(10);

/// Asked while NCCL is waited for; an error ends the wait.
pub(super) type Look<'a> = dyn Fn() -> Result<(), Error> + 'a;

/// A communicator.
pub(super) struct Communicator {
    library: &'static Library,
    gpu: Cuda,
    handle: Handle,
    /// Held while NCCL is called: even questions change a communicator.
    calls: Mutex<()>,
    /// Nobody calls NCCL any more: whoever sets it ends the communicator, or breaks it off.
    is_over: AtomicBool,
    /// Whether NCCL uses this rank's memory as it is.
    pub(super) is_registered: bool,
    maker: Maker,
}

#[derive(Clone, Copy)]
struct Handle(Raw);

// SAFETY: NCCL's communicators may be used from any thread, one call at a time: `calls` sees to
// that, but for breaking off, which NCCL allows beside another call.
unsafe impl Send for Handle {}
// SAFETY: as above.
unsafe impl Sync for Handle {}

/// One of the calls that run together.
pub(super) enum Call {
    /// Gathers the second of every rank into the first, in order of rank.
    AllGather(Elements, Elements),
    /// Sums the ranks' second, and puts this rank's part into the first.
    ReduceScatter(Elements, Elements),
    /// Sums the ranks' second into the first.
    AllReduce(Elements, Elements),
    /// Sends the buffer of a rank to all.
    Broadcast(Elements, usize),
}

/// `ncclDataType_t`.
fn number(dtype: DType) -> c_int {
    match dtype {
        DType::F32 => 7,
        DType::F64 => 8,
        other => unreachable!("NCCL is not asked for sums of {other}"),
    }
}
/// Bytes, for what is only moved.
const UINT8: c_int = 1;
/// `ncclSum`.
const SUM: c_int = 0;

impl Call {
    /// # Safety
    /// That of [`Communicator::enqueue`].
    unsafe fn make(&self, library: &Library, raw: Raw, stream: *mut c_void) -> c_int {
        let at = |elements: Elements| elements.pointer.as_ptr().cast::<c_void>();
        let bytes = |elements: Elements| elements.len * elements.dtype.bytes();
        // SAFETY: the caller's promise.
        unsafe {
            match *self {
                Call::AllGather(to, from) => (library.all_gather)(at(from), at(to), bytes(from), UINT8, raw, stream),
                Call::ReduceScatter(to, from) => {
                    (library.reduce_scatter)(at(from), at(to), to.len, number(from.dtype), SUM, raw, stream)
                }
                Call::AllReduce(to, from) => {
                    (library.all_reduce)(at(from), at(to), to.len, number(from.dtype), SUM, raw, stream)
                }
                Call::Broadcast(buffer, root) => {
                    (library.broadcast)(at(buffer), at(buffer), bytes(buffer), UINT8, root as c_int, raw, stream)
                }
            }
        }
    }
}

/// An id for the ranks of a communicator: one of them asks for it, and gives it to the others.
///
/// # Errors
/// [`Error::System`] with NCCL's reason, for instance without a network interface.
pub(super) fn unique_id(library: &'static Library) -> Result<UniqueId, Error> {
    let mut id = UniqueId([0; 128]);
    // SAFETY: a pointer to a local of this type.
    match unsafe { (library.get_unique_id)(&mut id) } {
        SUCCESS => Ok(id),
        result => Err(failed("making an id", library.explain(result))),
    }
}

fn failed(doing: &str, reason: String) -> Error {
    Error::System { what: "NCCL", reason: format!("{doing}: {reason} (NCCL_DEBUG=INFO says more)") }
}

fn is_error(result: c_int) -> bool {
    !matches!(result, SUCCESS | IN_PROGRESS)
}

impl Communicator {
    /// Connects the ranks that have this id, which all call it.
    ///
    /// # Errors
    /// [`Error::System`] with NCCL's reason, or where it takes longer than `limit`; `look`'s.
    pub(super) fn connect(
        library: &'static Library,
        gpu: &Cuda,
        id: UniqueId,
        (rank, world): (usize, usize),
        look: &Look<'_>,
        limit: Duration,
    ) -> Result<Communicator, Error> {
        gpu.bind().map_err(|error| failed("connecting", error.to_string()))?;
        let (mut config, mut raw) = (Config::new(), std::ptr::null_mut());
        // SAFETY: pointers to locals; NCCL copies the configuration, and writes the communicator,
        // before it returns.
        let result = unsafe { (library.init)(&mut raw, world as c_int, id, rank as c_int, &mut config) };
        if is_error(result) || raw.is_null() {
            return Err(failed("connecting", library.explain(result)));
        }
        // From here on it is broken off where it is dropped.
        let mut communicator = Communicator {
            library,
            gpu: gpu.clone(),
            handle: Handle(raw),
            calls: Mutex::new(()),
            is_over: AtomicBool::new(false),
            is_registered: false,
            maker: Maker::this(),
        };
        communicator.settle("connecting", look, limit)?;
        communicator.is_registered = communicator.register()?;
        communicator.settle("registering memory", look, limit)?;
        Ok(communicator)
    }

    /// Registers this rank's memory, so that NCCL need not copy through its own. Where it refuses,
    /// operations work all the same.
    fn register(&self) -> Result<bool, Error> {
        let (start, bytes) = self.gpu.slab();
        let (start, mut handle) = (std::ptr::with_exposed_provenance_mut(start as usize), std::ptr::null_mut());
        // SAFETY: the whole slab, which stays mapped as long as `gpu`; the registration goes with
        // the communicator. NCCL writes the handle before it returns.
        let result = self.with(|raw| unsafe { (self.library.register)(raw, start, bytes as usize, &mut handle) })?;
        Ok(!is_error(result) && !handle.is_null())
    }

    /// Calls NCCL, unless this is over.
    fn with<R>(&self, call: impl FnOnce(Raw) -> R) -> Result<R, Error> {
        let _one = self.calls.lock();
        if self.is_over.load(Ordering::Acquire) {
            return Err(failed("calling it", "the communicator was broken off after a failure".to_owned()));
        }
        Ok(call(self.handle.0))
    }

    /// Whether what was called is done. None while another thread calls NCCL.
    ///
    /// # Errors
    /// [`Error::System`] with what failed, here or at another rank.
    pub(super) fn is_settled(&self, doing: &str) -> Result<Option<bool>, Error> {
        let Some(_one) = self.calls.try_lock() else { return Ok(None) };
        if self.is_over.load(Ordering::Acquire) {
            return Ok(None);
        }
        self.ask(self.handle.0, doing).map(Some)
    }

    /// The same, of whoever holds `calls`.
    fn ask(&self, raw: Raw, doing: &str) -> Result<bool, Error> {
        let mut state = SUCCESS;
        // SAFETY: a communicator that is not over, and a pointer to a local.
        let result = unsafe { (self.library.async_error)(raw, &mut state) };
        let result = if result == SUCCESS { state } else { result };
        if is_error(result) { Err(failed(doing, self.library.explain(result))) } else { Ok(result == SUCCESS) }
    }

    /// Waits until what was called is done: until then the stream must not be given anything else.
    fn settle(&self, doing: &str, look: &Look<'_>, limit: Duration) -> Result<(), Error> {
        let began = Instant::now();
        while !self.with(|raw| self.ask(raw, doing))?? {
            look()?;
            if began.elapsed() >= limit {
                let seconds = began.elapsed().as_secs();
                let remedy = "do firewalls let its ranks connect, and does NCCL_SOCKET_IFNAME name the network?";
                return Err(failed(doing, format!("it is not done after {seconds} s: {remedy}")));
            }
            std::thread::sleep(ASK_EVERY);
        }
        Ok(())
    }

    /// Enqueues calls on a stream of this GPU, as one.
    ///
    /// # Safety
    /// The memory that the calls name is of this GPU, as long as they say, and stays valid until
    /// the stream has run them; nobody else writes it meanwhile, or reads what they write.
    ///
    /// # Errors
    /// As for [`Communicator::connect`].
    pub(super) unsafe fn enqueue(
        &self,
        stream: *mut c_void,
        calls: &[Call],
        doing: &str,
        look: &Look<'_>,
        limit: Duration,
    ) -> Result<(), Error> {
        let library = self.library;
        let result = self.with(|raw| {
            // SAFETY: the caller's promise. A group that is started is ended.
            unsafe {
                let mut result = (library.group_start)();
                if is_error(result) {
                    return result;
                }
                for call in calls {
                    let one = call.make(library, raw, stream);
                    result = if is_error(result) { result } else { one };
                }
                let ended = (library.group_end)();
                if is_error(result) { result } else { ended }
            }
        })?;
        if is_error(result) {
            return Err(failed(doing, library.explain(result)));
        }
        self.settle(doing, look, limit)
    }

    /// Takes the communicator from everybody; None where somebody has taken it.
    fn take(&self) -> Option<Handle> {
        // Whoever calls NCCL now is let go first; a call that hangs is ended by what follows.
        let _one = self.calls.try_lock_for(END_WITHIN);
        (!self.is_over.swap(true, Ordering::AcqRel)).then_some(self.handle)
    }

    /// Ends the communicator, whose streams are idle. NCCL may take its time: see [`wait_for`].
    pub(super) fn end(&self) -> Option<Receiver<()>> {
        let (library, handle, gpu) = (self.library, self.take()?, self.gpu.clone());
        detached("pillion-nccl-end", move || {
            let Handle(raw) = { handle };
            if gpu.bind().is_err() {
                return;
            }
            // SAFETY: a communicator that nobody else has any more, and a pointer to a local.
            unsafe {
                let began = Instant::now();
                let mut state = (library.finalize)(raw);
                while state == IN_PROGRESS && began.elapsed() < END_WITHIN {
                    std::thread::sleep(ASK_EVERY);
                    if (library.async_error)(raw, &mut state) != SUCCESS {
                        break;
                    }
                }
                let _ = if state == SUCCESS { (library.destroy)(raw) } else { (library.abort)(raw) };
            }
        })
    }

    /// Breaks the communicator off: its kernels end, whatever they wait for. This rank's work has
    /// been stopped before, so nothing uses what they leave. As for [`Communicator::end`].
    pub(super) fn break_off(&self) -> Option<Receiver<()>> {
        let (library, handle, gpu) = (self.library, self.take()?, self.gpu.clone());
        detached("pillion-nccl-abort", move || {
            let Handle(raw) = { handle };
            let _ = gpu.bind();
            // SAFETY: a communicator that nobody takes up any more; a call that hangs in it is what
            // NCCL's abort is for.
            let _ = unsafe { (library.abort)(raw) };
        })
    }
}

impl Drop for Communicator {
    fn drop(&mut self) {
        // A forked child leaves it to its parent.
        if !self.maker.is_another() {
            wait_for(self.break_off());
        }
    }
}

/// Runs what may never return on a thread of its own, or here where the system starts none; what
/// tells when it has returned.
fn detached(name: &str, work: impl Fn() + Send + Sync + 'static) -> Option<Receiver<()>> {
    let work = std::sync::Arc::new(work);
    let (done, is_done) = std::sync::mpsc::channel();
    let there = work.clone();
    let started = std::thread::Builder::new().name(name.to_owned()).spawn(move || {
        there();
        let _ = done.send(());
    });
    if started.is_err() {
        work();
    }
    Some(is_done)
}

/// Waits for what is ending, no longer than [`END_WITHIN`]. What takes longer is left behind.
pub(super) fn wait_for(ending: impl IntoIterator<Item = Receiver<()>>) {
    let until = Instant::now() + END_WITHIN;
    for ending in ending {
        let _ = ending.recv_timeout(until.saturating_duration_since(Instant::now()));
    }
}
