//! Tests that look at where the noise of a gradient points: the inner-product and the orthogonality test of Bollapragada, Byrd and Nocedal, "Adaptive
//! Sampling Strategies for Stochastic Optimization", SIAM Journal on Optimization 28, 2018.
//!
//! The norm test bounds all of the noise. Of that, the part along the gradient decides whether a step descends; the part across it only makes the step longer. With K groups of m samples,
//! of mean gradients g_k and g in the mean, and Q = ‖g‖²:
//!
//! ```text
//! V_ip = m/(K−1) · Σ_k (⟨g_k, g⟩ − Q)²              along g, times Q
//! V_⊥  = m/(K−1) · Σ_k ‖g_k − (⟨g_k, g⟩/Q) g‖²      across it
//! σ̂²   = V_ip/Q + V_⊥
//! inner-product test:  b' = ⌈V_ip / (θ² Q²)⌉         orthogonality test:  b' = ⌈V_⊥ / (ν² Q)⌉
//! ```

use serde::Serialize;
use statrs::distribution::{ContinuousCDF, FisherSnedecor, StudentsT};

use crate::Observation;

/// The noise of a gradient in two parts.
#[derive(Serialize, Clone, Copy, PartialEq, Debug)]
pub struct Alignment {
    /// V_ip/Q², in samples: over θ² it is the batch that the inner-product test asks for.
    pub along: f64,
    /// V_⊥/Q, in samples: over ν² it is the batch that the orthogonality test asks for.
    pub across: f64,
}

impl Alignment {
    /// From a step's sums and the products ⟨G_k, Σ_j G_j⟩ of its groups, which have as many tokens each. `None` where there are no such sums: fewer than two groups, another number of
    /// products, a gradient that is zero or not finite.
    pub fn of(observation: &Observation, products: &[f64]) -> Option<Alignment> {
        let &Observation { groups, samples, tokens, group_square_norms, square_norm, .. } = observation;
        if groups < 2 || products.len() as u64 != groups || samples == 0 {
            return None;
        }
        let (groups, samples) = (groups as f64, samples as f64);
        // ⟨g_k, g⟩/Q = K⟨G_k, G⟩/‖G‖², whose mean is 1.
        let shares = products.iter().map(|product| groups * product / square_norm);
        let along = shares.clone().map(|share| (share - 1.0).powi(2)).sum::<f64>();
        // Σ‖g_k‖²/Q with n_k = N/K: K·(Σ‖G_k‖²/n_k)·N/‖G‖².
        let squares = groups * group_square_norms * tokens as f64 / square_norm;
        let across = squares - shares.map(|share| share * share).sum::<f64>();
        let scale = samples / groups / (groups - 1.0);
        let alignment = Alignment { along: scale * along, across: scale * across };
        (alignment.along.is_finite() && alignment.across.is_finite()).then_some(alignment)
    }
}

/// What passes a norm test of single coordinates though there is no gradient.
///
/// A coordinate passes where its noise in the batch's gradient is at most η times its gradient:
/// s²/K ≤ η²·ḡ², where ḡ is the mean of K equal groups' gradients there and s² their variance. That
/// is |t| ≥ 1/η for t = ḡ/(s/√K). Where the true gradient is zero and the noise normal, t has
/// Student's distribution with K − 1 degrees of freedom, whatever the variance of the coordinate.
///
/// A measured share says something by what it has above this one.
#[derive(Serialize, Clone, Copy, PartialEq, Debug)]
pub struct ByChance {
    /// Share of the coordinates that pass: P(|t_{K−1}| ≥ 1/η).
    pub coordinates: f64,
    /// Their share of the gradient's square: E[ḡ²; |t| ≥ 1/η] / E ḡ². Weighting a normal ḡ by its
    /// square makes ḡ²/σ² chi-square with 3 degrees of freedom in place of 1, so t²/3 has Fisher's
    /// distribution: P(F_{3,K−1} ≥ 1/(3η²)).
    pub mass: f64,
}

impl ByChance {
    /// For K = `groups` of equal size. `None` for fewer than two groups, or an η that is no
    /// positive number.
    pub fn of(groups: u64, eta: f64) -> Option<ByChance> {
        if groups < 2 || !(eta.is_finite() && eta > 0.0) {
            return None;
        }
        let freedom = (groups - 1) as f64;
        let t = StudentsT::new(0.0, 1.0, freedom).ok()?;
        let f = FisherSnedecor::new(3.0, freedom).ok()?;
        Some(ByChance { coordinates: 2.0 * t.sf(1.0 / eta), mass: f.sf(1.0 / (3.0 * eta * eta)) })
    }
}

