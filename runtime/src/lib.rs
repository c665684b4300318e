//! Parameters: where they live, in which order they move, and how they are updated.
//!
//! A [`Layout`] says where every element of every tensor lives. A [`Plan`] is a training step as data, made from the
//! layout's units and a [`Policy`], and verified before it runs. An [`Engine`] executes it: it gathers weights ahead of their
//! use, reduces gradients behind it, and updates each rank's shard. [`simulate`] runs a plan on a machine that there need not be. The trainer owns the model and the loop:
//!
//! ```text
//! let mut step = engine.begin(rounds)?;
//! for each round {
//!     step.round(tokens);
//!     for unit in order     { let forward = step.forward(unit)?;   … kernels on forward.queue with forward.weights … }
//!     for unit in reverse   { let backward = step.backward(unit)?; … kernels that add to backward.gradients … }
//! }
//! let report = step.finish(&adamw, &requests)?;
//! ```
#![forbid(unsafe_code)]

mod axes;
mod builder;
pub mod checkpoint;
mod engine;
mod error;
mod gradients;
mod layout;
mod memory;
mod plan;
mod policy;
pub mod simulate;
mod step;
pub mod trace;
mod update;
mod verify;
mod weights;

pub use engine::{Engine, State};
pub use error::Error;
pub use layout::{Layout, Piece, Tensor, TensorSpec, Unit, UnitSpec};
pub use memory::Memory;
pub use plan::{Action, Fill, Operation, Outline, Pass, Plan, PlanError, Verified};
pub use policy::{Gather, Mesh, Policy, Sharded};
pub use step::{Backward, Forward, Gradients, REQUESTS, Step, StepReport, Weights};
pub use update::{Agreed, ShardUpdate};
