//! Llama's forward pass in f64, written to be read: no tiling, no cache, no code shared with the crates under test.
//!
//! The model of Touvron et al. 2023 in the conventions of Hugging Face: linear weights `[out, in]`, rotary embedding on
//! half-split heads, biases nowhere, the head not tied to the embedding.

use std::collections::BTreeMap;

/// Shape of a model.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// V: tokens in the vocabulary.
    pub vocab: usize,
    /// C: width of the residual stream.
    pub width: usize,
    /// Number of layers.
    pub layers: usize,
    /// H: query heads; divides C.
    pub heads: usize,
    /// K: key and value heads; divides H.
    pub kv_heads: usize,
    /// F: width of the feed-forward layer.
    pub ffn: usize,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Added to the mean square in each norm.
    pub norm_epsilon: f64,
}

/// Parameters, gradients or directions by Hugging Face's names, such as `model.layers.0.self_attn.q_proj.weight`; row-major.
pub type Parameters = BTreeMap<String, Vec<f64>>;

/// Mean over all tokens of −log softmax(logits)\[target\]. `tokens, targets, starts: [batch, seq]`.
pub fn loss(
    config: &Config,
    parameters: &Parameters,
    tokens: &[u32],
    targets: &[u32],
    starts: Option<&[u32]>,
    batch: usize,
    seq: usize,
) -> f64 {
    let logits = logits(config, parameters, tokens, starts, batch, seq);
    assert_eq!(targets.len(), batch * seq, "one target for each token");
    let losses = logits.chunks(config.vocab).zip(targets).map(|(row, &target)| {
        let largest = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let total: f64 = row.iter().map(|x| (x - largest).exp()).sum();
        largest + total.ln() - row[target as usize]
    });
    losses.sum::<f64>() / targets.len() as f64
}

/// `[batch, seq, vocab]` logits for `tokens: [batch, seq]`. The first token that a token sees is at the
/// position in `starts: [batch, seq]`, or the first of its sequence.
pub fn logits(
    config: &Config,
    parameters: &Parameters,
    tokens: &[u32],
    starts: Option<&[u32]>,
    batch: usize,
    seq: usize,
) -> Vec<f64> {
    assert_eq!(tokens.len(), batch * seq, "tokens are [batch, seq]");
    let width = config.width;
    let embedding = &parameters["model.embed_tokens.weight"];
    let mut hidden: Vec<f64> =
        tokens.iter().flat_map(|&token| &embedding[token as usize * width..][..width]).copied().collect();
    for layer in 0..config.layers {
        let weight = |name: &str| &parameters[&format!("model.layers.{layer}.{name}.weight")][..];

        let x = rms_norm(&hidden, weight("input_layernorm"), config.norm_epsilon);
        let mut q = linear(&x, weight("self_attn.q_proj"), width);
        let mut k = linear(&x, weight("self_attn.k_proj"), width);
        let v = linear(&x, weight("self_attn.v_proj"), width);
        rotate(&mut q, config, seq, config.heads);
        rotate(&mut k, config, seq, config.kv_heads);
        let attended = attention(&q, &k, &v, starts, config, batch, seq);
        add(&mut hidden, &linear(&attended, weight("self_attn.o_proj"), width));

        let x = rms_norm(&hidden, weight("post_attention_layernorm"), config.norm_epsilon);
        let gate = linear(&x, weight("mlp.gate_proj"), width);
        let up = linear(&x, weight("mlp.up_proj"), width);
        let activated: Vec<f64> = gate.iter().zip(&up).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect();
        add(&mut hidden, &linear(&activated, weight("mlp.down_proj"), config.ffn));
    }
    let x = rms_norm(&hidden, &parameters["model.norm.weight"], config.norm_epsilon);
    linear(&x, &parameters["lm_head.weight"], width)
}

