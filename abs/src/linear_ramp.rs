//! The linear ramp: the batch rises in equal increments, as in the training of GPT-3 (Brown et al. 2020) and in Megatron-LM.
//!
//! A function of the samples seen: an increment lasts as many samples as any other, and so fewer steps than the one before.

use crate::{Error, Settings};

/// The batch once `seen` samples have been.
pub(crate) fn batch(settings: &Settings, end: u64, samples: u64, seen: u64) -> u64 {
    let increments = (end - settings.base) / settings.round_to;
    let made = u128::from(seen.min(samples)) * u128::from(increments) / u128::from(samples);
    settings.base + made as u64 * settings.round_to
}

pub(crate) fn validate(settings: &Settings, end: u64, samples: u64) -> Result<(), Error> {
    if !settings.allows(end) {
        return Err(Error::setting(
            "rule.linear-ramp.end",
            end,
            settings.allowed(),
            "change it, or `base`, `cap` or `round_to`",
        ));
    }
    if samples == 0 {
        return Err(Error::setting(
            "rule.linear-ramp.samples",
            samples,
            "at least 1",
            "set it to the samples over which the batch rises",
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Rule;

    fn ramp(end: u64, samples: u64) -> Settings {
        Settings::new(32, 512, 32, Rule::LinearRamp { end, samples })
    }

    /// From 32 to 128 are three increments, so each lasts a third of the ramp's samples.
    #[test]
    fn increments_last_the_same_number_of_samples() {
        let settings = ramp(128, 900);
        settings.validate().unwrap();
        let batches = [0, 299, 300, 599, 600, 899, 900, 1 << 40].map(|seen| batch(&settings, 128, 900, seen));
        assert_eq!(batches, [32, 32, 64, 64, 96, 96, 128, 128]);
    }

    #[test]
    fn a_ramp_to_the_base_stays_there() {
        assert_eq!(batch(&ramp(32, 1), 32, 1, 7), 32);
    }

    #[test]
    fn counts_beyond_64_bits_do_not_wrap() {
        let (base, cap) = (1, 1 << 53);
        let settings = Settings::new(base, cap, 1, Rule::LinearRamp { end: cap, samples: u64::MAX });
        assert_eq!(batch(&settings, cap, u64::MAX, u64::MAX - 1), cap - 1);
    }

    #[test]
    fn ends_that_no_step_may_have_are_refused() {
        for (end, samples, named) in [(16, 1, "end"), (100, 1, "end"), (1024, 1, "end"), (64, 0, "samples")] {
            let message = ramp(end, samples).validate().unwrap_err().to_string();
            assert!(message.contains(&format!("rule.linear-ramp.{named}")), "{message}");
        }
    }
}
