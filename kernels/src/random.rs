//! Counter-based randomness: a value depends on (seed, stream, index) and on nothing else, so a weight starts with the same value
//! on any rank of any world, whichever thread makes it.

/// 64 well-mixed bits of (seed, stream, index).
///
/// Two rounds of the finaliser of splitmix64 (Steele, Lea and Flood 2014), which is a bijection with good avalanche.
pub fn bits(seed: u64, stream: u64, index: u64) -> u64 {
    let key = mix(seed ^ mix(stream.wrapping_add(GOLDEN)));
    mix(key.wrapping_add(index.wrapping_mul(GOLDEN)))
}

/// A uniform number in [0, 1).
pub fn uniform(seed: u64, stream: u64, index: u64) -> f64 {
    (bits(seed, stream, index) >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
}

/// A standard normal number (Box and Muller 1958).
pub fn normal(seed: u64, stream: u64, index: u64) -> f64 {
    let radius = (-2.0 * (1.0 - uniform(seed, stream, 2 * index)).ln()).sqrt();
    radius * (std::f64::consts::TAU * uniform(seed, stream, 2 * index + 1)).cos()
}

/// 2⁶⁴ divided by the golden ratio, odd: steps of it visit every u64.
const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

fn mix(mut x: u64) -> u64 {
    for _ in 0..2 {
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^= x >> 31;
    }
    x
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn normal_has_mean_zero_and_variance_one() {
        const COUNT: u64 = 100_000;
        let values: Vec<f64> = (0..COUNT).map(|index| normal(7, 3, index)).collect();
        let mean = values.iter().sum::<f64>() / COUNT as f64;
        let variance = values.iter().map(|x| x * x).sum::<f64>() / COUNT as f64;
        // Five standard errors: 1/√n for the mean, √(2/n) for the variance.
        assert!(mean.abs() < 5.0 / (COUNT as f64).sqrt(), "mean {mean}");
        assert!((variance - 1.0).abs() < 5.0 * (2.0 / COUNT as f64).sqrt(), "variance {variance}");
    }

    #[test]
    fn seeds_and_streams_differ() {
        let first: Vec<u64> = (0..64).map(|index| bits(1, 1, index)).collect();
        for (seed, stream) in [(1, 2), (2, 1), (0, 1), (1, 0)] {
            assert!((0..64).all(|index| bits(seed, stream, index) != first[index as usize]));
        }
    }
}
