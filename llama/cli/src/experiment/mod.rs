//! `pillion experiment paper`: the paper's comparison of batch schedules, at the size of a small machine.
//!
//! Every run is a `pillion train` of its own, which saves as it goes; so an experiment that was interrupted goes on where it was. What it reports, it reads
//! from the runs' `metrics.jsonl`, and nothing else.

mod compare;
#[cfg(test)]
mod documented;
mod figure;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
mod grid;
mod report;
mod results;

use std::ffi::OsString;
use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use clap::Args;
use indicatif::{HumanDuration, ProgressBar, ProgressStyle};
use pillion_collectives::launcher::EXIT_INTERRUPTED;
use rustix::process::{Pid, Signal, kill_process};

use crate::run_folder::RunFolder;
use crate::signals::{self, Second};
use crate::train::stopping;
use crate::{Error, print, print_result, train};
use grid::{Run, grid};
use results::Results;

/// How often to ask whether the run under way has ended.
const POLL: Duration = Duration::from_millis(200);
/// How often to read how far it is, which takes time from it.
const LOOK: Duration = Duration::from_secs(5);

/// Settings of `experiment paper`.
#[derive(Clone, Debug, Args)]
pub struct PaperArgs {
    /// Text to train on, a file or a folder; default: the sources of the crates this program is built from.
    #[arg(long, value_name = "PATH")]
    pub data: Option<PathBuf>,
    /// Folder of all runs and of the report; finished runs in it are not made again, and keep what they print and their metrics alone. Default: runs/paper, or runs/paper-quick with --quick.
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Ranks of each run, 1, 2 or 4.
    #[arg(long, value_name = "N", default_value_t = 2)]
    pub ranks: usize,
    /// Samples of each run; default: 8192, or 1536 with --quick.
    #[arg(long, value_name = "N")]
    pub samples: Option<u64>,
    /// Seeds of each schedule; default: 3, or 1 with --quick.
    #[arg(long, value_name = "N")]
    pub seeds: Option<u64>,
    /// Samples to validate each run on.
    #[arg(long, value_name = "N", default_value_t = 512)]
    pub validation_samples: u64,
    /// Only runs whose name has this part, such as norm-test or 3.3M.
    #[arg(long, value_name = "PART")]
    pub only: Option<String>,
    /// A look at it in less than ten minutes: the smaller model, one seed, few samples. Says little about schedules.
    #[arg(long)]
    pub quick: bool,
    /// Make the report of the runs that are finished, and no other run.
    #[arg(long)]
    pub report: bool,
}

/// Makes the runs that are missing, then the report; returns the exit code.
///
/// # Errors
/// When a run fails, named, or a file cannot be written.
pub(crate) fn paper(settings: &PaperArgs) -> Result<i32, Error> {
    let runs = grid(settings)?;
    if let (Some(text), false) = (&settings.data, settings.report) {
        // Otherwise the first run would find out, in a log of its own.
        pillion_data::check(text)?;
    }
    let out = settings
        .out
        .clone()
        .unwrap_or_else(|| format!("runs/paper{}", if settings.quick { "-quick" } else { "" }).into());
    let folder = |run: &Run| out.join(&run.name);
    for run in &runs {
        check_settings(settings, run, &folder(run))?;
    }
    // A report alone can be made while runs are.
    let _lock = if settings.report { None } else { Some(claim(&out)?) };
    if !settings.report {
        let stop = signals::flag(Second::Waits)?;
        let mut progress = Progress::new(&runs, &folder)?;
        for (number, run) in runs.iter().enumerate() {
            if Results::of(&folder(run), run.samples)?.is_finished() {
                keep_metrics(&folder(run))?;
                continue;
            }
            progress.begin(number, run, &runs);
            let ended = make(settings, run, &folder(run), &stop, &mut progress)?;
            match ended.code() {
                Some(0) => {
                    progress.end(run);
                    keep_metrics(&folder(run))?;
                }
                // It may not have come so far as to end in its own way.
                _ if stopping(&stop) => {}
                _ => {
                    let reason = format!("the run {} failed ({ended}): see this log", run.name);
                    return Err(Error::file(log(&folder(run)), reason));
                }
            }
            if stopping(&stop) {
                print("interrupted: the same command goes on from here");
                return Ok(EXIT_INTERRUPTED);
            }
        }
    }
    let (mut finished, wanted) = (Vec::new(), runs.len());
    for run in runs {
        let results = Results::of(&folder(&run), run.samples)?;
        if results.is_finished() {
            finished.push((run, results));
        }
    }
    if finished.is_empty() {
        return Err(Error::file(&out, "no run in it is finished: leave --report out to make them"));
    }
    let (path, tables) = report::write(&out, &finished, wanted)?;
    print_result(tables)?;
    print_result(format_args!("report      {}", path.display()))?;
    Ok(0)
}

/// Claims the experiment's folder.
fn claim(out: &Path) -> Result<RunFolder, Error> {
    RunFolder::claim(out)
}

