//! The flags of the batch size, and the controller's settings that they make.

use clap::{Args, ValueEnum};
use pillion_abs::{Coupling, Rule, Settings, Stage, Variant};

use crate::Error;

/// What the batch size follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ControllerKind {
    /// Always --batch.
    Constant,
    /// --stages.
    Stagewise,
    /// --ramp.
    LinearRamp,
    /// Grow while the gradient's noise is large against the gradient (--eta, --variant).
    NormTest,
    /// A share of the gradient noise scale (--ratio).
    NoiseScale,
}

/// Settings of the batch size.
#[derive(Clone, Debug, Args)]
pub struct ControllerArgs {
    /// What the batch size follows.
    #[arg(long, value_enum, default_value = "norm-test", value_name = "NAME")]
    pub controller: ControllerKind,
    /// Noise-to-gradient ratio that the norm test accepts; smaller values grow the batch earlier;
    /// below 1 for the unbiased variant, which could never grow a batch otherwise; default: 0.9.
    #[arg(long, value_name = "X")]
    pub eta: Option<f64>,
    /// What the norm test compares; default: unbiased.
    #[arg(long, value_enum, value_name = "NAME")]
    pub variant: Option<Variant>,
    /// Batch as a share of the gradient noise scale, with --controller noise-scale; default: 1.
    #[arg(long, value_name = "X")]
    pub ratio: Option<f64>,
    /// Stages of the stagewise controller: batch:share,batch:share,… with shares of the samples that sum to 1.
    #[arg(long, value_name = "LIST", value_delimiter = ',', value_parser = stage)]
    pub stages: Vec<Stage>,
    /// Where the linear ramp ends: batch:share, after which share of the samples; it starts at --batch.
    #[arg(long, value_name = "BATCH:SHARE", value_parser = stage)]
    pub ramp: Option<Stage>,
    /// Weight of a step's statistics one step later, from 0, which decides from each step alone; default: 0.9.
    #[arg(long, value_name = "X")]
    pub ema: Option<f64>,
    /// Tests in a row that must ask for another batch before it changes; default: 1.
    #[arg(long, value_name = "N")]
    pub patience: Option<u32>,
    /// Factor by which a batch grows at most at once, though always by --round-to; default: 2.
    #[arg(long, value_name = "X")]
    pub growth_limit: Option<f64>,
    /// Steps from one test to the next; default: 1.
    #[arg(long, value_name = "N")]
    pub test_interval: Option<u64>,
    /// Let a measured batch shrink, too.
    #[arg(long)]
    pub shrink: bool,
    /// Report also where the gradient's noise points: `alignment` in metrics.jsonl, of steps that reduce gradients once and give every rank a micro-batch, with ranks as groups, on one host. X is the noise-to-gradient
    /// ratio by which single coordinates are counted.
    #[arg(long, value_name = "X")]
    pub alignment: Option<f64>,
    /// How the learning rate answers a batch that grows.
    #[arg(long, value_enum, default_value = "none", value_name = "NAME")]
    pub lr_coupling: Coupling,
}

impl ControllerArgs {
    /// Whether the batch follows measurements.
    pub(crate) fn measures(&self) -> bool {
        matches!(self.controller, ControllerKind::NormTest | ControllerKind::NoiseScale)
    }

