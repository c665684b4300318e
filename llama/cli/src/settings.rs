//! The command line, and the file of settings that has the same keys.
//!
//! There is one definition of every setting: the flags of [`TrainArgs`]. A file of settings is
//! turned into flags (`file`) and parsed before those of the command line, so a flag wins over the
//! file, and both are checked by the same parser.

pub(crate) mod file;
mod job;
mod tokenize;
mod train;

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::path::PathBuf;

use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::parser::ValueSource;
use clap::{ArgMatches, Args, CommandFactory, FromArgMatches, Parser, Subcommand};
use pillion_collectives::{Backend, WireKind};
use pillion_data::Split;
use pillion_kernels::DType;

pub use crate::config::{CheckArgs, ShowArgs};
pub use crate::controller::{ControllerArgs, ControllerKind};
pub use crate::experiment::PaperArgs;
pub use crate::manual::{CompletionsArgs, ManArgs};
use crate::plan::quantity::size;
pub use crate::plan::{MachineArgs, PlanArgs};
pub use crate::replay::ReplayArgs;
pub use crate::report::ReportArgs;
pub use crate::simulate::SimulateArgs;
pub use crate::top::TopArgs;
pub use job::*;
pub use tokenize::TokenizeArgs;
pub use train::*;

/// Trains Llama-2 models, sharded over ranks.
#[derive(Debug, Parser)]
#[command(name = "pillion", version, arg_required_else_help = true)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Train a model.
    Train(Box<TrainArgs>),
    /// Write text with a trained model.
    Generate(GenerateArgs),
    /// Print the loss of a trained model on data.
    Eval(EvalArgs),
    /// Make a checkpoint of a model in Hugging Face's format.
    Import(ImportArgs),
    /// Make a folder that Hugging Face's transformers load of a checkpoint.
    Export(ExportArgs),
    /// Look at checkpoints.
    #[command(subcommand)]
    Checkpoint(CheckpointCommand),
    /// Turn documents into tokens, with the tokenizer of a model on Hugging Face.
    Tokenize(Box<TokenizeArgs>),
    /// Look at tokens: token folders, token files, and files of llm.c, nanoGPT and Megatron.
    #[command(subcommand)]
    Data(DataCommand),
    /// Print how a run would be laid out, and what a step would take on a machine that is described, without running it.
    Plan(Box<PlanArgs>),
    /// Print what this machine and job offer, what would be chosen, and why. Start it as a run
    /// would be started.
    Doctor(DoctorArgs),
    /// Draw runs side by side, on a page that needs no network.
    Report(ReportArgs),
    /// Show a run as it goes.
    Top(TopArgs),
    /// Compare batch schedules.
    #[command(subcommand)]
    Experiment(ExperimentCommand),
    /// Look into the statistics of adaptive batches.
    #[command(subcommand)]
    Abs(AbsCommand),
    /// Look at the settings of a training run.
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Print what completes this program's commands and flags in a shell.
    Completions(CompletionsArgs),
    /// Print the manual page, or write one for each command.
    Man(ManArgs),
}

/// What to compare.
#[derive(Debug, Subcommand)]
pub enum ExperimentCommand {
    /// Train with constant batches, stages and the norm test as in Lau et al. 2025, at the size of this machine, and report tables and figures.
    Paper(PaperArgs),
}

/// What to do with statistics.
#[derive(Debug, Subcommand)]
pub enum AbsCommand {
    /// Print how far estimates of known noise scatter, by groups and by moving average.
    Simulate(SimulateArgs),
    /// Print what a controller would have said of the steps of a log.
    Replay(ReplayArgs),
}

/// What to do with checkpoints.
#[derive(Debug, Subcommand)]
pub enum CheckpointCommand {
    /// Print which checkpoints there are, and what their manifests say.
    Show(CheckpointArgs),
    /// Read all of them, and compare every file with what the manifest says; ends with 1 when any is damaged.
    Verify(CheckpointArgs),
}

/// What to do with tokens.
#[derive(Debug, Subcommand)]
pub enum DataCommand {
    /// Print what is there: splits, tokens, documents, tokenizer, masks.
    Show(DataArgs),
    /// Read all of it, and compare each file with its checksum; ends with 1 when any is damaged.
    Verify(DataArgs),
}

/// What to do with settings.
#[derive(Debug, Subcommand)]
pub enum ConfigCommand {
    /// Print the settings that a run would have, as a file that `train --config` reads.
    Show(Box<ShowArgs>),
    /// Check files of settings as `train` would, without starting ranks or reading data; ends with 2
    /// when one is refused.
    Check(CheckArgs),
}

