//! Every kernel of a GPU: against f64 within the bounds of `tests/kernels`, whose tests run here on
//! other devices; bit by bit against the processor where the bits must be equal (`exact.rs`); and
//! what streams, events and memory promise.
//!
//! `ci/cuda` runs these tests over stand-ins of NVIDIA's libraries, and `ci/gpu` on a GPU. Without
//! either, each test fails with the device's error.

#[path = "../kernels/adamw.rs"]
mod adamw;
#[path = "../kernels/attention.rs"]
mod attention;
#[path = "../kernels/bounded.rs"]
mod bounded;
#[path = "../kernels/common.rs"]
mod common;
mod devices;
#[path = "../kernels/documents.rs"]
mod documents;
#[path = "../kernels/elementwise.rs"]
mod elementwise;
#[path = "../kernels/embedding.rs"]
mod embedding;
mod exact;
mod failure;
mod gate;
#[path = "../kernels/linear.rs"]
mod linear;
#[path = "../kernels/loss.rs"]
mod loss;
mod memory;
#[path = "../kernels/mlp.rs"]
mod mlp;
#[path = "../kernels/norm.rs"]
mod norm;
#[path = "../kernels/rope.rs"]
mod rope;
#[path = "../kernels/shapes.rs"]
mod shapes;
mod standin;
mod streams;
