//! How long a chain of two operations takes on a 2×2 mesh: a reduce-scatter in each group of two
//! ranks, and then an all-reduce of its sums over the groups. The second operation belongs to
//! another communicator, whose progress thread must learn that the first is complete.
//!
//!     cargo bench -p pillion-benches --bench chain
//!
//! Four ranks as threads. `stream` orders the second operation after a stream that waits for the
//! first, on a device that runs work at once and on one that defers it; `operation` orders the
//! second operation after the first, without a stream.

use std::time::{Duration, Instant};

use pillion_collectives::{Communicator, Launch, Options, Reduce, Reduction};
use pillion_kernels::{Cpu, DType, Device, LazyCpu};

const ROUNDS: usize = 200;
const LENGTHS: [usize; 3] = [64, 16 << 10, 1 << 20];

#[derive(Clone, Copy, PartialEq)]
enum Way {
    Stream,
    Operation,
}

/// The times of this rank's chains, in order.
fn chains(world: &Communicator, device: &dyn Device, way: Way, len: usize) -> Vec<Duration> {
    let rank = world.rank() as u64;
    let group = |color: u64| world.split(Some(color), rank).expect("the ranks split").expect("each has a color");
    let (shard, replicate) = (group(rank / 2), group(2 + rank % 2));
    let stream = device.stream();
    let mut buffers = Some((
        shard.allocate(device, DType::F32, 2 * len).expect("there is memory"),
        replicate.allocate(device, DType::F32, len).expect("there is memory"),
    ));
    let mut times = Vec::new();
    for _ in 0..ROUNDS {
        let (input, output) = buffers.take().expect("each round gives them back");
        world.barrier().expect("the others come");
        let started = Instant::now();
        let reduce =
            Reduce { input, sections: None, output, reduction: Reduction::Sum, accumulate: false, sideband: None };
        let reduce = shard.reduce_scatter(reduce, stream.record());
        let (input, output) = match way {
            Way::Stream => {
                let Reduce { input, output, .. } = reduce.then(&*stream).expect("it is reduced");
                let output = replicate.all_reduce(output, Reduction::Sum, stream.record()).wait();
                (input, output.expect("it is summed"))
            }
            Way::Operation => {
                let (summand, sums) = reduce.split();
                let sums = replicate.all_reduce_sums(sums, Reduction::Sum).wait().expect("it is summed");
                (summand.wait().expect("it is reduced").input, sums.output)
            }
        };
        times.push(started.elapsed());
        buffers = Some((input, output));
    }
    times.sort();
    times
}

fn main() {
    println!("{:>10} {:>10} {:>12} {:>12} {:>12}", "elements", "by", "device", "median us", "p95 us");
    for (way, deferred) in [(Way::Stream, false), (Way::Stream, true), (Way::Operation, false)] {
        let device = || -> Box<dyn Device> { if deferred { Box::new(LazyCpu::new(1)) } else { Box::new(Cpu) } };
        for len in LENGTHS {
            let times = std::thread::scope(|scope| {
                let run = |launch: Launch| {
                    scope.spawn(move || {
                        let world = Communicator::connect(&launch, Options::default()).expect("threads meet");
                        chains(&world, &*device(), way, len)
                    })
                };
                let ranks: Vec<_> = Launch::threads(4).into_iter().map(run).collect();
                let mut times: Vec<Duration> =
                    ranks.into_iter().flat_map(|rank| rank.join().expect("no rank panics")).collect();
                times.sort();
                times
            });
            let at = |share: usize| times[times.len() * share / 100].as_secs_f64() * 1e6;
            let by = if way == Way::Stream { "stream" } else { "operation" };
            println!("{len:>10} {by:>10} {:>12} {:>12.1} {:>12.1}", device().name(), at(50), at(95));
        }
    }
}
