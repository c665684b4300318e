//! How far estimates scatter: synthetic gradients whose noise and signal are known, through the same formulas.
//!
//! The true gradient has length 1, and the gradient of a sample is normal around it with variance σ²/d in each of d dimensions, so σ² is also the true
//! noise scale, in samples. Gradients of models have many more dimensions, whose noise is neither equal nor independent: what counts is the effective
//! number, (tr Σ)²/tr Σ². Estimates of σ² scatter by √(2/(d(K − 1))) about the truth, relatively, in a step of K groups; what is left of that after smoothing is
//! the answer to how long an average must be.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use rand_distr::{Distribution, StandardNormal};
use serde::Serialize;

use crate::{Error, Noise, Observation};

/// Most dimensions, and most steps: what is kept of them fits into memory.
pub const MOST: usize = 1 << 22;

/// Noise scales, as shares of the batch, at which f64 neither overflows nor loses the noise in what it is the difference of.
const SHARES: std::ops::RangeInclusive<f64> = 1e-6..=1e12;

/// As many steps as averages that have next to nothing in common: an interval of fewer would say little.
const INDEPENDENT: f64 = 10.0;

/// What is simulated.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Truth {
    /// σ², the trace of the covariance of one sample's gradient, where |G|² = 1: so the noise scale, in samples. Above 0.
    pub noise_scale: f64,
    /// Samples in a step, at least `groups`; dealt to groups as evenly as goes. The noise scale is from a millionth of it to a million million times it.
    pub batch: u64,
    /// K, at least 2.
    pub groups: u64,
    /// d, at least 1 and at most [`MOST`].
    pub dimensions: usize,
}

/// What estimates were, as shares of what they estimate.
#[derive(Serialize, Clone, PartialEq, Debug)]
pub struct Scatter {
    /// Weight of a step's statistics one step later.
    pub ema_decay: f64,
    /// Mean of σ̂²/σ².
    pub variance_mean: f64,
    /// Interval of σ̂²/σ².
    pub variance: Interval,
    /// Interval of B_simple over the true noise scale, among steps where it is defined; none where it never is.
    pub noise_scale: Option<Interval>,
    /// Share of steps where B_simple is not defined, since |Ĝ|² is not positive.
    pub undefined: f64,
    /// Interval of what the norm test asks for, σ̂²/(η²Q), over σ²/(η²E Q), for any η.
    pub wanted: Interval,
}

/// Of 95 % of the values: 2.5 % are below, 2.5 % above.
#[derive(Serialize, Clone, Copy, PartialEq, Debug)]
pub struct Interval {
    /// 2.5 % are below.
    pub low: f64,
    /// 2.5 % are above.
    pub high: f64,
}

/// Makes `steps` steps, and says how the estimates of all scatter under each of the moving averages in `ema_decays`, once the average has its weights. A
/// long average has few independent values in the steps, (1 − λ)/(1 + λ) for each, and its interval is that much rougher. A pure function of its arguments.
///
/// # Errors
/// When an argument is out of its range; names it.
pub fn simulate(truth: Truth, ema_decays: &[f64], steps: usize, seed: u64) -> Result<Vec<Scatter>, Error> {
    validate(truth, ema_decays, steps)?;
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let measured: Vec<Noise> =
        (0..steps).map(|_| truth.step(&mut random).noise().expect("finite sums of at least two groups")).collect();
    Ok(ema_decays.iter().map(|&decay| scatter(truth, &measured, decay)).collect())
}

impl Truth {
    fn step(&self, random: &mut ChaCha8Rng) -> Observation {
        let Truth { noise_scale, batch, groups, dimensions } = *self;
        let deviation = (noise_scale / dimensions as f64).sqrt();
        let mut total = vec![0.0; dimensions];
        let mut group_square_norms = 0.0;
        for group in 0..groups {
            let samples = (batch / groups + u64::from(group < batch % groups)) as f64;
            let mut square_norm = 0.0;
            for (i, total) in total.iter_mut().enumerate() {
                let normal: f64 = StandardNormal.sample(random);
                // The true gradient points along the first axis.
                let gradient = if i == 0 { samples } else { 0.0 } + samples.sqrt() * deviation * normal;
                square_norm += gradient * gradient;
                *total += gradient;
            }
            group_square_norms += square_norm / samples;
        }
        let square_norm = total.iter().map(|value| value * value).sum();
        Observation { groups, samples: batch, tokens: batch, group_square_norms, square_norm, non_finite: 0 }
    }
}

