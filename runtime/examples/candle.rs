//! A model written with candle, trained by this runtime: candle has the operations and their gradients, and knows nothing of ranks; the runtime
//! shards, gathers, reduces and updates, and knows nothing of candle. It learns which byte of this very file comes next.
//!
//!     cargo run --release -p pillion-runtime --example candle -- --ranks 2
//!     mpirun -n 2 target/release/examples/candle
//!
//! Each unit is a function from (weights, input) to output; that of the last one is the loss. The forward pass keeps each unit's input and
//! nothing else: no graph of candle's outlives a unit. The backward pass goes through the units in reverse, computes each output once more,
//! now with a graph, and has candle differentiate Σ output · gradient of output, whose gradients are those of the loss. Computing
//! again instead of keeping is activation checkpointing; it comes for free here, since the weights are lent again anyway.

use std::error::Error;
use std::ops::Range;
use std::sync::Arc;

use candle_core::{D, Device, Storage, Tensor, Var};
use clap::Parser;
use pillion_collectives::launch::{Launch, Source};
use pillion_collectives::{Communicator, Options, launcher};
use pillion_kernels::{AdamW, Cpu, ViewMut, random};
use pillion_runtime::{Engine, Layout, Policy, Step, TensorSpec, UnitSpec, Weights};

const TEXT: &[u8] = include_bytes!("candle.rs");
/// Bytes that predict the next one, and numbers that each becomes.
const CONTEXT: usize = 8;
const WIDTH: usize = 16;
/// Numbers between the units, and inside a block.
const CHANNELS: usize = CONTEXT * WIDTH;
const HIDDEN: usize = 256;
const BLOCKS: usize = 2;
/// The last unit.
const HEAD: usize = BLOCKS + 1;
/// Samples of a micro-batch, and micro-batches of a step, which are dealt to the ranks.
const SAMPLES: usize = 32;
const BATCHES: usize = 4;
const STEPS: usize = 101;
/// What the loss must fall below, in nats a byte. Guessing costs ln 256 = 5.5; who knows how often each byte occurs in this file, but not what
/// came before it, pays 3.5.
const LEARNED: f64 = 2.5;

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

#[derive(Parser)]
struct Arguments {
    /// Ranks to start, unless mpirun, torchrun or srun has.
    #[arg(long, default_value_t = 1)]
    ranks: usize,
    /// Start them as threads of this process.
    #[arg(long)]
    threads: bool,
}

fn main() -> Result<()> {
    let Arguments { ranks, threads } = Arguments::parse();
    let launch = Launch::detect()?;
    match launch.source {
        Source::Single if threads => {
            launcher::check_ranks(ranks, false)?;
            return std::thread::scope(|scope| {
                let start = |launch| scope.spawn(move || train(&launch));
                let ranks: Vec<_> = Launch::threads(ranks).into_iter().map(start).collect();
                ranks.into_iter().try_for_each(|rank| rank.join().expect("a rank returns its errors"))
            });
        }
        Source::Single if ranks > 1 => std::process::exit(launcher::run_processes(ranks)?),
        Source::Local => launcher::bind_to_launcher()?,
        _ => {}
    }
    train(&launch)
}

/// One rank.
fn train(launch: &Launch) -> Result<()> {
    let communicator = Arc::new(Communicator::connect(launch, Options::default())?);
    let (policy, units) = (Policy::default(), units());
    let layout = Layout::new(&units, policy.mesh(launch.world)?.shard);
    let mut engine = Engine::new(communicator, Arc::new(Cpu), layout, policy)?;
    engine.initialize(initial)?;
    let rounds = BATCHES.div_ceil(launch.world);
    let (mut first, mut last) = (None, 0.0);
    for number in 0..STEPS {
        let mut step = engine.begin(rounds)?;
        for batch in (0..rounds).map(|round| round * launch.world + launch.rank) {
            match batch < BATCHES {
                true => micro_batch(&mut step, &units, number * BATCHES + batch)?,
                false => step.idle_round()?,
            }
        }
        let settings = AdamW { lr: 0.003, beta1: 0.9, beta2: 0.99, epsilon: 1e-8, weight_decay: 0.1 };
        let report = step.finish(&settings, &mut [])?;
        last = report.loss_sum / report.tokens;
        first.get_or_insert(last);
        if launch.rank == 0 && number.is_multiple_of(10) {
            println!("step {number:3}  loss {last:.6}  gradient {:.4}", report.gradient_norm);
        }
    }
    let summary = format!("the loss went from {} to {last}", first.unwrap_or(last));
    if launch.rank == 0 {
        println!("{summary}");
    }
    if last < LEARNED { Ok(()) } else { Err(format!("{summary}, not below {LEARNED}").into()) }
}

