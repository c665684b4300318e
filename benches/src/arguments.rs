//! The command line, parsed into [`Settings`] that can be run: whatever contradicts itself is an error here, before a rank starts.

use std::path::PathBuf;

use clap::{Parser, ValueEnum};
use pillion_collectives::{Backend, Options, Reduction};
use pillion_kernels::DType;

use crate::Error;
use crate::binding::Bind;
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
    /// Smallest size in bytes; K, M and G are powers of 1024 [default: 8]
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
    #[arg(short = 'w', long = "warmup_iters", value_name = "WARMUP", default_value_t = 5)]
    warmup: usize,
    /// Type of the elements, or all of them in turn [default: f32]
    #[arg(short = 't', long = "type", value_enum, value_name = "TYPE")]
    dtype: Option<TypeArgument>,
    /// How elements are combined [default: sum]
    #[arg(short = 'o', long = "op", value_enum, value_name = "REDOP")]
    redop: Option<RedopArgument>,
    /// Number of ranks, where no launcher says it [default: 2]
    #[arg(short = 'r', long, value_name = "RANKS")]
    ranks: Option<usize>,
    /// Ranks are threads of this process, not processes
    #[arg(long)]
    threads: bool,
    /// Measures the form in one buffer, too
    #[arg(long)]
    in_place: bool,
    /// Where buffers lie: in the arena, where peers use them in place, or in private memory, from where they are copied [default: arena]
    #[arg(long, value_enum, value_name = "WHERE")]
    buffers: Option<Buffers>,
    /// Verifies every element of every buffer, before and after the timed iterations
    #[arg(long)]
    check: bool,
    /// Flushes the caches before each iteration: each rank walks memory of twice the last-level cache, 64 MiB at least
    #[arg(long)]
    cold: bool,
    /// Also runs each operation beside a computation of the same length, as OSU's nonblocking tests do
    #[arg(long)]
    overlap: bool,
    /// What moves the bytes
    #[arg(long, value_enum, default_value_t = BackendArgument::Auto)]
    backend: BackendArgument,
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

