//! The loop of one rank. Every decision is taken from numbers that are the same on every rank.

use std::num::NonZero;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use pillion_abs::Controller;
use pillion_collectives::{Communicator, Launch, Reduction};
use pillion_data::{Dataset, ReadAhead};
use pillion_kernels::LazyCpu;
use pillion_llama::model::Model;
use pillion_runtime::Engine;
use pillion_runtime::checkpoint::Saver;

use super::checkpoints::{self, Best};
use super::closing::nothing_left;
use super::cores::Processor;
use super::dry_run::Laps;
use super::evaluation::{Losses, Validation};
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
use super::step::Outcome;
use super::timeline::Timeline;
use super::unit_noise::UnitNoise;
use super::{cores, measure, statistics, stopping};
use crate::gpu::Moved;
use crate::jobs::{self, Ended};
use crate::plan::{Setup, auto};
use crate::run_folder;
use crate::settings::{DeviceKind, TrainArgs};
use crate::{Error, complain};

/// Joins the other ranks and trains.
pub(crate) fn run(settings: &TrainArgs, launch: &Launch, stop: &Arc<AtomicBool>) -> Result<Ended, Error> {
    let mut laps = Laps::begin();
    let communicator = jobs::join(&settings.job, launch, stop)?;
    laps.lap("ranks meet");
    let give_up = |error| jobs::give_up(&communicator, error);
    match Run::new(settings, launch, communicator.clone(), laps).map_err(give_up)? {
        Some(run) if settings.dry_run => run.rehearse(stop).map_err(give_up),
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
    pub(super) dataset: Arc<Dataset>,
    pub(super) samples: ReadAhead,
    validation: Validation,
    pub(super) controller: Controller,
    pub(super) progress: Counters,
    pub(super) non_finite: NonFinite,
    pub(super) saver: Saver,
    /// On rank 0 alone.
    pub(super) output: Option<Output>,
    pub(super) processor: Processor,
    pub(super) timeline: Option<Timeline>,
    pub(super) groups: Grouped,
    /// The best checkpoint, once the save under way is over.
    pub(super) best_to_be: Option<Best>,
    /// Samples seen when it was last asked whether a validation is due.
    looked_at: u64,
    pub(super) unit_noise: UnitNoise,
    /// Of the start.
    pub(super) laps: Laps,
}

impl<'s> Run<'s> {
    /// None when there is nothing left to do, which has been said.
    fn new(
        settings: &'s TrainArgs,
        launch: &Launch,
        communicator: Arc<Communicator>,
        mut laps: Laps,
    ) -> Result<Option<Run<'s>>, Error> {
        let world = communicator.world();
        same_settings(settings, &communicator)?;
        // Before anything is touched.
        let threads = cores::threads(settings.job.threads, launch)?;
        let Beginning { start, resume, from, folder } = begin(settings, launch, &communicator)?;
        let recipe = &start.recipe;
        let policy = recipe::policy(&recipe.placed(&settings.policy), recipe.clip.unwrap_or(0.0), world)?;
        let policy = gpu::adapt(settings, policy);
        let dataset = Arc::new(source::open(&start.tokens, recipe)?);
        laps.lap("settings and tokens");
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
        laps.lap("processor");
        let layout = recipe.model.layout(policy.mesh(world)?.shard);
        let mut engine = Engine::new(moves, device.clone(), layout, policy)?;
        statistics::compare(&mut engine, settings.controller.alignment)?;
        engine.measure_units(settings.unit_noise);
        let groups = statistics::groups(&engine, recipe.controller.base / recipe.micro_batch);
        let warning = statistics::growth_warning(recipe, groups);
        if let Some(warning) = warning.filter(|_| communicator.rank() == 0) {
            complain(warning);
        }
        let (micro_batch, recompute) = (recipe.micro_batch as usize, setup.recompute);
        let model = Model::new(&*device, &recipe.model, policy.weights, micro_batch, recipe.seq, recompute)?;
        let model = model.with_z_loss(recipe.z_loss as f32);
        laps.lap("memory");
        let progress = match (&resume, saved) {
            (Some(whole), Some(saved)) => {
                whole.load(&mut engine)?;
                Counters::of(saved, whole.checkpoint().path.clone(), &start)
            }
            _ => {
                match &from {
                    Some(whole) => whole.load_weights(&mut engine)?,
                    None => engine.initialize_on_threads(threads, |name, shape| {
                        recipe.model.initial_values(recipe.seed, recipe.init_std, name, shape)
                    })?,
                }
                Counters::default()
            }
        };
        let began_with = resume.as_ref().or(from.as_ref());
        laps.lap("weights");
        let output = on_rank_zero_alone(&communicator, || {
            let folder = folder.expect("rank 0 has claimed it");
            let mark = Mark::of(&dataset, recipe.model.vocab_size, start.validation_samples)?;
            let open = || Output::open(settings, &start, &setup, &dataset, began_with, &progress, folder, mark);
            // A rehearsal leaves an earlier run in its place.
            (!settings.dry_run).then(open).transpose()
        })?;
        let output = output.flatten();
        laps.lap("loss to beat, and files");
        let samples = ReadAhead::new(dataset.clone(), micro_batch, recipe.document_attention)?;
        let keep = start.habits.keep.map(NonZero::get);
        let mut saver = Saver::new(&run_folder::checkpoints(&start.out), keep, staging)?;
        saver.reserve(&engine)?;
        laps.lap("checkpoint memory");
        let begin = || Timeline::begin(&start.out, &communicator, &mut engine);
        Ok(Some(Run {
            settings,
            timeline: (settings.trace && !settings.dry_run).then(begin).transpose()?,
            communicator,
            engine,
            model,
            dataset,
            samples,
            validation: Validation::open(start.validation_samples, &start.validation_sets, &start.recipe)?,
            best_to_be: None,
            looked_at: progress.samples,
            unit_noise: UnitNoise::new(start.recipe.controller.ema_decay),
            laps,
            controller,
            progress,
            non_finite: NonFinite::new(start.habits.on_non_finite, start.habits.non_finite_limit),
            saver,
            output,
            processor,
            groups: Grouped::new(&start.recipe.groups, &start.recipe.model.units()),
            start,
        }))
    }

    fn train(&mut self, stop: &AtomicBool) -> Result<Ended, Error> {
        let mut validation = self.validate()?;
        let newest = self.progress.newest.as_ref();
        let weights = newest.map_or("the initial weights".to_owned(), |saved| saved.path.display().to_string());
        self.check_validation(&validation, &weights)?;
        if let Some(Output { screen, mark: Mark { loss, of }, .. }) = &self.output {
            let samples = self.validation.samples();
            let main = validation.main;
            let (step, seen) = (self.progress.step, self.progress.samples);
            let event = Event::Validation { step, samples: seen, loss: main, set: None };
            screen.tell(&event, format!("validation loss {main:.4} on {samples} samples; {of} reaches {loss:.4}"));
            screen.validation_sets(step, seen, &validation.sets);
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
        let (mut stopped, mut is_best) = (false, false);
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
            let is_due = !stopped && line.as_ref().is_some_and(|line| self.is_due(line));
            if let Some(line) = &line {
                self.looked_at = line.samples_seen;
            }
            let is_validated = self.is_done() || is_due;
            if is_validated {
                validation = self.validate()?;
                if let Some(line) = &mut line {
                    line.validation_loss = Some(validation.main);
                    line.validation_losses.clone_from(&validation.sets);
                }
            }
            self.show(line.as_deref_mut(), &validation)?;
            is_best = is_validated && self.is_best(validation.main);
            let every = self.start.habits.save_every;
            let is_due = is_best || (every > 0 && self.progress.step.is_multiple_of(every));
            if line.is_some() && !stopped && !self.is_done() && is_due {
                if self.saver.is_busy() {
                    self.say(|| "waiting for the checkpoint before, which is still being written".to_owned());
                }
                // After one that fails there will be another; a run that ends without one fails.
                self.finish_saving().or_else(|error| self.survive(error))?;
                let best = is_best.then_some(validation.main);
                self.begin_saving(best).or_else(|error| self.survive(error))?;
            }
        }
        self.finish_saving().or_else(|error| self.survive(error))?;
        self.begin_saving(is_best.then_some(validation.main))?;
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
        self.summary(&validation)?;
        self.check_validation(&validation, "the last step")?;
        Ok(Ended::Done)
    }

    /// Writes what a step has done, and what the model reaches where it was validated.
    fn show(&mut self, line: Option<&mut Line>, validation: &Losses) -> Result<(), Error> {
        let is_done = self.is_done();
        let Some(Output { screen, metrics, events, folder, .. }) = &mut self.output else { return Ok(()) };
        let Some(line) = line else {
            if is_done {
                screen.validation(self.progress.step, self.progress.samples, validation.main, &validation.sets);
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
            screen.validation(line.step, line.samples_seen, loss, &line.validation_losses);
        }
        Ok(())
    }

    /// Whether any rank has been; a step asks by itself.
    pub(super) fn is_asked_to_stop(&self, stop: &AtomicBool) -> Result<bool, Error> {
        let mut asked = [f64::from(u8::from(stopping(stop)))];
        self.communicator.all_reduce_scalars(&mut asked, Reduction::Max)?;
        Ok(asked[0] > 0.0)
    }

    fn is_done(&self) -> bool {
        let steps = self.settings.steps.is_some_and(|steps| self.progress.step >= steps);
        steps || self.progress.samples >= self.start.recipe.schedule.samples
    }

    /// Whether the model is to be validated after this step.
    fn is_due(&self, line: &Line) -> bool {
        let habits = &self.start.habits;
        match habits.validate_every_samples {
            Some(every) => self.looked_at / every < line.samples_seen / every,
            None => habits.validate_every > 0 && line.step.is_multiple_of(habits.validate_every),
        }
    }

    pub(super) fn validate(&mut self) -> Result<Losses, Error> {
        if self.output.is_some() {
            // A run's own token file stays open, whatever becomes of its folder.
            let own = if self.dataset.bytes().is_none() { self.dataset.check_unchanged() } else { Ok(()) };
            // What was learned so far is not lost for it.
            own.map_err(Error::from).and_then(|()| self.validation.check_unchanged()).unwrap_or_else(complain);
        }
        self.validation.losses(&mut self.engine, &mut self.model, &self.dataset, &self.start.recipe)
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
