//! The settings of a training run.

use std::collections::BTreeSet;
use std::num::NonZero;
use std::path::PathBuf;

use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{Args, ValueEnum};
use pillion_kernels::DType;
use pillion_llama::config::{Config, ConfigError, PRESETS, Preset};
use pillion_llama::model::Recompute;
use pillion_runtime::checkpoint::Staging;
use pillion_runtime::{Gather, Mesh, Sharded};
use serde::{Deserialize, Serialize};

use super::JobArgs;
use crate::controller::ControllerArgs;
use crate::plan::quantity::size;
pub use crate::train::log::LogKind;
use crate::train::{CHANGEABLE, Group, Shape, ValidationData};

/// Defaults of settings that are refused where nothing reads them.
pub(crate) const FINAL_LR: f64 = 0.1;
pub(crate) const COOLDOWN: f64 = 0.2;
pub(crate) const NON_FINITE_LIMIT: u64 = 8;

/// The flags of a model's shape.
const SHAPE: [&str; 7] = ["model", "vocab_size", "hidden_size", "intermediate_size", "layers", "heads", "kv_heads"];

/// The model's shape: a preset, and what differs from it.
#[derive(Clone, Debug, Args)]
pub struct ModelArgs {
    /// Preset of the model's shape.
    #[arg(long, value_name = "PRESET", default_value = "small", value_parser = preset)]
    pub model: Preset,
    /// Number of tokens that the model knows, if not the preset's; default for files and folders of
    /// tokens: theirs.
    #[arg(long, value_name = "N")]
    pub vocab_size: Option<usize>,
    /// Width of the residual stream, if not the preset's.
    #[arg(long, value_name = "N")]
    pub hidden_size: Option<usize>,
    /// Width of the feed-forward layer, if not the preset's.
    #[arg(long, value_name = "N")]
    pub intermediate_size: Option<usize>,
    /// Number of blocks, if not the preset's.
    #[arg(long, value_name = "N")]
    pub layers: Option<usize>,
    /// Number of query heads, if not the preset's.
    #[arg(long, value_name = "N")]
    pub heads: Option<usize>,
    /// Number of key and value heads, if not the preset's.
    #[arg(long, value_name = "N")]
    pub kv_heads: Option<usize>,
    /// The shape of the run that goes on, which stands for the preset.
    #[arg(skip)]
    pub(crate) base: Option<Config>,
}

impl ModelArgs {
    /// The shape, checked.
    ///
    /// # Errors
    /// When the numbers contradict each other.
    pub fn config(&self) -> Result<Config, ConfigError> {
        let mut config = self.base.clone().unwrap_or_else(|| self.model.config());
        let overrides = [
            (self.vocab_size, &mut config.vocab_size),
            (self.hidden_size, &mut config.hidden_size),
            (self.intermediate_size, &mut config.intermediate_size),
            (self.layers, &mut config.num_hidden_layers),
            (self.heads, &mut config.num_attention_heads),
            (self.kv_heads, &mut config.num_key_value_heads),
        ];
        for (value, field) in overrides {
            *field = value.unwrap_or(*field);
        }
        config.validate()?;
        Ok(config)
    }
}

/// How parameters are kept and moved, and activations kept.
#[derive(Clone, Debug, Args)]
pub struct PolicyArgs {
    /// Type of the weights that are computed with, and of the operands of matrix products. Sums, the
    /// residual stream, gradients of weights and their update stay f32.
    #[arg(long, default_value = "f32", value_parser = precision())]
    pub precision: DType,
    /// Type in which gradients travel: bf16 halves the bytes, and rounds each rank's gradient once.
    #[arg(long, default_value = "f32", value_parser = precision())]
    pub reduce_precision: DType,
    /// The ranks as a grid of `replicate` groups that hold the same, of `shard` ranks each;
    /// default: one group.
    #[arg(long, value_name = "replicate=R,shard=S", value_parser = mesh)]
    pub mesh: Option<Mesh>,
    /// What the ranks of a group divide: parameters,gradients,optimizer, some of these, or one of
    /// nothing, zero-1, zero-2, zero-3.
    #[arg(long, value_name = "WHAT", default_value = "zero-3")]
    pub shard: Sharded,
    /// How ranks get sharded weights that they compute with; default: window.
    #[arg(long, value_enum)]
    pub gather: Option<Gather>,
    /// Move units that follow each other as one operation, a bucket, as long as their weights take
    /// at most so many bytes, such as 16MiB; a longer unit moves by itself; default: each block,
    /// the embedding and the head move by themselves.
    #[arg(long, value_name = "BYTES", value_parser = size)]
    pub bucket: Option<u64>,
    /// Buckets gathered ahead of the one in use.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub prefetch: usize,
    /// Wait for each collective where it starts: shows what overlap is worth.
    #[arg(long)]
    pub no_overlap: bool,
    /// Gathered buckets that exist at a time; default: prefetch + 1.
    #[arg(long, value_name = "N")]
    pub slots: Option<usize>,
    /// What blocks compute again in the backward pass instead of keeping it: less memory, a longer
    /// step, and the same numbers.
    #[arg(long, value_enum, value_name = "WHAT", default_value = "none")]
    pub recompute: Recompute,
}

