//! Shapes of Llama models, and the tensors they consist of.

use pillion_runtime::{Layout, TensorSpec, UnitSpec};
use serde::{Deserialize, Serialize};

use crate::model::Recompute;
use crate::rotary::RopeScaling;

/// The shape of a model like Llama 2 (Touvron et al. 2023). Names of the fields are Hugging Face's.
/// A field that a later version added is left out where it has its default.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// V: number of tokens.
    pub vocab_size: usize,
    /// C: width of the residual stream.
    pub hidden_size: usize,
    /// F: width of the feed-forward layer.
    pub intermediate_size: usize,
    /// Number of blocks.
    pub num_hidden_layers: usize,
    /// H: query heads.
    pub num_attention_heads: usize,
    /// K: key and value heads; divides H.
    pub num_key_value_heads: usize,
    /// ε of RMSNorm.
    pub rms_norm_eps: f32,
    /// Base of the rotary angles.
    pub rope_theta: f64,
    /// How the rotary angles are scaled for samples longer than those of the pretraining.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rope_scaling: Option<RopeScaling>,
    /// Width of a head; none for C/H.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub head_dim: Option<usize>,
    /// Whether the embedding is also the matrix of the head.
    #[serde(default, skip_serializing_if = "is_false")]
    pub tie_word_embeddings: bool,
}

fn is_false(flag: &bool) -> bool {
    !flag
}

/// Floating-point operations of a backward pass for each of the forward pass: gradients of both operands of a product.
pub const BACKWARD_FLOPS: f64 = 2.0;

/// Far beyond any model, and far below where the number of parameters overflows.
const LARGEST_SIZE: usize = 1 << 18;
const MOST_LAYERS: usize = 1 << 16;

/// A model that cannot be.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("the model's {what}")]
pub struct ConfigError {
    what: String,
}

/// A model with a name.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Preset {
    /// What `--model` takes.
    pub name: &'static str,
    vocab: usize,
    width: usize,
    ffn: usize,
    layers: usize,
    heads: usize,
    kv_heads: usize,
    rope_theta: f64,
    rope_scaling: Option<RopeScaling>,
    tied: bool,
}

const fn preset(
    name: &'static str,
    vocab: usize,
    width: usize,
    ffn: usize,
    layers: usize,
    heads: usize,
    kv_heads: usize,
) -> Preset {
    Preset { name, vocab, width, ffn, layers, heads, kv_heads, rope_theta: 10_000.0, rope_scaling: None, tied: false }
}

/// Tokens of bytes: each byte, and one that separates documents.
const BYTES: usize = 257;

/// Every preset: two for a laptop, one that benchmarks compare with other frameworks, the three of Lau et al. 2025, Llama 2 itself,
/// Llama 3.1, and Llama 3.2.
pub const PRESETS: [Preset; 11] = [
    preset("tiny", BYTES, 64, 192, 2, 4, 2),
    preset("small", BYTES, 256, 704, 4, 4, 4),
    preset("peer-30m", 4096, 512, 1408, 8, 8, 8),
    preset("micro-llama-300m", 32_000, 1024, 5632, 12, 16, 4),
    preset("tiny-llama-1.1b", 32_000, 2048, 5632, 22, 32, 4),
    preset("open-llama-3b", 32_000, 3200, 8640, 26, 32, 32),
    preset("llama2-7b", 32_000, 4096, 11_008, 32, 32, 32),
    preset("llama2-13b", 32_000, 5120, 13_824, 40, 40, 40),
    preset("llama2-70b", 32_000, 8192, 28_672, 80, 64, 8),
    Preset {
        rope_theta: 500_000.0,
        rope_scaling: Some(RopeScaling::llama3(32.0)),
        tied: true,
        ..preset("llama3.2-1b", 128_256, 2048, 8192, 16, 32, 8)
    },
    Preset {
        rope_theta: 500_000.0,
        rope_scaling: Some(RopeScaling::llama3(8.0)),
        ..preset("llama3.1-8b", 128_256, 4096, 14_336, 32, 32, 8)
    },
];

impl Preset {
    /// The preset of that name.
    pub fn named(name: &str) -> Option<Preset> {
        PRESETS.into_iter().find(|preset| preset.name == name)
    }

