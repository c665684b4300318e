//! From the sums of one step to the noise of its gradient.

use serde::{Deserialize, Serialize};

/// The sums of one optimizer step, already over all ranks, so equal on each of them.
///
/// Gradients are measured before clipping, in unscaled f32, on the values that are actually reduced. The difference in
/// [`Observation::noise`] cancels: sum in f64.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Observation {
    /// K: groups (a rank in a microbatch) that carried tokens. A rank without a microbatch in a round is no group.
    pub groups: u64,
    /// Sequences in the batch.
    pub samples: u64,
    /// N: tokens that the loss counts, Σ_k n_k.
    pub tokens: u64,
    /// Σ_k ‖G_k‖²/n_k, where G_k is the gradient of the group's loss summed over its n_k tokens.
    pub group_square_norms: f64,
    /// ‖Σ_k G_k‖², not divided by anything.
    pub square_norm: f64,
    /// Gradient values that were infinite or not a number.
    pub non_finite: u64,
}

/// Why an [`Observation`] says nothing about noise.
#[derive(Serialize, Deserialize, Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Unusable {
    /// Gradients or their sums are infinite or not a number.
    #[error("non-finite gradients")]
    NonFinite,
    /// No samples or no tokens.
    #[error("an empty batch")]
    Empty,
    /// One group has nothing to differ from.
    #[error("fewer than two groups: accumulate over microbatches, or train on more ranks")]
    TooFewGroups,
    /// No gradients have these sums: a square-norm is negative, or ‖Σ G_k‖²/N exceeds Σ ‖G_k‖²/n_k, against the
    /// Cauchy-Schwarz inequality and by more than rounding explains. A mistake in the caller's sums or units.
    #[error("sums that no gradients can have: are all of them sums over tokens, before clipping?")]
    Inconsistent,
}

/// Noise and signal of a gradient, estimated from one step. A weighted sum of several steps' is a `Noise` too, up to a
/// factor that its ratios do not see.
#[derive(Serialize, Deserialize, Clone, Copy, PartialEq, Default, Debug)]
#[serde(deny_unknown_fields)]
pub struct Noise {
    /// σ̂²: trace of the covariance of one sample's gradient. Rounding can make a vanishing one negative; the sign is
    /// kept, so that averages stay unbiased.
    pub variance: f64,
    /// Q: square-norm of the batch's mean gradient, which overestimates the true one by σ²/b.
    pub square_norm: f64,
    /// |Ĝ|² = Q − σ̂²/b: estimate of the true gradient's square-norm; negative where noise drowns it.
    pub debiased_square_norm: f64,
    /// ‖V̂‖₁ as the paper prints it: the mean square distance of the groups' gradients from their mean, weighted by tokens,
    /// Σ_k n_k‖G_k/n_k‖²/N − Q. That is (K − 1)σ̂²/b.
    pub printed_variance: f64,
}

/// By how much rounding may break the Cauchy-Schwarz inequality. An element of the reduced gradient that is rounded to
/// bf16 is off by at most 2⁻⁸ of itself, its square by 2⁻⁷; this is twice that.
const ROUNDING: f64 = 1.0 / 64.0;

