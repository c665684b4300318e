//! Times kernels: on request, so that they can take turns with another program's
//! (`benches/peers/kernels` asks so), or all of them, as shares of what the device copies and
//! multiplies in a second.
#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::io::{BufRead, ErrorKind, Write};
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Parser;
use pillion_benches::gpu::{self, DeviceArgument};
use pillion_benches::kernels::{self, Call, Case, Place, Sizes, Work};
use pillion_kernels::cpu::Isa;
use pillion_kernels::{Cores, Device, Stream};

/// Reads names of cases on lines, and answers each with the median seconds of a call; the first
/// call does not count
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// What runs the kernels: cpu, cuda, or cuda:N, with GPUs counted from 0
    #[arg(long, value_name = "DEVICE", default_value = "cpu", value_parser = gpu::device)]
    device: DeviceArgument,
    /// Threads of a kernel on the processor
    #[arg(long, default_value_t = 1)]
    threads: usize,
    /// Calls last so long together
    #[arg(long, value_name = "MS", default_value_t = 100)]
    milliseconds: u64,
    /// Reads nothing, and prints a table of all cases, or of those whose name has this part
    #[arg(long, value_name = "PART", num_args = 0..=1, default_missing_value = "")]
    table: Option<String>,
    /// Operands so small that every case takes an instant
    #[arg(long)]
    small: bool,
    /// Prints the names of all cases
    #[arg(long)]
    list: bool,
}

type Failure = Box<dyn std::error::Error>;

fn main() {
    let arguments = Arguments::parse();
    if let Err(error) = run(&arguments) {
        let is_closed =
            error.downcast_ref::<std::io::Error>().is_some_and(|error| error.kind() == ErrorKind::BrokenPipe);
        if is_closed {
            // Whoever reads has read enough.
            return;
        }
        eprintln!("kernelbench: {error}");
        std::process::exit(1);
    }
}

fn run(arguments: &Arguments) -> Result<(), Failure> {
    Isa::of_process()?;
    let processors = std::thread::available_parallelism()?.get();
    if !(1..=processors).contains(&arguments.threads) {
        return Err(format!("--threads {}: between 1 and the {processors} processors here", arguments.threads).into());
    }
    let sizes = match arguments.device {
        _ if arguments.small => Sizes::SMALL,
        DeviceArgument::Cpu => Sizes::CORE,
        DeviceArgument::Cuda(_) => Sizes::GPU,
    };
    let mut cases = kernels::all(sizes);
    if arguments.device == DeviceArgument::Cpu && !arguments.small {
        // With which `benches/peers/kernels` compares.
        cases.push(kernels::adamw(64 << 20, false));
    }
    if arguments.list {
        let mut stdout = std::io::stdout();
        return Ok(cases.iter().try_for_each(|case| writeln!(stdout, "{}", case.name()))?);
    }
    let (device, name): (Arc<dyn Device>, String) = match arguments.device {
        DeviceArgument::Cpu => (Arc::new(Cores::new(arguments.threads)?), format!("threads: {}", arguments.threads)),
        DeviceArgument::Cuda(ordinal) => gpu::alone(ordinal.unwrap_or(0), sizes)?,
    };
    let bench =
        Bench { device: &*device, stream: device.stream(), shortest: Duration::from_millis(arguments.milliseconds) };
    match &arguments.table {
        Some(part) => bench.table(&name, &cases, part),
        None => bench.serve(cases),
    }
}

/// A device under test.
struct Bench<'a> {
    device: &'a dyn Device,
    stream: Box<dyn Stream>,
    shortest: Duration,
}

