//! What decides the numbers of a run: settings that have been checked against each other, which a checkpoint keeps and a resumed
//! run must repeat.

use pillion_abs::{Coupling, Settings as ControllerSettings};
use pillion_kernels::AdamW;
use pillion_llama::config::Config;
use pillion_runtime::{ADAMW_STATES, Gather, Mesh, Policy, Sharded};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::groups::{self, Group};
use super::schedule::{Schedule, Shape};
use super::unread;
use crate::Error;
use crate::settings::{PolicyArgs, TrainArgs, dtype};

/// β₁ and β₂ of Llama 2's training, and ε: those of checkpoints that do not say.
const BETA1: f64 = 0.9;
const BETA2: f64 = 0.95;
const EPSILON: f64 = 1e-8;
/// More slots than any model has units.
const MOST_SLOTS: usize = 1024;
/// Tokens of a micro-batch at most: activations of more have no 64-bit number of bytes.
const MOST_TOKENS: u64 = 1 << 22;
/// Rounds of a step times blocks, at most: the plan of more would not fit into memory.
const MOST_PASSES: u64 = 1 << 18;

/// What decides the numbers of a run, but for its data. Batches count samples. A field that a later
/// version adds has a default, so that checkpoints of earlier versions stay readable.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Recipe {
    pub(crate) model: Config,
    pub(crate) precision: String,
    pub(crate) reduce_precision: String,
    pub(crate) seq: usize,
    pub(crate) micro_batch: u64,
    pub(crate) seed: u64,
    pub(crate) controller: ControllerSettings,
    pub(crate) schedule: Schedule,
    pub(crate) coupling: Coupling,
    pub(crate) weight_decay: f64,
    /// Largest gradient norm; none for no limit.
    pub(crate) clip: Option<f64>,
    #[serde(default = "beta1")]
    pub(crate) beta1: f64,
    #[serde(default = "beta2")]
    pub(crate) beta2: f64,
    #[serde(default = "epsilon")]
    pub(crate) epsilon: f64,
    /// Standard deviation of initial weights; none for that of the width.
    #[serde(default)]
    pub(crate) init_std: Option<f64>,
    /// Weight of the auxiliary loss on the logits' sums.
    #[serde(default)]
    pub(crate) z_loss: f64,
    /// Whether a token sees its own document alone.
    #[serde(default)]
    pub(crate) document_attention: bool,
    #[serde(default)]
    pub(crate) groups: Vec<Group>,
}

fn beta1() -> f64 {
    BETA1
}

fn beta2() -> f64 {
    BETA2
}

fn epsilon() -> f64 {
    EPSILON
}

