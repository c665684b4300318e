//! The command line, and the configuration file that holds the same keys.
//!
//! There is one definition of every setting: the flags of [`TrainArgs`]. A configuration file is turned into flags and parsed
//! before those of the command line, so a flag wins over the file, and both are checked by the same parser.

mod job;
mod tokenize;
mod train;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::parser::ValueSource;
use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand};
use pillion_collectives::{Backend, WireKind};
use pillion_data::Split;
use pillion_kernels::DType;

pub use crate::controller::{ControllerArgs, ControllerKind};
pub use crate::experiment::PaperArgs;
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
    /// What of it: train or validation; default: validation where there is one.
    #[arg(long, value_parser = split())]
    pub split: Option<Split>,
    /// Samples at most, from the beginning; default: all.
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
    /// Reads the program's arguments, and the configuration file they name.
    ///
    /// # Errors
    /// What to print, and the exit code: 2, or 0 where help was asked for.
    pub fn from_arguments(arguments: &[String]) -> Result<Cli, (String, i32)> {
        let refuse = |error: clap::Error| (error.render().to_string(), error.exit_code());
        let cli = parse(arguments).map_err(refuse)?;
        let file = match &cli.command {
            Command::Train(train) => train.config.clone(),
            _ => None,
        };
        let Some(file) = file else { return Ok(cli) };
        let read = std::fs::read_to_string(&file).map_err(|error| format!("--config {}: {error}", file.display()));
        let flags = read.and_then(|text| flags_of_file(&file, &text));
        let mut flags = flags.map_err(|message| (format!("error: {message}\n"), 2))?;
        let program = &arguments[..2];
        // Alone first, so that what the file gets wrong is said of the file.
        let alone = [program, &flags].concat();
        parse(&alone).map_err(|error| (format!("in {}: {}", file.display(), error.render()), 2))?;
        if let Command::Train(train) = &cli.command {
            leave_to(&train.given, &mut flags);
        }
        parse(&[program, &flags, &arguments[2..]].concat()).map_err(refuse)
    }
}

pub(crate) fn parse(arguments: &[String]) -> Result<Cli, clap::Error> {
    // A flag that comes twice is no error: the file's comes first, and the command line's wins.
    // Numbers below zero are refused for what they are, not as flags.
    let command =
        Cli::command().mut_subcommand("train", |train| train.args_override_self(true).allow_negative_numbers(true));
    let matches = command.try_get_matches_from(arguments)?;
    let mut cli = Cli::from_arg_matches(&matches)?;
    if let (Command::Train(train), Some(("train", matches))) = (&mut cli.command, matches.subcommand()) {
        let is_given = |id: &str| matches.value_source(id) == Some(ValueSource::CommandLine);
        let ids = matches.ids().map(|id| id.as_str()).filter(|id| is_given(id));
        train.given = ids.map(|id| id.replace('_', "-")).collect();
    }
    Ok(cli)
}

/// Takes away `flags` of a file that were also `given` on the command line, and those that no one
/// can give together with them.
fn leave_to(given: &BTreeSet<String>, flags: &mut Vec<String>) {
    let mut command = Cli::command();
    command.build();
    let train = command.find_subcommand("train").expect("defined above");
    let excludes = |one: &str, other: &str| {
        let argument = train.get_arguments().find(|argument| argument.get_long() == Some(one));
        let excluded = argument.map(|argument| train.get_arg_conflicts_with(argument)).unwrap_or_default();
        excluded.iter().any(|argument| argument.get_long() == Some(other))
    };
    flags.retain(|flag| {
        let name = flag.trim_start_matches("--");
        let name = name.split_once('=').map_or(name, |(name, _)| name);
        // Values of a list would add up.
        !given.contains(name) && !given.iter().any(|given| excludes(name, given) || excludes(given, name))
    });
}

