//! The GPUs of a command, in a build with the feature `cuda`.

use std::sync::Arc;

use pillion_collectives::{Communicator, GpuTransport};
use pillion_kernels::Device;
use pillion_llama::config::Config;
use pillion_runtime::Policy;

use crate::Error;

/// What a rank computes on, and the communicator that moves its memory.
pub(crate) type Moved = (Arc<dyn Device>, Arc<Communicator>);

/// What decides how much memory a rank takes on its GPU.
#[cfg_attr(not(feature = "cuda"), expect(dead_code, reason = "only a build with GPUs reads it"))]
pub(crate) struct Load<'a> {
    /// Bytes that are allocated.
    pub(crate) allocated: u64,
    pub(crate) model: &'a Config,
    /// Sequences and tokens of a micro-batch.
    pub(crate) batch: usize,
    pub(crate) seq: usize,
    /// Tokens of a text that the model writes, if it does.
    pub(crate) writes: Option<usize>,
    pub(crate) policy: Policy,
    /// What moves elements between GPUs.
    pub(crate) by: GpuTransport,
}

/// Whether this GPU can be used, or the first one.
///
/// # Errors
/// [`Error::Setting`] in a build without GPUs.
#[cfg(not(feature = "cuda"))]
pub(crate) fn check(_: Option<u32>) -> Result<(), Error> {
    let reason = "this program was built without GPUs: build it with --features cuda";
    Err(Error::Setting(reason.to_owned()))
}

/// Sets a rank's memory aside.
///
/// # Errors
/// [`Error::Setting`] in a build without GPUs.
#[cfg(not(feature = "cuda"))]
pub(crate) fn open(gpu: Option<u32>, _: usize, _: &Load<'_>, _: &Arc<Communicator>) -> Result<(Moved, String), Error> {
    check(gpu).map(|()| unreachable!("a build without GPUs refuses them"))
}

/// Whether this GPU can be used, or the first one. To be called at the start of the program.
///
/// # Errors
/// [`Error::Setting`] with what is missing.
#[cfg(feature = "cuda")]
pub(crate) fn check(gpu: Option<u32>) -> Result<(), Error> {
    use pillion_kernels::Cuda;

    if Cuda::prepare() == Some(1) {
        let warning = "CUDA_DEVICE_MAX_CONNECTIONS is 1, so streams wait for each other: leave it out";
        crate::complain(warning);
    }
    Cuda::info(gpu.unwrap_or(0)).map(|_| ()).map_err(|error| Error::Setting(error.to_string()))
}

/// Sets a rank's memory aside on a GPU, its own or the one that all share: what is allocated, what
/// kernels work with, and a twentieth for the gaps between buffers. Every rank calls it. Returns
/// also what it has, in words.
///
/// # Errors
/// Without the GPU, or without so much memory.
#[cfg(feature = "cuda")]
pub(crate) fn open(
    gpu: Option<u32>,
    local_rank: usize,
    load: &Load<'_>,
    communicator: &Arc<Communicator>,
) -> Result<(Moved, String), Error> {
    use pillion_collectives::limits::human;
    use pillion_kernels::{Attention, Cuda};
    use pillion_llama::decoder::{CHUNK, Decoder};
    use pillion_llama::model::Model;

    let Load { allocated, model, batch, seq, writes, policy, by } = load;
    let ordinal = match gpu {
        Some(gpu) => gpu,
        None => local_rank as u32 % Cuda::count()?.max(1),
    };
    let attention = Model::attention_shape(model, *batch, *seq);
    let working = Cuda::working_bytes(attention, model.hidden_size, policy.weights);
    // NCCL's operations work on copies of what they reduce, at most of the largest unit or bucket,
    // and its shards.
    let layout = model.layout(1);
    let unit = layout.units.iter().map(|unit| unit.len).max().unwrap_or(0);
    let bucket = layout.parameters().min(policy.bucket as usize / policy.weights.bytes());
    let longest = unit.max(bucket) as u64;
    let is_nccl = *by == GpuTransport::Nccl || communicator.hosts() > 1;
    let copies = if is_nccl { 3 * 4 * longest } else { 0 };
    let writing = writes.map_or(0, |tokens| {
        let shape = Decoder::attention_shape(model, tokens);
        Decoder::bytes(model, policy.weights, tokens) + Cuda::writing_bytes(shape, CHUNK, policy.weights)
    });
    let extra = working + writing + copies + (16 << 20);
    let device = Cuda::new(ordinal, allocated.saturating_add(allocated / 20).saturating_add(extra))?;
    let communicator = Arc::new(communicator.between_gpus(&device, *by)?);
    if share_by_turns(&device, &communicator)? && communicator.rank() == 0 {
        let warning = "ranks that are processes share a GPU, and take turns on it: with --launch threads their \
                       kernels run side by side";
        crate::complain(warning);
    }
    let aside = human(device.memory().1);
    let by = match device.attention(policy.weights, attention) {
        Attention::Flash => "flash kernels",
        Attention::Products => "matrix products",
    };
    let (gpu, mover) = (device.gpu(), communicator.mover());
    let what = format!("{gpu}, {aside} set aside for each rank; {mover} moves elements; attention by {by}");
    Ok(((Arc::new(device), communicator), what))
}

/// Whether ranks that are different processes have the same GPU. Every rank calls it.
#[cfg(feature = "cuda")]
fn share_by_turns(device: &pillion_kernels::Cuda, communicator: &Communicator) -> Result<bool, Error> {
    let uuid = u128::from_le_bytes(device.uuid());
    let own = [u64::from(std::process::id()), uuid as u64, (uuid >> 64) as u64];
    let all = communicator.all_gather_scalars(&own)?;
    let takes_turns = |a: &[u64], b: &[u64]| a[1..] == b[1..] && a[0] != b[0];
    Ok(all.iter().any(|a| all.iter().any(|b| takes_turns(a, b))))
}