#[derive(Clone, Copy, Debug, ValueEnum)]
enum TypeArgument {
    F32,
    Bf16,
    F64,
    I64,
    All,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum RedopArgument {
    Sum,
    Max,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum BackendArgument {
    Auto,
    Shm,
    Mpi,
    Hierarchical,
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
}

impl Buffers {
    /// Its name in results.
    pub fn name(self) -> &'static str {
        match self {
            Buffers::Arena => "arena",
            Buffers::Private => "private",
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
    /// How elements are combined.
    pub reduction: Reduction,
    /// Number of ranks, if said.
    pub ranks: Option<usize>,
    /// Whether ranks are threads.
    pub threads: bool,
    /// Whether the form in one buffer is measured, too.
    pub in_place: bool,
    /// Where buffers lie.
    pub buffers: Buffers,
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
        let operations: Vec<Operation> =
            Operation::ALL.into_iter().filter(|one| self.operation == "all" || one.name() == self.operation).collect();
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
        if matches!(self.backend, BackendArgument::Mpi | BackendArgument::Hierarchical)
            && !cfg!(feature = "mpi")
            && self.hosts.is_none()
        {
            return usage("this backend needs MPI, which this build does not have: build with --features mpi".into());
        }
        if self.iters == 0 {
            return usage("-n 0 measures nothing: ask for at least 1 iteration".into());
        }
        if self.ranks == Some(0) {
            return usage("-r 0 leaves nobody to measure: ask for at least 1 rank".into());
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
        let options = Options {
            backend: match self.backend {
                BackendArgument::Auto => Backend::Auto,
                BackendArgument::Shm => Backend::Shm,
                BackendArgument::Mpi => Backend::Mpi,
                BackendArgument::Hierarchical => Backend::Hierarchical,
            },
            reduce_groups: self.reduce_groups,
            simulated_hosts: hosts,
            ..Options::default()
        };
        Ok(Settings {
            operations,
            sizes: self.all_sizes()?,
            iterations: self.iters,
            warmup: self.warmup,
            dtypes: match self.dtype.unwrap_or(TypeArgument::F32) {
                TypeArgument::F32 => vec![DType::F32],
                TypeArgument::Bf16 => vec![DType::Bf16],
                TypeArgument::F64 => vec![DType::F64],
                TypeArgument::I64 => vec![DType::I64],
                TypeArgument::All => vec![DType::F32, DType::Bf16, DType::F64, DType::I64],
            },
            reduction: match self.redop {
                Some(RedopArgument::Max) => Reduction::Max,
                _ => Reduction::Sum,
            },
            ranks: self.ranks,
            threads: self.threads,
            in_place: self.in_place,
            buffers: self.buffers.unwrap_or(Buffers::Arena),
            check: self.check,
            cold: self.cold,
            overlap: self.overlap,
            bind: self.bind,
            compare: self.compare,
            options,
            json: self.json,
        })
    }

    /// Refuses flags that would have no effect on the only operation.
    fn check_effect(&self, operation: Operation) -> Result<(), Error> {
        let moves = operation.moves_buffers();
        let sized = self.sizes.is_some() || self.min.is_some() || self.max.is_some() || self.factor.is_some();
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
        let (min, max, factor) = (self.min.unwrap_or(8), self.max.unwrap_or(64 << 20), self.factor.unwrap_or(8));
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

/// Bytes: a number with K, M or G for a power of 1024.
fn size(text: &str) -> Result<usize, String> {
    let (digits, unit) = match text.char_indices().last() {
        Some((at, 'k' | 'K')) => (&text[..at], 1usize << 10),
        Some((at, 'm' | 'M')) => (&text[..at], 1 << 20),
        Some((at, 'g' | 'G')) => (&text[..at], 1 << 30),
        _ => (text, 1),
    };
    let number: usize = digits.parse().map_err(|_| "expected bytes such as 8, 4K, 1M or 1G".to_string())?;
    number
        .checked_mul(unit)
        .filter(|&bytes| bytes < 1 << 48)
        .ok_or_else(|| "more than any machine's memory".to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Settings, String> {
        let arguments = Arguments::try_parse_from(["collbench"].into_iter().chain(line.split_whitespace()));
        arguments.map_err(|error| error.to_string())?.settings().map_err(|error| error.to_string())
    }

    #[test]
    fn sizes_are_multiplied_until_the_largest() {
        assert_eq!(parse("all-reduce -b 8 -e 1K -f 4").unwrap().sizes, [8, 32, 128, 512]);
        assert_eq!(parse("all-reduce -b 0 -e 0").unwrap().sizes, [0]);
        assert_eq!(parse("all-reduce --sizes 0,4,1k").unwrap().sizes, [0, 4, 1024]);
        let default = parse("all-reduce").unwrap().sizes;
        assert_eq!((default[0], *default.last().unwrap()), (8, 16 << 20), "8 · 8⁷; 8 · 8⁸ is more than 64 MiB");
    }

    #[test]
    fn what_cannot_be_is_named() {
        for (line, words) in [
            ("all-reduse", "all-reduce"),
            ("all-reduce -b 2 -e 1", "-b 2 is more than -e 1"),
            ("all-reduce -f 1", "-f 1"),
            ("all-reduce -n 0", "-n 0"),
            ("all-reduce -r 0", "-r 0"),
            ("all-reduce -b 1T", "expected bytes"),
            ("all-reduce -b 99999999999G", "more than any machine"),
            ("all-reduce --sizes 4 -b 4", "cannot be used with"),
            ("all-reduce --reduce-groups 0", "--reduce-groups 0"),
            ("all-reduce --hosts 2", "--threads"),
            ("all-reduce --compare mpi --in-place", "--compare mpi"),
            ("all-reduce --bind socket", "socket"),
            ("window --compare mpi", "window has no counterpart"),
            ("all-gather -o max", "all-gather has no combination"),
            ("barrier -b 8", "barrier has no size"),
            ("scalars -t f64", "scalars has no type"),
            ("gather --in-place", "gather has no form in place"),
            ("window --buffers arena", "window has no choice of buffers"),
            ("window --overlap", "window has no overlap"),
        ] {
            let error = parse(line).expect_err(line);
            assert!(error.contains(words), "{line}: {error}");
        }
    }

    #[test]
    fn all_takes_every_flag() {
        let settings =
            parse("all -t all -o max --in-place --buffers private --overlap -r 4 --reduce-groups 2").unwrap();
        assert_eq!((settings.operations.len(), settings.dtypes.len()), (12, 4));
    }
}
