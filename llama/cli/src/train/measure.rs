//! Measures the processor and the links before a run, for the simulations of `--auto`.

use std::time::{Duration, Instant};

use pillion_collectives::{Communicator, Reduction};
use pillion_kernels::{Buffer, DType, Device, Event, Stream};
use pillion_runtime::simulate::{Link, Machine};

use crate::Error;
use crate::plan::Setup;

/// Tokens of the product that is timed.
const ROWS: usize = 128;
/// Elements of a rank's shard of the gather that is timed, and of all shards, at most.
const SHARD: usize = 512 << 10;
const GATHERED: usize = 16 << 20;
/// Time for which products are timed while data moves.
const BESIDE: Duration = Duration::from_millis(150);
/// Time for which a product is timed alone.
const PRODUCTS_TIME: Duration = Duration::from_millis(200);
/// Gathers that are timed, at most.
const GATHERS: f64 = 100.0;
/// Products that a gather must last for, so that those which run beside it can be counted.
const PRODUCTS: f64 = 8.0;
/// A rank that loses more of its processor to moving data would hardly compute.
const MOST_CONTENTION: f64 = 0.9;

/// A product of the model's feed-forward layer.
struct Product {
    x: Buffer,
    weight: Buffer,
    y: Buffer,
    width: usize,
    ffn: usize,
}

impl Product {
    fn new(device: &dyn Device, setup: &Setup<'_>) -> Result<Product, pillion_runtime::Error> {
        let (width, ffn) = (setup.model.hidden_size, setup.model.intermediate_size);
        let allocate = |len| device.allocate(setup.policy.weights, len);
        let [x, weight, y] = [allocate(ROWS * width)?, allocate(ffn * width)?, allocate(ROWS * ffn)?];
        Ok(Product { x, weight, y, width, ffn })
    }

    /// Floating-point operations for so many tokens.
    fn flops(&self, rows: usize) -> f64 {
        2.0 * (rows * self.width * self.ffn) as f64
    }

    fn run(&mut self, rows: usize, stream: &dyn Stream) -> Result<(), pillion_runtime::Error> {
        let kernels = stream.kernels().ok_or(pillion_kernels::Error::NoKernels)?;
        let (y, x) = (self.y.slice_mut(0..rows * self.ffn), self.x.slice(0..rows * self.width));
        kernels.linear(y, x, self.weight.view(), None, rows);
        Ok(stream.synchronize()?)
    }

    /// The fastest of several runs, in seconds. A large product runs less often.
    fn time(&mut self, rows: usize, stream: &dyn Stream) -> Result<f64, Error> {
        let first = fastest(2, || Ok(self.run(rows, stream)?))?;
        let times = (PRODUCTS_TIME.as_secs_f64() / first).clamp(1.0, 20.0) as usize;
        Ok(first.min(fastest(times, || Ok(self.run(rows, stream)?))?))
    }
}

/// A gather over all ranks. Its buffers go out and come back.
struct Gathering<'c> {
    communicator: &'c Communicator,
    shard: Option<Buffer>,
    output: Option<Buffer>,
}

impl Gathering<'_> {
    /// Gathers once, and calls `meanwhile` until the gather has ended. Returns the seconds that the
    /// loop took, or, without a call, the gather.
    fn run(&mut self, mut meanwhile: Option<&mut dyn FnMut() -> Result<(), Error>>) -> Result<f64, Error> {
        let (shard, output) = (self.shard.take().expect(BACK), self.output.take().expect(BACK));
        let started = Instant::now();
        let pending = self.communicator.all_gather(shard, output, Event::PAST);
        if let Some(meanwhile) = &mut meanwhile {
            while pending.event().status().is_pending() {
                meanwhile()?;
            }
        }
        let (shard, output) = pending.wait()?;
        (self.shard, self.output) = (Some(shard), Some(output));
        Ok(started.elapsed().as_secs_f64())
    }
}

const BACK: &str = "a gather gives its buffers back";

/// The least of several times, in seconds.
fn fastest(times: usize, mut run: impl FnMut() -> Result<(), Error>) -> Result<f64, Error> {
    let mut least = f64::INFINITY;
    for _ in 0..times {
        let started = Instant::now();
        run()?;
        least = least.min(started.elapsed().as_secs_f64());
    }
    Ok(least)
}

