//! How fast: benchmarks of kernels and collectives. `cargo bench` runs them; `RESULTS.md` beside this crate's manifest records
//! what was seen, with command and machine.
#![forbid(unsafe_code)]
