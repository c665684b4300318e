//! How the learning rate answers a batch that grows.

use serde::{Deserialize, Serialize};

/// The factor on the scheduled learning rate as a function of the batch.
#[derive(Serialize, Deserialize, Clone, Copy, PartialEq, Eq, Default, Debug)]
#[serde(rename_all = "kebab-case")]
#[cfg_attr(feature = "clap", derive(clap::ValueEnum))]
pub enum Coupling {
    /// None: the schedule alone, as in Lau et al. 2025.
    #[default]
    #[cfg_attr(feature = "clap", value(help = "Not at all"))]
    None,
    /// √(batch/base): keeps the variance of an Adam step, whose size does not depend on the gradient's (Malladi et al. 2022).
    #[cfg_attr(feature = "clap", value(help = "With the square root of batch over --batch"))]
    Sqrt,
    /// batch/base: keeps the expected progress of SGD a sample (Goyal et al. 2017).
    #[cfg_attr(feature = "clap", value(help = "With batch over --batch"))]
    Linear,
}

impl Coupling {
    /// The factor for a step of `batch` samples where the schedule is meant for one of `base`.
    pub fn factor(self, batch: u64, base: u64) -> f64 {
        let ratio = batch as f64 / base as f64;
        match self {
            Coupling::None => 1.0,
            Coupling::Sqrt => ratio.sqrt(),
            Coupling::Linear => ratio,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn factors_of_a_batch_nine_times_the_base() {
        let factors = [Coupling::None, Coupling::Sqrt, Coupling::Linear].map(|coupling| coupling.factor(72, 8));
        assert_eq!(factors, [1.0, 3.0, 9.0]);
    }
}
