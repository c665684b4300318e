//! NCCL's functions, found when they are first needed. Names and types are those of `nccl.h`.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::OnceLock;

use crate::Error;

/// What a group's ranks must share before they connect.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct UniqueId(pub(super) [u8; 128]);

/// The start of `ncclConfig_t`, as of NCCL 2.17. NCCL reads as much of it as `size` says.
#[repr(C)]
pub(super) struct Config {
    size: usize,
    magic: u32,
    version: u32,
    blocking: c_int,
    cga_cluster_size: c_int,
    min_ctas: c_int,
    max_ctas: c_int,
    net_name: *const c_char,
    split_share: c_int,
}

impl Config {
    /// Everything left to NCCL, but that calls return at once.
    pub(super) fn new() -> Config {
        /// Leaves a setting to NCCL.
        const UNDEFINED: c_int = c_int::MIN;
        Config {
            size: size_of::<Config>(),
            magic: 0xcafe_beef,
            version: 21_700,
            blocking: 0,
            cga_cluster_size: UNDEFINED,
            min_ctas: UNDEFINED,
            max_ctas: UNDEFINED,
            net_name: std::ptr::null(),
            split_share: UNDEFINED,
        }
    }
}

/// A communicator of NCCL's.
pub(super) type Raw = *mut c_void;
type Stream = *mut c_void;

/// `ncclResult_t`: success, and "not done yet".
pub(super) const SUCCESS: c_int = 0;
pub(super) const IN_PROGRESS: c_int = 7;

macro_rules! library {
    ($($field:ident $symbol:literal ($($argument:ty),*) -> $result:ty;)*) => {
        /// The functions.
        pub(super) struct Library {
            $(pub(super) $field: unsafe extern "C" fn($($argument),*) -> $result,)*
            /// 10,000 · major + 100 · minor + patch.
            pub(super) version: u32,
        }

        impl Library {
            fn of(library: &libloading::Library) -> Result<Library, &'static str> {
                // SAFETY: the functions have these types in every version of `nccl.h` that has
                // them, and the library stays loaded.
                unsafe {
                    Ok(Library {
                        $($field: *library.get(concat!($symbol, "\0").as_bytes()).map_err(|_| $symbol)?,)*
                        version: 0,
                    })
                }
            }
        }
    };
}

library! {
    get_version "ncclGetVersion" (*mut c_int) -> c_int;
    get_unique_id "ncclGetUniqueId" (*mut UniqueId) -> c_int;
    error_string "ncclGetErrorString" (c_int) -> *const c_char;
    init "ncclCommInitRankConfig" (*mut Raw, c_int, UniqueId, c_int, *mut Config) -> c_int;
    async_error "ncclCommGetAsyncError" (Raw, *mut c_int) -> c_int;
    finalize "ncclCommFinalize" (Raw) -> c_int;
    destroy "ncclCommDestroy" (Raw) -> c_int;
    abort "ncclCommAbort" (Raw) -> c_int;
    group_start "ncclGroupStart" () -> c_int;
    group_end "ncclGroupEnd" () -> c_int;
    all_gather "ncclAllGather" (*const c_void, *mut c_void, usize, c_int, Raw, Stream) -> c_int;
    reduce_scatter "ncclReduceScatter" (*const c_void, *mut c_void, usize, c_int, c_int, Raw, Stream) -> c_int;
    all_reduce "ncclAllReduce" (*const c_void, *mut c_void, usize, c_int, c_int, Raw, Stream) -> c_int;
    broadcast "ncclBroadcast" (*const c_void, *mut c_void, usize, c_int, c_int, Raw, Stream) -> c_int;
    register "ncclCommRegister" (Raw, *mut c_void, usize, *mut *mut c_void) -> c_int;
}

impl Library {
    /// The oldest version with all that is called: registered buffers.
    const OLDEST: u32 = 21_900;
    /// NCCL, if it is there and new enough.
    ///
    /// # Errors
    /// [`Error::System`] with the remedy.
    pub(super) fn get() -> Result<&'static Library, Error> {
        static LIBRARY: OnceLock<Result<Library, String>> = OnceLock::new();
        let found = LIBRARY.get_or_init(Library::load);
        found.as_ref().map_err(|reason| Error::System { what: "loading NCCL", reason: reason.clone() })
    }

    fn load() -> Result<Library, String> {
        const REMEDY: &str = "install NCCL 2.19 or newer (the PyPI package nvidia-nccl-cu12 has it) and put its \
                              folder on LD_LIBRARY_PATH";
        // SAFETY: loading NCCL runs its constructors, which ask nothing of the caller.
        let library = unsafe { libloading::Library::new("libnccl.so.2") };
        let library = library.map_err(|error| {
            let reason = std::error::Error::source(&error).map_or(error.to_string(), ToString::to_string);
            format!("{reason}: {REMEDY}")
        })?;
        let mut functions = Library::of(&library).map_err(|symbol| format!("libnccl.so.2 lacks {symbol}: {REMEDY}"))?;
        // It is used until the process ends.
        std::mem::forget(library);
        let mut version = 0;
        // SAFETY: a pointer to a local.
        let result = unsafe { (functions.get_version)(&mut version) };
        functions.version = if result == SUCCESS { version.max(0) as u32 } else { 0 };
        match functions.version {
            Library::OLDEST.. => Ok(functions),
            _ => Err(format!("libnccl.so.2 is version {}: {REMEDY}", functions.version_name())),
        }
    }

    /// The version in words.
    pub(super) fn version_name(&self) -> String {
        format!("{}.{}.{}", self.version / 10_000, self.version / 100 % 100, self.version % 100)
    }

    /// What NCCL says of a result.
    pub(super) fn explain(&self, result: c_int) -> String {
        // SAFETY: the function takes any number, and returns a text that never changes, or null.
        let text = unsafe { (self.error_string)(result) };
        // SAFETY: as above; the text ends with a zero.
        if text.is_null() { String::new() } else { unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned() }
    }
}

#[cfg(test)]
mod tests {
    use super::Config;

    #[test]
    fn the_configuration_lies_in_memory_as_in_nccl_h() {
        assert_eq!((size_of::<Config>(), std::mem::offset_of!(Config, split_share)), (48, 40));
    }
}