    /// The controller's settings, in batches from `base` to `cap`, over `samples` in all.
    ///
    /// # Errors
    /// When a flag is out of its range, or says what the controller does not follow.
    pub(crate) fn settings(&self, base: u64, cap: u64, round_to: u64, samples: u64) -> Result<Settings, Error> {
        let fail = |message: String| Err(Error::Setting(message));
        let kind = self.controller;
        let norm_test = kind == ControllerKind::NormTest;
        let measured = self.measures();
        // A flag that nothing reads would seem to work.
        for (given, flag, read, by) in [
            (self.eta.is_some(), "--eta", norm_test, "norm-test"),
            (self.variant.is_some(), "--variant", norm_test, "norm-test"),
            (self.ratio.is_some(), "--ratio", kind == ControllerKind::NoiseScale, "noise-scale"),
            (!self.stages.is_empty(), "--stages", kind == ControllerKind::Stagewise, "stagewise"),
            (self.ramp.is_some(), "--ramp", kind == ControllerKind::LinearRamp, "linear-ramp"),
            (self.patience.is_some(), "--patience", measured, "norm-test or noise-scale"),
            (self.growth_limit.is_some(), "--growth-limit", measured, "norm-test or noise-scale"),
            (self.test_interval.is_some(), "--test-interval", measured, "norm-test or noise-scale"),
            (
                self.shrink,
                "--shrink",
                measured || kind == ControllerKind::Stagewise,
                "norm-test, noise-scale or stagewise",
            ),
        ] {
            if given && !read {
                return fail(format!("{flag} needs --controller {by}"));
            }
        }
        let rule = match (kind, self.ramp) {
            (ControllerKind::Constant, _) => Rule::Constant,
            (ControllerKind::Stagewise, _) if self.stages.is_empty() => {
                return fail("--controller stagewise needs --stages, such as 16:0.1,32:0.9".to_owned());
            }
            (ControllerKind::Stagewise, _) => Rule::Stagewise { stages: self.stages.clone(), horizon: samples },
            (ControllerKind::LinearRamp, None) => {
                return fail("--controller linear-ramp needs --ramp, such as 64:0.25".to_owned());
            }
            (ControllerKind::LinearRamp, Some(Stage { batch, share })) => {
                if !(share > 0.0 && share <= 1.0) {
                    return fail(format!("--ramp ends after {share} of the samples: above 0 and at most 1"));
                }
                Rule::LinearRamp { end: batch, samples: ((share * samples as f64).round() as u64).max(1) }
            }
            (ControllerKind::NormTest, _) => {
                Rule::NormTest { eta: self.eta.unwrap_or(0.9), variant: self.variant.unwrap_or_default() }
            }
            (ControllerKind::NoiseScale, _) => Rule::NoiseScale { ratio: self.ratio.unwrap_or(1.0) },
        };
        let mut settings = Settings::new(base, cap, round_to, rule);
        settings.monotone = !self.shrink;
        settings.ema_decay = self.ema.unwrap_or(settings.ema_decay);
        settings.patience = self.patience.unwrap_or(settings.patience);
        settings.growth_limit = self.growth_limit.unwrap_or(settings.growth_limit);
        settings.interval = self.test_interval.unwrap_or(settings.interval);
        settings.validate().map_err(by_flag)?;
        Ok(settings)
    }
}

/// The flag, without dashes, that sets what a recipe or a controller calls `setting`.
pub(crate) fn flag(setting: &str) -> String {
    let setting = setting.strip_prefix("controller.").unwrap_or(setting);
    let name = match setting {
        "base" => "batch",
        "cap" => "max-batch",
        "ema_decay" => "ema",
        "interval" => "test-interval",
        "monotone" => "shrink",
        "coupling" => "lr-coupling",
        "rule" => "controller",
        "schedule.shape" => "schedule",
        _ if setting.starts_with("model.") => "model",
        _ if setting.starts_with("rule.linear-ramp.") => "ramp",
        _ if setting.starts_with("rule.stagewise.") => "stages",
        // The others have the names of their flags.
        _ => setting.rsplit('.').next().expect("a split has a part"),
    };
    name.replace('_', "-")
}

/// What a controller or a simulation refuses, by the flag that set it.
pub(crate) fn by_flag(error: pillion_abs::Error) -> Error {
    let pillion_abs::Error::Setting { setting, value, expected, remedy } = error else {
        return Error::Setting(error.to_string());
    };
    let flag = flag(setting.strip_prefix("simulation.").unwrap_or(&setting));
    Error::Setting(format!("--{flag}: {value}, expected {expected}; {remedy}"))
}

pub(crate) fn stage(text: &str) -> Result<Stage, String> {
    let (batch, share) = text.split_once(':').ok_or("write batch:share, such as 2048:0.025")?;
    let batch = batch.trim().parse().map_err(|error| format!("the batch `{batch}`: {error}"))?;
    let share = share.trim().parse().map_err(|error| format!("the share `{share}`: {error}"))?;
    Ok(Stage { batch, share })
}
