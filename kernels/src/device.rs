//! Devices.

use crate::{Buffer, DType, Error, Queue};

/// Something that owns memory and runs kernels.
pub trait Device: Send + Sync {
    /// Its name, for tables and messages.
    fn name(&self) -> &'static str;

    /// Memory for `len` elements, zeroed.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    fn allocate(&self, dtype: DType, len: usize) -> Result<Buffer, Error>;

    /// A new queue, ordered with nothing else.
    fn queue(&self) -> Box<dyn Queue>;

    /// Whether a kernel may run later than the call that enqueues it. Memory that a communicator lends to a device carries
    /// this mark, and a queue refuses buffers whose mark differs from its own.
    fn deferred(&self) -> bool;
}
