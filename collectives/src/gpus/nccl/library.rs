//! NCCL's functions, found when they are first needed. Names and types are those of `nccl.h`.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::OnceLock;

use crate::Error;

/// What a group's ranks must share before they connect.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct UniqueId(pub(super) [u8; 128]);

/// The start of `ncclConfig_t`, as of NCCL 2.27. NCCL reads as much of it as `size` says.
#[repr(C)]
pub(super) struct Config {
    pub(super) size: usize,
    magic: u32,
    pub(super) version: u32,
    pub(super) blocking: c_int,
    cga_cluster_size: c_int,
    min_ctas: c_int,
    max_ctas: c_int,
    net_name: *const c_char,
    split_share: c_int,
    traffic_class: c_int,
    comm_name: *const c_char,
    collnet_enable: c_int,
    pub(super) cta_policy: c_int,
    shrink_share: c_int,
    nvls_ctas: c_int,
}

impl Config {
    /// What NCCL 2.17 has of it.
    pub(super) const OF_2_17: usize = std::mem::offset_of!(Config, traffic_class);
    /// Leaves a setting to NCCL.
    const UNDEFINED: c_int = c_int::MIN;

    /// Everything left to NCCL, but that calls return at once.
    pub(super) fn new() -> Config {
        const UNDEFINED: c_int = Config::UNDEFINED;
        Config {
            size: size_of::<Config>(),
            magic: 0xcafe_beef,
            version: 22_700,
            blocking: 0,
            cga_cluster_size: UNDEFINED,
            min_ctas: UNDEFINED,
            max_ctas: UNDEFINED,
            net_name: std::ptr::null(),
            split_share: UNDEFINED,
            traffic_class: UNDEFINED,
            comm_name: std::ptr::null(),
            collnet_enable: UNDEFINED,
            cta_policy: UNDEFINED,
            shrink_share: UNDEFINED,
            nvls_ctas: UNDEFINED,
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
    (
        needed { $($field:ident $symbol:literal ($($argument:ty),*) $(-> $result:ty)?;)* }
        optional { $($extra:ident $extra_symbol:literal ($($extra_argument:ty),*);)* }
    ) => {
        /// The functions.
        pub(super) struct Library {
            $(pub(super) $field: unsafe extern "C" fn($($argument),*) -> library!(@result $($result)?),)*
            $(pub(super) $extra: Option<unsafe extern "C" fn($($extra_argument),*) -> c_int>,)*
            /// 10,000 · major + 100 · minor + patch.
            pub(super) version: u32,
        }

        impl Library {
            fn of(library: &libloading::Library) -> Result<Library, &'static str> {
                // SAFETY: the functions have these types in every version of `nccl.h` that has them,
                // and the library stays loaded.
                unsafe {
                    Ok(Library {
                        $($field: *library.get(concat!($symbol, "\0").as_bytes()).map_err(|_| $symbol)?,)*
                        $($extra: library.get(concat!($extra_symbol, "\0").as_bytes()).ok().map(|symbol| *symbol),)*
                        version: 0,
                    })
                }
            }
        }
    };
    (@result) => { c_int };
    (@result $result:ty) => { $result };
}

library! {
    needed {
        get_version "ncclGetVersion" (*mut c_int);
        get_unique_id "ncclGetUniqueId" (*mut UniqueId);
        error_string "ncclGetErrorString" (c_int) -> *const c_char;
        last_error "ncclGetLastError" (Raw) -> *const c_char;
        init "ncclCommInitRankConfig" (*mut Raw, c_int, UniqueId, c_int, *mut Config);
        async_error "ncclCommGetAsyncError" (Raw, *mut c_int);
        finalize "ncclCommFinalize" (Raw);
        destroy "ncclCommDestroy" (Raw);
        abort "ncclCommAbort" (Raw);
        group_start "ncclGroupStart" ();
        group_end "ncclGroupEnd" ();
        all_gather "ncclAllGather" (*const c_void, *mut c_void, usize, c_int, Raw, Stream);
        reduce_scatter "ncclReduceScatter" (*const c_void, *mut c_void, usize, c_int, c_int, Raw, Stream);
        all_reduce "ncclAllReduce" (*const c_void, *mut c_void, usize, c_int, c_int, Raw, Stream);
        broadcast "ncclBroadcast" (*const c_void, *mut c_void, usize, c_int, c_int, Raw, Stream);
        register "ncclCommRegister" (Raw, *mut c_void, usize, *mut *mut c_void);
    }
    optional {
        window_register "ncclCommWindowRegister" (Raw, *mut c_void, usize, *mut *mut c_void, c_int);
    }
}

impl Library {
    /// The oldest version with all that is called: registered buffers.
    const OLDEST: u32 = 21_900;
    /// The oldest with windows.
    pub(super) const WINDOWS: u32 = 22_700;
    /// The oldest whose copy engines gather without an error: see NCCL's issue 2241.
    pub(super) const COPY_ENGINES: u32 = 23_102;

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
        let library = library.map_err(|error| format!("{error}: {REMEDY}"))?;
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

    /// What NCCL says of a result, and of its last error.
    pub(super) fn explain(&self, result: c_int, raw: Raw) -> String {
        let text = |text: *const c_char| match text.is_null() {
            true => String::new(),
            // SAFETY: NCCL's texts end with a zero and stay as they are until its next call here.
            false => unsafe { CStr::from_ptr(text) }.to_string_lossy().trim().to_owned(),
        };
        // SAFETY: the functions take any number, and a communicator or null.
        let (name, last) = unsafe { (text((self.error_string)(result)), text((self.last_error)(raw))) };
        if last.is_empty() { name } else { format!("{name}: {last}") }
    }
}

#[cfg(test)]
mod tests {
    use super::Config;

    #[test]
    fn the_configuration_lies_in_memory_as_in_nccl_h() {
        assert_eq!((size_of::<Config>(), Config::OF_2_17), (72, 44));
    }
}
