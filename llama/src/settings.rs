//! The command line, and the configuration file that holds the same keys.
//!
//! There is one definition of every setting: the flags of [`TrainArgs`]. A configuration file is turned into flags and parsed
//! before those of the command line, so a flag wins over the file, and both are checked by the same parser.

use std::collections::BTreeSet;
use std::num::NonZero;
use std::path::{Path, PathBuf};

use clap::parser::ValueSource;
use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand, ValueEnum};
use serde::{Deserialize, Serialize};

use pillion_kernels::DType;
use pillion_runtime::{Mesh, Sharded};

use crate::config::{Config, PRESETS, Preset};
pub use crate::controller::{ControllerArgs, ControllerKind, CouplingKind, VariantKind};
pub use crate::experiment::PaperArgs;
pub use crate::plan::{MachineArgs, PlanArgs};
pub use crate::simulate::SimulateArgs;
use crate::train::CHANGEABLE;

/// A year, in seconds.
const LONGEST_TIMEOUT: u64 = 365 * 24 * 60 * 60;

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
    /// Look at checkpoints.
    #[command(subcommand)]
    Checkpoint(CheckpointCommand),
    /// Look at token files.
    #[command(subcommand)]
    Data(DataCommand),
    /// Print how a run would be laid out, and what a step would take on a machine that is described, without running it.
    Plan(Box<PlanArgs>),
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
}

/// What to do with checkpoints.
#[derive(Debug, Subcommand)]
pub enum CheckpointCommand {
    /// Print which checkpoints there are, and what their manifests say.
    Show(CheckpointArgs),
    /// Read all of them, and compare every file with what the manifest says; ends with 1 when any is damaged.
    Verify(CheckpointArgs),
}

/// What to do with token files.
#[derive(Debug, Subcommand)]
pub enum DataCommand {
    /// Read all of a run's token files, and compare each with its checksum; ends with 1 when any is damaged.
    Verify(DataArgs),
}

/// Settings of `data`.
#[derive(Clone, Debug, Args)]
pub struct DataArgs {
    /// Folder of a run or of token files, or one token file.
    #[arg(value_name = "PATH", default_value = "runs/train")]
    pub path: PathBuf,
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

/// How ranks of this host are started.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LaunchKind {
    /// Each rank is a process.
    Processes,
    /// Each rank is a thread of this process.
    Threads,
}

/// Type of the weights that are computed with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Precision {
    /// 32-bit floating point.
    F32,
    /// bfloat16 weights and operands of matrix products; sums, the residual stream, gradients of weights and their update stay f32.
    Bf16,
}

impl Precision {
    /// The one that a recipe calls `name`.
    pub(crate) fn named(name: &str) -> Precision {
        if name == DType::Bf16.name() { Precision::Bf16 } else { Precision::F32 }
    }
}

/// How ranks get the weights they compute with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum GatherKind {
    /// By copying each unit into a slot.
    Copy,
    /// In place, through memory that all ranks of a host map.
    Window,
}

/// What moves the bytes between ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum BackendKind {
    /// Shared memory on one host, hierarchical on several.
    Auto,
    /// Shared memory: all ranks are on one host.
    Shm,
    /// MPI between all ranks, in a build with the feature mpi.
    Mpi,
    /// Shared memory on each host and MPI between hosts, in a build with the feature mpi.
    Hierarchical,
}

impl From<BackendKind> for pillion_collectives::Backend {
    fn from(kind: BackendKind) -> Self {
        match kind {
            BackendKind::Auto => Self::Auto,
            BackendKind::Shm => Self::Shm,
            BackendKind::Mpi => Self::Mpi,
            BackendKind::Hierarchical => Self::Hierarchical,
        }
    }
}

/// The device that ranks compute on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum DeviceKind {
    /// The processor.
    Cpu,
    /// A processor that runs work as late as allowed, for tests.
    LazyCpu,
}

