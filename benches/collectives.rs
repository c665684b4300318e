//! Collectives between two ranks that are threads, f32, from the arena. Bytes are those of the full buffer.
#![allow(missing_docs)]

use std::sync::Barrier;
use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use pillion_collectives::{Communicator, Launch, Options, Reduce};
use pillion_kernels::{Cpu, DType, Device, Event};

/// Runs `program(communicator, iterations)` on two ranks at once and returns the slower one's time.
fn slowest(iterations: u64, program: impl Fn(&Communicator, u64) -> Duration + Sync) -> Duration {
    let start = Barrier::new(2);
    std::thread::scope(|scope| {
        let ranks = Launch::threads(2).into_iter().map(|launch| {
            let (program, start) = (&program, &start);
            scope.spawn(move || {
                let communicator = Communicator::connect(&launch, Options::default()).expect("two ranks meet");
                start.wait();
                program(&communicator, iterations)
            })
        });
        let ranks: Vec<_> = ranks.collect();
        ranks.into_iter().map(|rank| rank.join().expect("no panic")).max().expect("two ranks")
    })
}

fn collectives(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("collectives");
    group.sample_size(10);
    group.bench_function("barrier", |bench| {
        bench.iter_custom(|iterations| {
            slowest(iterations, |communicator, iterations| {
                let started = Instant::now();
                (0..iterations).for_each(|_| communicator.barrier().expect("healthy"));
                started.elapsed()
            })
        });
    });
    for mebibytes in [1, 8, 64] {
        let len = mebibytes << 18;
        group.throughput(Throughput::Bytes(4 * len as u64));
        group.bench_function(format!("reduce-scatter {mebibytes} MiB"), |bench| {
            bench.iter_custom(|iterations| {
                slowest(iterations, |communicator, iterations| {
                    let mut reduce = Reduce {
                        input: communicator.allocate(&Cpu, DType::F32, len).expect("memory"),
                        output: Cpu.allocate(DType::F32, len / 2).expect("memory"),
                        sideband: Cpu.allocate(DType::F64, 4).expect("memory"),
                        totals: Cpu.allocate(DType::F64, 4).expect("memory"),
                        accumulate: false,
                    };
                    let started = Instant::now();
                    for _ in 0..iterations {
                        reduce = communicator.reduce_scatter(reduce, Event::PAST).wait().expect("healthy");
                    }
                    started.elapsed()
                })
            });
        });
        group.bench_function(format!("all-gather {mebibytes} MiB"), |bench| {
            bench.iter_custom(|iterations| {
                slowest(iterations, |communicator, iterations| {
                    let mut buffers = (
                        communicator.allocate(&Cpu, DType::F32, len / 2).expect("memory"),
                        Cpu.allocate(DType::F32, len).expect("memory"),
                    );
                    let started = Instant::now();
                    for _ in 0..iterations {
                        let (shard, output) = buffers;
                        buffers = communicator.all_gather(shard, output, Event::PAST).wait().expect("healthy");
                    }
                    started.elapsed()
                })
            });
        });
    }
}

criterion_group!(benches, collectives);
criterion_main!(benches);