/// What to do about a step whose gradient or loss is not finite.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnNonFinite {
    /// End the run.
    #[default]
    Stop,
    /// Go on without the step's samples.
    Skip,
    /// Go back to the newest checkpoint, and on without the samples since it.
    Rewind,
}

/// Settings of a training run.
#[derive(Clone, Debug, Args)]
pub struct TrainArgs {
    /// File of settings in TOML, with the names of these flags as keys; flags win.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// What to train on: text in a file or a folder, whose bytes are tokens; a folder of `pillion
    /// tokenize`; a token file of llm.c, nanoGPT or Megatron; or `synthetic` for random tokens.
    /// Several times PATH:SHARE for a mixture of tokens. Default: the sources of the crates this
    /// program is built from.
    #[arg(long, value_name = "PATH[:SHARE]")]
    pub data: Vec<String>,
    /// Folder for everything the run writes; an earlier run in it is moved aside, unless it is
    /// resumed.
    #[arg(long, value_name = "DIR", default_value = "runs/train")]
    pub out: PathBuf,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub job: JobArgs,
    /// Samples to train on: the horizon of every schedule.
    #[arg(long, value_name = "N", default_value_t = 5120)]
    pub samples: u64,
    /// Stop after this many steps, wherever the schedules are.
    #[arg(long, value_name = "N")]
    pub steps: Option<u64>,
    /// Seed of the weights and of the order of samples.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub seed: u64,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub model: ModelArgs,
    /// Tokens in a sample.
    #[arg(long, value_name = "N", default_value_t = 128)]
    pub seq: usize,
    /// A token sees only tokens of its own document, not those of documents before it in the sample.
    #[arg(long)]
    pub document_attention: bool,
    /// Samples that a rank computes at a time.
    #[arg(long, value_name = "N", default_value_t = 4)]
    pub micro_batch: u64,
    /// Samples in a step, over all ranks, at first; default: --round-to, and at least two
    /// micro-batches where noise is measured.
    #[arg(long, value_name = "N")]
    pub batch: Option<u64>,
    /// Samples in a step at most; default: 8 times --batch.
    #[arg(long, value_name = "N")]
    pub max_batch: Option<u64>,
    /// Batches are multiples of this, itself a multiple of --micro-batch; default: ranks times
    /// --micro-batch.
    #[arg(long, value_name = "N")]
    pub round_to: Option<u64>,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub controller: ControllerArgs,
    /// Peak learning rate.
    #[arg(long, value_name = "X", default_value_t = 3e-3)]
    pub lr: f64,
    /// Share of the samples over which the learning rate rises.
    #[arg(long, value_name = "X", default_value_t = 0.02)]
    pub warmup: f64,
    /// Learning rate at the end, as a share of the peak.
    #[arg(long, value_name = "X", default_value_t = FINAL_LR)]
    pub final_lr: f64,
    /// How the learning rate falls after the warm-up.
    #[arg(long, value_enum, value_name = "SHAPE", default_value = "cosine")]
    pub schedule: Shape,
    /// Share of the samples over which --schedule wsd falls at the end.
    #[arg(long, value_name = "X", default_value_t = COOLDOWN)]
    pub cooldown: f64,
    /// Weight of a step's gradient one step later, in AdamW's first moment.
    #[arg(long, value_name = "X", default_value_t = 0.9)]
    pub beta1: f64,
    /// The same in its second moment.
    #[arg(long, value_name = "X", default_value_t = 0.95)]
    pub beta2: f64,
    /// What AdamW adds to the root of the second moment.
    #[arg(long, value_name = "X", default_value_t = 1e-8)]
    pub epsilon: f64,
    /// Standard deviation of initial weights, and 1/√(2·layers) of it for what adds to the residual
    /// stream; default: √(2/(5·width)), and 2/(layers·√width).
    #[arg(long, value_name = "X")]
    pub init_std: Option<f64>,
    /// Weight of an auxiliary loss, the square of the logarithm of the softmax's sum, which keeps
    /// logits near 0; 1e-4 is usual.
    #[arg(long, value_name = "X", default_value_t = 0.0)]
    pub z_loss: f64,
    /// Other settings for tensors whose names match a pattern, in which `*` stands for anything:
    /// lr multiplies the learning rate, and decay stands for --weight-decay. May be given several
    /// times; of several that match, the last counts.
    #[arg(long, value_name = "PATTERN:lr=X,decay=Y")]
    pub group: Vec<Group>,
    /// Decoupled weight decay of matrices.
    #[arg(long, value_name = "X", default_value_t = 0.1)]
    pub weight_decay: f64,
    /// Largest norm of the gradient; 0 for no limit.
    #[arg(long, value_name = "X", default_value_t = 1.0)]
    pub clip: f64,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub policy: PolicyArgs,
    /// Choose --prefetch, --slots, --bucket and --recompute: measure the processor and the links
    /// for a moment, simulate steps on them, and take the shortest that fits into memory.
    #[arg(long, conflicts_with_all = ["prefetch", "slots", "bucket", "recompute", "no_overlap"])]
    pub auto: bool,
    /// Begin with the weights of a checkpoint instead of random ones: the newest one at PATH, of
    /// another run or imported, whose model this is then. A run that goes on has its own.
    #[arg(long, value_name = "PATH", conflicts_with_all = SHAPE)]
    pub from: Option<PathBuf>,
    /// Go on from a checkpoint: the newest whole one in --out, or the one at PATH. Settings that
    /// decide numbers or files and are not given are those that the run began with, and so are its
    /// tokens. Settings of how parameters are kept and moved have their defaults.
    #[arg(long, value_name = "auto|PATH")]
    pub resume: Option<PathBuf>,
    /// Settings in which a resumed run may differ from its checkpoint, by their flags: lr,samples,…
    #[arg(long, value_name = "NAMES", value_delimiter = ',', value_parser = changeable, requires = "resume")]
    pub change: Vec<String>,
    /// What to do about a step whose gradient or loss is not finite; default: stop, or what a
    /// resumed run did. skip goes on without the step's samples; rewind goes back to the newest
    /// checkpoint, and on without the samples since it.
    #[arg(long, value_enum, value_name = "WHAT")]
    pub on_non_finite: Option<OnNonFinite>,
    /// Steps in a row that may be left out by skip, and times in a row that rewind may go back to
    /// the same checkpoint.
    #[arg(long, value_name = "N", default_value_t = NON_FINITE_LIMIT)]
    pub non_finite_limit: u64,
    /// Save every N steps, besides at the end; 0: only at the end.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub save_every: u64,
    /// Memory of a rank for its part of a checkpoint: `copies` of all of it, which are written
    /// while training goes on, or a ring of at most BYTES, such as 64MiB, through which it passes
    /// while steps wait; default: copies with --save-every, else 1MiB.
    #[arg(long, value_name = "copies|BYTES", value_parser = save_memory)]
    pub save_memory: Option<Staging>,
    /// Keep this many of the newest checkpoints, and remove older ones; default: all.
    #[arg(long, value_name = "N")]
    pub keep: Option<NonZero<usize>>,
    /// Keep the checkpoint with the lowest validation loss besides those of --keep: each validation
    /// that finds a lower loss than all before saves one.
    #[arg(long)]
    pub keep_best: bool,
    /// Validate every N steps, besides at the start and the end; 0: only then.
    #[arg(long, value_name = "N", default_value_t = 100)]
    pub validate_every: u64,
    /// Validate every N samples instead: after the first step that comes to a multiple of N. So
    /// runs whose batches differ are validated at the same places.
    #[arg(long, value_name = "N", conflicts_with = "validate_every")]
    pub validate_every_samples: Option<NonZero<u64>>,
    /// Samples to validate on; where the validation text has fewer, all of it.
    #[arg(long, value_name = "N", default_value_t = 256)]
    pub validation_samples: u64,
    /// Validate on this too, and write its loss under this name, by default that of the file or
    /// folder: tokens, or text where the run learns text. Of tokens with a validation split, that
    /// is used. May be given several times.
    #[arg(long, value_name = "[NAME=]PATH")]
    pub validation_data: Vec<ValidationData>,
    /// Tokens of text that the trained model writes at the end; 0 for none. Each takes a forward
    /// pass, for which all weights are gathered.
    #[arg(long, value_name = "N", default_value_t = 240)]
    pub sample: usize,
    /// Print where the time of the steps after the first went, kernel by kernel.
    #[arg(long)]
    pub profile: bool,
    /// Measure the noise scale of each unit of the model too, for metrics and reports.
    #[arg(long)]
    pub unit_noise: bool,
    /// Write what each rank computes, waits for and moves into trace.json in --out, a timeline for
    /// ui.perfetto.dev.
    #[arg(long)]
    pub trace: bool,
    /// Do everything up to the first step, and print what it took: time, and memory. An earlier run in
    /// --out stays in its place.
    #[arg(long)]
    pub dry_run: bool,
    /// What a run prints on stdout: lines of text, or a JSON object a line.
    #[arg(long, value_enum, value_name = "FORMAT", default_value = "text")]
    pub log: LogKind,
    /// Write the numbers of steps for TensorBoard too, into tensorboard/ in --out.
    #[arg(long)]
    pub tensorboard: bool,
    /// The flags that were given, on the command line or in the file, without dashes.
    #[arg(skip)]
    pub given: BTreeSet<String>,
}

