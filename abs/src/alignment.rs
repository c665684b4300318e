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

#[cfg(test)]
mod tests {
    use super::*;

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
