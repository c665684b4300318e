//! `pillion checkpoint show` and `verify`: what checkpoints there are, and whether they are whole.

use std::path::{Path, PathBuf};

use comfy_table::{Table, presets};
use pillion_runtime::checkpoint::{self, Checkpoint, Manifest};
use serde::Serialize;

use crate::Error;
use crate::run_folder;
use crate::settings::{CheckpointArgs, CheckpointCommand};
use crate::train::{bytes, grouped};

/// What is said of a checkpoint.
#[derive(Serialize)]
struct Found {
    path: PathBuf,
    /// Why it is none; names the file, and a remedy.
    error: Option<String>,
    #[serde(flatten)]
    contents: Option<Contents>,
}

#[derive(Serialize)]
struct Contents {
    step: u64,
    updates: u64,
    /// Shards of which each has a file.
    shards: usize,
    weights: String,
    clip: Option<f64>,
    units: Vec<Unit>,
    parameters: u64,
    /// Of all files but the manifest.
    bytes: u64,
    files: Vec<File>,
}

#[derive(Serialize)]
struct Unit {
    name: String,
    tensors: usize,
    parameters: u64,
}

#[derive(Serialize)]
struct File {
    name: String,
    bytes: u64,
    xxh3: String,
}

/// Prints; returns the exit code, 1 where something is damaged.
///
/// # Errors
/// When there is no checkpoint.
pub(crate) fn inspect(command: &CheckpointCommand) -> Result<i32, Error> {
    let (CheckpointArgs { dir, json }, verify) = match command {
        CheckpointCommand::Show(settings) => (settings, false),
        CheckpointCommand::Verify(settings) => (settings, true),
    };
    let look = |path: &PathBuf| {
        let read = checkpoint::open(path).and_then(|checkpoint| match verify {
            true => checkpoint.verify().map(|()| checkpoint),
            false => Ok(checkpoint),
        });
        let manifest = read.as_ref().ok().map(|Checkpoint { manifest, .. }| contents(manifest));
        Found { path: path.clone(), error: read.err().map(|error| error.to_string()), contents: manifest }
    };
    let found: Vec<Found> = folders(dir)?.iter().map(look).collect();
    if *json {
        crate::print_result(serde_json::to_string_pretty(&found).expect("plain values"))?;
    } else {
        crate::print_result(table(&found, verify))?;
        if let [Found { contents: Some(contents), .. }] = &*found {
            crate::print_result(units(contents))?;
        }
        found.iter().filter_map(|found| found.error.as_ref()).for_each(crate::complain);
    }
    let damaged = found.iter().filter(|found| found.error.is_some()).count();
    if damaged == 0 {
        return Ok(0);
    }
    if verify && found.len() > 1 {
        crate::complain(match found.iter().find(|found| found.error.is_none()) {
            Some(newest) => {
                format!("{damaged} of {} are damaged; the newest whole one is {}", found.len(), newest.path.display())
            }
            None => format!("none of {} is whole", found.len()),
        });
    }
    Ok(1)
}

/// The checkpoints that a path stands for, newest first: itself, those in it, or those of the run in it.
fn folders(path: &Path) -> Result<Vec<PathBuf>, Error> {
    let is_one = path.join("manifest.json").exists() || checkpoint::is_named_as_one(path);
    if is_one && path.is_dir() {
        return Ok(vec![path.to_owned()]);
    }
    for folder in [run_folder::checkpoints(path), path.to_owned()] {
        let found = checkpoint::folders(&folder)?;
        if !found.is_empty() {
            return Ok(found);
        }
    }
    Err(Error::file(path, "there is no checkpoint here: give the folder of a run, of checkpoints, or of a checkpoint"))
}

fn contents(manifest: &Manifest) -> Contents {
    let parameters = |shape: &[usize]| shape.iter().map(|&size| size as u64).product::<u64>();
    let unit = |unit: &pillion_runtime::UnitSpec| Unit {
        name: unit.name.clone(),
        tensors: unit.tensors.len(),
        parameters: unit.tensors.iter().map(|tensor| parameters(&tensor.shape)).sum(),
    };
    let units: Vec<Unit> = manifest.units.iter().map(unit).collect();
    let file =
        |file: &checkpoint::FileEntry| File { name: file.name.clone(), bytes: file.bytes, xxh3: file.xxh3.clone() };
    Contents {
        step: manifest.step,
        updates: manifest.updates,
        shards: manifest.world,
        weights: manifest.weights.clone(),
        clip: manifest.clip,
        parameters: units.iter().map(|unit| unit.parameters).sum(),
        units,
        bytes: manifest.files.iter().fold(0, |sum, file| file.bytes.saturating_add(sum)),
        files: manifest.files.iter().map(file).collect(),
    }
}

fn table(found: &[Found], verified: bool) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header(["checkpoint", "step", "shards", "weights", "tensors", "parameters", "size", "state"]);
    for Found { path, error, contents } in found {
        let state = match (error, verified) {
            (Some(_), _) => "damaged",
            (None, true) => "whole",
            (None, false) => "not verified",
        };
        let mut cells = vec![path.display().to_string()];
        cells.extend(match contents {
            None => vec!["-".to_owned(); 6],
            Some(contents) => {
                let tensors: usize = contents.units.iter().map(|unit| unit.tensors).sum();
                let Contents { step, shards, weights, parameters, bytes: size, .. } = contents;
                vec![
                    step.to_string(),
                    shards.to_string(),
                    weights.clone(),
                    tensors.to_string(),
                    grouped(*parameters),
                    bytes(*size),
                ]
            }
        });
        cells.push(state.to_owned());
        table.add_row(cells);
    }
    table
}

/// The units of one checkpoint.
fn units(contents: &Contents) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header(["unit", "tensors", "parameters"]);
    for Unit { name, tensors, parameters } in &contents.units {
        table.add_row([name.clone(), tensors.to_string(), grouped(*parameters)]);
    }
    table
}
