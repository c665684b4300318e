//! What a user sets: the limits that every controller keeps, and the rule that it follows.

use serde::{Deserialize, Serialize};

use crate::{Error, Stage, Variant, linear_ramp, noise_scale, norm_test, stagewise};

/// Settings of a [`Controller`](crate::Controller). Batches are global and count samples (sequences).
#[derive(Serialize, Deserialize, Clone, PartialEq, Debug)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// Smallest batch, and the first one unless a schedule says otherwise. A multiple of `round_to`.
    pub base: u64,
    /// Largest batch. A multiple of `round_to`, at least `base`, at most 2^53.
    pub cap: u64,
    /// Every batch is a multiple of this; at least 1. A multiple of the microbatch lets the run continue at any world size.
    pub round_to: u64,
    /// A measured batch grows by at most this factor at once, above 1, yet always by at least one `round_to`. If
    /// `monotone` is off it shrinks by at most this factor. Default 2. Schedules are not limited.
    #[serde(default = "default_growth_limit")]
    pub growth_limit: f64,
    /// This many tests in a row must ask for a change in the same direction before it is made; at least 1, the default.
    #[serde(default = "default_patience")]
    pub patience: u32,
    /// A step's statistics weigh this much less with every usable step that follows, in [0, 1). 0 decides from the
    /// last step alone, as the paper does. Default 0.9: the weight of about 19 equal steps, (1+λ)/(1−λ), from a memory
    /// of about 10, 1/(1−λ), which is short against the 250 to 1000 steps of the paper's runs. 0.99 would not be.
    /// After a growth the smoothed Q still holds the noise of the smaller batch, so the test asks for less at first.
    #[serde(default = "default_ema_decay")]
    pub ema_decay: f64,
    /// Test every this many steps; at least 1, the default. Statistics are smoothed over all steps all the same.
    #[serde(default = "default_interval")]
    pub interval: u64,
    /// Never shrink. Default true, as in the paper.
    #[serde(default = "default_monotone")]
    pub monotone: bool,
    /// What the batch follows.
    pub rule: Rule,
}

/// What the batch follows. In a settings file: `rule = "constant"`, or a table `rule.norm-test` with `eta = 0.2`.
#[derive(Serialize, Deserialize, Clone, PartialEq, Debug)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
#[non_exhaustive]
pub enum Rule {
    /// Always [`Settings::base`].
    Constant,
    /// A list of batches, each for a share of the run.
    Stagewise {
        /// The stages in order. Shares sum to 1; batches are allowed by the settings, and ascend if `monotone`.
        stages: Vec<Stage>,
        /// Samples of the whole run. Beyond it the last stage goes on.
        horizon: u64,
    },
    /// From [`Settings::base`] up to `end` in equal increments of [`Settings::round_to`], each after as many samples.
    LinearRamp {
        /// Batch at the end of the ramp, allowed by the settings.
        end: u64,
        /// Samples over which it rises, at least 1.
        samples: u64,
    },
    /// Norm test: while σ̂²/b > η²·Q, grow towards ⌈σ̂²/(η²·Q)⌉ (Lau et al. 2025).
    NormTest {
        /// η, the largest noise-to-gradient ratio accepted; from 1e-6 to 1e6, and for a new run of
        /// the unbiased variant below 1.
        eta: f64,
        /// Which noise and which gradient are compared.
        #[serde(default)]
        variant: Variant,
    },
    /// Grow towards ⌈`ratio` · B_simple⌉ (McCandlish et al. 2018).
    NoiseScale {
        /// Batch as a share of the gradient noise scale; from 1e-6 to 1e6. At 1 a step makes half the progress of an infinitely large batch.
        ratio: f64,
    },
}

/// Above this f64 no longer counts in ones.
const LARGEST_CAP: u64 = 1 << 53;

impl Settings {
    /// The given limits and rule, and the default of everything else. Not yet validated.
    pub fn new(base: u64, cap: u64, round_to: u64, rule: Rule) -> Self {
        Self {
            base,
            cap,
            round_to,
            growth_limit: default_growth_limit(),
            patience: default_patience(),
            ema_decay: default_ema_decay(),
            interval: default_interval(),
            monotone: default_monotone(),
            rule,
        }
    }

