//! Which runs there are.
//!
//! Batches keep the paper's proportions where a run of minutes allows: constant ones of a quarter, a half and all of the largest, the stages at the same
//! shares of the samples, and adaptive ones from an eighth of it. The paper's adaptive runs begin at a thirty-second.

use super::PaperArgs;
use crate::Error;

/// Tokens in a sample, and samples that a rank computes at a time.
const SEQ: usize = 128;
const MICRO_BATCH: u64 = 4;
/// Batches, in samples: adaptive runs begin with the first; constant ones have the others.
const BASE: u64 = 8;
const CONSTANT: [u64; 3] = [16, 32, 64];
const CAP: u64 = 64;
/// Share of the samples over which the learning rate rises, as in the paper.
const WARMUP: f64 = 0.01;
/// Noise-to-gradient ratios of the norm test.
const ETAS: [f64; 3] = [0.3, 0.6, 0.9];

/// What a schedule is compared as.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Family {
    /// A constant batch with the warm-up that all schedules have.
    Constant,
    /// A constant batch with as many steps of warm-up as an adaptive run.
    LongWarmup,
    /// A batch that changes.
    Changing,
}

/// A run of the experiment.
pub(super) struct Run {
    /// Its folder's path in the experiment's.
    pub(super) name: String,
    pub(super) model: &'static str,
    /// Name of the schedule, the same for all seeds.
    pub(super) schedule: String,
    pub(super) family: Family,
    pub(super) seed: u64,
    pub(super) samples: u64,
    /// For `pillion train`.
    pub(super) flags: Vec<String>,
    parameters: f64,
}

impl Run {
    /// Proportional to the time it takes.
    pub(super) fn cost(&self) -> f64 {
        self.samples as f64 * self.parameters
    }
}

/// A model: its name in the report, the flags of its shape, and its parameters.
struct Model {
    name: &'static str,
    flags: &'static str,
    parameters: f64,
}

const SMALL: Model = Model { name: "3.3M", flags: "--model small", parameters: 3.3e6 };
const LARGE: Model = Model {
    name: "10.8M",
    flags: "--model small --hidden-size 384 --intermediate-size 1024 --layers 6 --heads 6 --kv-heads 6",
    parameters: 10.8e6,
};

/// A controller with its settings: its name, and its flags.
struct BatchSchedule {
    name: String,
    flags: String,
    family: Family,
    one_seed: bool,
}

impl BatchSchedule {
    fn new(name: impl Into<String>, flags: impl Into<String>) -> BatchSchedule {
        BatchSchedule { name: name.into(), flags: flags.into(), family: Family::Changing, one_seed: false }
    }
}

fn constant(batch: u64) -> BatchSchedule {
    let flags = format!("--controller constant --batch {batch}");
    BatchSchedule { family: Family::Constant, ..BatchSchedule::new(format!("constant {batch}"), flags) }
}

fn norm_test(eta: f64) -> BatchSchedule {
    BatchSchedule::new(format!("norm test {eta}"), format!("--batch {BASE} --max-batch {CAP} --eta {eta}"))
}

/// All schedules, for the smaller model.
fn schedules() -> Vec<BatchSchedule> {
    let [a, b, c] = CONSTANT;
    let mut all: Vec<BatchSchedule> = CONSTANT.map(constant).into();
    let stages = format!("--controller stagewise --batch {a} --max-batch {c} --stages {a}:0.025,{b}:0.025,{c}:0.95");
    all.push(BatchSchedule::new(format!("stages {a}-{b}-{c}"), stages));
    all.extend(ETAS.map(norm_test));
    // As printed, groups are workers, so gradients are reduced once a step.
    let printed = format!("--batch {BASE} --max-batch {CAP} --eta {} --variant paper-literal --shard zero-1", ETAS[0]);
    all.push(BatchSchedule {
        one_seed: true,
        ..BatchSchedule::new(format!("norm test {}, as printed", ETAS[0]), printed)
    });
    // As many steps of warm-up as an adaptive run that has not grown yet: what of a constant batch's loss is its short warm-up?
    all.extend(CONSTANT.map(|batch| {
        let longer = batch / BASE;
        let flags = format!("{} --warmup {}", constant(batch).flags, WARMUP * longer as f64);
        let name = format!("constant {batch}, warm-up × {longer}");
        BatchSchedule { family: Family::LongWarmup, ..BatchSchedule::new(name, flags) }
    }));
    all
}

