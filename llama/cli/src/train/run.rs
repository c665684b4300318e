//! The loop of one rank. Every decision is taken from numbers that are the same on every rank.

use std::num::NonZero;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use pillion_abs::{Controller, Observation};
use pillion_collectives::{Communicator, Launch, Reduction};
use pillion_data::Dataset;
use pillion_kernels::LazyCpu;
use pillion_llama::model::Model;
use pillion_runtime::Engine;
use pillion_runtime::checkpoint::Saver;

use super::checkpoints;
use super::closing::nothing_left;
use super::cores::Processor;
use super::evaluation::validate;
use super::gpu;
use super::groups::Grouped;
use super::log::{self, Event};
use super::metrics::Line;
use super::non_finite::NonFinite;
use super::outputs::{Mark, Output};
use super::progress::Counters;
use super::recipe::{self, Recipe};
use super::same_settings::same_settings;
use super::source;
use super::start::{Beginning, Start, begin, on_rank_zero, on_rank_zero_alone};
use super::timeline::Timeline;
use super::{cores, measure, statistics, stopping};
use crate::gpu::Moved;
use crate::jobs::{self, Ended};
use crate::plan::{Setup, auto};
use crate::run_folder;
use crate::settings::{DeviceKind, TrainArgs};
use crate::{Error, complain};

/// Joins the other ranks and trains.
pub(crate) fn run(settings: &TrainArgs, launch: &Launch, stop: &Arc<AtomicBool>) -> Result<Ended, Error> {
    let communicator = jobs::join(&settings.job, launch, stop)?;
    let give_up = |error| jobs::give_up(&communicator, error);
    match Run::new(settings, launch, communicator.clone()).map_err(give_up)? {
        Some(mut run) => run.train(stop).map_err(give_up),
        None => Ok(Ended::Done),
    }
}

/// One rank of a run under way.
pub(super) struct Run<'s> {
    pub(super) settings: &'s TrainArgs,
    pub(super) start: Start,
    pub(super) communicator: Arc<Communicator>,
    pub(super) engine: Engine,
    pub(super) model: Model,
    pub(super) dataset: Dataset,
    pub(super) controller: Controller,
    pub(super) progress: Counters,
    pub(super) non_finite: NonFinite,
    pub(super) saver: Saver,
    /// On rank 0 alone.
    pub(super) output: Option<Output>,
    pub(super) processor: Processor,
    timeline: Option<Timeline>,
    groups: Grouped,
    inputs: Vec<u32>,
    targets: Vec<u32>,
}

/// What came of a step.
enum Outcome {
    /// An update; whether any rank was asked to stop.
    Made(Box<Line>, bool),
    /// A gradient or loss that is not finite, for which nothing was updated. The samples of the
    /// batch are still to be accounted for.
    NonFinite { error: Error, batch: u64, stopped: bool },
    /// No token of the batch counts, because all are masked.
    Masked { batch: u64, stopped: bool },
}

