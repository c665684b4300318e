//! What a rank computes with: how many threads, and how fast they could be.

use std::sync::Arc;
use std::thread::available_parallelism;

use pillion_collectives::launch::Source;
use pillion_collectives::{Communicator, Launch, Reduction};
use pillion_kernels::cpu::{Isa, Profile};
use pillion_kernels::{Cores, DType};

use super::breakdown::Breakdown;
use crate::Error;
use crate::settings::TrainArgs;

/// A rank's processors.
pub(super) struct Processor {
    pub(super) device: Cores,
    /// Floating-point operations a second that they could make of numbers in registers, and all ranks' together.
    pub(super) own_peak: f64,
    /// Where GPUs compute, theirs, once they are open.
    pub(super) peak: Option<f64>,
    /// Where their time goes, on rank 0 and where asked for.
    pub(super) breakdown: Option<Breakdown>,
}

impl Processor {
    /// Starts the threads and measures the peak in products of `dtype`; rank 0 prints both. Every rank calls it.
    ///
    /// # Errors
    /// When threads cannot be had, or another rank fails.
    pub(super) fn open(
        settings: &TrainArgs,
        launch: &Launch,
        communicator: &Communicator,
        dtype: DType,
    ) -> Result<Processor, Error> {
        if settings.job.device.is_gpu() {
            return Ok(Processor { device: Cores::default(), own_peak: 0.0, peak: None, breakdown: None });
        }
        let threads = threads(settings.job.threads, launch)?;
        let mut device = Cores::new(threads).map_err(pillion_runtime::Error::from)?;
        // All ranks at once, as they compute at once.
        communicator.barrier()?;
        let own_peak = device.peak(dtype) * share(threads, launch);
        let mut peak = [own_peak];
        communicator.all_reduce_scalars(&mut peak, Reduction::Sum)?;
        let [peak] = peak;
        let mut breakdown = None;
        if communicator.rank() == 0 {
            let isa = Isa::of_process().map_err(pillion_runtime::Error::from)?.name();
            let plural = if threads == 1 { "" } else { "s" };
            let peak = peak / 1e9;
            crate::print(format_args!(
                " processor    {isa}, {threads} thread{plural} a rank; at most {peak:.0} GFLOP/s in {dtype} products"
            ));
            if settings.profile {
                let profile = Arc::new(Profile::default());
                device = device.profiled(profile.clone());
                breakdown = Some(Breakdown::new(profile));
            }
        }
        Ok(Processor { device, own_peak, peak: Some(peak), breakdown })
    }
}

/// Threads of this rank: as many as asked for, else the processors that it may run on, divided among the ranks of this host that may have
/// to share them.
///
/// # Errors
/// When more threads are asked for than there are processors for them.
pub(crate) fn threads(asked: Option<usize>, launch: &Launch) -> Result<usize, Error> {
    choose(asked, processors(), launch.local_world, matches!(launch.source, Source::Local | Source::Single))
}

/// Checks the same before `ranks` ranks are started here.
///
/// # Errors
/// As for [`threads`].
pub(crate) fn check(asked: Option<usize>, ranks: usize) -> Result<(), Error> {
    choose(asked, processors(), ranks, true).map(|_| ())
}

/// The share of its threads' time that a rank has when all ranks compute: less than 1 where we have started more threads than there are processors.
fn share(threads: usize, launch: &Launch) -> f64 {
    let ours = matches!(launch.source, Source::Local | Source::Single);
    let started = threads * if ours { launch.local_world } else { 1 };
    (processors() as f64 / started as f64).min(1.0)
}

/// That this process may run on.
fn processors() -> usize {
    available_parallelism().map_or(1, usize::from)
}

/// `ours`: whether we started the ranks, so that they run on the same processors. Other launchers may have given each rank its own.
fn choose(asked: Option<usize>, processors: usize, ranks: usize, ours: bool) -> Result<usize, Error> {
    let Some(asked) = asked else { return Ok((processors / ranks.max(1)).max(1)) };
    let sharing = if ours { ranks } else { 1 };
    // One thread a rank is no choice of threads: more ranks than processors have been asked for elsewhere.
    if asked > 1 && asked.saturating_mul(sharing) > processors {
        let ranks = if sharing > 1 { format!("{sharing} ranks with ") } else { String::new() };
        return Err(Error::Setting(format!(
            "--threads {asked}: {ranks}{asked} threads each would share {processors} processors; leave --threads out, or lend more processors"
        )));
    }
    if asked == 0 {
        return Err(Error::Setting("--threads is 0: it must be at least 1".to_owned()));
    }
    Ok(asked)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processors_are_divided_among_ranks_and_never_shared_by_threads() {
        for (asked, processors, ranks, ours, expected) in [
            (None, 8, 1, true, Some(8)),
            (None, 8, 3, true, Some(2)),
            (None, 8, 3, false, Some(2)),
            (None, 2, 8, true, Some(1)),
            (Some(2), 4, 2, true, Some(2)),
            (Some(1), 1, 8, true, Some(1)),
            (Some(3), 4, 2, true, None),
            // Whoever started these may have bound each to four processors.
            (Some(3), 4, 2, false, Some(3)),
            (Some(5), 4, 2, false, None),
            (Some(0), 4, 1, true, None),
        ] {
            let chosen = choose(asked, processors, ranks, ours);
            assert_eq!(chosen.as_ref().ok().copied(), expected, "{asked:?} {processors} {ranks} {ours}: {chosen:?}");
        }
    }
}
