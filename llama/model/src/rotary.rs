//! The angles by which positions rotate queries and keys.

use serde::{Deserialize, Serialize};

use crate::config::Config;

/// How the frequencies of the rotary angles are scaled, under Hugging Face's names.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "rope_type", rename_all = "lowercase", deny_unknown_fields)]
pub enum RopeScaling {
    /// Every frequency is divided by the factor (Chen et al. 2023).
    Linear {
        /// By how much longer samples may be.
        factor: f64,
    },
    /// That of Llama 3.1 (Grattafiori et al. 2024): a frequency whose wavelength is below
    /// `original_max_position_embeddings / high_freq_factor` stays, one whose wavelength is above
    /// `original_max_position_embeddings / low_freq_factor` is divided by the factor, and those
    /// between are interpolated.
    Llama3 {
        /// What low frequencies are divided by.
        factor: f64,
        /// See above.
        low_freq_factor: f64,
        /// See above.
        high_freq_factor: f64,
        /// Tokens of the longest sample of the pretraining.
        original_max_position_embeddings: u64,
    },
}

impl RopeScaling {
    /// That of Llama 3.1 and 3.2, which differ in the factor.
    pub(crate) const fn llama3(factor: f64) -> RopeScaling {
        RopeScaling::Llama3 {
            factor,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 8192,
        }
    }

    /// Says which number cannot be.
    pub(crate) fn validate(&self) -> Result<(), String> {
        let positive = |name: &str, value: f64| match value > 0.0 && value.is_finite() {
            true => Ok(()),
            false => Err(format!("has the {name} {value}: it must be above 0 and finite")),
        };
        match *self {
            RopeScaling::Linear { factor } => positive("factor", factor),
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => {
                positive("factor", factor)?;
                positive("low_freq_factor", low_freq_factor)?;
                positive("high_freq_factor", high_freq_factor)?;
                positive("original_max_position_embeddings", original_max_position_embeddings as f64)?;
                match low_freq_factor < high_freq_factor {
                    true => Ok(()),
                    false => Err(format!("has low_freq_factor {low_freq_factor}, which is not below high_freq_factor")),
                }
            }
        }
    }

    /// The scaled frequency, in radians a token.
    fn scale(&self, frequency: f64) -> f64 {
        match *self {
            RopeScaling::Linear { factor } => frequency / factor,
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => {
                let turns = original_max_position_embeddings as f64 * frequency / std::f64::consts::TAU;
                let kept = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor);
                let kept = kept.clamp(0.0, 1.0);
                kept * frequency + (1.0 - kept) * frequency / factor
            }
        }
    }
}

/// cos and sin of t·f(i), `[T, D/2]` each, rounded once from f64: f(i) is θ^(−2i/D), scaled.
pub(crate) fn tables(config: &Config, seq: usize) -> (Vec<f32>, Vec<f32>) {
    let dim = config.head_dim();
    let frequencies: Vec<f64> = (0..dim / 2)
        .map(|i| config.rope_theta.powf(-2.0 * i as f64 / dim as f64))
        .map(|frequency| config.rope_scaling.map_or(frequency, |scaling| scaling.scale(frequency)))
        .collect();
    let angles = (0..seq).flat_map(|position| frequencies.iter().map(move |frequency| position as f64 * frequency));
    angles.map(|angle| (angle.cos() as f32, angle.sin() as f32)).unzip()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn llama3_keeps_high_frequencies_divides_low_ones_and_joins_them_without_a_jump() {
        let scaling = RopeScaling::llama3(8.0);
        let of_wavelength = |tokens: f64| std::f64::consts::TAU / tokens;
        for (tokens, divisor) in [(10.0, 1.0), (2047.0, 1.0), (8193.0, 8.0), (1e6, 8.0)] {
            let frequency = of_wavelength(tokens);
            let scaled = scaling.scale(frequency);
            assert!((scaled * divisor / frequency - 1.0).abs() < 1e-12, "{tokens} tokens");
        }
        let mut before = scaling.scale(of_wavelength(2048.0));
        for tokens in 2049..8192 {
            let scaled = scaling.scale(of_wavelength(f64::from(tokens)));
            assert!(scaled < before && scaled > before * 0.995, "{tokens} tokens");
            before = scaled;
        }
    }

    #[test]
    fn impossible_scalings_are_named() {
        let llama3 = |low, high| RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: low,
            high_freq_factor: high,
            original_max_position_embeddings: 8192,
        };
        assert!(RopeScaling::Linear { factor: 0.0 }.validate().unwrap_err().contains("factor 0"));
        assert!(llama3(4.0, 4.0).validate().unwrap_err().contains("not below"));
        assert!(llama3(f64::NAN, 4.0).validate().unwrap_err().contains("low_freq_factor NaN"));
        llama3(1.0, 4.0).validate().unwrap();
    }
}
