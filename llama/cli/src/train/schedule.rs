//! The learning rate as a function of samples, never of steps: a larger batch takes longer strides along the same curve.

use serde::{Deserialize, Serialize};

/// Linear warm-up, then a cosine down to a share of the peak (Loshchilov and Hutter 2017, without restarts).
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
}

impl Schedule {
    /// The learning rate of a step after which `samples` will have been seen.
    pub(crate) fn at(&self, samples: u64) -> f64 {
        let done = (samples as f64 / self.samples as f64).min(1.0);
        if done < self.warmup {
            return self.lr * done / self.warmup;
        }
        let along = (done - self.warmup) / (1.0 - self.warmup);
        let cosine = 0.5 * (1.0 + (std::f64::consts::PI * along).cos());
        self.lr * (self.final_lr + (1.0 - self.final_lr) * cosine)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rises_to_the_peak_and_falls_to_its_share() {
        let schedule = Schedule { lr: 2.0, warmup: 0.1, final_lr: 0.25, samples: 1000 };
        for (samples, lr) in [(0, 0.0), (50, 1.0), (100, 2.0), (550, 1.25), (1000, 0.5), (2000, 0.5)] {
            assert!((schedule.at(samples) - lr).abs() < 1e-12, "at {samples}");
        }
    }

    #[test]
    fn needs_no_warmup() {
        assert_eq!(Schedule { lr: 1.0, warmup: 0.0, final_lr: 0.1, samples: 10 }.at(0), 1.0);
    }
}
