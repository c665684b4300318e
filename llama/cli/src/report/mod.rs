//! `pillion report`: runs side by side, on one page that needs no network.
//!
//! | file | subject |
//! |---|---|
//! | `runs` | what is read of a run |
//! | `groups` | runs that differ only in their seed, as one line |
//! | `panels` | which plots there are, and their SVG |
//! | `timeline` | a step's bars, from `trace.json` |
//! | `page` | the HTML around them |

mod groups;
mod page;
mod panels;
mod runs;
#[cfg(test)]
mod tests;
mod timeline;
mod units;

use std::path::PathBuf;

use clap::Args;

use self::groups::Group;
use crate::Error;
use crate::output::{print_result, replace_file};
use crate::train::events::Events;

/// Settings of `report`.
#[derive(Clone, Debug, Args)]
pub struct ReportArgs {
    /// Folders of runs: their --out.
    #[arg(value_name = "RUN", required = true)]
    pub runs: Vec<PathBuf>,
    /// The page.
    #[arg(long, value_name = "FILE", default_value = "report.html")]
    pub out: PathBuf,
    /// Draw a line for each run, also where runs differ only in their seed.
    #[arg(long)]
    pub each: bool,
    /// Write the numbers of steps for TensorBoard too: a folder for each run, by its name on the
    /// page, in DIR.
    #[arg(long, value_name = "DIR")]
    pub tensorboard: Option<PathBuf>,
}

/// Writes the page.
///
/// # Errors
/// When a run cannot be read, or the page cannot be written. Then there is no page, or the one that
/// was there before.
pub(crate) fn report(settings: &ReportArgs) -> Result<i32, Error> {
    let runs = runs::read(&settings.runs)?;
    let groups = if settings.each { Group::each(&runs) } else { Group::by_seed(&runs) };
    let page = page::page(&runs, &groups).into_string();
    replace_file(&settings.out, page.as_bytes())?;
    if let Some(folder) = &settings.tensorboard {
        for (run, path) in runs.iter().zip(&settings.runs) {
            // A name is the end of a path, which may be all of it.
            Events::of_metrics(path, &folder.join(run.name.trim_start_matches('/')))?;
        }
    }
    let (out, runs) = (settings.out.display(), runs.len());
    print_result(format_args!("{out}: {runs} {}", if runs == 1 { "run" } else { "runs" }))?;
    Ok(0)
}
