//! The norm test: grow while σ̂²/b exceeds η²·Q.

use crate::{Error, Noise};

/// The batch in samples at which the test just holds, σ̂² / (η² Q), neither rounded nor limited. `None` where that is not a
/// finite number: no gradient, or none seen yet. The scale of `noise` cancels, so a weighted sum of several will do.
pub(crate) fn wanted(eta: f64, noise: &Noise) -> Option<f64> {
    let wanted = noise.variance / (eta * eta * noise.square_norm);
    wanted.is_finite().then_some(wanted)
}

pub(crate) fn validate(eta: f64) -> Result<(), Error> {
    if eta.is_finite() && eta > 0.0 {
        return Ok(());
    }
    Err(Error::setting(
        "rule.norm-test.eta",
        eta,
        "a finite number above 0",
        "start from 0.2: the smaller eta, the larger the batches",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wanted_batch_is_noise_over_eta_squared_times_square_norm() {
        let noise = Noise { variance: 6.0, square_norm: 3.0, debiased_square_norm: 2.0 };
        assert_eq!(wanted(0.5, &noise), Some(8.0)); // 6 / (0.25 · 3)
    }

    #[test]
    fn without_a_gradient_nothing_is_wanted() {
        assert_eq!(wanted(0.5, &Noise::default()), None);
        let noise = Noise { variance: 6.0, ..Noise::default() };
        assert_eq!(wanted(0.5, &noise), None);
    }
}
