//! What a run computes and moves on, measured before it: what `--auto` simulates steps on.

use std::time::{Duration, Instant};

use pillion_collectives::{Communicator, Reduction};
use pillion_kernels::{Buffer, DType, Device, Event, Stream};
use pillion_runtime::simulate::{Link, Machine};

use crate::Error;
use crate::plan::Setup;

/// Tokens of the product that is timed.
const ROWS: usize = 128;
/// Elements of a rank's shard of the gather that is timed: 2 MiB, which the communicator keeps.
const SHARD: usize = 512 << 10;
/// Time for which a product is timed while data moves.
const BESIDE: Duration = Duration::from_millis(150);
/// More would leave nothing to compute with, and is noise.
const MOST_CONTENTION: f64 = 0.9;

/// A product of the model's feed-forward layer.
struct Product {
    x: Buffer,
    weight: Buffer,
    y: Buffer,
    flops: f64,
}

impl Product {
    fn new(device: &dyn Device, setup: &Setup<'_>) -> Result<Product, pillion_kernels::Error> {
        let (width, ffn) = (setup.model.hidden_size, setup.model.intermediate_size);
        let allocate = |len| device.allocate(setup.policy.weights, len);
        let flops = 2.0 * (ROWS * width * ffn) as f64;
        Ok(Product { x: allocate(ROWS * width)?, weight: allocate(ffn * width)?, y: allocate(ROWS * ffn)?, flops })
    }

    fn run(&mut self, stream: &dyn Stream) -> Result<(), pillion_runtime::Error> {
        let kernels = stream.kernels().ok_or(pillion_kernels::Error::NoKernels)?;
        kernels.linear(self.y.view_mut(), self.x.view(), self.weight.view(), None, ROWS);
        Ok(stream.synchronize()?)
    }
}

/// The least of several times.
fn fastest(times: usize, mut run: impl FnMut() -> Result<(), Error>) -> Result<f64, Error> {
    let mut least = f64::INFINITY;
    for _ in 0..times {
        let started = Instant::now();
        run()?;
        least = least.min(started.elapsed().as_secs_f64());
    }
    Ok(least)
}

/// The machine of the slowest rank. All ranks measure at once, as they compute at once. Collective.
///
/// # Errors
/// When there is no memory, or another rank fails.
pub(super) fn machine(communicator: &Communicator, device: &dyn Device, setup: &Setup<'_>) -> Result<Machine, Error> {
    let stream = &*device.stream();
    let mut product = Product::new(device, setup).map_err(pillion_runtime::Error::from)?;
    communicator.barrier()?;
    let computing = fastest(20, || Ok(product.run(stream)?))?;

    let allocate = |len| device.allocate(DType::F32, len).map_err(pillion_runtime::Error::from);
    let (mut to, from) = (allocate(4 * SHARD)?, allocate(4 * SHARD)?);
    let copying = fastest(5, || {
        stream.copy(to.view_mut(), from.view());
        Ok(stream.synchronize().map_err(pillion_runtime::Error::from)?)
    })?;
    let seconds_a_byte = copying / (2 * from.bytes()) as f64;

    let world = communicator.world();
    let mut shard = Some(communicator.allocate(device, DType::F32, SHARD)?);
    let mut output = Some(allocate(world * SHARD)?);
    let mut barrier = || Ok(communicator.barrier()?);
    let latency = fastest(10, &mut barrier)?;
    let mut beside = |product: &mut Product| -> Result<(f64, f64), Error> {
        let (shard_now, output_now) = (shard.take().expect(BACK), output.take().expect(BACK));
        let started = Instant::now();
        let pending = communicator.all_gather(shard_now, output_now, Event::PAST);
        let mut computed = 0.0;
        while pending.event().status().is_pending() {
            product.run(stream)?;
            computed += product.flops;
        }
        let took = started.elapsed().as_secs_f64();
        let (shard_now, output_now) = pending.wait()?;
        (shard, output) = (Some(shard_now), Some(output_now));
        Ok((took, computed))
    };
    let (first, _) = beside(&mut product)?;
    let mut times = [BESIDE.as_secs_f64() / first];
    communicator.all_reduce_scalars(&mut times, Reduction::Max)?;
    let (mut gathering, mut computed) = (0.0, 0.0);
    let times = times[0].ceil().clamp(1.0, 100.0) as usize;
    for _ in 0..times {
        let (took, flops) = beside(&mut product)?;
        (gathering, computed) = (gathering + took, computed + flops);
    }
    let slowed = 1.0 - computed / gathering / (product.flops / computing);

    let hosts = communicator.hosts();
    // Each rank of a host brings its share of what the host receives from others.
    let local = world.div_ceil(hosts);
    let received = if hosts > 1 { (world - local) as f64 / local as f64 } else { world as f64 - 1.0 };
    let bytes = received * (SHARD * DType::F32.bytes()) as f64;
    let seconds_moving = (gathering / times as f64 - latency).max(1e-9) / bytes.max(1.0);
    let mut slowest = [computing / product.flops, seconds_a_byte, latency, seconds_moving, slowed];
    communicator.all_reduce_scalars(&mut slowest, Reduction::Max)?;
    let [seconds_a_flop, seconds_a_byte, latency, seconds_moving, slowed] = slowest;
    let link = Link { bandwidth: 1.0 / seconds_moving, latency };
    let (link, host_link) = match (hosts, world) {
        (_, 1) => (Link::INSTANT, Link::INSTANT),
        (1, _) => (Link::INSTANT, link),
        // What ranks pass on to each other on a host is among what was timed.
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

const BACK: &str = "a gather gives its buffers back";