impl Observation {
    /// The noise of this step's gradient, per sample.
    ///
    /// # Derivation
    ///
    /// Let group k sum n_k tokens, G_k = n_k μ + Z_k, where μ is the true mean gradient of a token and Z_k independent
    /// between groups, with mean zero and E‖Z_k‖² = n_k σₜ². With Z = Σ_k Z_k, all terms in μ cancel:
    ///
    /// ```text
    /// Σ_k ‖G_k‖²/n_k − ‖Σ_k G_k‖²/N  =  Σ_k ‖Z_k‖²/n_k − ‖Z‖²/N,     of expectation  K σₜ² − σₜ²
    /// ```
    ///
    /// so the left side over K − 1 is unbiased for σₜ², for groups of any size. (The formula for equal groups, m·K/(K−1)
    /// times the mean of ‖G_k/n_k‖² less Q, is not: n = (1000, 3000) turns 50 into 83.)
    ///
    /// **Tokens to samples.** Tokens of one sequence are not independent, so σₜ² is not the variance of a token's
    /// gradient. It is what makes a mean over N tokens have the variance σₜ²/N. A mean over b samples of t tokens is one
    /// over N = b·t tokens, of variance σₜ²/(b·t); by the definition of σ² this is σ²/b. Hence σ² = σₜ²/t: *divide* by the
    /// tokens of a sample, here the batch's mean, N / samples.
    ///
    /// **When it is exact.** E‖Z_k‖² = n_k σₜ² holds for any dependence within samples if all have the same number of
    /// tokens, and for any lengths if a sample's variance is proportional to its length. With unequal lengths and
    /// dependent tokens it holds up to the spread of mean lengths between groups, less the more samples a group has.
    pub fn noise(&self) -> Result<Noise, Unusable> {
        let &Self { groups, samples, tokens, group_square_norms, square_norm, non_finite } = self;
        if non_finite > 0 || !group_square_norms.is_finite() || !square_norm.is_finite() {
            return Err(Unusable::NonFinite);
        }
        if samples == 0 || tokens == 0 {
            return Err(Unusable::Empty);
        }
        if groups < 2 {
            return Err(Unusable::TooFewGroups);
        }
        let (groups, samples, tokens) = (groups as f64, samples as f64, tokens as f64);
        let total = square_norm / tokens; // N·Q
        if group_square_norms < 0.0 || total < 0.0 || total - group_square_norms > ROUNDING * group_square_norms {
            return Err(Unusable::Inconsistent);
        }
        let token_variance = (group_square_norms - total) / (groups - 1.0);
        let noise = Noise {
            variance: token_variance / (tokens / samples),
            square_norm: total / tokens,
            debiased_square_norm: (total - token_variance) / tokens,
            printed_variance: (group_square_norms - total) / tokens,
        };
        // Many samples of few tokens can overflow.
        if noise.is_finite() { Ok(noise) } else { Err(Unusable::NonFinite) }
    }
}

impl Noise {
    /// B_simple = σ̂²/|Ĝ|², the gradient noise scale in samples (McCandlish et al. 2018). `None` where |Ĝ|² is not
    /// positive, and where the quotient is not finite.
    pub fn simple_scale(&self) -> Option<f64> {
        let scale = self.variance / self.debiased_square_norm;
        (self.debiased_square_norm > 0.0 && scale.is_finite()).then_some(scale)
    }

    pub(crate) fn is_finite(&self) -> bool {
        let Self { variance, square_norm, debiased_square_norm, printed_variance } = *self;
        [variance, square_norm, debiased_square_norm, printed_variance].iter().all(|value| value.is_finite())
    }

