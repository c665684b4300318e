//! The gradient noise scale: batches are a share of B_simple = σ̂²/|Ĝ|².
//!
//! From McCandlish, Kaplan, Amodei and the OpenAI Dota team, "An Empirical Model of Large-Batch Training", 2018, arXiv 1812.06162: a step with batch b makes
//! 1/(1 + B/b) of the progress of one with the true gradient, where B is the noise scale.

use crate::{Error, Noise};

/// The batch in samples, neither rounded nor limited. `None` where |Ĝ|² is not positive.
pub(crate) fn wanted(ratio: f64, noise: &Noise) -> Option<f64> {
    let wanted = ratio * noise.simple_scale()?;
    wanted.is_finite().then_some(wanted)
}

pub(crate) fn validate(ratio: f64) -> Result<(), Error> {
    Error::unless_factor("rule.noise-scale.ratio", ratio, "start from 1: a batch as large as the noise scale")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wanted_batch_is_a_share_of_noise_over_true_gradient() {
        let noise = Noise { variance: 6.0, square_norm: 3.0, debiased_square_norm: 2.0, printed_variance: 1.0 };
        assert_eq!(wanted(0.5, &noise), Some(1.5)); // 0.5 · 6 / 2
    }

    #[test]
    fn a_drowned_gradient_wants_nothing() {
        let noise = Noise { variance: 6.0, square_norm: 3.0, debiased_square_norm: -2.0, printed_variance: 1.0 };
        assert_eq!(wanted(0.5, &noise), None);
        assert_eq!(wanted(f64::MAX, &Noise { debiased_square_norm: 1.0, ..noise }), None);
    }
}
