//! The loop of one rank. Every decision is taken from numbers that are the same on every rank.

use std::fs::File;
use std::num::NonZero;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use pillion_abs::{Controller, Observation};
use pillion_collectives::{Backend, Communicator, Launch, Options, Reduction};
use pillion_kernels::{Device, LazyCpu};
use pillion_runtime::checkpoint::{self, Saved, Saver};
use pillion_runtime::{Engine, Layout};

use super::checkpoints::{self, Progress};
use super::cores::Processor;
use super::evaluation::validate;
use super::metrics::{Line, Metrics};
use super::recipe::{self, Recipe};
use super::screen::{self, Screen};
use super::start::{Start, fingerprint, is_synthetic, on_rank_zero, on_rank_zero_alone, same_settings, start};
use super::timeline::Timeline;
use super::{Ended, cores, plan_table, statistics, stopping};
use crate::data::{Dataset, TokenFile, tokenizer, trigram};
use crate::generate::generate;
use crate::model::Model;
use crate::settings::{DeviceKind, TrainArgs};
use crate::{Error, complain};

/// What the settings say to a communicator.
pub(super) fn options(settings: &TrainArgs) -> Options {
    let timeout = Duration::from_secs(settings.timeout.max(1));
    Options {
        timeout,
        startup_timeout: timeout,
        backend: settings.backend.into(),
        reduce_groups: settings.reduce_groups,
        ..Options::default()
    }
}