/// Every run, the smaller model's first.
///
/// # Errors
/// When a setting is out of its range.
pub(super) fn grid(settings: &PaperArgs) -> Result<Vec<Run>, Error> {
    let samples = settings.samples.unwrap_or(if settings.quick { 1536 } else { 8192 });
    let seeds = settings.seeds.unwrap_or(if settings.quick { 1 } else { 3 });
    if samples == 0 || !samples.is_multiple_of(CAP) {
        return Err(Error::Setting(format!("--samples {samples} is not a multiple of {CAP}, the largest batch")));
    }
    if !(1..=1000).contains(&seeds) {
        return Err(Error::Setting(format!("--seeds {seeds} is out of range: at least 1 and at most 1000")));
    }
    if ![1, 2, 4].contains(&settings.ranks) {
        let why = format!("whose micro-batches of {MICRO_BATCH} make up every batch");
        return Err(Error::Setting(format!("--ranks {} is out of range: 1, 2 or 4, {why}", settings.ranks)));
    }
    let few = vec![constant(CONSTANT[0]), constant(CAP), norm_test(ETAS[1])];
    let mut parts = vec![(SMALL, schedules())];
    if !settings.quick {
        parts.push((LARGE, few));
    }
    let mut runs = Vec::new();
    for (model, schedules) in &parts {
        // All schedules of a seed before the next seed, so that a report of half of the runs compares all of them.
        for seed in 1..=seeds {
            for schedule in schedules.iter().filter(|schedule| seed == 1 || !schedule.one_seed) {
                runs.push(run(settings, model, schedule, samples, seed));
            }
        }
    }
    if let Some(part) = &settings.only {
        runs.retain(|run| run.name.contains(part));
        if runs.is_empty() {
            return Err(Error::Setting(format!(
                "--only {part}: no run has this in its name, such as 3.3M/norm-test-0.6-seed-1"
            )));
        }
    }
    Ok(runs)
}

fn run(settings: &PaperArgs, model: &Model, schedule: &BatchSchedule, samples: u64, seed: u64) -> Run {
    let (ranks, validation) = (settings.ranks, settings.validation_samples);
    let common = format!(
        "--ranks {ranks} --seq {SEQ} --micro-batch {MICRO_BATCH} --round-to 8 --samples {samples} --seed {seed} --warmup {WARMUP} --save-every 200 --keep 1 \
         --validate-every 0 --validation-samples {validation} --resume auto"
    );
    let all = format!("{} {common} {}", model.flags, schedule.flags);
    let words = schedule.name.split(|c: char| !c.is_ascii_alphanumeric() && c != '.').filter(|word| !word.is_empty());
    let file = words.collect::<Vec<_>>().join("-");
    Run {
        name: format!("{}/{file}-seed-{seed}", model.name),
        model: model.name,
        schedule: schedule.name.clone(),
        family: schedule.family,
        seed,
        samples,
        flags: all.split_whitespace().map(str::to_owned).collect(),
        parameters: model.parameters,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::settings::{Cli, Command, ModelArgs};
    use crate::train::recipe::Recipe;

    fn settings(quick: bool) -> PaperArgs {
        let (data, out, samples, seeds, only) = (None, None, None, None, None);
        PaperArgs { data, out, ranks: 2, samples, seeds, validation_samples: 512, only, quick, report: false }
    }

    #[test]
    fn every_run_is_one_that_train_accepts_and_has_a_folder_of_its_own() {
        for (quick, count) in [(false, 3 * 10 + 1 + 3 * 3), (true, 11)] {
            let runs = grid(&settings(quick)).unwrap();
            assert_eq!(runs.len(), count);
            let names: std::collections::HashSet<&str> = runs.iter().map(|run| run.name.as_str()).collect();
            assert_eq!(names.len(), count);
            for run in &runs {
                let arguments: Vec<String> =
                    ["pillion", "train"].map(str::to_owned).into_iter().chain(run.flags.clone()).collect();
                let Ok(Cli { command: Command::Train(train) }) = Cli::from_arguments(&arguments) else {
                    panic!("{:?}", run.flags)
                };
                let recipe = Recipe::new(&train, 2).unwrap_or_else(|error| panic!("{}: {error}", run.name));
                assert_eq!(recipe.schedule.samples, run.samples);
                let parameters = parameters(&train.model);
                assert!((parameters / run.parameters - 1.0).abs() < 0.02, "{}: {parameters}", run.model);
            }
        }
    }

    fn parameters(model: &ModelArgs) -> f64 {
        let units = model.config().unwrap().units();
        let tensors = units.iter().flat_map(|unit| &unit.tensors);
        tensors.map(|tensor| tensor.shape.iter().product::<usize>() as f64).sum()
    }
}