fn scatter(truth: Truth, measured: &[Noise], ema_decay: f64) -> Scatter {
    let Truth { noise_scale, batch, .. } = truth;
    let expected_square_norm = 1.0 + noise_scale / batch as f64;
    // Until an average has all but e⁻³ of its weight it scatters more; half of the steps must be left.
    let memory = if ema_decay > 0.0 { (-3.0 / ema_decay.ln()).ceil() } else { 0.0 };
    let skipped = (memory as usize).min(measured.len() / 2);
    let (mut sums, mut weight) = (Noise::default(), 0.0);
    let (mut variances, mut scales, mut wanted) = (Vec::new(), Vec::new(), Vec::new());
    for (step, noise) in measured.iter().enumerate() {
        sums = sums.discounted(ema_decay, noise);
        weight = ema_decay * weight + 1.0;
        if step < skipped {
            continue;
        }
        variances.push(sums.variance / weight / noise_scale);
        scales.extend(sums.simple_scale().map(|scale| scale / noise_scale));
        wanted.push(sums.variance / sums.square_norm * expected_square_norm / noise_scale);
    }
    let count = variances.len() as f64;
    Scatter {
        ema_decay,
        variance_mean: variances.iter().sum::<f64>() / count,
        undefined: 1.0 - scales.len() as f64 / count,
        variance: interval(variances).expect("at least one step"),
        noise_scale: interval(scales),
        wanted: interval(wanted).expect("at least one step"),
    }
}

fn interval(mut values: Vec<f64>) -> Option<Interval> {
    values.sort_by(f64::total_cmp);
    let last = values.len().checked_sub(1)?;
    let quantile = |share: f64| values[(share * last as f64).round() as usize];
    Some(Interval { low: quantile(0.025), high: quantile(0.975) })
}

