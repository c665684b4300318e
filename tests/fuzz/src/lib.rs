//! What the fuzz targets share.
//!
//! A target is a module `fuzzing::NAME` of the crate that has the parser. `seeds` makes inputs with
//! the crate's own writers, and `check` panics where the parser breaks a promise.

use std::alloc::System;
use std::fs;
use std::panic::{self, AssertUnwindSafe};
use std::path::Path;
use std::process;
use std::sync::{Mutex, PoisonError};

pub use libfuzzer_sys;
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

/// Bytes that a check may allocate for any input, and for each byte of its input.
pub const FOR_ANY: usize = 16 << 20;
const FOR_EACH_BYTE: usize = 4096;

/// Makes a target of a module; with the bytes that a check may allocate for any input, where its
/// format needs more than others.
#[macro_export]
macro_rules! target {
    ($($module:ident)::+) => {
        $crate::target!($($module)::+, $crate::FOR_ANY);
    };
    ($($module:ident)::+, $for_any:expr) => {
        $crate::libfuzzer_sys::fuzz_target!(
            init: $crate::begin(env!("CARGO_BIN_NAME"), &$($module)::+::seeds()),
            |data: &[u8]| $crate::check(data, $for_any, $($module)::+::check)
        );
    };
}

/// What the last panic said.
static SAID: Mutex<String> = Mutex::new(String::new());

/// Writes the seeds into the target's corpus, before the fuzzer reads it.
///
/// libFuzzer's own panic hook ends the process even where a parser catches the panic of a crate, so
/// it is replaced.
pub fn begin(target: &str, seeds: &[Vec<u8>]) {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target);
    fs::create_dir_all(&corpus).expect("a folder for the corpus");
    for (number, seed) in seeds.iter().enumerate() {
        fs::write(corpus.join(format!("seed-{number}")), seed).expect("a seed");
    }
    panic::set_hook(Box::new(|panic| *SAID.lock().unwrap_or_else(PoisonError::into_inner) = panic.to_string()));
}

/// Checks an input, and that a size in it makes the parser allocate no more than its length allows.
pub fn check(data: &[u8], for_any: usize, check: impl Fn(&[u8])) {
    let region = Region::new(ALLOCATOR);
    if panic::catch_unwind(AssertUnwindSafe(|| check(data))).is_err() {
        failed(&SAID.lock().unwrap_or_else(PoisonError::into_inner));
    }
    let allocated = region.change().bytes_allocated;
    let most = for_any + FOR_EACH_BYTE * data.len();
    if allocated > most {
        failed(&format!("{allocated} bytes were allocated for an input of {}", data.len()));
    }
}

/// Ends the process, so that libFuzzer keeps the input.
fn failed(reason: &str) -> ! {
    eprintln!("{reason}");
    process::abort();
}