    /// Checks every range and contradiction; the error names the setting, its value, what was expected and a remedy.
    pub fn validate(&self) -> Result<(), Error> {
        let Self { base, cap, round_to, .. } = *self;
        let count = |name: &str, value: u64| match value {
            0 => Err(Error::setting(name, value, "at least 1", "set it to 1 or more")),
            _ => Ok(()),
        };
        let multiple = |name: &str, value: u64| match value % round_to {
            0 => Ok(()),
            _ => Err(Error::setting(
                name,
                value,
                format!("a multiple of `round_to`, {round_to}"),
                "round it, or change `round_to`",
            )),
        };
        count("round_to", round_to)?;
        count("base", base)?;
        count("interval", self.interval)?;
        count("patience", self.patience.into())?;
        multiple("base", base)?;
        multiple("cap", cap)?;
        if cap < base || cap > LARGEST_CAP {
            return Err(Error::setting(
                "cap",
                cap,
                format!("between `base`, {base}, and 2^53"),
                "change `cap`, or lower `base`",
            ));
        }
        if !(self.growth_limit.is_finite() && self.growth_limit > 1.0) {
            return Err(Error::setting(
                "growth_limit",
                self.growth_limit,
                "a finite factor above 1",
                "set it to 2, or use the rule `constant` for a batch that never grows",
            ));
        }
        if !(self.ema_decay >= 0.0 && self.ema_decay < 1.0) {
            return Err(Error::setting(
                "ema_decay",
                self.ema_decay,
                "at least 0 and below 1",
                "set it to 0.9, or to 0 for no smoothing",
            ));
        }
        match &self.rule {
            Rule::Constant => Ok(()),
            Rule::Stagewise { stages, horizon } => stagewise::validate(self, stages, *horizon),
            Rule::LinearRamp { end, samples } => linear_ramp::validate(self, *end, *samples),
            Rule::NormTest { eta, .. } => norm_test::validate(*eta),
            Rule::NoiseScale { ratio } => noise_scale::validate(*ratio),
        }
    }

    /// Refuses a rule that follows measurements by which no batch is expected to grow, whatever the
    /// gradients are. [`Self::validate`] accepts such a rule, because runs that began with one must
    /// be able to go on.
    pub fn check_growth(&self) -> Result<(), Error> {
        match self.rule {
            Rule::NormTest { eta, variant } => norm_test::check_growth(eta, variant),
            Rule::Constant | Rule::Stagewise { .. } | Rule::LinearRamp { .. } | Rule::NoiseScale { .. } => Ok(()),
        }
    }

    /// Whether a step may have this batch.
    pub(crate) fn allows(&self, batch: u64) -> bool {
        (self.base..=self.cap).contains(&batch) && batch.is_multiple_of(self.round_to)
    }

    /// What [`Self::allows`], for messages.
    pub(crate) fn allowed(&self) -> String {
        let Self { base, cap, round_to, .. } = self;
        format!("a multiple of {round_to} between {base} and {cap}")
    }

    /// The smallest allowed batch of at least `wanted` samples; the cap where there is none.
    pub(crate) fn round_up(&self, wanted: f64) -> u64 {
        if wanted >= self.cap as f64 {
            return self.cap;
        }
        let samples = wanted.ceil() as u64; // a negative number becomes 0
        samples.next_multiple_of(self.round_to).max(self.base)
    }

    /// How far a batch may go from `from` towards `target` at once. All three are allowed batches.
    pub(crate) fn limit_growth(&self, from: u64, target: u64) -> u64 {
        let Self { round_to, growth_limit, .. } = *self;
        if target > from {
            let most = (from as f64 * growth_limit).floor() as u64;
            target.min((most - most % round_to).max(from + round_to))
        } else if target < from {
            let least = (from as f64 / growth_limit).ceil() as u64;
            target.max(least.next_multiple_of(round_to).min(from - round_to))
        } else {
            from
        }
    }
}

fn default_growth_limit() -> f64 {
    2.0
}

fn default_patience() -> u32 {
    1
}

fn default_ema_decay() -> f64 {
    0.9
}

fn default_interval() -> u64 {
    1
}