impl Bench<'_> {
    fn serve(&self, cases: Vec<Case>) -> Result<(), Failure> {
        let mut stdout = std::io::stdout();
        let cases: HashMap<String, Case> = cases.into_iter().map(|case| (case.name(), case)).collect();
        let mut ready: Option<(String, Call)> = None;
        for name in std::io::stdin().lock().lines() {
            let name = name?;
            if ready.as_ref().is_none_or(|(before, _)| *before != name) {
                // Two cases' operands together may be more than there is memory.
                drop(ready.take());
                let case = cases.get(&name).ok_or_else(|| format!("no case is called '{name}': --list names all"))?;
                ready = Some((name, case.operands(&Place::new(self.device))?));
            }
            let call = &mut ready.as_mut().expect("it was just made").1;
            writeln!(stdout, "{}", self.median(call)?)?;
            stdout.flush()?;
        }
        Ok(())
    }

    /// Seconds of a call, of three at least: the median. Calls are enqueued several at a time, so a
    /// device that runs them later does not wait for the host in between.
    fn median(&self, call: &mut Call) -> Result<f64, Failure> {
        const LONG: Duration = Duration::from_millis(10);
        let kernels = self.stream.kernels().ok_or(pillion_kernels::Error::NoKernels)?;
        call(kernels);
        self.stream.synchronize()?;
        let (began, mut seconds, mut batch) = (Instant::now(), Vec::new(), 1);
        while seconds.len() < 3 || began.elapsed() < self.shortest {
            let started = Instant::now();
            let mut stamps = vec![self.stream.stamp()];
            for _ in 0..batch {
                call(kernels);
                stamps.push(self.stream.stamp());
            }
            self.stream.synchronize()?;
            let times: Option<Vec<Instant>> = stamps.iter().map(|stamp| stamp.time()).collect();
            let times = times.ok_or("the device gives no times of what it has run")?;
            seconds.extend(times.windows(2).map(|pair| pair[1].duration_since(pair[0]).as_secs_f64()));
            if started.elapsed() < LONG {
                batch *= 2;
            }
        }
        seconds.sort_by(f64::total_cmp);
        Ok(seconds[seconds.len() / 2])
    }

    /// Prints each case's time, its speed, and that as a share of the ceiling: of what moves memory
    /// the copy of this run, and of products the fastest of their type.
    fn table(&self, device: &str, cases: &[Case], part: &str) -> Result<(), Failure> {
        let mut rows = Vec::new();
        let is_wanted = |case: &Case| case.name().contains(part);
        if !cases.iter().any(is_wanted) {
            return Err(format!("--table {part}: no case has this in its name, and --list names all").into());
        }
        let is_ceiling = |case: &Case| case.kernel == "copy" || case.kernel == "linear";
        for case in cases.iter().filter(|case| is_wanted(case) || is_ceiling(case)) {
            let mut call = case.operands(&Place::new(self.device))?;
            rows.push((case, rate(case, self.median(&mut call)?)));
        }
        let ceiling = |of: &Case| {
            let same = |case: &Case| match (case.work, of.work) {
                (Work::Products { dtype: a, .. }, Work::Products { dtype: b, .. }) => a == b,
                (Work::Memory(_), Work::Memory(_)) => case.kernel == "copy",
                _ => false,
            };
            let rates = rows.iter().filter(|(case, _)| same(case)).map(|&(_, rate)| rate);
            rates.fold(0.0, f64::max)
        };
        let mut stdout = std::io::stdout();
        writeln!(
            stdout,
            "{device}; medians; shares of the copy, and of the fastest product of the type, in this run\n"
        )?;
        writeln!(stdout, "{:<44} {:>10} {:>9}         {:>7}", "kernel", "ms", "rate", "share")?;
        for &(case, rate) in rows.iter().filter(|(case, _)| is_wanted(case)) {
            let (work, unit) = match case.work {
                Work::Products { operations, .. } => (operations, "GFLOP/s"),
                Work::Memory(traffic) => (traffic.bytes() as f64, "GB/s"),
            };
            let (milliseconds, share) = (work / rate * 1e3, 100.0 * rate / ceiling(case));
            let (name, rate) = (case.name(), rate / 1e9);
            writeln!(stdout, "{name:<44} {milliseconds:>10.4} {rate:>9.1} {unit:<7} {share:>6.0}%")?;
        }
        Ok(())
    }
}

/// What a case does in a second: operations or bytes.
fn rate(case: &Case, seconds: f64) -> f64 {
    let work = match case.work {
        Work::Products { operations, .. } => operations,
        Work::Memory(traffic) => traffic.bytes() as f64,
    };
    work / seconds.max(1e-9)
}
