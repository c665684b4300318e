//! What rank 0 writes while a run goes: screen, metrics, event files, and the loss to beat.

use pillion_data::{Dataset, Split, trigram};
use pillion_runtime::checkpoint::Whole;

use super::about::{self, About};
use super::checkpoints;
use super::events::Events;
use super::metrics::Metrics;
use super::progress::Counters;
use super::screen::Screen;
use super::source::fingerprint;
use super::start::Start;
use super::tokenizers;
use crate::Error;
use crate::models::{self, TOKENIZER};
use crate::plan::Setup;
use crate::run_folder::{self, RunFolder};
use crate::settings::TrainArgs;

/// What rank 0 writes.
pub(super) struct Output {
    pub(super) screen: Screen,
    pub(super) metrics: Metrics,
    /// With --tensorboard.
    pub(super) events: Option<Events>,
    pub(super) mark: Mark,
    /// Keeps other runs out.
    pub(super) folder: RunFolder,
}

/// The loss to beat, and what has it.
pub(super) struct Mark {
    pub(super) loss: f64,
    pub(super) of: &'static str,
}

impl Output {
    /// Sets an earlier run in the folder aside, unless this one goes on with it, and opens the files.
    /// The run began with a checkpoint, or with none.
    ///
    /// # Errors
    /// When a file cannot be read or written.
    pub(super) fn open(
        settings: &TrainArgs,
        start: &Start,
        setup: &Setup<'_>,
        dataset: &Dataset,
        began_with: Option<&Whole>,
        progress: &Counters,
        folder: RunFolder,
        mark: Mark,
    ) -> Result<Output, Error> {
        let recipe = &start.recipe;
        let mut companions = match began_with {
            Some(whole) => models::companions(&whole.checkpoint().path)?,
            None => Vec::new(),
        };
        if let Some(files) = tokenizers::files_of(dataset)?
            && !companions.iter().any(|(name, _)| name == TOKENIZER)
        {
            companions.extend(files);
        }
        let newest = progress.newest.as_ref().map(|saved| saved.path.as_path());
        folder.set_aside(newest, settings.trace)?;
        checkpoints::tidy(&start.out, newest)?;
        models::keep(&companions, &start.out)?;
        let steps = settings.steps.map(|steps| steps.saturating_sub(progress.step));
        let screen = Screen::new(recipe.schedule.samples, progress.samples, steps);
        let metrics = Metrics::open(&start.out, progress.step)?;
        let about = About {
            pillion: env!("CARGO_PKG_VERSION").to_owned(),
            recipe: recipe.clone(),
            data: fingerprint(dataset)?,
            ranks: Some(setup.mesh.world()),
            steps: settings.steps,
            placement: about::placement(setup, settings.job.device.is_gpu()),
        };
        about.write(&start.out)?;
        let events = || Events::of_metrics(&start.out, &run_folder::tensorboard(&start.out));
        let events = start.habits.tensorboard.then(events).transpose()?;
        Ok(Output { screen, metrics, events, mark, folder })
    }
}

impl Mark {
    /// That of a trigram model on text of bytes, all of which this reads; of guessing on anything
    /// else.
    ///
    /// # Errors
    /// When the tokens cannot be read.
    pub(super) fn of(dataset: &Dataset, vocab: usize, validation_samples: u64) -> Result<Mark, Error> {
        let Some(tokens) = dataset.bytes().filter(|tokens| !tokens.is_synthetic()) else {
            return Ok(Mark { loss: (vocab as f64).ln(), of: "guessing" });
        };
        let is_long = tokens.len(Split::Train) > trigram::MOST_TOKENS;
        let of = if is_long { "a trigram model of the text's first 67 million tokens" } else { "a trigram model" };
        Ok(Mark { loss: trigram::loss(dataset, validation_samples)?, of })
    }
}
