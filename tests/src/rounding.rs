//! How far two runs may be apart that add up the same numbers in other orders.

use pillion_kernels::DType;
use pillion_llama::config::Config;

/// Standard deviations of a sum of roundings that are allowed. One is beyond them with a probability
/// of 2 · exp(−λ²/2), 3e-8.
const LAMBDA: f64 = 6.0;

/// A bound on the relative difference of losses, and of gradient norms, in step `step`, from 1,
/// between two runs that differ in the order of their sums. `tokens` are those of a step.
///
/// n roundings on the way to a number, independent and of mean 0, leave a relative error of at most
/// λ · √n · u to first order, nearly always (Higham and Mary 2019, "A New Approach to Probabilistic
/// Rounding Error Analysis", theorem 2.4); u is half the distance from 1 to the next number. A sum
/// of n terms has n − 1 roundings. The longest way through a block of the model goes through norm,
/// queries, scores, softmax, values, output product, norm and the feed-forward layer's two products,
/// and into the residual stream twice. Behind the blocks come a norm, the logits and their softmax.
/// The backward pass goes the same way again, with sums over tokens. Each step inherits what the
/// updates before it have changed. Each of the two runs is so far from exact numbers.
///
/// What the bound assumes and does not prove: sums count as if their terms had one sign (where terms
/// cancel, a sum has a larger relative error, but the residual stream that it is added to has not).
/// Roundings have the mean 0, which those of tensor cores, which cut off, have not. And an update
/// passes an error on as it is, although AdamW enlarges those of gradients that are nearly 0; what
/// such gradients add to the loss is nearly 0, too.
///
/// Tensors stored in bf16 are rounded once more, 8 in a block, in both passes. The next product
/// sums over at least the model's width, which averages their errors.
pub fn bound(model: &Config, dtype: DType, [seq, tokens]: [usize; 2], step: usize) -> f64 {
    let Config { hidden_size: width, intermediate_size: ffn, num_hidden_layers: blocks, .. } = *model;
    let block = 2 * (width + 1) + width + model.head_dim() + 2 * seq + width + width + ffn;
    let forward = blocks * block + width + width + model.vocab_size;
    let sums = ((2 * forward + tokens) as f64).sqrt() * 2f64.powi(-24);
    let stored = match dtype {
        DType::Bf16 => (2.0 * (8 * blocks + 2) as f64 / width as f64).sqrt() * 2f64.powi(-8),
        _ => 0.0,
    };
    2.0 * LAMBDA * (sums + stored) * step as f64
}

/// Whether two numbers of a step are as near as [`bound`] says.
pub fn near(a: f64, b: f64, bound: f64) -> bool {
    (a - b).abs() <= bound * a.abs()
}
