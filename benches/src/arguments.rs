//! The command line, parsed into [`Settings`] that can be run: whatever contradicts itself is an error here, before a rank starts.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Parser, ValueEnum};
use pillion_collectives::{Backend, GpuTransport, Options, Reduction, WireKind};
use pillion_kernels::DType;

use crate::Error;
use crate::binding::Bind;
use crate::elements::{RedopArgument, TypeArgument, type_of};
use crate::gpu::{self, DeviceArgument};
use crate::habits::{Habits, size};
use crate::operation::{Form, Operation};

/// Times collectives as nccl-tests does: `size count type redop root time algbw busbw #wrong`, and more columns.
///
/// Sizes are those of the full buffer, rounded down to what all ranks can share. A time is that of the slowest rank, after a barrier;
/// `time` is the median over iterations, `p95`, `p99` and `min` tell the rest. `%mem` is the best local loop that reads and writes as
/// much as the operation must, run by all ranks at once, as a share of the operation's time. Units: us, and GB/s of 10^9 bytes.
#[derive(Debug, Parser)]
#[command(name = "collbench", version)]
pub struct Arguments {
    /// What to measure; `all` measures each in turn
    #[arg(value_name = "OP", value_parser = operation_names())]
    operation: String,
    /// Smallest size in bytes; K, M, G and T are powers of 1024, as are KB and KiB; 1.5M is a size,
    /// too [default: 8]
    #[arg(short = 'b', long = "minbytes", value_name = "MIN", value_parser = size)]
    min: Option<usize>,
    /// Largest size in bytes; the last size is the largest MIN x FACTOR^k within it [default: 64M]
    #[arg(short = 'e', long = "maxbytes", value_name = "MAX", value_parser = size)]
    max: Option<usize>,
    /// Each size is this many times the one before [default: 8]
    #[arg(short = 'f', long = "stepfactor", value_name = "FACTOR")]
    factor: Option<usize>,
    /// These sizes, instead of -b, -e and -f
    #[arg(long, value_name = "SIZE,…", value_delimiter = ',', value_parser = size, conflicts_with_all = ["min", "max", "factor"])]
    sizes: Option<Vec<usize>>,
    /// Timed iterations of each size
    #[arg(short = 'n', long, value_name = "ITERS", default_value_t = 20)]
    iters: usize,
    /// Iterations before them that do not count
    #[arg(short = 'w', visible_short_alias = 'x', long = "warmup_iters", value_name = "WARMUP", default_value_t = 5)]
    warmup: usize,
    /// Type of the elements, or all of them in turn: f32, bf16, f16, f64, i8, u8, i32, u32, i64,
    /// u64, bool, all [default: f32]
    #[arg(short = 't', visible_short_alias = 'd', long = "type", alias = "datatype", value_name = "TYPE", value_parser = type_of)]
    dtype: Option<TypeArgument>,
    /// How elements are combined, or all that there are for the type in turn [default: sum]
    #[arg(short = 'o', long = "op", value_enum, value_name = "REDOP")]
    redop: Option<RedopArgument>,
    /// Number of ranks, where no launcher says it [default: 2]
    #[arg(short = 'r', visible_short_alias = 'g', long, alias = "ngpus", value_name = "RANKS")]
    ranks: Option<usize>,
    /// Ranks are threads of this process, not processes
    #[arg(long)]
    threads: bool,
    /// Starts more than 8 ranks for each core
    #[arg(long)]
    oversubscribe: bool,
    /// Seconds after which a rank that waits for another gives up, in an operation [default: 300]
    /// and at the start [default: 60]
    #[arg(short = 'T', long, value_name = "S", value_parser = clap::value_parser!(u64).range(1..))]
    timeout: Option<u64>,
    /// Measures the form in one buffer, too
    #[arg(long)]
    in_place: bool,
    /// Where buffers lie: in the arena; in private memory; or in foreign memory, that of another
    /// allocator, at an address that suits an element and nothing longer [default: arena]
    #[arg(long, value_enum, value_name = "WHERE")]
    buffers: Option<Buffers>,
    /// Verifies every element of every buffer, before and after the timed iterations
    #[arg(long)]
    check: bool,
    #[command(flatten)]
    habits: Habits,
    /// Flushes the caches before each iteration: each rank walks memory of twice the last-level cache, 64 MiB at least
    #[arg(long)]
    cold: bool,
    /// Also runs each operation beside a computation of the same length, as OSU's nonblocking tests do
    #[arg(long)]
    overlap: bool,
    /// What moves the bytes; peer and nccl between GPUs
    #[arg(long, value_enum, default_value_t = BackendArgument::Auto)]
    backend: BackendArgument,
    /// Whose memory buffers are: cpu, cuda for a GPU of each rank, or cuda:N for GPU N; GPUs need a
    /// build with --features cuda
    #[arg(long, value_name = "DEVICE", default_value = "cpu", value_parser = gpu::device)]
    device: DeviceArgument,
    /// What connects hosts
    #[arg(long, value_enum, default_value = "auto")]
    wire: WireKind,
    /// Behaves as if the ranks were spread over this many hosts, between which memory stands for MPI; needs --threads
    #[arg(long, value_name = "HOSTS", requires = "threads")]
    hosts: Option<usize>,
    /// Groups in which reductions are computed, as a cluster of so many hosts does; divides the number of ranks
    #[arg(long, value_name = "GROUPS", default_value_t = 1)]
    reduce_groups: usize,
    /// Writes the machine, every sample and all figures to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Which processors each rank runs on [default: core where there is one for each rank of the host, else none]
    #[arg(long, value_enum, value_name = "HOW")]
    bind: Option<Bind>,
    /// Runs another library's operation in turn with each of ours, in the first form; needs the feature of its name, and mpirun
    #[arg(long, value_enum, value_name = "LIBRARY")]
    compare: Option<Compare>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum BackendArgument {
    Auto,
    Shm,
    Tcp,
    Mpi,
    Hierarchical,
    /// GPUs of one host read each other's memory
    Peer,
    /// NCCL between GPUs
    Nccl,
}

/// What ours is compared with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Compare {
    /// The MPI library that this program is linked with
    Mpi,
}