impl<'s> Run<'s> {
    /// None when there is nothing left to do, which has been said.
    fn new(
        settings: &'s TrainArgs,
        launch: &Launch,
        communicator: Arc<Communicator>,
    ) -> Result<Option<Run<'s>>, Error> {
        let world = communicator.world();
        same_settings(settings, &communicator)?;
        // Before anything is touched.
        cores::threads(settings.job.threads, launch)?;
        let Beginning { start, resume, from, folder } = begin(settings, launch, &communicator)?;
        let recipe = &start.recipe;
        let policy = recipe::policy(&recipe.placed(&settings.policy), recipe.clip.unwrap_or(0.0), world)?;
        let policy = gpu::adapt(settings, policy);
        let dataset = source::open(&start.tokens, recipe)?;
        let saved = resume.as_ref().map(|whole| checkpoints::progress(whole.checkpoint())).transpose()?;
        if let Some(nothing) = saved.as_ref().and_then(|saved| nothing_left(saved, recipe, settings.steps)) {
            if communicator.rank() == 0 {
                crate::print(nothing);
            }
            return Ok(None);
        }
        let controller = controller(recipe, saved.as_ref())?;
        let staging = start.habits.staging();
        let setup = Setup::of(recipe, policy, settings.policy.recompute, staging, launch, controller.batch())?;
        let (setup, processor) = match settings.auto {
            true => {
                let processor = Processor::open(settings, launch, &communicator, policy.weights)?;
                (choose(setup, &communicator, &processor)?, Some(processor))
            }
            false => (setup, None),
        };
        let policy = setup.policy;
        if communicator.rank() == 0 {
            log::plan(&setup, recipe, launch, &communicator, controller.batch(), settings.job.device.is_gpu());
        }
        let mut processor = match processor {
            Some(processor) => processor,
            None => Processor::open(settings, launch, &communicator, policy.weights)?,
        };
        let (device, moves): Moved = match settings.job.device {
            DeviceKind::Cpu => (Arc::new(processor.device.clone()), communicator.clone()),
            DeviceKind::LazyCpu => (Arc::new(LazyCpu::new(recipe.seed)), communicator.clone()),
            DeviceKind::Cuda(gpu) => {
                let moved = gpu::open(settings, gpu, &setup, start.habits.sample, launch, &communicator)?;
                processor.peak = Some(gpu::peak(&*moved.0, &moved.1, policy.weights)?);
                moved
            }
        };
        let layout = recipe.model.layout(policy.mesh(world)?.shard);
        let mut engine = Engine::new(moves, device.clone(), layout, policy)?;
        statistics::compare(&mut engine, settings.controller.alignment)?;
        let groups = statistics::groups(&engine, recipe.controller.base / recipe.micro_batch);
        let warning = statistics::growth_warning(recipe, groups);
        if let Some(warning) = warning.filter(|_| communicator.rank() == 0) {
            complain(warning);
        }
        let (micro_batch, recompute) = (recipe.micro_batch as usize, setup.recompute);
        let model = Model::new(&*device, &recipe.model, policy.weights, micro_batch, recipe.seq, recompute)?;
        let model = model.with_z_loss(recipe.z_loss as f32);
        let progress = match (&resume, saved) {
            (Some(whole), Some(saved)) => {
                whole.load(&mut engine)?;
                Counters::of(saved, whole.checkpoint().path.clone())
            }
            _ => {
                match &from {
                    Some(whole) => whole.load_weights(&mut engine)?,
                    None => engine.initialize(|name, shape| {
                        recipe.model.initial_values(recipe.seed, recipe.init_std, name, shape)
                    })?,
                }
                Counters::default()
            }
        };
        let began_with = resume.as_ref().or(from.as_ref());
        let output = on_rank_zero_alone(&communicator, || {
            let folder = folder.expect("rank 0 has claimed it");
            Output::open(settings, &start, &setup, &dataset, began_with, &progress, folder)
        })?;
        let tokens = recipe.micro_batch as usize * recipe.seq;
        let keep = start.habits.keep.map(NonZero::get);
        let mut saver = Saver::new(&run_folder::checkpoints(&start.out), keep, staging)?;
        saver.reserve(&engine)?;
        let begin = || Timeline::begin(&start.out, &communicator, &mut engine);
        Ok(Some(Run {
            settings,
            timeline: settings.trace.then(begin).transpose()?,
            communicator,
            engine,
            model,
            dataset,
            controller,
            progress,
            non_finite: NonFinite::new(start.habits.on_non_finite, start.habits.non_finite_limit),
            saver,
            output,
            processor,
            groups: Grouped::new(&start.recipe.groups, &start.recipe.model.units()),
            inputs: vec![0; tokens],
            targets: vec![0; tokens],
            start,
        }))
    }

    fn train(&mut self, stop: &AtomicBool) -> Result<Ended, Error> {
        let mut validation = self.validate()?;
        let newest = self.progress.newest.as_ref();
        let weights = newest.map_or("the initial weights".to_owned(), |saved| saved.path.display().to_string());
        self.check_validation(validation, &weights)?;
        if let Some(Output { screen, mark: Mark { loss, of }, .. }) = &self.output {
            let samples = self.start.validation_samples;
            let event =
                Event::Validation { step: self.progress.step, samples: self.progress.samples, loss: validation };
            let text = format!("validation loss {validation:.4} on {samples} samples; {of} reaches {loss:.4}");
            screen.tell(&event, text);
        }
        if self.is_asked_to_stop(stop)? {
            self.say(|| match &self.progress.newest {
                Some(saved) => {
                    format!(
                        "interrupted before another step: the checkpoint of step {} is still the newest",
                        saved.step
                    )
                }
                None => "interrupted before the first step: nothing was saved".to_owned(),
            });
            return Ok(Ended::Interrupted);
        }
        let mut stopped = false;
        while !self.is_done() && !stopped {
            let mut line = match self.step(stop)? {
                Outcome::Made(line, asked) => {
                    stopped = asked;
                    self.non_finite.has_made_a_step();
                    Some(line)
                }
                Outcome::Masked { batch, stopped: asked } => {
                    stopped = asked;
                    self.pass_over(batch);
                    None
                }
                Outcome::NonFinite { error, batch, stopped: asked } => {
                    stopped = asked;
                    self.leave_out(error, batch)?;
                    None
                }
            };
            let every = self.start.habits.validate_every;
            let is_due = line.is_some() && !stopped && every > 0 && self.progress.step.is_multiple_of(every);
            if self.is_done() || is_due {
                validation = self.validate()?;
                if let Some(line) = &mut line {
                    line.validation_loss = Some(validation);
                }
            }
            self.show(line.as_deref_mut(), validation)?;
            let every = self.start.habits.save_every;
            if line.is_some() && !stopped && !self.is_done() && every > 0 && self.progress.step.is_multiple_of(every) {
                if self.saver.is_busy() {
                    self.say(|| "waiting for the checkpoint before, which is still being written".to_owned());
                }
                // After one that fails there will be another; a run that ends without one fails.
                self.finish_saving().or_else(|error| self.survive(error))?;
                self.begin_saving().or_else(|error| self.survive(error))?;
            }
        }
        self.finish_saving().or_else(|error| self.survive(error))?;
        self.begin_saving()?;
        self.finish_saving()?;
        if let Some(timeline) = self.timeline.take() {
            match timeline.finish(&self.communicator, &mut self.engine)? {
                Ok(path) => self.say(|| format!("timeline    {}", path.display())),
                Err(error) => self.say(|| format!("no timeline: {error}")),
            }
        }
        if stopped && !self.is_done() {
            let (step, path) = (self.progress.step, self.checkpoint());
            if let Some(output) = &self.output {
                let text = format!("interrupted: saved {} after step {step}; go on with --resume auto", path.display());
                output.screen.tell(&Event::Interrupted { step, checkpoint: &path }, text);
            }
            return Ok(Ended::Interrupted);
        }
        self.summary(validation)?;
        self.check_validation(validation, "the last step")?;
        Ok(Ended::Done)
    }

    /// Writes what a step has done, and what the model reaches where it was validated.
    fn show(&mut self, line: Option<&mut Line>, validation: f64) -> Result<(), Error> {
        let is_done = self.is_done();
        let Some(Output { screen, metrics, events, folder, .. }) = &mut self.output else { return Ok(()) };
        let Some(line) = line else {
            if is_done {
                screen.validation(self.progress.step, self.progress.samples, validation);
            }
            return Ok(());
        };
        line.memory = screen.memory();
        let restored = folder.restore();
        if folder.is_lost() {
            return restored;
        }
        if let Err(error) = restored.and_then(|()| metrics.write(line)) {
            // A disk that is full now may not be when there is something to save.
            screen.say(format!("no metrics of this step: {error}"));
        }
        if let Some(Err(error)) = events.as_mut().map(|events| events.write(line)) {
            screen.say(format!("no events of this step: {error}"));
        }
        screen.step(line);
        if let Some(loss) = line.validation_loss {
            screen.validation(line.step, line.samples_seen, loss);
        }
        Ok(())
    }

    /// Whether any rank has been; a step asks by itself.
    fn is_asked_to_stop(&self, stop: &AtomicBool) -> Result<bool, Error> {
        let mut asked = [f64::from(u8::from(stopping(stop)))];
        self.communicator.all_reduce_scalars(&mut asked, Reduction::Max)?;
        Ok(asked[0] > 0.0)
    }

    fn is_done(&self) -> bool {
        let steps = self.settings.steps.is_some_and(|steps| self.progress.step >= steps);
        steps || self.progress.samples >= self.start.recipe.schedule.samples
    }

    /// One optimizer step: micro-batches are dealt to ranks in turn.
    fn step(&mut self, stop: &AtomicBool) -> Result<Outcome, Error> {
        if let Some(breakdown) = &self.processor.breakdown {
            breakdown.begin_step();
        }
        let started = Instant::now();
        let (rank, world) = (self.communicator.rank() as u64, self.communicator.world() as u64);
        let recipe = &self.start.recipe;
        let micro_batch = recipe.micro_batch;
        let batch = self.controller.batch().min(recipe.schedule.samples - self.progress.samples);
        let micro_batches = batch / micro_batch;
        let rounds = micro_batches.div_ceil(world);
        let lr = recipe.lr(batch, self.progress.samples + batch);
        let mut step = self.engine.begin(rounds as usize)?;
        for round in 0..rounds {
            let index = round * world + rank;
            if index >= micro_batches {
                step.idle_round()?;
                continue;
            }
            let first = self.progress.samples + index * micro_batch;
            let seq = recipe.seq;
            let rows = self.inputs.chunks_exact_mut(seq).zip(self.targets.chunks_exact_mut(seq));
            for (sample, (inputs, targets)) in (first..).zip(rows) {
                self.dataset.fill(sample, inputs, targets)?;
            }
            self.model.train(&mut step, &self.inputs, &self.targets)?;
        }
        let decided = self.controller.batch() as f64;
        let mut asked = [f64::from(u8::from(stopping(stop))), self.saver.request(), decided, decided * decided];
        let report = match step.finish(&self.groups.adamw(recipe.adamw(lr)), &mut asked) {
            Err(error @ (pillion_runtime::Error::NonFinite { .. } | pillion_runtime::Error::NoTokens { .. })) => {
                Err(error)
            }
            report => Ok(report?),
        };
        // What ranks asked of each other was summed in either case.
        statistics::check_same(world, asked[2], asked[3])?;
        let saved = self.saver.observe(&self.engine, asked[1]).map_err(Error::from);
        saved.map(|saved| self.note(saved)).or_else(|error| self.survive(error))?;
        let stopped = asked[0] > 0.0;
        let report = match report {
            Err(pillion_runtime::Error::NoTokens { .. }) => return Ok(Outcome::Masked { batch, stopped }),
            Err(error) => return Ok(Outcome::NonFinite { error: error.into(), batch, stopped }),
            Ok(report) => report,
        };
        let observation = Observation {
            groups: statistics::groups(&self.engine, micro_batches),
            samples: batch,
            tokens: report.tokens as u64,
            group_square_norms: report.group_square_norms.expect("groups are measured unless told otherwise"),
            square_norm: report.square_norm,
            non_finite: 0,
        };
        let decision = self.controller.observe(&observation);
        let alignment = statistics::alignment(&self.engine, self.settings.controller.alignment, &observation, &report);
        self.progress.step += 1;
        self.progress.samples += batch;
        let elapsed = started.elapsed();
        if let Some(breakdown) = &mut self.processor.breakdown {
            breakdown.end_step(elapsed, report.exposed);
        }
        if let Some(timeline) = &mut self.timeline {
            timeline.write(&mut self.engine);
        }
        let seconds = elapsed.as_secs_f64();
        let tokens_per_s = report.tokens / seconds;
        let flops = tokens_per_s * self.start.recipe.flops_per_token();
        let line = Line {
            step: self.progress.step,
            loss: report.loss_sum / report.tokens,
            lr,
            grad_norm: report.gradient_norm,
            batch_samples: batch,
            batch_tokens: report.tokens as u64,
            samples_seen: self.progress.samples,
            samples_left_out: self.progress.left_out(),
            tokens_per_s,
            step_ms: seconds * 1e3,
            exposed_ms: report.exposed.as_secs_f64() * 1e3,
            host_waits: report.host_waits,
            bytes_sent: report.bytes,
            collectives: report.operations,
            groups: Some(observation.groups),
            group_square_norms: Some(observation.group_square_norms),
            sum_square_norm: Some(observation.square_norm),
            noise_scale: decision.noise_scale,
            wanted_batch: decision.wanted,
            decision: Some(decision.reason),
            alignment,
            validation_loss: None,
            flops,
            mfu: self.processor.peak.map(|peak| flops / peak),
            memory: None,
            parameter_memory: self.engine.memory(),
        };
        Ok(Outcome::Made(Box::new(line), stopped))
    }

    fn validate(&mut self) -> Result<f64, Error> {
        // A run's own token file stays open, whatever becomes of its folder.
        if self.output.is_some()
            && self.dataset.bytes().is_none()
            && let Err(error) = self.dataset.check_unchanged()
        {
            // What was learned so far is not lost for it.
            complain(error);
        }
        let (samples, micro_batch) = (self.start.validation_samples, self.start.recipe.micro_batch);
        validate(&mut self.engine, &mut self.model, &self.dataset, samples, micro_batch)
    }

    pub(super) fn say(&self, text: impl FnOnce() -> String) {
        if let Some(output) = &self.output {
            output.screen.say(text());
        }
    }
}

