//! The GPU of a rank, where buffers lie on one.

use std::sync::Arc;

use pillion_collectives::{Communicator, GpuTransport, Launch, Reduction};
use pillion_kernels::{DType, Device};

use crate::Error;
use crate::kernels::Sizes;
use crate::operation::Operation;

/// Whose memory buffers are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceArgument {
    /// The host's.
    Cpu,
    /// A GPU: this one of each host, or one for each rank in turn.
    Cuda(Option<u32>),
}

/// Parses `--device`.
///
/// # Errors
/// What was expected.
pub fn device(text: &str) -> Result<DeviceArgument, String> {
    match (text, text.strip_prefix("cuda:")) {
        ("cpu", _) => Ok(DeviceArgument::Cpu),
        ("cuda", _) => Ok(DeviceArgument::Cuda(None)),
        (_, Some(number)) if number.parse::<u32>().is_ok() => Ok(DeviceArgument::Cuda(number.parse().ok())),
        _ => Err("expected cpu, cuda or cuda:N, with GPUs counted from 0".to_owned()),
    }
}

/// A GPU for kernels alone, with memory for operands of these sizes; and its name.
///
/// # Errors
/// [`Error::Usage`] with what is missing; without so much memory.
#[cfg(feature = "cuda")]
pub fn alone(ordinal: u32, sizes: Sizes) -> Result<(Arc<dyn Device>, String), Error> {
    use pillion_kernels::Cuda;

    check(Wanted { ordinal: Some(ordinal), by: GpuTransport::Peer })?;
    let working = [DType::F32, DType::Bf16].map(|dtype| Cuda::working_bytes(sizes.attention(), sizes.width(), dtype));
    // Operands of two cases at a time, because a GPU gives memory back when its work has run.
    let bytes = 2 * sizes.bytes() + working.iter().sum::<u64>() + (256 << 20);
    let device = Cuda::new(ordinal, bytes)?;
    let name = device.gpu().to_owned();
    Ok((Arc::new(device), name))
}

/// A GPU for kernels alone.
///
/// # Errors
/// [`Error::Usage`] in a build without GPUs.
#[cfg(not(feature = "cuda"))]
pub fn alone(ordinal: u32, _: Sizes) -> Result<(Arc<dyn Device>, String), Error> {
    let wanted = Wanted { ordinal: Some(ordinal), by: GpuTransport::Peer };
    check(wanted).map(|()| unreachable!("a build without GPUs refuses them"))
}

/// Which GPU, and what moves elements between GPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// Its number on each host; None: rank r of a host takes GPU r, from 0 again after the last
    /// one.
    pub ordinal: Option<u32>,
    /// What moves the elements.
    pub by: GpuTransport,
}

/// A rank's GPU.
pub(crate) struct Gpu {
    pub(crate) device: Arc<dyn Device>,
    /// Its ranks' buffers are memory of GPUs.
    pub(crate) communicator: Communicator,
    /// Its name.
    pub(crate) name: String,
}

impl Gpu {
    /// What moves elements, in a word.
    pub(crate) fn backend(&self) -> &'static str {
        if self.communicator.capabilities().rank_order { "peer" } else { "nccl" }
    }
}

/// The operations that GPUs have.
pub(crate) const OPERATIONS: [Operation; 6] = [
    Operation::ReduceScatter,
    Operation::AllGather,
    Operation::AllReduce,
    Operation::Broadcast,
    Operation::Barrier,
    Operation::Scalars,
];

/// Whether GPUs combine elements of this type so. Scalars are combined by the host.
pub(crate) fn combines(operation: Operation, dtype: DType, reduction: Reduction) -> bool {
    let sums = matches!(reduction, Reduction::Sum | Reduction::Avg | Reduction::PremulSum(_));
    operation == Operation::Scalars || sums && matches!(dtype, DType::F32 | DType::Bf16)
}

/// Whether there is such a GPU; to be called at the start of the program.
///
/// # Errors
/// [`Error::Usage`] with what is missing.
#[cfg(feature = "cuda")]
pub(crate) fn check(wanted: Wanted) -> Result<(), Error> {
    use pillion_kernels::Cuda;

    Cuda::prepare();
    Cuda::info(wanted.ordinal.unwrap_or(0)).map(drop).map_err(|error| Error::Usage(error.to_string()))
}

/// Sets memory for buffers of `bytes` bytes aside, and connects the GPUs of all ranks.
///
/// # Errors
/// Without the GPU, or without so much memory.
#[cfg(feature = "cuda")]
pub(crate) fn open(wanted: Wanted, bytes: u64, launch: &Launch, host: &Communicator) -> Result<Gpu, Error> {
    use pillion_kernels::Cuda;

    /// Of streams, and of the kernels' own.
    const BESIDE: u64 = 64 << 20;
    let ordinal = match wanted.ordinal {
        Some(ordinal) => ordinal,
        None => launch.local_rank as u32 % Cuda::count()?.max(1),
    };
    // NCCL's operations work on f32 copies of what they reduce.
    let copies = if wanted.by == GpuTransport::Peer { 0 } else { 2 * bytes };
    let device = Cuda::new(ordinal, bytes.saturating_add(bytes / 20).saturating_add(copies).saturating_add(BESIDE))?;
    let communicator = host.between_gpus(&device, wanted.by)?;
    Ok(Gpu { name: device.gpu().to_owned(), device: Arc::new(device), communicator })
}

/// Whether there is such a GPU.
///
/// # Errors
/// [`Error::Usage`] in a build without GPUs.
#[cfg(not(feature = "cuda"))]
pub(crate) fn check(_: Wanted) -> Result<(), Error> {
    Err(Error::Usage("this program was built without GPUs: build it with --features cuda".to_owned()))
}

/// Sets memory aside.
///
/// # Errors
/// [`Error::Usage`] in a build without GPUs.
#[cfg(not(feature = "cuda"))]
pub(crate) fn open(wanted: Wanted, _: u64, _: &Launch, _: &Communicator) -> Result<Gpu, Error> {
    check(wanted).map(|()| unreachable!("a build without GPUs refuses them"))
}
