//! The axes of a plot: their ranges, round ticks, and the ticks' labels.

/// How an axis maps values to places.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scale {
    /// Equal differences are equal lengths.
    Linear,
    /// Equal ratios are equal lengths.
    Log,
}

impl Scale {
    /// Whether a value has a place: a finite one, and on a logarithmic scale one above zero.
    pub(crate) fn has(self, value: f64) -> bool {
        value.is_finite() && (self == Scale::Linear || value >= f64::MIN_POSITIVE)
    }
}

/// An axis over finite values, `low` below `high`.
#[derive(Clone, Debug)]
pub(crate) struct Axis {
    pub(crate) low: f64,
    pub(crate) high: f64,
    pub(crate) scale: Scale,
}

/// A tick and what stands beside it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Tick {
    pub(crate) value: f64,
    pub(crate) label: String,
}

/// Ranges are at least this share of their values wide, so that ticks differ.
const LEAST_SHARE: f64 = 1e-9;
/// Share of a step by which a tick may seem to lie beyond the ends, by rounding.
const SLACK: f64 = 1e-9;
/// Half the width of a range around a single value, as a share of it.
const AROUND: f64 = 0.05;

impl Axis {
    /// An axis that has all values; none where no finite value has a place on it.
    pub(crate) fn of(values: impl Iterator<Item = f64>, scale: Scale) -> Option<Axis> {
        let fold = |range: (f64, f64), value: f64| (range.0.min(value), range.1.max(value));
        let (low, high) = values.filter(|value| scale.has(*value)).fold((f64::INFINITY, f64::NEG_INFINITY), fold);
        (low <= high).then(|| Axis::over(low, high, scale))
    }

    /// An axis from `low` to `high`, or somewhat beyond where these are nearly the same.
    fn over(low: f64, high: f64, scale: Scale) -> Axis {
        let most = f64::MAX;
        if scale == Scale::Log {
            let (low, high) = if high / low < 1.5 { (low / 2.0, (high * 2.0).min(most)) } else { (low, high) };
            return Axis { low: low.max(f64::MIN_POSITIVE), high: high.max(2.0 * f64::MIN_POSITIVE), scale };
        }
        let largest = low.abs().max(high.abs());
        let is_wide = high / 2.0 - low / 2.0 > (LEAST_SHARE * largest).max(1e-300);
        let around = if largest > 1e-290 { AROUND * largest } else { 0.5 };
        let (low, high) = if is_wide { (low, high) } else { ((low - around).max(-most), (high + around).min(most)) };
        Axis { low, high, scale }
    }

    /// The axis with room at both ends, so that lines do not lie on the frame.
    pub(crate) fn with_margin(self, share: f64) -> Axis {
        let Axis { low, high, scale } = self;
        let (low, high) = match scale {
            Scale::Log => {
                let margin = (high.ln() - low.ln()) * share;
                ((low.ln() - margin).exp().max(f64::MIN_POSITIVE), (high.ln() + margin).exp().min(f64::MAX))
            }
            Scale::Linear => {
                let margin = high * share - low * share;
                ((low - margin).max(-f64::MAX), (high + margin).min(f64::MAX))
            }
        };
        Axis { low, high, scale }
    }

    /// Where a value lies: 0 at the lower end, 1 at the upper one.
    pub(crate) fn place(&self, value: f64) -> f64 {
        let Axis { low, high, scale } = *self;
        match scale {
            // Halves, because the difference of the largest numbers is infinite.
            Scale::Linear => (value / 2.0 - low / 2.0) / (high / 2.0 - low / 2.0),
            Scale::Log => (value.ln() - low.ln()) / (high.ln() - low.ln()),
        }
    }

