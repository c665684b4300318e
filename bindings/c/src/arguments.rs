//! Pointers that the caller of the library gives.

use std::ffi::{CStr, c_char};
use std::ptr::NonNull;

use crate::status::Failed;

/// A place for a result, which is there unless it is NULL.
pub(crate) fn place<T>(place: *mut T, name: &str) -> Result<NonNull<T>, Failed> {
    NonNull::new(place).ok_or_else(|| Failed::Invalid(format!("{name} is NULL")))
}

/// # Safety
/// NULL or a text that ends with a zero byte, by the promise of the library's caller.
pub(crate) unsafe fn text<'a>(text: *const c_char, name: &str) -> Result<&'a str, Failed> {
    let text = place(text.cast_mut(), name)?;
    // SAFETY: the caller's promise.
    let text = unsafe { CStr::from_ptr(text.as_ptr()) };
    text.to_str().map_err(|_| Failed::Invalid(format!("{name} is not UTF-8: {text:?}")))
}

/// # Safety
/// NULL or `count` elements, by the promise of the library's caller.
pub(crate) unsafe fn array<'a, T>(start: *const T, count: usize, name: &str) -> Result<&'a [T], Failed> {
    if start.is_null() || count == 0 {
        return Err(Failed::Invalid(format!("{name}: {count} elements at {start:?}; give one at least")));
    }
    // SAFETY: the caller's promise.
    Ok(unsafe { std::slice::from_raw_parts(start, count) })
}
