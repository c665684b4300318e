//! Every kernel of `Stream` through the public API: against f64, within bounds that the reference
//! computes with each value (`bounded.rs`), and with equal bits on `Cpu`, `Cores` and `LazyCpu`,
//! and in memory of another program (`common.rs`). Inputs in bf16 are numbers that it holds
//! exactly; what a kernel rounds to bf16, the reference rounds as well.
//!
//! A gradient is tested twice: the reference's formula against central differences of the reference's forward pass, and the
//! kernel against the reference's formula, element by element. Outputs that a kernel overwrites start as NaN, outputs that it
//! adds to as random numbers.

mod adamw;
mod attention;
mod bounded;
mod common;
mod devices;
mod documents;
mod elementwise;
mod embedding;
mod foreign;
mod ids;
mod linear;
mod loss;
mod mlp;
mod norm;
mod parts;
mod rope;
mod shapes;