    /// At most `most` ticks at round numbers, at least two of them being possible.
    pub(crate) fn ticks(&self, most: usize) -> Vec<Tick> {
        if self.scale == Scale::Log {
            let values = self.round_on_log(most);
            if values.len() > 1 {
                let tick = |value| Tick { value, label: label(value, value, value) };
                return values.into_iter().map(tick).collect();
            }
        }
        let (step, mut values) = self.multiples(most);
        // With the slack, 0 may be one of them.
        values.retain(|value| self.scale.has(*value));
        let largest = values.iter().fold(0.0f64, |largest, value| largest.max(value.abs()));
        values.into_iter().map(|value| Tick { value, label: label(value, step, largest) }).collect()
    }

    /// A step of 1, 2 or 5 times a power of ten, and its multiples.
    fn multiples(&self, most: usize) -> (f64, Vec<f64>) {
        let most = most.max(1) as f64;
        let least = self.high / most - self.low / most;
        let power = 10f64.powf(least.log10().floor());
        let steps = [1.0, 2.0, 5.0, 10.0, 20.0].map(|factor| factor * power);
        let count = |step: f64| (self.high / step + SLACK).floor() - (self.low / step - SLACK).ceil() + 1.0;
        let step = steps.into_iter().find(|&step| count(step) <= most).unwrap_or(steps[4]);
        if !(step.is_normal() && count(step).is_finite()) {
            return (step, Vec::new());
        }
        let first = (self.low / step - SLACK).ceil();
        // A product of a whole number, so that ticks are not off by sums of roundings. Adding zero
        // makes -0 a 0.
        (step, (0..count(step).max(0.0) as u64).map(|number| (first + number as f64) * step + 0.0).collect())
    }

    /// Powers of ten, or 1, 2 and 5 times these where there is room.
    fn round_on_log(&self, most: usize) -> Vec<f64> {
        let (first, last) = (self.low.log10().floor() as i32, self.high.log10().ceil() as i32);
        let within = |factors: &[f64], every: usize| {
            let values = (first..=last)
                .step_by(every)
                .flat_map(|power| factors.iter().map(move |factor| factor * 10f64.powi(power)));
            values.filter(|value| (self.low..=self.high).contains(value)).collect::<Vec<f64>>()
        };
        let sets = [&[1.0, 2.0, 5.0][..], &[1.0, 3.0], &[1.0]].map(|factors| within(factors, 1));
        if let Some(values) = sets.into_iter().find(|values| values.len() <= most) {
            return values;
        }
        within(&[1.0], ((last - first + 1) as usize).div_ceil(most.max(1)))
    }
}

/// What stands beside a tick among ticks `step` apart, the largest of which is `largest`: whole
/// numbers without a point, thousands with k, millions with M.
fn label(value: f64, step: f64, largest: f64) -> String {
    if value == 0.0 {
        return "0".to_owned();
    }
    let (unit, suffix) = match value.abs() {
        size if !(1e-3..1e15).contains(&largest) => return scientific(value, (step / size).log10()),
        size if size >= 1e12 => (1e12, "T"),
        size if size >= 1e9 => (1e9, "G"),
        size if size >= 1e6 => (1e6, "M"),
        size if size >= 1e3 => (1e3, "k"),
        _ => (1.0, ""),
    };
    format!("{}{suffix}", trimmed(value / unit, (step / unit).min(value.abs() / unit)))
}

/// A number to the digit that `step` has first, without zeros at its end.
fn trimmed(value: f64, step: f64) -> String {
    let digits = (-(step * 1.000_001).log10().floor()).clamp(0.0, 17.0) as usize;
    let text = format!("{value:.digits$}");
    match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.').to_owned(),
        false => text,
    }
}

