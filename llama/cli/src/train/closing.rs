//! The end of a run: what was reached.

use pillion_data::tokenizer;
use pillion_llama::generate::generate;

use super::checkpoints::Progress;
use super::log::Event;
use super::recipe::Recipe;
use super::run::{Mark, Output, Run};
use super::screen;
use super::source::is_synthetic;
use crate::Error;
use crate::output::escaped;

impl Run<'_> {
    /// What was reached, a sample of text where that was learned, and the paths of what was
    /// written.
    pub(super) fn summary(&mut self, validation: f64) -> Result<(), Error> {
        let writes = self.start.habits.sample > 0 && !is_synthetic(self.dataset.tokens());
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
        let against = if validation < *loss { "below" } else { "not below" };
        let checkpoint = self.checkpoint();
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
        };
        let sample = sample.as_ref().map_or_else(String::new, |sample| format!("\n{sample}\n\n"));
        let text = format!(
            "\n{} steps, {} samples{left_out} in {}; batch {} at the end\n\
             validation loss {validation:.4}, {against} that of {of}, {loss:.4}\n\
             {sample}\
             metrics     {}\ncheckpoint  {}",
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

    /// Text by the model, in the memory that training has used.
    fn sample(&mut self) -> Result<String, Error> {
        const PROMPT: &str = "pub fn ";
        let mut prompt = Vec::new();
        tokenizer::encode(PROMPT.as_bytes(), &mut prompt);
        let (seq, seed, length) = (self.start.recipe.seq, self.start.recipe.seed, self.start.habits.sample);
        let text = generate(&mut self.engine, &mut self.model, seq, tokenizer::VOCAB, &prompt, length, 0.7, seed)?;
        Ok(format!("{PROMPT}{}", escaped(&tokenizer::decode(&text))))
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