/// The controller at the beginning of a run, or where a saved one goes on, perhaps with other
/// settings.
pub(super) fn controller(recipe: &Recipe, saved: Option<&checkpoints::Progress>) -> Result<Controller, Error> {
    let settings = recipe.controller.clone();
    Ok(match saved {
        None => Controller::new(settings)?,
        Some(saved) if saved.recipe.controller == settings => Controller::resume(settings, saved.controller.clone())?,
        Some(saved) => Controller::change(settings, saved.controller.clone())?,
    })
}

/// Chooses how parameters are moved and what is computed again, for `--auto`. Collective.
fn choose<'s>(given: Setup<'s>, communicator: &Communicator, processor: &Processor) -> Result<Setup<'s>, Error> {
    let machine = measure::machine(communicator, &processor.device, &given)?;
    let available = auto::available(communicator)?;
    // The fullest host decides.
    let local = communicator.all_gather_scalars(&[given.local as u64])?;
    let local = local.iter().map(|rank| rank[0]).max().unwrap_or(1) as usize;
    let fullest = Setup { local, ..given.clone() };
    let choice = on_rank_zero(communicator, || auto::choose(&fullest, &machine, available))?;
    if communicator.rank() == 0 {
        crate::print(format_args!(" auto         {}", choice.why));
    }
    Ok(choice.of(given))
}
