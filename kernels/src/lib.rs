//! Elements: devices, buffers, dtypes and the arithmetic on them.
//!
//! A [`Device`] owns memory and makes [`Stream`]s. A stream runs work in the order in which it was
//! enqueued; an [`Event`] orders one stream after another, or after a collective. [`Stream`] has
//! what a sharding runtime needs: order, copies, and arithmetic on flat arrays. [`Kernels`] adds
//! the mathematics of a model. Everything above this crate is written against these traits, so the
//! same engine and the same model run on
//!
//! * [`Cpu`], and [`Cores`] with several threads: a kernel has run when its call returns;
//! * [`LazyCpu`]: a test device. Work runs as late as the events allow and otherwise in random order, so a
//!   dependency that somebody forgot shows as wrong bits on any machine.
//!
//! # Who may touch what
//!
//! A [`Buffer`] has one owner and cannot be cloned. Kernels borrow it through [`View`] and
//! [`ViewMut`], so the borrow checker orders accesses in the program. A stream that runs work later
//! keeps that order by being first-in, first-out; between streams it is the events' business.
//! `cpu::HostStream::run` is the one place where a view becomes a slice, and says why that is
//! sound.

mod buffer;
pub mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
mod device;
mod documents;
mod dtype;
mod error;
mod event;
mod kernels;
mod memory;
mod parts;
pub mod random;
mod ranges;
mod shapes;
mod stamp;
mod stream;

pub use buffer::{Buffer, View, ViewMut};
pub use cpu::{Cores, Cpu, LazyCpu};
#[cfg(feature = "cuda")]
pub use cuda::{Attention, Cuda, CudaError, CudaInfo, CudaStream, PeerMemory, Witness, Words};
pub use device::Device;
pub use documents::Documents;
pub use dtype::{Bool, DType, Element};
pub use error::Error;
pub use event::{Completion, Event, Failure, Status};
pub use kernels::{AttentionShape, IGNORED, Kernels};
pub use memory::{HUGE_PAGE, Raw, Region, Space, Span, exclusive};
pub use parts::Part;
pub use ranges::{Range, Ranges};
pub use stamp::{Stamp, Timed};
pub use stream::{AdamW, Stream};
