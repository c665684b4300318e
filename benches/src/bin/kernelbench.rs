//! Times kernels on request, so that they can take turns with another program's: reads the name of a case on a line, answers with the
//! median seconds of a call. `benches/peers/kernels` is what asks.
#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::io::{BufRead, ErrorKind, Write};
use std::time::{Duration, Instant};

use clap::Parser;
use pillion_benches::kernels::{self, Call, Case, Product};
use pillion_kernels::cpu::Isa;
use pillion_kernels::{Cores, Device, Kernels};

/// Reads names of cases on lines, and answers each with the median seconds of a call; the first call does not count
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// Threads of a kernel
    #[arg(long, default_value_t = 1)]
    threads: usize,
    /// Calls last so long together
    #[arg(long, value_name = "MS", default_value_t = 100)]
    milliseconds: u64,
    /// Prints the names of all cases
    #[arg(long)]
    list: bool,
}

fn main() {
    let arguments = Arguments::parse();
    if let Err(error) = serve(&arguments) {
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

fn serve(arguments: &Arguments) -> Result<(), Box<dyn std::error::Error>> {
    Isa::of_process()?;
    let mut stdout = std::io::stdout();
    let processors = std::thread::available_parallelism()?.get();
    if !(1..=processors).contains(&arguments.threads) {
        return Err(format!("--threads {}: between 1 and the {processors} processors here", arguments.threads).into());
    }
    let cases: Vec<Case> =
        Product::ALL.into_iter().flat_map(kernels::products).chain([kernels::adamw(64 << 20, false)]).collect();
    if arguments.list {
        return Ok(cases.iter().try_for_each(|case| writeln!(stdout, "{}", case.name()))?);
    }
    let cases: HashMap<String, Case> = cases.into_iter().map(|case| (case.name(), case)).collect();
    let stream = Cores::new(arguments.threads)?.stream();
    let kernels = stream.kernels().expect("a device of the host has kernels");
    let shortest = Duration::from_millis(arguments.milliseconds);
    let mut ready: Option<(String, Call)> = None;
    for name in std::io::stdin().lock().lines() {
        let name = name?;
        if ready.as_ref().is_none_or(|(before, _)| *before != name) {
            // Two cases' operands together may be more than there is memory.
            drop(ready.take());
            let case = cases.get(&name).ok_or_else(|| format!("no case is called '{name}': --list names all"))?;
            ready = Some((name, case.operands()?));
        }
        let call = &mut ready.as_mut().expect("it was just made").1;
        writeln!(stdout, "{}", median(call, kernels, shortest))?;
        stdout.flush()?;
    }
    Ok(())
}

/// Seconds of a call, of three at least.
fn median(call: &mut Call, kernels: &dyn Kernels, shortest: Duration) -> f64 {
    call(kernels);
    let (began, mut samples) = (Instant::now(), Vec::new());
    while samples.len() < 3 || began.elapsed() < shortest {
        let started = Instant::now();
        call(kernels);
        samples.push(started.elapsed().as_secs_f64());
    }
    samples.sort_by(f64::total_cmp);
    samples[samples.len() / 2]
}
