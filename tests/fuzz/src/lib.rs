//! What the fuzz targets share.
//!
//! A target is a module `fuzzing::NAME` of the crate that has the parser. `seeds` makes inputs with
//! the crate's own writers, and `check` panics where the parser breaks a promise.

use std::alloc::System;
use std::fs;
use std::path::Path;

pub use libfuzzer_sys;
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

/// Bytes that a check may allocate for any input, and for each byte of its input.
const FOR_ANY: usize = 16 << 20;
const FOR_EACH_BYTE: usize = 4096;

/// Makes a target of a module.
#[macro_export]
macro_rules! target {
    ($($module:ident)::+) => {
        $crate::libfuzzer_sys::fuzz_target!(
            init: $crate::write_seeds(env!("CARGO_BIN_NAME"), &$($module)::+::seeds()),
            |data: &[u8]| $crate::check(data, $($module)::+::check)
        );
    };
}

/// Writes the seeds into the target's corpus, before the fuzzer reads it.
pub fn write_seeds(target: &str, seeds: &[Vec<u8>]) {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target);
    fs::create_dir_all(&corpus).expect("a folder for the corpus");
    for (number, seed) in seeds.iter().enumerate() {
        fs::write(corpus.join(format!("seed-{number}")), seed).expect("a seed");
    }
}

/// Checks an input, and that a size in it makes the parser allocate no more than its length allows.
pub fn check(data: &[u8], check: impl Fn(&[u8])) {
    let region = Region::new(ALLOCATOR);
    check(data);
    let allocated = region.change().bytes_allocated;
    let most = FOR_ANY + FOR_EACH_BYTE * data.len();
    assert!(allocated <= most, "{allocated} bytes were allocated for an input of {}", data.len());
}
