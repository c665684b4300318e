//! What can go wrong in this crate that is the world's fault. Misuse by the programmer (a wrong shape, a buffer of another
//! device) panics with the reason.

/// Failures of devices.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The allocator refused.
    #[error("device {device} has no memory for {bytes} bytes: use a smaller model or micro-batch, or more ranks")]
    OutOfMemory {
        /// The device's name.
        device: &'static str,
        /// Size of the refused allocation in bytes.
        bytes: usize,
    },
}
