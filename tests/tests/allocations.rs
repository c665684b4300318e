//! Once a run is under way, a step allocates nothing: neither the model nor the engine nor the communicator, on any thread.

use std::alloc::System;
use std::sync::Arc;

use pillion_collectives::{Communicator, Launch, Options};
use pillion_kernels::{AdamW, Cpu, DType};
use pillion_llama::config::Config;
use pillion_llama::model::{Model, Recompute};
use pillion_runtime::{Engine, Gather, Policy, Sharded};
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

const WORLD: usize = 2;
const SEQ: usize = 16;
/// Steps before all working memory has its size, and in each of the [`WINDOWS`] that are counted.
const WARM_UP: usize = 3;
const COUNTED: usize = 20;
/// Memory that grows when threads first meet in some way (locks' queues) may come late; what a step allocates comes in each window.
const WINDOWS: usize = 3;

fn config() -> Config {
    Config {
        vocab_size: 61,
        hidden_size: 32,
        intermediate_size: 48,
        // More units than lanes and outcomes have room for at first.
        num_hidden_layers: 12,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        rms_norm_eps: 1e-5,
        rope_theta: 1e4,
        rope_scaling: None,
        head_dim: None,
        tie_word_embeddings: false,
    }
}

/// Allocations and reallocations of all threads during [`COUNTED`] steps of `rounds` rounds, in the last of which rank 1 is idle if `idle`;
/// the fewest of several windows. `more` runs in each step of each rank.
fn allocations(policy: Policy, recompute: Recompute, rounds: usize, idle: bool, more: impl Fn() + Sync) -> usize {
    let program = |launch: Launch| {
        let communicator = Arc::new(Communicator::connect(&launch, Options::default()).unwrap());
        let (config, device) = (config(), Arc::new(Cpu));
        let layout = config.layout(policy.mesh(WORLD).unwrap().shard);
        let mut engine = Engine::new(communicator.clone(), device.clone(), layout, policy).unwrap();
        engine.initialize(|name, shape| config.initial_values(1, None, name, shape)).unwrap();
        let mut model = Model::new(&*device, &config, policy.weights, 1, SEQ, recompute).unwrap();
        let tokens: Vec<u32> = (0..=SEQ as u32).map(|index| (index * 7) % 61).collect();
        let settings = AdamW { lr: 1e-3, beta1: 0.9, beta2: 0.95, epsilon: 1e-8, weight_decay: 0.1 };
        let mut train = || {
            let mut step = engine.begin(rounds).unwrap();
            for round in 0..rounds {
                if idle && launch.rank == 1 && round + 1 == rounds {
                    step.idle_round().unwrap();
                } else {
                    model.train(&mut step, &tokens[..SEQ], &tokens[1..], None).unwrap();
                }
            }
            step.finish(&settings, &mut [0.0]).unwrap();
            more();
        };
        (0..WARM_UP).for_each(|_| train());
        let mut fewest = usize::MAX;
        for _ in 0..WINDOWS {
            communicator.barrier().unwrap();
            let region = Region::new(ALLOCATOR);
            communicator.barrier().unwrap();
            (0..COUNTED).for_each(|_| train());
            communicator.barrier().unwrap();
            let change = region.change();
            communicator.barrier().unwrap();
            fewest = fewest.min(change.allocations + change.reallocations);
        }
        fewest
    };
    std::thread::scope(|scope| {
        let ranks: Vec<_> = Launch::threads(WORLD).into_iter().map(|launch| scope.spawn(|| program(launch))).collect();
        // The counter is everybody's.
        ranks.into_iter().map(|rank| rank.join().unwrap()).min().unwrap()
    })
}

#[test]
fn a_step_allocates_nothing() {
    for weights in [DType::F32, DType::Bf16] {
        for gather in [Gather::Window, Gather::Copy] {
            for (rounds, idle) in [(1, false), (2, false), (2, true)] {
                let policy = Policy { weights, gather, ..Policy::default() };
                let count = allocations(policy, Recompute::None, rounds, idle, || ());
                assert_eq!(count, 0, "in {COUNTED} steps of {rounds} rounds with {weights}, {gather}, idle {idle}");
            }
        }
    }
    // A grid of one rank a group has every kind of operation.
    let whole = Policy { sharded: Sharded::NOTHING, ..Policy::default() };
    let zero_1 = Policy { sharded: Sharded::OPTIMIZER, ..Policy::default() };
    let grid = Policy { replicas: 2, ..Policy::default() };
    for policy in [whole, zero_1, grid, Policy { reduce: DType::Bf16, ..grid }, Policy { reduce: DType::Bf16, ..whole }]
    {
        let count = allocations(policy, Recompute::None, 2, true, || ());
        assert_eq!(count, 0, "in {COUNTED} steps of 2 rounds with {policy:?}");
    }
    for gather in [Gather::Window, Gather::Copy] {
        let policy = Policy { gather, bucket: 100_000, ..Policy::default() };
        let count = allocations(policy, Recompute::None, 2, true, || ());
        assert_eq!(count, 0, "in {COUNTED} steps with {policy:?}");
    }
    for recompute in [Recompute::Attention, Recompute::Block] {
        let count = allocations(Policy::default(), recompute, 2, true, || ());
        assert_eq!(count, 0, "in {COUNTED} steps that compute again: {recompute:?}");
    }
    // That the counter counts: the same once more, with one allocation in each step of each rank.
    let count = allocations(Policy::default(), Recompute::None, 1, false, || drop(std::hint::black_box(Box::new(0u8))));
    assert_eq!(count, WORLD * COUNTED);
}