/// A number such as 2.5e-4; `digits` is the logarithm of the step as a share of it.
fn scientific(value: f64, digits: f64) -> String {
    let digits = (-digits).ceil().clamp(0.0, 17.0) as usize;
    let text = format!("{value:.digits$e}");
    let (mantissa, exponent) = text.split_once('e').expect("it has an exponent");
    let mantissa = if mantissa.contains('.') { mantissa.trim_end_matches('0').trim_end_matches('.') } else { mantissa };
    format!("{mantissa}e{exponent}")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn labels(low: f64, high: f64, scale: Scale) -> Vec<String> {
        let axis = Axis::of([low, high].into_iter(), scale).unwrap();
        axis.ticks(6).into_iter().map(|tick| tick.label).collect()
    }

    #[test]
    fn labels_are_whole_numbers_with_suffixes_where_they_can_be() {
        let linear = |low, high| labels(low, high, Scale::Linear);
        assert_eq!(linear(0.0, 100.0), ["0", "20", "40", "60", "80", "100"]);
        assert_eq!(linear(0.0, 2000.0), ["0", "500", "1k", "1.5k", "2k"]);
        assert_eq!(linear(-1.0, 1.0), ["-1", "-0.5", "0", "0.5", "1"]);
        assert_eq!(linear(1.72, 1.7205), ["1.72", "1.7201", "1.7202", "1.7203", "1.7204", "1.7205"]);
        assert_eq!(linear(0.0, 3e-4), ["0", "1e-4", "2e-4", "3e-4"]);
        assert_eq!(linear(2.5e9, 2.6e9), ["2.5G", "2.52G", "2.54G", "2.56G", "2.58G", "2.6G"]);
        assert_eq!(linear(8.0, 8.0), ["7.6", "7.8", "8", "8.2", "8.4"]);
        assert_eq!(labels(8.0, 64.0, Scale::Log), ["10", "20", "50"]);
        assert_eq!(labels(1.0, 1e6, Scale::Log), ["1", "100", "10k", "1M"]);
        assert_eq!(labels(1.0, 1500.0, Scale::Log), ["1", "10", "100", "1k"]);
    }

    #[test]
    fn nothing_finite_has_no_axis() {
        for value in [f64::NAN, f64::INFINITY] {
            assert!(Axis::of([value].into_iter(), Scale::Linear).is_none());
        }
        assert!(Axis::of([0.0, -1.0].into_iter(), Scale::Log).is_none());
        assert!(Axis::of(std::iter::empty(), Scale::Linear).is_none());
    }

    /// The number that a label stands for.
    fn read(label: &str) -> f64 {
        let suffixes = [("k", "e3"), ("M", "e6"), ("G", "e9"), ("T", "e12")];
        let found = suffixes.iter().find_map(|(suffix, power)| Some(format!("{}{power}", label.strip_suffix(suffix)?)));
        found.as_deref().unwrap_or(label).parse().unwrap()
    }

    proptest! {
        /// Any two values, also the largest, the smallest and nearly equal ones.
        #[test]
        fn ticks_are_few_ordered_within_and_labelled_with_their_values(
            low in proptest::num::f64::NORMAL | proptest::num::f64::SUBNORMAL | proptest::num::f64::ZERO,
            width in prop_oneof![Just(0.0), 1e-12..1e12f64, proptest::num::f64::POSITIVE],
            is_log: bool,
            most in 2usize..12,
        ) {
            let scale = if is_log { Scale::Log } else { Scale::Linear };
            let high = low + width;
            let Some(axis) = Axis::of([low, high].into_iter(), scale) else { return Ok(()) };
            let axis = axis.with_margin(0.04);
            prop_assert!(axis.low < axis.high && axis.low.is_finite() && axis.high.is_finite(), "{axis:?}");
            if scale.has(low) {
                prop_assert!((0.0..=1.0).contains(&axis.place(low)), "{axis:?} {low}");
            }
            let ticks = axis.ticks(most);
            prop_assert!(ticks.len() <= most, "{axis:?} {ticks:?}");
            for pair in ticks.windows(2) {
                prop_assert!(pair[0].value < pair[1].value && pair[0].label != pair[1].label, "{ticks:?}");
            }
            for Tick { value, label } in &ticks {
                prop_assert!(!label.ends_with(".0") && label != "-0", "{label}");
                let place = axis.place(*value);
                prop_assert!((-1e-6..=1.0 + 1e-6).contains(&place), "{axis:?} {value}");
                prop_assert!((axis.place(read(label)) - place).abs() < 0.01, "{axis:?} {value} {label}");
            }
        }
    }
}
