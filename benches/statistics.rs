//! What the gradients' statistics cost: training steps of a small Llama on two ranks, in turn with the square norms of the groups and without.
//!
//!     cargo bench -p pillion-benches --bench statistics
//!
//! Steps come in pairs, each in an order drawn by lot; a pair's ratio compares neighbours, and the median over pairs is what counts. With few tokens in a
//! micro-batch a step computes little for each parameter, and the statistic, which reads the gradient once, weighs most.

use std::sync::Arc;
use std::time::{Duration, Instant};

use pillion_collectives::{Communicator, Launch, Options};
use pillion_kernels::{AdamW, Cpu};
use pillion_llama::config::Preset;
use pillion_llama::model::{Model, Recompute};
use pillion_runtime::{Engine, Policy};
use rustix::time::{ClockId, clock_gettime};

const WORLD: usize = 2;
const PAIRS: usize = 100;
const SEQ: usize = 128;

/// Processor time of this thread.
fn processor_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// Seconds and processor seconds of a step, without the statistic and with it, for each pair; on rank 0.
fn pairs(micro_batch: usize) -> Vec<[(f64, f64); 2]> {
    let config = Preset::named("small").expect("a preset").config();
    let program = |launch: Launch| {
        let communicator = Arc::new(Communicator::connect(&launch, Options::default()).expect("ranks meet"));
        let policy = Policy::default();
        let layout = config.layout(WORLD);
        let mut engine = Engine::new(communicator.clone(), Arc::new(Cpu), layout, policy).expect("memory");
        engine.initialize(|name, shape| config.initial_values(1, None, name, shape)).expect("ranks are there");
        let mut model = Model::new(&Cpu, &config, policy.weights, micro_batch, SEQ, Recompute::None).expect("memory");
        let tokens: Vec<u32> = (0..micro_batch * SEQ).map(|at| (at * 7 + launch.rank) as u32 % 251).collect();
        let settings = AdamW { lr: 1e-4, beta1: 0.9, beta2: 0.95, epsilon: 1e-8, weight_decay: 0.0 };
        let mut step = |measured: bool| {
            engine.measure_groups(measured);
            communicator.barrier().expect("ranks are there");
            let started = (Instant::now(), processor_time());
            let mut step = engine.begin(1).expect("the last one ended well");
            model.train(&mut step, &tokens, &tokens, None).expect("ranks are there");
            step.finish(&settings, &mut []).expect("ranks are there");
            (started.0.elapsed().as_secs_f64(), (processor_time() - started.1).as_secs_f64())
        };
        for _ in 0..5 {
            step(false);
            step(true);
        }
        // The same on every rank.
        let mut lot = 0x9e37_79b9_7f4a_7c15u64;
        let mut pair = || {
            lot = lot.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let mut times = [(0.0, 0.0); 2];
            let first = lot >> 63 == 1;
            for measured in [first, !first] {
                times[usize::from(measured)] = step(measured);
            }
            times
        };
        (0..PAIRS).map(|_| pair()).collect::<Vec<_>>()
    };
    std::thread::scope(|scope| {
        let ranks: Vec<_> = Launch::threads(WORLD).into_iter().map(|launch| scope.spawn(|| program(launch))).collect();
        ranks.into_iter().map(|rank| rank.join().expect("a rank does not panic")).next().expect("rank 0")
    })
}

fn quartiles(mut values: Vec<f64>) -> [f64; 3] {
    values.sort_by(f64::total_cmp);
    [1, 2, 3].map(|quarter| values[values.len() * quarter / 4])
}

fn main() {
    println!("{PAIRS} pairs of steps of the preset `small`, {SEQ} tokens a sample, {WORLD} ranks; median (quartiles)");
    println!("micro-batch  step without  time with/without - 1      processor time with/without - 1");
    for micro_batch in [1, 4] {
        let pairs = pairs(micro_batch);
        let ratio = |part: fn(&(f64, f64)) -> f64| {
            let ratios = pairs.iter().map(|[without, with]| 100.0 * (part(with) / part(without) - 1.0)).collect();
            let [low, median, high] = quartiles(ratios);
            format!("{median:+.2} % ({low:+.2} … {high:+.2})")
        };
        let [_, step, _] = quartiles(pairs.iter().map(|[without, _]| without.0 * 1e3).collect());
        println!("{micro_batch:>11}  {step:>9.1} ms  {:<26} {}", ratio(|time| time.0), ratio(|time| time.1));
    }
}
