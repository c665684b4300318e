//! A store of the caller's, through which ranks meet.

use std::ffi::{CString, c_char, c_void};

use pillion_collectives::Error;

/// Values by key that every rank sees, as a program offers them. Any thread may call any of the
/// functions at any time until it calls `release`.
///
/// A key ends with a zero byte. Each function returns 0, or another number where it fails.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Store {
    /// Passed to each function.
    pub context: *mut c_void,
    /// Sets the value of a key, in place of an older one.
    pub set: Option<unsafe extern "C" fn(*mut c_void, *const c_char, *const u8, usize) -> i32>,
    /// Calls `found(answer, value, length)` with the value of a key, or not at all where no rank
    /// has set it. Does not wait.
    pub get: Option<
        unsafe extern "C" fn(
            *mut c_void,
            *const c_char,
            Option<unsafe extern "C" fn(*mut c_void, *const u8, usize)>,
            *mut c_void,
        ) -> i32,
    >,
    /// Adds to the count of a key, which begins at 0, and writes the sum. No other call comes
    /// between.
    pub add: Option<unsafe extern "C" fn(*mut c_void, *const c_char, i64, *mut i64) -> i32>,
    /// Called once, when the library calls none of the others any more: soon after
    /// pillion_connect_through has returned, and where that has failed once a function that is
    /// being called returns. May be NULL.
    pub release: Option<unsafe extern "C" fn(*mut c_void)>,
}

/// The functions of a [`Store`], which are all there.
pub(crate) struct Foreign {
    store: Store,
}

// SAFETY: `pillion.h` lets any thread call any of the functions.
unsafe impl Send for Foreign {}
// SAFETY: as above.
unsafe impl Sync for Foreign {}

fn failed(what: &str, key: &str, code: i32) -> Error {
    Error::Store { reason: format!("the program's store returned {code} for {what} {key:?}") }
}

fn text(key: &str) -> CString {
    CString::new(key).expect("keys of this library have no zero byte")
}

unsafe extern "C" fn found(answer: *mut c_void, value: *const u8, length: usize) {
    // SAFETY: `get` below passes the address of this type, which lives until the call returns; the
    // caller of the library gives a value of this length.
    unsafe {
        let value = if length == 0 { &[][..] } else { std::slice::from_raw_parts(value, length) };
        *answer.cast::<Option<Vec<u8>>>() = Some(value.to_vec());
    }
}

impl Drop for Foreign {
    fn drop(&mut self) {
        if let Some(release) = self.store.release {
            // SAFETY: the caller of the library keeps its promise of `Store`.
            unsafe { release(self.store.context) };
        }
    }
}

impl Foreign {
    /// None where a function is missing.
    pub(crate) fn new(store: Store) -> Option<Foreign> {
        (store.set.is_some() && store.get.is_some() && store.add.is_some()).then_some(Foreign { store })
    }
}

impl pillion_collectives::Store for Foreign {
    fn set(&self, key: &str, value: &[u8]) -> Result<(), Error> {
        let (set, name) = (self.store.set.expect("it is there"), text(key));
        // SAFETY: the caller of the library keeps its promise of `Store`.
        match unsafe { set(self.store.context, name.as_ptr(), value.as_ptr(), value.len()) } {
            0 => Ok(()),
            code => Err(failed("setting", key, code)),
        }
    }

    fn get(&self, key: &str) -> Result<Option<Vec<u8>>, Error> {
        let (get, name) = (self.store.get.expect("it is there"), text(key));
        let mut answer: Option<Vec<u8>> = None;
        let place = (&raw mut answer).cast::<c_void>();
        // SAFETY: as above; `place` is what `found` expects.
        match unsafe { get(self.store.context, name.as_ptr(), Some(found), place) } {
            0 => Ok(answer),
            code => Err(failed("getting", key, code)),
        }
    }

    fn add(&self, key: &str, amount: i64) -> Result<i64, Error> {
        let (add, name, mut sum) = (self.store.add.expect("it is there"), text(key), 0);
        // SAFETY: as above.
        match unsafe { add(self.store.context, name.as_ptr(), amount, &mut sum) } {
            0 => Ok(sum),
            code => Err(failed("adding to", key, code)),
        }
    }
}
