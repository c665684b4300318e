//! Placement: what is sharded, and over which axis of the mesh, changes what is moved and kept, and no number but by the order of
//! a sum. Ranks are threads.

use std::time::Duration;

use crate::common::{self, Host, Rank, Schedule, Setup, Training, bits_of, joined, ranks, train};
use pillion_kernels::DType;
use pillion_runtime::{Error, Gather, Memory, Optimizer, ShardUpdate, Sharded};

const PARAMETERS_AND_OPTIMIZER: Sharded = Sharded { gradients: false, ..Sharded::EVERYTHING };

/// Those that reduce in every round, and those that reduce in the last.
const EVERY_ROUND: [Sharded; 2] = [Sharded::GRADIENTS, Sharded::EVERYTHING];
const LAST_ROUND: [Sharded; 3] = [Sharded::NOTHING, Sharded::OPTIMIZER, PARAMETERS_AND_OPTIMIZER];

fn must_train(setup: &Setup, schedule: &Schedule) -> Training {
    train(setup, schedule).unwrap_or_else(|error| panic!("{setup:?}: {error}"))
}

/// The sum of the groups' square norms is added up over units before or after ranks, in f64: at most 4 · 4 additions of positive numbers, each off
/// by 2⁻⁵³ of it. Everything else must be the same bits.
fn assert_same_but_for_the_order_of_statistics(found: Training, expected: &Training, what: &str) {
    let mut found = found;
    for (found, expected) in found.reports.iter_mut().zip(&expected.reports) {
        let [ours, theirs] = [&*found, expected].map(|report| report.group_square_norms.unwrap());
        assert!((ours - theirs).abs() <= 16.0 * theirs / (1u64 << 53) as f64, "{what}: {ours} and {theirs}");
        found.group_square_norms = Some(theirs);
    }
    if let Some(difference) = found.difference(expected) {
        panic!("{what}: {difference}");
    }
}