/// The machine of the slowest rank. All ranks measure at once, because they compute at once.
/// Collective; the same on every rank.
///
/// # Errors
/// When there is no memory, or another rank fails.
pub(super) fn machine(communicator: &Communicator, device: &dyn Device, setup: &Setup<'_>) -> Result<Machine, Error> {
    let stream = &*device.stream();
    let mut product = Product::new(device, setup)?;
    communicator.barrier()?;
    let computing = product.time(ROWS, stream)?;

    let allocate = |len| device.allocate(DType::F32, len).map_err(pillion_runtime::Error::from);
    let (mut to, from) = (allocate(4 * SHARD)?, allocate(4 * SHARD)?);
    let copying = fastest(5, || {
        stream.copy(to.view_mut(), from.view());
        Ok(stream.synchronize().map_err(pillion_runtime::Error::from)?)
    })?;
    let seconds_a_byte = copying / (2 * from.bytes()) as f64;
    drop((to, from));

    let world = communicator.world();
    let len = SHARD.min(GATHERED / world);
    let (shard, output) = (communicator.allocate(device, DType::F32, len)?, allocate(world * len)?);
    let mut gathering = Gathering { communicator, shard: Some(shard), output: Some(output) };
    let latency = fastest(10, || Ok(communicator.barrier()?))?;
    // The first makes the memory.
    gathering.run(None)?;
    let mut first = [gathering.run(None)?];
    communicator.all_reduce_scalars(&mut first, Reduction::Max)?;
    let times = (BESIDE.as_secs_f64() / first[0]).ceil().clamp(3.0, GATHERS) as usize;
    let mut alone = f64::INFINITY;
    for _ in 0..times {
        alone = alone.min(gathering.run(None)?);
    }
    // Products so short that several end while a gather goes on.
    let rows = (1..=ROWS).rev().step_by(8).find(|&rows| computing * rows as f64 / ROWS as f64 * PRODUCTS < alone);
    let mut slowed = 0.0;
    if let Some(rows) = rows {
        let undisturbed = product.time(rows, stream)?;
        let (mut took, mut products) = (0.0, 0.0);
        for _ in 0..times {
            let mut run = || {
                products += 1.0;
                Ok(product.run(rows, stream)?)
            };
            took += gathering.run(Some(&mut run))?;
        }
        slowed = 1.0 - products * undisturbed / took;
    } else {
        for _ in 0..times {
            gathering.run(None)?;
        }
    }

    let hosts = communicator.hosts();
    // Each rank of a host brings its share of what the host receives from others.
    let local = world.div_ceil(hosts);
    let received = if hosts > 1 { (world - local) as f64 / local as f64 } else { world as f64 - 1.0 };
    let bytes = received * (len * DType::F32.bytes()) as f64;
    let seconds_moving = (alone - latency).max(1e-9) / bytes.max(1.0);
    let mut slowest = [computing / product.flops(ROWS), seconds_a_byte, latency, seconds_moving, slowed];
    communicator.all_reduce_scalars(&mut slowest, Reduction::Max)?;
    let [seconds_a_flop, seconds_a_byte, latency, seconds_moving, slowed] = slowest;
    let link = Link { bandwidth: 1.0 / seconds_moving, latency };
    let (link, host_link) = match (hosts, world) {
        (_, 1) => (Link::INSTANT, Link::INSTANT),
        (1, _) => (Link::INSTANT, link),
        // The time of a gather includes what ranks of a host pass on to each other.
        _ => (link, Link::INSTANT),
    };
    Ok(Machine {
        flops: 1.0 / seconds_a_flop,
        memory: Some(1.0 / seconds_a_byte),
        ranks_per_host: local,
        link,
        host_link,
        contention: if world > 1 { slowed.clamp(0.0, MOST_CONTENTION) } else { 0.0 },
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use pillion_collectives::{Launch, Options};
    use pillion_kernels::Cpu;
    use pillion_runtime::checkpoint::Staging;
    use pillion_runtime::{Mesh, Policy};

    use super::*;
    use pillion_llama::config::Preset;
    use pillion_llama::model::Recompute;

    /// Gathers that start late take at least that long, however fast the memory is.
    #[test]
    fn a_slow_link_is_found_and_all_ranks_find_the_same_machine() {
        const DELAY: Duration = Duration::from_millis(20);
        let model = Arc::new(Preset::named("tiny").unwrap().config());
        let rank = |launch: Launch| {
            let model = model.clone();
            std::thread::spawn(move || {
                let options = Options { gather_delay: DELAY, ..Options::default() };
                let communicator = Communicator::connect(&launch, options).unwrap();
                let (policy, staging, mesh) = (Policy::default(), Staging::SMALL_RING, Mesh { replicate: 1, shard: 2 });
                let recompute = Recompute::None;
                let setup = Setup {
                    model: &model,
                    policy,
                    recompute,
                    staging,
                    mesh,
                    local: 2,
                    seq: 32,
                    micro_batch: 2,
                    rounds: 1,
                };
                machine(&communicator, &Cpu, &setup).unwrap()
            })
        };
        let ranks: Vec<_> = Launch::threads(2).into_iter().map(rank).collect();
        let machines: Vec<Machine> = ranks.into_iter().map(|rank| rank.join().unwrap()).collect();
        assert_eq!(machines[0], machines[1]);
        let Machine { host_link, ranks_per_host, flops, memory, contention, .. } = machines[0];
        let most = (SHARD * DType::F32.bytes()) as f64 / (DELAY.as_secs_f64() - host_link.latency);
        assert!(host_link.bandwidth <= most, "{host_link:?} is faster than a gather that starts after {DELAY:?}");
        assert_eq!(ranks_per_host, 2);
        assert!(flops > 0.0 && memory.unwrap() > 0.0 && (0.0..=MOST_CONTENTION).contains(&contention));
    }
}
