//! What a model keeps on a rank besides its weights: one description, from which both the
//! allocation and its prediction follow.
//!
//! Shapes: N = B·T tokens of a micro-batch, C width, F feed-forward width, H·D query width, K·D key
//! and value width, V vocabulary. A is the type of the weights, which products read and write;
//! where nothing else is said, a buffer has this type.

use pillion_kernels::{Buffer, DType, Device, Error, Part};
use serde::{Deserialize, Serialize};

use crate::config::Config;

/// Tokens whose logits exist at a time.
pub(crate) const HEAD_ROWS: usize = 512;

/// What blocks compute again in the backward pass, from the residual stream before them, instead of
/// keeping it. It changes no number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[cfg_attr(feature = "clap", derive(clap::ValueEnum))]
pub enum Recompute {
    /// Nothing: each block keeps what its backward pass reads.
    #[default]
    None,
    /// All of the block.
    Block,
    /// The attention of the block: queries, keys, values and the output. No mode keeps scores.
    Attention,
}

impl std::fmt::Display for Recompute {
    /// As the flag has it.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Recompute::None => "none",
            Recompute::Block => "block",
            Recompute::Attention => "attention",
        })
    }
}

impl Recompute {
    /// What block `layer` of `layers` computes again. The backward pass begins with the last block,
    /// whose activations are then still in the shared buffers.
    pub(crate) fn of(self, layer: usize, layers: usize) -> Recompute {
        if layer + 1 == layers { Recompute::None } else { self }
    }
}

/// What the description depends on.
#[derive(Clone, Copy)]
pub(crate) struct Shape<'c> {
    pub(crate) config: &'c Config,
    /// A.
    pub(crate) dtype: DType,
    /// B and T.
    pub(crate) batch: usize,
    pub(crate) seq: usize,
    pub(crate) recompute: Recompute,
}

/// One value for each buffer of a model: its description, or the buffer itself.
pub(crate) struct Activations<T> {
    /// Of a micro-batch, `[N]` u32.
    pub(crate) inputs: T,
    pub(crate) targets: T,
    /// cos and sin of the rotary angles, `[T, D/2]` f32.
    pub(crate) cos: T,
    pub(crate) sin: T,
    /// Sum of the losses of evaluations, `[1]` f64.
    pub(crate) loss: T,
    /// The residual stream before each block and after the last, `[N, C]` f32 each.
    pub(crate) residual: Vec<T>,
    /// One for each block; or one for all, where blocks compute it again.
    pub(crate) attention: Vec<Attention<T>>,
    pub(crate) feed_forward: Vec<FeedForward<T>>,
    pub(crate) recomputed: Recomputed<T>,
    pub(crate) head: Head<T>,
    pub(crate) gradients: Gradients<T>,
}

/// What the backward pass of a block's attention reads.
pub(crate) struct Attention<T> {
    /// Of the residual stream before the block, `[N]` f32.
    pub(crate) inverse_rms: T,
    /// `[N, H·D]`; `k` and `v`: `[N, K·D]`.
    pub(crate) q: T,
    pub(crate) k: T,
    pub(crate) v: T,
    /// `[N, H·D]`.
    pub(crate) attended: T,
    /// `[B, H, T]` f32.
    pub(crate) log_sum: T,
}

/// What the backward pass of a block's feed-forward reads.
pub(crate) struct FeedForward<T> {
    /// The residual stream between attention and feed-forward, `[N, C]` f32.
    pub(crate) middle: T,
    /// `[N]` f32.
    pub(crate) inverse_rms: T,
    /// `[N, F]`.
    pub(crate) gate: T,
    pub(crate) up: T,
}

/// What every block makes in its forward pass, and always again in its backward pass.
pub(crate) struct Recomputed<T> {
    /// A norm's output, `[N, C]`.
    pub(crate) normed: T,
    /// Of SwiGLU, `[N, F]`.
    pub(crate) activated: T,
}

pub(crate) struct Head<T> {
    /// `[N, C]`.
    pub(crate) normed: T,
    /// `[N]` f32.
    pub(crate) inverse_rms: T,
    /// Of at most [`HEAD_ROWS`] tokens, `[·, V]` f32.
    pub(crate) logits: T,
    /// Their gradient, where A is not f32; else the logits make way for it.
    pub(crate) narrow: Option<T>,
}