impl Recipe {
    /// Checks the settings of a run over `world` ranks.
    ///
    /// # Errors
    /// Names the flag and the remedy.
    pub(crate) fn new(settings: &TrainArgs, world: usize) -> Result<Recipe, Error> {
        unread::check(settings, true)?;
        let model = settings.model.config().map_err(|error| Error::Setting(error.to_string()))?;
        range("--clip", settings.clip, 0.0, f64::MAX)?;
        let policy = policy(&settings.policy, settings.clip, world)?;
        if let Some(eta) = settings.controller.alignment {
            let checked = policy.check_comparison(world, eta);
            checked.map_err(|error| Error::Setting(format!("--alignment {eta}: {error}")))?;
        }
        let micro_batch = settings.micro_batch;
        positive("--seq", settings.seq as u64)?;
        positive("--micro-batch", micro_batch)?;
        positive("--samples", settings.samples)?;
        positive("--validation-samples", settings.validation_samples)?;
        positive("--timeout", settings.job.timeout)?;
        // Far beyond any use, and far below where products of them overflow.
        for (flag, value, most) in [
            ("--seq", settings.seq as u64, 1 << 20),
            ("--micro-batch", micro_batch, 1 << 20),
            ("--round-to", settings.round_to.unwrap_or(0), 1 << 20),
            ("--batch", settings.batch.unwrap_or(0), 1 << 20),
            ("--max-batch", settings.max_batch.unwrap_or(0), 1 << 20),
            ("--samples", settings.samples, 1 << 50),
            ("--sample", settings.sample as u64, 1 << 12),
        ] {
            if value > most {
                return fail(format!("{flag} {value} is out of range: at most {most}"));
            }
        }
        check_tokens(settings.seq as u64, micro_batch)?;
        let multiple = |flag: &str, value: u64, of: &str, unit: u64| {
            if unit > 0 && value > 0 && value.is_multiple_of(unit) {
                return Ok(());
            }
            let (below, above) = (value / unit.max(1) * unit, (value / unit.max(1) + 1) * unit);
            let nearest = if below > 0 { format!("{below} or {above}") } else { above.to_string() };
            fail(format!("{flag} {value} is not a multiple of {of} {unit}: try {nearest}"))
        };
        let round_to = settings.round_to.unwrap_or(world as u64 * micro_batch);
        multiple("--round-to", round_to, "--micro-batch", micro_batch)?;
        // A rank that is alone compares its micro-batches.
        let least = if settings.controller.measures() { 2 * micro_batch } else { micro_batch };
        let batch = settings.batch.unwrap_or(least.next_multiple_of(round_to));
        multiple("--batch", batch, "--micro-batch", micro_batch)?;
        multiple("--batch", batch, "--round-to", round_to)?;
        let cap = settings.max_batch.unwrap_or(8 * batch);
        multiple("--max-batch", cap, "--round-to", round_to)?;
        if cap < batch {
            return fail(format!("--max-batch {cap} is below --batch {batch}: raise it, or lower --batch"));
        }
        check_rounds(
            &model,
            cap.div_ceil(micro_batch).div_ceil(world as u64),
            "--max-batch, by default 8 times --batch, which is at least --round-to",
        )?;
        multiple("--samples", settings.samples, "--micro-batch", micro_batch)?;
        range("--lr", settings.lr, 0.0, 1e3)?;
        range("--final-lr", settings.final_lr, 0.0, 1.0)?;
        range("--weight-decay", settings.weight_decay, 0.0, 1e3)?;
        if !(0.0..1.0).contains(&settings.warmup) {
            return fail(format!("--warmup {} is a share of the samples: at least 0 and below 1", settings.warmup));
        }
        for (flag, beta) in [("--beta1", settings.beta1), ("--beta2", settings.beta2)] {
            if !(0.0..1.0).contains(&beta) {
                return fail(format!("{flag} {beta} is out of range: at least 0 and below 1"));
            }
        }
        range("--epsilon", settings.epsilon, 1e-30, 1.0)?;
        range("--z-loss", settings.z_loss, 0.0, 1.0)?;
        if let Some(deviation) = settings.init_std {
            range("--init-std", deviation, 0.0, 1e3)?;
        }
        let is_read = settings.schedule == Shape::Wsd;
        if is_read && !(settings.cooldown > 0.0 && settings.cooldown <= 1.0 - settings.warmup) {
            let (cooldown, most) = (settings.cooldown, 1.0 - settings.warmup);
            return fail(format!("--cooldown {cooldown} is a share of the samples: above 0 and at most {most}"));
        }
        groups::check(&settings.group, &model.units()).map_err(Error::Setting)?;
        let controller = settings.controller.settings(batch, cap, round_to, settings.samples)?;
        let TrainArgs { lr, warmup, final_lr, samples, schedule: shape, .. } = *settings;
        // What no shape reads is not kept, so that it is no difference between two runs.
        let cooldown = if shape == Shape::Wsd { settings.cooldown } else { 0.0 };
        Ok(Recipe {
            model,
            precision: settings.policy.precision.name().to_owned(),
            reduce_precision: settings.policy.reduce_precision.name().to_owned(),
            seq: settings.seq,
            micro_batch,
            seed: settings.seed,
            controller,
            schedule: Schedule { lr, warmup, final_lr, samples, shape, cooldown },
            coupling: settings.controller.lr_coupling,
            weight_decay: settings.weight_decay,
            clip: (settings.clip > 0.0).then_some(settings.clip),
            beta1: settings.beta1,
            beta2: settings.beta2,
            epsilon: settings.epsilon,
            init_std: settings.init_std,
            z_loss: settings.z_loss,
            document_attention: settings.document_attention,
            groups: settings.group.clone(),
        })
    }

    /// Checks the model and the samples of a recipe that was read.
    ///
    /// # Errors
    /// Says what cannot be.
    pub(crate) fn check_shape(&self) -> Result<(), Error> {
        self.model.validate().map_err(|error| Error::Setting(error.to_string()))?;
        positive("--seq", self.seq as u64)?;
        positive("--micro-batch", self.micro_batch)?;
        check_tokens(self.seq as u64, self.micro_batch)
    }

    /// Floating-point operations of a training step for each of its tokens.
    pub(crate) fn flops_per_token(&self) -> f64 {
        self.model.flops_per_token(self.seq)
    }

    /// The placement that flags ask for, with the types that this recipe has.
    pub(crate) fn placed(&self, flags: &PolicyArgs) -> PolicyArgs {
        let [precision, reduce_precision] = [&self.precision, &self.reduce_precision].map(|name| dtype(name));
        PolicyArgs { precision, reduce_precision, ..flags.clone() }
    }

    /// The learning rate of a step of `batch` samples, after which `samples` will have been seen.
    pub(crate) fn lr(&self, batch: u64, samples: u64) -> f64 {
        self.schedule.at(samples) * self.coupling.factor(batch, self.controller.base)
    }

    /// Settings of the update at learning rate `lr`; the engine fills in the rest.
    pub(crate) fn adamw(&self, lr: f64) -> AdamW {
        AdamW {
            lr: lr as f32,
            beta1: self.beta1 as f32,
            beta2: self.beta2 as f32,
            epsilon: self.epsilon as f32,
            weight_decay: self.weight_decay as f32,
        }
    }