#[cfg(test)]
mod tests {
    use rand_chacha::ChaCha8Rng;
    use rand_chacha::rand_core::SeedableRng;
    use rand_distr::{Distribution, StandardNormal};

    use super::*;

    /// With two groups t is a ratio of two normal numbers, so its angle is uniform: P(|t| ≥ x) is
    /// 1 − (2/π) arctan x.
    #[test]
    fn of_two_groups_noise_passes_by_its_angle() {
        for eta in [0.1f64, 0.5, 0.9, 1.0, 3.0] {
            let expected = 1.0 - 2.0 / std::f64::consts::PI * (1.0 / eta).atan();
            let found = ByChance::of(2, eta).unwrap().coordinates;
            assert!((found - expected).abs() < 1e-12, "{eta}: {found} and {expected}");
        }
        assert_eq!(format!("{:.2}", ByChance::of(2, 0.9).unwrap().coordinates), "0.47");
        for (groups, eta) in [(1, 0.9), (2, 0.0), (2, f64::NAN), (2, f64::INFINITY)] {
            assert_eq!(ByChance::of(groups, eta), None);
        }
    }

    /// 40,000 coordinates of pure noise, of variances from 1 to 4: the standard error of a share p
    /// is √(p(1 − p)/40,000) ≤ 0.0025, that of the mass at most 0.004 (squares of a normal number
    /// vary by twice their mean's square), and 0.02 is five of the larger.
    #[test]
    fn as_much_noise_passes_as_is_said() {
        let mut random = ChaCha8Rng::seed_from_u64(1);
        for (groups, eta) in [(2, 0.9), (3, 0.6), (8, 0.5), (16, 0.9)] {
            let (mut passing, mut mass, mut all) = (0.0, 0.0, 0.0);
            let count = 40_000;
            for coordinate in 0..count {
                let scale = f64::from(1 + coordinate % 4).sqrt();
                let mut normal = || -> f64 { StandardNormal.sample(&mut random) };
                let values: Vec<f64> = (0..groups).map(|_| scale * normal()).collect();
                let mean = values.iter().sum::<f64>() / groups as f64;
                let variance = values.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / (groups - 1) as f64;
                all += mean * mean;
                if variance / groups as f64 <= eta * eta * mean * mean {
                    passing += 1.0;
                    mass += mean * mean;
                }
            }
            let found = ByChance::of(groups, eta).unwrap();
            let share = passing / f64::from(count);
            assert!((share - found.coordinates).abs() < 0.02, "{groups}, {eta}: {share} and {found:?}");
            assert!((mass / all - found.mass).abs() < 0.02, "{groups}, {eta}: {} and {found:?}", mass / all);
        }
    }

    /// Two groups of one sample of two tokens: G = (2, 2) and (2, −2) + (4, 0), so ΣG = (8, 0), N = 4, g = (2, 0), Q = 4; g_k = (1, 1) and (3, −1).
    /// ⟨g_k, g⟩ = 2 and 6: V_ip = (4 + 4) = 8, of Q² a half. Across lie (0, 1) and (0, −1): V_⊥ = 2, of Q a half. σ̂² = 8/4 + 2 = 4.
    #[test]
    fn two_groups_are_split_along_and_across() {
        let observation = Observation {
            groups: 2,
            samples: 2,
            tokens: 4,
            group_square_norms: 8.0 / 2.0 + 40.0 / 2.0,
            square_norm: 64.0,
            non_finite: 0,
        };
        let alignment = Alignment::of(&observation, &[16.0, 48.0]).unwrap();
        assert_eq!(alignment, Alignment { along: 0.5, across: 0.5 });
        let noise = observation.noise().unwrap();
        assert_eq!(noise.variance / noise.square_norm, alignment.along + alignment.across);
    }

    #[test]
    fn without_a_gradient_or_its_products_there_is_none() {
        let observation =
            Observation { groups: 2, samples: 2, tokens: 2, group_square_norms: 1.0, square_norm: 0.0, non_finite: 0 };
        assert_eq!(Alignment::of(&observation, &[0.0, 0.0]), None);
        let observation = Observation { square_norm: 1.0, ..observation };
        assert_eq!(Alignment::of(&observation, &[1.0]), None);
        assert_eq!(Alignment::of(&observation, &[f64::NAN, 1.0]), None);
    }
}
