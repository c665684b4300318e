//! A GPU as this process sees it: one primary context for each, which is never given back.

use std::collections::BTreeMap;
use std::ffi::CStr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use cudarc::driver::sys::{self, CUcontext, CUdevice, CUdevice_attribute as Attribute};
use parking_lot::Mutex;

use super::compile::Functions;
use super::driver::call;
use super::{Attention, CudaError, library};

/// A GPU.
pub(super) struct Context {
    pub(super) ordinal: u32,
    pub(super) device: CUdevice,
    context: CUcontext,
    pub(super) name: String,
    pub(super) uuid: [u8; 16],
    pub(super) functions: Functions,
    /// How streams compute attention.
    pub(super) attention: Attention,
    /// The process that has it.
    process: u32,
    /// Whether it was seen to hang.
    hangs: AtomicBool,
}

// SAFETY: the driver's handles may be used from any thread.
unsafe impl Send for Context {}
// SAFETY: as above; nothing here changes after `Context::open`.
unsafe impl Sync for Context {}

/// How many GPUs this process sees.
///
/// # Errors
/// Without a driver.
pub(super) fn count() -> Result<u32, CudaError> {
    static STARTED: OnceLock<Result<(), CudaError>> = OnceLock::new();
    library::DRIVER.check()?;
    // SAFETY: a number, and a pointer to a number that lives.
    unsafe {
        STARTED.get_or_init(|| call!(cuInit(0))).clone()?;
        let mut count = 0;
        call!(cuDeviceGetCount(&mut count))?;
        Ok(count.max(0) as u32)
    }
}

impl Context {
    /// The GPU with this number among those that the process sees.
    ///
    /// # Errors
    /// Without libraries, without the GPU, or where it lacks what is needed.
    pub(super) fn of(ordinal: u32) -> Result<Arc<Context>, CudaError> {
        static CONTEXTS: Mutex<BTreeMap<u32, Arc<Context>>> = Mutex::new(BTreeMap::new());
        let seen = count()?;
        if ordinal >= seen {
            let visible = std::env::var("CUDA_VISIBLE_DEVICES").unwrap_or_else(|_| "not set".to_owned());
            return Err(CudaError::NoDevice { wanted: ordinal, seen, visible });
        }
        library::COMPILER.check()?;
        library::BLAS.check()?;
        // Kept for the life of the process: at its end the driver may be gone before the contexts.
        let mut contexts = CONTEXTS.lock();
        if let Some(context) = contexts.get(&ordinal) {
            return Ok(context.clone());
        }
        let context = Arc::new(Context::open(ordinal)?);
        contexts.insert(ordinal, context.clone());
        Ok(context)
    }

    fn open(ordinal: u32) -> Result<Context, CudaError> {
        let attention = Attention::wanted()?;
        let (mut device, mut name, mut uuid) = (0, [0; 128], sys::CUuuid { bytes: [0; 16] });
        // SAFETY: every pointer is to a local of the type that the function writes, and the name
        // has the length that is said.
        unsafe {
            call!(cuDeviceGet(&mut device, ordinal as i32))?;
            call!(cuDeviceGetName(name.as_mut_ptr(), name.len() as i32 - 1, device))?;
            call!(cuDeviceGetUuid_v2(&mut uuid, device))?;
        }
        // SAFETY: the last byte is 0, whatever the driver has written before it.
        let name = unsafe { CStr::from_ptr(name.as_ptr()) }.to_string_lossy().into_owned();
        let lacks = |lacks| CudaError::Unsupported { ordinal, name: name.clone(), lacks };
        let major = attribute(device, Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        let minor = attribute(device, Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        if major < 8 {
            return Err(lacks("is older than compute capability 8.0 (A100): its tensor cores lack bf16"));
        }
        let maps = Attribute::CU_DEVICE_ATTRIBUTE_VIRTUAL_ADDRESS_MANAGEMENT_SUPPORTED;
        if attribute(device, maps)? == 0 {
            return Err(lacks("does not map memory by handles, which ranks need to share it"));
        }
        let mut context = std::ptr::null_mut();
        // SAFETY: a pointer to a local, and a device that exists.
        unsafe {
            call!(cuDevicePrimaryCtxRetain(&mut context, device))?;
            call!(cuCtxSetCurrent(context))?;
        }
        let functions = Functions::load(&format!("sm_{major}{minor}"))?;
        let uuid = uuid.bytes.map(|byte| byte as u8);
        let process = std::process::id();
        Ok(Context {
            ordinal,
            device,
            context,
            name,
            uuid,
            functions,
            attention,
            process,
            hangs: AtomicBool::new(false),
        })
    }

    /// Makes this GPU the one that the calling thread's calls are for.
    ///
    /// # Errors
    /// In a forked child, where CUDA does not work.
    pub(super) fn bind(&self) -> Result<(), CudaError> {
        self.check()?;
        // SAFETY: the context lives as long as the process.
        unsafe { call!(cuCtxSetCurrent(self.context)) }
    }

    /// Whether this is the process that has the GPU, and no child that it forked.
    pub(super) fn check(&self) -> Result<(), CudaError> {
        if self.process == std::process::id() { Ok(()) } else { Err(CudaError::Forked) }
    }

    /// It hangs.
    pub(super) fn hang(&self) {
        self.hangs.store(true, Ordering::Relaxed);
    }

    /// Makes this GPU the one that the calling thread's calls are for; whether what it has may be
    /// given back to the driver. A forked child leaves it to its parent. A GPU that hangs may use
    /// it for ever, and the driver would wait for that.
    pub(super) fn may_release(&self) -> bool {
        !self.hangs.load(Ordering::Relaxed) && self.bind().is_ok()
    }

    /// Whether this GPU reads and writes memory of another, or it is the same.
    pub(super) fn reaches(&self, other: &Context) -> bool {
        let mut reaches = 0;
        // SAFETY: a pointer to a local, and GPUs that exist.
        self.device == other.device
            || unsafe { call!(cuDeviceCanAccessPeer(&mut reaches, self.device, other.device)) }.is_ok() && reaches != 0
    }

    /// Bytes of memory that nobody uses, and all bytes.
    pub(super) fn memory(&self) -> Result<(u64, u64), CudaError> {
        self.bind()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: pointers to locals.
        unsafe { call!(cuMemGetInfo_v2(&mut free, &mut total))? };
        Ok((free as u64, total as u64))
    }
}

fn attribute(device: CUdevice, attribute: Attribute) -> Result<i32, CudaError> {
    let mut value = 0;
    // SAFETY: a pointer to a local, and a device that exists.
    unsafe { call!(cuDeviceGetAttribute(&mut value, attribute, device))? };
    Ok(value)
}

/// Version of the driver's interface: 1000 · major + 10 · minor.
///
/// # Errors
/// Without a driver.
pub(super) fn driver_version() -> Result<u32, CudaError> {
    library::DRIVER.check()?;
    let mut version = 0;
    // SAFETY: a pointer to a local.
    unsafe { call!(cuDriverGetVersion(&mut version))? };
    Ok(version.max(0) as u32)
}
