//! `pillion eval`: what a model's loss is on data that it may never have seen.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use pillion_collectives::{Communicator, Launch, Reduction};
use pillion_data::{Batch, Dataset, Row, Split, Tokens, ValidationSet};
use pillion_kernels::IGNORED;
use pillion_llama::model::{Model, Recompute};
use serde::Serialize;

use crate::evaluating::{self, Passes};
use crate::gpu;
use crate::jobs::{self, Ended};
use crate::models;
use crate::settings::{DeviceKind, EvalArgs};
use crate::text::Vocabulary;
use crate::train::source::{self, ToEvaluate};
use crate::train::{on_rank_zero, stopping, tokenizers};
use crate::{Error, print_result};

/// Ranks that nobody else has started.
const DEFAULT_RANKS: usize = 1;

/// What is printed.
#[derive(Serialize)]
struct Found {
    checkpoint: String,
    /// `train`, `validation`, or `text` for all of a text.
    split: String,
    samples: u64,
    /// Those that count.
    tokens: u64,
    /// Mean over tokens, in nats.
    loss: f64,
    perplexity: f64,
    /// Of the text that the tokens stand for, where there is a tokenizer.
    bits_per_byte: Option<f64>,
}

/// Prints; returns the exit code.
///
/// # Errors
/// When settings contradict each other, or the ranks cannot be started.
pub(crate) fn run(settings: &EvalArgs) -> Result<i32, Error> {
    if settings.micro_batch == 0 || settings.micro_batch > 1 << 20 {
        return Err(Error::Setting(format!("--micro-batch {} must be from 1 to {}", settings.micro_batch, 1 << 20)));
    }
    if settings.samples == Some(0) {
        return Err(Error::Setting("--samples is 0: it must be at least 1".to_owned()));
    }
    if settings.seq.is_some_and(|seq| seq == 0 || seq > 1 << 20) {
        return Err(Error::Setting(format!("--seq must be from 1 to {}", 1 << 20)));
    }
    if let DeviceKind::Cuda(gpu) = settings.job.device {
        gpu::check(gpu)?;
    }
    jobs::start(&settings.job, DEFAULT_RANKS, |launch, stop| {
        let communicator = jobs::join(&settings.job, launch, stop)?;
        on_rank(settings, launch, &communicator, stop).map_err(|error| jobs::give_up(&communicator, error))
    })
}

fn on_rank(
    settings: &EvalArgs,
    launch: &Launch,
    communicator: &Arc<Communicator>,
    stop: &AtomicBool,
) -> Result<Ended, Error> {
    let (whole, origin) = models::newest(&settings.checkpoint, communicator)?;
    let (model, world) = (origin.model(), communicator.world());
    let checkpoint = &whole.checkpoint().path;
    let seq = settings.seq.map_or_else(|| models::context(checkpoint, &origin), Ok)?;
    let hosts = communicator.hosts();
    let mut made = None;
    let found =
        on_rank_zero(communicator, || source::to_evaluate(&settings.data, checkpoint, &origin, hosts, &mut made))?;
    let document_attention = origin.document_attention();
    let vocabulary = Vocabulary::of(checkpoint, &origin).ok();
    let windows = Windows::open(&found, settings.split, seq, model.vocab_size, document_attention)?;
    if let (Windows::Of(dataset, _), Some(Vocabulary::Subwords(tokenizer))) = (&windows, &vocabulary) {
        tokenizers::check_made_by(dataset, tokenizer)?;
    }
    let available = windows.len();
    let samples = settings.samples.unwrap_or(available).min(available);

    let batch = settings.micro_batch.min(samples.div_ceil(world as u64)) as usize;
    let (precision, passes) = (settings.precision, Passes::Batches { batch, seq });
    let (mut engine, device) = evaluating::open(&whole, model, precision, passes, &settings.job, launch, communicator)?;
    // Without a backward pass nothing is computed again.
    let mut passes = Model::new(&*device, model, precision, batch, seq, Recompute::Block)?;

    // A micro-batch of each rank in turn; the last ones may be short, and their rows are not counted.
    let in_batch = batch as u64;
    let rounds = samples.div_ceil(world as u64 * in_batch);
    let mut batch = Batch::new(batch, seq, document_attention);
    let mut bytes = 0u64;
    for round in 0..rounds {
        let first = (round * world as u64 + communicator.rank() as u64) * in_batch;
        for (sample, Row { inputs, targets, starts }) in (first..).zip(batch.rows()) {
            if sample >= samples {
                targets.fill(IGNORED);
                continue;
            }
            windows.fill(sample, Row { inputs, targets: &mut *targets, starts })?;
            if let Some(vocabulary) = &vocabulary {
                bytes += vocabulary.bytes(targets)?;
            }
        }
        let mut step = engine.begin_evaluation(1)?;
        passes.evaluate(&mut step, &batch.inputs, &batch.targets, batch.documents().as_ref())?;
        step.end()?;
        let mut asked = [f64::from(u8::from(stopping(stop)))];
        communicator.all_reduce_scalars(&mut asked, Reduction::Max)?;
        if asked[0] > 0.0 {
            return Ok(Ended::Interrupted);
        }
    }
    let (loss, tokens) = passes.take_loss(engine.stream())?;
    let mut sums = [loss, tokens, bytes as f64];
    communicator.all_reduce_scalars(&mut sums, Reduction::Sum)?;
    let [loss, tokens, bytes] = sums;
    if tokens == 0.0 {
        return Err(Error::Setting("no token of these samples counts: all are masked".to_owned()));
    }
    let mean = loss / tokens;
    if communicator.rank() == 0 {
        let found = Found {
            checkpoint: checkpoint.display().to_string(),
            split: windows.name(),
            samples,
            tokens: tokens as u64,
            loss: mean,
            perplexity: mean.exp(),
            bits_per_byte: (bytes > 0.0).then(|| loss / bytes / std::f64::consts::LN_2),
        };
        say(settings, &found)?;
    }
    if !mean.is_finite() {
        return Err(Error::NonFinite(
            "the loss is not finite, so the weights are broken: use an older checkpoint".to_owned(),
        ));
    }
    Ok(Ended::Done)
}

