//! What can go wrong in this crate that is the world's fault. Misuse by the programmer (a wrong shape, a buffer of another
//! device) panics with the reason.

/// Failures of devices.
#[derive(Clone, Debug, thiserror::Error)]
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
    /// The system starts no threads.
    #[error(
        "{threads} threads cannot be started ({reason}): ask for fewer with --threads, or raise the limit of processes and threads \
         (`ulimit -u`, or pids.max of the container or control group)"
    )]
    Threads {
        /// How many were asked for.
        threads: usize,
        /// What the system says.
        reason: String,
    },
    /// `PILLION_ISA` asks for what there is not.
    #[error(
        "PILLION_ISA is {wanted:?}: this processor has {widest} and what is below it (portable, avx2, avx512, amx)"
    )]
    Isa {
        /// What it says.
        wanted: String,
        /// The widest set of instructions here.
        widest: &'static str,
    },
    /// A model needs more than copies and arithmetic on flat arrays.
    #[error("this device has no kernels for a model: use one that has them, such as cpu")]
    NoKernels,
    /// Memory of somebody else's does not start at a multiple of the element size.
    #[error("memory at address {address:#x} cannot hold {dtype}, whose elements lie at multiples of their size")]
    Misaligned {
        /// The address.
        address: usize,
        /// The type of the elements.
        dtype: crate::DType,
    },
    /// A GPU cannot be used, or work on it has failed.
    #[cfg(feature = "cuda")]
    #[error(transparent)]
    Cuda(#[from] crate::cuda::CudaError),
    /// Work on the device could not run, because work that it follows failed.
    #[error(transparent)]
    Failed(#[from] crate::Failure),
}