    /// Its shape.
    pub fn config(self) -> Config {
        Config {
            vocab_size: self.vocab,
            hidden_size: self.width,
            intermediate_size: self.ffn,
            num_hidden_layers: self.layers,
            num_attention_heads: self.heads,
            num_key_value_heads: self.kv_heads,
            rms_norm_eps: 1e-5,
            rope_theta: self.rope_theta,
            rope_scaling: self.rope_scaling,
            head_dim: None,
            tie_word_embeddings: self.tied,
        }
    }
}

impl Config {
    /// Checks that the shape can be.
    ///
    /// # Errors
    /// Names the numbers that contradict each other.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let (heads, kv_heads, width) = (self.num_attention_heads, self.num_key_value_heads, self.hidden_size);
        let sizes = [
            ("vocab_size", self.vocab_size),
            ("hidden_size", width),
            ("intermediate_size", self.intermediate_size),
            ("num_hidden_layers", self.num_hidden_layers),
            ("num_attention_heads", heads),
            ("num_key_value_heads", kv_heads),
        ];
        let fail = |what: String| Err(ConfigError { what });
        if let Some((name, _)) = sizes.into_iter().find(|&(_, size)| size == 0) {
            return fail(format!("{name} is 0: it must be at least 1"));
        }
        if let Some((name, size)) = sizes.into_iter().find(|&(_, size)| size > LARGEST_SIZE) {
            return fail(format!("{name} is {size}: it must be at most {LARGEST_SIZE}"));
        }
        if self.num_hidden_layers > MOST_LAYERS {
            return fail(format!("num_hidden_layers is {}: it must be at most {MOST_LAYERS}", self.num_hidden_layers));
        }
        // What a float of 32 bits cannot hold becomes infinite, and JSON cannot say that.
        for (name, value) in [("rms_norm_eps", f64::from(self.rms_norm_eps)), ("rope_theta", self.rope_theta)] {
            if !(value > 0.0 && value.is_finite()) {
                return fail(format!("{name} is {value}: it must be above 0 and finite"));
            }
        }
        if let Some(scaling) = &self.rope_scaling {
            scaling.validate().or_else(|what| fail(format!("rope_scaling {what}")))?;
        }
        match self.head_dim {
            None if !width.is_multiple_of(heads) => {
                return fail(format!(
                    "num_attention_heads = {heads} does not divide hidden_size = {width}: choose a width that is a \
                     multiple, or give head_dim"
                ));
            }
            Some(head_dim) if head_dim == 0 || head_dim > LARGEST_SIZE => {
                return fail(format!("head_dim is {head_dim}: it must be from 1 to {LARGEST_SIZE}"));
            }
            _ => {}
        }
        if !heads.is_multiple_of(kv_heads) {
            return fail(format!("num_key_value_heads = {kv_heads} does not divide num_attention_heads = {heads}"));
        }
        if !self.head_dim().is_multiple_of(2) {
            return fail(format!("heads are {} wide, but rotary embedding needs an even width", self.head_dim()));
        }
        Ok(())
    }

    /// D: width of a head.
    pub fn head_dim(&self) -> usize {
        self.head_dim.unwrap_or(self.hidden_size / self.num_attention_heads)
    }

    /// H·D: width of the queries of a token.
    pub(crate) fn query_width(&self) -> usize {
        self.num_attention_heads * self.head_dim()
    }

    /// K·D: width of its keys, and of its values.
    pub(crate) fn kv_width(&self) -> usize {
        self.num_key_value_heads * self.head_dim()
    }

    /// Which tensor of its unit the head's matrix is.
    pub(crate) fn lm_head(&self) -> usize {
        if self.tie_word_embeddings { 0 } else { 1 }
    }

    /// Where the tensors live in `shards` shards, and the order in which the passes use the units:
    /// where the embedding is also the matrix of the head, at both ends.
    ///
    /// # Panics
    /// As for [`Layout::new`].
    pub fn layout(&self, shards: usize) -> Layout {
        let layout = Layout::new(&self.units(), shards);
        if !self.tie_word_embeddings {
            return layout;
        }
        let order = (0..layout.units.len()).chain([0]).collect();
        layout.visiting(order)
    }

    /// The model's tensors by unit, under Hugging Face's names: the embedding, each block, the final
    /// norm with the matrix of the head, where that is not the embedding.
    pub fn units(&self) -> Vec<UnitSpec> {
        let (width, ffn, vocab) = (self.hidden_size, self.intermediate_size, self.vocab_size);
        let (query_width, kv_width) = (self.query_width(), self.kv_width());
        let tensor = |name: String, shape: &[usize]| TensorSpec {
            name,
            shape: shape.to_vec(),
            decay: shape.len() > 1,
            frozen: false,
        };
        let unit = |name: String, tensors| UnitSpec { name, tensors };
        let block = |layer: usize| {
            let named = |part: &str, shape: &[usize]| tensor(format!("model.layers.{layer}.{part}.weight"), shape);
            unit(
                format!("block {layer}"),
                vec![
                    named("input_layernorm", &[width]),
                    named("self_attn.q_proj", &[query_width, width]),
                    named("self_attn.k_proj", &[kv_width, width]),
                    named("self_attn.v_proj", &[kv_width, width]),
                    named("self_attn.o_proj", &[width, query_width]),
                    named("post_attention_layernorm", &[width]),
                    named("mlp.gate_proj", &[ffn, width]),
                    named("mlp.up_proj", &[ffn, width]),
                    named("mlp.down_proj", &[width, ffn]),
                ],
            )
        };
        let embedding = unit("embedding".into(), vec![tensor("model.embed_tokens.weight".into(), &[vocab, width])]);
        let mut head = unit("head".into(), vec![tensor("model.norm.weight".into(), &[width])]);
        if !self.tie_word_embeddings {
            head.tensors.push(tensor("lm_head.weight".into(), &[vocab, width]));
        }
        [embedding].into_iter().chain((0..self.num_hidden_layers).map(block)).chain([head]).collect()
    }

    /// Floating-point operations that a token costs in forward and backward: 6 for each weight of a matrix product (Kaplan et al.
    /// 2020), and those of causal attention over `seq` tokens, of which half the scores exist.
    pub fn flops_per_token(&self, seq: usize) -> f64 {
        (1.0 + BACKWARD_FLOPS) * self.forward_flops(seq).iter().sum::<f64>()
    }

    /// Those of the forward pass alone, for each of [`Config::units`]; the head's product is the last
    /// unit's, whichever unit has its matrix. The backward pass costs [`BACKWARD_FLOPS`] times as many.
    pub fn forward_flops(&self, seq: usize) -> Vec<f64> {
        let block = self.block_flops(seq).iter().sum();
        let head = 2.0 * self.hidden_size as f64 * self.vocab_size as f64;
        [0.0].into_iter().chain(std::iter::repeat_n(block, self.num_hidden_layers)).chain([head]).collect()
    }

    /// Those that the backward pass repeats of the forward pass, for each of [`Config::units`].
    pub fn recomputed_flops(&self, seq: usize, recompute: Recompute) -> Vec<f64> {
        let [attention, feed_forward, _] = self.block_flops(seq);
        let layers = self.num_hidden_layers;
        let blocks = (0..layers).map(|layer| match recompute.of(layer, layers) {
            Recompute::None => 0.0,
            Recompute::Attention => attention,
            Recompute::Block => attention + feed_forward,
        });
        [0.0].into_iter().chain(blocks).chain([0.0]).collect()
    }

    /// Those of a block's forward pass: to the output of attention, from there to gate and up, and
    /// of the last product.
    fn block_flops(&self, seq: usize) -> [f64; 3] {
        let (width, ffn) = (self.hidden_size as f64, self.intermediate_size as f64);
        let (query_width, kv_width) = (self.query_width() as f64, self.kv_width() as f64);
        // Queries with keys, and scores with values.
        let attention = 2.0 * query_width * seq as f64 / 2.0;
        let projections = width * query_width;
        let sums = [projections + 2.0 * width * kv_width + attention, projections + 2.0 * width * ffn, width * ffn];
        sums.map(|products| 2.0 * products)
    }

    /// The initial values of a tensor's elements, by index: ones for norms; else normal with
    /// variance 2/(5·C) (Nguyen and Salazar 2019), and for what adds to the residual stream
    /// standard deviation 2/(layers·√C) (Wang and Komatsuzaki 2021). With `deviation` this is the
    /// standard deviation, and for what adds to the residual stream 1/√(2·layers) of it (Radford et
    /// al. 2019). A value depends on (seed, deviation, tensor, index) alone.
    pub fn initial_values(
        &self,
        seed: u64,
        deviation: Option<f64>,
        name: &str,
        shape: &[usize],
    ) -> impl Fn(usize) -> f32 + use<> {
        let is_norm = shape.len() == 1;
        let width = self.hidden_size as f64;
        let adds_to_residual = name.ends_with("o_proj.weight") || name.ends_with("down_proj.weight");
        let layers = self.num_hidden_layers as f64;
        let deviation = match (deviation, adds_to_residual) {
            (Some(deviation), true) => deviation / (2.0 * layers).sqrt(),
            (Some(deviation), false) => deviation,
            (None, true) => 2.0 / (layers * width.sqrt()),
            (None, false) => (2.0 / (5.0 * width)).sqrt(),
        };
        let stream = xxhash_rust::xxh3::xxh3_64(name.as_bytes());
        move |index| match is_norm {
            true => 1.0,
            false => (deviation * pillion_kernels::random::normal(seed, stream, index as u64)) as f32,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parameters(name: &str) -> usize {
        let units = Preset::named(name).expect("a preset").config().units();
        units.iter().flat_map(|unit| &unit.tensors).map(|tensor| tensor.shape.iter().product::<usize>()).sum()
    }

    #[test]
    fn presets_have_the_published_numbers_of_parameters() {
        // From the papers and model cards; Llama 2's are exact counts of the released files.
        assert_eq!(parameters("llama2-7b"), 6_738_415_616);
        assert_eq!(parameters("llama2-13b"), 13_015_864_320);
        assert_eq!(parameters("llama2-70b"), 68_976_648_192);
        assert_eq!(parameters("llama3.1-8b"), 8_030_261_248);
        assert_eq!(parameters("llama3.2-1b"), 1_235_814_400);
        assert_eq!(parameters("tiny-llama-1.1b"), 1_100_048_384);
        // Of the shapes in the models' own config.json.
        assert_eq!(parameters("micro-llama-300m"), 304_636_928);
        assert_eq!(parameters("open-llama-3b"), 3_426_473_600);
        let small = parameters("small");
        assert!((3_000_000..4_000_000).contains(&small), "{small}");
    }

    #[test]
    fn a_token_costs_six_operations_for_each_weight_of_a_product_and_its_attention() {
        // Without attention: six for each parameter, but for the embedding and the norms (2 of 64 a block, and one), which multiply no matrix.
        let config = Preset::named("tiny").unwrap().config();
        let outside = config.vocab_size * 64 + (2 * 2 + 1) * 64;
        assert_eq!(config.flops_per_token(0), 6.0 * (parameters("tiny") - outside) as f64);
        // Attention over 10 tokens: 5 scores in the mean, each 2·64 operations to make and as many to use, in two blocks; three times with the backward pass.
        assert_eq!(config.flops_per_token(10) - config.flops_per_token(0), 3.0 * 2.0 * 5.0 * 4.0 * 64.0);
    }

    #[test]
    fn every_preset_can_be() {
        for preset in PRESETS {
            preset.config().validate().unwrap();
        }
    }

    #[test]
    fn impossible_shapes_are_named() {
        let small = Preset::named("small").unwrap().config();
        let cases = [
            (
                Config { num_attention_heads: 3, ..small.clone() },
                "num_attention_heads = 3 does not divide hidden_size = 256",
            ),
            (Config { num_key_value_heads: 3, ..small.clone() }, "num_key_value_heads = 3 does not divide"),
            (Config { hidden_size: 12, ..small.clone() }, "heads are 3 wide"),
            (Config { head_dim: Some(0), ..small.clone() }, "head_dim is 0"),
            (Config { vocab_size: 0, ..small.clone() }, "vocab_size is 0"),
            (Config { rms_norm_eps: 1e39_f64 as f32, ..small.clone() }, "rms_norm_eps is inf"),
            (Config { rope_theta: -1.0, ..small }, "rope_theta is -1"),
        ];
        for (config, message) in cases {
            let error = config.validate().unwrap_err().to_string();
            assert!(error.contains(message), "{error}");
        }
    }
}