fn say(settings: &EvalArgs, found: &Found) -> Result<(), Error> {
    if settings.json {
        return print_result(serde_json::to_string(found).expect("plain values"));
    }
    let Found { checkpoint, split, samples, tokens, loss, perplexity, bits_per_byte } = found;
    let of = if split == TEXT { "the text".to_owned() } else { format!("the {split} split") };
    let bits = bits_per_byte.map_or(String::new(), |bits| format!("\nbits a byte {bits:.4}"));
    print_result(format_args!(
        "checkpoint  {checkpoint}\nsamples     {samples} of {of}, {tokens} tokens\nloss        {loss:.4}\n\
         perplexity  {perplexity:.3}{bits}"
    ))
}

/// In place of a split.
const TEXT: &str = "text";

/// What is evaluated.
enum Windows {
    /// A split, in order.
    Of(Dataset, Split),
    /// All of a text, in a shuffled order.
    Text(ValidationSet),
}

impl Windows {
    /// All of a text, unless the user chooses a split; of tokens this split, or the validation
    /// split where they have one.
    fn open(
        found: &ToEvaluate,
        wanted: Option<Split>,
        seq: usize,
        vocab: usize,
        document_attention: bool,
    ) -> Result<Windows, Error> {
        if let ([part], true, None) = (&found.parts[..], found.is_text, wanted) {
            let set = ValidationSet::open(Tokens::open(&part.path, None)?, true, seq, vocab);
            let set = set.map_err(|error| match error {
                // Its path is that of a temporary folder.
                pillion_data::Error::TooShort { tokens, .. } => Error::Setting(format!(
                    "the text in --data has {tokens} tokens, but a sample needs {}: give a longer text, or a \
                     lower --seq",
                    seq + 1
                )),
                error => error.into(),
            })?;
            if document_attention {
                set.check_documents()?;
            }
            return Ok(Windows::Text(set));
        }
        let dataset = source::cut(&found.parts, seq, vocab, 0, document_attention)?;
        let has = |split| dataset.windows(split);
        let split = wanted.unwrap_or(if has(Split::Validation) > 0 { Split::Validation } else { Split::Train });
        match has(split) {
            0 => Err(Error::Setting(format!("the {split} split has no samples: choose the other one with --split"))),
            _ => Ok(Windows::Of(dataset, split)),
        }
    }

    fn len(&self) -> u64 {
        match self {
            Windows::Of(dataset, split) => dataset.windows(*split),
            Windows::Text(set) => set.len(),
        }
    }

    fn fill(&self, i: u64, row: Row<'_>) -> pillion_data::Result<()> {
        match self {
            Windows::Of(dataset, split) => dataset.in_order(*split, i, row),
            Windows::Text(set) => set.fill(i, row),
        }
    }

    fn name(&self) -> String {
        match self {
            Windows::Of(_, split) => split.to_string(),
            Windows::Text(_) => TEXT.to_owned(),
        }
    }
}
