//! Which sample comes next: a shuffle that needs no memory.
//!
//! The global sample index `g` counts every sample ever trained on. With `n` samples an epoch,
//! sample `g` of the run is sample `π(g mod n)` of the text, where `π` is a permutation drawn from
//! the seed and the epoch `g / n`. Nothing but `g` and the seed enters, so the order is the same for
//! every world and batch size, and resuming needs `g` alone.
//!
//! `π` is a balanced Feistel network on the smallest even number of bits that holds `n` values.
//! Such a network is a bijection whatever its round function is; Luby and Rackoff (1988) show that
//! a few rounds of a good one are close to a random permutation. Values of `n` and above are sent
//! through again until they fall below `n` (cycle walking: Black and Rogaway, "Ciphers with
//! Arbitrary Finite Domains", 2002), which stays a bijection of the values below `n`. The network
//! has at most `4n` values, so about four passes are enough on average.

/// The order of samples over all epochs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SampleOrder {
    samples_per_epoch: u64,
    seed: u64,
    half_bits: u32,
}

impl SampleOrder {
    /// The order of `samples_per_epoch` samples under `seed`.
    ///
    /// # Panics
    /// If there are no samples: there is no order of nothing.
    pub fn new(samples_per_epoch: u64, seed: u64) -> Self {
        assert!(samples_per_epoch > 0, "an epoch needs at least one sample");
        let bits = u64::BITS - (samples_per_epoch - 1).leading_zeros();
        Self { samples_per_epoch, seed, half_bits: bits.div_ceil(2).max(1) }
    }

    /// Samples in an epoch.
    pub fn samples_per_epoch(&self) -> u64 {
        self.samples_per_epoch
    }

    /// Which sample of the text, below [`samples_per_epoch`](Self::samples_per_epoch), is sample
    /// `g` of the run.
    pub fn index(&self, g: u64) -> u64 {
        let key = mix(mix(self.seed) ^ (g / self.samples_per_epoch));
        let mut value = g % self.samples_per_epoch;
        loop {
            value = self.permute(value, key);
            if value < self.samples_per_epoch {
                return value;
            }
        }
    }

    /// The Feistel network on `2 * half_bits` bits.
    fn permute(&self, value: u64, key: u64) -> u64 {
        let mask = (1 << self.half_bits) - 1;
        let (mut left, mut right) = (value >> self.half_bits, value & mask);
        for round in 0..ROUNDS {
            let round_key = mix(key.wrapping_add(round));
            (left, right) = (right, left ^ (mix(right ^ round_key) & mask));
        }
        left << self.half_bits | right
    }
}

/// Four rounds suffice in theory for large domains; small ones need more to look random.
const ROUNDS: u64 = 8;

/// One output of SplitMix64 (Steele, Lea and Flood, "Fast Splittable Pseudorandom Number
/// Generators", 2014) for the state `value`.
fn mix(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn epoch(order: &SampleOrder, epoch: u64) -> Vec<u64> {
        let n = order.samples_per_epoch();
        (epoch * n..(epoch + 1) * n).map(|g| order.index(g)).collect()
    }

    fn assert_each_once(samples: &[u64]) {
        let mut sorted = samples.to_vec();
        sorted.sort_unstable();
        assert!(sorted.into_iter().eq(0..samples.len() as u64));
    }

    #[test]
    fn every_epoch_of_a_small_text_visits_each_sample_once() {
        // All sizes around the powers of two, where the width of the network changes.
        for n in (1..70).chain([255, 256, 257, 1000, 1023, 1024, 1025]) {
            for e in 0..3 {
                assert_each_once(&epoch(&SampleOrder::new(n, 7), e));
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn every_epoch_visits_each_sample_once(
            n in 1u64..5000, seed: u64, e in 0u64..1 << 40,
        ) {
            assert_each_once(&epoch(&SampleOrder::new(n, seed), e));
        }

        #[test]
        fn any_index_stays_inside_the_largest_text(g: u64, seed: u64) {
            prop_assert!(SampleOrder::new(u64::MAX, seed).index(g) < u64::MAX);
        }
    }

    #[test]
    fn epochs_and_seeds_differ_and_repeat() {
        let order = SampleOrder::new(1000, 1);
        assert_ne!(epoch(&order, 0), epoch(&order, 1));
        assert_ne!(epoch(&order, 0), epoch(&SampleOrder::new(1000, 2), 0));
        assert_eq!(epoch(&order, 5), epoch(&SampleOrder::new(1000, 1), 5));
        assert_ne!(epoch(&order, 0), (0..1000).collect::<Vec<_>>());
    }

    #[test]
    fn the_first_sample_is_spread_evenly_over_seeds() {
        // Each of 5 samples is first for 1/5 of the seeds: 2000 of 10000, with a standard deviation
        // of sqrt(10000 · 1/5 · 4/5) = 40. The seeds are fixed, so five deviations never flake.
        let mut first = [0u32; 5];
        for seed in 0..10_000 {
            first[SampleOrder::new(5, seed).index(0) as usize] += 1;
        }
        assert!(first.iter().all(|&n| n.abs_diff(2000) < 200), "{first:?}");
    }
}
