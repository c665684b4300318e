//! The norm test: grow while σ̂²/b exceeds η²·Q.

use serde::{Deserialize, Serialize};

use crate::{Error, Noise};

/// Which noise the norm test compares with which gradient.
#[derive(Serialize, Deserialize, Clone, Copy, PartialEq, Eq, Default, Debug)]
#[serde(rename_all = "kebab-case")]
#[cfg_attr(feature = "clap", derive(clap::ValueEnum))]
pub enum Variant {
    /// b' = σ̂²/(η²Q), both as measured. Q contains the noise of the batch itself, so this variant
    /// asks for less than the true gradient would: in expectation for at most b/η² samples,
    /// whatever the noise. η must therefore be below 1
    /// ([`Settings::check_growth`](crate::Settings::check_growth)).
    #[default]
    #[cfg_attr(feature = "clap", value(help = "Noise of a sample, unbiased, with the batch's gradient"))]
    Unbiased,
    /// b' = B_simple/η²: Q less its noise, |Ĝ|², in its place.
    #[cfg_attr(
        feature = "clap",
        value(help = "Noise of a sample with an estimate of the true gradient: the batch's, less its noise")
    )]
    Debiased,
    /// b' = ‖V̂‖₁/(η²Q) as the paper prints it, to compare with. In expectation at most (K − 1)/η²
    /// for K groups, whatever the batch: see the crate's documentation.
    #[cfg_attr(
        feature = "clap",
        value(
            help = "What the paper prints, to compare with: asks for at most (groups − 1)/η² samples, whatever the batch"
        )
    )]
    PaperLiteral,
}

/// The batch in samples at which the test just holds, neither rounded nor limited. `None` where that is not a
/// finite number: no gradient, or none seen yet. The scale of `noise` cancels, so a weighted sum of several will do.
pub(crate) fn wanted(eta: f64, variant: Variant, noise: &Noise) -> Option<f64> {
    let relative = match variant {
        Variant::Unbiased => noise.variance / noise.square_norm,
        Variant::Debiased => noise.simple_scale()?,
        Variant::PaperLiteral => noise.printed_variance / noise.square_norm,
    };
    let wanted = relative / (eta * eta);
    wanted.is_finite().then_some(wanted)
}

pub(crate) fn validate(eta: f64) -> Result<(), Error> {
    Error::unless_factor("rule.norm-test.eta", eta, "start from 0.9: the smaller eta, the larger the batches")
}

/// Refuses an η by which no batch is expected to grow.
///
/// The unbiased variant asks for E σ̂²/(η² E Q) samples in expectation, numerator and denominator
/// each averaged. E Q = |G|² + σ²/b is at least σ²/b, so that is at most b/η². With η ≥ 1 it is at
/// most b, and equals b only where the true gradient is zero and η is 1. A batch could then grow
/// by the scatter of its measurements alone.
///
/// The other variants have no such η: `Debiased` divides by an estimate of |G|², which may be as
/// small as it likes against σ²/b, and the bound of `PaperLiteral` depends on the number of groups.
pub(crate) fn check_growth(eta: f64, variant: Variant) -> Result<(), Error> {
    if variant != Variant::Unbiased || eta < 1.0 {
        return Ok(());
    }
    Err(Error::setting(
        "rule.norm-test.eta",
        eta,
        "a number below 1: the square norm that the unbiased variant divides by contains the noise of the batch b \
         itself, so in expectation it asks for at most b/eta² samples, which is no growth",
        "choose an eta below 1, such as 0.9, or the variant debiased, which takes that noise out",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    const VARIANTS: [Variant; 3] = [Variant::Unbiased, Variant::Debiased, Variant::PaperLiteral];

    #[test]
    fn wanted_batch_is_noise_over_eta_squared_times_square_norm() {
        let noise = Noise { variance: 6.0, square_norm: 3.0, debiased_square_norm: 2.0, printed_variance: 1.5 };
        let wanted = VARIANTS.map(|variant| wanted(0.5, variant, &noise).unwrap());
        assert_eq!(wanted, [8.0, 12.0, 2.0]); // 6 / (0.25 · 3), 6 / (0.25 · 2), 1.5 / (0.25 · 3)
    }

    #[test]
    fn without_a_gradient_nothing_is_wanted() {
        let noise = Noise { variance: 6.0, printed_variance: 6.0, ..Noise::default() };
        for variant in VARIANTS {
            assert_eq!(wanted(0.5, variant, &Noise::default()), None);
            assert_eq!(wanted(0.5, variant, &noise), None);
        }
    }
}
