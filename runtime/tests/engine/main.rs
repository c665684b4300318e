//! The engine's invariants, on a little model: what may not change a bit, what a missing edge does, what the numbers must be, and
//! how a step fails. Ranks are threads.

mod abandon;
mod common;
mod device;
mod exact;
mod placement;
mod tensors;
mod timeline;

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use common::mlp::{self, HEAD, UNITS};
use common::{ADAMW, Host, Rank, Schedule, Setup, Training, bits_of, joined, ranks, train};
use pillion_collectives::Error as CollectiveError;
use pillion_kernels::DType;
use pillion_runtime::{Action, Error, Gather, Outline, Pass, Plan, PlanError, Sharded, Step, Verified};

const WORLDS: [usize; 4] = [1, 2, 3, 4];
const GATHERS: [Gather; 2] = [Gather::Copy, Gather::Window];

fn must_train(setup: &Setup, schedule: &Schedule) -> Training {
    train(setup, schedule).unwrap_or_else(|error| panic!("{setup:?}: {error}"))
}

/// Every prefetch depth with every number of slots that it allows, up to four.
fn depths() -> impl Iterator<Item = (usize, usize)> {
    (0..3).flat_map(|prefetch| (prefetch + 1..=4).map(move |slots| (prefetch, slots)))
}

/// Bytes of buckets: each unit by itself; one or two pairs of units; three units; all four.
const BUCKETS: [u64; 4] = [0, 3_700, 4_900, 1 << 20];

fn overlap_changes_no_bit(rounds: usize, weights: DType) {
    for world in WORLDS {
        let schedule = Schedule::uneven(world, rounds);
        let expected = must_train(&Setup::new(world).weights(weights), &schedule);
        assert!(expected.reports.iter().all(|report| report.loss_sum > 0.0 && report.gradient_norm > 0.0));
        for gather in GATHERS {
            for (index, (prefetch, slots)) in depths().enumerate() {
                let seed = index as u64;
                for host in [Host::Cpu, Host::Lazy(seed), Host::Lazy(100 + seed)] {
                    let mut setup = Setup::new(world).weights(weights).gather(gather).slots(prefetch, slots).host(host);
                    setup.policy.overlap = index % 3 != 0;
                    setup.policy.bucket = BUCKETS[index % BUCKETS.len()];
                    if let Some(difference) = must_train(&setup, &schedule).difference(&expected) {
                        panic!("{rounds} rounds, {setup:?}: {difference}");
                    }
                }
            }
        }
    }
}

#[test]
fn prefetch_slots_buckets_gather_and_device_change_no_bit_in_one_round() {
    overlap_changes_no_bit(1, DType::F32);
}

#[test]
fn prefetch_slots_buckets_gather_and_device_change_no_bit_in_two_rounds() {
    overlap_changes_no_bit(2, DType::F32);
}

#[test]
fn prefetch_slots_buckets_gather_and_device_change_no_bit_in_three_rounds() {
    overlap_changes_no_bit(3, DType::F32);
}

#[test]
fn prefetch_slots_buckets_gather_and_device_change_no_bit_with_weights_in_bf16() {
    overlap_changes_no_bit(2, DType::Bf16);
}

#[test]
fn injected_delays_change_no_bit() {
    const NONE: Duration = Duration::ZERO;
    let delays = [
        (Duration::from_millis(100), NONE),
        (NONE, Duration::from_millis(100)),
        (Duration::from_millis(20), Duration::from_millis(50)),
        (Duration::from_millis(50), Duration::from_millis(20)),
    ];
    // Delayed runs sleep, so they can all sleep at once.
    std::thread::scope(|scope| {
        for world in WORLDS {
            let schedule = Schedule::uneven(world, 2);
            let expected = Arc::new(must_train(&Setup::new(world), &schedule));
            for (index, (gather_delay, reduce_delay)) in delays.into_iter().enumerate() {
                for gather in GATHERS {
                    for host in [Host::Cpu, Host::Lazy(index as u64)] {
                        // Once all ranks are late, once only the last.
                        for first in [0, world - 1] {
                            let mut setup = Setup::new(world).gather(gather).host(host);
                            for options in &mut setup.options[first..] {
                                (options.gather_delay, options.reduce_delay) = (gather_delay, reduce_delay);
                            }
                            let (expected, schedule) = (expected.clone(), schedule.clone());
                            scope.spawn(move || {
                                let difference = must_train(&setup, &schedule).difference(&expected);
                                assert_eq!(difference, None, "ranks from {first} on late, {setup:?}");
                            });
                        }
                    }
                }
            }
        }
    });
}