/// Gradients of activations, shared by all blocks.
pub(crate) struct Gradients<T> {
    /// Of the residual stream, `[N, C]` f32.
    pub(crate) residual: T,
    /// The same in A, where that is not f32.
    pub(crate) narrow: Option<T>,
    /// Of a norm's output, `[N, C]` f32.
    pub(crate) normed: T,
    pub(crate) attended: T,
    pub(crate) q: T,
    pub(crate) k: T,
    pub(crate) v: T,
    pub(crate) gate: T,
    pub(crate) up: T,
    pub(crate) activated: T,
}

/// That of a block: its own, or the one that all blocks share.
pub(crate) fn of_block<T>(kept: &mut [T], layer: usize) -> &mut T {
    let count = kept.len();
    &mut kept[layer % count]
}

impl Shape<'_> {
    /// Asks `make` for every buffer, by the type and number of its elements, always in this order.
    fn describe<T>(&self, mut make: impl FnMut(DType, usize) -> T) -> Activations<T> {
        let Shape { config, dtype: a, batch, seq, recompute } = *self;
        let f32 = DType::F32;
        let (tokens, layers) = (batch * seq, config.num_hidden_layers);
        let (attentions, feed_forwards) = match recompute {
            Recompute::None => (layers, layers),
            Recompute::Attention => (1, layers),
            Recompute::Block => (1, 1),
        };
        let width = tokens * config.hidden_size;
        let (query_width, kv_width) = (tokens * config.query_width(), tokens * config.kv_width());
        let ffn = tokens * config.intermediate_size;
        let angles = seq * config.head_dim() / 2;
        let logits = tokens.min(HEAD_ROWS) * config.vocab_size;
        let is_narrow = a != f32;
        Activations {
            inputs: make(DType::U32, tokens),
            targets: make(DType::U32, tokens),
            cos: make(f32, angles),
            sin: make(f32, angles),
            loss: make(DType::F64, 1),
            residual: (0..=layers).map(|_| make(f32, width)).collect(),
            attention: (0..attentions)
                .map(|_| Attention {
                    inverse_rms: make(f32, tokens),
                    q: make(a, query_width),
                    k: make(a, kv_width),
                    v: make(a, kv_width),
                    attended: make(a, query_width),
                    log_sum: make(f32, tokens * config.num_attention_heads),
                })
                .collect(),
            feed_forward: (0..feed_forwards)
                .map(|_| FeedForward {
                    middle: make(f32, width),
                    inverse_rms: make(f32, tokens),
                    gate: make(a, ffn),
                    up: make(a, ffn),
                })
                .collect(),
            recomputed: Recomputed { normed: make(a, width), activated: make(a, ffn) },
            head: Head {
                normed: make(a, width),
                inverse_rms: make(f32, tokens),
                logits: make(f32, logits),
                narrow: is_narrow.then(|| make(a, logits)),
            },
            gradients: Gradients {
                residual: make(f32, width),
                narrow: is_narrow.then(|| make(a, width)),
                normed: make(f32, width),
                attended: make(a, query_width),
                q: make(a, query_width),
                k: make(a, kv_width),
                v: make(a, kv_width),
                gate: make(a, ffn),
                up: make(a, ffn),
                activated: make(a, ffn),
            },
        }
    }

    /// Bytes of the one allocation that holds them all.
    pub(crate) fn bytes(&self) -> u64 {
        let mut sum = 0u64;
        self.describe(|dtype, len| {
            let bytes = Part { dtype, len }.bytes().map_or(u64::MAX, |bytes| bytes as u64);
            sum = sum.saturating_add(bytes);
        });
        sum
    }

    /// The buffers, zeroed, in one allocation.
    ///
    /// # Errors
    /// When the device has no memory.
    pub(crate) fn allocate(&self, device: &dyn Device) -> Result<Activations<Buffer>, Error> {
        let mut parts = Vec::new();
        self.describe(|dtype, len| parts.push(Part { dtype, len }));
        let mut buffers = device.allocate_parts(&parts)?.into_iter();
        Ok(self.describe(|_, _| buffers.next().expect("the description is the same")))
    }
}
