//! Every kernel of a training step on one core, beside what the core could do at most. After criterion's own lines comes a table of
//! medians.
//!
//!     cargo bench --bench kernels                    # all
//!     cargo bench --bench kernels -- 'linear/f32'    # those whose name matches
#![allow(missing_docs)]

use std::time::{Duration, Instant};

use criterion::{Criterion, SamplingMode, Throughput};
use pillion_benches::kernels::{self, Case, Place, Sizes, Work};
use pillion_benches::timing::Summary;
use pillion_kernels::{Cores, Cpu, DType, Device};

const HEADING: &str = "One core, operands of random numbers; medians. The roof of products and attention (GFLOP/s) is what
multiply-adds of registers reach, that of everything else (GB/s) a plain loop that reads, updates and writes as many bytes, of
arrays of 32 to 192 MiB. Each roof is measured right after its kernel, and is the best of several runs.";

struct Row {
    name: String,
    milliseconds: f64,
    rate: f64,
    unit: &'static str,
    roof: f64,
}

fn main() {
    let mut criterion =
        Criterion::default().sample_size(10).warm_up_time(Duration::from_millis(1)).configure_from_args();
    let rows: Vec<Row> = kernels::all(Sizes::CORE).iter().filter_map(|case| measured(&mut criterion, case)).collect();
    criterion.final_summary();
    if rows.is_empty() {
        return;
    }
    println!("{HEADING}\n");
    println!("{:<44} {:>9} {:>8}         {:>8} {:>7}", "kernel", "ms", "rate", "roof", "of roof");
    for Row { name, milliseconds, rate, unit, roof } in rows {
        println!("{name:<44} {milliseconds:>9.2} {rate:>8.1} {unit:<7} {roof:>8.1} {:>6.0}%", 100.0 * rate / roof);
    }
}

/// Runs a case if the filter lets it; its kernel is then called at least eleven times.
fn measured(criterion: &mut Criterion, case: &Case) -> Option<Row> {
    // Criterion warns where the time does not suffice for its samples, so this is the time of a slow core.
    let (throughput, seconds) = match case.work {
        Work::Products { operations, .. } => (Throughput::Elements(operations as u64), operations / 40e9),
        Work::Memory(traffic) => (Throughput::Bytes(traffic.bytes() as u64), traffic.bytes() as f64 / 5e9),
    };
    let (stream, mut call, mut samples) = (Cpu.stream(), None, Vec::new());
    let kernels = stream.kernels().expect("Cpu has kernels");
    let mut group = criterion.benchmark_group(case.kernel);
    group.sampling_mode(SamplingMode::Flat).throughput(throughput);
    group.measurement_time(Duration::from_secs_f64(10.0 * seconds));
    group.bench_function(&case.variant, |bench| {
        let call = call.get_or_insert_with(|| case.operands(&Place::new(&Cpu)).expect("memory"));
        bench.iter_custom(|iterations| {
            let before = samples.len();
            for _ in 0..iterations {
                let started = Instant::now();
                call(kernels);
                samples.push(started.elapsed().as_nanos() as u64);
            }
            Duration::from_nanos(samples[before..].iter().sum())
        });
    });
    group.finish();
    drop(call);
    if samples.is_empty() {
        return None;
    }
    let microseconds = Summary::of(&samples).p50_us;
    let (work, unit, roof) = match case.work {
        Work::Products { operations, dtype } => (operations, "GFLOP/s", peak(dtype)),
        Work::Memory(traffic) => (traffic.bytes() as f64, "GB/s", traffic.bandwidth().expect("memory")),
    };
    let (rate, roof) = (work / microseconds / 1e3, roof / 1e9);
    Some(Row { name: case.name(), milliseconds: microseconds / 1e3, rate, unit, roof })
}

fn peak(dtype: DType) -> f64 {
    Cores::new(1).expect("the caller's thread").peak(dtype)
}
