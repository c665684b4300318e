//! The noise scale of each unit's gradient.

use pillion_abs::{Noise, Observation};
use pillion_runtime::UnitNorms;

/// Noise of each unit, averaged over steps as the controller averages that of all.
pub(super) struct UnitNoise {
    decay: f64,
    sums: Vec<Noise>,
}

impl UnitNoise {
    /// Weights fall by `decay` from step to step.
    pub(super) fn new(decay: f64) -> UnitNoise {
        UnitNoise { decay, sums: Vec::new() }
    }

    /// Takes in a step, whose groups, samples and tokens are those of all units; returns B_simple of
    /// each unit, in samples.
    pub(super) fn observe(&mut self, norms: &[UnitNorms], step: &Observation) -> Vec<Option<f64>> {
        self.sums.resize(norms.len(), Noise::default());
        for (sum, of_unit) in self.sums.iter_mut().zip(norms) {
            let &UnitNorms { group_square_norms, square_norm } = of_unit;
            // A step that cannot tell changes nothing.
            if let Ok(noise) = (Observation { group_square_norms, square_norm, ..*step }).noise() {
                *sum = sum.discounted(self.decay, &noise);
            }
        }
        self.sums.iter().map(Noise::simple_scale).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_have_their_own_scales_and_the_whole_lies_between() {
        // K = 2 groups of a token each: S and Q as in two dimensions, one of them all noise.
        let step = |s, q| Observation {
            groups: 2,
            samples: 2,
            tokens: 2,
            group_square_norms: s,
            square_norm: q,
            non_finite: 0,
        };
        let units = [UnitNorms { group_square_norms: 10.0, square_norm: 16.0 }, {
            UnitNorms { group_square_norms: 4.0, square_norm: 7.0 }
        }];
        let mut noise = UnitNoise::new(0.9);
        let found = noise.observe(&units, &step(14.0, 23.0));
        let alone =
            |norms: &UnitNorms| step(norms.group_square_norms, norms.square_norm).noise().unwrap().simple_scale();
        assert_eq!(found, units.iter().map(alone).collect::<Vec<_>>());
        let whole = step(14.0, 23.0).noise().unwrap().simple_scale().unwrap();
        let [one, other] = [found[0].unwrap(), found[1].unwrap()];
        assert!(one.min(other) < whole && whole < one.max(other), "{one} {whole} {other}");
        // Of equal steps the average is the same; one of a single group says nothing.
        assert_eq!(noise.observe(&units, &step(14.0, 23.0)).len(), 2);
        let before = noise.observe(&units, &step(14.0, 23.0));
        let single = Observation { groups: 1, ..step(14.0, 23.0) };
        let others = units.map(|unit| UnitNorms { square_norm: 2.0 * unit.square_norm / 3.0, ..unit });
        assert_eq!(noise.observe(&others, &single), before);
        assert_ne!(noise.observe(&others, &step(14.0, 23.0)), before);
    }
}