/// The model's shape: a preset, and what differs from it.
#[derive(Clone, Debug, Args)]
pub struct ModelArgs {
    /// Preset of the model's shape.
    #[arg(long, value_name = "PRESET", default_value = "small", value_parser = preset)]
    pub model: Preset,
    /// Width of the residual stream, if not the preset's.
    #[arg(long, value_name = "N")]
    pub hidden_size: Option<usize>,
    /// Width of the feed-forward layer, if not the preset's.
    #[arg(long, value_name = "N")]
    pub intermediate_size: Option<usize>,
    /// Number of blocks, if not the preset's.
    #[arg(long, value_name = "N")]
    pub layers: Option<usize>,
    /// Number of query heads, if not the preset's.
    #[arg(long, value_name = "N")]
    pub heads: Option<usize>,
    /// Number of key and value heads, if not the preset's.
    #[arg(long, value_name = "N")]
    pub kv_heads: Option<usize>,
    /// The shape of the run that goes on, which stands for the preset.
    #[arg(skip)]
    pub(crate) base: Option<Config>,
}

impl ModelArgs {
    /// The shape, checked.
    ///
    /// # Errors
    /// When the numbers contradict each other.
    pub fn config(&self) -> Result<Config, crate::config::ConfigError> {
        let mut config = self.base.clone().unwrap_or_else(|| self.model.config());
        let overrides = [
            (self.hidden_size, &mut config.hidden_size),
            (self.intermediate_size, &mut config.intermediate_size),
            (self.layers, &mut config.num_hidden_layers),
            (self.heads, &mut config.num_attention_heads),
            (self.kv_heads, &mut config.num_key_value_heads),
        ];
        for (value, field) in overrides {
            *field = value.unwrap_or(*field);
        }
        config.validate()?;
        Ok(config)
    }
}

/// How parameters are kept and moved.
#[derive(Clone, Debug, Args)]
pub struct PolicyArgs {
    /// Type of the weights that are computed with.
    #[arg(long, value_enum, default_value = "f32")]
    pub precision: Precision,
    /// Type in which gradients travel: bf16 halves the bytes, and rounds each rank's gradient once.
    #[arg(long, value_enum, default_value = "f32")]
    pub reduce_precision: Precision,
    /// The ranks as a grid of `replicate` groups that hold the same, of `shard` ranks each; default: one group.
    #[arg(long, value_name = "replicate=R,shard=S", value_parser = mesh)]
    pub mesh: Option<Mesh>,
    /// What the ranks of a group divide: parameters,gradients,optimizer, some of these, or one of nothing, zero-1, zero-2, zero-3.
    #[arg(long, value_name = "WHAT", default_value = "zero-3")]
    pub shard: Sharded,
    /// How ranks get sharded weights that they compute with; default: window.
    #[arg(long, value_enum)]
    pub gather: Option<GatherKind>,
    /// Units gathered ahead of the one in use.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub prefetch: usize,
    /// Wait for each collective where it starts: shows what overlap is worth.
    #[arg(long)]
    pub no_overlap: bool,
    /// Gathered units that exist at a time; default: prefetch + 1.
    #[arg(long, value_name = "N")]
    pub slots: Option<usize>,
}

/// What to do about a step whose gradient or loss is not finite.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnNonFinite {
    /// End the run.
    #[default]
    Stop,
    /// Go on without the step's samples.
    Skip,
    /// Go back to the newest checkpoint, and on without the samples since it.
    Rewind,
}

