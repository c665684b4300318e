//! What can go wrong with a GPU.

/// Failures of a [`Cuda`](super::Cuda) device.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CudaError {
    /// A library is not there.
    #[error("no {library} was found ({reason}): {remedy}")]
    NoLibrary {
        /// What it is called.
        library: &'static str,
        /// What the dynamic linker says.
        reason: String,
        /// How to get it.
        remedy: &'static str,
    },
    /// A library is too old.
    #[error("{library} lacks {symbol}: {remedy}")]
    NoSymbol {
        /// What it is called.
        library: &'static str,
        /// The function.
        symbol: &'static str,
        /// How to get a newer one.
        remedy: &'static str,
    },
    /// There is no such GPU.
    #[error(
        "there is no GPU {wanted}: this process sees {seen} (CUDA_VISIBLE_DEVICES is {visible}; \
         `nvidia-smi -L` lists them)"
    )]
    NoDevice {
        /// The number asked for.
        wanted: u32,
        /// How many GPUs the process sees.
        seen: u32,
        /// What CUDA_VISIBLE_DEVICES says.
        visible: String,
    },
    /// The GPU lacks something that this library is built on.
    #[error("GPU {ordinal} ({name}) {lacks}")]
    Unsupported {
        /// Its number.
        ordinal: u32,
        /// Its name.
        name: String,
        /// What it lacks, as the end of a sentence.
        lacks: &'static str,
    },
    /// PILLION_ATTENTION asks for what there is not.
    #[error("PILLION_ATTENTION is {wanted:?}: GPUs compute attention by \"flash\" (the default) or \"products\"")]
    Attention {
        /// What it says.
        wanted: String,
    },
    /// A call into a library failed.
    #[error("{call} failed: {code}{}", if text.is_empty() { String::new() } else { format!(" ({text})") })]
    Call {
        /// The function.
        call: &'static str,
        /// The error's name.
        code: String,
        /// What the library says of it.
        text: String,
    },
    /// Kernels do not compile.
    #[error("kernels do not compile for {architecture}:\n{log}")]
    Compile {
        /// The GPU's architecture.
        architecture: String,
        /// What the compiler says.
        log: String,
    },
    /// The memory that was set aside is too small.
    #[error(
        "GPU {ordinal} has no room for {bytes} bytes: {used} of the {slab} bytes set aside for this \
         rank are in use; use a smaller model or micro-batch, or more ranks"
    )]
    NoRoom {
        /// The GPU's number.
        ordinal: u32,
        /// Size of the refused allocation in bytes.
        bytes: u64,
        /// Bytes in use.
        used: u64,
        /// Bytes set aside.
        slab: u64,
    },
    /// The GPU has less memory left than is to be set aside.
    #[error(
        "GPU {ordinal} has {free} of its {total} bytes left, and {bytes} were to be set aside for a \
         rank: use smaller sizes, or more or emptier GPUs (`nvidia-smi` shows who uses them)"
    )]
    Full {
        /// The GPU's number.
        ordinal: u32,
        /// Bytes that were to be set aside.
        bytes: u64,
        /// Bytes that nobody uses.
        free: u64,
        /// Bytes of the GPU.
        total: u64,
    },
    /// Memory that the GPU cannot use.
    #[error(
        "GPU {ordinal} does not reach {space}: buffers of a GPU come from its own allocator or a transport for GPUs"
    )]
    Reach {
        /// The GPU's number.
        ordinal: u32,
        /// Whose memory it is.
        space: crate::Space,
    },
    /// Streams wait for too many events of the host at a time.
    #[error("streams of one rank wait for more than 1,000 events of the host at a time")]
    Words,
    /// Another rank's work on its GPU failed, and this rank's work follows it.
    #[error("the work of another rank on its GPU failed: look at that rank's own message")]
    Peer,
    /// The GPU stands still without an error.
    #[error(
        "GPU {ordinal} has run nothing of what this rank gave it for {seconds:.0} s: it hangs, or waits for \
         another one that does; `dmesg | grep Xid` and `nvidia-smi` may say why"
    )]
    Hung {
        /// The GPU's number.
        ordinal: u32,
        /// For how long, in seconds.
        seconds: f64,
    },
    /// The process is a forked child of the one that has the GPU.
    #[error("a forked child cannot use the GPU of the process that it comes from: start programs with exec")]
    Forked,
    /// A token id that the table does not have.
    #[error("a token id is beyond the vocabulary: the embedding's table has no such row")]
    Token,
    /// A target that the logits do not have.
    #[error("a target is beyond the vocabulary: the logits have no such column")]
    Target,
}

/// What a kernel leaves in a [latch](super::latch).
impl CudaError {
    /// The error of a code, but for the one of a failed event, which has an error of its own.
    pub(super) fn of_latch(code: u32) -> Option<CudaError> {
        match code {
            2 => Some(CudaError::Token),
            3 => Some(CudaError::Target),
            4 => Some(CudaError::Peer),
            _ => None,
        }
    }
}
