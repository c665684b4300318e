//! What the stand-in of the driver offers to tests (`tests/standins/standin.h`). On a GPU there is
//! no such thing, and what asks for it does nothing.

use std::ffi::{CString, c_char};
use std::sync::OnceLock;

use libloading::Library;

fn library() -> Option<&'static Library> {
    static LIBRARY: OnceLock<Option<Library>> = OnceLock::new();
    // SAFETY: the driver's library, or its stand-in, which the device loads as well.
    let load = || unsafe { Library::new("libcuda.so.1").ok() };
    LIBRARY.get_or_init(load).as_ref().filter(|library| {
        // SAFETY: the function is looked for, and not called.
        unsafe { library.get::<unsafe extern "C" fn()>(b"standin_reset") }.is_ok()
    })
}

/// Whether the tests run over stand-ins.
#[allow(dead_code, reason = "not every test program asks")]
pub(crate) fn is_there() -> bool {
    library().is_some()
}

/// Chooses another order of threads and streams: of the series that STANDIN_SERIES names, 0 if none.
pub(crate) fn reset(seed: u64) {
    let series = std::env::var("STANDIN_SERIES").ok().and_then(|series| series.parse().ok()).unwrap_or(0);
    let seed = seed + 10_000 * series;
    if let Some(library) = library() {
        // SAFETY: the function's type is that of standin.h.
        unsafe {
            let reset = library.get::<unsafe extern "C" fn(u64)>(b"standin_reset").unwrap();
            reset(seed);
        }
    }
}

/// Drops the `n`-th of a kind from now on, or none; how many there were since the last call.
#[allow(dead_code, reason = "not every test program asks")]
pub(crate) fn skip(kind: &str, n: i64) -> u64 {
    skip_by(b"standin_skip", kind, n)
}

/// The same of calls of this thread alone.
#[allow(dead_code, reason = "not every test program asks")]
pub(crate) fn skip_here(kind: &str, n: i64) -> u64 {
    skip_by(b"standin_skip_here", kind, n)
}

#[allow(dead_code, reason = "not every test program asks")]
fn skip_by(function: &[u8], kind: &str, n: i64) -> u64 {
    let kind = CString::new(kind).unwrap();
    // SAFETY: the function's type is that of standin.h, and the text ends with a zero.
    unsafe {
        let library = library().expect("only over stand-ins");
        let skip = library.get::<unsafe extern "C" fn(*const c_char, i64) -> u64>(function).unwrap();
        skip(kind.as_ptr(), n)
    }
}

#[allow(dead_code, reason = "`tests/cuda_faults` uses it")]
/// Lets the `n`-th call of a function, or the `n`-th work of a kind, fail with a CUDA error.
pub(crate) fn fail(what: &str, n: i64, error: i32) {
    let what = CString::new(what).unwrap();
    // SAFETY: as above.
    unsafe {
        let library = library().expect("only over stand-ins");
        let fail = library.get::<unsafe extern "C" fn(*const c_char, i64, i32)>(b"standin_fail").unwrap();
        fail(what.as_ptr(), n, error);
    }
}