/// One micro-batch: forward through the units, and backward. Gradients are sums over its samples.
fn micro_batch(step: &mut Step<'_>, units: &[UnitSpec], number: usize) -> Result<()> {
    let (context, next) = samples(number)?;
    step.round(SAMPLES);
    // inputs[unit]; behind the last unit's, the loss.
    let mut inputs = vec![context];
    for (index, unit) in units.iter().enumerate() {
        let pass = step.forward(index)?;
        let weights = tensors(&pass.weights, unit, |values, shape| Tensor::from_slice(values, shape, &Device::Cpu))?;
        inputs.push(forward(index, &weights, &inputs[index], &next)?);
    }
    let loss = inputs.pop().expect("each unit has an output");
    let mut gradient = loss.ones_like()?;
    for (index, unit) in units.iter().enumerate().rev() {
        let mut pass = step.backward(index)?;
        let variable = |values: &_, shape: &_| Ok(Var::from_slice(values, shape, &Device::Cpu)?.into_inner());
        let weights = tensors(&pass.weights, unit, variable)?;
        // The first input is bytes, which have no gradient.
        let input = if index > 0 { Var::from_tensor(&inputs[index])?.into_inner() } else { inputs[0].clone() };
        let output = forward(index, &weights, &input, &next)?;
        let gradients = (output * gradient)?.sum_all()?.backward()?;
        let of = |leaf: &Tensor| gradients.get(leaf).cloned().ok_or("an output that does not depend on its input");
        for (tensor, weights) in weights.iter().enumerate() {
            add(pass.gradients.tensor(tensor), &of(weights)?)?;
        }
        if index == HEAD {
            pass.loss.into_slice::<f64>().expect(HOST)[0] += f64::from(loss.to_scalar::<f32>()?);
        }
        if index == 0 {
            break;
        }
        gradient = of(&input)?;
    }
    Ok(())
}

const HOST: &str = "Cpu lends its memory to the processor";

/// A unit's weights as candle's tensors, which `make` copies from the gathered memory: a tensor of
/// candle owns what it holds. The copies live as long as the unit computes.
fn tensors(
    weights: &Weights<'_>,
    unit: &UnitSpec,
    make: impl Fn(&[f32], &[usize]) -> candle_core::Result<Tensor>,
) -> Result<Vec<Tensor>> {
    let tensor = |(index, spec): (usize, &TensorSpec)| {
        Ok(make(weights.tensor(index).as_slice().expect(HOST), spec.shape.as_slice())?)
    };
    unit.tensors.iter().enumerate().map(tensor).collect()
}

/// Adds a gradient of candle's to the runtime's, without a copy.
fn add(to: ViewMut<'_>, gradient: &Tensor) -> Result<()> {
    let gradient = gradient.contiguous()?;
    let (storage, layout) = gradient.storage_and_layout();
    let Storage::Cpu(storage) = &*storage else { return Err("a gradient that is not in memory of the host".into()) };
    let values = &storage.as_slice::<f32>()?[layout.start_offset()..][..gradient.elem_count()];
    assert_eq!(to.len(), values.len(), "a gradient has the shape of its weights");
    to.into_slice::<f32>().expect(HOST).iter_mut().zip(values).for_each(|(sum, value)| *sum += value);
    Ok(())
}

