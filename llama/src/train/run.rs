//! The loop of one rank. Every decision is taken from numbers that are the same on every rank.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use pillion_abs::{Controller, Observation};
use pillion_collectives::{Backend, Communicator, Launch, Options, Reduction};
use pillion_kernels::cpu::{Isa, Profile};
use pillion_kernels::{Cores, Device, LazyCpu};
use pillion_runtime::{Engine, Layout, Memory, Policy, checkpoint};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::breakdown::Breakdown;
use super::checkpoints::{self, Progress};
use super::evaluation::validate;
use super::metrics::{Line, Metrics};
use super::plan_table::bytes;
use super::recipe::{self, Recipe};
use super::screen::{self, Screen};
use super::{Ended, cores, plan_table, stopping};
use crate::Error;
use crate::data::{self, Dataset, TokenFile, synthetic, tokenizer, trigram};
use crate::generate::generate;
use crate::model::Model;
use crate::settings::{DeviceKind, TrainArgs};

/// Joins the other ranks and trains.
pub(crate) fn run(settings: &TrainArgs, launch: &Launch, stop: &AtomicBool) -> Result<Ended, Error> {
    let options = Options {
        timeout: Duration::from_secs(settings.timeout.max(1)),
        backend: settings.backend.into(),
        reduce_groups: settings.reduce_groups,
        ..Options::default()
    };
    let communicator = Arc::new(Communicator::connect(launch, options)?);
    // Other ranks are told before this one's operations in flight are waited for, which would be in vain.
    let give_up = |error: Error| {
        if !error.is_everywhere() {
            communicator.abort(&error.to_string());
        }
        error
    };
    let mut run = Run::new(settings, launch, communicator.clone()).map_err(give_up)?;
    run.train(stop).map_err(give_up)
}

/// One rank of a run under way.
struct Run<'s> {
    settings: &'s TrainArgs,
    recipe: Recipe,
    communicator: Arc<Communicator>,
    engine: Engine,
    model: Model,
    dataset: Dataset,
    controller: Controller,
    progress: Counters,
    validation_samples: u64,
    /// On rank 0 alone.
    output: Option<Output>,
    /// On rank 0 alone, where asked for.
    breakdown: Option<Breakdown>,
    /// Floating-point operations a second that this rank's processors could make, and all ranks' together.
    own_peak: f64,
    peak: f64,
    /// Keeps other runs out of the folder; on rank 0 alone.
    _lock: Option<File>,
    inputs: Vec<u32>,
    targets: Vec<u32>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Counters {
    step: u64,
    samples: u64,
    /// Step of the last checkpoint.
    saved: Option<u64>,
}

/// What rank 0 writes.
struct Output {
    screen: Screen,
    metrics: Metrics,
    mark: Mark,
}

/// The loss to beat, and what has it.
struct Mark {
    loss: f64,
    of: &'static str,
}

/// What rank 0 finds out before the start.
#[derive(serde::Serialize, serde::Deserialize)]
struct Start {
    resume: Option<PathBuf>,
    recipe: Recipe,
    tokens: PathBuf,
    validation_samples: u64,
}