/// Where an operation's buffers lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Buffers {
    /// In the communicator's arena.
    Arena,
    /// In memory that no other rank sees.
    Private,
    /// The same, as another allocator places it: at an address that suits an element, and nothing
    /// longer.
    Foreign,
}

impl Buffers {
    /// Its name in results.
    pub fn name(self) -> &'static str {
        match self {
            Buffers::Arena => "arena",
            Buffers::Private => "private",
            Buffers::Foreign => "foreign",
        }
    }
}

/// A run, known to make sense as far as the arguments tell.
#[derive(Clone, Debug)]
pub struct Settings {
    /// What is measured, in order.
    pub operations: Vec<Operation>,
    /// Sizes in bytes, in order.
    pub sizes: Vec<usize>,
    /// Timed iterations; at least one.
    pub iterations: usize,
    /// Untimed ones before them.
    pub warmup: usize,
    /// Types of elements, in order.
    pub dtypes: Vec<DType>,
    /// How elements are combined, in order.
    pub reductions: Vec<Reduction>,
    /// Number of ranks, if said.
    pub ranks: Option<usize>,
    /// Whether ranks are threads.
    pub threads: bool,
    /// Whether more ranks start than cores can reasonably run.
    pub oversubscribe: bool,
    /// Whether the form in one buffer is measured, too.
    pub in_place: bool,
    /// Where buffers lie.
    pub buffers: Buffers,
    /// The GPU whose memory they are, if they are one's.
    pub gpu: Option<gpu::Wanted>,
    /// Whether results are verified.
    pub check: bool,
    /// Whether caches are flushed.
    pub cold: bool,
    /// Whether overlap is measured.
    pub overlap: bool,
    /// Which processors ranks run on, if said.
    pub bind: Option<Bind>,
    /// What ours is compared with.
    pub compare: Option<Compare>,
    /// For the communicators.
    pub options: Options,
    /// Where the results go, besides the screen.
    pub json: Option<PathBuf>,
}

impl Settings {
    /// Forms of an operation that this run measures.
    pub fn forms(&self, operation: Operation) -> &'static [Form] {
        let forms = operation.forms();
        if self.in_place { forms } else { &forms[..1] }
    }
}

/// Iterations at most: eight bytes are kept for each.
const MOST_ITERATIONS: usize = 100_000_000;

