//! What a checkpoint must survive, with ranks as threads of this process: helpers here, tests by subject.

mod background;
mod faults;
mod optimizer;
mod restore;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use pillion_collectives::{Communicator, Launch, Options};
use pillion_kernels::{AdamW, Cpu, Device, random};
use pillion_runtime::checkpoint::{self, Checkpoint, Staging};
use pillion_runtime::{Engine, Error, Layout, Policy, State, TensorSpec, UnitSpec};
use serde_json::json;

/// Copies, and a ring so small that the smallest state of [`uneven`] passes through it in many
/// pieces.
const STAGINGS: [Staging; 2] = [Staging::Copies, Staging::Ring { bytes: 100 }];

/// Units of these shapes; tensor 1 of unit 0 is called `0.1`.
fn model(shapes: &[Vec<Vec<usize>>]) -> Vec<UnitSpec> {
    let unit = |(index, shapes): (usize, &Vec<Vec<usize>>)| {
        let tensor = |(at, shape): (usize, &Vec<usize>)| TensorSpec {
            name: format!("{index}.{at}"),
            shape: shape.clone(),
            decay: shape.len() > 1,
            frozen: false,
        };
        UnitSpec { name: format!("unit {index}"), tensors: shapes.iter().enumerate().map(tensor).collect() }
    };
    shapes.iter().enumerate().map(unit).collect()
}

/// Three units of 323, 5 and 97 elements, whose tensors straddle ranks: at world 4 shards have 96, 32 and 32.
fn uneven() -> Vec<UnitSpec> {
    model(&[vec![vec![7, 31], vec![106]], vec![vec![5]], vec![vec![3, 11], vec![1], vec![7, 9]]])
}

/// Runs `program` on the engines of `world` ranks and returns what each returned.
fn engines<R: Send>(
    world: usize,
    units: &[UnitSpec],
    policy: Policy,
    device: Arc<dyn Device>,
    program: impl Fn(Engine) -> R + Sync,
) -> Vec<R> {
    std::thread::scope(|scope| {
        let start = |launch: Launch| {
            let (program, device) = (&program, device.clone());
            scope.spawn(move || {
                let communicator = Arc::new(Communicator::connect(&launch, Options::default()).unwrap());
                let layout = Layout::new(units, policy.mesh(world).unwrap().shard);
                program(Engine::new(communicator, device, layout, policy).unwrap())
            })
        };
        let handles: Vec<_> = Launch::threads(world).into_iter().map(start).collect();
        handles.into_iter().map(|handle| handle.join().expect("a rank does not panic")).collect()
    })
}

fn on_cpu<R: Send>(world: usize, units: &[UnitSpec], program: impl Fn(Engine) -> R + Sync) -> Vec<R> {
    engines(world, units, Policy::default(), Arc::new(Cpu), program)
}

/// Element `index` of part 0 (master), 1 (m) or 2 (v) of a tensor; a few are values that arithmetic or text would
/// change.
fn value(seed: u64, part: u64, tensor: &str, index: usize) -> f32 {
    let stream = part << 32 | tensor.bytes().fold(0, |hash, byte| hash * 31 + u64::from(byte));
    match index % 17 {
        3 => -0.0,
        5 => f32::from_bits(1 + index as u32),
        7 => f32::from_bits(0x7fc0_1234 + index as u32),
        11 => f32::NEG_INFINITY,
        _ => random::normal(seed, stream, index as u64) as f32,
    }
}

/// A state in which every element of every part differs, and padding is zero.
fn expected(layout: &Layout, unit: usize, rank: usize, seed: u64) -> State {
    let part = |part| {
        let mut values = vec![0.0; layout.units[unit].shard];
        for piece in layout.pieces(unit, rank) {
            let name = &layout.units[unit].tensors[piece.tensor].name;
            for (out, index) in values[piece.in_shard].iter_mut().zip(piece.in_tensor) {
                *out = value(seed, part, name, index);
            }
        }
        values
    };
    State { master: part(0), states: vec![part(1), part(2)] }
}

fn fill(engine: &mut Engine, seed: u64) {
    let layout = engine.layout().clone();
    for unit in 0..layout.units.len() {
        let state = expected(&layout, unit, engine.shard_number(), seed);
        engine.set_state(unit, &state).unwrap();
    }
    engine.set_updates(seed);
}

fn bits(state: &State) -> Vec<u32> {
    [&state.master].into_iter().chain(&state.states).flatten().map(|value| value.to_bits()).collect()
}

/// Fails unless the engine holds what [`fill`] has put there.
fn assert_holds(engine: &Engine, seed: u64) {
    let (layout, shard) = (engine.layout(), engine.shard_number());
    for unit in 0..layout.units.len() {
        let (found, expected) = (engine.state(unit).unwrap(), expected(layout, unit, shard, seed));
        assert!(bits(&found) == bits(&expected), "shard {shard} of {} of unit {unit}", layout.shards);
    }
    assert_eq!(engine.updates(), seed);
}

/// Saves a filled engine's state as each of `steps`, with the step as seed.
fn save_steps(dir: &Path, world: usize, steps: &[u64]) -> Vec<PathBuf> {
    let save = |mut engine: Engine| {
        let save = |&step: &u64| {
            fill(&mut engine, step);
            checkpoint::save(&engine, dir, step, &json!({ "samples": step })).unwrap()
        };
        steps.iter().map(save).collect()
    };
    on_cpu(world, &uneven(), save).swap_remove(0)
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn copy_folder(from: &Path, to: &Path) {
    fs::create_dir(to).unwrap();
    for name in names(from) {
        fs::copy(from.join(&name), to.join(&name)).unwrap();
    }
}

fn newest(dir: &Path) -> Checkpoint {
    checkpoint::newest(dir).unwrap().checkpoint.expect("a complete checkpoint")
}

/// The file that an error names.
fn named(error: &Error) -> &Path {
    match error {
        Error::File { path, .. } => path,
        other => panic!("{other}"),
    }
}

/// One update with gradients that depend on the update's number alone.
fn train(engine: &mut Engine) {
    train_asking(engine, &mut []);
}

/// The same, with requests.
fn train_asking(engine: &mut Engine, requests: &mut [f64]) {
    let number = engine.updates();
    let lens: Vec<Vec<usize>> = engine
        .layout()
        .units
        .iter()
        .map(|unit| unit.tensors.iter().map(|tensor| tensor.range.len()).collect())
        .collect();
    let mut step = engine.begin(1).unwrap();
    step.round(1);
    for unit in 0..lens.len() {
        step.forward(unit).unwrap();
    }
    for unit in (0..lens.len()).rev() {
        let mut backward = step.backward(unit).unwrap();
        for (index, &len) in lens[unit].iter().enumerate() {
            let gradient = |at| random::normal(number, (unit * 8 + index) as u64, at as u64) as f32;
            backward.stream.upload(backward.gradients.tensor(index), &(0..len).map(gradient).collect::<Vec<f32>>());
        }
        if unit == 0 {
            backward.stream.upload(backward.loss, &[1.0]);
        }
    }
    let (lr, beta1, beta2, epsilon, weight_decay) = (0.01, 0.9, 0.95, 1e-8, 0.1);
    step.finish(&AdamW { lr, beta1, beta2, epsilon, weight_decay }, requests).unwrap();
}
