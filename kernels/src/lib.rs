//! Elements: devices, buffers, dtypes and the arithmetic on them.
//!
//! A [`Device`] owns memory and makes [`Queue`]s. A queue runs kernels in the order in which they were
//! enqueued; an [`Event`] orders one queue after another, or after a collective. Everything above this crate is
//! written against these two traits, so the same engine and the same model run on
//!
//! * [`Cpu`], and [`Cores`] with several threads: a kernel has run when its call returns;
//! * [`LazyCpu`]: a test device. Work runs as late as the events allow and otherwise in random order, so a
//!   dependency that somebody forgot shows as wrong bits on any machine.
//!
//! # Who may touch what
//!
//! A [`Buffer`] has one owner and cannot be cloned. Kernels borrow it through [`View`] and [`ViewMut`], so the borrow
//! checker orders accesses in the program. A queue that runs work later keeps that order by being first-in, first-out; between
//! queues it is the events' business. `cpu::HostQueue::run` is the one place where a view becomes a slice, and says why that is sound.

mod buffer;
pub mod cpu;
mod device;
mod dtype;
mod error;
mod event;
mod memory;
mod queue;
pub mod random;

pub use buffer::{Buffer, View, ViewMut};
pub use cpu::{Cores, Cpu, LazyCpu};
pub use device::Device;
pub use dtype::{DType, Element};
pub use error::Error;
pub use event::{Completion, Event, Failure, HAPPENED, Status};
pub use memory::{Raw, Region, Space, Span, exclusive};
pub use queue::{AdamW, AttentionShape, Queue};
