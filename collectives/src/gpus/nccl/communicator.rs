//! A communicator of NCCL's, whose calls return at once and are asked about until they are done.

use std::ffi::{c_int, c_void};
use std::time::{Duration, Instant};

use parking_lot::RwLock;
use pillion_kernels::{Cuda, DType, Raw as Elements};

use super::library::{Config, IN_PROGRESS, Library, Raw, SUCCESS, UniqueId};
use crate::Error;

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
    /// Broken off: None. Calls hold it for reading; NCCL frees it when it breaks it off.
    raw: RwLock<Option<Handle>>,
    /// How this rank's memory is registered, in words.
    pub(super) registered: &'static str,
}

#[derive(Clone, Copy)]
struct Handle(Raw);

// SAFETY: NCCL's communicators may be used from any thread, one call at a time but for questions
// about errors; `Gpus` makes one call at a time.
unsafe impl Send for Handle {}
// SAFETY: as above.
unsafe impl Sync for Handle {}

/// What one group of calls enqueues: all run together.
pub(super) struct Group<'a> {
    library: &'a Library,
    raw: Raw,
    stream: *mut c_void,
}

/// `ncclDataType_t`.
fn number(dtype: DType) -> c_int {
    match dtype {
        DType::F32 => 7,
        DType::F64 => 8,
        DType::Bf16 => 9,
        other => unreachable!("sums of {other} are refused"),
    }
}
/// Bytes, for what is only moved.
const UINT8: c_int = 1;
/// `ncclSum`.
const SUM: c_int = 0;

fn pointer(elements: Elements) -> *mut c_void {
    elements.pointer.as_ptr().cast()
}

fn bytes(elements: Elements) -> usize {
    elements.len * elements.dtype.bytes()
}

impl Group<'_> {
    /// Gathers `from` of every rank into `to`, in order of rank.
    pub(super) fn all_gather(&self, to: Elements, from: Elements) -> c_int {
        // SAFETY: `Communicator::enqueue`'s promise.
        unsafe { (self.library.all_gather)(pointer(from), pointer(to), bytes(from), UINT8, self.raw, self.stream) }
    }

    /// Sums the ranks' `from`, and puts this rank's part into `to`.
    pub(super) fn reduce_scatter(&self, to: Elements, from: Elements) -> c_int {
        let (dtype, stream) = (number(from.dtype), self.stream);
        // SAFETY: as above.
        unsafe { (self.library.reduce_scatter)(pointer(from), pointer(to), to.len, dtype, SUM, self.raw, stream) }
    }

    /// Sums the ranks' `from` into `to`.
    pub(super) fn all_reduce(&self, to: Elements, from: Elements) -> c_int {
        let (dtype, stream) = (number(from.dtype), self.stream);
        // SAFETY: as above.
        unsafe { (self.library.all_reduce)(pointer(from), pointer(to), to.len, dtype, SUM, self.raw, stream) }
    }

    /// Sends `buffer` of rank `root` to all.
    pub(super) fn broadcast(&self, buffer: Elements, root: usize) -> c_int {
        let (at, len) = (pointer(buffer), bytes(buffer));
        // SAFETY: as above.
        unsafe { (self.library.broadcast)(at, at, len, UINT8, root as c_int, self.raw, self.stream) }
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
        result => Err(failed("making an id", library.explain(result, std::ptr::null_mut()))),
    }
}

fn failed(doing: &str, reason: String) -> Error {
    Error::System { what: "NCCL", reason: format!("{doing}: {reason} (NCCL_DEBUG=INFO says more)") }
}

impl Communicator {
    /// Connects the ranks that have this id, which all call it. `copies` asks for gathers by copy
    /// engines, where NCCL has them.
    ///
    /// # Errors
    /// [`Error::System`] with NCCL's reason, or where it takes longer than `limit`; `look`'s.
    pub(super) fn connect(
        library: &'static Library,
        gpu: &Cuda,
        id: UniqueId,
        world: usize,
        rank: usize,
        copies: bool,
        look: &Look<'_>,
        limit: Duration,
    ) -> Result<Communicator, Error> {
        gpu.bind().map_err(|error| failed("connecting", error.to_string()))?;
        let mut config = Config::new();
        if library.version < Library::WINDOWS {
            (config.size, config.version) = (Config::OF_2_17, 21_700);
        }
        if copies && library.version >= Library::COPY_ENGINES {
            config.cta_policy = 2;
        }
        let mut raw = std::ptr::null_mut();
        // SAFETY: pointers to locals, which NCCL copies before it returns.
        let result = unsafe { (library.init)(&mut raw, world as c_int, id, rank as c_int, &mut config) };
        if !matches!(result, SUCCESS | IN_PROGRESS) {
            return Err(failed("connecting", library.explain(result, std::ptr::null_mut())));
        }
        let raw = RwLock::new(Some(Handle(raw)));
        let communicator = Communicator { library, gpu: gpu.clone(), raw, registered: "nothing" };
        let settled = communicator.settle("connecting", look, limit);
        match settled.and_then(|()| communicator.register(look, limit)) {
            Ok(registered) => Ok(Communicator { registered, ..communicator }),
            Err(error) => {
                communicator.break_off();
                Err(error)
            }
        }
    }