impl Arguments {
    /// The run that they describe.
    ///
    /// # Errors
    /// [`Error::Usage`] for what contradicts itself, and for flags that would have no effect.
    pub fn settings(self) -> Result<Settings, Error> {
        let usage = |text: String| Err(Error::Usage(text));
        let all = if self.device == DeviceArgument::Cpu { &Operation::ALL[..] } else { &gpu::OPERATIONS };
        let is_meant = |one: &&Operation| self.operation == "all" || one.name() == self.operation;
        let operations: Vec<Operation> = all.iter().filter(is_meant).copied().collect();
        let gpu = self.gpu(&operations)?;
        if let [operation] = operations[..] {
            self.check_effect(operation)?;
        }
        if self.hosts.is_some_and(|hosts| hosts > 1) && matches!(self.backend, BackendArgument::Shm) {
            return usage(
                "--hosts spreads ranks over hosts, which shm does not connect: choose another --backend".into(),
            );
        }
        if self.iters > MOST_ITERATIONS || self.warmup > MOST_ITERATIONS {
            return usage(format!("-n and -w are at most {MOST_ITERATIONS}, since every sample is kept"));
        }
        let needs_mpi = self.backend == BackendArgument::Mpi || self.wire == WireKind::Mpi;
        if needs_mpi && !cfg!(feature = "mpi") && self.hosts.is_none() {
            return usage("this backend needs MPI, which this build does not have: build with --features mpi".into());
        }
        self.habits.answer()?;
        if self.iters == 0 {
            return usage("-n 0 measures nothing: ask for at least 1 iteration".into());
        }
        if self.ranks == Some(0) {
            return usage(
                "-r 0 leaves nobody to measure: ask for at least 1 rank (operations with a root have root 0)".into(),
            );
        }
        let hosts = self.hosts.unwrap_or(1);
        for (flag, number) in [("--hosts", hosts), ("--reduce-groups", self.reduce_groups)] {
            if number == 0 {
                return usage(format!("{flag} 0 leaves none: ask for at least 1"));
            }
        }
        if let Some(Compare::Mpi) = self.compare {
            if cfg!(not(feature = "mpi")) {
                let text = "--compare mpi needs the feature `mpi` of pillion-benches: build with `--features mpi`";
                return usage(text.into());
            }
            if self.in_place {
                return usage("--compare mpi compares the first form of each operation: leave --in-place out".into());
            }
        }
        let dtypes = self.dtype.unwrap_or(TypeArgument::One(DType::F32)).dtypes();
        let reductions = self.redop.unwrap_or(RedopArgument::Sum).reductions();
        if let ([dtype], [reduction]) = (&dtypes[..], &reductions[..])
            && !reduction.supports(*dtype, *dtype)
        {
            let reduction = reduction.name();
            return usage(format!("there is no {reduction} of {dtype}: choose another -o or another -t"));
        }
        let default = Options::default();
        let options = Options {
            timeout: self.timeout.map_or(default.timeout, Duration::from_secs),
            startup_timeout: self.timeout.map_or(default.startup_timeout, Duration::from_secs),
            backend: match self.backend {
                BackendArgument::Auto | BackendArgument::Peer | BackendArgument::Nccl => Backend::Auto,
                BackendArgument::Shm => Backend::Shm,
                BackendArgument::Tcp => Backend::Tcp,
                BackendArgument::Mpi => Backend::Mpi,
                BackendArgument::Hierarchical => Backend::Hierarchical,
            },
            wire: self.wire,
            reduce_groups: self.reduce_groups,
            simulated_hosts: hosts,
            ..default
        };
        Ok(Settings {
            operations,
            sizes: self.all_sizes()?,
            iterations: self.iters,
            warmup: self.warmup,
            dtypes,
            reductions,
            ranks: self.ranks,
            threads: self.threads,
            oversubscribe: self.oversubscribe,
            in_place: self.in_place,
            buffers: self.buffers.unwrap_or(if gpu.is_some() { Buffers::Private } else { Buffers::Arena }),
            gpu,
            check: self.check || self.habits.asks_for_checks(),
            cold: self.cold,
            overlap: self.overlap,
            bind: self.bind,
            compare: self.compare,
            options,
            json: self.json,
        })
    }

