//! The command `pillion`: the model of `pillion-llama` learns the text of `pillion-data`.
//!
//! | file | subject |
//! |---|---|
//! | `settings` | the command line and the configuration file |
//! | `train` | `pillion train`: ranks, the loop, checkpoints, what a run prints |
//! | `evaluating` | what commands share that compute with a checkpoint's weights |
//! | `eval` | `pillion eval`: the loss on any data |
//! | `generate`, `text` | `pillion generate`: text by a model |
//! | `huggingface` | `pillion import` and `export`: models from and for elsewhere |
//! | `models` | models in checkpoints, and the files that go with them |
//! | `jobs` | the ranks of a command: found, or started |
//! | `run_folder` | what runs write, and where |
//! | `inspect` | `pillion checkpoint`: what there is, and whether it is whole |
//! | `tokenize` | `pillion tokenize`: documents to a token folder |
//! | `verify_data` | `pillion data`: what tokens there are, and whether they are whole |
//! | `config` | `pillion config`: files of settings, checked and shown |
//! | `manual` | `pillion completions` and `man`: the command line, for shells and for packages |
//! | `controller` | the flags of the batch size |
//! | `simulate` | `pillion abs simulate`: how far its statistics scatter |
//! | `experiment` | `pillion experiment`: batch schedules compared |
//! | `doctor` | `pillion doctor`: what a machine and a job offer |
//! | `plan` | `pillion plan`: the layout of a run, and a simulated step |
//! | `report` | `pillion report`: runs side by side on a page |
//! | `top` | `pillion top`: a run as it goes |
//! | `plot` | lines as SVG |
//! | `output` | stdout and stderr, which may be full or closed |
#![forbid(unsafe_code)]

mod config;
mod controller;
mod doctor;
mod error;
mod eval;
mod evaluating;
mod experiment;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
mod generate;
mod gpu;
mod huggingface;
mod inspect;
mod jobs;
mod manual;
mod models;
mod output;
mod plan;
mod plot;
mod replay;
mod report;
mod run_folder;
pub mod settings;
mod signals;
mod simulate;
mod text;
mod tokenize;
mod top;
pub mod train;
mod verify_data;

pub use error::Error;

use std::ffi::OsString;

use pillion_collectives::Communicator;
use pillion_kernels::cpu::Isa;

pub(crate) use output::{complain, print, print_result};
use settings::{AbsCommand, Cli, Command, ConfigCommand, ExperimentCommand};

/// Runs the program with its arguments, the first of which is its name; returns the exit code: 0 when done, 1 after a failure, 2 for
/// settings that cannot be, 69 when a rank was lost, 75 when a signal ended a run early, and what the launcher says of ranks that
/// were killed.
pub fn main(arguments: impl Iterator<Item = OsString>) -> i32 {
    // Without a handler the first write beyond `ulimit -f` ends the program, which then still does.
    let _ = pillion_collectives::limits::ignore_file_size_signal();
    // A panic over a damaged file is an error, which is printed when it comes here.
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        if !pillion_data::is_guarded() {
            hook(panic);
        }
    }));
    let arguments: Result<Vec<String>, OsString> = arguments.map(OsString::into_string).collect();
    let arguments = match arguments {
        Ok(arguments) => arguments,
        Err(argument) => {
            return ended(Err(Error::Setting(format!("the argument {} is not UTF-8", argument.display()))));
        }
    };
    let cli = match Cli::from_arguments(&arguments) {
        Ok(cli) => cli,
        // Help, or the version.
        Err((message, 0)) => return ended(output::write(&message).map(|_| 0)),
        Err((message, code)) => {
            let is_job = arguments
                .get(1)
                .is_some_and(|command| ["train", "generate", "eval", "doctor"].contains(&command.as_str()));
            say_once(is_job, &message, || output::complain_as_it_is(&message));
            return code;
        }
    };
    // Kernels cannot say that they are asked for instructions that there are not.
    let instructions = Isa::of_process().map_err(|error| Error::Setting(error.to_string()));
    let result = instructions.and_then(|_| match &cli.command {
        Command::Train(settings) => train::train(settings),
        Command::Generate(settings) => generate::run(settings),
        Command::Eval(settings) => eval::run(settings),
        Command::Import(settings) => huggingface::import(settings),
        Command::Export(settings) => huggingface::export(settings),
        Command::Checkpoint(command) => inspect::inspect(command),
        Command::Tokenize(settings) => tokenize::tokenize(settings),
        Command::Data(command) => verify_data::look_at(command),
        Command::Plan(settings) => plan::plan(settings),
        Command::Doctor(settings) => doctor::doctor(settings),
        Command::Top(settings) => top::top(settings),
        Command::Report(settings) => report::report(settings),
        Command::Experiment(ExperimentCommand::Paper(settings)) => experiment::paper(settings),
        Command::Abs(AbsCommand::Simulate(settings)) => simulate::run(settings),
        Command::Abs(AbsCommand::Replay(settings)) => replay::run(settings),
        Command::Config(ConfigCommand::Show(settings)) => config::show(settings),
        Command::Config(ConfigCommand::Check(settings)) => config::check(settings),
        Command::Completions(settings) => manual::completions(settings),
        Command::Man(settings) => manual::man(settings),
    });
    result.unwrap_or_else(|error| {
        let is_job =
            matches!(cli.command, Command::Train(_) | Command::Generate(_) | Command::Eval(_) | Command::Doctor(_))
                && error.code() == 2;
        say_once(is_job, &error.to_string(), || complain(&error));
        error.code()
    })
}

/// The exit code of a command that has no ranks; prints its error.
fn ended(result: Result<i32, Error>) -> i32 {
    result.unwrap_or_else(|error| {
        complain(&error);
        error.code()
    })
}

/// Prints why a command ends; of ranks that end for the same reason, one prints it.
fn say_once(is_job: bool, reason: &str, print: impl Fn()) {
    if is_job { Communicator::decline_once(reason, print) } else { print() }
}