/// Joins the other ranks and trains.
pub(crate) fn run(settings: &TrainArgs, launch: &Launch, stop: &AtomicBool) -> Result<Ended, Error> {
    let communicator = Arc::new(Communicator::connect(launch, options(settings))?);
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
    saver: Saver,
    validation_samples: u64,
    /// On rank 0 alone.
    output: Option<Output>,
    processor: Processor,
    timeline: Option<Timeline>,
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

impl<'s> Run<'s> {
    fn new(settings: &'s TrainArgs, launch: &Launch, communicator: Arc<Communicator>) -> Result<Run<'s>, Error> {
        let world = communicator.world();
        same_settings(settings, &communicator)?;
        // Before anything is touched.
        cores::threads(settings.threads, launch)?;
        let mut lock = None;
        let start = on_rank_zero(&communicator, || start(settings, launch, &mut lock))?;
        let Start { resume, recipe, tokens, validation_samples } = start;
        let policy = recipe::policy(&settings.policy, settings.clip, world)?;
        let vocab = if is_synthetic(settings) { recipe.model.vocab_size } else { tokenizer::VOCAB };
        let dataset = Dataset::open(TokenFile::open(&tokens, vocab)?, recipe.seq, recipe.seed)?;
        let mut controller = Controller::new(recipe.controller.clone())?;
        if communicator.rank() == 0 {
            let batch = controller.batch();
            let between = match (communicator.backend(), communicator.hosts()) {
                (Backend::Mpi, _) => "MPI".to_owned(),
                (Backend::Hierarchical, hosts) => format!("shared memory on each of {hosts} hosts, MPI between them"),
                (Backend::Shm | Backend::Auto, _) => "shared memory".to_owned(),
            };
            let backend = format!("{}, {between}", launch.source);
            let Recipe { model, seq, micro_batch, .. } = &recipe;
            let table = plan_table(model, &policy, world, launch.local_world, *seq, *micro_batch, batch, &backend)?;
            crate::print(table);
        }
        let processor = Processor::open(settings, launch, &communicator, policy.weights)?;
        let device: Arc<dyn Device> = match settings.device {
            DeviceKind::Cpu => Arc::new(processor.device.clone()),
            DeviceKind::LazyCpu => Arc::new(LazyCpu::new(recipe.seed)),
        };
        let layout = Layout::new(&recipe.model.units(), policy.mesh(world)?.shard);
        let mut engine = Engine::new(communicator.clone(), device.clone(), layout, policy)?;
        statistics::compare(&mut engine, settings.controller.alignment)?;
        let first = recipe.controller.base;
        if settings.controller.measures()
            && statistics::groups(&engine, first / recipe.micro_batch) < 2
            && communicator.rank() == 0
        {
            complain(format_args!(
                "a step of {first} samples is a single group here, whose noise cannot be measured, so the batch cannot grow: raise --batch, let gradients be reduced in every round (--shard zero-2 \
                 or zero-3), take more ranks, or choose --controller constant"
            ));
        }
        let model = Model::new(&*device, &recipe.model, policy.weights, recipe.micro_batch as usize, recipe.seq)?;
        let mut progress = Counters::default();
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
            checkpoints::tidy(&settings.out, resume.as_deref())?;
            let metrics = Metrics::open(&settings.out, progress.step)?;
            let mark = match is_synthetic(settings) {
                true => Mark { loss: (recipe.model.vocab_size as f64).ln(), of: "guessing" },
                false => Mark { loss: trigram::loss(&dataset, validation_samples)?, of: "a trigram model" },
            };
            let steps = settings.steps.map(|steps| steps.saturating_sub(progress.step));
            let screen = Screen::new(recipe.schedule.samples, progress.samples, steps);
            Ok(Output { screen, metrics, mark })
        })?;
        let tokens = recipe.micro_batch as usize * recipe.seq;
        let mut saver = Saver::new(&checkpoints::folder(&settings.out), settings.keep.map(NonZero::get))?;
        saver.reserve(&engine)?;
        let begin = || Timeline::begin(&settings.out, &communicator, &mut engine);
        Ok(Run {
            settings,
            timeline: settings.trace.then(begin).transpose()?,
            communicator,
            engine,
            model,
            dataset,
            controller,
            progress,
            saver,
            validation_samples,
            output,
            processor,
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
            let (mut line, stopped) = match self.step(stop) {
                Err(error) if error.is_of_numbers() => {
                    // Every rank has it, and all can still save what was under way.
                    self.finish_saving().or_else(|error| self.survive(error))?;
                    return Err(error);
                }
                step => step?,
            };
            let every = self.settings.validate_every;
            if self.is_done() || (every > 0 && !stopped && self.progress.step.is_multiple_of(every)) {
                validation = self.validate()?;
                line.validation_loss = Some(validation);
            }
            if let Some(Output { screen, metrics, .. }) = &mut self.output {
                line.memory = screen.memory();
                if let Err(error) = metrics.write(&line) {
                    // A disk that is full now may not be when there is something to save.
                    screen.say(format!("no metrics of this step: {error}"));
                }
                screen.step(&line);
                if let Some(loss) = line.validation_loss {
                    screen.say(format!("validation loss {loss:.4} after {} samples", line.samples_seen));
                }
            }
            let every = self.settings.save_every;
            if stopped || self.is_done() {
                self.finish_saving().or_else(|error| self.survive(error))?;
                self.begin_saving()?;
                self.finish_saving()?;
                if let Some(timeline) = self.timeline.take() {
                    match timeline.finish(&self.communicator)? {
                        Ok(path) => self.say(|| format!("timeline    {}", path.display())),
                        Err(error) => self.say(|| format!("no timeline: {error}")),
                    }
                }
                if stopped && !self.is_done() {
                    let (step, folder) = (self.progress.step, checkpoints::folder(&self.settings.out));
                    let path = folder.join(format!("step-{step:08}"));
                    self.say(|| {
                        format!("interrupted: saved {} after step {step}; go on with --resume auto", path.display())
                    });
                    return Ok(Ended::Interrupted);
                }
            } else if every > 0 && self.progress.step.is_multiple_of(every) {
                if self.saver.is_busy() {
                    self.say(|| "waiting for the checkpoint before, which is still being written".to_owned());
                }
                // After one that fails there will be another; a run that ends without one fails.
                self.finish_saving().or_else(|error| self.survive(error))?;
                self.begin_saving().or_else(|error| self.survive(error))?;
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
        if let Some(breakdown) = &self.processor.breakdown {
            breakdown.begin_step();
        }
        let started = Instant::now();
        let (rank, world) = (self.communicator.rank() as u64, self.communicator.world() as u64);
        let micro_batch = self.recipe.micro_batch;
        let batch = self.controller.batch().min(self.recipe.schedule.samples - self.progress.samples);
        let micro_batches = batch / micro_batch;
        let rounds = micro_batches.div_ceil(world);
        let lr = self.recipe.lr(batch, self.progress.samples + batch);
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
        let decided = self.controller.batch() as f64;
        let mut asked = [f64::from(u8::from(stopping(stop))), self.saver.request(), decided, decided * decided];
        let report = step.finish(self.recipe.adamw(lr), &mut asked)?;
        statistics::check_same(world, asked[2], asked[3])?;
        let observation = Observation {
            groups: statistics::groups(&self.engine, micro_batches),
            samples: batch,
            tokens: report.tokens as u64,
            group_square_norms: report.group_square_norms.expect("groups are measured unless told otherwise"),
            square_norm: report.square_norm,
            non_finite: 0,
        };
        let decision = self.controller.observe(&observation);
        let alignment = statistics::alignment(&self.engine, &observation, &report);
        self.progress.step += 1;
        self.progress.samples += batch;
        let saved = self.saver.observe(&self.engine, asked[1]).map_err(Error::from);
        saved.map(|saved| self.note(saved)).or_else(|error| self.survive(error))?;
        let elapsed = started.elapsed();
        if let Some(breakdown) = &mut self.processor.breakdown {
            breakdown.end_step(elapsed, report.exposed);
        }
        if let Some(timeline) = &mut self.timeline {
            timeline.write(&mut self.engine);
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
            decision: Some(decision.reason),
            alignment,
            validation_loss: None,
            flops,
            mfu: Some(flops / self.processor.peak),
            memory: None,
            parameter_memory: self.engine.memory(),
        };
        Ok((line, asked[0] > 0.0))
    }

    fn validate(&mut self) -> Result<f64, Error> {
        let micro_batch = self.recipe.micro_batch;
        validate(&mut self.engine, &mut self.model, &self.dataset, self.validation_samples, micro_batch)
    }

    /// Begins to save in the background.
    fn begin_saving(&mut self) -> Result<(), Error> {
        let progress = Progress {
            recipe: self.recipe.clone(),
            data: fingerprint(self.dataset.tokens()),
            step: self.progress.step,
            samples: self.progress.samples,
            controller: self.controller.state().clone(),
        };
        let extra = serde_json::to_value(&progress).expect("plain values");
        Ok(self.saver.begin(&self.engine, self.progress.step, &extra)?)
    }

    /// Waits for the save under way, if any.
    fn finish_saving(&mut self) -> Result<(), Error> {
        let saved = self.saver.wait(&self.engine)?;
        self.note(saved);
        Ok(())
    }

    fn note(&mut self, saved: Option<Saved>) {
        let Some(Saved { path, step, held, took, not_removed }) = saved else { return };
        self.progress.saved = Some(step);
        self.say(|| {
            let (took, held) = (took.as_secs_f64(), held.as_secs_f64() * 1e3);
            format!("saved {} in {took:.1} s, of which steps waited {held:.0} ms", path.display())
        });
        for error in not_removed {
            self.say(|| format!("an older checkpoint is still there: {error}"));
        }
    }

    /// Says that a save has failed, and goes on; any other failure ends the run.
    fn survive(&self, error: Error) -> Result<(), Error> {
        match error {
            Error::Runtime(error @ pillion_runtime::Error::File { .. }) => {
                self.say(|| format!("no checkpoint of this step: {error}"));
                Ok(())
            }
            error => Err(error),
        }
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
        let breakdown = self.processor.breakdown.take();
        if let Some(table) = breakdown.and_then(|breakdown| breakdown.table(self.processor.own_peak)) {
            screen.say(format!("\n{table}"));
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
