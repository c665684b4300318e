//! The P-ary sum inside a reduce-scatter: every rank's chunk read once, the result written once.

use half::bf16;

use super::vectorized;

/// out = Σ inputs, or out += Σ inputs; f32. The sum runs in the order of `inputs`, and an earlier `out` is added last.
///
/// # Panics
/// When lengths differ or there is no input.
pub fn sum_f32(out: &mut [f32], inputs: &[&[f32]], accumulate: bool) {
    sum(out, inputs, accumulate, |x| x);
}

/// As [`sum_f32`] in f64.
pub fn sum_f64(out: &mut [f64], inputs: &[&[f64]], accumulate: bool) {
    sum(out, inputs, accumulate, |x| x);
}

/// As [`sum_f32`] for bf16 inputs into f32: each value is exact in f32, so nothing rounds but the sum.
pub fn sum_bf16_to_f32(out: &mut [f32], inputs: &[&[bf16]], accumulate: bool) {
    sum(out, inputs, accumulate, |x: bf16| f32::from_bits(u32::from(x.to_bits()) << 16));
}

/// Elements summed at a time: short enough for the accumulator to stay in the first-level cache, long enough to stream.
const BLOCK: usize = 1024;

fn sum<I: Copy, A: Copy + Default + std::ops::Add<Output = A>>(
    out: &mut [A],
    inputs: &[&[I]],
    accumulate: bool,
    widen: impl Fn(I) -> A + Copy,
) {
    let (first, rest) = inputs.split_first().expect("a sum of at least one input");
    assert!(inputs.iter().all(|input| input.len() == out.len()), "inputs and output of a sum have one length");
    vectorized(|| {
        let mut block = [A::default(); BLOCK];
        for (index, out) in out.chunks_mut(BLOCK).enumerate() {
            let range = index * BLOCK..index * BLOCK + out.len();
            let block = &mut block[..out.len()];
            for (total, &x) in block.iter_mut().zip(&first[range.clone()]) {
                *total = widen(x);
            }
            for input in rest {
                for (total, &x) in block.iter_mut().zip(&input[range.clone()]) {
                    *total = *total + widen(x);
                }
            }
            for (out, &total) in out.iter_mut().zip(block.iter()) {
                *out = if accumulate { *out + total } else { total };
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random;

    fn values(len: usize, stream: u64) -> Vec<f32> {
        (0..len as u64).map(|index| random::normal(3, stream, index) as f32).collect()
    }

    #[test]
    fn sums_run_in_the_order_of_the_inputs_and_add_the_old_value_last() {
        for len in [0, 1, 7, BLOCK - 1, BLOCK, 3 * BLOCK + 5] {
            for count in 1..6u64 {
                let inputs: Vec<Vec<f32>> = (0..count).map(|stream| values(len, stream)).collect();
                let slices: Vec<&[f32]> = inputs.iter().map(|input| &input[..]).collect();
                let before = values(len, 99);
                for accumulate in [false, true] {
                    let mut out = before.clone();
                    sum_f32(&mut out, &slices, accumulate);
                    for index in 0..len {
                        let total = inputs[1..].iter().fold(inputs[0][index], |total, input| total + input[index]);
                        let expected = if accumulate { before[index] + total } else { total };
                        assert_eq!(out[index].to_bits(), expected.to_bits());
                    }
                }
            }
        }
    }

    #[test]
    fn bf16_is_summed_in_f32() {
        // 256 + 1 is no bf16 (8 bits of precision), so rounding at each hop would lose every one of the ones.
        let (large, one) = ([bf16::from_f32(256.0)], [bf16::ONE]);
        let mut out = [0.0f32];
        sum_bf16_to_f32(&mut out, &[&large, &one, &one, &one], false);
        assert_eq!(out, [259.0]);
    }
}
