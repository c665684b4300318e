//! Devices.

use crate::{Buffer, DType, Error, Region, Stream};

/// Something that owns memory and runs kernels.
///
/// # Safety
/// [`Device::take_in`] returns the region that it was given, perhaps marked as
/// [`Region::deferred`], and keeps nothing of it: peers map the same memory. Where the device's
/// streams may touch memory after the call that enqueues the work, all its memory is deferred.
pub unsafe trait Device: Send + Sync {
    /// Its name, for tables and messages.
    fn name(&self) -> &'static str;

    /// Memory for `len` elements, zeroed.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    fn allocate(&self, dtype: DType, len: usize) -> Result<Buffer, Error>;

    /// A new stream, ordered with nothing else.
    fn stream(&self) -> Box<dyn Stream>;

    /// Takes memory of the host into use, such as a communicator's arena. A stream of this device
    /// then accepts buffers in it, and may refuse buffers in any other.
    ///
    /// # Errors
    /// When the device cannot reach it.
    fn take_in(&self, region: Region) -> Result<Region, Error>;
}
