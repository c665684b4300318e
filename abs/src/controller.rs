//! The controller: one observation in, one decision out, and the state between them.

use std::cmp::Ordering;

use serde::{Deserialize, Serialize};

use crate::{Error, Noise, Observation, Rule, Settings, Unusable, linear_ramp, noise_scale, norm_test, stagewise};

/// Chooses the batch of each optimizer step.
#[derive(Clone, PartialEq, Debug)]
pub struct Controller {
    settings: Settings,
    state: State,
}

/// All that a controller remembers. Goes into the checkpoint; resumed from it, decisions are the same bit for bit, given a
/// format that keeps every f64 (for JSON, a parser that rounds correctly).
#[derive(Serialize, Deserialize, Clone, PartialEq, Debug)]
#[serde(deny_unknown_fields)]
pub struct State {
    /// Batch of the next step, in samples.
    pub batch: u64,
    /// Steps observed.
    pub steps: u64,
    /// Samples seen.
    pub samples: u64,
    /// Tokens seen.
    pub tokens: u64,
    /// Tests in a row that asked for a larger batch (positive) or a smaller one (negative) and were not yet followed.
    pub asks: i64,
    /// Exponentially discounted sums of every usable step's noise, Σ_s decay^s · noise. Only ratios are used, in which the
    /// sum of weights cancels: that is the bias correction of a moving average, without its powers and roundings.
    pub noise: Noise,
}

/// What [`Controller::observe`] decided.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Decision {
    /// Samples in the next step.
    pub batch: u64,
    /// Smoothed B_simple = σ̂²/|Ĝ|² in samples, for the log. `None` while the smoothed |Ĝ|² is not positive.
    pub noise_scale: Option<f64>,
    /// What the rule asked for, in samples, before rounding and limits. `None` for schedules, and where it is undefined.
    pub wanted: Option<f64>,
    /// This step's own noise, not smoothed, or why there is none.
    pub noise: Result<Noise, Unusable>,
    /// Why the batch is what it is.
    pub reason: Reason,
}

/// Why the batch changed or did not.
#[derive(Serialize, Deserialize, Clone, Copy, PartialEq, Eq, Debug)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Reason {
    /// The rule is a schedule, and says so.
    Scheduled,
    /// Unchanged: the step's statistics say nothing; [`Decision::noise`] has the reason. They were left out.
    Unusable,
    /// Unchanged: not a multiple of [`Settings::interval`].
    BetweenTests,
    /// Unchanged: the smoothed square of the gradient is zero, or its estimate less noise not positive, so relative noise is undefined.
    NoGradient,
    /// Unchanged: the batch is large enough.
    Sufficient,
    /// Unchanged: the test asked for another batch, but not often enough yet for [`Settings::patience`].
    Waiting,
    /// Unchanged: the test asked for more than [`Settings::cap`].
    AtCap,
    /// The test asked for a larger batch.
    Grown,
    /// The test asked for a smaller batch, and [`Settings::monotone`] is off.
    Shrunk,
}

/// What a rule says, before patience, rounding and limits.
enum Proposal {
    /// A known function of the samples seen: followed at once.
    Scheduled(u64),
    /// A noisy measurement, in samples.
    Measured(Option<f64>),
}

impl Controller {
    /// A controller at the start of a run. Fails where [`Settings::validate`] or
    /// [`Settings::check_growth`] does.
    pub fn new(settings: Settings) -> Result<Self, Error> {
        settings.validate()?;
        settings.check_growth()?;
        let mut state =
            State { batch: settings.base, steps: 0, samples: 0, tokens: 0, asks: 0, noise: Noise::default() };
        if let Proposal::Scheduled(batch) = propose(&settings, &state) {
            state.batch = batch;
        }
        Ok(Self { settings, state })
    }

    /// A controller that goes on from a saved state. Fails where [`Settings::validate`] does, and if the state's batch is
    /// not one that these settings allow or, for a schedule, not the scheduled one. Where
    /// [`Settings::check_growth`] fails, the run goes on: the caller should warn its user.
    pub fn resume(settings: Settings, state: State) -> Result<Self, Error> {
        settings.validate()?;
        let refuse = |field, value, expected| {
            let remedy = "resume with the settings of the saved run, or correct the state";
            Err(Error::State { field, value, expected, remedy })
        };
        if !settings.allows(state.batch) {
            return refuse("batch", state.batch.to_string(), settings.allowed());
        }
        if !state.noise.is_finite() {
            return refuse("noise", format!("{:?}", state.noise), "finite numbers".into());
        }
        match propose(&settings, &state) {
            Proposal::Scheduled(batch) if batch != state.batch => {
                let expected = format!("{batch}, scheduled after {} samples", state.samples);
                refuse("batch", state.batch.to_string(), expected)
            }
            _ => Ok(Self { settings, state }),
        }
    }

