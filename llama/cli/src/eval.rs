//! `pillion eval`: what a model's loss is on data that it may never have seen.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use pillion_collectives::{Communicator, Launch, Reduction};
use pillion_data::{Dataset, Split};
use pillion_kernels::IGNORED;
use pillion_llama::model::{Model, Recompute};
use serde::Serialize;

use crate::evaluating::{self, Passes};
use crate::gpu;
use crate::jobs::{self, Ended};
use crate::models;
use crate::settings::{DeviceKind, EvalArgs};
use crate::text::Vocabulary;
use crate::train::{on_rank_zero, source, stopping};
use crate::{Error, print_result};

/// Tokens of a sample of an imported model, unless the user says how many.
const SEQ: usize = 2048;
/// Ranks that nobody else has started.
const DEFAULT_RANKS: usize = 1;

/// What is printed.
#[derive(Serialize)]
struct Found {
    checkpoint: String,
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
    let seq = settings.seq.or(origin.seq()).unwrap_or(SEQ);
    let checkpoint = &whole.checkpoint().path;
    let made = Temporary(std::env::temp_dir().join(format!("pillion-eval-{}", std::process::id())));
    let parts = on_rank_zero(communicator, || source::to_evaluate(&settings.data, checkpoint, &origin, &made.0))?;
    let dataset = source::cut(&parts, seq, model.vocab_size, 0)?;
    let (split, available) = split(settings.split, &dataset)?;
    let samples = settings.samples.unwrap_or(available).min(available);
    let vocabulary = Vocabulary::of(checkpoint, &origin).ok();

    let batch = settings.micro_batch.min(samples.div_ceil(world as u64)) as usize;
    let (precision, passes) = (settings.precision, Passes::Batches { batch, seq });
    let (mut engine, device) = evaluating::open(&whole, model, precision, passes, &settings.job, launch, communicator)?;
    // Without a backward pass nothing is computed again.
    let mut passes = Model::new(&*device, model, precision, batch, seq, Recompute::Block)?;

    // A micro-batch of each rank in turn; the last ones may be short, and their rows are not counted.
    let rounds = samples.div_ceil((world * batch) as u64);
    let (mut inputs, mut targets) = (vec![0; batch * seq], vec![0; batch * seq]);
    let mut bytes = 0u64;
    for round in 0..rounds {
        let first = (round * world as u64 + communicator.rank() as u64) * batch as u64;
        for (sample, (inputs, targets)) in (first..).zip(inputs.chunks_mut(seq).zip(targets.chunks_mut(seq))) {
            if sample >= samples {
                targets.fill(IGNORED);
                continue;
            }
            dataset.in_order(split, sample, inputs, targets)?;
            if let Some(vocabulary) = &vocabulary {
                bytes += vocabulary.bytes(targets)?;
            }
        }
        let mut step = engine.begin_evaluation(1)?;
        passes.evaluate(&mut step, &inputs, &targets)?;
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
            split: split.to_string(),
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
    let bits = bits_per_byte.map_or(String::new(), |bits| format!("\nbits a byte {bits:.4}"));
    print_result(format_args!(
        "checkpoint  {checkpoint}\nsamples     {samples} of the {split} split, {tokens} tokens\nloss        {loss:.4}\n\
         perplexity  {perplexity:.3}{bits}"
    ))
}

/// The split that is evaluated, and how many windows it has.
fn split(wanted: Option<Split>, dataset: &Dataset) -> Result<(Split, u64), Error> {
    let has = |split| dataset.windows(split);
    let split = wanted.unwrap_or(if has(Split::Validation) > 0 { Split::Validation } else { Split::Train });
    match has(split) {
        0 => Err(Error::Setting(format!("the {split} split has no samples: choose the other one with --split"))),
        windows => Ok((split, windows)),
    }
}

/// A folder that lasts as long as this.
struct Temporary(PathBuf);

impl Drop for Temporary {
    fn drop(&mut self) {
        // It may not have been made.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