/// The text of a configuration file as flags.
pub(crate) fn flags_of_file(file: &Path, text: &str) -> Result<Vec<String>, String> {
    let table: toml::Table = text.parse().map_err(|error| format!("{}: {error}", file.display()))?;
    let command = Cli::command();
    let train = command.find_subcommand("train").expect("defined above");
    let known: Vec<&str> = train.get_arguments().filter_map(|argument| argument.get_long()).collect();
    let is_switch = |key: &str| {
        let argument = train.get_arguments().find(|argument| argument.get_long() == Some(key));
        argument.is_some_and(|argument| !argument.get_action().takes_values())
    };
    let mut flags = Vec::new();
    for (key, value) in table {
        if !known.contains(&key.as_str()) || key == "config" {
            let distance = |known: &&str| strsim::damerau_levenshtein(known, &key);
            let nearest = known.iter().copied().filter(|known| *known != "config").min_by_key(distance);
            let hint = nearest.map_or(String::new(), |name| format!("; the nearest is `{name}`"));
            return Err(format!("{}: there is no setting `{key}`{hint}", file.display()));
        }
        if let (true, toml::Value::Boolean(on)) = (is_switch(&key), &value) {
            if *on {
                flags.push(format!("--{key}"));
            }
            continue;
        }
        // A flag that may be given several times is a list.
        let values = match value {
            toml::Value::Array(values) => values,
            value => vec![value],
        };
        for value in values {
            let value = match value {
                toml::Value::String(text) => text,
                toml::Value::Integer(number) => number.to_string(),
                toml::Value::Float(number) => number.to_string(),
                other => {
                    let (kind, file) = (other.type_str(), file.display());
                    return Err(format!(
                        "{file}: `{key}` is a {kind}, but settings are strings, numbers, or lists of them"
                    ));
                }
            };
            flags.push(format!("--{key}={value}"));
        }
    }
    Ok(flags)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn train(file: &str, flags: &[&str]) -> Result<TrainArgs, String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run.toml");
        std::fs::write(&path, file).unwrap();
        let mut arguments = vec!["pillion".to_owned(), "train".to_owned()];
        arguments.push(format!("--config={}", path.display()));
        arguments.extend(flags.iter().map(|&flag| flag.to_owned()));
        match Cli::from_arguments(&arguments) {
            Ok(Cli { command: Command::Train(train) }) => Ok(*train),
            Ok(_) => unreachable!("the command is train"),
            Err((message, code)) => {
                assert_eq!(code, 2);
                Err(message)
            }
        }
    }

    #[test]
    fn flags_win_over_the_file_and_the_file_over_defaults() {
        let settings = train("lr = 0.5\nmicro-batch = 8\nmodel = \"tiny\"", &["--lr", "0.25"]).unwrap();
        assert_eq!(
            (settings.lr, settings.micro_batch, settings.model.model.name, settings.seq),
            (0.25, 8, "tiny", 128)
        );
    }

    #[test]
    fn a_flag_wins_over_what_it_excludes_in_the_file() {
        let settings = train("auto = true\nseq = 64", &["--slots", "3"]).unwrap();
        assert_eq!((settings.auto, settings.policy.slots, settings.seq), (false, Some(3), 64));
        let settings = train("slots = 3\nprefetch = 2", &["--auto"]).unwrap();
        assert_eq!((settings.auto, settings.policy.slots, settings.policy.prefetch), (true, None, 1));
        assert!(train("auto = true\nslots = 3", &[]).unwrap_err().contains("run.toml"));
        assert!(train("", &["--auto", "--slots", "3"]).is_err());
    }

    #[test]
    fn switches_are_true_or_false() {
        assert!(train("profile = true", &[]).unwrap().profile);
        assert!(!train("profile = false", &[]).unwrap().profile);
        assert!(train("profile = false", &["--profile"]).unwrap().profile);
        assert!(train("profile = 1", &[]).unwrap_err().contains("profile"));
    }

    #[test]
    fn unknown_keys_suggest_the_nearest() {
        let message = train("micro_batch = 8", &[]).unwrap_err();
        assert!(message.contains("no setting `micro_batch`; the nearest is `micro-batch`"), "{message}");
        let message = train("", &["--micro-bach", "8"]).unwrap_err();
        assert!(message.contains("--micro-batch"), "{message}");
    }

    #[test]
    fn what_a_file_gets_wrong_is_said_of_the_file() {
        for (file, part) in [
            ("lr = \"fast\"", "invalid value 'fast' for '--lr"),
            ("model = \"huge\"", "no preset has this name"),
            ("lr = true", "`lr` is a boolean"),
            ("lr = ", "run.toml"),
        ] {
            let message = train(file, &[]).unwrap_err();
            assert!(message.contains(part) && message.contains("run.toml"), "{message}");
        }
    }

    #[test]
    fn every_flag_is_well_formed() {
        Cli::command().debug_assert();
    }
}