/// A kind of edge: from what, to what.
type Edge = (fn(Action) -> bool, fn(Action) -> bool);

fn is_gather(action: Action) -> bool {
    matches!(action, Action::Gather { .. })
}

fn is_compute(action: Action) -> bool {
    matches!(action, Action::Compute { .. })
}

fn is_backward(action: Action) -> bool {
    matches!(action, Action::Compute { pass: Pass::Backward, .. })
}

fn is_reduce(action: Action) -> bool {
    matches!(action, Action::Reduce { .. })
}

fn is_agree(action: Action) -> bool {
    action == Action::Agree
}

fn is_update(action: Action) -> bool {
    matches!(action, Action::Update { .. })
}

/// The step's plan without the edges of one kind, and how many those are.
fn without((from, to): Edge, outline: &Outline, rounds: usize) -> (Plan, usize) {
    let plan = Plan::step(outline, rounds);
    let actions: Vec<Action> = plan.operations.iter().map(|operation| operation.action).collect();
    let mut removed = 0;
    let mut plan = plan;
    for operation in plan.operations.iter_mut().filter(|operation| to(operation.action)) {
        let before = operation.after.len();
        operation.after.retain(|&earlier| !from(actions[earlier]));
        removed += before - operation.after.len();
    }
    (plan, removed)
}

const SEEDS: Range<u64> = 0..12;

/// Makes a plan that lacks something.
type Change = Arc<dyn Fn(&Outline, usize) -> Plan + Send + Sync>;

/// How many of [`SEEDS`] give other bits than the whole plan on [`pillion_kernels::Cpu`], or an error.
fn seeds_that_show(change: Option<Change>) -> usize {
    let schedule = Schedule::uneven(2, 2);
    let setup = Setup::new(2).gather(Gather::Copy);
    let expected = must_train(&setup, &schedule);
    let shows = |&seed: &u64| {
        let mut setup = setup.clone().host(Host::Lazy(seed));
        if let Some(change) = change.clone() {
            setup.planner = Some(Arc::new(move |outline, rounds| Verified::unchecked(change(outline, rounds))));
        }
        train(&setup, &schedule).map_or(true, |training| training.difference(&expected).is_some())
    };
    SEEDS.filter(shows).count()
}

#[test]
fn a_whole_plan_gives_the_same_bits_with_every_seed() {
    assert_eq!(seeds_that_show(None), 0, "of {} seeds", SEEDS.end);
}

/// Plans without the edges of a kind.
fn lacking(edge: Edge) -> Option<Change> {
    Some(Arc::new(move |outline, rounds| {
        let (plan, removed) = without(edge, outline, rounds);
        assert!(removed > 0, "there is no such edge to remove");
        plan
    }))
}

// Nothing but the edge orders these pairs: the gather and the reduction start on a thread of their
// own. Some seed must show it, not each, since that thread may by chance come late enough.

#[test]
fn a_gather_that_does_not_wait_for_the_last_update_changes_bits() {
    let change = |outline: &Outline, rounds: usize| {
        let mut plan = Plan::step(outline, rounds);
        let mut flags = plan.operations.iter_mut().map(|operation| &mut operation.after_writes);
        assert_eq!(flags.by_ref().map(std::mem::take).filter(|&flag| flag).count(), UNITS);
        assert!(matches!(plan.clone().verify(), Err(PlanError::Race { what: "the last update of what it moves", .. })));
        plan
    };
    let shown = seeds_that_show(Some(Arc::new(change)));
    assert!(shown > 0, "{shown} of {} seeds show the missing order", SEEDS.end);
}

#[test]
fn a_gather_that_does_not_wait_for_the_last_use_of_its_slot_changes_bits() {
    let shown = seeds_that_show(lacking((is_compute, is_gather)));
    assert!(shown > 0, "{shown} of {} seeds show the missing edge", SEEDS.end);
}

