//! Which source a sample is from, where there are several.
//!
//! Sources have integer weights, which sum to W. Among the first `g` samples a source has its share
//! of `g`, but for less than one sample, for every `g` (Tijdeman, "The chairman assignment
//! problem", 1980). The pattern repeats after W samples, so any sample's source is found at once.

/// Most samples after which a pattern repeats.
pub const LONGEST: u32 = 100_000;

/// A pattern of sources.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Mixture {
    weights: Vec<u32>,
    /// For each place of the pattern: the source, and how many places before it have the same.
    places: Vec<(u16, u32)>,
}

impl Mixture {
    /// # Panics
    /// When there are no weights, one is 0, or they sum to more than [`LONGEST`].
    pub(crate) fn new(weights: &[u32]) -> Mixture {
        let divisor = weights.iter().copied().fold(0, gcd);
        assert!(divisor > 0 && !weights.contains(&0), "weights {weights:?}");
        let weights: Vec<u32> = weights.iter().map(|weight| weight / divisor).collect();
        let total: u32 = weights.iter().sum();
        assert!(total <= LONGEST, "weights {weights:?}");
        let mut counts = vec![0u32; weights.len()];
        let mut places = Vec::with_capacity(total as usize);
        for place in 1..=i64::from(total) {
            let source = next(&weights, i64::from(total), &counts, place);
            places.push((source as u16, counts[source]));
            counts[source] += 1;
        }
        Mixture { weights, places }
    }

    /// The source of sample `g`, and which of its samples that is.
    pub(crate) fn place(&self, g: u64) -> (usize, u64) {
        let total = self.places.len() as u64;
        let (source, before) = self.places[(g % total) as usize];
        (source.into(), g / total * u64::from(self.weights[usize::from(source)]) + u64::from(before))
    }

    /// How many of the first `samples` are from a source.
    pub(crate) fn count(&self, samples: u64, source: usize) -> u64 {
        let total = self.places.len() as u64;
        let rest = self.places[..(samples % total) as usize].iter();
        let rest = rest.filter(|&&(other, _)| usize::from(other) == source).count() as u64;
        samples / total * u64::from(self.weights[source]) + rest
    }
}

/// Of the sources that may come at a place, counted from 1, without being too early, the one that
/// would be too late first.
fn next(weights: &[u32], total: i64, counts: &[u32], place: i64) -> usize {
    let n = weights.len() as i64;
    if n == 1 {
        return 0;
    }
    // A source's share of the places so far, less what it has, times `total`.
    let lag = |source: usize| i64::from(weights[source]) * place - total * i64::from(counts[source]);
    let may_come = |&source: &usize| lag(source) * (2 * n - 2) >= total;
    // Places until it is too late, times (2n − 2).
    let slack = |source: usize| (total * (2 * n - 3) - (2 * n - 2) * lag(source)) as i128;
    let sooner = |&a: &usize, &b: &usize| {
        (slack(a) * i128::from(weights[b])).cmp(&(slack(b) * i128::from(weights[a]))).then(a.cmp(&b))
    };
    (0..weights.len()).filter(may_come).min_by(sooner).expect("lags sum to the total, so one is large enough")
}

fn gcd(a: u32, b: u32) -> u32 {
    if b == 0 { a } else { gcd(b, a % b) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_beginning_has_every_source_by_its_share_but_for_less_than_a_sample(
            weights in prop::collection::vec(1u32..60, 1..6),
            start in 0u64..1000,
        ) {
            let mixture = Mixture::new(&weights);
            let total: u64 = weights.iter().map(|&weight| u64::from(weight)).sum();
            let mut counts = vec![0u64; weights.len()];
            for g in 0..2 * total {
                let (source, index) = mixture.place(g);
                prop_assert_eq!(index, counts[source], "samples of a source come in order");
                counts[source] += 1;
                for (source, &weight) in weights.iter().enumerate() {
                    let apart = (counts[source] * total).abs_diff((g + 1) * u64::from(weight));
                    prop_assert!(apart < total, "{} of {} at {g}", counts[source], weight);
                    prop_assert_eq!(mixture.count(g + 1, source), counts[source]);
                }
            }
            // Far away, too.
            let far = u64::from(u32::MAX) * total + start;
            let (source, index) = mixture.place(far);
            prop_assert_eq!(mixture.count(far, source), index);
        }
    }

    #[test]
    fn weights_are_shares() {
        assert_eq!(Mixture::new(&[7000, 3000]), Mixture::new(&[7, 3]));
        assert_eq!(Mixture::new(&[5]).place(12), (0, 12));
    }
}