fn default_monotone() -> bool {
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    fn norm_test() -> Settings {
        Settings::new(256, 8192, 64, Rule::NormTest { eta: 0.2, variant: Variant::Unbiased })
    }

    #[test]
    fn each_bad_setting_is_refused_by_name() {
        let refused = |name: &str, change: fn(&mut Settings)| {
            let mut settings = norm_test();
            change(&mut settings);
            let error = settings.validate().unwrap_err();
            assert!(error.to_string().contains(&format!("`{name}`")), "{error}");
        };
        norm_test().validate().unwrap();
        refused("round_to", |s| s.round_to = 0);
        refused("base", |s| s.base = 0);
        refused("base", |s| s.base = 257);
        refused("cap", |s| s.cap = 8200);
        refused("cap", |s| s.cap = 128);
        refused("cap", |s| s.cap = 1 << 54);
        refused("interval", |s| s.interval = 0);
        refused("patience", |s| s.patience = 0);
        refused("growth_limit", |s| s.growth_limit = 1.0);
        refused("growth_limit", |s| s.growth_limit = f64::NAN);
        refused("growth_limit", |s| s.growth_limit = f64::INFINITY);
        refused("ema_decay", |s| s.ema_decay = 1.0);
        refused("ema_decay", |s| s.ema_decay = -0.1);
        refused("ema_decay", |s| s.ema_decay = f64::NAN);
        for bad in [0.0, -0.2, f64::NAN, f64::INFINITY] {
            let settings = Settings { rule: Rule::NormTest { eta: bad, variant: Variant::Unbiased }, ..norm_test() };
            let error = settings.validate().unwrap_err();
            assert!(error.to_string().contains("`rule.norm-test.eta`"), "{error}");
        }
    }

    #[test]
    fn error_names_setting_value_expectation_and_remedy() {
        let settings = Settings { cap: 8200, ..norm_test() };
        assert_eq!(
            settings.validate().unwrap_err().to_string(),
            "batch-size setting `cap` is 8200, expected a multiple of `round_to`, 64; round it, or change `round_to`"
        );
    }

    #[test]
    fn omitted_settings_take_their_defaults_and_unknown_ones_are_refused() {
        let json = r#"{"base": 256, "cap": 8192, "round_to": 64, "rule": {"norm-test": {"eta": 0.2}}}"#;
        assert_eq!(serde_json::from_str::<Settings>(json).unwrap(), norm_test());
        let constant = r#"{"base": 256, "cap": 256, "round_to": 64, "rule": "constant"}"#;
        assert_eq!(serde_json::from_str::<Settings>(constant).unwrap().rule, Rule::Constant);
        for unknown in [json.replace("base", "basis"), json.replace("eta\":", "eta\": 1, \"theta\":")] {
            assert!(serde_json::from_str::<Settings>(&unknown).is_err(), "{unknown}");
        }
    }

    #[test]
    fn a_wanted_batch_is_rounded_up_then_kept_between_base_and_cap() {
        let settings = norm_test();
        let cases =
            [(-5.0, 256), (10.0, 256), (256.0, 256), (256.001, 320), (8128.5, 8192), (8192.5, 8192), (1e300, 8192)];
        for (wanted, batch) in cases {
            assert_eq!(settings.round_up(wanted), batch, "{wanted}");
        }
    }

    #[test]
    fn growth_is_limited_but_always_possible() {
        let limited = |growth_limit, from, target| Settings { growth_limit, ..norm_test() }.limit_growth(from, target);
        assert_eq!(limited(2.0, 256, 8192), 512);
        assert_eq!(limited(2.0, 256, 320), 320);
        assert_eq!(limited(1.4, 320, 8192), 448); // 320 · 1.4 = 448 = 7 · 64
        assert_eq!(limited(1.3, 320, 8192), 384); // 416 rounds down to 6 · 64
        assert_eq!(limited(1.01, 256, 8192), 320); // less than one multiple: one multiple
        assert_eq!(limited(1e300, 256, 8192), 8192);
        assert_eq!(limited(2.0, 8192, 256), 4096);
        assert_eq!(limited(1.5, 8192, 256), 5504); // 5461.3 rounds up to 86 · 64
        assert_eq!(limited(1.001, 8192, 256), 8128);
    }
}
