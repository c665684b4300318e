//! A trainer in one page: a little network learns to tell two spirals apart, its parameters sharded over ranks.
//!
//!     cargo run --release -p pillion-runtime --example mlp -- --ranks 2
//!     mpirun -n 2 target/release/examples/mlp

use std::error::Error;
use std::sync::Arc;

use clap::Parser;
use pillion_collectives::launch::{Launch, Source};
use pillion_collectives::{Communicator, Options, launcher};
use pillion_kernels::{AdamW, Buffer, Cpu, DType, Device, Kernels, Stream, random};
use pillion_runtime::{Engine, Layout, Policy, Step, TensorSpec, UnitSpec};

/// Points of a micro-batch, and micro-batches of a step, which are dealt to the ranks.
const POINTS: usize = 64;
const BATCHES: usize = 4;
const STEPS: usize = 300;
/// Inputs and outputs of each layer: the gate and the value of a SwiGLU, and after two of these a linear one.
const SHAPES: [(usize, usize); 3] = [(3, 32), (32, 32), (32, 2)];

#[derive(Parser)]
struct Arguments {
    /// Ranks to start, unless mpirun, torchrun or srun has.
    #[arg(long, default_value_t = 1)]
    ranks: usize,
}

fn main() -> Result<(), Box<dyn Error>> {
    let Arguments { ranks } = Arguments::parse();
    let launch = Launch::detect()?;
    match launch.source {
        Source::Single if ranks > 1 => std::process::exit(launcher::run_processes(ranks)?),
        Source::Local => launcher::bind_to_launcher()?,
        _ => {}
    }
    let communicator = Arc::new(Communicator::connect(&launch, Options::default())?);
    let (policy, device) = (Policy::default(), Arc::new(Cpu));
    let layout = Layout::new(&units(), policy.mesh(communicator.world())?.shard);
    let mut engine = Engine::new(communicator, device.clone(), layout, policy)?;
    // A value depends on the tensor and the index, so every number of ranks begins with the same network.
    engine.initialize(|name, shape| {
        let (stream, inputs) = (name.len() as u64 + u64::from(name.as_bytes()[0]), shape[1] as f64);
        move |index: usize| (random::normal(1, stream, index as u64) / inputs.sqrt()) as f32
    })?;
    let mut network = Network::new(&*device)?;
    let (mut first, mut last) = (None, 0.0);
    for number in 0..STEPS {
        let (rank, world) = (engine.communicator().rank(), engine.communicator().world());
        let rounds = BATCHES.div_ceil(world);
        let mut step = engine.begin(rounds)?;
        for batch in (0..rounds).map(|round| round * world + rank) {
            match batch < BATCHES {
                true => network.train(&mut step, number * BATCHES + batch)?,
                false => step.idle_round()?,
            }
        }
        let settings = AdamW { lr: 0.01, beta1: 0.9, beta2: 0.99, epsilon: 1e-8, weight_decay: 0.0 };
        let report = step.finish(&settings, &mut [])?;
        last = report.loss_sum / report.tokens;
        first.get_or_insert(last);
        if rank == 0 && (number % 50 == 0 || number + 1 == STEPS) {
            println!("step {number:3}  loss {last:.6}  gradient {:.4}", report.gradient_norm);
        }
    }
    // Guessing costs ln 2 = 0.69 a point.
    if last < 0.1 { Ok(()) } else { Err(format!("the loss fell from {first:?} to {last} only").into()) }
}

fn units() -> Vec<UnitSpec> {
    let layer = |(index, &(inputs, outputs)): (usize, &(usize, usize))| UnitSpec {
        name: format!("layer {index}"),
        tensors: ["gate", "up"][..if index == 2 { 1 } else { 2 }]
            .iter()
            .map(|name| TensorSpec {
                name: format!("{index}.{name}"),
                shape: vec![outputs, inputs],
                decay: true,
                frozen: false,
            })
            .collect(),
    };
    SHAPES.iter().enumerate().map(layer).collect()
}

/// Activations `[POINTS, ·]`; `x[0]` are the points, `x[3]` the logits. A gradient has the name of what it is of, after `d`.
struct Network {
    labels: Buffer,
    x: Vec<Buffer>,
    gate: Vec<Buffer>,
    up: Vec<Buffer>,
    dx: Vec<Buffer>,
    dgate: Buffer,
    dup: Buffer,
    out: Buffer,
}