fn validate(truth: Truth, ema_decays: &[f64], steps: usize) -> Result<(), Error> {
    let Truth { noise_scale, batch, groups, dimensions } = truth;
    let refuse = |name: &str, value: String, expected: &str, remedy| {
        Err(Error::setting(format!("simulation.{name}"), value, expected, remedy))
    };
    if groups < 2 {
        return refuse("groups", groups.to_string(), "at least 2", "one group has nothing to differ from");
    }
    if batch < groups {
        return refuse("batch", batch.to_string(), "a sample for each group", "raise it, or take fewer groups");
    }
    if !SHARES.contains(&(noise_scale / batch as f64)) {
        let expected = "from a millionth of the batch to a million million times it";
        return refuse("noise-scale", noise_scale.to_string(), expected, "take one from a run's metrics");
    }
    if !(1..=MOST).contains(&dimensions) {
        return refuse("dimensions", dimensions.to_string(), "at least 1 and at most 2^22", "set it to 256");
    }
    if !(1..=MOST).contains(&steps) {
        return refuse("steps", steps.to_string(), "at least 1 and at most 2^22", "set it to 2000");
    }
    for decay in ema_decays {
        if !(0.0..1.0).contains(decay) {
            return refuse("ema", decay.to_string(), "at least 0 and below 1", "0 does not smooth at all");
        }
        let needed = (INDEPENDENT * (1.0 + decay) / (1.0 - decay)).ceil();
        if (steps as f64) < needed {
            let expected = format!("at least {needed} steps for an average of that length, not {steps}");
            return refuse("ema", decay.to_string(), &expected, "simulate more steps");
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRUTH: Truth = Truth { noise_scale: 200.0, batch: 64, groups: 4, dimensions: 100 };

    /// σ̂² is σ² times a chi-square of d(K − 1) = 300 degrees over 300: its standard deviation is √(2/300) = 8.2 %, that of a mean over 4,000 steps
    /// 0.13 %, and 1 % is seven of them.
    #[test]
    fn estimates_are_unbiased_within_one_percent() {
        for groups in [2, 3, 4, 16, 64] {
            let scatter = &simulate(Truth { groups, ..TRUTH }, &[0.0], 4000, 7).unwrap()[0];
            assert!((scatter.variance_mean - 1.0).abs() < 0.01, "{groups} groups: {scatter:?}");
        }
    }

    /// The interval of the normal approximation of that chi-square, ±1.96 · √(2/300). Quantiles of 4,000 values scatter by about
    /// √(0.025 · 0.975/4000)/0.0584 = 4 % of a standard deviation (0.0584 is the normal density there), and skewness moves them by
    /// (1.96² − 1)/6 · √(8/300) = 8 %: a fifth of a standard deviation is above three times the one and twice the other.
    #[test]
    fn the_interval_is_that_of_a_chi_square() {
        let deviation = (2.0f64 / 300.0).sqrt();
        let Interval { low, high } = simulate(TRUTH, &[0.0], 4000, 7).unwrap()[0].variance;
        assert!((low - (1.0 - 1.96 * deviation)).abs() < 0.2 * deviation, "{low}");
        assert!((high - (1.0 + 1.96 * deviation)).abs() < 0.2 * deviation, "{high}");
    }

    /// A moving average has the variance of a step's times (1 − λ)/(1 + λ): at 0.9 a nineteenth.
    #[test]
    fn smoothing_narrows_as_its_weights_say() {
        let scatters = simulate(TRUTH, &[0.0, 0.9], 20_000, 7).unwrap();
        let widths: Vec<f64> = scatters.iter().map(|s| s.variance.high - s.variance.low).collect();
        let ratio = widths[0] / widths[1];
        // 20,000 steps are about a thousand independent averages, whose quantiles scatter by 8 %.
        assert!((ratio / 19f64.sqrt() - 1.0).abs() < 0.25, "{ratio}");
    }

    #[test]
    fn a_drowned_gradient_is_mostly_undefined_without_smoothing() {
        // |Ĝ|² scatters by at least 2σ/√b = 14 times itself.
        let truth = Truth { noise_scale: 1e4, batch: 200, ..TRUTH };
        let scatters = simulate(truth, &[0.0], 4000, 7).unwrap();
        assert!((0.3..0.6).contains(&scatters[0].undefined), "{scatters:?}");
    }

    /// At the ends of the range of noise scales, and with the largest counts, nothing overflows, and the noise is still found.
    #[test]
    fn the_extremes_are_estimated_too() {
        for batch in [2, 64, u64::MAX] {
            for share in [*SHARES.start(), *SHARES.end()] {
                let truth = Truth { noise_scale: batch as f64 * share, batch, groups: 2, ..TRUTH };
                let scatter = &simulate(truth, &[0.0], 2000, 3).unwrap()[0];
                // σ̂² of one degree of freedom in each of 100 dimensions: √(2/100/2000) = 0.3 % in the mean, of which 3 % is nine.
                assert!((scatter.variance_mean - 1.0).abs() < 0.03, "{truth:?}: {scatter:?}");
            }
        }
    }

    #[test]
    fn the_same_arguments_give_the_same_numbers() {
        assert_eq!(simulate(TRUTH, &[0.5], 50, 1), simulate(TRUTH, &[0.5], 50, 1));
        assert_ne!(simulate(TRUTH, &[0.5], 50, 1), simulate(TRUTH, &[0.5], 50, 2));
    }

    #[test]
    fn bad_arguments_are_refused_by_name() {
        let message = |truth, decays: &[f64], steps| simulate(truth, decays, steps, 1).unwrap_err().to_string();
        for (name, truth) in [
            ("noise-scale", Truth { noise_scale: f64::NAN, ..TRUTH }),
            ("noise-scale", Truth { noise_scale: 0.0, ..TRUTH }),
            ("noise-scale", Truth { noise_scale: 1e-5, ..TRUTH }),
            ("noise-scale", Truth { noise_scale: 1e15, ..TRUTH }),
            ("dimensions", Truth { dimensions: MOST + 1, ..TRUTH }),
            ("groups", Truth { groups: 1, ..TRUTH }),
            ("batch", Truth { batch: 3, ..TRUTH }),
            ("dimensions", Truth { dimensions: 0, ..TRUTH }),
        ] {
            assert!(message(truth, &[0.9], 10).contains(&format!("simulation.{name}")), "{name}");
        }
        assert!(message(TRUTH, &[1.0], 10).contains("simulation.ema"));
        assert!(message(TRUTH, &[0.99], 1989).contains("at least 1990 steps"));
        for steps in [0, MOST + 1] {
            assert!(message(TRUTH, &[], steps).contains("simulation.steps"));
        }
    }
}
