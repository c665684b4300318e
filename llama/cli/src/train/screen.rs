//! What rank 0 prints during a run: a line a step, and on a terminal a progress bar below.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use indicatif::{HumanDuration, ProgressBar, ProgressStyle};

use super::log::Event;
use super::metrics::Line;
use super::plan_table::bytes;
use crate::output;

/// A run's output on a terminal or in a log.
pub(crate) struct Screen {
    bar: ProgressBar,
    started: Instant,
    first_sample: u64,
    samples: u64,
    /// Most steps that it may make.
    steps: Option<u64>,
    lines: u64,
    memory: Option<u64>,
}

/// Steps between two headings.
const HEADING_EVERY: u64 = 40;
/// Steps between two looks at the memory in use, which cost a walk over the page tables.
const MEMORY_EVERY: u64 = 20;

impl Screen {
    /// A run of `samples` samples, of which `seen` are done, and at most `steps` steps more.
    pub(crate) fn new(samples: u64, seen: u64, steps: Option<u64>) -> Screen {
        let bar = if super::on_terminal() {
            let style = ProgressStyle::with_template("{bar:40} {pos}/{len} samples, {elapsed} so far, {eta} to go");
            ProgressBar::new(samples).with_style(style.expect("a template of known keys")).with_position(seen)
        } else {
            ProgressBar::hidden()
        };
        Screen { bar, started: Instant::now(), first_sample: seen, samples, steps, lines: 0, memory: None }
    }

    /// Prints anything above the bar.
    pub(crate) fn say(&self, text: impl std::fmt::Display) {
        self.bar.suspend(|| crate::print(text));
    }

    /// Prints what happens above the bar: in JSON, or as the text.
    pub(crate) fn tell(&self, event: &Event, text: impl std::fmt::Display) {
        self.bar.suspend(|| output::tell(event, text));
    }

    /// Prints the loss on the validation text after `step` steps, and those on other sets.
    pub(crate) fn validation(&self, step: u64, samples: u64, loss: f64, sets: &BTreeMap<String, Option<f64>>) {
        self.tell(
            &Event::Validation { step, samples, loss, set: None },
            format_args!("validation loss {loss:.4} after {samples} samples"),
        );
        self.validation_sets(step, samples, sets);
    }

    /// Prints the losses on the sets of --validation-data.
    pub(crate) fn validation_sets(&self, step: u64, samples: u64, sets: &BTreeMap<String, Option<f64>>) {
        for (name, loss) in sets {
            let loss = loss.unwrap_or(f64::NAN);
            let event = Event::Validation { step, samples, loss, set: Some(name) };
            self.tell(&event, format_args!("validation loss {loss:.4} on {name}"));
        }
    }

    /// Memory in use, looked at now and then. The first step is not like the others: it allocates.
    pub(crate) fn memory(&mut self) -> Option<u64> {
        if self.lines == 1 || self.lines.is_multiple_of(MEMORY_EVERY) {
            self.memory = proportional_memory();
        }
        self.memory
    }

    /// Prints a step.
    pub(crate) fn step(&mut self, line: &Line) {
        if self.lines.is_multiple_of(HEADING_EVERY) && !output::is_json() {
            self.say(format!(
                "{:>6} {:>7} {:>7} {:>8} {:>6} {:>7} {:>8} {:>8} {:>5} {:>9} {:>10} {:>8}",
                "step", "loss", "norm", "lr", "batch", "noise", "tok/s", "GFLOP/s", "mfu", "exposed", "memory", "to go"
            ));
        }
        self.lines += 1;
        let noise = line.noise_scale.map_or("-".to_owned(), |scale| format!("{scale:.0}"));
        let text = format!(
            "{:>6} {:>7.4} {:>7.3} {:>8.2e} {:>6} {:>7} {:>8.0} {:>8.1} {:>5} {:>7.1}ms {:>10} {:>8}",
            line.step,
            line.loss,
            line.grad_norm,
            line.lr,
            line.batch_samples,
            noise,
            line.tokens_per_s,
            line.flops / 1e9,
            line.mfu.map_or("-".to_owned(), |mfu| format!("{:.0}%", 100.0 * mfu)),
            line.exposed_ms,
            line.memory.map_or("-".to_owned(), bytes),
            self.remaining(line.samples_seen),
        );
        self.tell(&Event::Step(line), text);
        self.bar.set_position(line.samples_seen);
    }

    /// An estimate of the rest, from the run's mean speed.
    fn remaining(&self, seen: u64) -> String {
        let done = seen.saturating_sub(self.first_sample).max(1);
        let by_samples = self.samples.saturating_sub(seen) as f64 / done as f64;
        let by_steps = self.steps.map(|steps| steps.saturating_sub(self.lines) as f64 / self.lines.max(1) as f64);
        let rest = by_steps.map_or(by_samples, |by_steps| by_steps.min(by_samples));
        let seconds = (self.started.elapsed().as_secs_f64() * rest).round() as u64;
        format!("{}:{:02}", seconds / 60, seconds % 60)
    }

    /// Time since the first step.
    pub(crate) fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }

    /// Takes the bar away.
    pub(crate) fn close(&self) {
        self.bar.finish_and_clear();
    }
}

/// A duration for reading.
pub(crate) fn duration(duration: Duration) -> String {
    HumanDuration(duration).to_string()
}

/// Bytes of memory in use, shared pages divided among those who map them (PSS).
pub(super) fn proportional_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/self/smaps_rollup").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("Pss:"))?;
    Some(line.trim().trim_end_matches(" kB").trim().parse::<u64>().ok()? * 1024)
}