/// Settings of `data`.
#[derive(Clone, Debug, Args)]
pub struct DataArgs {
    /// Folder of a run or of token files, a token folder, a token file, or a .bin of llm.c, nanoGPT
    /// or Megatron.
    #[arg(value_name = "PATH", default_value = "runs/train")]
    pub path: PathBuf,
    /// tokenizer.json whose tokens a file of nanoGPT or Megatron has, which does not say.
    #[arg(long, value_name = "FILE")]
    pub tokenizer: Option<PathBuf>,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

/// Settings of `checkpoint`.
#[derive(Clone, Debug, Args)]
pub struct CheckpointArgs {
    /// Folder of a run, of checkpoints, or of one checkpoint.
    #[arg(value_name = "DIR", default_value = "runs/train")]
    pub dir: PathBuf,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

/// Settings of `generate`.
#[derive(Clone, Debug, Args)]
pub struct GenerateArgs {
    /// Folder of a run, or a checkpoint in it.
    #[arg(long, value_name = "DIR", default_value = "runs/train")]
    pub checkpoint: PathBuf,
    /// Text to go on from.
    #[arg(long, value_name = "TEXT", default_value = "pub fn ")]
    pub prompt: String,
    /// File with a prompt in each line, one after the other.
    #[arg(long, value_name = "FILE", conflicts_with = "prompt")]
    pub prompts: Option<PathBuf>,
    /// Tokens to write at most.
    #[arg(long, value_name = "N", default_value_t = 400)]
    pub tokens: usize,
    /// How freely to choose: 0 always takes the likeliest token.
    #[arg(long, value_name = "X", default_value_t = 0.7)]
    pub temperature: f64,
    /// Choose among so many of the likeliest tokens; 0: all.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub top_k: usize,
    /// Choose among the fewest of the likeliest tokens whose probabilities sum to this.
    #[arg(long, value_name = "X", default_value_t = 1.0)]
    pub top_p: f64,
    /// Choose among tokens whose probability is at least this share of the likeliest's.
    #[arg(long, value_name = "X", default_value_t = 0.0)]
    pub min_p: f64,
    /// Makes tokens that the text already has less likely: divides their logits, if these are above 0,
    /// and multiplies them otherwise.
    #[arg(long, value_name = "X", default_value_t = 1.0)]
    pub repetition_penalty: f64,
    /// Stop before this word; may be given several times.
    #[arg(long, value_name = "TEXT")]
    pub stop: Vec<String>,
    /// Go on after the end of a text.
    #[arg(long)]
    pub ignore_end: bool,
    /// Tokens that the model sees at most; a longer text goes on from its last half. Default: those of
    /// a sample of its training, or of an imported model as many as it can have, and 2048 at most.
    #[arg(long, value_name = "N")]
    pub context: Option<usize>,
    /// Type of the weights that are computed with.
    #[arg(long, default_value = "f32", value_parser = precision())]
    pub precision: DType,
    /// Seed of the choices.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub seed: u64,
    /// Print a JSON object for each prompt when its text is complete.
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub job: JobArgs,
}

/// Settings of `eval`.
#[derive(Clone, Debug, Args)]
pub struct EvalArgs {
    /// Folder of a run, or a checkpoint in it.
    #[arg(long, value_name = "DIR", default_value = "runs/train")]
    pub checkpoint: PathBuf,
    /// Text in a file or a folder; a folder of `pillion tokenize`; or a token file of llm.c, nanoGPT
    /// or Megatron. Several times for all of them. Default, of a model of bytes: the default text.
    #[arg(long, value_name = "PATH")]
    pub data: Vec<String>,
    /// What of it: train or validation; default: of text all of it, of tokens validation where there
    /// is one.
    #[arg(long, value_parser = split())]
    pub split: Option<Split>,
    /// Samples at most: of tokens or a split from the beginning, of all of a text from everywhere in
    /// it; default: all.
    #[arg(long, value_name = "N")]
    pub samples: Option<u64>,
    /// Tokens in a sample; default: those of the model's training, or of an imported model as many as
    /// it can have, and 2048 at most.
    #[arg(long, value_name = "N")]
    pub seq: Option<usize>,
    /// Samples that a rank computes at a time.
    #[arg(long, value_name = "N", default_value_t = 4)]
    pub micro_batch: u64,
    /// Type of the weights that are computed with.
    #[arg(long, default_value = "f32", value_parser = precision())]
    pub precision: DType,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub job: JobArgs,
}

fn split() -> impl TypedValueParser<Value = Split> {
    let named = |name: String| if name == "train" { Split::Train } else { Split::Validation };
    PossibleValuesParser::new(["train", "validation"]).map(named)
}

/// Settings of `import`.
#[derive(Clone, Debug, Args)]
pub struct ImportArgs {
    /// Folder with config.json and safetensors; tokenizer and generation settings come along.
    #[arg(value_name = "FOLDER")]
    pub folder: PathBuf,
    /// Folder of a run, for the checkpoint; an earlier run in it is moved aside.
    #[arg(long, value_name = "DIR", default_value = "runs/imported")]
    pub out: PathBuf,
}

/// Settings of `export`.
#[derive(Clone, Debug, Args)]
pub struct ExportArgs {
    /// Folder of a run, or a checkpoint in it.
    #[arg(long, value_name = "DIR", default_value = "runs/train")]
    pub checkpoint: PathBuf,
    /// Folder to make.
    #[arg(long, value_name = "FOLDER")]
    pub to: PathBuf,
    /// Type of the weights; default: that which they were computed with, or came with.
    #[arg(long, value_parser = stored())]
    pub dtype: Option<DType>,
    /// Bytes of a file of weights, at most, such as 5GB; a longer tensor has a file of its own.
    #[arg(long, value_name = "BYTES", default_value = "5GB", value_parser = size)]
    pub file_size: u64,
}

fn stored() -> impl TypedValueParser<Value = DType> {
    let types = [DType::F32, DType::Bf16, DType::F16];
    let named = move |name: String| types.into_iter().find(|dtype| dtype.name() == name).expect("one of these");
    PossibleValuesParser::new(types.map(DType::name)).map(named)
}

/// Settings of `doctor`.
#[derive(Clone, Debug, Args)]
pub struct DoctorArgs {
    /// What moves the bytes between ranks.
    #[arg(long, value_enum, default_value = "auto", value_name = "NAME")]
    pub backend: Backend,
    /// What connects hosts.
    #[arg(long, value_enum, default_value = "auto", value_name = "NAME")]
    pub wire: WireKind,
    /// Seconds to wait for the other ranks.
    #[arg(long, value_name = "SECONDS", default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=LONGEST_TIMEOUT))]
    pub timeout: u64,
}

impl Cli {
    /// Reads the program's arguments, and the file of settings that they name.
    ///
    /// # Errors
    /// What to print, and the exit code: 2, or 0 where help was asked for.
    pub fn from_arguments(arguments: &[String]) -> Result<Cli, (String, i32)> {
        let refuse = |error: clap::Error| (error.render().to_string(), error.exit_code());
        let cli = parse(arguments).map_err(refuse)?;
        let (settings, words) = match &cli.command {
            Command::Train(settings) => (&**settings, 2),
            Command::Config(ConfigCommand::Show(show)) => (&show.settings, 3),
            _ => return Ok(cli),
        };
        let Some(path) = &settings.config else { return Ok(cli) };
        let file = file::read_beside(path, &settings.given).map_err(|reason| (format!("error: {reason}\n"), 2))?;
        let (command, rest) = arguments.split_at(words);
        let mut cli = parse(&[command, &file.flags, rest].concat()).map_err(refuse)?;
        if let Command::Train(settings) = &mut cli.command {
            settings.given.extend(file.without_flags);
        }
        Ok(cli)
    }
}

/// Reads arguments alone, without the file of settings that they may name.
pub(crate) fn parse(arguments: &[String]) -> Result<Cli, clap::Error> {
    // A flag that comes twice is no error: the file's comes first, and the command line's wins.
    // Numbers below zero are refused for what they are, not as flags.
    let adapt = |command: clap::Command| command.args_override_self(true).allow_negative_numbers(true);
    let command = Cli::command().mut_subcommands(|command| command.allow_negative_numbers(true));
    let command = command.mut_subcommand("train", adapt);
    let command = command.mut_subcommand("config", |config| config.mut_subcommand("show", adapt));
    let matches = command.try_get_matches_from(arguments)?;
    let mut cli = Cli::from_arg_matches(&matches)?;
    let of_subcommand = matches.subcommand().map(|(_, matches)| matches);
    match (&mut cli.command, of_subcommand) {
        (Command::Train(settings), Some(matches)) => settings.given = given(matches),
        (Command::Config(ConfigCommand::Show(show)), Some(matches)) => {
            let (_, matches) = matches.subcommand().expect("the command is show");
            show.settings.given = given(matches);
            show.settings.config = show.settings.config.take().or(show.file.take());
            show.values = values(matches);
        }
        _ => {}
    }
    Ok(cli)
}

/// The names of the flags that were given.
fn given(matches: &ArgMatches) -> BTreeSet<String> {
    let is_given = |id: &&str| matches.value_source(id) == Some(ValueSource::CommandLine);
    matches.ids().map(|id| id.as_str()).filter(is_given).map(|id| id.replace('_', "-")).collect()
}

/// The values of all flags as they were given, or as their defaults are written, by their names.
fn values(matches: &ArgMatches) -> BTreeMap<String, Vec<String>> {
    let ids = matches.ids().map(|id| id.as_str());
    let of = |id| Some((id, matches.try_get_raw(id).ok()??));
    let text = |value: &OsStr| value.to_string_lossy().into_owned();
    ids.filter_map(of).map(|(id, values)| (id.replace('_', "-"), values.map(text).collect())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_flag_is_well_formed() {
        Cli::command().debug_assert();
    }
}