/// Makes one run, or goes on with it.
fn make(
    settings: &PaperArgs,
    run: &Run,
    folder: &Path,
    stop: &AtomicBool,
    progress: &mut Progress,
) -> Result<ExitStatus, Error> {
    let log_path = log(folder);
    let parent = folder.parent().expect("a run lies in the experiment's folder");
    let goes_on = !Results::of(folder, run.samples)?.steps.is_empty();
    let create = || {
        std::fs::create_dir_all(parent)?;
        if goes_on {
            return File::options().append(true).open(&log_path);
        }
        let mut log = File::create(&log_path)?;
        writeln!(log, "{}", first_line(settings, run))?;
        Ok(log)
    };
    let output = create().map_err(|error: std::io::Error| {
        Error::file(&log_path, format!("{error}: choose another folder with --out DIR"))
    })?;
    let errors = output.try_clone().map_err(|error| Error::file(&log_path, error))?;
    let program = std::env::current_exe().map_err(|error| Error::file("pillion", error))?;
    let mut train = Command::new(&program);
    train.args(command(settings, run)).arg("--out").arg(folder);
    let child = train.stdin(Stdio::null()).stdout(output).stderr(errors).spawn();
    let mut child = child.map_err(|error| Error::file(&program, error))?;
    let (mut told, mut looked) = (false, None::<Instant>);
    loop {
        if let Some(ended) = child.try_wait().map_err(|error| Error::file(&program, error))? {
            return Ok(ended);
        }
        if stopping(stop) && !told {
            // A terminal has told it already; two within a second are one.
            let _ = kill_process(Pid::from_child(&child), Signal::TERM);
            told = true;
        }
        if looked.is_none_or(|looked| looked.elapsed() > LOOK) {
            progress.look(&Results::of(folder, run.samples).unwrap_or_default(), run);
            looked = Some(Instant::now());
        }
        std::thread::sleep(POLL);
    }
}

/// What a run is made with, but for its folder.
fn command(settings: &PaperArgs, run: &Run) -> Vec<OsString> {
    let mut command: Vec<OsString> =
        std::iter::once("train").chain(run.flags.iter().map(String::as_str)).map(OsString::from).collect();
    if let Some(data) = &settings.data {
        // Where it is, whatever folder the experiment is gone on with from.
        let data = std::path::absolute(data).unwrap_or_else(|_| data.clone());
        command.extend(["--data".into(), data.into()]);
    }
    command
}

/// The first line of a run's log.
fn first_line(settings: &PaperArgs, run: &Run) -> String {
    let words = command(settings, run);
    words.iter().map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
}

/// Refuses to mix runs of other settings with those that are asked for.
fn check_settings(settings: &PaperArgs, run: &Run, folder: &Path) -> Result<(), Error> {
    if Results::of(folder, run.samples)?.steps.is_empty() {
        return Ok(());
    }
    let path = log(folder);
    let fail = |reason: String| Err(Error::file(&path, format!("{reason}; choose another folder with --out DIR")));
    match std::fs::read_to_string(&path) {
        Err(error) => fail(format!("{error}: its first line says how the run beside it was made")),
        Ok(text) => {
            let (made, asked) = (text.lines().next().unwrap_or_default(), first_line(settings, run));
            match made == asked {
                true => Ok(()),
                false => fail(format!("this run was made by `{made}`, and now it would be `{asked}`")),
            }
        }
    }
}

/// Removes from a finished run's folder what the report does not need.
fn keep_metrics(folder: &Path) -> Result<(), Error> {
    for part in ["checkpoints", "tokens"] {
        let path = folder.join(part);
        if path.exists() {
            std::fs::remove_dir_all(&path).map_err(|error| Error::file(&path, error))?;
        }
    }
    Ok(())
}

/// Where what a run prints goes.
fn log(folder: &Path) -> PathBuf {
    let name = folder.file_name().expect("a run has a name").to_string_lossy();
    folder.with_file_name(format!("{name}.log"))
}

/// What is done, in the unit of [`Run::cost`], and how long the rest will take.
struct Progress {
    bar: ProgressBar,
    done: f64,
    /// By this program, and how long it took.
    made: f64,
    began: Instant,
    /// Cost of the run under way that an earlier program has paid; none until the first look.
    before: Option<f64>,
    total: f64,
}

impl Progress {
    fn new(runs: &[Run], folder: &impl Fn(&Run) -> PathBuf) -> Result<Progress, Error> {
        let total = runs.iter().map(Run::cost).sum();
        let mut done = 0.0;
        for run in runs {
            if Results::of(&folder(run), run.samples)?.is_finished() {
                done += run.cost();
            }
        }
        let bar = match train::on_terminal() {
            true => {
                let style =
                    ProgressStyle::with_template("{bar:40} {percent} %  {msg}").expect("a template of known keys");
                ProgressBar::new(1000).with_style(style)
            }
            false => ProgressBar::hidden(),
        };
        Ok(Progress { bar, done, made: 0.0, began: Instant::now(), before: None, total })
    }

    fn begin(&mut self, number: usize, run: &Run, runs: &[Run]) {
        let left = self.left(0.0).map_or_else(String::new, |left| format!(", about {left} to go"));
        self.bar.suspend(|| print(format_args!("run {} of {}: {}{left}", number + 1, runs.len(), run.name)));
        self.before = None;
    }

    /// Takes note of how far the run under way is.
    fn look(&mut self, results: &Results, run: &Run) {
        let paid = results.samples_seen() as f64 / run.samples as f64 * run.cost();
        let before = *self.before.get_or_insert(paid);
        let left = self.left((paid - before).max(0.0));
        self.bar.set_position(((self.done + paid) / self.total * 1000.0) as u64);
        self.bar.set_message(left.map_or_else(|| run.name.clone(), |left| format!("{}, about {left} to go", run.name)));
    }

    fn end(&mut self, run: &Run) {
        self.made += run.cost() - self.before.unwrap_or(0.0);
        self.done += run.cost();
    }

    /// How long the rest will take, if as long for its cost as what this program has made, with `more` of the run under way.
    fn left(&self, more: f64) -> Option<HumanDuration> {
        let made = self.made + more;
        let rest = self.total - self.done - more - self.before.unwrap_or(0.0);
        let seconds = self.began.elapsed().as_secs_f64() / made * rest.max(0.0);
        (made > 0.0 && seconds.is_finite()).then(|| HumanDuration(Duration::from_secs_f64(seconds)))
    }
}
