//! What a run says on stdout that a machine may want to know. `--log json` prints each of these as one
//! object a line; `event` is its kind.

use std::collections::BTreeMap;
use std::path::Path;

use clap::ValueEnum;
use pillion_collectives::{Backend, Communicator, Launch};
use serde::Serialize;

use super::about;
use super::metrics::Line;
use super::plan_table::plan_table;
use super::recipe::Recipe;
use crate::output;
use crate::plan::Setup;

/// How a run prints what it does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogKind {
    /// As lines of text.
    Text,
    /// As a JSON object a line.
    Json,
}

/// Something that happens in a run. Other lines of text are `message`s.
#[derive(Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub(super) enum Event<'r> {
    /// Before the first step.
    Plan {
        ranks: usize,
        parameters: usize,
        /// Of the first step, in samples.
        batch: u64,
        /// Bytes of a rank in all.
        memory: u64,
        recipe: &'r Recipe,
        /// By the names of flags.
        placement: BTreeMap<String, String>,
    },
    /// A step, with the fields of `metrics.jsonl`.
    Step(&'r Line),
    /// The loss on the validation text after `step` steps, or on a set of --validation-data.
    Validation {
        step: u64,
        samples: u64,
        loss: f64,
        #[serde(skip_serializing_if = "Option::is_none")]
        set: Option<&'r str>,
    },
    /// A checkpoint is whole.
    Checkpoint { step: u64, path: &'r Path, seconds: f64, held_seconds: f64 },
    /// A signal has ended the run, whose checkpoint is saved.
    Interrupted { step: u64, checkpoint: &'r Path },
    /// With --dry-run: what the start took, part by part, and bytes of the largest rank.
    DryRun { seconds: &'r BTreeMap<&'static str, f64>, memory: u64, validation_loss: f64 },
    /// The run has done what was asked.
    End {
        steps: u64,
        samples: u64,
        samples_left_out: u64,
        seconds: f64,
        /// In samples, for a next step.
        batch: u64,
        validation_loss: f64,
        /// The loss to beat, of `mark`.
        mark_loss: f64,
        mark: &'r str,
        sample: Option<&'r str>,
        metrics: &'r Path,
        checkpoint: &'r Path,
        /// With --keep-best, the one with the lowest validation loss.
        best: Option<&'r Path>,
    },
}

/// Says how a run is laid out.
pub(super) fn plan(
    setup: &Setup<'_>,
    recipe: &Recipe,
    launch: &Launch,
    communicator: &Communicator,
    batch: u64,
    on_gpus: bool,
) {
    let between = match (communicator.backend(), communicator.hosts()) {
        (Backend::Tcp, _) => "TCP".to_owned(),
        (Backend::Mpi, _) => "MPI".to_owned(),
        (Backend::Hierarchical, hosts) => {
            format!("shared memory on each of {hosts} hosts, {} between them", communicator.wire())
        }
        (Backend::Shm | Backend::Auto, _) => "shared memory".to_owned(),
    };
    let backend = format!("{}, {between}", launch.source);
    let planned = setup.plan();
    let event = Event::Plan {
        ranks: communicator.world(),
        parameters: planned.layout.parameters(),
        batch,
        memory: planned.needs.total(),
        recipe,
        placement: about::placement(setup, on_gpus),
    };
    output::tell(&event, plan_table(setup, &planned, batch, &backend));
}
