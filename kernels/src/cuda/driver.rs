//! Calls of the driver, checked.

use std::ffi::CStr;

use cudarc::driver::sys::{self, CUresult};

use super::CudaError;

/// Calls a function of the driver, which has been found: [`library`](super::library) has looked
/// for each of [`SYMBOLS`]. Unsafe as the function is.
macro_rules! call {
    ($function:ident($($argument:expr),* $(,)?)) => {
        $crate::cuda::driver::check(stringify!($function), cudarc::driver::sys::$function($($argument),*))
    };
}
pub(super) use call;

/// Every function that is called.
pub(super) const SYMBOLS: &[&str] = &[
    "cuCtxSetCurrent",
    "cuDeviceCanAccessPeer",
    "cuDeviceGet",
    "cuDeviceGetAttribute",
    "cuDeviceGetCount",
    "cuDeviceGetName",
    "cuDeviceGetUuid_v2",
    "cuDevicePrimaryCtxRetain",
    "cuDriverGetVersion",
    "cuEventCreate",
    "cuEventDestroy_v2",
    "cuEventQuery",
    "cuEventRecord",
    "cuFuncSetAttribute",
    "cuGetErrorName",
    "cuGetErrorString",
    "cuInit",
    "cuLaunchKernel",
    "cuMemAddressFree",
    "cuMemAddressReserve",
    "cuMemCreate",
    "cuMemExportToShareableHandle",
    "cuMemFreeHost",
    "cuMemGetAllocationGranularity",
    "cuMemGetInfo_v2",
    "cuMemHostAlloc",
    "cuMemHostGetDevicePointer_v2",
    "cuMemHostRegister_v2",
    "cuMemHostUnregister",
    "cuMemImportFromShareableHandle",
    "cuMemMap",
    "cuMemRelease",
    "cuMemSetAccess",
    "cuMemUnmap",
    "cuMemcpyDtoDAsync_v2",
    "cuMemcpyDtoHAsync_v2",
    "cuMemcpyHtoDAsync_v2",
    "cuMemsetD32Async",
    "cuMemsetD8Async",
    "cuModuleGetFunction",
    "cuModuleLoadData",
    "cuStreamCreateWithPriority",
    "cuStreamDestroy_v2",
    "cuStreamSynchronize",
    "cuStreamWaitEvent",
    "cuStreamWaitValue32_v2",
    "cuStreamWriteValue32_v2",
];

/// An error that names the call.
pub(super) fn check(call: &'static str, result: CUresult) -> Result<(), CudaError> {
    if result == CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    let text = |get: unsafe fn(CUresult, *mut *const std::ffi::c_char) -> CUresult| {
        let mut text = std::ptr::null();
        // SAFETY: the function writes a pointer to a text that lives as long as the library, or
        // null.
        unsafe {
            let _ = get(result, &mut text);
            if text.is_null() { String::new() } else { CStr::from_ptr(text).to_string_lossy().into_owned() }
        }
    };
    Err(CudaError::Call { call, code: text(sys::cuGetErrorName), text: text(sys::cuGetErrorString) })
}

#[cfg(test)]
mod tests {
    use super::SYMBOLS;

    /// The sources of this folder.
    const SOURCES: [&str; 13] = [
        include_str!("clock.rs"),
        include_str!("context.rs"),
        include_str!("compile.rs"),
        include_str!("event.rs"),
        include_str!("latch.rs"),
        include_str!("launch.rs"),
        include_str!("mapped.rs"),
        include_str!("mod.rs"),
        include_str!("pinned.rs"),
        include_str!("processes.rs"),
        include_str!("reduce.rs"),
        include_str!("slab.rs"),
        include_str!("stream.rs"),
    ];

    #[test]
    fn every_function_that_is_called_is_looked_for_at_the_start() {
        let mut called = vec!["cuGetErrorName", "cuGetErrorString"];
        for source in SOURCES {
            for (index, _) in source.match_indices("cu") {
                let name: &str = source[index..].split(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap();
                let is_call =
                    name[2..].starts_with(char::is_uppercase) && source[index + name.len()..].starts_with('(');
                if is_call && !source[..index].ends_with(char::is_alphanumeric) {
                    called.push(name);
                }
            }
        }
        called.sort_unstable();
        called.dedup();
        assert_eq!(called, SYMBOLS, "SYMBOLS lists, in order, what is called");
    }
}