#[test]
fn a_reduction_that_does_not_wait_for_its_backward_pass_changes_bits() {
    let shown = seeds_that_show(lacking((is_backward, is_reduce)));
    assert!(shown > 0, "{shown} of {} seeds show the missing edge", SEEDS.end);
}

/// The edges that ownership stands for as well: what a collective holds comes back through
/// `Pending::then`, which orders the stream after it, and the engine cannot lend out or wait for a
/// buffer without that. So leaving them out of a plan changes no bit, and what can be asked is that
/// the plan is refused, which keeps plans true for who prints, simulates or ports them.
const OWNED: [(Edge, &str); 3] = [
    ((is_gather, is_compute), "the gather of its weights"),
    ((is_reduce, is_compute), "the reduction of what its gradient slot held"),
    ((is_reduce, is_agree), "every reduction"),
];

#[test]
fn plans_without_the_edges_that_ownership_stands_for_are_refused() {
    let setup = Setup::new(2).gather(Gather::Copy);
    let outline = &Outline::new(&setup.layout(), &setup.policy, setup.policy.mesh(2).unwrap());
    for (edge, missing) in OWNED {
        let (plan, removed) = without(edge, outline, 2);
        assert!(removed > 0, "there is no such edge to remove");
        match plan.verify() {
            Err(PlanError::Race { what, .. }) => assert_eq!(what, missing),
            other => panic!("without the edges after {missing}: {other:?}"),
        }
        assert_eq!(seeds_that_show(lacking(edge)), 0, "ownership stands for the edges after {missing}");
    }
    for edge in [(is_compute as fn(Action) -> bool, is_gather as fn(Action) -> bool), (is_backward, is_reduce)] {
        assert!(without(edge, outline, 2).0.verify().is_err(), "and those that a run shows are refused too");
    }
    // Computing, agreeing and updating share a stream, which orders them without these edges.
    for edge in [(is_compute as fn(Action) -> bool, is_agree as fn(Action) -> bool), (is_agree, is_update)] {
        let (plan, removed) = without(edge, outline, 2);
        assert!(removed > 0 && plan.verify().is_ok());
    }
}

#[test]
fn a_step_makes_the_plans_collectives_and_no_more() {
    for world in WORLDS {
        for gather in GATHERS {
            for (prefetch, slots) in depths() {
                let setup = Setup::new(world).gather(gather).slots(prefetch, slots);
                ranks(&setup, |mut rank: Rank| {
                    let schedule = Schedule::uneven(world, 2);
                    let planned = rank.engine.plan(2).collectives();
                    for step in 0..2 {
                        let report = rank.step(&schedule, step).unwrap();
                        assert_eq!(report.operations, planned as u64, "{setup:?}");
                    }
                });
            }
        }
    }
}

/// Ways to leave the plan of a step of one round.
#[derive(Clone, Copy, Debug)]
enum Mistake {
    WrongUnit,
    WrongPass,
    MissingBackward,
    TooManyRounds,
    DroppedStep,
}

impl Mistake {
    /// Makes it, and returns the error.
    fn make(self, rank: &mut Rank) -> Error {
        let mut step = rank.engine.begin(1).expect("nothing is wrong yet");
        let off_plan = match self {
            Mistake::WrongUnit => step.forward(1).err(),
            Mistake::WrongPass => step.backward(0).err(),
            Mistake::MissingBackward => {
                (0..UNITS).for_each(|unit| drop(step.forward(unit).unwrap()));
                (1..UNITS).rev().for_each(|unit| drop(step.backward(unit).unwrap()));
                return step.finish(&ADAMW, &mut []).expect_err("unit 0 has no gradient");
            }
            Mistake::TooManyRounds => {
                step.idle_round().unwrap();
                step.idle_round().err()
            }
            Mistake::DroppedStep => {
                drop(step.forward(0).unwrap());
                drop(step);
                assert!(matches!(rank.engine.state(0), Err(Error::Unfinished)), "nor can a checkpoint be taken");
                rank.engine.begin(1).err()
            }
        };
        off_plan.expect("this is not the plan")
    }
}

