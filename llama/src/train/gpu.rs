//! The GPUs of a run.

use std::sync::Arc;

use pillion_collectives::{Communicator, Launch};
use pillion_kernels::Device;
use pillion_runtime::{Gather, Policy};

use crate::Error;
use crate::plan::Setup;
use crate::settings::{DeviceKind, LaunchKind, TrainArgs};

/// What a rank computes on, and the communicator that moves its memory.
pub(super) type Moved = (Arc<dyn Device>, Arc<Communicator>);

/// Checks, before any rank starts, what GPUs cannot have, and that they are there.
///
/// # Errors
/// [`Error::Setting`].
pub(super) fn check(settings: &TrainArgs) -> Result<(), Error> {
    let DeviceKind::Cuda(gpu) = settings.device else { return Ok(()) };
    let given = |flag: &str| settings.given.contains(flag);
    let refused = [
        (given("launch") && settings.launch == LaunchKind::Processes, "--launch processes"),
        (settings.nodes > 1, "--nodes"),
        (settings.trace, "--trace"),
        (settings.profile, "--profile"),
        (settings.auto, "--auto"),
        (given("gather") && !copies(settings), "--gather window"),
        (given("alignment"), "--alignment"),
    ];
    if let Some((_, flag)) = refused.into_iter().find(|(is_given, _)| *is_given) {
        return Err(Error::Setting(format!("--device cuda does not have {flag}: leave it out")));
    }
    there_is(gpu)
}

fn copies(settings: &TrainArgs) -> bool {
    matches!(settings.policy.gather, None | Some(crate::settings::GatherKind::Copy))
}

/// What a run on GPUs does otherwise than one on processors: weights are gathered into slots.
pub(super) fn adapt(settings: &TrainArgs, policy: Policy) -> Policy {
    match settings.device {
        DeviceKind::Cuda(_) => Policy { gather: Gather::Copy, ..policy },
        DeviceKind::Cpu | DeviceKind::LazyCpu => policy,
    }
}

#[cfg(not(feature = "cuda"))]
fn there_is(_: Option<u32>) -> Result<(), Error> {
    let reason = "this program was built without GPUs: build it with --features cuda";
    Err(Error::Setting(reason.to_owned()))
}

#[cfg(not(feature = "cuda"))]
pub(super) fn open(gpu: Option<u32>, _: &Setup<'_>, _: &Launch, _: &Arc<Communicator>) -> Result<Moved, Error> {
    there_is(gpu).map(|()| unreachable!("a run without GPUs has been refused"))
}

#[cfg(feature = "cuda")]
fn there_is(gpu: Option<u32>) -> Result<(), Error> {
    let refuse = |error: pillion_kernels::Error| Error::Setting(error.to_string());
    pillion_kernels::Cuda::info(gpu.unwrap_or(0)).map(|_| ()).map_err(refuse)
}

/// Sets a rank's memory aside on its GPU: what the plan predicts, what kernels work with, and a
/// twentieth for the gaps between buffers. Every rank calls it; rank 0 prints the GPU.
///
/// # Errors
/// Without the GPU, or without so much memory.
#[cfg(feature = "cuda")]
pub(super) fn open(
    gpu: Option<u32>,
    setup: &Setup<'_>,
    launch: &Launch,
    communicator: &Arc<Communicator>,
) -> Result<Moved, Error> {
    use pillion_kernels::Cuda;

    use crate::model::Model;

    let ordinal = match gpu {
        Some(gpu) => gpu,
        None => launch.local_rank as u32 % Cuda::count()?.max(1),
    };
    let needs = setup.needs();
    let predicted = needs.memory.total() + needs.activations + needs.checkpoints;
    let (model, batch) = (setup.model, setup.micro_batch as usize);
    let attention = Model::attention_shape(model, batch, setup.seq);
    let working = Cuda::working_bytes(attention, model.hidden_size, setup.policy.weights);
    let device = Cuda::new(ordinal, predicted + predicted / 20 + working + (16 << 20))?;
    if communicator.rank() == 0 {
        let (_, bytes) = device.memory();
        crate::print(format_args!(
            " GPU          {}, {} set aside for each rank",
            device.gpu(),
            pillion_collectives::limits::human(bytes)
        ));
    }
    let communicator = Arc::new(communicator.between_gpus(&device)?);
    Ok((Arc::new(device), communicator))
}
