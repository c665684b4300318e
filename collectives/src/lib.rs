//! Peers: ranks, launch, rendezvous, moving and reducing buffers.
//!
//! A program asks its [`Launch`] who it is, joins the others as a [`Communicator`], and calls
//! collectives on buffers that the communicator allocated. An operation takes its buffers by value
//! and returns a [`Pending`], which gives them back once a stream is ordered after it or the host
//! has waited: memory in flight cannot be touched by accident.
//!
//! Ranks that no launcher started meet through a [`Store`], with [`Communicator::connect_through`].
//!
//! Ranks of one host, processes or threads, read each other's buffers in place, in shared memory.
//! Ranks of several hosts exchange messages besides: over TCP, or, with the feature `mpi`, over
//! MPI. Reductions run in a fixed order and round once, so a result has the same bits in every run.
//!
//! Some of the ranks can form a [`Communicator::group`], which costs next to nothing. Operations
//! whose parts differ in length take [`Parts`].

mod algorithms;
mod call;
mod checks;
mod communicator;
mod engine;
mod error;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
#[cfg(feature = "cuda")]
mod gpus;
mod hosts;
mod join;
pub mod launch;
pub mod launcher;
pub mod limits;
mod memory;
mod messages;
mod operations;
mod options;
mod outcome;
mod parts;
mod patience;
mod pending;
mod record;
mod reduce;
mod reduction;
mod reductions;
mod rendezvous;
mod request;
mod sections;
pub mod stop;
mod store;
mod terms;
mod transport;
mod window;
mod wire;

pub use communicator::{Communicator, Traffic};
pub use error::Error;
#[cfg(feature = "cuda")]
pub use gpus::nccl_version;
pub use launch::{Launch, Meeting};
pub use memory::available::available_memory;
pub use operations::Start;
pub use options::{Backend, GpuTransport, Options, WireKind};
pub use parts::Parts;
pub use pending::Pending;
pub use record::Recorded;
pub use reduce::{Observation, Reduce, Sideband, Summand, Sums};
pub use reduction::Reduction;
pub use request::Envelope;
pub use sections::Sections;
pub use store::{FolderStore, Store, TcpStore};
pub use transport::Capabilities;
pub use window::Window;
#[cfg(feature = "mpi")]
pub use wire::mpi::library as mpi_library;

/// The example in the README.
#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
struct Readme;

/// The example in the book.
#[cfg(doctest)]
#[doc = include_str!("../../docs/src/embedding.md")]
struct Book;
