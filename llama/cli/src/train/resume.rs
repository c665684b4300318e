//! The settings of a run that goes on: those of the checkpoint, and what the user asks to change.

use std::path::Path;

use pillion_abs::{Rule, Stage};

use super::checkpoints::{Habits, Progress};
use super::recipe::Recipe;
use super::schedule::Shape;
use crate::Error;
use crate::controller::{ControllerArgs, ControllerKind, flag};
use crate::settings::{TrainArgs, dtype};

/// The settings that `--change` takes: schedules and limits. The others decide which numbers the
/// model has, or which samples it sees.
#[rustfmt::skip]
pub(crate) const CHANGEABLE: &[&str] = &[
    "lr", "warmup", "final-lr", "schedule", "cooldown", "beta1", "beta2", "epsilon", "z-loss", "document-attention", "group", "samples", "weight-decay", "clip", "lr-coupling", "batch", "max-batch", "round-to",
    "controller", "eta", "variant", "ratio", "stages", "ramp", "ema", "patience", "growth-limit", "test-interval",
    "shrink",
];

/// Those of them that are off where they are not given.
const SWITCHES: [&str; 2] = ["document-attention", "shrink"];

/// Gives every setting that decides the run's numbers, and was not given, the value that the saved
/// run had.
pub(crate) fn adopt(settings: &mut TrainArgs, saved: &Progress) {
    let (given, changed) = (settings.given.clone(), settings.change.clone());
    // A switch that is to be off cannot be given.
    let keeps = |flag: &str| !given.contains(flag) && !changed.iter().any(|name| name == flag);
    let Recipe { model, precision, reduce_precision, seq, micro_batch, seed, .. } = &saved.recipe;
    let Recipe { controller, schedule, coupling, weight_decay, clip, .. } = &saved.recipe;
    let Recipe { beta1, beta2, epsilon, z_loss, init_std, groups, .. } = &saved.recipe;
    if keeps("model") {
        settings.model.base = Some(model.clone());
    }
    let policy = &mut settings.policy;
    for (flag, name, setting) in [
        ("precision", precision, &mut policy.precision),
        ("reduce-precision", reduce_precision, &mut policy.reduce_precision),
    ] {
        if keeps(flag) {
            *setting = dtype(name);
        }
    }
    for (flag, saved, setting) in [
        ("micro-batch", *micro_batch, &mut settings.micro_batch),
        ("seed", *seed, &mut settings.seed),
        ("samples", schedule.samples, &mut settings.samples),
    ] {
        if keeps(flag) {
            *setting = saved;
        }
    }
    for (flag, saved, setting) in [
        ("lr", schedule.lr, &mut settings.lr),
        ("warmup", schedule.warmup, &mut settings.warmup),
        ("final-lr", schedule.final_lr, &mut settings.final_lr),
        ("weight-decay", *weight_decay, &mut settings.weight_decay),
        ("clip", clip.unwrap_or(0.0), &mut settings.clip),
        ("beta1", *beta1, &mut settings.beta1),
        ("beta2", *beta2, &mut settings.beta2),
        ("epsilon", *epsilon, &mut settings.epsilon),
        ("z-loss", *z_loss, &mut settings.z_loss),
    ] {
        if keeps(flag) {
            *setting = saved;
        }
    }
    if keeps("schedule") {
        settings.schedule = schedule.shape;
    }
    if keeps("cooldown") && schedule.shape == Shape::Wsd && settings.schedule == Shape::Wsd {
        settings.cooldown = schedule.cooldown;
    }
    if keeps("document-attention") {
        settings.document_attention = saved.recipe.document_attention;
    }
    if keeps("init-std") {
        settings.init_std = *init_std;
    }
    if keeps("group") {
        settings.group.clone_from(groups);
    }
    if keeps("seq") {
        settings.seq = *seq;
    }
    if let Some(habits) = &saved.habits {
        adopt_habits(settings, &keeps, habits);
    }
    // Defaults that depend on the world are those of the run's beginning.
    settings.round_to.get_or_insert(controller.round_to);
    settings.batch.get_or_insert(controller.base);
    settings.max_batch.get_or_insert(controller.cap);
    if keeps("lr-coupling") {
        settings.controller.lr_coupling = *coupling;
    }
    adopt_controller(&mut settings.controller, &keeps, controller, schedule.samples);
}

fn adopt_habits(settings: &mut TrainArgs, keeps: &impl Fn(&str) -> bool, saved: &Habits) {
    for (flag, saved, setting) in [
        ("save-every", saved.save_every, &mut settings.save_every),
        ("validation-samples", saved.validation_samples, &mut settings.validation_samples),
        ("non-finite-limit", saved.non_finite_limit, &mut settings.non_finite_limit),
    ] {
        if keeps(flag) {
            *setting = saved;
        }
    }
    if keeps("keep") {
        settings.keep = saved.keep;
    }
    if keeps("keep-best") {
        settings.keep_best = saved.keep_best;
    }
    if keeps("tensorboard") {
        settings.tensorboard = saved.tensorboard;
    }
    // One of these two stands for the other.
    if keeps("validate-every") && keeps("validate-every-samples") {
        settings.validate_every = saved.validate_every;
        settings.validate_every_samples = saved.validate_every_samples;
    }
    if keeps("validation-data") {
        settings.validation_data.clone_from(&saved.validation_data);
    }
    if keeps("sample") {
        settings.sample = saved.sample;
    }
    settings.save_memory = settings.save_memory.or(saved.save_memory);
    settings.on_non_finite.get_or_insert(saved.on_non_finite);
}

