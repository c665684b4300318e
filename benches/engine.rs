//! What the engine itself costs the thread that computes: processor time of the caller for each unit and step, forward, backward, and update, with units so
//! small that moving them takes no time. Two ranks; gathers and reductions go through the progress threads. Each pass computes for a while, or not at all:
//! then the caller has to sleep for every operation, and wake up.
//!
//!     cargo bench -p pillion-benches --bench engine
//!
//! A thread's processor time leaves out what it sleeps, and has in it all that it does to sleep and to wake others. What is computed, and the clocks around
//! it, are taken off.

use std::sync::Arc;
use std::time::Duration;

use pillion_collectives::{Communicator, Launch, Options};
use pillion_kernels::{AdamW, Cpu};
use pillion_runtime::{Engine, Gather, Layout, Policy, Sharded, TensorSpec, UnitSpec};
use rustix::time::{ClockId, clock_gettime};

const WORLD: usize = 2;
const STEPS: usize = 200;
const ROUNDS: usize = 5;
/// What a pass computes: long enough that what was started before it is over.
const BUSY: Duration = Duration::from_micros(100);

fn units(count: usize) -> Vec<UnitSpec> {
    let unit = |index: usize| UnitSpec {
        name: index.to_string(),
        tensors: vec![TensorSpec { name: format!("{index}.x"), shape: vec![64], decay: true, frozen: false }],
    };
    (0..count).map(unit).collect()
}

/// Processor time of this thread.
fn processor_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// Arithmetic for about as long as `time`; returns the processor time that it took, with that of reading the clock.
fn compute(time: Duration) -> Duration {
    if time.is_zero() {
        return time;
    }
    let started = processor_time();
    let mut x = 1.0f64;
    loop {
        for _ in 0..100 {
            x = std::hint::black_box(x * 0.999_999 + 1e-6);
        }
        let took = processor_time() - started;
        if took >= time {
            return took;
        }
    }
}

/// Processor time that it takes to read the clock, of which half lies before what it returns, and half after.
fn clock_cost() -> Duration {
    const TIMES: u32 = 10_000;
    let started = processor_time();
    for _ in 0..TIMES {
        std::hint::black_box(processor_time());
    }
    (processor_time() - started) / TIMES
}

/// Microseconds of a step of `count` units whose passes compute for `time`, on rank 0, but for that: processor time, the median over rounds.
fn step(policy: Policy, count: usize, time: Duration) -> f64 {
    let program = |launch: Launch| {
        let communicator = Arc::new(Communicator::connect(&launch, Options::default()).expect("ranks meet"));
        let layout = Layout::new(&units(count), policy.mesh(WORLD).expect("a mesh").shard);
        let mut engine = Engine::new(communicator, Arc::new(Cpu), layout, policy).expect("memory");
        engine.initialize(|_, _| |_: usize| 1.0).expect("ranks are there");
        let settings = AdamW { lr: 1e-3, beta1: 0.9, beta2: 0.95, epsilon: 1e-8, weight_decay: 0.0 };
        let clock = if time.is_zero() { Duration::ZERO } else { clock_cost() };
        let mut train = || {
            let mut computed = Duration::ZERO;
            let mut pass = || computed += compute(time) + clock;
            let mut step = engine.begin(1).expect("the last one ended well");
            step.round(1);
            for unit in 0..count {
                step.forward(unit).expect("the plan");
                pass();
            }
            for unit in (0..count).rev() {
                let backward = step.backward(unit).expect("the plan");
                if unit == 0 {
                    backward.stream.accumulate_from(backward.loss, &[1.0]).unwrap();
                }
                pass();
            }
            step.finish(&settings, &mut []).expect("ranks are there");
            computed
        };
        for _ in 0..STEPS / 10 {
            train();
        }
        let mut rounds: Vec<f64> = (0..ROUNDS)
            .map(|_| {
                let started = processor_time();
                let computed: Duration = (0..STEPS).map(|_| train()).sum();
                (processor_time() - started).saturating_sub(computed).as_secs_f64() * 1e6 / STEPS as f64
            })
            .collect();
        rounds.sort_by(f64::total_cmp);
        rounds[ROUNDS / 2]
    };
    std::thread::scope(|scope| {
        let ranks: Vec<_> = Launch::threads(WORLD).into_iter().map(|launch| scope.spawn(|| program(launch))).collect();
        ranks.into_iter().map(|rank| rank.join().expect("a rank does not panic")).next().expect("rank 0")
    })
}

fn main() {
    const FEW: usize = 8;
    const MANY: usize = 40;
    println!(
        "| placement | a unit and step, computing {BUSY:?} a pass | the step's own | a unit and step, computing nothing |"
    );
    println!("|---|---|---|---|");
    let zero_3 = Policy::default();
    for (name, policy) in [
        ("zero-3, windows", zero_3),
        ("zero-3, copies", Policy { gather: Gather::Copy, ..zero_3 }),
        ("zero-2", Policy { sharded: Sharded::GRADIENTS, ..zero_3 }),
        ("zero-1", Policy { sharded: Sharded::OPTIMIZER, ..zero_3 }),
        ("nothing", Policy { sharded: Sharded::NOTHING, ..zero_3 }),
    ] {
        // What grows with the units is theirs, the rest is the step's.
        let each = |time: Duration| {
            let (few, many) = (step(policy, FEW, time), step(policy, MANY, time));
            let each = (many - few) / (MANY - FEW) as f64;
            (each, few - each * FEW as f64)
        };
        let ((busy, rest), (idle, _)) = (each(BUSY), each(Duration::ZERO));
        println!("| {name} | {busy:.2} µs | {rest:.1} µs | {idle:.2} µs |");
    }
}
