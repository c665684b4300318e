//! Parameters: where they live, in which order they move, and how they are updated.
//!
//! A [`Layout`] says where every element of every tensor lives. A [`Plan`] is a training step as data, made from the
//! layout's units and a [`Policy`], and verified before it runs. An [`Engine`] executes it: it gathers weights ahead of their
//! use, reduces gradients behind it, and updates each rank's shard. [`simulate`] runs a plan on a machine that there need not be.
//! The trainer owns the model and the loop. The runtime calls nothing back, installs no
//! signal handlers, never ends the process, and reads no environment ([`Launch::detect`](pillion_collectives::Launch::detect) does, where it is called, and the kernels
//! ask once for `PILLION_ISA`).
//!
//! # From tensors to a step
//!
//! A model says which tensors it has, in *units* that are gathered together: an embedding, each block, the head. Here are two units of one
//! tensor, and a "model" whose loss is Σ w·x over the tokens, so that a gradient is x:
//!
//! ```
//! use std::sync::Arc;
//! use pillion_collectives::{Communicator, Launch, Options};
//! use pillion_kernels::{AdamW, Cpu};
//! use pillion_runtime::{Engine, Layout, Policy, TensorSpec, UnitSpec};
//!
//! let tensor = |name: &str| TensorSpec { name: name.into(), shape: vec![4, 8], decay: true, frozen: false };
//! let unit = |name: &str| UnitSpec { name: name.into(), tensors: vec![tensor(&format!("{name}.weight"))] };
//! let units = [unit("first"), unit("second")];
//!
//! // `Launch::detect()` finds this process's rank under mpirun, torchrun, srun or our own launcher.
//! let communicator = Arc::new(Communicator::connect(&Launch::single(), Options::default())?);
//! let policy = Policy::default();
//! let layout = Layout::new(&units, policy.mesh(communicator.world())?.shard);
//! let mut engine = Engine::new(communicator, Arc::new(Cpu), layout, policy)?;
//!
//! // Each rank asks for the elements of its own shards: none ever holds more than these.
//! engine.initialize(|_name, _shape| |index: usize| index as f32 / 32.0)?;
//!
//! let rounds = 2; // micro-batches of each rank
//! let mut step = engine.begin(rounds)?;
//! for _ in 0..rounds {
//!     step.round(16); // tokens in the loss of this rank's micro-batch
//!     for unit in 0..2 {
//!         let pass = step.forward(unit)?;
//!         let _weights = pass.weights.tensor(0); // kernels on `pass.stream` read them in place
//!     }
//!     for unit in (0..2).rev() {
//!         let mut pass = step.backward(unit)?;
//!         // Kernels add to gradients; here the host does.
//!         pass.stream.accumulate_from(pass.gradients.tensor(0), &[1.0f32; 32])?;
//!         if unit == 1 {
//!             pass.stream.accumulate_from(pass.loss, &[40.0])?; // the sum of the losses
//!         }
//!     }
//! }
//! let adamw = AdamW { lr: 0.1, beta1: 0.9, beta2: 0.99, epsilon: 1e-8, weight_decay: 0.0 };
//! let report = step.finish(&adamw, &mut [])?;
//! assert_eq!((report.loss_sum, report.tokens), (80.0, 32.0));
//! # Ok::<(), pillion_runtime::Error>(())
//! ```
//!
//! The borrow of a pass ends before the step is asked for the next one, and that call closes it: there is nothing to release. `examples/mlp.rs` is a whole trainer.
//!
//! # What one needs next
//!
//! - **Placement.** [`Policy::sharded`] and [`Policy::replicas`] say what is divided among which ranks; [`Memory::of`] what that takes.
//! - **Buckets.** [`Policy::bucket`] has units that follow each other move as one operation;
//!   [`Policy::prefetch`] and [`Policy::slots`] count buckets. No bit depends on any of them.
//! - **Tokens.** Gradients and losses are sums over tokens; the update divides by the number over all ranks and rounds. Micro-batches may differ in length, and a rank
//!   without one in a round calls [`Step::idle_round`].
//! - **Activation checkpointing.** [`Step::backward`] lends the unit's weights again, so a model that kept only the unit's input computes its forward pass once more
//!   in the backward pass.
//! - **Gradients before the update.** [`Step::agree`] ends the backward passes; [`Agreed::gradient`] is this rank's shard of a unit's sum.
//! - **An optimizer of one's own** is an [`Optimizer`]: it gets each unit's shard of the gradient,
//!   of the master weights and of as many state tensors as [`Policy::states`] names. Elementwise
//!   optimizers need nothing else.
//! - **Frozen tensors** have [`TensorSpec::frozen`]: their gradients count nowhere. **Tied tensors** are one tensor in a unit that is used twice: [`Layout::visiting`].
//! - **Weight decay** applies to tensors with [`TensorSpec::decay`].
//! - **Numbers for all ranks**, say a wish to stop: requests of [`Step::finish`] come back summed.
//! - **Checkpoints.** [`checkpoint::Saver`] writes in the background: a copy of the state, or what
//!   passes through a ring ([`checkpoint::Staging`]). [`checkpoint::Checkpoint::load`] reads at any
//!   number of ranks and in any placement. [`Engine::master`] puts whole units together.
//! - **Several engines** can share a communicator, as long as all ranks take turns between them alike; or each has one of its own ([`Communicator::split`](pillion_collectives::Communicator::split)).
//!
//! # Errors
//!
//! [`Error::NonFinite`] leaves everything as it was: skip the batch, or go back. [`Error::OffPlan`]
//! and [`Error::NoTokens`] are mistakes of the caller, named. After an error of another rank
//! ([`Error::Collective`]) every later call returns an error too; load the last checkpoint in a new
//! process. A rank that gives up alone, off the plan or for reasons of its own, says so with
//! [`Communicator::abort`](pillion_collectives::Communicator::abort): otherwise the others wait for
//! it until their deadline.
#![forbid(unsafe_code)]

mod axes;
mod buckets;
mod builder;
pub mod checkpoint;
mod engine;
mod error;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
mod gradients;
mod layout;
mod memory;
mod optimizer;
mod outline;
mod plan;
mod policy;
mod record;
mod report;
pub mod simulate;
mod state;
mod step;
mod summary;
pub mod trace;
mod update;
mod verify;
mod weights;
mod zero1;

pub use buckets::Slots;
pub use engine::{Engine, UnitNorms};
pub use error::Error;
pub use layout::{Layout, Piece, Tensor, TensorSpec, Unit, UnitSpec};
pub use memory::Memory;
pub use optimizer::{Optimizer, ShardUpdate, States, update_by_adamw};
pub use outline::Outline;
pub use plan::{Action, Fill, Operation, Pass, Plan, PlanError, Verified};
pub use policy::{ADAMW_STATES, COMPARED, Gather, Mesh, Policy, Sharded};
pub use report::{GroupComparison, StepReport};
pub use state::State;
pub use step::{Backward, Forward, Gradients, REQUESTS, Step, Weights};
pub use update::Agreed;
pub use zero1::Zero1;
