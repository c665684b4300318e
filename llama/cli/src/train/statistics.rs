//! What a run does with the statistics of its gradients besides asking the controller.

use pillion_abs::{ByChance, Observation, Rule, Variant};
use pillion_runtime::{Engine, StepReport};

use super::metrics::Alignment;
use super::recipe::Recipe;
use crate::Error;
use crate::controller::by_flag;

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

/// Why no batch of this run can be expected to grow, if it follows measurements. A step of the
/// first batch has `groups` groups.
pub(super) fn growth_warning(recipe: &Recipe, groups: u64) -> Option<String> {
    let settings = &recipe.controller;
    let base = settings.base;
    let eta = match settings.rule {
        Rule::NormTest { eta, variant: Variant::PaperLiteral } => Some(eta),
        Rule::NormTest { .. } | Rule::NoiseScale { .. } => None,
        _ => return None,
    };
    if groups < 2 {
        return Some(format!(
            "a step of {base} samples is a single group here, whose noise cannot be measured, so the batch cannot \
             grow: raise --batch, let gradients be reduced in every round (--shard zero-2 or zero-3), take more \
             ranks, or choose --controller constant"
        ));
    }
    // A new run is refused before; an old one goes on as it began.
    if let Err(error) = settings.check_growth() {
        let error = by_flag(error);
        return Some(format!(
            "this run goes on with the settings that it began with, but its batch is not expected to grow: {error}"
        ));
    }
    // From (groups − 1)·σ²/b over η²·E Q, where E Q ≥ σ²/b: see the documentation of `pillion-abs`.
    if let Some(most) = eta.map(|eta| (groups - 1) as f64 / (eta * eta)).filter(|&most| most <= base as f64) {
        return Some(format!(
            "the printed norm test asks in expectation for at most (groups - 1)/eta² samples, {most:.1} here, so a \
             batch of {base} is not expected to grow: lower --eta or --batch, take more ranks, or leave \
             --variant paper-literal out"
        ));
    }
    let most = recipe.schedule.samples / base;
    let needed = settings.interval.saturating_mul(settings.patience.into());
    (needed > 1 && needed >= most).then(|| {
        format!(
            "the batch can change after {needed} steps at the earliest (--test-interval times --patience), and this \
             run has {most} steps of {base} samples, so it cannot grow: lower one of the two, or choose --controller \
             constant"
        )
    })
}

/// Has the engine compare groups, if `eta` is given; a refusal is said once.
pub(super) fn compare(engine: &mut Engine, eta: Option<f64>) -> Result<(), Error> {
    let rank = engine.communicator().rank();
    engine.compare_groups(eta).map_err(|error| match error {
        // Every rank has it.
        pillion_runtime::Error::Policy(_) if rank > 0 => Error::ByRankZero { code: 2 },
        pillion_runtime::Error::Policy(why) => Error::Setting(format!("--alignment: {why}")),
        error => error.into(),
    })
}

/// Where the noise of a step's gradient points, if its groups were compared, by `eta`.
pub(super) fn alignment(
    engine: &Engine,
    eta: Option<f64>,
    observation: &Observation,
    report: &StepReport,
) -> Option<Alignment> {
    let comparison = report.comparison.as_ref()?;
    let found = pillion_abs::Alignment::of(observation, &comparison.products)?;
    let parameters: usize = engine.layout().units.iter().map(|unit| unit.len).sum();
    let by_chance = eta.and_then(|eta| ByChance::of(observation.groups, eta));
    Some(Alignment {
        along: found.along,
        across: found.across,
        coordinates: comparison.passing / parameters as f64,
        mass: comparison.passing_square_norm / observation.square_norm,
        coordinates_by_chance: by_chance.map(|share| share.coordinates),
        mass_by_chance: by_chance.map(|share| share.mass),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::settings::{Cli, Command};

    fn warning(flags: &str, groups: u64) -> Option<String> {
        let arguments: Vec<String> = format!("pillion train --batch 8 --round-to 8 --micro-batch 4 {flags}")
            .split(' ')
            .map(str::to_owned)
            .collect();
        let Ok(Cli { command: Command::Train(train) }) = Cli::from_arguments(&arguments) else { panic!("{flags}") };
        growth_warning(&Recipe::new(&train, 2).unwrap(), groups)
    }

    #[test]
    fn a_batch_that_cannot_grow_is_warned_of_and_no_other() {
        for (flags, groups, parts) in [
            ("--eta 0.9", 1, &["single group", "--shard zero-2"][..]),
            ("--eta 1", 2, &["--eta: 1, expected a number below 1", "variant debiased"]),
            // 1/0.36² = 7.7 are at most the first 8 samples.
            ("--variant paper-literal --eta 0.36", 2, &["at most (groups - 1)/eta² samples, 7.7", "lower --eta"]),
            ("--samples 80 --test-interval 5 --patience 2", 2, &["after 10 steps", "10 steps of 8 samples"]),
            ("--controller noise-scale --samples 80 --patience 10", 2, &["after 10 steps"]),
        ] {
            let warning = warning(flags, groups).unwrap_or_else(|| panic!("no warning of {flags}"));
            assert!(parts.iter().all(|part| warning.contains(part)), "{flags}: {warning}");
        }
        for (flags, groups) in [
            ("--eta 0.99", 2),
            ("--eta 3 --variant debiased", 2),
            ("--variant paper-literal --eta 0.35", 2),
            ("--samples 88 --test-interval 5 --patience 2", 2),
            ("--samples 8", 2),
            ("--controller constant", 1),
            ("--controller linear-ramp --ramp 16:0.5", 1),
        ] {
            assert_eq!(warning(flags, groups), None, "{flags}");
        }
    }

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