/// Settings of a training run.
#[derive(Clone, Debug, Args)]
pub struct TrainArgs {
    /// File of settings in TOML, with the names of these flags as keys; flags win.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Text to train on, a file or a folder, or `synthetic` for random tokens; default: the sources of the crates this program is built
    /// from.
    #[arg(long, value_name = "PATH")]
    pub data: Option<PathBuf>,
    /// Folder for everything the run writes; an earlier run in it is moved aside, unless it is resumed.
    #[arg(long, value_name = "DIR", default_value = "runs/train")]
    pub out: PathBuf,
    /// Number of ranks to start on this host; default: those of mpirun, torchrun or srun, else 2.
    #[arg(long, value_name = "N")]
    pub ranks: Option<usize>,
    /// How --ranks are started.
    #[arg(long, value_enum, default_value = "processes")]
    pub launch: LaunchKind,
    /// Start more than 8 ranks for each core.
    #[arg(long)]
    pub oversubscribe: bool,
    /// Samples to train on: the horizon of every schedule.
    #[arg(long, value_name = "N", default_value_t = 5120)]
    pub samples: u64,
    /// Stop after this many steps, wherever the schedules are.
    #[arg(long, value_name = "N")]
    pub steps: Option<u64>,
    /// Seed of the weights and of the order of samples.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub seed: u64,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub model: ModelArgs,
    /// Tokens in a sample.
    #[arg(long, value_name = "N", default_value_t = 128)]
    pub seq: usize,
    /// Samples that a rank computes at a time.
    #[arg(long, value_name = "N", default_value_t = 4)]
    pub micro_batch: u64,
    /// Samples in a step, over all ranks, at first; default: --round-to, and at least two micro-batches where noise is measured.
    #[arg(long, value_name = "N")]
    pub batch: Option<u64>,
    /// Samples in a step at most; default: 8 times --batch.
    #[arg(long, value_name = "N")]
    pub max_batch: Option<u64>,
    /// Batches are multiples of this, itself a multiple of --micro-batch; default: ranks times --micro-batch.
    #[arg(long, value_name = "N")]
    pub round_to: Option<u64>,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub controller: ControllerArgs,
    /// Peak learning rate.
    #[arg(long, value_name = "X", default_value_t = 3e-3)]
    pub lr: f64,
    /// Share of the samples over which the learning rate rises.
    #[arg(long, value_name = "X", default_value_t = 0.02)]
    pub warmup: f64,
    /// Learning rate at the end, as a share of the peak; it falls along a cosine.
    #[arg(long, value_name = "X", default_value_t = 0.1)]
    pub final_lr: f64,
    /// Decoupled weight decay of matrices.
    #[arg(long, value_name = "X", default_value_t = 0.1)]
    pub weight_decay: f64,
    /// Largest norm of the gradient; 0 for no limit.
    #[arg(long, value_name = "X", default_value_t = 1.0)]
    pub clip: f64,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub policy: PolicyArgs,
    /// Go on from a checkpoint: the newest whole one in --out, or the one at PATH. Settings that are not given are those
    /// that the run began with, and so are its tokens.
    #[arg(long, value_name = "auto|PATH")]
    pub resume: Option<PathBuf>,
    /// Settings in which a resumed run may differ from its checkpoint, by their flags: lr,samples,…
    #[arg(long, value_name = "NAMES", value_delimiter = ',', value_parser = changeable, requires = "resume")]
    pub change: Vec<String>,
    /// What to do about a step whose gradient or loss is not finite; default: stop, or what a resumed run did. skip goes
    /// on without the step's samples; rewind goes back to the newest checkpoint, and on without the samples since it.
    #[arg(long, value_enum, value_name = "WHAT")]
    pub on_non_finite: Option<OnNonFinite>,
    /// Steps in a row that may be left out by skip, and times in a row that rewind may go back to the same checkpoint.
    #[arg(long, value_name = "N", default_value_t = 8)]
    pub non_finite_limit: u64,
    /// Save every N steps, besides at the end; 0: only at the end.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub save_every: u64,
    /// Keep this many of the newest checkpoints, and remove older ones; default: all.
    #[arg(long, value_name = "N")]
    pub keep: Option<NonZero<usize>>,
    /// Validate every N steps, besides at the start and the end; 0: only then.
    #[arg(long, value_name = "N", default_value_t = 100)]
    pub validate_every: u64,
    /// Samples to validate on; where the validation text has fewer, all of it.
    #[arg(long, value_name = "N", default_value_t = 256)]
    pub validation_samples: u64,
    /// Tokens of text that the trained model writes at the end; 0 for none. Each takes a forward pass, for which all
    /// weights are gathered.
    #[arg(long, value_name = "N", default_value_t = 240)]
    pub sample: usize,
    /// What moves the bytes between ranks.
    #[arg(long, value_enum, default_value = "auto", value_name = "NAME")]
    pub backend: BackendKind,
    /// Groups of consecutive ranks in which gradients are summed; as many as a cluster has hosts gives its bits on one host.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub reduce_groups: usize,
    /// Threads of each rank; default: the processors that it may run on, divided among the ranks of its host.
    #[arg(long, value_name = "N")]
    pub threads: Option<usize>,
    /// Print where the time of the steps after the first went, kernel by kernel.
    #[arg(long)]
    pub profile: bool,
    /// Write what each rank computes, waits for and moves into trace.json in --out, a timeline for ui.perfetto.dev.
    #[arg(long)]
    pub trace: bool,
    /// Seconds after which a rank that waits for another gives up, at the start and in each
    /// operation.
    #[arg(long, value_name = "S", default_value_t = 300, value_parser = clap::value_parser!(u64).range(..=LONGEST_TIMEOUT))]
    pub timeout: u64,
    /// Device, for tests.
    #[arg(long, value_enum, default_value = "cpu", hide = true)]
    pub device: DeviceKind,
    /// The flags that were given, on the command line or in the file, without dashes.
    #[arg(skip)]
    pub given: BTreeSet<String>,
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
    /// Tokens to write.
    #[arg(long, value_name = "N", default_value_t = 400)]
    pub tokens: usize,
    /// How freely to choose: 0 always takes the likeliest token.
    #[arg(long, value_name = "X", default_value_t = 0.7)]
    pub temperature: f64,
    /// Seed of the choices.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub seed: u64,
}