    /// The GPU that is asked for, if one is.
    ///
    /// # Errors
    /// For what GPUs do not have.
    fn gpu(&self, operations: &[Operation]) -> Result<Option<gpu::Wanted>, Error> {
        let usage = |text: String| Err(Error::Usage(text));
        let between_gpus = match self.backend {
            BackendArgument::Auto => Some(GpuTransport::Auto),
            BackendArgument::Peer => Some(GpuTransport::Peer),
            BackendArgument::Nccl => Some(GpuTransport::Nccl),
            _ => None,
        };
        let DeviceArgument::Cuda(ordinal) = self.device else {
            return match between_gpus {
                Some(GpuTransport::Peer | GpuTransport::Nccl) => {
                    usage("--backend peer and nccl move memory of GPUs: give --device cuda".into())
                }
                _ => Ok(None),
            };
        };
        if operations.is_empty() {
            let names: Vec<&str> = gpu::OPERATIONS.iter().map(|one| one.name()).collect();
            return usage(format!("GPUs have no {}: they have {}", self.operation, names.join(", ")));
        }
        let refused = [
            (self.buffers.is_some(), "--buffers"),
            (self.cold, "--cold"),
            (self.compare.is_some(), "--compare"),
            (self.hosts.is_some(), "--hosts"),
        ];
        if let Some((_, flag)) = refused.into_iter().find(|(is_given, _)| *is_given) {
            return usage(format!("--device cuda does not have {flag}: leave it out"));
        }
        let Some(by) = between_gpus else {
            return usage("this --backend moves memory of the host: GPUs have peer and nccl".into());
        };
        let dtypes = self.dtype.unwrap_or(TypeArgument::One(DType::F32)).dtypes();
        let reductions = self.redop.unwrap_or(RedopArgument::Sum).reductions();
        if let ([operation], [dtype], [reduction]) = (operations, &dtypes[..], &reductions[..])
            && operation.reduces()
            && !gpu::combines(*operation, *dtype, *reduction)
        {
            let name = reduction.name();
            return usage(format!("GPUs have no {name} of {dtype}: they sum and average f32 and bf16"));
        }
        Ok(Some(gpu::Wanted { ordinal, by }))
    }

    /// Refuses flags that would have no effect on the only operation.
    fn check_effect(&self, operation: Operation) -> Result<(), Error> {
        let moves = operation.moves_buffers();
        let sized = self.sizes.is_some()
            || self.habits.sizes().is_some()
            || self.min.is_some()
            || self.max.is_some()
            || self.factor.is_some();
        let idle = [
            ("size (-b, -e, -f, --sizes)", sized && !moves),
            ("type (-t)", self.dtype.is_some() && !moves),
            ("combination (-o)", self.redop.is_some() && !operation.reduces()),
            ("form in place (--in-place)", self.in_place && !operation.forms().contains(&Form::InPlace)),
            ("counterpart in MPI (--compare)", self.compare.is_some() && operation == Operation::Window),
            ("choice of buffers (--buffers)", self.buffers.is_some() && !operation.chooses_buffers()),
            ("overlap (--overlap)", self.overlap && !operation.overlaps()),
        ];
        match idle.iter().find(|(_, given)| *given) {
            Some((what, _)) => Err(Error::Usage(format!("{} has no {what}: leave it out", operation.name()))),
            None => Ok(()),
        }
    }

    fn all_sizes(&self) -> Result<Vec<usize>, Error> {
        if let Some(sizes) = &self.sizes {
            return Ok(sizes.clone());
        }
        let (least, most) = self.habits.sizes().unwrap_or_default();
        for (flag, both) in
            [("-b", self.min.is_some() && least.is_some()), ("-e", self.max.is_some() && most.is_some())]
        {
            if both {
                return Err(Error::Usage(format!("-m and {flag} both give a size: leave one out")));
            }
        }
        let (least, most) = (self.min.or(least), self.max.or(most));
        let (min, max, factor) = (least.unwrap_or(8), most.unwrap_or(64 << 20), self.factor.unwrap_or(8));
        if min > max {
            return Err(Error::Usage(format!(
                "-b {min} is more than -e {max}: the smallest size is at most the largest"
            )));
        }
        if factor < 2 {
            return Err(Error::Usage(format!(
                "-f {factor} does not lead from one size to a larger one: it is at least 2"
            )));
        }
        // 0 times anything stays 0.
        let next = |&size: &usize| size.max(1).checked_mul(factor).filter(|&next| size > 0 && next <= max);
        Ok(std::iter::successors(Some(min), next).collect())
    }
}

fn operation_names() -> clap::builder::PossibleValuesParser {
    let names = Operation::value_variants().iter().filter_map(ValueEnum::to_possible_value);
    names
        .chain([clap::builder::PossibleValue::new("all").help("Each of them, in this order")])
        .collect::<Vec<_>>()
        .into()
}

#[cfg(test)]
mod tests;