#[test]
fn leaving_the_plan_is_an_error_here_and_names_this_rank_everywhere_else() {
    use Mistake::*;
    for mistake in [WrongUnit, WrongPass, MissingBackward, TooManyRounds, DroppedStep] {
        for gather in GATHERS {
            for host in [Host::Cpu, Host::Lazy(3)] {
                let setup = Setup::new(3).gather(gather).host(host);
                let errors = ranks(&setup, |mut rank| match rank.rank() {
                    1 => mistake.make(&mut rank),
                    _ => rank.step(&Schedule::uneven(3, 1), 0).expect_err("rank 1 is missing"),
                });
                for (rank, error) in errors.into_iter().enumerate() {
                    match error {
                        Error::OffPlan { .. } | Error::Unfinished if rank == 1 => {}
                        Error::Collective(CollectiveError::PeerLost { rank: 1, .. }) if rank != 1 => {}
                        error => panic!("{mistake:?}, rank {rank} of {setup:?}: {error}"),
                    }
                }
            }
        }
    }
}

/// Runs steps 0 and 1 of `schedule`, and between them step 1 once more with `values` in the gradients of `culprits`.
fn train_with_values(setup: &Setup, schedule: &Schedule, culprits: &[usize], values: &[f32]) -> Training {
    let ranks = ranks(setup, |mut rank: Rank| {
        let number = rank.rank();
        let first = rank.step(schedule, 0).unwrap();
        let before = rank.states().unwrap();
        let error = rank.step_with(schedule, 1, |round, unit, pass| {
            if round == 0 && unit == 2 && culprits.contains(&number) {
                let gradient = pass.gradients.tensor(1).slice(40..40 + values.len());
                pass.stream.upload(gradient, values);
            }
            Ok(())
        });
        match error {
            Err(Error::NonFinite { step: 2, count, .. }) => assert_eq!(count, values.len() as u64),
            other => panic!("rank {number}: {other:?}"),
        }
        assert_eq!(rank.engine.updates(), 1);
        assert_eq!(rank.states().unwrap(), before, "no parameter is changed");
        let second = rank.step(schedule, 1).unwrap();
        let states = rank.states().unwrap();
        (vec![first, second], states, rank.evaluate(1000..1005).unwrap())
    });
    let reports = ranks[0].0.clone();
    assert!(ranks.iter().all(|rank| rank.0.iter().zip(&reports).all(|(one, other)| bits_of(one) == bits_of(other))));
    Training { reports, states: joined(setup, &ranks, |rank| &rank.1), evaluation: ranks[0].2 }
}

#[test]
fn a_gradient_that_is_not_finite_stops_every_rank_and_changes_nothing() {
    for gather in GATHERS {
        for host in [Host::Cpu, Host::Lazy(4)] {
            let setup = Setup::new(3).gather(gather).host(host);
            let schedule = Schedule::uneven(3, 2);
            let expected = must_train(&setup, &schedule);
            for (culprits, values) in [
                (&[1][..], &[f32::NAN, f32::INFINITY][..]),
                // Finite on each rank, infinite in the sum.
                (&[0, 2], &[3e38]),
                (&[0, 1, 2], &[f32::NEG_INFINITY]),
            ] {
                let training = train_with_values(&setup, &schedule, culprits, values);
                assert_eq!(training.difference(&expected), None, "training goes on, {values:?} in {setup:?}");
            }
        }
    }
}

#[test]
fn a_step_without_tokens_is_refused_on_every_rank_and_changes_nothing() {
    ranks(&Setup::new(2), |mut rank: Rank| {
        let before = rank.states().unwrap();
        let mut step = rank.engine.begin(1).unwrap();
        step.round(0);
        ones(&mut step);
        let error = step.finish(&ADAMW, &mut []).unwrap_err();
        assert!(matches!(error, Error::NoTokens { step: 1 }), "{error}");
        assert!(error.to_string().contains("`Step::round`"), "{error}");
        assert!(rank.states().unwrap() == before && rank.engine.updates() == 0);
        rank.step(&Schedule::uneven(2, 1), 0).expect("training goes on");
    });
}

/// A round whose gradients are ones.
fn ones(step: &mut Step<'_>) {
    (0..UNITS).for_each(|unit| drop(step.forward(unit).unwrap()));
    (0..UNITS).rev().for_each(|unit| ones_of(step, unit));
}

