//! The learning rate as a function of samples, never of steps: a larger batch takes longer strides along the same curve.

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

/// How the learning rate falls after the warm-up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Shape {
    /// Along a cosine (Loshchilov and Hutter 2017, without restarts).
    #[default]
    Cosine,
    /// Along a line.
    Linear,
    /// Not at all.
    Constant,
    /// Along a line over the last --cooldown of the samples (Hu et al. 2024: warm-up, stable, decay).
    Wsd,
}

/// Linear warm-up, then down to a share of the peak. A field that a later version added has a
/// default, so that checkpoints of earlier versions stay readable.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Schedule {
    /// Peak learning rate.
    pub(crate) lr: f64,
    /// Share of the samples over which it rises.
    pub(crate) warmup: f64,
    /// Share of the peak at the end.
    pub(crate) final_lr: f64,
    /// Samples of the whole run.
    pub(crate) samples: u64,
    #[serde(default)]
    pub(crate) shape: Shape,
    /// Share of the samples over which it falls at the end, where the shape says so.
    #[serde(default)]
    pub(crate) cooldown: f64,
}

impl Schedule {
    /// The learning rate of a step after which `samples` will have been seen.
    pub(crate) fn at(&self, samples: u64) -> f64 {
        let done = (samples as f64 / self.samples as f64).min(1.0);
        if done < self.warmup {
            return self.lr * done / self.warmup;
        }
        let left = match self.shape {
            Shape::Constant => return self.lr,
            Shape::Wsd => ((1.0 - done) / self.cooldown).min(1.0),
            Shape::Linear => (1.0 - done) / (1.0 - self.warmup),
            Shape::Cosine => {
                let along = (done - self.warmup) / (1.0 - self.warmup);
                0.5 * (1.0 + (std::f64::consts::PI * along).cos())
            }
        };
        self.lr * (self.final_lr + (1.0 - self.final_lr) * left)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schedule(shape: Shape) -> Schedule {
        Schedule { lr: 2.0, warmup: 0.1, final_lr: 0.25, samples: 1000, shape, cooldown: 0.2 }
    }

    #[test]
    fn rises_to_the_peak_and_falls_to_its_share() {
        for (shape, lrs) in [
            (Shape::Cosine, [0.0, 1.0, 2.0, 1.25, 0.5, 0.5]),
            (Shape::Linear, [0.0, 1.0, 2.0, 1.25, 0.5, 0.5]),
            (Shape::Constant, [0.0, 1.0, 2.0, 2.0, 2.0, 2.0]),
            (Shape::Wsd, [0.0, 1.0, 2.0, 2.0, 0.5, 0.5]),
        ] {
            for (samples, lr) in [0, 50, 100, 550, 1000, 2000].into_iter().zip(lrs) {
                assert!((schedule(shape).at(samples) - lr).abs() < 1e-12, "{shape:?} at {samples}");
            }
        }
        // A cosine lies above the line before the middle; the cool-down begins after 800.
        assert!(schedule(Shape::Cosine).at(300) > schedule(Shape::Linear).at(300));
        for (samples, lr) in [(800, 2.0), (900, 1.25)] {
            assert!((schedule(Shape::Wsd).at(samples) - lr).abs() < 1e-12, "at {samples}");
        }
    }

    #[test]
    fn needs_no_warmup() {
        assert_eq!(Schedule { warmup: 0.0, ..schedule(Shape::Cosine) }.at(0), 2.0);
    }

    #[test]
    fn one_of_an_earlier_version_is_a_cosine() {
        let text = r#"{"lr": 2.0, "warmup": 0.1, "final_lr": 0.25, "samples": 1000}"#;
        let read: Schedule = serde_json::from_str(text).unwrap();
        assert_eq!(read, Schedule { cooldown: 0.0, ..schedule(Shape::Cosine) });
    }
}