#[test]
fn every_placement_that_reduces_as_often_gives_the_same_bits() {
    for world in [1, 2, 3, 4] {
        for rounds in 1..=3 {
            let schedule = Schedule::uneven(world, rounds);
            for weights in [DType::F32, DType::Bf16] {
                for class in [&EVERY_ROUND[..], &LAST_ROUND] {
                    let last = *class.last().unwrap();
                    let expected = must_train(&Setup::new(world).weights(weights).sharded(last), &schedule);
                    for &sharded in class {
                        for gather in [Gather::Copy, Gather::Window] {
                            for host in [Host::Cpu, Host::Lazy(world as u64)] {
                                let setup = Setup::new(world).weights(weights).sharded(sharded).gather(gather);
                                // One device moves units in pairs, the other each by itself.
                                let bucket = if host == Host::Cpu { 0 } else { 3_700 };
                                let setup = setup.host(host).bucket(bucket);
                                let what = format!("{rounds} rounds, {setup:?}");
                                let found = must_train(&setup, &schedule);
                                assert_same_but_for_the_order_of_statistics(found, &expected, &what);
                            }
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn with_one_round_every_placement_gives_the_same_bits() {
    for world in [2, 4] {
        let schedule = Schedule::uneven(world, 1);
        let expected = must_train(&Setup::new(world), &schedule);
        for sharded in EVERY_ROUND.into_iter().chain(LAST_ROUND) {
            let found = must_train(&Setup::new(world).sharded(sharded), &schedule);
            assert_same_but_for_the_order_of_statistics(found, &expected, &format!("{world} ranks, {sharded}"));
        }
    }
}

/// The norm of the gradient is summed over ranks, whose parts of it lie elsewhere in a grid: it may differ in the last bits, and so may what
/// is clipped by it. Without a limit nothing else depends on it.
#[test]
fn a_grid_gives_the_bits_of_a_flat_group_that_sums_in_the_same_order() {
    for (world, replicas) in [(2, 2), (4, 2), (4, 4), (6, 2), (6, 3)] {
        for (rounds, class) in [(1, [Sharded::GRADIENTS, Sharded::EVERYTHING]), (2, [LAST_ROUND[1], LAST_ROUND[2]])] {
            let schedule = Schedule::uneven(world, rounds);
            for sharded in class {
                let unclipped = |setup: Setup| {
                    let mut setup = setup.sharded(sharded);
                    setup.policy.clip = None;
                    setup
                };
                let mut flat = unclipped(Setup::new(world));
                flat.options.iter_mut().for_each(|options| options.reduce_groups = replicas);
                let expected = must_train(&flat, &schedule);
                for host in [Host::Cpu, Host::Lazy(3)] {
                    for gather in [Gather::Copy, Gather::Window] {
                        let bucket = if gather == Gather::Copy { 0 } else { 3_700 };
                        let grid = unclipped(Setup::new(world)).replicas(replicas).gather(gather).host(host);
                        let grid = grid.bucket(bucket);
                        let mut found = must_train(&grid, &schedule);
                        for (found, expected) in found.reports.iter_mut().zip(&expected.reports) {
                            let (ours, theirs) = (found.square_norm, expected.square_norm);
                            assert!(
                                (ours - theirs).abs() <= 64.0 * theirs / (1u64 << 53) as f64,
                                "{ours} and {theirs}"
                            );
                            (found.square_norm, found.gradient_norm) = (theirs, expected.gradient_norm);
                        }
                        assert_same_but_for_the_order_of_statistics(found, &expected, &format!("{grid:?}"));
                        let mut alone = grid.clone();
                        alone.policy.overlap = false;
                        let difference = must_train(&alone, &schedule).difference(&must_train(&grid, &schedule));
                        assert_eq!(difference, None, "{alone:?}");
                    }
                }
            }
        }
    }
}

#[test]
fn a_missing_edge_before_the_sum_over_groups_changes_bits() {
    use pillion_runtime::{Action, Plan, Verified};
    let schedule = Schedule::uneven(2, 2);
    let setup = Setup::new(2).sharded(Sharded::NOTHING);
    let expected = must_train(&setup, &schedule);
    let shows = |&seed: &u64| {
        let mut setup = setup.clone().host(Host::Lazy(seed));
        setup.planner = Some(std::sync::Arc::new(|outline, rounds| {
            let mut plan = Plan::step(outline, rounds);
            let all_reduces = plan.operations.iter_mut().filter(|op| matches!(op.action, Action::AllReduce { .. }));
            all_reduces.for_each(|operation| operation.after.clear());
            assert!(plan.clone().verify().is_err());
            Verified::unchecked(plan)
        }));
        // Each rank may then have other numbers, so they are looked at one by one.
        let reports = ranks(&setup, |mut rank: Rank| [0, 1].map(|step| rank.step(&schedule, step).unwrap()));
        reports
            .iter()
            .flat_map(|rank| rank.iter().zip(&expected.reports))
            .any(|(one, other)| bits_of(one) != bits_of(other))
    };
    let shown = (0..12).filter(shows).count();
    assert!(shown > 0, "{shown} of 12 seeds show the missing edge");
}

#[test]
fn injected_delays_change_no_bit_in_a_grid() {
    std::thread::scope(|scope| {
        for sharded in EVERY_ROUND.into_iter().chain(LAST_ROUND) {
            let setup = Setup::new(4).replicas(2).sharded(sharded);
            let schedule = Schedule::uneven(4, 2);
            let expected = std::sync::Arc::new(must_train(&setup, &schedule));
            for late in [0, 3] {
                for host in [Host::Cpu, Host::Lazy(late as u64)] {
                    let mut setup = setup.clone().host(host);
                    for options in &mut setup.options[late..] {
                        options.gather_delay = Duration::from_millis(20);
                        options.reduce_delay = Duration::from_millis(50);
                    }
                    let (expected, schedule) = (expected.clone(), schedule.clone());
                    scope.spawn(move || {
                        assert_eq!(must_train(&setup, &schedule).difference(&expected), None, "{setup:?}");
                    });
                }
            }
        }
    });
}

/// A rank's gradient is rounded to bf16 once: each element is off by at most 2⁻⁹ of it, so the sums' norms are off by at most 2⁻⁹ of the sum of the ranks' norms.
#[test]
fn gradients_reduced_in_bf16_are_off_by_one_rounding() {
    let world = 4;
    let schedule = Schedule(vec![vec![3, 1, 4, 2]]);
    let exact = must_train(&Setup::new(world), &schedule).reports.remove(0);
    let mut same = None;
    for sharded in EVERY_ROUND.into_iter().chain(LAST_ROUND) {
        for host in [Host::Cpu, Host::Lazy(8)] {
            let setup = Setup::new(world).sharded(sharded).reduce(DType::Bf16).host(host);
            let training = must_train(&setup, &schedule);
            let report = &training.reports[0];
            // Σ‖Gₖ‖ ≤ √(Σ nₖ · Σ ‖Gₖ‖²/nₖ) by Cauchy and Schwarz.
            let bound = (exact.tokens * exact.group_square_norms.unwrap()).sqrt() / 512.0;
            let error = (report.square_norm.sqrt() - exact.square_norm.sqrt()).abs();
            assert!(error <= bound && error > 0.0, "{setup:?}: off by {error:.1e}, bound {bound:.1e}");
            assert_eq!(report.loss_sum.to_bits(), exact.loss_sum.to_bits());
            let expected = same.get_or_insert_with(|| training.clone());
            assert_same_but_for_the_order_of_statistics(training, expected, &format!("{setup:?}"));
        }
    }
}

#[test]
fn ranks_that_come_with_other_arguments_are_named() {
    use pillion_collectives::{Communicator, Launch, Options};
    use pillion_kernels::Cpu;
    use pillion_runtime::{Engine, Layout, Policy};
    use std::sync::Arc;
    let program = |launch: Launch| {
        let communicator = Arc::new(Communicator::connect(&launch, Options::default()).unwrap());
        let prefetch = usize::from(launch.rank != 2);
        let layout = Layout::new(&common::mlp::units(), 3);
        Engine::new(communicator, Arc::new(Cpu), layout, Policy { prefetch, ..Policy::default() }).err()
    };
    std::thread::scope(|scope| {
        let ranks: Vec<_> = Launch::threads(3).into_iter().map(|launch| scope.spawn(move || program(launch))).collect();
        for rank in ranks {
            assert!(matches!(rank.join().unwrap(), Some(Error::Different { rank: 2 })));
        }
    });
}

#[test]
fn whole_units_are_put_together_on_every_rank() {
    for sharded in [Sharded::NOTHING, Sharded::OPTIMIZER, Sharded::EVERYTHING] {
        for replicas in [1, 2] {
            let setup = Setup::new(4).sharded(sharded).replicas(replicas).weights(DType::Bf16);
            let ranks = ranks(&setup, |mut rank: Rank| {
                rank.step(&Schedule::uneven(4, 1), 0).unwrap();
                let whole: Vec<_> = (0..common::mlp::UNITS).map(|unit| rank.engine.master(unit).unwrap()).collect();
                (rank.states().unwrap(), whole)
            });
            let states = joined(&setup, &ranks, |rank| &rank.0);
            for (_, whole) in &ranks {
                assert!(whole.iter().zip(&states).all(|(whole, state)| whole == &state.master), "{setup:?}");
            }
        }
    }
}

/// Gradient descent with momentum, on the host: one state for each weight.
struct Descent;

impl Descent {
    const LR: f32 = 0.5;
    const MOMENTUM: f32 = 0.25;
}

impl Optimizer for Descent {
    fn states(&self) -> &'static [&'static str] {
        &["velocity"]
    }

    fn update(&self, shard: ShardUpdate<'_>) {
        let ShardUpdate { stream, gradient, scale, mut states, master, step, .. } = shard;
        assert_eq!(step, 1);
        let host = |view| stream.download::<f32>(view).unwrap();
        let (gradient, scale) = (host(gradient), host(scale)[0]);
        let (mut velocity, mut weights) = (host(states.get(0).as_view()), host(master.as_view()));
        for ((weight, velocity), g) in weights.iter_mut().zip(&mut velocity).zip(&gradient) {
            *velocity = Descent::MOMENTUM * *velocity + scale * g;
            *weight -= Descent::LR * *velocity;
        }
        stream.upload(states.get(0), &velocity);
        stream.upload(master, &weights);
    }
}

#[test]
fn an_optimizer_of_the_callers_own_updates_shards() {
    const LR: f32 = Descent::LR;
    for sharded in [Sharded::NOTHING, Sharded::EVERYTHING] {
        for weights in [DType::F32, DType::Bf16] {
            let mut setup = Setup::new(2).sharded(sharded).weights(weights);
            (setup.policy.clip, setup.policy.states) = (None, Descent.states());
            ranks(&setup, |mut rank: Rank| {
                let schedule = Schedule::uneven(2, 1);
                let before = rank.states().unwrap();
                let before_update = rank.evaluate(1000..1005).unwrap();
                let agreed = rank.agree(&schedule, 0).unwrap();
                let scale = 1.0 / agreed.report().tokens as f32;
                let gradients: Vec<Vec<f32>> =
                    (0..before.len()).map(|unit| agreed.stream().download(agreed.gradient(unit)).unwrap()).collect();
                agreed.update(&Descent).unwrap();
                for (unit, state) in rank.states().unwrap().iter().enumerate() {
                    let expected: Vec<f32> =
                        before[unit].master.iter().zip(&gradients[unit]).map(|(w, g)| w - LR * (scale * g)).collect();
                    assert_eq!(state.master, expected);
                    assert_eq!(state.states, [gradients[unit].iter().map(|g| scale * g).collect::<Vec<_>>()]);
                    assert!(gradients[unit].iter().any(|&g| g != 0.0));
                }
                assert_eq!(rank.engine.updates(), 1);
                // What is computed with is the new master, rounded.
                let found = rank.evaluate(1000..1005).unwrap();
                for (unit, state) in rank.states().unwrap().iter().enumerate() {
                    rank.engine.set_state(unit, state).unwrap();
                }
                assert_eq!(found.to_bits(), rank.evaluate(1000..1005).unwrap().to_bits());
                assert_ne!(found, before_update);
            });
        }
    }
}

/// What the parameters and their state take, in all placements: bytes a rank by the formulas of the ZeRO paper's table 1, for f32 (4 bytes each of weights,
/// gradients, and 8 of moments), of units that world divides.
#[test]
fn memory_is_what_the_placement_says() {
    use pillion_runtime::{Layout, Policy, TensorSpec, UnitSpec};
    let (units, len, world) = (8u64, 1024u64, 4u64);
    let spec = |unit| UnitSpec {
        name: format!("{unit}"),
        tensors: vec![TensorSpec { name: format!("{unit}.x"), shape: vec![len as usize], decay: true, frozen: false }],
    };
    let all = units * len;
    let slots = 2 * len;
    for (sharded, weights, gathered, gradients, sums, state) in [
        (Sharded::NOTHING, all, 0, all, 0, all),
        (Sharded::OPTIMIZER, all, 0, all, all / world, all / world),
        (Sharded::GRADIENTS, all, 0, slots, all / world, all / world),
        (Sharded::EVERYTHING, all / world, slots, slots, all / world, all / world),
    ] {
        let policy = Policy { sharded, gather: Gather::Copy, ..Policy::default() };
        let mesh = policy.mesh(world as usize).unwrap();
        let layout = Layout::new(&(0..units).map(spec).collect::<Vec<_>>(), mesh.shard);
        let memory = Memory::of(&layout, &policy, mesh);
        let found = [memory.weights, memory.gathered, memory.gradients, memory.gradient_shard, memory.moments];
        assert_eq!(found, [weights, gathered, gradients, sums, 2 * state].map(|elements| 4 * elements), "{sharded}");
    }
}

#[test]
fn an_engine_has_the_memory_that_was_predicted() {
    for world in [1, 4] {
        for sharded in EVERY_ROUND.into_iter().chain(LAST_ROUND) {
            for gather in [Gather::Copy, Gather::Window] {
                for (weights, reduce) in [(DType::F32, DType::F32), (DType::Bf16, DType::Bf16)] {
                    for (replicas, prefetch, slots) in [(1, 1, 2), (world, 0, 1), (world.min(2), 2, 8)] {
                        let setup = Setup::new(world).sharded(sharded).gather(gather).weights(weights).reduce(reduce);
                        let setup = setup.replicas(replicas).slots(prefetch, slots).bucket(1_000 * slots as u64);
                        let predicted = Memory::of(&setup.layout(), &setup.policy, setup.policy.mesh(world).unwrap());
                        ranks(&setup, |mut rank: Rank| {
                            assert_eq!(rank.engine.memory(), predicted, "{setup:?}");
                            rank.step(&Schedule::uneven(world, 1), 0).unwrap();
                            rank.evaluate(1000..1005).unwrap();
                            assert_eq!(rank.engine.memory(), predicted, "after a step, {setup:?}");
                        });
                    }
                }
            }
        }
    }
}