/// An embedding of each byte, residual SwiGLU blocks on the context as a whole, and a head.
fn units() -> Vec<UnitSpec> {
    let unit = |name: String, tensors: &[(&str, &[usize])]| {
        let tensor = |&(tensor, shape): &(&str, &[usize])| TensorSpec {
            name: format!("{name}.{tensor}"),
            shape: shape.to_vec(),
            decay: shape.len() > 1,
            frozen: false,
        };
        UnitSpec { tensors: tensors.iter().map(tensor).collect(), name }
    };
    let (wide, deep) = ([HIDDEN, CHANNELS], [CHANNELS, HIDDEN]);
    let block = [("norm", &[CHANNELS][..]), ("gate", &wide[..]), ("up", &wide[..]), ("down", &deep[..])];
    let mut units = vec![unit("embedding".to_owned(), &[("table", &[256, WIDTH])])];
    units.extend((0..BLOCKS).map(|index| unit(format!("block {index}"), &block)));
    units.push(unit("head".to_owned(), &[("norm", &[CHANNELS]), ("projection", &[256, CHANNELS])]));
    units
}

/// The first value of an element, which depends on nothing else, so every number of ranks begins with the same model.
fn initial(name: &str, shape: &[usize]) -> impl Fn(usize) -> f32 + use<> {
    let stream = name.bytes().fold(0u64, |hash, byte| hash.wrapping_mul(257) + u64::from(byte));
    let inputs = if let [_, inputs] = shape { Some(*inputs as f64) } else { None };
    move |index| inputs.map_or(1.0, |inputs| (random::normal(1, stream, index as u64) / inputs.sqrt()) as f32)
}

/// The model, unit by unit. `input` is `[SAMPLES, CONTEXT]` bytes for the embedding and `[SAMPLES, CHANNELS]` for the others; the head's output
/// is the sum of the samples' losses.
fn forward(unit: usize, weights: &[Tensor], input: &Tensor, next: &Tensor) -> Result<Tensor> {
    Ok(match (unit, weights) {
        (0, [table]) => table.index_select(&input.flatten_all()?, 0)?.reshape((SAMPLES, CHANNELS))?,
        (HEAD, [norm, projection]) => {
            let logits = rms_norm(input, norm)?.matmul(&projection.t()?)?;
            // -log softmax, with the largest logit taken out, so that no exponential overflows.
            let shifted = logits.broadcast_sub(&logits.max_keepdim(D::Minus1)?.detach())?;
            let log_sums = shifted.exp()?.sum(D::Minus1)?.log()?;
            (log_sums - shifted.gather(next, 1)?.squeeze(1)?)?.sum_all()?
        }
        (_, [norm, gate, up, down]) => {
            let x = rms_norm(input, norm)?;
            let hidden = (x.matmul(&gate.t()?)?.silu()? * x.matmul(&up.t()?)?)?;
            (input + hidden.matmul(&down.t()?)?)?
        }
        _ => unreachable!("a unit has the tensors that `units` gives it"),
    })
}

fn rms_norm(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let rms = (x.sqr()?.mean_keepdim(D::Minus1)? + 1e-5)?.sqrt()?;
    Ok(x.broadcast_div(&rms)?.broadcast_mul(weight)?)
}

/// The samples of a micro-batch: `[SAMPLES, CONTEXT]` bytes from anywhere in the text, and `[SAMPLES, 1]` that follow them.
fn samples(number: usize) -> Result<(Tensor, Tensor)> {
    let places = (TEXT.len() - CONTEXT) as u64;
    let place = |sample: usize| (random::bits(2, 0, (number * SAMPLES + sample) as u64) % places) as usize;
    let bytes = |range: Range<usize>| {
        let bytes = (0..SAMPLES).flat_map(|sample| &TEXT[place(sample)..][range.clone()]);
        let shape = (SAMPLES, range.len());
        Tensor::from_vec(bytes.map(|&byte| u32::from(byte)).collect(), shape, &Device::Cpu)
    };
    Ok((bytes(0..CONTEXT)?, bytes(CONTEXT..CONTEXT + 1)?))
}