    /// decay · self + next, each field alone.
    pub fn discounted(&self, decay: f64, next: &Noise) -> Noise {
        Noise {
            variance: decay * self.variance + next.variance,
            square_norm: decay * self.square_norm + next.square_norm,
            debiased_square_norm: decay * self.debiased_square_norm + next.debiased_square_norm,
            printed_variance: decay * self.printed_variance + next.printed_variance,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DIM: usize = 50;
    const TRIALS: u64 = 10_000;

    /// Uniform in ±√3, so of mean 0 and variance 1; a pure function of its index (SplitMix64).
    fn unit_noise(index: u64) -> f64 {
        let mut z = index.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^= z >> 31;
        let unit = (z >> 11) as f64 / (1u64 << 53) as f64;
        (2.0 * unit - 1.0) * 3f64.sqrt()
    }

    /// One group of the simulation: the token counts of its samples.
    type Group = &'static [f64];

    struct Step {
        /// n_k and G_k of each group.
        groups: Vec<(f64, [f64; DIM])>,
        samples: u64,
    }

    /// A sample of t tokens has the summed gradient t·μ + deviation(t)·z, where every μ_i = 1 and z is noise of
    /// variance 1 in each of the dimensions.
    fn step(trial: u64, groups: &[Group], deviation: fn(f64) -> f64) -> Step {
        let samples: usize = groups.iter().map(|group| group.len()).sum();
        let mut index = trial * (samples * DIM) as u64;
        let mut sum_group = |group: &Group| {
            let mut sum = [0.0; DIM];
            for &tokens in *group {
                for value in &mut sum {
                    *value += tokens + deviation(tokens) * unit_noise(index);
                    index += 1;
                }
            }
            (group.iter().sum(), sum)
        };
        Step { groups: groups.iter().map(&mut sum_group).collect(), samples: samples as u64 }
    }

    fn square_norm(values: impl IntoIterator<Item = f64>) -> f64 {
        values.into_iter().map(|value| value * value).sum()
    }

    impl Step {
        fn observation(&self) -> Observation {
            Observation {
                groups: self.groups.len() as u64,
                samples: self.samples,
                tokens: self.groups.iter().map(|(n, _)| n).sum::<f64>() as u64,
                group_square_norms: self.groups.iter().map(|(n, g)| square_norm(*g) / n).sum(),
                square_norm: square_norm((0..DIM).map(|i| self.groups.iter().map(|(_, g)| g[i]).sum())),
                non_finite: 0,
            }
        }

        /// The formula for equal groups, m·K/(K−1)·(mean ‖g_k‖² − Q), with m the mean group size in samples.
        fn plain_variance(&self) -> f64 {
            let k = self.groups.len() as f64;
            let mean = self.groups.iter().map(|(n, g)| square_norm(g.map(|v| v / n))).sum::<f64>() / k;
            let q = self.observation().noise().unwrap().square_norm;
            self.samples as f64 / k * k / (k - 1.0) * (mean - q)
        }
    }

    /// Means of σ̂², |Ĝ|² and the plain formula over all trials.
    fn simulate(groups: &[Group], deviation: fn(f64) -> f64) -> [f64; 3] {
        let mut sums = [0.0; 3];
        for trial in 0..TRIALS {
            let step = step(trial, groups, deviation);
            let noise = step.observation().noise().unwrap();
            sums[0] += noise.variance;
            sums[1] += noise.debiased_square_norm;
            sums[2] += step.plain_variance();
        }
        sums.map(|sum| sum / TRIALS as f64)
    }

    #[track_caller]
    fn assert_within_one_percent(actual: f64, expected: f64) {
        assert!((actual / expected - 1.0).abs() < 0.01, "{actual}, expected {expected}");
    }

    // The standard error of the mean σ̂² is at most √(2/((K−1)·DIM·TRIALS)) = 0.2 % (K = 2) for this noise, whose fourth
    // moment is below the normal one: 1 % is five of them. That of |Ĝ|² is smaller still.

    /// The tokens of a sample share their noise here: a sample's mean gradient is μ + z, so σ² = DIM·1 = 50, and
    /// ‖μ‖² = 50.
    #[test]
    fn unequal_groups_of_dependent_tokens_are_unbiased_and_the_plain_formula_is_not() {
        let groups: [Group; 2] = [&[1000.0], &[1000.0; 3]]; // n = (1000, 3000)
        let [variance, square_norm, plain] = simulate(&groups, |tokens| tokens);
        assert_within_one_percent(variance, 50.0);
        assert_within_one_percent(square_norm, 50.0);
        // Group means have variance σ²/1 and σ²/3, their weighted mean σ²/4; m = 2, K = 2:
        // 2·2/1·((1 + 1/3)/2 − 1/4)·σ² = 5/3·σ².
        assert_within_one_percent(plain, 50.0 * 5.0 / 3.0);
    }

    #[test]
    fn equal_groups_are_unbiased_by_either_formula() {
        let groups: [Group; 4] = [&[128.0; 2]; 4];
        let [variance, square_norm, plain] = simulate(&groups, |tokens| tokens);
        assert_within_one_percent(variance, 50.0);
        assert_within_one_percent(square_norm, 50.0);
        assert_within_one_percent(plain, 50.0);
    }

    /// Independent tokens of variance 500 in each dimension: a sample of t tokens sums to a variance of 500·t, so
    /// σₜ² = 500·DIM. The 5 samples have 3000 tokens, 600 a sample: σ² = 500·50/600.
    #[test]
    fn samples_of_unequal_length_convert_by_their_mean_tokens() {
        let groups: [Group; 3] = [&[100.0, 900.0], &[400.0], &[1500.0, 100.0]];
        let [variance, square_norm, _] = simulate(&groups, |tokens| (500.0 * tokens).sqrt());
        assert_within_one_percent(variance, 500.0 * 50.0 / 600.0);
        assert_within_one_percent(square_norm, 50.0);
    }

    /// Two groups of one sample and one token in one dimension, G = (1, 3): variance of the two 2, Q = 2² = 4,
    /// |Ĝ|² = 4 − 2/2 = 3, V̂ = ((1 − 2)² + (3 − 2)²)/2 = 1.
    #[test]
    fn noise_of_two_numbers_is_their_sample_variance() {
        let noise = TWO_NUMBERS.noise().unwrap();
        let expected = Noise { variance: 2.0, square_norm: 4.0, debiased_square_norm: 3.0, printed_variance: 1.0 };
        assert_eq!(noise, expected);
        assert_eq!(noise.simple_scale(), Some(2.0 / 3.0));
    }

    const TWO_NUMBERS: Observation =
        Observation { groups: 2, samples: 2, tokens: 2, group_square_norms: 10.0, square_norm: 16.0, non_finite: 0 };

    /// G = (1, −2): variance 4.5, Q = 1/4, so |Ĝ|² = 1/4 − 9/4 = −2.
    #[test]
    fn a_gradient_drowned_in_noise_has_no_scale() {
        let drowned = Observation { group_square_norms: 5.0, square_norm: 1.0, ..TWO_NUMBERS };
        let noise = drowned.noise().unwrap();
        assert_eq!(noise.debiased_square_norm, -2.0);
        assert_eq!(noise.simple_scale(), None);
    }

    #[test]
    fn unusable_sums_say_why() {
        let unusable = |change: fn(&mut Observation)| {
            let mut observation = TWO_NUMBERS;
            change(&mut observation);
            observation.noise().unwrap_err()
        };
        assert_eq!(unusable(|o| o.non_finite = 1), Unusable::NonFinite);
        assert_eq!(unusable(|o| o.square_norm = f64::NAN), Unusable::NonFinite);
        assert_eq!(unusable(|o| o.group_square_norms = f64::INFINITY), Unusable::NonFinite);
        let overflowing = |o: &mut Observation| {
            o.samples = u64::MAX;
            o.group_square_norms = f64::MAX;
        };
        assert_eq!(unusable(overflowing), Unusable::NonFinite);
        assert_eq!(unusable(|o| o.samples = 0), Unusable::Empty);
        assert_eq!(unusable(|o| o.tokens = 0), Unusable::Empty);
        assert_eq!(unusable(|o| o.groups = 1), Unusable::TooFewGroups);
        assert_eq!(unusable(|o| o.group_square_norms = -10.0), Unusable::Inconsistent);
        assert_eq!(unusable(|o| o.square_norm = -1.0), Unusable::Inconsistent);
        // Σ‖G_k‖²/n_k = 10 allows ‖ΣG_k‖² up to 20: means taken for sums, say.
        assert_eq!(unusable(|o| o.square_norm = 21.0), Unusable::Inconsistent);
    }

    #[test]
    fn a_variance_that_rounding_made_negative_keeps_its_sign() {
        let rounded = Observation { square_norm: 20.1, ..TWO_NUMBERS };
        assert!(rounded.noise().unwrap().variance < 0.0);
    }
}