impl<'s> Run<'s> {
    fn new(settings: &'s TrainArgs, launch: &Launch, communicator: Arc<Communicator>) -> Result<Run<'s>, Error> {
        let world = communicator.world();
        same_settings(settings, &communicator)?;
        let threads = cores::threads(settings.threads, launch)?;
        let mut lock = None;
        let start = on_rank_zero(&communicator, || start(settings, world, &mut lock))?;
        let Start { resume, recipe, tokens, validation_samples } = start;
        let policy = recipe::policy(&settings.policy, settings.clip)?;
        let vocab = if is_synthetic(settings) { recipe.model.vocab_size } else { tokenizer::VOCAB };
        let dataset = Dataset::open(TokenFile::open(&tokens, vocab)?, recipe.seq, recipe.seed)?;
        if communicator.rank() == 0 {
            let batch = recipe.controller.base;
            let between = match (communicator.backend(), communicator.hosts()) {
                (Backend::Mpi, _) => "MPI".to_owned(),
                (Backend::Hierarchical, hosts) => format!("shared memory on each of {hosts} hosts, MPI between them"),
                (Backend::Shm | Backend::Auto, _) => "shared memory".to_owned(),
            };
            let backend = format!("{}, {between}", launch.source);
            let table = plan_table(&recipe.model, &policy, world, recipe.seq, recipe.micro_batch, batch, &backend);
            crate::print(table);
        }
        let mut device = Cores::new(threads).map_err(pillion_runtime::Error::from)?;
        // All ranks at once, as they compute at once.
        communicator.barrier()?;
        let own_peak = device.peak(policy.weights) * cores::share(threads, launch);
        let mut peak = [own_peak];
        communicator.all_reduce_scalars(&mut peak, Reduction::Sum)?;
        if communicator.rank() == 0 {
            let isa = Isa::of_process().map_err(pillion_runtime::Error::from)?.name();
            let plural = if threads == 1 { "" } else { "s" };
            let peak = peak[0] / 1e9;
            crate::print(format_args!(
                " processor    {isa}, {threads} thread{plural} a rank; at most {peak:.0} GFLOP/s in {} products",
                policy.weights
            ));
        }
        let breakdown = (settings.profile && communicator.rank() == 0).then(|| {
            let profile = Arc::new(Profile::default());
            device = device.clone().profiled(profile.clone());
            Breakdown::new(profile)
        });
        let device: Arc<dyn Device> = match settings.device {
            DeviceKind::Cpu => Arc::new(device),
            DeviceKind::LazyCpu => Arc::new(LazyCpu::new(recipe.seed)),
        };
        let layout = Layout::new(&recipe.model.units(), world);
        let mut engine = Engine::new(communicator.clone(), device.clone(), layout, policy)?;
        let model = Model::new(&*device, &recipe.model, policy.weights, recipe.micro_batch as usize, recipe.seq)?;
        let mut progress = Counters::default();
        let mut controller = Controller::new(recipe.controller.clone())?;
        match &resume {
            None => {
                engine.initialize(|name, shape, index| recipe.model.initial_value(recipe.seed, name, shape, index))?
            }
            Some(path) => {
                let saved = checkpoint::open(path)?;
                saved.load(&mut engine)?;
                let found = checkpoints::progress(&saved)?;
                controller = Controller::resume(recipe.controller.clone(), found.controller)?;
                progress = Counters { step: found.step, samples: found.samples, saved: Some(found.step) };
            }
        }
        let output = on_rank_zero_alone(&communicator, || {
            let metrics = Metrics::open(&settings.out, progress.step)?;
            let mark = match is_synthetic(settings) {
                true => Mark { loss: (recipe.model.vocab_size as f64).ln(), of: "guessing" },
                false => Mark { loss: trigram::loss(&dataset, validation_samples)?, of: "a trigram model" },
            };
            Ok(Output { screen: Screen::new(recipe.schedule.samples, progress.samples), metrics, mark })
        })?;
        let tokens = recipe.micro_batch as usize * recipe.seq;
        Ok(Run {
            settings,
            communicator,
            engine,
            model,
            dataset,
            controller,
            progress,
            validation_samples,
            output,
            breakdown,
            own_peak,
            peak: peak[0],
            _lock: lock,
            inputs: vec![0; tokens],
            targets: vec![0; tokens],
            recipe,
        })
    }

    fn train(&mut self, stop: &AtomicBool) -> Result<Ended, Error> {
        let mut validation = self.validate()?;
        if let Some(Output { screen, mark: Mark { loss, of }, .. }) = &self.output {
            let samples = self.validation_samples;
            screen.say(format!("validation loss {validation:.4} on {samples} samples; {of} reaches {loss:.4}"));
        }
        if self.is_asked_to_stop(stop)? {
            self.say(|| match self.progress.saved {
                Some(step) => {
                    format!("interrupted before another step: the checkpoint of step {step} is still the newest")
                }
                None => "interrupted before the first step: nothing was saved".to_owned(),
            });
            return Ok(Ended::Interrupted);
        }
        while !self.is_done() {
            let (mut line, stopped) = self.step(stop)?;
            let every = self.settings.validate_every;
            if self.is_done() || (every > 0 && self.progress.step.is_multiple_of(every)) {
                validation = self.validate()?;
                line.validation_loss = Some(validation);
            }
            if let Some(Output { screen, metrics, .. }) = &mut self.output {
                line.memory = screen.memory();
                metrics.write(&line)?;
                screen.step(&line);
                if let Some(loss) = line.validation_loss {
                    screen.say(format!("validation loss {loss:.4} after {} samples", line.samples_seen));
                }
            }
            let every = self.settings.save_every;
            if stopped || self.is_done() || (every > 0 && self.progress.step.is_multiple_of(every)) {
                let path = self.save()?;
                if stopped && !self.is_done() {
                    self.say(|| {
                        format!(
                            "interrupted: saved {} after step {}; go on with --resume auto",
                            path.display(),
                            self.progress.step
                        )
                    });
                    return Ok(Ended::Interrupted);
                }
            }
        }
        self.summary(validation)?;
        Ok(Ended::Done)
    }

    /// Whether any rank has been; a step asks by itself.
    fn is_asked_to_stop(&self, stop: &AtomicBool) -> Result<bool, Error> {
        let mut asked = [f64::from(u8::from(stopping(stop)))];
        self.communicator.all_reduce_scalars(&mut asked, Reduction::Max)?;
        Ok(asked[0] > 0.0)
    }

    fn is_done(&self) -> bool {
        let steps = self.settings.steps.is_some_and(|steps| self.progress.step >= steps);
        steps || self.progress.samples >= self.recipe.schedule.samples
    }

    /// One optimizer step: micro-batches are dealt to ranks in turn.
    fn step(&mut self, stop: &AtomicBool) -> Result<(Line, bool), Error> {
        if let Some(breakdown) = &self.breakdown {
            breakdown.begin_step();
        }
        let started = Instant::now();
        let (rank, world) = (self.communicator.rank() as u64, self.communicator.world() as u64);
        let micro_batch = self.recipe.micro_batch;
        let batch = self.controller.batch().min(self.recipe.schedule.samples - self.progress.samples);
        let micro_batches = batch / micro_batch;
        let rounds = micro_batches.div_ceil(world);
        let lr = self.recipe.schedule.at(self.progress.samples + batch);
        let mut step = self.engine.begin(rounds as usize)?;
        for round in 0..rounds {
            let index = round * world + rank;
            if index >= micro_batches {
                step.idle_round()?;
                continue;
            }
            let first = self.progress.samples + index * micro_batch;
            let seq = self.recipe.seq;
            let rows = self.inputs.chunks_exact_mut(seq).zip(self.targets.chunks_exact_mut(seq));
            for (sample, (inputs, targets)) in (first..).zip(rows) {
                self.dataset.fill(sample, inputs, targets)?;
            }
            self.model.train(&mut step, &self.inputs, &self.targets)?;
        }
        let mut asked = [f64::from(u8::from(stopping(stop)))];
        let report = step.finish(self.recipe.adamw(lr), &mut asked)?;
        let decision = self.controller.observe(&Observation {
            groups: micro_batches,
            samples: batch,
            tokens: report.tokens as u64,
            group_square_norms: report.group_square_norms,
            square_norm: report.square_norm,
            non_finite: 0,
        });
        self.progress.step += 1;
        self.progress.samples += batch;
        let elapsed = started.elapsed();
        if let Some(breakdown) = &mut self.breakdown {
            breakdown.end_step(elapsed, report.exposed);
        }
        let seconds = elapsed.as_secs_f64();
        let tokens_per_s = report.tokens / seconds;
        let flops = tokens_per_s * self.recipe.model.flops_per_token(self.recipe.seq);
        let line = Line {
            step: self.progress.step,
            loss: report.loss_sum / report.tokens,
            lr,
            grad_norm: report.gradient_norm,
            batch_samples: batch,
            batch_tokens: report.tokens as u64,
            samples_seen: self.progress.samples,
            tokens_per_s,
            step_ms: seconds * 1e3,
            exposed_ms: report.exposed.as_secs_f64() * 1e3,
            bytes_sent: report.bytes,
            collectives: report.operations,
            noise_scale: decision.noise_scale,
            wanted_batch: decision.wanted,
            validation_loss: None,
            flops,
            mfu: Some(flops / self.peak),
            memory: None,
        };
        Ok((line, asked[0] > 0.0))
    }

    fn validate(&mut self) -> Result<f64, Error> {
        let micro_batch = self.recipe.micro_batch;
        validate(&mut self.engine, &mut self.model, &self.dataset, self.validation_samples, micro_batch)
    }

    /// Saves; returns where.
    fn save(&mut self) -> Result<PathBuf, Error> {
        let progress = Progress {
            recipe: self.recipe.clone(),
            data: fingerprint(self.dataset.tokens()),
            step: self.progress.step,
            samples: self.progress.samples,
            controller: self.controller.state().clone(),
        };
        let extra = serde_json::to_value(&progress).expect("plain values");
        let folder = checkpoints::folder(&self.settings.out);
        let path = checkpoint::save(&self.engine, &folder, self.progress.step, &extra)?;
        self.progress.saved = Some(self.progress.step);
        Ok(path)
    }

    fn say(&self, text: impl FnOnce() -> String) {
        if let Some(output) = &self.output {
            output.screen.say(text());
        }
    }

    /// What was reached, a sample of text where that was learned, and the paths of what was written.
    fn summary(&mut self, validation: f64) -> Result<(), Error> {
        let sample = if is_synthetic(self.settings) { None } else { Some(self.sample()?) };
        let Some(Output { screen, metrics, mark: Mark { loss, of } }) = &self.output else { return Ok(()) };
        screen.close();
        if let Some(breakdown) = self.breakdown.take() {
            screen.say(format!("\n{}", breakdown.table(self.own_peak)));
        }
        let against = if validation < *loss { "below" } else { "not below" };
        let sample = sample.map_or_else(String::new, |sample| format!("\n{sample}\n\n"));
        screen.say(format!(
            "\n{} steps, {} samples in {}; batch {} at the end\n\
             validation loss {validation:.4}, {against} that of {of}, {loss:.4}\n\
             {sample}\
             metrics     {}\ncheckpoint  {}",
            self.progress.step,
            self.progress.samples,
            screen::duration(screen.elapsed()),
            self.controller.batch(),
            metrics.path().display(),
            checkpoints::folder(&self.settings.out).join(format!("step-{:08}", self.progress.step)).display(),
        ));
        Ok(())
    }

    /// Text by the model.
    fn sample(&mut self) -> Result<String, Error> {
        const PROMPT: &str = "pub fn ";
        const LENGTH: usize = 240;
        let device = self.engine.device().clone();
        let mut model = Model::new(&*device, &self.recipe.model, self.engine.policy().weights, 1, self.recipe.seq)?;
        let mut prompt = Vec::new();
        tokenizer::encode(PROMPT.as_bytes(), &mut prompt);
        let (seq, seed) = (self.recipe.seq, self.recipe.seed);
        let text = generate(&mut self.engine, &mut model, seq, &prompt, LENGTH, 0.7, seed)?;
        Ok(format!("{PROMPT}{}", String::from_utf8_lossy(&tokenizer::decode(&text))))
    }
}

/// Whether random tokens stand for text.
fn is_synthetic(settings: &TrainArgs) -> bool {
    settings.data.as_deref() == Some(Path::new(synthetic::NAME))
}

/// Checks that every rank was given the same settings: a launcher can start each with others.
fn same_settings(settings: &TrainArgs, communicator: &Communicator) -> Result<(), Error> {
    let digest = xxhash_rust::xxh3::xxh3_64(format!("{settings:?}").as_bytes());
    let digests = communicator.all_gather_scalars(&[digest])?;
    match digests.iter().position(|other| other != &digests[0]) {
        None => Ok(()),
        Some(rank) => {
            Err(Error::Setting(format!("rank {rank} was given other settings than rank 0: give every rank the same")))
        }
    }
}

/// What rank 0 does first: looks for a checkpoint, checks the settings, claims the folder, prepares the text.
fn start(settings: &TrainArgs, world: usize, lock: &mut Option<File>) -> Result<Start, Error> {
    let (resume, said) = checkpoints::find(settings)?;
    let saved = match &resume {
        None => None,
        Some(path) => Some(checkpoints::progress(&checkpoint::open(path)?)?),
    };
    let mut settings = settings.clone();
    if let Some(saved) = &saved {
        // Defaults that depend on the world are those of the run's beginning.
        let controller = &saved.recipe.controller;
        settings.round_to.get_or_insert(controller.round_to);
        settings.batch.get_or_insert(controller.base);
        settings.max_batch.get_or_insert(controller.cap);
    }
    let recipe = Recipe::new(&settings, world)?;
    let synthetic = is_synthetic(&settings);
    if synthetic && recipe.model.vocab_size > synthetic::LARGEST_VOCAB {
        let (vocab, most) = (recipe.model.vocab_size, synthetic::LARGEST_VOCAB);
        return Err(Error::Setting(format!(
            "synthetic data has at most {most} different tokens, but the model knows {vocab}: choose another --model"
        )));
    }
    if !synthetic && recipe.model.vocab_size < tokenizer::VOCAB {
        let (vocab, needed) = (recipe.model.vocab_size, tokenizer::VOCAB);
        return Err(Error::Setting(format!(
            "the model knows {vocab} tokens, but the text needs {needed}: choose another --model"
        )));
    }
    check_memory(&recipe, &recipe::policy(&settings.policy, settings.clip)?, world)?;
    if let (Some(path), Some(saved)) = (&resume, &saved) {
        checkpoints::same_recipe(path, saved, &recipe)?;
    }
    let tokens = checkpoints::make_tokens_folder(&settings.out)?;
    *lock = Some(checkpoints::lock(&settings.out)?);
    // All that can be wrong is found here, so that it is said once, and before an earlier run is touched.
    let prepared = match synthetic {
        true => data::prepare_synthetic(recipe.model.vocab_size, &tokens)?,
        false => data::prepare(settings.data.as_deref(), &tokens)?,
    };
    let fingerprint = fingerprint(&prepared.tokens);
    let dataset = Dataset::open(prepared.tokens, recipe.seq, recipe.seed)?;
    let validation_samples = validation_samples(&settings, &recipe, &dataset)?;
    if let (Some(path), Some(saved)) = (&resume, &saved) {
        checkpoints::same_data(path, saved, &fingerprint)?;
    }
    said.iter().for_each(crate::print);
    if let Some(aside) = checkpoints::prepare_folder(&settings.out, resume.as_deref())? {
        crate::print(format_args!("the earlier run in {} is now {}", settings.out.display(), aside.display()));
    }
    crate::print(&prepared.summary);
    if let (Some(path), Some(saved)) = (&resume, &saved) {
        crate::print(format_args!("going on from {} after step {}", path.display(), saved.step));
    }
    Ok(Start { resume, recipe, tokens: dataset.tokens().path().to_owned(), validation_samples })
}

/// Whether the host has the memory that its `world` ranks will come to use; found out late, it would be the kernel that ends them.
fn check_memory(recipe: &Recipe, policy: &Policy, world: usize) -> Result<(), Error> {
    let state = Memory::of(&Layout::new(&recipe.model.units(), world), policy).total();
    let activations = Model::activation_bytes(&recipe.model, policy.weights, recipe.micro_batch as usize, recipe.seq);
    let needed = (state + activations).saturating_mul(world as u64);
    let (available, limit) = pillion_collectives::available_memory();
    if needed <= available {
        return Ok(());
    }
    Err(Error::Setting(format!(
        "the {world} ranks need {} of memory, but {limit} allows {} more: choose a smaller --model, --micro-batch or --seq",
        bytes(needed),
        bytes(available)
    )))
}

/// A multiple of the micro-batch, at most what there is.
fn validation_samples(settings: &TrainArgs, recipe: &Recipe, dataset: &Dataset) -> Result<u64, Error> {
    let available = dataset.validation_len();
    let samples = settings.validation_samples.min(available) / recipe.micro_batch * recipe.micro_batch;
    if samples == 0 {
        return Err(Error::Setting(format!(
            "validation needs at least one micro-batch of {} samples, but has {} of the {available} there are: use a smaller \
             --micro-batch, more --validation-samples or more text",
            recipe.micro_batch,
            settings.validation_samples.min(available)
        )));
    }
    Ok(samples)
}

fn fingerprint(tokens: &TokenFile) -> String {
    format!("{:016x}", tokens.fingerprint())
}

/// Does something on rank 0 and gives every rank the result; where it fails, every rank fails, and only rank 0 says why.
fn on_rank_zero<T: Serialize + DeserializeOwned>(
    communicator: &Communicator,
    work: impl FnOnce() -> Result<T, Error>,
) -> Result<T, Error> {
    let result = (communicator.rank() == 0).then(work).transpose();
    let bytes = match &result {
        Ok(Some(value)) => serde_json::to_vec(value).expect("plain values"),
        _ => Vec::new(),
    };
    // Tokenizing text or reading checkpoints may take longer than any operation should.
    communicator.patient_barrier()?;
    let bytes = communicator.broadcast_bytes(0, &bytes)?;
    match result? {
        Some(value) => Ok(value),
        None if bytes.is_empty() => Err(Error::ByRankZero),
        None => Ok(serde_json::from_slice(&bytes).expect("rank 0 runs the same program")),
    }
}

/// Does something on rank 0, whose result the others do not need.
fn on_rank_zero_alone<T>(
    communicator: &Communicator,
    work: impl FnOnce() -> Result<T, Error>,
) -> Result<Option<T>, Error> {
    let mut result = None;
    on_rank_zero(communicator, || {
        result = Some(work()?);
        Ok(())
    })?;
    Ok(result)
}