    /// Registers this rank's memory, so that NCCL needs no copies through its own. Where it refuses,
    /// operations work all the same. Returns as what it is registered.
    fn register(&self, look: &Look<'_>, limit: Duration) -> Result<&'static str, Error> {
        let (start, bytes) = self.gpu.slab();
        let (start, mut handle) = (std::ptr::with_exposed_provenance_mut(start as usize), std::ptr::null_mut());
        const SYMMETRIC: c_int = 1;
        let window = self.library.window_register.filter(|_| self.library.version >= Library::WINDOWS);
        if let Some(window) = window {
            // SAFETY: the whole slab, which stays mapped longer than this communicator; it goes with
            // the communicator.
            let result = self.with(|raw| unsafe { window(raw, start, bytes as usize, &mut handle, SYMMETRIC) })?;
            if matches!(result, SUCCESS | IN_PROGRESS) {
                self.settle("registering memory", look, limit)?;
                // NCCL leaves it null where it has no use for a window.
                if !handle.is_null() {
                    return Ok("a window");
                }
            }
        }
        // SAFETY: as above.
        let result = self.with(|raw| unsafe { (self.library.register)(raw, start, bytes as usize, &mut handle) })?;
        if !matches!(result, SUCCESS | IN_PROGRESS) {
            return Ok("nothing");
        }
        self.settle("registering memory", look, limit)?;
        Ok("a buffer")
    }

    /// Calls NCCL, unless this is broken off.
    fn with<R>(&self, call: impl FnOnce(Raw) -> R) -> Result<R, Error> {
        let raw = self.raw.read();
        match *raw {
            Some(Handle(raw)) => Ok(call(raw)),
            None => Err(failed("calling it", "the communicator was broken off after a failure".to_owned())),
        }
    }

    /// Whether what was called is done.
    ///
    /// # Errors
    /// [`Error::System`] with what failed, here or at another rank.
    pub(super) fn is_settled(&self, doing: &str) -> Result<bool, Error> {
        let (result, reason) = self.with(|raw| {
            let mut state = SUCCESS;
            // SAFETY: a communicator that is not broken off, and a pointer to a local.
            let result = unsafe { (self.library.async_error)(raw, &mut state) };
            let result = if result == SUCCESS { state } else { result };
            let is_error = !matches!(result, SUCCESS | IN_PROGRESS);
            (result, if is_error { self.library.explain(result, raw) } else { String::new() })
        })?;
        if reason.is_empty() { Ok(result == SUCCESS) } else { Err(failed(doing, reason)) }
    }

    /// Waits until what was called is done: until then the stream must not be given anything else.
    fn settle(&self, doing: &str, look: &Look<'_>, limit: Duration) -> Result<(), Error> {
        let began = Instant::now();
        while !self.is_settled(doing)? {
            look()?;
            if began.elapsed() >= limit {
                return Err(failed(doing, format!("it is not done after {} s", began.elapsed().as_secs())));
            }
            std::thread::sleep(ASK_EVERY);
        }
        Ok(())
    }

    /// Enqueues a group of calls on a stream of this GPU, as one.
    ///
    /// # Safety
    /// The memory that the calls name is of this GPU, as long as they say, and stays valid until the
    /// stream has run them; nobody else writes it meanwhile, or reads what they write.
    ///
    /// # Errors
    /// As for [`Communicator::connect`].
    pub(super) unsafe fn enqueue(
        &self,
        stream: *mut c_void,
        doing: &str,
        look: &Look<'_>,
        limit: Duration,
        calls: impl FnOnce(&Group<'_>) -> Vec<c_int>,
    ) -> Result<(), Error> {
        let library = self.library;
        let reason = self.with(|raw| {
            // SAFETY: every group that is started is ended.
            let started = unsafe { (library.group_start)() };
            let group = Group { library, raw, stream };
            let results = if started == SUCCESS { calls(&group) } else { vec![started] };
            // SAFETY: as above.
            let ended = unsafe { (library.group_end)() };
            let is_error = |result: &&c_int| !matches!(**result, SUCCESS | IN_PROGRESS);
            let all: Vec<c_int> = results.into_iter().chain([ended]).collect();
            all.iter().find(is_error).map(|&result| library.explain(result, raw))
        })?;
        match reason {
            Some(reason) => Err(failed(doing, reason)),
            None => self.settle(doing, look, limit),
        }
    }

    /// Ends the communicator, whose streams are idle: NCCL may take its time, and is left behind
    /// where it takes too long.
    pub(super) fn end(&self) {
        let Some(Handle(raw)) = self.raw.write().take() else { return };
        let (library, handle, gpu) = (self.library, Handle(raw), self.gpu.clone());
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
        });
    }

    /// Breaks the communicator off: its kernels end, whatever they wait for. This rank's work has
    /// been stopped before, so nothing uses what they leave.
    pub(super) fn break_off(&self) {
        // A call that hangs keeps it, and this ends that call.
        let handle = match self.raw.try_write_for(END_WITHIN) {
            Some(mut raw) => raw.take(),
            None => *self.raw.read(),
        };
        let Some(handle) = handle else { return };
        let (library, gpu) = (self.library, self.gpu.clone());
        detached("pillion-nccl-abort", move || {
            let Handle(raw) = { handle };
            let _ = gpu.bind();
            // SAFETY: a communicator that nobody else has any more.
            let _ = unsafe { (library.abort)(raw) };
        });
    }
}

/// Runs what may never return on a thread of its own, and waits for it no longer than
/// [`END_WITHIN`].
fn detached(name: &str, work: impl FnOnce() + Send + 'static) {
    let (done, is_done) = std::sync::mpsc::channel();
    let started = std::thread::Builder::new().name(name.to_owned()).spawn(move || {
        work();
        let _ = done.send(());
    });
    if started.is_ok() {
        let _ = is_done.recv_timeout(END_WITHIN);
    }
}