/// The slope of [`loss`] along `direction`, by the central difference (L(p + step·d) − L(p − step·d)) / (2·step).
///
/// It is step²/6·L‴ + O(step⁴) away from Σ gradient·direction, and (rounding of L)/step. Parameters that `direction` lacks stay put.
pub fn finite_difference(
    config: &Config,
    parameters: &Parameters,
    tokens: &[u32],
    targets: &[u32],
    starts: Option<&[u32]>,
    batch: usize,
    seq: usize,
    direction: &Parameters,
    step: f64,
) -> f64 {
    let at = |step: f64| {
        let mut moved = parameters.clone();
        for (name, direction) in direction {
            let parameter =
                moved.get_mut(name).unwrap_or_else(|| panic!("a direction for {name}, which is no parameter"));
            assert_eq!(parameter.len(), direction.len(), "length of the direction for {name}");
            parameter.iter_mut().zip(direction).for_each(|(x, d)| *x += step * d);
        }
        loss(config, &moved, tokens, targets, starts, batch, seq)
    };
    (at(step) - at(-step)) / (2.0 * step)
}

/// y = x·wᵀ: `x: [N, inputs]`, `w: [outputs, inputs]`.
fn linear(x: &[f64], w: &[f64], inputs: usize) -> Vec<f64> {
    x.chunks(inputs).flat_map(|x| w.chunks(inputs).map(move |w| dot(x, w))).collect()
}

fn rms_norm(x: &[f64], weight: &[f64], epsilon: f64) -> Vec<f64> {
    let normalized = x.chunks(weight.len()).flat_map(|x| {
        let rms = (dot(x, x) / x.len() as f64 + epsilon).sqrt();
        x.iter().zip(weight).map(move |(x, weight)| x / rms * weight)
    });
    normalized.collect()
}

/// Turns (xᵢ, xᵢ₊D/2) of each head by t·θ^(−2i/D). `x: [B, T, heads, D]`.
fn rotate(x: &mut [f64], config: &Config, seq: usize, heads: usize) {
    let dim = config.width / config.heads;
    for (index, head) in x.chunks_mut(dim).enumerate() {
        let position = (index / heads % seq) as f64;
        for i in 0..dim / 2 {
            let (sin, cos) = (position * config.rope_theta.powf(-2.0 * i as f64 / dim as f64)).sin_cos();
            let (a, b) = (head[i], head[i + dim / 2]);
            head[i] = a * cos - b * sin;
            head[i + dim / 2] = b * cos + a * sin;
        }
    }
}

/// softmax(q·kᵀ/√D)·v over the tokens from each one's start up to its own. `q: [B, T, H, D]`,
/// `k, v: [B, T, K, D]`.
fn attention(
    q: &[f64],
    k: &[f64],
    v: &[f64],
    starts: Option<&[u32]>,
    config: &Config,
    batch: usize,
    seq: usize,
) -> Vec<f64> {
    let (heads, kv_heads, dim) = (config.heads, config.kv_heads, config.width / config.heads);
    let mut out = vec![0.0; q.len()];
    for b in 0..batch {
        for t in 0..seq {
            let start = starts.map_or(0, |starts| starts[b * seq + t] as usize);
            for head in 0..heads {
                let row = ((b * seq + t) * heads + head) * dim;
                let key = |s: usize| ((b * seq + s) * kv_heads + head / (heads / kv_heads)) * dim;
                let score = |s: usize| dot(&q[row..row + dim], &k[key(s)..key(s) + dim]) / (dim as f64).sqrt();
                let scores: Vec<f64> = (start..=t).map(score).collect();
                let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let weights: Vec<f64> = scores.iter().map(|score| (score - largest).exp()).collect();
                let total: f64 = weights.iter().sum();
                for (s, weight) in (start..).zip(&weights) {
                    for column in 0..dim {
                        out[row + column] += weight / total * v[key(s) + column];
                    }
                }
            }
        }
    }
    out
}

fn add(x: &mut [f64], y: &[f64]) {
    x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}
