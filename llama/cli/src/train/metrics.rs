//! `metrics.jsonl`: one JSON object a step.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use pillion_abs::Reason;
use pillion_collectives::limits::explain;
use pillion_runtime::Memory;
use serde::{Deserialize, Serialize};

use crate::{Error, run_folder};

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
    /// Tokens that the loss counts: N in the documentation of `pillion-abs`.
    pub(crate) batch_tokens: u64,
    /// After the step.
    pub(crate) samples_seen: u64,
    /// Of these, the samples that were left out because their gradients were not finite.
    #[serde(default)]
    pub(crate) samples_left_out: u64,
    pub(crate) tokens_per_s: f64,
    pub(crate) step_ms: f64,
    /// Time for which the host waited for collectives.
    pub(crate) exposed_ms: f64,
    /// Time for which the rank waited for its samples.
    #[serde(default)]
    pub(crate) data_wait_ms: f64,
    /// Times that the host waited until its device had run all that it was given.
    #[serde(default)]
    pub(crate) host_waits: u64,
    /// Bytes that other ranks read from this one.
    pub(crate) bytes_sent: u64,
    /// Collective operations.
    pub(crate) collectives: u64,
    /// Groups whose gradients were compared: K. Null in files of versions that did not write it,
    /// as are the next two.
    #[serde(default)]
    pub(crate) groups: Option<u64>,
    /// Σ_k ‖G_k‖²/n_k, where G_k is the gradient of the summed loss of group k's n_k tokens, in
    /// nats: so nats² a token, over the square of a parameter's unit. Before clipping.
    #[serde(default)]
    pub(crate) group_square_norms: Option<f64>,
    /// ‖Σ_k G_k‖²: nats², over the square of a parameter's unit. Before clipping, divided by
    /// nothing.
    #[serde(default)]
    pub(crate) sum_square_norm: Option<f64>,
    /// B_simple in samples, smoothed; null while unknown.
    pub(crate) noise_scale: Option<f64>,
    /// The same of each unit of the model, in their order, with --unit-noise; smoothed over the steps
    /// since the run began or went on.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) unit_noise_scales: Vec<Option<f64>>,
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
    /// Those on the sets of --validation-data, by name; null where one is not finite.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) validation_losses: BTreeMap<String, Option<f64>>,
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
    /// What `coordinates` would be if there were no gradient, only normal noise: see
    /// [`pillion_abs::ByChance`]. Null in files of versions that did not write it, as is the next.
    #[serde(default)]
    pub(crate) coordinates_by_chance: Option<f64>,
    /// What `mass` would be then.
    #[serde(default)]
    pub(crate) mass_by_chance: Option<f64>,
}

/// The file, open for appending.
pub(crate) struct Metrics {
    path: PathBuf,
    file: File,
    /// Bytes of whole lines.
    len: u64,
}

impl Metrics {
    /// Opens `metrics.jsonl` in `folder`, keeping the lines of steps up to `last_step` of an
    /// earlier run. Lines of later steps, which will be made again, go to `metrics.aside.jsonl`.
    pub(crate) fn open(folder: &Path, last_step: u64) -> Result<Metrics, Error> {
        let path = run_folder::metrics(folder);
        let fail = |error: std::io::Error| Error::file(&path, explain(&error));
        let (mut kept, mut later) = (String::new(), String::new());
        if path.exists() {
            for line in BufReader::new(File::open(&path).map_err(fail)?).lines() {
                let line = line.map_err(fail)?;
                let lines = match serde_json::from_str::<Line>(&line) {
                    Ok(parsed) if parsed.step <= last_step => &mut kept,
                    // A line that was cut off by a crash belongs to a step that will be made again.
                    Err(_) if run_folder::begins_as_metrics(&line) => continue,
                    _ => &mut later,
                };
                lines.push_str(&line);
                lines.push('\n');
            }
        }
        if !later.is_empty() {
            let aside = File::options().append(true).create(true).open(run_folder::metrics_aside(folder));
            aside.and_then(|mut aside| aside.write_all(later.as_bytes())).map_err(fail)?;
        }
        // Replaced at once, so that no crash loses the lines that are kept.
        let next = run_folder::unfinished(folder, "metrics");
        let mut file = create(&next).map_err(fail)?;
        file.write_all(kept.as_bytes()).and_then(|()| file.sync_all()).map_err(fail)?;
        std::fs::rename(&next, &path).map_err(fail)?;
        Ok(Metrics { file, path, len: kept.len() as u64 })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Writes the file again where somebody has removed it: its lines are still to be had. The
    /// caller holds the folder's lock, so no other run has written a file of this name.
    fn restore(&mut self) -> Result<(), Error> {
        let fail = |error: std::io::Error| Error::file(&self.path, error);
        let of = |metadata: std::fs::Metadata| (metadata.dev(), metadata.ino());
        let open = self.file.metadata().map(of).map_err(fail)?;
        if std::fs::metadata(&self.path).is_ok_and(|named| of(named) == open) {
            return Ok(());
        }
        let mut lines = vec![0; self.len as usize];
        self.file.read_exact_at(&mut lines, 0).map_err(fail)?;
        let mut file = File::options().read(true).write(true).create_new(true).open(&self.path).map_err(fail)?;
        file.write_all(&lines).map_err(fail)?;
        self.file = file;
        Ok(())
    }

    pub(crate) fn write(&mut self, line: &Line) -> Result<(), Error> {
        let mut text = serde_json::to_string(line).expect("plain values");
        text.push('\n');
        self.restore()?;
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

/// An empty file, to write and to read.
fn create(path: &Path) -> std::io::Result<File> {
    File::options().read(true).write(true).create(true).truncate(true).open(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Lines of versions before the sums, and of those before the decision, alignment and memory.
    #[test]
    fn lines_of_earlier_versions_are_read() {
        let first = r#""step":1,"loss":5.5,"lr":0.001,"grad_norm":2.5,"batch_samples":8,"batch_tokens":256,
            "samples_seen":8,"tokens_per_s":1000.0,"step_ms":10.5,"exposed_ms":0.5,"bytes_sent":64,"collectives":9,
            "noise_scale":null,"wanted_batch":3.5,"validation_loss":null,"flops":1e9"#;
        let then = r#""decision":"grown","alignment":{"along":1.0,"across":2.0,"coordinates":0.5,"mass":0.75},
            "mfu":0.5,"memory":1000"#;
        let memory = serde_json::to_string(&Memory::default()).unwrap();
        let oldest: Line = serde_json::from_str(&format!("{{{first}}}")).unwrap();
        assert_eq!((oldest.batch_tokens, oldest.decision), (256, None));
        let older = format!("{{{first},{then},\"parameter_memory\":{memory}}}");
        let older: Line = serde_json::from_str(&older).unwrap();
        assert_eq!(older.decision, Some(Reason::Grown));
        assert_eq!(older.alignment.map(|found| (found.mass, found.mass_by_chance)), Some((0.75, None)));
        for line in [oldest, older] {
            assert_eq!((line.groups, line.group_square_norms, line.sum_square_norm), (None, None, None));
        }
    }
}
