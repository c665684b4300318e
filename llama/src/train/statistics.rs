//! What a run does with the statistics of its gradients besides asking the controller.

use pillion_abs::Observation;
use pillion_runtime::{Engine, StepReport};

use super::metrics::Alignment;
use crate::Error;

/// Checks that all ranks have decided on the same batch, by the sum of theirs and of their squares: these are exact, and only of equal ones is the mean of the squares the square of
/// the mean. Decisions are functions of sums that all ranks have; this is what says that they are.
pub(super) fn check_same(world: u64, sum: f64, squares: f64) -> Result<(), Error> {
    if squares * world as f64 == sum * sum {
        return Ok(());
    }
    Err(Error::Setting(format!(
        "ranks have decided on different batches, {:.1} samples in the mean: start every rank with the same program",
        sum / world as f64
    )))
}

/// Groups of a step: its micro-batches where gradients are reduced in every round; else the ranks that have any, since a whole gradient is that of all of a rank's.
pub(super) fn groups(engine: &Engine, micro_batches: u64) -> u64 {
    match engine.policy().sharded.gradients {
        true => micro_batches,
        false => micro_batches.min(engine.communicator().world() as u64),
    }
}

/// Has the engine compare groups, if `eta` is given; a refusal is said once.
pub(super) fn compare(engine: &mut Engine, eta: Option<f64>) -> Result<(), Error> {
    let rank = engine.communicator().rank();
    engine.compare_groups(eta).map_err(|error| match error {
        // Every rank has it.
        pillion_runtime::Error::Policy(_) if rank > 0 => Error::ByRankZero { setting: true },
        pillion_runtime::Error::Policy(why) => Error::Setting(format!("--alignment: {why}")),
        error => error.into(),
    })
}

/// Where the noise of a step's gradient points, if its groups were compared.
pub(super) fn alignment(engine: &Engine, observation: &Observation, report: &StepReport) -> Option<Alignment> {
    let comparison = report.comparison.as_ref()?;
    let found = pillion_abs::Alignment::of(observation, &comparison.products)?;
    let parameters: usize = engine.layout().units.iter().map(|unit| unit.len).sum();
    Some(Alignment {
        along: found.along,
        across: found.across,
        coordinates: comparison.passing / parameters as f64,
        mass: comparison.passing_square_norm / observation.square_norm,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rank_with_another_batch_is_noticed() {
        let check = |batches: &[f64]| {
            check_same(batches.len() as u64, batches.iter().sum(), batches.iter().map(|batch| batch * batch).sum())
        };
        for batch in [1.0, 3.0, 1_048_576.0] {
            check(&vec![batch; 512]).unwrap();
            let mut batches = vec![batch; 512];
            batches[77] += 1.0;
            check(&batches).unwrap_err();
            // The same mean.
            batches[3] -= 1.0;
            check(&batches).unwrap_err();
        }
    }
}
