//! The stagewise schedule: a list of batch sizes, each for a share of the run.
//!
//! A function of the samples seen, never of steps: a step's share of the run depends on its batch.

use serde::{Deserialize, Serialize};

use crate::{Error, Settings};

/// One stage of [`Rule::Stagewise`](crate::Rule::Stagewise).
#[derive(Serialize, Deserialize, Clone, Copy, PartialEq, Debug)]
#[serde(deny_unknown_fields)]
pub struct Stage {
    /// Batch of the stage, in samples.
    pub batch: u64,
    /// Share of the run's samples, above 0 and at most 1. With sequences of one length that is the share of tokens.
    pub share: f64,
}

/// How far from 1 the shares may sum: far above the rounding of any list written by hand, far below one sample in a run.
const SHARE_TOLERANCE: f64 = 1e-9;

/// The batch once `samples` of the run's `horizon` have been seen. The last stage has no end.
pub(crate) fn batch(stages: &[Stage], horizon: u64, samples: u64) -> u64 {
    let mut share = 0.0;
    for stage in stages {
        share += stage.share;
        // Rounded: 0.1 + 0.2 of ten samples ends after three of them.
        if samples < (share * horizon as f64).round() as u64 {
            return stage.batch;
        }
    }
    let last = stages.last().expect("validated: at least one stage");
    last.batch
}

pub(crate) fn validate(settings: &Settings, stages: &[Stage], horizon: u64) -> Result<(), Error> {
    if horizon == 0 {
        return Err(Error::setting(
            "rule.stagewise.horizon",
            horizon,
            "at least 1",
            "set it to the samples of the whole run",
        ));
    }
    let mut sum = 0.0;
    let mut previous = 0;
    for (i, stage) in stages.iter().enumerate() {
        let path = |field| format!("rule.stagewise.stages[{i}].{field}");
        let Stage { batch, share } = *stage;
        if !(share > 0.0 && share <= 1.0) {
            return Err(Error::setting(
                path("share"),
                share,
                "above 0 and at most 1",
                "write shares as fractions: 0.025 for 2.5 %",
            ));
        }
        if !settings.allows(batch) {
            return Err(Error::setting(
                path("batch"),
                batch,
                settings.allowed(),
                "change the stage, or the limits and the multiple of batches",
            ));
        }
        if settings.monotone && batch < previous {
            return Err(Error::setting(
                path("batch"),
                batch,
                format!("at least {previous}, the stage before"),
                "order the stages by batch, or let batches shrink",
            ));
        }
        sum += share;
        previous = batch;
    }
    if stages.is_empty() || (sum - 1.0).abs() > SHARE_TOLERANCE {
        return Err(Error::setting(
            "rule.stagewise.stages",
            format!("{} stages with shares of sum {sum}", stages.len()),
            "at least one stage and shares of sum 1",
            "add a stage or change a share",
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Rule;

    fn paper() -> Vec<Stage> {
        [(2048, 0.025), (4096, 0.025), (8192, 0.95)].map(|(batch, share)| Stage { batch, share }).into()
    }

    /// Lau et al. report this schedule over 2,000,000 sequences with 269 steps and a mean batch of 7439. The last step
    /// overshoots the horizon; how they count it is not said, hence the tolerance of one sample.
    #[test]
    fn paper_schedule_takes_the_steps_that_the_paper_reports() {
        let (mut steps, mut samples) = (0, 0);
        while samples < 2_000_000 {
            samples += batch(&paper(), 2_000_000, samples);
            steps += 1;
        }
        assert_eq!(steps, 269);
        assert!((samples as f64 / f64::from(steps) - 7439.0).abs() < 1.0);
    }

    #[test]
    fn stages_change_at_their_share_of_the_samples() {
        let at = |samples| batch(&paper(), 2_000_000, samples);
        assert_eq!([at(0), at(49_999)], [2048, 2048]);
        assert_eq!([at(50_000), at(99_999)], [4096, 4096]);
        assert_eq!([at(100_000), at(2_000_000), at(u64::MAX)], [8192; 3]);
    }

    #[test]
    fn each_bad_stage_is_refused_by_name() {
        let refused = |change: fn(&mut Vec<Stage>, &mut u64), name: &str| {
            let (mut stages, mut horizon) = (paper(), 2_000_000);
            change(&mut stages, &mut horizon);
            let rule = Rule::Stagewise { stages, horizon };
            let error = Settings::new(2048, 8192, 16, rule).validate().unwrap_err();
            assert!(error.to_string().contains(&format!("`rule.stagewise.{name}`")), "{error}");
        };
        refused(|_, horizon| *horizon = 0, "horizon");
        refused(|stages, _| stages.clear(), "stages");
        refused(|stages, _| stages[2].share = 0.94, "stages");
        refused(|stages, _| stages[1].share = 0.0, "stages[1].share");
        refused(|stages, _| stages[1].share = f64::NAN, "stages[1].share");
        refused(|stages, _| stages[1].batch = 4097, "stages[1].batch");
        refused(|stages, _| stages[0].batch = 1024, "stages[0].batch");
        refused(|stages, _| stages[2].batch = 16384, "stages[2].batch");
        refused(|stages, _| stages[2].batch = 2048, "stages[2].batch");
    }
}