/// The backward pass of a unit, whose first tensor has ones for its gradient.
fn ones_of(step: &mut Step<'_>, unit: usize) {
    let mut pass = step.backward(unit).unwrap();
    pass.stream.accumulate_from(pass.gradients.tensor(0), &vec![1.0f32; pass.weights.tensor(0).len()]).unwrap();
    if unit == HEAD {
        pass.stream.accumulate_from(pass.loss, &[1.0]).unwrap();
    }
}

#[test]
fn the_mean_and_the_statistics_have_one_count_of_tokens() {
    // A mask that leaves out half of the tokens halves what `round` is told, and nothing else. Then
    // the mean gradient, the loss and each group's weight follow. Powers of two, so that every
    // quotient is exact.
    for sharded in [Sharded::EVERYTHING, Sharded::OPTIMIZER] {
        let reports = [8, 4].map(|tokens| {
            let program = |mut rank: Rank| {
                let mut step = rank.engine.begin(2).unwrap();
                for _ in 0..2 {
                    step.round(tokens);
                    ones(&mut step);
                }
                step.finish(&ADAMW, &mut []).unwrap()
            };
            ranks(&Setup::new(2).sharded(sharded), program).remove(0)
        });
        let [all, half] = &reports;
        assert_eq!((all.tokens, half.tokens), (32.0, 16.0));
        assert_eq!((all.loss_sum, half.loss_sum), (4.0, 4.0));
        assert_eq!(half.gradient_norm, 2.0 * all.gradient_norm);
        assert_eq!(half.group_square_norms.unwrap(), 2.0 * all.group_square_norms.unwrap());
    }
}

#[test]
fn a_step_of_no_rounds_is_refused() {
    ranks(&Setup::new(1), |mut rank: Rank| {
        let refused = rank.engine.begin(0).err().expect("there is nothing to plan").to_string();
        assert!(refused.contains("at least one round"), "{refused}");
        rank.engine.begin_evaluation(0).err().expect("nor to evaluate");
    });
}

#[test]
fn after_a_failure_every_call_says_what_it_was() {
    let setup = Setup::new(2);
    ranks(&setup, |mut rank: Rank| {
        if rank.rank() == 1 {
            rank.engine.communicator().abort("it was told to");
            return;
        }
        let mut step = rank.engine.begin(1).unwrap();
        let failed = (0..UNITS).find_map(|unit| step.forward(unit).err()).expect("rank 1 has gathered nothing");
        assert!(failed.to_string().contains("it was told to"), "{failed}");
        drop(step);
        for later in [rank.engine.begin(1).err(), rank.engine.state(0).err()] {
            assert_eq!(later.expect("it has failed").to_string(), failed.to_string());
        }
        let _ = rank.engine.memory();
    });
}

#[test]
fn evaluation_between_steps_changes_no_bit() {
    for gather in GATHERS {
        for host in [Host::Cpu, Host::Lazy(5)] {
            let setup = Setup::new(3).gather(gather).host(host);
            let schedule = Schedule::uneven(3, 2);
            let expected = must_train(&setup, &schedule);
            let ranks = ranks(&setup, |mut rank: Rank| {
                let before = rank.evaluate(1000..1005).unwrap();
                let first = rank.step(&schedule, 0).unwrap();
                assert!(rank.evaluate(1000..1005).unwrap() < before, "a step has been learnt from");
                let second = rank.step(&schedule, 1).unwrap();
                let states = rank.states().unwrap();
                (vec![first, second], states, rank.evaluate(1000..1005).unwrap())
            });
            let states = joined(&setup, &ranks, |rank| &rank.1);
            let training = Training { reports: ranks[0].0.clone(), states, evaluation: ranks[0].2 };
            assert_eq!(training.difference(&expected), None, "{setup:?}");
        }
    }
}

#[test]
fn tensors_straddle_ranks_and_shards_end_in_padding() {
    for world in &WORLDS[1..] {
        let layout = pillion_runtime::Layout::new(&mlp::units(), *world);
        let straddles = |unit: usize| {
            let pieces: usize = (0..*world).map(|rank| layout.pieces(unit, rank).count()).sum();
            pieces > layout.units[unit].tensors.len()
        };
        assert!((0..=HEAD).all(straddles), "the model tests what it is for at world {world}");
        assert!(layout.units.iter().all(|unit| unit.padded > unit.len));
    }
}
