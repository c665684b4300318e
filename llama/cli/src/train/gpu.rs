//! The GPUs of a training run.

use std::sync::Arc;

use pillion_collectives::{Communicator, GpuTransport, Launch, Reduction};
use pillion_kernels::{DType, Device};
use pillion_runtime::{Gather, Policy};

use crate::Error;
use crate::gpu::{self, Load, Moved};
use crate::plan::Setup;
use crate::settings::{DeviceKind, TrainArgs};

/// Checks what GPUs cannot have, and what only they have.
///
/// # Errors
/// [`Error::Setting`].
pub(super) fn check_settings(settings: &TrainArgs) -> Result<(), Error> {
    if !settings.job.device.is_gpu() {
        return match settings.job.gpu_transport {
            GpuTransport::Auto => Ok(()),
            _ => Err(Error::Setting("--gpu-transport is for GPUs: give --device cuda, or leave it out".to_owned())),
        };
    }
    let refused = [
        (settings.profile, "--profile"),
        (settings.auto, "--auto"),
        (!copies(settings), "--gather window"),
        (settings.controller.alignment.is_some(), "--alignment"),
    ];
    match refused.into_iter().find(|(is_given, _)| *is_given) {
        Some((_, flag)) => Err(Error::Setting(format!("--device cuda does not have {flag}: leave it out"))),
        None => Ok(()),
    }
}

/// Checks, before any rank starts, that the GPUs that the settings name are there.
///
/// # Errors
/// [`Error::Setting`].
pub(super) fn check_device(settings: &TrainArgs) -> Result<(), Error> {
    match settings.job.device {
        DeviceKind::Cuda(gpu) => gpu::check(gpu),
        DeviceKind::Cpu | DeviceKind::LazyCpu => Ok(()),
    }
}

fn copies(settings: &TrainArgs) -> bool {
    matches!(settings.policy.gather, None | Some(Gather::Copy))
}

/// What a run on GPUs does otherwise than one on processors: weights are gathered into slots.
pub(super) fn adapt(settings: &TrainArgs, policy: Policy) -> Policy {
    match settings.job.device {
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
    sample: usize,
    launch: &Launch,
    communicator: &Arc<Communicator>,
) -> Result<Moved, Error> {
    let needs = setup.needs();
    let allocated = needs.memory.total() + needs.activations + needs.checkpoints;
    let (batch, policy) = (setup.micro_batch as usize, setup.policy);
    let by = settings.job.gpu_transport;
    let writes = (sample > 0).then_some(setup.seq);
    let load = Load { allocated, model: setup.model, batch, seq: setup.seq, writes, policy, by };
    let (moved, what) = gpu::open(gpu, launch.local_rank, &load, communicator)?;
    if communicator.rank() == 0 {
        crate::print(format_args!(" GPU          {what}"));
    }
    Ok(moved)
}

/// Floating-point operations a second that the GPUs of all ranks make in products of `dtype`: for
/// each the fastest of square products that grow until one takes 2 ms or the memory is full. Every
/// rank calls it, before it has taken memory; rank 0 prints it.
///
/// # Errors
/// When the GPU or another rank fails.
pub(super) fn peak(device: &dyn Device, communicator: &Communicator, dtype: DType) -> Result<f64, Error> {
    const SIDES: [usize; 6] = [256, 512, 1024, 2048, 4096, 8192];
    const LONG: f64 = 2e-3;
    communicator.barrier()?;
    let (stream, mut peak) = (device.stream(), 0.0f64);
    let kernels = stream.kernels().ok_or(pillion_kernels::Error::NoKernels).map_err(pillion_runtime::Error::from)?;
    for side in SIDES {
        let allocate = || device.allocate(dtype, side * side);
        let (Ok(x), Ok(w), Ok(mut y)) = (allocate(), allocate(), allocate()) else { break };
        let mut shortest = f64::INFINITY;
        // The first call chooses an algorithm.
        for _ in 0..3 {
            let start = stream.stamp();
            kernels.linear(y.view_mut(), x.view(), w.view(), None, side);
            let end = stream.stamp();
            stream.synchronize().map_err(pillion_runtime::Error::from)?;
            if let (Some(start), Some(end)) = (start.time(), end.time()) {
                shortest = shortest.min(end.duration_since(start).as_secs_f64());
            }
        }
        // Stamps have half a microsecond.
        let seconds = shortest.max(1e-6);
        peak = peak.max(2.0 * (side as f64).powi(3) / seconds);
        if seconds > LONG {
            break;
        }
    }
    let mut all = [peak];
    communicator.all_reduce_scalars(&mut all, Reduction::Sum)?;
    if communicator.rank() == 0 {
        let tera = all[0] / 1e12;
        crate::print(format_args!(" GPUs         at most {tera:.1} TFLOP/s in {dtype} products"));
    }
    Ok(all[0])
}
