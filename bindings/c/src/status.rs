//! Errors across the edge: a code for the program, and a text for its user.

use std::cell::RefCell;
use std::ffi::{CString, c_char};
use std::panic::{AssertUnwindSafe, catch_unwind};

use pillion_collectives::Error;

/// Nothing went wrong.
pub const PILLION_OK: i32 = 0;
/// A rank died, or left while others still needed it.
pub const PILLION_PEER_LOST: i32 = 1;
/// A rank did not come in time.
pub const PILLION_TIMEOUT: i32 = 2;
/// Another rank called another operation.
pub const PILLION_MISMATCH: i32 = 5;
/// A rank gave up and said so.
pub const PILLION_ABORTED: i32 = 6;
/// Options contradict each other or the launch.
pub const PILLION_BAD_OPTIONS: i32 = 7;
/// The arguments of this call cannot be. Nothing was sent, and the communicator is as it was.
pub const PILLION_MISUSE: i32 = 8;
/// Ranks did not find each other.
pub const PILLION_RENDEZVOUS: i32 = 9;
/// The host has not enough memory.
pub const PILLION_OUT_OF_MEMORY: i32 = 10;
/// The operating system refused something.
pub const PILLION_SYSTEM: i32 = 11;
/// The store through which ranks meet failed.
pub const PILLION_STORE: i32 = 13;
/// A pointer is NULL that must not be, a number names nothing, or memory overlaps.
pub const PILLION_INVALID: i32 = 100;
/// This process is a forked child of the one that has the communicator.
pub const PILLION_FORKED: i32 = 101;
/// Work is still under way, or nothing has come yet.
pub const PILLION_UNDER_WAY: i32 = 102;
/// A defect of this library: please report it.
pub const PILLION_DEFECT: i32 = 103;

/// Gradients or a loss are not finite, or there were no tokens: no parameter was changed.
pub const PILLION_NO_UPDATE: i32 = 104;
/// A file of a checkpoint cannot be read or written.
pub const PILLION_FILE: i32 = 105;
/// An engine's step is not used as its plan says, or has failed before.
pub const PILLION_STEP: i32 = 106;

/// Why a call did not do what it was for.
pub(crate) enum Failed {
    Collective(Error),
    Runtime(pillion_runtime::Error),
    Invalid(String),
    Forked,
    UnderWay,
}

impl From<Error> for Failed {
    fn from(error: Error) -> Failed {
        Failed::Collective(error)
    }
}

impl From<pillion_runtime::Error> for Failed {
    fn from(error: pillion_runtime::Error) -> Failed {
        match error {
            pillion_runtime::Error::Collective(error) => Failed::Collective(error),
            error => Failed::Runtime(error),
        }
    }
}

impl From<pillion_kernels::Error> for Failed {
    fn from(error: pillion_kernels::Error) -> Failed {
        Failed::Invalid(error.to_string())
    }
}

thread_local! {
    static LAST: RefCell<CString> = RefCell::default();
}

fn remember(text: &str) {
    let text = CString::new(text.replace('\0', " ")).unwrap_or_default();
    LAST.with(|last| *last.borrow_mut() = text);
}

fn code_of(error: &pillion_runtime::Error) -> i32 {
    use pillion_runtime::Error as E;
    match error {
        E::Collective(error) => error.code(),
        E::Device(_) => PILLION_SYSTEM,
        E::NonFinite { .. } | E::NoTokens { .. } => PILLION_NO_UPDATE,
        E::File { .. } => PILLION_FILE,
        E::Policy(_) | E::Different { .. } => PILLION_INVALID,
        _ => PILLION_STEP,
    }
}

/// Runs a function's body; returns its code, and keeps the text of an error.
pub(crate) fn guard(run: impl FnOnce() -> Result<(), Failed>) -> i32 {
    let (code, text) = match catch_unwind(AssertUnwindSafe(run)) {
        Ok(Ok(())) => return PILLION_OK,
        Ok(Err(Failed::Collective(error))) => (error.code(), error.to_string()),
        Ok(Err(Failed::Runtime(error))) => (code_of(&error), error.to_string()),
        Ok(Err(Failed::Invalid(text))) => (PILLION_INVALID, text),
        Ok(Err(Failed::Forked)) => {
            let text = "a forked child cannot use a communicator of its parent: start programs with exec";
            (PILLION_FORKED, text.to_owned())
        }
        // Nothing went wrong, and the text of what last did stays.
        Ok(Err(Failed::UnderWay)) => return PILLION_UNDER_WAY,
        Err(panic) => {
            let said = panic.downcast_ref::<String>().map(String::as_str);
            let said = said.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no text");
            (PILLION_DEFECT, format!("a defect of this library, please report it: {said}"))
        }
    };
    remember(&text);
    code
}

/// The text of this thread's last error, until its next call of this library. Never NULL.
#[unsafe(no_mangle)]
pub extern "C" fn pillion_last_error() -> *const c_char {
    LAST.with(|last| last.borrow().as_ptr())
}

/// A number that grows when functions or structs change so that a program must be compiled anew.
#[unsafe(no_mangle)]
pub extern "C" fn pillion_abi_version() -> u32 {
    1
}