/// Reads `replicate=R,shard=S`, in either order.
fn mesh(text: &str) -> Result<Mesh, String> {
    let mut sizes = [("replicate", None), ("shard", None)];
    for part in text.split(',') {
        let (axis, size) = part.split_once('=').unwrap_or((part, ""));
        let slot = sizes.iter_mut().find(|(name, size)| *name == axis.trim() && size.is_none());
        let size = size.trim().parse::<usize>().ok().filter(|size| (1..=1 << 20).contains(size));
        match (slot, size) {
            (Some((_, slot)), Some(size)) => *slot = Some(size),
            _ => return Err(format!("{part:?} is no axis of a mesh: give both sizes, as in replicate=2,shard=4")),
        }
    }
    match sizes {
        [(_, Some(replicate)), (_, Some(shard))] => Ok(Mesh { replicate, shard }),
        _ => Err("a mesh has two axes: give both sizes, as in replicate=2,shard=4".to_owned()),
    }
}

fn changeable(name: &str) -> Result<String, String> {
    let name = name.trim_start_matches("--");
    match CHANGEABLE.contains(&name) {
        true => Ok(name.to_owned()),
        false => Err(format!("a run cannot change this; it can change {}", CHANGEABLE.join(", "))),
    }
}

fn preset(name: &str) -> Result<Preset, String> {
    Preset::named(name).ok_or_else(|| {
        let names: Vec<&str> = PRESETS.iter().map(|preset| preset.name).collect();
        format!("no preset has this name; there are {}", names.join(", "))
    })
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
        let flags = flags_of_file(&file).map_err(|message| (format!("error: {message}\n"), 2))?;
        let program = &arguments[..2];
        // Alone first, so that what the file gets wrong is said of the file.
        let alone = [program, &flags].concat();
        parse(&alone).map_err(|error| (format!("in {}: {}", file.display(), error.render()), 2))?;
        parse(&[program, &flags, &arguments[2..]].concat()).map_err(refuse)
    }
}

fn parse(arguments: &[String]) -> Result<Cli, clap::Error> {
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

/// A configuration file as flags.
fn flags_of_file(file: &Path) -> Result<Vec<String>, String> {
    let text = std::fs::read_to_string(file).map_err(|error| format!("--config {}: {error}", file.display()))?;
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
        let value = match value {
            toml::Value::String(text) => text,
            toml::Value::Integer(number) => number.to_string(),
            toml::Value::Float(number) => number.to_string(),
            other => {
                let kind = other.type_str();
                return Err(format!("{}: `{key}` is a {kind}, but settings are strings or numbers", file.display()));
            }
        };
        flags.push(format!("--{key}={value}"));
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
