//! What every call of MPI needs: the return code checked, and MPI's own words for what went wrong.

use std::ffi::c_int;

use ::mpi::ffi;

use crate::Error;

/// An error of MPI, if `code` is one; `detail` says with whom and with what.
pub(super) fn check(code: c_int, what: &'static str, detail: impl FnOnce() -> String) -> Result<(), Error> {
    if code == ffi::MPI_SUCCESS as c_int {
        return Ok(());
    }
    let detail = detail();
    let separator = if detail.is_empty() { "" } else { ": " };
    Err(Error::System { what, reason: format!("{detail}{separator}{}", error_text(code)) })
}

/// Whether `code` says that a message was longer than the memory meant for it.
pub(super) fn is_truncation(code: c_int) -> bool {
    let mut class = 0;
    // SAFETY: `class` is valid for the write. The function is allowed at any time and on any thread.
    let known = unsafe { ffi::MPI_Error_class(code, &mut class) };
    known == ffi::MPI_SUCCESS as c_int && class == ffi::MPI_ERR_TRUNCATE as c_int
}

/// MPI's text for an error.
pub(super) fn error_text(code: c_int) -> String {
    let mut text = [0u8; ffi::MPI_MAX_ERROR_STRING as usize];
    let mut length = 0;
    // SAFETY: the standard has callers provide MPI_MAX_ERROR_STRING bytes, which `text` has; `length` is valid for the write. The
    // function is allowed at any time and on any thread.
    let known = unsafe { ffi::MPI_Error_string(code, text.as_mut_ptr().cast(), &mut length) };
    match text.get(..length as usize) {
        Some(text) if known == ffi::MPI_SUCCESS as c_int => String::from_utf8_lossy(text).into_owned(),
        _ => format!("MPI error {code}"),
    }
}

/// Name and version of the MPI library that this program is linked with, such as `Open MPI v4.1.4`.
pub fn library() -> String {
    let mut text = vec![0u8; ffi::MPI_MAX_LIBRARY_VERSION_STRING as usize];
    let mut length = 0;
    // SAFETY: the standard has callers provide MPI_MAX_LIBRARY_VERSION_STRING bytes, which `text` has; `length` is valid for the
    // write. The function is allowed at any time and on any thread.
    let known = unsafe { ffi::MPI_Get_library_version(text.as_mut_ptr().cast(), &mut length) };
    match text.get(..length as usize) {
        Some(text) if known == ffi::MPI_SUCCESS as c_int => {
            // What follows tells how it was built, in MPICH on many lines.
            let text = String::from_utf8_lossy(text);
            text.split([',', '\n', '\0']).next().unwrap_or_default().trim().replace(" Version:\t", " ")
        }
        _ => "an unknown MPI library".to_string(),
    }
}

/// Whether anybody in this process has initialised MPI.
pub(super) fn is_initialised() -> bool {
    flag(ffi::MPI_Initialized)
}

/// Whether anybody in this process has finalised MPI.
pub(super) fn is_finalised() -> bool {
    flag(ffi::MPI_Finalized)
}

fn flag(ask: unsafe extern "C" fn(*mut c_int) -> c_int) -> bool {
    let mut flag = 0;
    // SAFETY: the two functions this is called with are allowed at any time and on any thread, and write one int, which is ours.
    // They cannot fail.
    unsafe { ask(&mut flag) };
    flag != 0
}
