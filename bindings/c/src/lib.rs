//! Pillion for programs in other languages: the functions of `pillion.h`.
//!
//! Memory stays the caller's. An operation that is given a place for its work returns at once, and
//! the memory that it was given must stay as it is until the work has ended; without such a place
//! the call returns when the operation is complete. No panic crosses the edge: each function
//! returns a code, and [`status::pillion_last_error`] has the text.

mod arguments;
mod communicator;
mod completions;
mod engine;
mod memory;
mod operations;
mod parts;
mod reductions;
mod statistics;
pub mod status;
mod store;
mod training;
mod work;
mod zero1;

pub use communicator::*;
pub use completions::*;
pub use engine::*;
pub use memory::*;
pub use operations::*;
pub use parts::*;
pub use reductions::*;
pub use statistics::*;
pub use status::*;
pub use store::*;
pub use training::*;
pub use work::*;
pub use zero1::*;
