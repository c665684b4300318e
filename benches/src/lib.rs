//! How fast: benchmarks of kernels and collectives. `RESULTS.md` beside this crate's manifest records what was seen, with command
//! and machine.
//!
//! `cargo bench` runs the [`kernels`] beside the memory [`traffic`] that bounds them; `kernelbench`
//! times them on request, for a comparison with PyTorch's. The binary `collbench` measures
//! collectives as nccl-tests and the OSU benchmarks do; this is its code, in the order in which a
//! run meets it: [`arguments`] with the habits of others, [`ranks`], [`binding`], [`sweep`] over
//! operations and sizes, [`case`] for one call, [`pattern`] and [`integral`] for what its buffers
//! hold, [`timing`], [`roofline`], [`overlap`], [`report`].
#![deny(unsafe_code)]

pub mod arguments;
pub mod binding;
pub mod case;
mod elements;
mod error;
pub mod gpu;
mod habits;
pub mod integral;
pub mod kernels;
mod link;
mod local;
pub mod machine;
#[cfg_attr(not(feature = "mpi"), path = "no_mpi.rs")]
mod mpi;
pub mod operation;
pub mod overlap;
pub mod pattern;
pub mod ranks;
pub mod report;
pub mod roofline;
pub mod sweep;
pub mod timing;
pub mod traffic;

pub use error::Error;
