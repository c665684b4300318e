//! `metrics.jsonl`: one JSON object a step.

use std::fs::File;
use std::io::{BufRead, BufReader, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use pillion_abs::Reason;
use pillion_collectives::limits::explain;
use pillion_runtime::Memory;
use serde::{Deserialize, Serialize};

use crate::Error;

/// One step's line. Losses are nats a token; sums and norms are over all ranks, times and bytes those of rank 0.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Line {
    /// Number of the step, from 1.
    pub(crate) step: u64,
    /// Mean training loss of its batch, before the update.
    pub(crate) loss: f64,
    pub(crate) lr: f64,
    /// Norm of the mean gradient, before clipping.
    pub(crate) grad_norm: f64,
    pub(crate) batch_samples: u64,
    pub(crate) batch_tokens: u64,
    /// After the step.
    pub(crate) samples_seen: u64,
    pub(crate) tokens_per_s: f64,
    pub(crate) step_ms: f64,
    /// Time for which the host waited for collectives.
    pub(crate) exposed_ms: f64,
    /// Bytes that other ranks read from this one.
    pub(crate) bytes_sent: u64,
    /// Collective operations.
    pub(crate) collectives: u64,
    /// B_simple in samples, smoothed; null while unknown.
    pub(crate) noise_scale: Option<f64>,
    /// Batch that the controller asks for before limits; null while unknown.
    pub(crate) wanted_batch: Option<f64>,
    /// Why the next step's batch is what it is.
    #[serde(default)]
    pub(crate) decision: Option<Reason>,
    /// Where the gradient's noise points, with --alignment; null of steps that cannot tell.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) alignment: Option<Alignment>,
    /// Validation loss after the step, where there was a validation.
    pub(crate) validation_loss: Option<f64>,
    /// Floating-point operations a second, over all ranks.
    pub(crate) flops: f64,
    /// `flops` as a share of what the processors make in products of numbers in registers, measured at the start.
    #[serde(default)]
    pub(crate) mfu: Option<f64>,
    /// Bytes of memory of rank 0, pages shared between processes counted in parts, at the last look, which is not at every step.
    #[serde(default)]
    pub(crate) memory: Option<u64>,
    /// Bytes that the parameters of rank 0 take, by kind, counted from the buffers.
    #[serde(default)]
    pub(crate) parameter_memory: Memory,
}

/// Where the noise of a step's gradient points; the groups are the ranks.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Alignment {
    /// V_ip/Q² in samples: over θ², the batch of the inner-product test.
    pub(crate) along: f64,
    /// V_⊥/Q in samples: over ν², the batch of the orthogonality test.
    pub(crate) across: f64,
    /// Share of all coordinates whose own noise passes the norm test; those without a gradient do not.
    pub(crate) coordinates: f64,
    /// Share of the gradient's square that these have.
    pub(crate) mass: f64,
}

/// The file, open for appending.
pub(crate) struct Metrics {
    path: PathBuf,
    file: File,
    /// Bytes of whole lines.
    len: u64,
}

impl Metrics {
    /// Opens `metrics.jsonl` in `folder`, keeping the lines of steps up to `last_step` of an earlier run.
    pub(crate) fn open(folder: &Path, last_step: u64) -> Result<Metrics, Error> {
        let path = folder.join("metrics.jsonl");
        let fail = |error: std::io::Error| Error::file(&path, explain(&error));
        let mut kept = String::new();
        if last_step > 0 && path.exists() {
            for line in BufReader::new(File::open(&path).map_err(fail)?).lines() {
                let line = line.map_err(fail)?;
                // A line that was cut off by a crash belongs to a step that will be made again.
                match serde_json::from_str::<Line>(&line) {
                    Ok(parsed) if parsed.step <= last_step => {
                        kept.push_str(&line);
                        kept.push('\n');
                    }
                    _ => {}
                }
            }
        }
        // Replaced at once, so that no crash loses the lines that are kept.
        let next = path.with_extension("jsonl.incomplete");
        let mut file = File::create(&next).map_err(fail)?;
        file.write_all(kept.as_bytes()).and_then(|()| file.sync_all()).map_err(fail)?;
        std::fs::rename(&next, &path).map_err(fail)?;
        Ok(Metrics { file, path, len: kept.len() as u64 })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn write(&mut self, line: &Line) -> Result<(), Error> {
        let mut text = serde_json::to_string(line).expect("plain values");
        text.push('\n');
        match self.file.write_all(text.as_bytes()) {
            Ok(()) => {
                self.len += text.len() as u64;
                Ok(())
            }
            Err(error) => {
                // Half a line would spoil the next one, too. If this fails as well, there is no more to be done.
                let _ = self.file.set_len(self.len).and_then(|()| self.file.seek(SeekFrom::Start(self.len)));
                Err(Error::file(&self.path, explain(&error)))
            }
        }
    }
}