    /// A controller that goes on from a saved state with other settings. What it has measured
    /// stays. The batch becomes the one that a schedule says at this sample, or the nearest one
    /// that the limits of a measured batch allow.
    ///
    /// # Errors
    /// As for [`Controller::resume`].
    pub fn change(settings: Settings, mut state: State) -> Result<Self, Error> {
        settings.validate()?;
        state.asks = 0;
        state.batch = match propose(&settings, &state) {
            Proposal::Scheduled(batch) => batch,
            Proposal::Measured(_) => settings.round_up(state.batch as f64),
        };
        Self::resume(settings, state)
    }

    /// Passes over samples that no step has learnt from: schedules go on as if one had. Measured
    /// batches stay.
    pub fn skip(&mut self, samples: u64) {
        self.state.samples = self.state.samples.saturating_add(samples);
        if let Proposal::Scheduled(batch) = propose(&self.settings, &self.state) {
            self.state.batch = batch;
        }
    }

    /// Samples in the next step.
    pub fn batch(&self) -> u64 {
        self.state.batch
    }

    /// What to save in a checkpoint.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// The settings it was made with.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Takes in the step that just ran and decides on the next one. To be called once for every step, on every rank.
    pub fn observe(&mut self, observation: &Observation) -> Decision {
        let state = &mut self.state;
        // No run reaches 2^64 of anything; absurd counts must not wrap into plausible ones.
        state.steps = state.steps.saturating_add(1);
        state.samples = state.samples.saturating_add(observation.samples);
        state.tokens = state.tokens.saturating_add(observation.tokens);

        let noise = observation.noise().and_then(|noise| {
            let sums = state.noise.discounted(self.settings.ema_decay, &noise);
            if !sums.is_finite() {
                return Err(Unusable::NonFinite);
            }
            state.noise = sums;
            Ok(noise)
        });
        let (wanted, reason) = match propose(&self.settings, state) {
            Proposal::Scheduled(batch) => {
                state.batch = batch;
                (None, Reason::Scheduled)
            }
            Proposal::Measured(_) if noise.is_err() => (None, Reason::Unusable),
            Proposal::Measured(None) => {
                // A test that says nothing ends what was asked for in a row.
                if state.steps.is_multiple_of(self.settings.interval) {
                    state.asks = 0;
                }
                (None, Reason::NoGradient)
            }
            Proposal::Measured(wanted) if !state.steps.is_multiple_of(self.settings.interval) => {
                (wanted, Reason::BetweenTests)
            }
            Proposal::Measured(Some(wanted)) => (Some(wanted), follow(&self.settings, state, wanted)),
        };
        Decision { batch: state.batch, noise_scale: state.noise.simple_scale(), wanted, noise, reason }
    }
}

/// What the rule says in this state.
fn propose(settings: &Settings, state: &State) -> Proposal {
    match &settings.rule {
        Rule::Constant => Proposal::Scheduled(settings.base),
        Rule::Stagewise { stages, horizon } => Proposal::Scheduled(stagewise::batch(stages, *horizon, state.samples)),
        Rule::LinearRamp { end, samples } => {
            Proposal::Scheduled(linear_ramp::batch(settings, *end, *samples, state.samples))
        }
        Rule::NormTest { eta, variant } => Proposal::Measured(norm_test::wanted(*eta, *variant, &state.noise)),
        Rule::NoiseScale { ratio } => Proposal::Measured(noise_scale::wanted(*ratio, &state.noise)),
    }
}

/// Changes the batch towards a measured one, as far and as soon as the settings let it.
fn follow(settings: &Settings, state: &mut State, wanted: f64) -> Reason {
    let target = settings.round_up(wanted);
    let (direction, changed) = match target.cmp(&state.batch) {
        Ordering::Greater => (1, Reason::Grown),
        Ordering::Less if !settings.monotone => (-1, Reason::Shrunk),
        _ => {
            state.asks = 0;
            let capped = state.batch == settings.cap && wanted > settings.cap as f64;
            return if capped { Reason::AtCap } else { Reason::Sufficient };
        }
    };
    state.asks = match state.asks.signum() == direction {
        true => state.asks.saturating_add(direction),
        false => direction,
    };
    if state.asks.unsigned_abs() < settings.patience.into() {
        return Reason::Waiting;
    }
    state.asks = 0;
    state.batch = settings.limit_growth(state.batch, target);
    changed
}

#[cfg(test)]
mod tests;
