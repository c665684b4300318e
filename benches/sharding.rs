//! What sharding costs on one host beyond keeping pace: steps of two ranks that share everything,
//! ZeRO-3 with windows, beside two runs of one rank each that meet at a barrier after each step,
//! and two that never meet. All take turns in one process.
//!
//!     cargo bench -p pillion-benches --bench sharding

use std::sync::Arc;
use std::time::Instant;

use pillion_collectives::{Communicator, Launch, Options};
use pillion_kernels::{AdamW, Cpu};
use pillion_llama::config::{Config, Preset};
use pillion_llama::model::{Model, Recompute};
use pillion_runtime::{Engine, Policy};

const WORLD: usize = 2;
const ROUNDS: usize = 9;
/// Steps of each contender in a round.
const STEPS: usize = 4;
const SEQ: usize = 256;
const MICRO_BATCH: usize = 4;
const NAMES: [&str; 3] = ["sharded, windows", "meet at a barrier", "never meet"];

fn engine(communicator: Arc<Communicator>, config: &Config) -> Engine {
    let layout = config.layout(communicator.world());
    let mut engine = Engine::new(communicator, Arc::new(Cpu), layout, Policy::default()).expect("memory");
    engine.initialize(|name, shape| config.initial_values(1, None, name, shape)).expect("ranks are there");
    engine
}

/// Seconds that a rank takes for a step of each contender, in each round.
fn rank(launch: &Launch, config: &Config) -> Vec<[f64; 3]> {
    let communicator = Arc::new(Communicator::connect(launch, Options::default()).expect("ranks meet"));
    let alone = || Arc::new(Communicator::connect(&Launch::single(), Options::default()).expect("a rank alone"));
    let mut sharded = engine(communicator.clone(), config);
    let mut single = engine(alone(), config);
    let policy = Policy::default();
    let mut model = Model::new(&Cpu, config, policy.weights, MICRO_BATCH, SEQ, Recompute::None).expect("memory");
    let vocab = config.vocab_size as u32;
    let tokens: Vec<u32> = (0..MICRO_BATCH * SEQ).map(|at| (at * 7 + launch.rank) as u32 % vocab).collect();
    let settings = AdamW { lr: 1e-4, beta1: 0.9, beta2: 0.95, epsilon: 1e-8, weight_decay: 0.0 };
    let mut steps = |contender: usize| {
        communicator.barrier().expect("ranks are there");
        let started = Instant::now();
        for _ in 0..STEPS {
            let engine = if contender == 0 { &mut sharded } else { &mut single };
            let mut step = engine.begin(1).expect("the last one ended well");
            model.train(&mut step, &tokens, &tokens, None).expect("ranks are there");
            step.finish(&settings, &mut []).expect("ranks are there");
            if contender == 1 {
                communicator.barrier().expect("ranks are there");
            }
        }
        started.elapsed().as_secs_f64() / STEPS as f64
    };
    for contender in 0..NAMES.len() {
        steps(contender);
    }
    let mut round = |round: usize| {
        let mut times = [0.0; 3];
        (0..3).map(|turn| (round + turn) % 3).for_each(|contender| times[contender] = steps(contender));
        times
    };
    (0..ROUNDS).map(&mut round).collect()
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn main() {
    let config = &Preset::named("peer-30m").expect("a preset").config();
    let ranks: Vec<Vec<[f64; 3]>> = std::thread::scope(|scope| {
        let run = |launch| scope.spawn(move || rank(&launch, config));
        let ranks: Vec<_> = Launch::threads(WORLD).into_iter().map(run).collect();
        ranks.into_iter().map(|rank| rank.join().expect("a rank does not panic")).collect()
    });
    println!(
        "peer-30m, {MICRO_BATCH} × {SEQ} tokens on each of {WORLD} ranks, {ROUNDS} rounds of {STEPS} steps; medians"
    );
    println!("| | ms a step | its speed over theirs, within a round |\n|---|---|---|");
    // Of the mean of both ranks: runs that never meet end at different times.
    let of =
        |round: usize, contender: usize| ranks.iter().map(|rank| rank[round][contender]).sum::<f64>() / WORLD as f64;
    for (contender, name) in NAMES.into_iter().enumerate() {
        let step = median((0..ROUNDS).map(|round| of(round, contender)).collect());
        let ratio = median((0..ROUNDS).map(|round| of(round, contender) / of(round, 0)).collect());
        println!("| {name} | {:.0} | {ratio:.3} |", 1e3 * step);
    }
}
