//! The GPUs of a training run.

use std::sync::Arc;

use pillion_collectives::{Communicator, Launch};
use pillion_runtime::{Gather, Policy};

use crate::Error;
use crate::gpu::{self, Load, Moved};
use crate::plan::Setup;
use crate::settings::{DeviceKind, TrainArgs};

/// Checks, before any rank starts, what GPUs cannot have, and that they are there.
///
/// # Errors
/// [`Error::Setting`].
pub(super) fn check(settings: &TrainArgs) -> Result<(), Error> {
    let DeviceKind::Cuda(gpu) = settings.device else { return Ok(()) };
    let given = |flag: &str| settings.given.contains(flag);
    let refused = [
        (settings.profile, "--profile"),
        (settings.auto, "--auto"),
        (given("gather") && !copies(settings), "--gather window"),
        (given("alignment"), "--alignment"),
    ];
    if let Some((_, flag)) = refused.into_iter().find(|(is_given, _)| *is_given) {
        return Err(Error::Setting(format!("--device cuda does not have {flag}: leave it out")));
    }
    gpu::check(gpu)
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

/// Sets a rank's memory aside on its GPU, as the plan predicts it.
///
/// # Errors
/// Without the GPU, or without so much memory.
pub(super) fn open(
    settings: &TrainArgs,
    gpu: Option<u32>,
    setup: &Setup<'_>,
    launch: &Launch,
    communicator: &Arc<Communicator>,
) -> Result<Moved, Error> {
    let needs = setup.needs();
    let allocated = needs.memory.total() + needs.activations + needs.checkpoints;
    let (batch, policy) = (setup.micro_batch as usize, setup.policy);
    let by = settings.gpu_transport.into();
    let load = Load { allocated, model: setup.model, batch, seq: setup.seq, policy, by };
    let (moved, what) = gpu::open(gpu, launch.local_rank, &load, communicator)?;
    if communicator.rank() == 0 {
        crate::print(format_args!(" GPU          {what}"));
    }
    Ok(moved)
}