/// The types that weights and gradients can have.
pub(crate) const PRECISIONS: [DType; 2] = [DType::F32, DType::Bf16];

pub(crate) fn precision() -> impl TypedValueParser<Value = DType> {
    PossibleValuesParser::new(PRECISIONS.map(DType::name)).map(|name| dtype(&name))
}

/// The type of this name, one of [`PRECISIONS`].
pub(crate) fn dtype(name: &str) -> DType {
    if name == DType::Bf16.name() { DType::Bf16 } else { DType::F32 }
}

/// Reads `replicate=R,shard=S`, in either order.
pub(crate) fn mesh(text: &str) -> Result<Mesh, String> {
    let mut sizes = [("replicate", None), ("shard", None)];
    for part in text.split(',') {
        let (axis, size) = part.split_once('=').unwrap_or((part, ""));
        let slot = sizes.iter_mut().find(|(name, size)| *name == axis.trim() && size.is_none());
        let size = size.trim().parse::<usize>().ok().filter(|size| (1..=1 << 20).contains(size));
        match (slot, size) {
            (Some((_, slot)), Some(size)) => *slot = Some(size),
            _ => return Err(format!("{part:?} is no axis of a mesh: give both sizes, as in replicate=2,shard=4")),
        }
    }
    match sizes {
        [(_, Some(replicate)), (_, Some(shard))] => Ok(Mesh { replicate, shard }),
        _ => Err("a mesh has two axes: give both sizes, as in replicate=2,shard=4".to_owned()),
    }
}

/// Bytes of the smallest ring. A smaller one takes more time, and what it saves is nothing beside
/// what else a rank holds.
const LEAST_RING: u64 = 64 << 10;

/// Reads `copies`, or the size of a ring.
pub(crate) fn save_memory(text: &str) -> Result<Staging, String> {
    if text.trim() == "copies" {
        return Ok(Staging::Copies);
    }
    match size(text) {
        Ok(bytes) if bytes >= LEAST_RING => Ok(Staging::Ring { bytes }),
        Ok(_) => Err("a ring has at least 64KiB: give more, or `copies`".to_owned()),
        Err(error) => Err(format!("{error}; or give `copies`")),
    }
}

fn changeable(name: &str) -> Result<String, String> {
    let name = name.trim().trim_start_matches("--");
    match CHANGEABLE.contains(&name) {
        true => Ok(name.to_owned()),
        false => Err(format!("a run cannot change this; it can change {}", CHANGEABLE.join(", "))),
    }
}

fn preset(name: &str) -> Result<Preset, String> {
    Preset::named(name).ok_or_else(|| {
        let names: Vec<&str> = PRESETS.iter().map(|preset| preset.name).collect();
        format!("no preset has this name; there are {}", names.join(", "))
    })
}
