//! Calls into crates that panic on some damaged files.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};

thread_local! {
    static GUARDED: Cell<bool> = const { Cell::new(false) };
}

/// Whether this thread is in a call whose panics become errors: the panic hook of a program is
/// silent then.
pub fn is_guarded() -> bool {
    GUARDED.get()
}

/// Calls a parser. A panic in it is a problem with the file, in one line.
///
/// What the parser was changing when it panicked must not be used again.
pub(crate) fn guarded<T>(call: impl FnOnce() -> T) -> Result<T, String> {
    let before = GUARDED.replace(true);
    let result = catch_unwind(AssertUnwindSafe(call));
    GUARDED.set(before);
    result.map_err(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or_default();
        format!("its reader failed: {}", plain(text))
    })
}

/// Text of another program or crate as a line: without control characters.
pub(crate) fn plain(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_a_line_and_a_call_in_a_call_stays_guarded() {
        assert_eq!(guarded(|| 1), Ok(1));
        let problem = guarded(|| -> () {
            assert_eq!(guarded(|| 2), Ok(2));
            assert!(is_guarded());
            panic!("one\ntwo {}", 3)
        });
        assert_eq!(problem, Err("its reader failed: one two 3".to_owned()));
        assert!(!is_guarded());
    }
}
