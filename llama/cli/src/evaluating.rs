//! A checkpoint's weights in an engine for forward passes, on each rank of a job: what `pillion
//! generate` and `pillion eval` share.

use std::sync::Arc;

use pillion_collectives::{Communicator, Launch};
use pillion_kernels::{Cores, DType, Device, LazyCpu};
use pillion_llama::config::Config;
use pillion_llama::model::{Model, Recompute};
use pillion_runtime::checkpoint::Whole;
use pillion_runtime::{Engine, Gather, Memory, Policy};

use crate::Error;
use crate::gpu::{self, Load, Moved};
use crate::settings::{DeviceKind, JobArgs};
use crate::train::cores;

/// What passes are made for, beside the weights.
#[derive(Clone, Copy)]
pub(crate) enum Passes {
    /// Over micro-batches of `batch` samples of `seq` tokens.
    Batches { batch: usize, seq: usize },
    /// Over a text of at most so many tokens, as it grows.
    Text { capacity: usize },
}

/// Loads the model of a checkpoint, divided among all ranks, and computed with in this type.
/// Collective.
///
/// # Errors
/// Without the device, or without so much memory; when the checkpoint cannot be read.
pub(crate) fn open(
    whole: &Whole,
    model: &Config,
    precision: DType,
    passes: Passes,
    job: &JobArgs,
    launch: &Launch,
    communicator: &Arc<Communicator>,
) -> Result<(Engine, Arc<dyn Device>), Error> {
    let world = communicator.world();
    let mut policy = Policy { weights: precision, ..Policy::default() };
    if job.device.is_gpu() || communicator.hosts() > 1 {
        policy.gather = Gather::Copy;
    }
    let layout = model.layout(world);
    let (device, moves): Moved = match job.device {
        DeviceKind::Cpu => {
            let threads = cores::threads(job.threads, launch)?;
            (Arc::new(Cores::new(threads)?), communicator.clone())
        }
        DeviceKind::LazyCpu => (Arc::new(LazyCpu::new(1)), communicator.clone()),
        DeviceKind::Cuda(gpu) => {
            let weights = Memory::of(&layout, &policy, policy.mesh(world)?).total();
            let (activations, batch, seq, writes) = match passes {
                Passes::Batches { batch, seq } => {
                    (Model::activation_bytes(model, precision, batch, seq, Recompute::Block), batch, seq, None)
                }
                Passes::Text { capacity } => (0, 1, 1, Some(capacity)),
            };
            let (allocated, by) = (weights + activations, job.gpu_transport);
            let load = Load { allocated, model, batch, seq, writes, policy, by };
            gpu::open(gpu, launch.local_rank, &load, communicator)?.0
        }
    };
    let mut engine = Engine::for_evaluation(moves, device.clone(), layout, policy)?;
    whole.load(&mut engine)?;
    Ok((engine, device))
}