impl Network {
    fn new(device: &dyn Device) -> Result<Network, Box<dyn Error>> {
        let f32 = |width: usize| device.allocate(DType::F32, POINTS * width);
        let widths = [SHAPES[0].0, SHAPES[0].1, SHAPES[1].1, SHAPES[2].1];
        let of_widths = || widths.into_iter().map(f32).collect::<Result<Vec<Buffer>, _>>();
        let hidden = || (0..2).map(|layer| f32(SHAPES[layer].1)).collect::<Result<Vec<Buffer>, _>>();
        let [dgate, dup, out] = [f32(SHAPES[0].1)?, f32(SHAPES[0].1)?, f32(SHAPES[0].1)?];
        let labels = device.allocate(DType::U32, POINTS)?;
        Ok(Network { labels, x: of_widths()?, gate: hidden()?, up: hidden()?, dx: of_widths()?, dgate, dup, out })
    }

    /// One micro-batch: forward through the units, and backward. Gradients are sums over its points.
    fn train(&mut self, step: &mut Step<'_>, batch: usize) -> Result<(), Box<dyn Error>> {
        let (points, labels): (Vec<[f32; 3]>, Vec<u32>) = (0..POINTS).map(|index| point(batch, index)).unzip();
        step.round(POINTS);
        step.stream().upload(self.x[0].view_mut(), points.as_flattened());
        step.stream().upload(self.labels.view_mut(), &labels);
        for layer in 0..3 {
            let unit = step.forward(layer)?;
            let (before, after) = self.x.split_at_mut(layer + 1);
            let (x, y) = (&before[layer], &mut after[0]);
            if layer == 2 {
                kernels(unit.stream).linear(y.view_mut(), x.view(), unit.weights.tensor(0), None, POINTS);
                continue;
            }
            kernels(unit.stream).linear(self.gate[layer].view_mut(), x.view(), unit.weights.tensor(0), None, POINTS);
            kernels(unit.stream).linear(self.up[layer].view_mut(), x.view(), unit.weights.tensor(1), None, POINTS);
            kernels(unit.stream).swiglu(y.view_mut(), self.gate[layer].view(), self.up[layer].view());
        }
        for layer in (0..3).rev() {
            let mut unit = step.backward(layer)?;
            let (before, after) = self.dx.split_at_mut(layer + 1);
            let dx = &mut before[layer];
            if layer == 2 {
                // The logits become the gradient of the loss.
                kernels(unit.stream).cross_entropy(self.x[3].view_mut(), None, self.labels.view(), unit.loss, 0.0);
                let dy = &self.x[3];
                kernels(unit.stream).linear_backward_weight(
                    unit.gradients.tensor(0),
                    dy.view(),
                    self.x[2].view(),
                    POINTS,
                );
                kernels(unit.stream).linear_backward_input(
                    dx.view_mut(),
                    dy.view(),
                    unit.weights.tensor(0),
                    POINTS,
                    false,
                );
                continue;
            }
            let (gate, up) = (self.gate[layer].view(), self.up[layer].view());
            // It also makes the layer's output again, which is not needed here.
            let [out, dgate, dup] = [&mut self.out, &mut self.dgate, &mut self.dup].map(Buffer::view_mut);
            kernels(unit.stream).swiglu_backward(out, dgate, dup, after[0].view(), gate, up);
            for (tensor, dy) in [&self.dgate, &self.dup].into_iter().enumerate() {
                kernels(unit.stream).linear_backward_weight(
                    unit.gradients.tensor(tensor),
                    dy.view(),
                    self.x[layer].view(),
                    POINTS,
                );
                kernels(unit.stream).linear_backward_input(
                    dx.view_mut(),
                    dy.view(),
                    unit.weights.tensor(tensor),
                    POINTS,
                    tensor > 0,
                );
            }
        }
        Ok(())
    }
}

/// A point of one of two spirals, with a constant feature, and which one.
fn point(batch: usize, index: usize) -> ([f32; 3], u32) {
    let number = (batch * POINTS + index) as u64;
    let label = number % 2;
    let along = random::bits(2, 0, number) as f64 / u64::MAX as f64;
    let angle = 4.0 * along + std::f64::consts::PI * label as f64;
    ([(2.0 * along * angle.cos()) as f32, (2.0 * along * angle.sin()) as f32, 1.0], label as u32)
}

/// What multiplies.
fn kernels(stream: &dyn Stream) -> &dyn Kernels {
    stream.kernels().expect("Cpu has kernels")
}
