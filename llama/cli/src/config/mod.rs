//! `pillion config`: files of settings, checked and shown.

mod show;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use clap::Args;
use pillion_abs::{Rule, Settings};

use crate::jobs::MOST_RANKS;
use crate::settings::TrainArgs;
use crate::settings::file::SettingsFile;
use crate::train::check::{self, Checked};
use crate::train::grouped;
use crate::{Error, complain, print_result};

pub(crate) use show::show;

/// Settings of `config show`.
#[derive(Clone, Debug, Args)]
pub struct ShowArgs {
    /// File of settings to begin with, as --config names one; flags win.
    #[arg(value_name = "FILE", conflicts_with = "config")]
    pub file: Option<PathBuf>,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub settings: TrainArgs,
    /// All settings by name, each with its values as text.
    #[arg(skip)]
    pub values: BTreeMap<String, Vec<String>>,
}

/// Settings of `config check`.
#[derive(Clone, Debug, Args)]
pub struct CheckArgs {
    /// Files of settings.
    #[arg(value_name = "FILE", required = true)]
    pub files: Vec<PathBuf>,
    /// Number of ranks of the run, on all hosts; default: those that the file asks for, else 2, as
    /// many as `train` starts.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=MOST_RANKS as i64))]
    pub ranks: Option<u32>,
}

/// `pillion config check`: prints a line for each file. Returns the exit code: 2 when a file is
/// refused, whose reason has been printed.
///
/// # Errors
/// When stdout takes nothing more.
pub(crate) fn check(args: &CheckArgs) -> Result<i32, Error> {
    let mut code = 0;
    for path in &args.files {
        match check_file(path, args.ranks) {
            Ok(good) => print_result(format_args!("{}: {good}", path.display()))?,
            Err(reason) => {
                complain(reason);
                code = 2;
            }
        }
    }
    Ok(code)
}

/// What a good file makes of a run, or why it is refused.
fn check_file(path: &Path, ranks: Option<u32>) -> Result<String, String> {
    let file = SettingsFile::read(path)?;
    let settings = file.settings()?;
    let Checked { world, recipe } = check::check(&settings, ranks).map_err(|error| file.blame(&error.to_string()))?;
    let ranks = if world == 1 { "1 rank".to_owned() } else { format!("{world} ranks") };
    let Some(recipe) = recipe else {
        return Ok(format!("good for {ranks}, as far as it says itself: the rest is in the checkpoint of `resume`"));
    };
    let Settings { base, cap, rule, .. } = &recipe.controller;
    let batch = if *rule == Rule::Constant { base.to_string() } else { format!("{base} to {cap}") };
    let parameters = grouped(recipe.model.layout(1).parameters() as u64);
    let (samples, seq) = (grouped(recipe.schedule.samples), recipe.seq);
    Ok(format!("good for {ranks}: {parameters} parameters, {samples} samples of {seq} tokens, {batch} in a step"))
}