fn adopt_controller(
    args: &mut ControllerArgs,
    keeps: &impl Fn(&str) -> bool,
    saved: &pillion_abs::Settings,
    samples: u64,
) {
    let kind = ControllerKind::of(&saved.rule);
    if keeps("controller") {
        args.controller = kind;
    }
    args.ema.get_or_insert(saved.ema_decay);
    // The flags of another rule would be refused.
    if args.controller != kind {
        return;
    }
    match &saved.rule {
        Rule::NormTest { eta, variant } => {
            args.eta.get_or_insert(*eta);
            args.variant.get_or_insert(*variant);
        }
        Rule::NoiseScale { ratio } => {
            args.ratio.get_or_insert(*ratio);
        }
        Rule::Stagewise { stages, .. } if args.stages.is_empty() => args.stages.clone_from(stages),
        Rule::LinearRamp { end, samples: ramp } => {
            args.ramp.get_or_insert(Stage { batch: *end, share: *ramp as f64 / samples as f64 });
        }
        _ => {}
    }
    if args.measures() {
        args.patience.get_or_insert(saved.patience);
        args.growth_limit.get_or_insert(saved.growth_limit);
        args.test_interval.get_or_insert(saved.interval);
    }
    if keeps("shrink") && (args.measures() || kind == ControllerKind::Stagewise) {
        args.shrink = !saved.monotone;
    }
}

/// Compares the settings of a run with those of the checkpoint at `path`; returns what changes, in
/// words to print.
///
/// # Errors
/// [`Error::Setting`] with every difference that `--change` does not name.
pub(crate) fn changes(
    path: &Path,
    saved: &Progress,
    recipe: &Recipe,
    settings: &TrainArgs,
) -> Result<Vec<String>, Error> {
    let differences = recipe.differences(&saved.recipe);
    let is_given = |name: &String| settings.given.contains(name) || SWITCHES.contains(&name.as_str());
    if let Some(name) = settings.change.iter().find(|name| !is_given(name)) {
        return Err(Error::Setting(format!("--change {name}: give --{name} as well, with its new value")));
    }
    let allowed = &settings.change;
    if recipe.schedule.samples < saved.samples {
        let (wanted, dealt) = (recipe.schedule.samples, saved.samples);
        return Err(Error::Setting(format!(
            "--samples {wanted}: the checkpoint {} was made after {dealt} samples: give at least as many, or go on from an \
             older checkpoint",
            path.display()
        )));
    }
    let is_allowed = |flag: &String| allowed.contains(flag);
    // The end of a stage or ramp is a share of the samples, and moves with them. Not every schedule has
    // a cool-down.
    let follows = |key: &str| {
        let with = |flag: &str| allowed.iter().any(|name| name == flag);
        with("samples") && (key.ends_with(".horizon") || key.ends_with("ramp.samples"))
            || with("schedule") && key == "schedule.cooldown"
    };
    let refused: Vec<_> = differences.iter().filter(|(key, ..)| !is_allowed(&flag(key)) && !follows(key)).collect();
    if refused.is_empty() {
        let said = |(key, ours, theirs): &(String, String, String)| format!("changed: {key} from {theirs} to {ours}");
        return Ok(differences.iter().map(said).collect());
    }
    let mut flags: Vec<String> = refused.iter().map(|(key, ..)| given_flag(key, settings)).collect();
    flags.sort();
    flags.dedup();
    let listed: Vec<String> =
        refused.iter().map(|(key, ours, theirs)| format!("{key} = {theirs} (here {ours})")).collect();
    let dashed: Vec<String> = flags.iter().map(|flag| format!("--{flag}")).collect();
    let (can, cannot): (Vec<_>, Vec<_>) = flags.iter().partition(|flag| CHANGEABLE.contains(&flag.as_str()));
    let join = |names: &[&String]| names.iter().map(|name| name.as_str()).collect::<Vec<_>>().join(",");
    let change = match (can.is_empty(), cannot.is_empty()) {
        (false, true) => format!("add --change {} to go on with the new ones", join(&can)),
        (false, false) => {
            format!("add --change {} for these (a run cannot change its {})", join(&can), join(&cannot))
        }
        (true, _) => format!("a run cannot change its {}", join(&cannot)),
    };
    Err(Error::Setting(format!(
        "the checkpoint {} was made with {}: leave out {} to go on as it began; {change}; or start afresh without --resume",
        path.display(),
        listed.join(" and "),
        dashed.join(" and "),
    )))
}

/// The flag that made a setting differ: one field of the model's shape can be given by itself, or
/// with a preset.
fn given_flag(key: &str, settings: &TrainArgs) -> String {
    let of_field = match key.strip_prefix("model.") {
        Some("vocab_size") => "vocab-size",
        Some("hidden_size") => "hidden-size",
        Some("intermediate_size") => "intermediate-size",
        Some("num_hidden_layers") => "layers",
        Some("num_attention_heads") => "heads",
        Some("num_key_value_heads") => "kv-heads",
        _ => return flag(key),
    };
    if settings.given.contains(of_field) { of_field.to_owned() } else { "model".to_owned() }
}

impl ControllerKind {
    /// What a rule is called on the command line.
    fn of(rule: &Rule) -> ControllerKind {
        match rule {
            Rule::Stagewise { .. } => ControllerKind::Stagewise,
            Rule::LinearRamp { .. } => ControllerKind::LinearRamp,
            Rule::NormTest { .. } => ControllerKind::NormTest,
            Rule::NoiseScale { .. } => ControllerKind::NoiseScale,
            _ => ControllerKind::Constant,
        }
    }
}