    /// All that differs from a checkpoint's recipe: (key, ours, theirs).
    pub(crate) fn differences(&self, theirs: &Recipe) -> Vec<(String, String, String)> {
        let [ours, theirs] = [self, theirs].map(|recipe| serde_json::to_value(recipe).expect("plain values"));
        let mut found = Vec::new();
        differences("", &ours, &theirs, &mut found);
        found
    }
}

fn differences(at: &str, ours: &Value, theirs: &Value, found: &mut Vec<(String, String, String)>) {
    match (ours, theirs) {
        (Value::Object(a), Value::Object(b)) if a.keys().eq(b.keys()) => {
            for (key, value) in a {
                differences(&format!("{at}{}{key}", if at.is_empty() { "" } else { "." }), value, &b[key], found);
            }
        }
        (a, b) if a == b => {}
        (a, b) => found.push((at.to_owned(), a.to_string(), b.to_string())),
    }
}

/// Checks the tokens of a micro-batch.
///
/// # Errors
/// Names the limit.
pub(crate) fn check_tokens(seq: u64, micro_batch: u64) -> Result<(), Error> {
    match seq.checked_mul(micro_batch) {
        Some(tokens) if tokens <= MOST_TOKENS => Ok(()),
        _ => fail(format!(
            "--micro-batch {micro_batch} samples of --seq {seq} tokens are out of range: at most {MOST_TOKENS} tokens in all"
        )),
    }
}

/// Checks how long a step's plan is, where `flag` asks for so many rounds.
///
/// # Errors
/// Names the limit.
pub(crate) fn check_rounds(model: &Config, rounds: u64, flag: &str) -> Result<(), Error> {
    let layers = model.num_hidden_layers as u64;
    if rounds.saturating_mul(layers) <= MOST_PASSES {
        return Ok(());
    }
    fail(format!(
        "{flag}: a step of {rounds} rounds through {layers} blocks is out of range: at most {} rounds of as many blocks; lower it, or raise --micro-batch",
        MOST_PASSES / layers
    ))
}

/// How parameters are kept and moved between `world` ranks, checked.
///
/// # Errors
/// Names the flag and the remedy.
pub(crate) fn policy(settings: &PolicyArgs, clip: f64, world: usize) -> Result<Policy, Error> {
    if settings.prefetch >= MOST_SLOTS || settings.slots.is_some_and(|slots| slots > MOST_SLOTS) {
        return fail(format!("--prefetch must be below {MOST_SLOTS}, and --slots at most that"));
    }
    let slots = settings.slots.unwrap_or(settings.prefetch + 1);
    if slots <= settings.prefetch {
        return fail(format!(
            "--slots {slots} cannot hold the bucket in use and --prefetch {} more: use at least --slots {}, or a lower \
             --prefetch",
            settings.prefetch,
            settings.prefetch + 1
        ));
    }
    if let Some(mesh) = settings.mesh.filter(|mesh| mesh.world() != world) {
        let Mesh { replicate, shard } = mesh;
        return fail(format!(
            "--mesh replicate={replicate},shard={shard} is a grid of {} ranks, but there are {world}: choose sizes whose product that is",
            mesh.world()
        ));
    }
    let sharded = settings.shard;
    // Whole parameters are copied in any case.
    if settings.gather == Some(Gather::Window) && !sharded.parameters {
        return fail(format!(
            "--gather window reads sharded parameters, but --shard {sharded} leaves them whole: leave --gather out"
        ));
    }
    if let Some(mesh) = settings.mesh.filter(|mesh| mesh.shard > 1 && sharded == Sharded::NOTHING) {
        let Mesh { replicate, shard } = mesh;
        return fail(format!(
            "--mesh replicate={replicate},shard={shard} divides what is sharded, but --shard nothing leaves all whole: \
             leave --mesh out"
        ));
    }
    let policy = Policy {
        weights: settings.precision,
        reduce: settings.reduce_precision,
        replicas: settings.mesh.map_or(1, |mesh| mesh.replicate),
        sharded,
        gather: settings.gather.unwrap_or(Gather::Window),
        bucket: settings.bucket.unwrap_or(0),
        prefetch: settings.prefetch,
        slots,
        overlap: !settings.no_overlap,
        clip: (clip > 0.0).then_some(clip),
        states: ADAMW_STATES,
    };
    policy.mesh(world).map_err(|error| Error::Setting(error.to_string()))?;
    Ok(policy)
}

fn fail<T>(message: String) -> Result<T, Error> {
    Err(Error::Setting(message))
}

fn positive(flag: &str, value: u64) -> Result<(), Error> {
    if value == 0 { fail(format!("{flag} is 0: it must be at least 1")) } else { Ok(()) }
}

fn range(flag: &str, value: f64, least: f64, most: f64) -> Result<(), Error> {
    if (least..=most).contains(&value) {
        return Ok(());
    }
    // The largest number that there is has 309 digits.
    let most = if most > 1e15 { format!("{most:e}") } else { most.to_string() };
    fail(format!("{flag} {value} is out of range: between {least} and {most}"))
}
