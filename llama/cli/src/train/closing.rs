//! The end of a run: what was reached.

use std::ops::ControlFlow;

use pillion_data::TokenFile;
use pillion_llama::decoder::Decoder;
use pillion_llama::generate::{Sampling, generate};

use super::checkpoints::Progress;
use super::evaluation::Losses;
use super::log::Event;
use super::outputs::{Mark, Output};
use super::recipe::Recipe;
use super::run::Run;
use super::screen;
use super::start::on_rank_zero;
use crate::Error;
use crate::output::escaped;
use crate::text::Vocabulary;

impl Run<'_> {
    /// What was reached, a sample of text where that was learned, and the paths of what was
    /// written.
    pub(super) fn summary(&mut self, validation: &Losses) -> Result<(), Error> {
        let is_text = !self.dataset.bytes().is_some_and(TokenFile::is_synthetic);
        let writes = self.start.habits.sample > 0 && is_text;
        let sample = match writes.then(|| self.sample()) {
            // The validation tells whether the run has failed: its text may lack what broke this.
            Some(Err(Error::NonFinite(reason))) => Some(format!("no sample of text: {reason}")),
            sample => sample.transpose()?,
        };
        let Some(Output { screen, metrics, mark: Mark { loss, of }, .. }) = &self.output else { return Ok(()) };
        screen.close();
        let breakdown = self.processor.breakdown.take();
        if let Some(table) = breakdown.and_then(|breakdown| breakdown.table(self.processor.own_peak)) {
            screen.say(format!("\n{table}"));
        }
        let left_out = match self.progress.left_out() {
            0 => String::new(),
            samples => format!(", {samples} of them left out,"),
        };
        let validation = validation.main;
        let against = if validation < *loss { "below" } else { "not below" };
        let checkpoint = self.checkpoint();
        let best = self.best();
        let best_line = best.as_ref().map_or_else(String::new, |(path, loss)| {
            format!("\nbest        {}, with validation loss {loss:.4}", path.display())
        });
        let event = Event::End {
            steps: self.progress.step,
            samples: self.progress.samples,
            samples_left_out: self.progress.left_out(),
            seconds: screen.elapsed().as_secs_f64(),
            batch: self.controller.batch(),
            validation_loss: validation,
            mark_loss: *loss,
            mark: of,
            sample: sample.as_deref(),
            metrics: metrics.path(),
            checkpoint: &checkpoint,
            best: best.as_ref().map(|(path, _)| path.as_path()),
        };
        let sample = sample.as_ref().map_or_else(String::new, |sample| format!("\n{sample}\n\n"));
        let text = format!(
            "\n{} steps, {} samples{left_out} in {}; batch {} at the end\n\
             validation loss {validation:.4}, {against} that of {of}, {loss:.4}\n\
             {sample}\
             metrics     {}\ncheckpoint  {}{best_line}",
            self.progress.step,
            self.progress.samples,
            screen::duration(screen.elapsed()),
            self.controller.batch(),
            metrics.path().display(),
            checkpoint.display(),
        );
        screen.tell(&event, text);
        Ok(())
    }

    /// Text by the model.
    fn sample(&mut self) -> Result<String, Error> {
        let Run { engine, start, dataset, .. } = self;
        let recipe = &start.recipe;
        let find = || Vocabulary::in_run(&start.out, dataset.bytes().is_some());
        let missing = on_rank_zero(engine.communicator(), || {
            Ok(match find() {
                Ok(Some(_)) => None,
                Ok(None) => Some("there is no tokenizer".to_owned()),
                Err(error) => Some(error.to_string()),
            })
        })?;
        if let Some(why) = missing {
            return Ok(format!("no sample of text: {why}"));
        }
        let vocabulary = find()?.expect("rank 0 has found it");
        let first = if dataset.bytes().is_some() { "pub fn " } else { "The" };
        let sampling = Sampling { temperature: 0.7, seed: recipe.seed, ..Sampling::default() };
        let (device, weights) = (engine.device().clone(), engine.policy().weights);
        let mut decoder = Decoder::new(&*device, &recipe.model, weights, recipe.seq)?;
        let prompt = vocabulary.encode(first)?;
        let mut text = vocabulary.decoder(&prompt)?;
        let mut written = first.as_bytes().to_vec();
        let (known, length) = (vocabulary.len().min(recipe.model.vocab_size), start.habits.sample);
        generate(engine, &mut decoder, known, &prompt, length, &sampling, |token| {
            written.extend(text.push(token)?);
            Ok::<_, Error>(ControlFlow::Continue(()))
        })?;
        Ok(escaped(&written))
    }
}

/// Why a run that is resumed has no step to make, if it has none.
pub(super) fn nothing_left(saved: &Progress, recipe: &Recipe, steps: Option<u64>) -> Option<String> {
    let (made, wanted) = (saved.step, recipe.schedule.samples);
    if saved.samples >= wanted {
        return Some(format!(
            "nothing left to do: all {wanted} samples were dealt in {made} steps; to train on more, resume with \
             --change samples --samples N"
        ));
    }
    let is_enough = steps.is_some_and(|steps| made >= steps);
    is_enough.then(|| format!("nothing left to do: {made} steps were made; to make more, resume with a larger --steps"))
}
