//! A step that every rank abandons, each at a place of its own, leaves engine and parameters as
//! they were before it.

use pillion_kernels::{DType, Event, Failure};
use pillion_runtime::{Engine, Gather, Sharded, Step};

use crate::common::mlp::UNITS;
use crate::common::{ADAMW, Host, Rank, Schedule, Setup, Training, joined, ranks};
use crate::{must_train, ones_of};

const ROUNDS: usize = 2;
/// Forward and backward passes of a step.
const PASSES: usize = ROUNDS * 2 * UNITS;

/// The first `count` passes of a step. Their gradients are ones: nothing of them may be left
/// behind.
fn passes(step: &mut Step<'_>, count: usize) {
    for pass in 0..count {
        let place = pass % (2 * UNITS);
        if place == 0 {
            step.round(3);
        }
        match place < UNITS {
            true => drop(step.forward(place).unwrap()),
            false => ones_of(step, 2 * UNITS - 1 - place),
        }
    }
}

/// Begins a training step, comes as far as `place` says on this rank, and abandons it.
fn abandon(engine: &mut Engine, place: usize) {
    let mut step = engine.begin(ROUNDS).unwrap();
    passes(&mut step, place);
    step.abandon().unwrap();
}

fn setups() -> Vec<Setup> {
    let mut setups = Vec::new();
    for world in [1, 2, 3, 4] {
        for gather in [Gather::Copy, Gather::Window] {
            for host in [Host::Cpu, Host::Lazy(world as u64)] {
                setups.push(Setup::new(world).gather(gather).host(host));
            }
        }
    }
    for sharded in [Sharded::NOTHING, Sharded::OPTIMIZER, Sharded::GRADIENTS] {
        for host in [Host::Cpu, Host::Lazy(7)] {
            setups.push(Setup::new(3).sharded(sharded).host(host));
        }
    }
    for sharded in [Sharded::OPTIMIZER, Sharded::EVERYTHING] {
        setups.push(Setup::new(4).replicas(2).sharded(sharded).reduce(DType::Bf16).host(Host::Lazy(9)));
    }
    setups
}

#[test]
fn nothing_of_it_is_left_wherever_each_rank_abandons_it() {
    for setup in setups() {
        let schedule = Schedule::uneven(setup.world(), ROUNDS);
        let expected = must_train(&setup, &schedule);
        // Ranks are as far apart as they can be, and not.
        for places in [[0, PASSES, 1, UNITS + 1], [PASSES - 1, UNITS, 3 * UNITS, 0], [UNITS; 4]] {
            let ranks = ranks(&setup, |mut rank: Rank| {
                let place = places[rank.rank()];
                let first = rank.step(&schedule, 0).unwrap();
                let before = rank.states().unwrap();
                abandon(&mut rank.engine, place);
                abandon(&mut rank.engine, PASSES - place);
                assert!(rank.states().unwrap() == before && rank.engine.updates() == 1, "{setup:?} at {places:?}");
                let second = rank.step(&schedule, 1).unwrap();
                (vec![first, second], rank.states().unwrap(), rank.evaluate(1000..1005).unwrap())
            });
            let states = joined(&setup, &ranks, |rank| &rank.1);
            let training = Training { reports: ranks[0].0.clone(), states, evaluation: ranks[0].2 };
            assert_eq!(training.difference(&expected), None, "{setup:?} at {places:?}");
        }
    }
}

#[test]
fn an_evaluation_can_be_abandoned_too() {
    for gather in [Gather::Copy, Gather::Window] {
        let setup = Setup::new(3).gather(gather).host(Host::Lazy(2));
        ranks(&setup, |mut rank: Rank| {
            let (expected, place) = (rank.evaluate(1000..1005).unwrap(), rank.rank() * UNITS);
            let mut step = rank.engine.begin_evaluation(ROUNDS).unwrap();
            for unit in (0..ROUNDS).flat_map(|_| 0..UNITS).take(place) {
                step.forward(unit).unwrap();
            }
            step.abandon().unwrap();
            assert_eq!(rank.evaluate(1000..1005).unwrap().to_bits(), expected.to_bits());
        });
    }
}

#[test]
fn a_step_that_is_dropped_instead_leaves_an_engine_that_says_so() {
    ranks(&Setup::new(1), |mut rank: Rank| {
        passes(&mut rank.engine.begin(ROUNDS).unwrap(), 1);
        let error = rank.engine.begin(1).err().expect("other ranks would wait for the rest").to_string();
        assert!(error.contains("Step::abandon"), "{error}");
    });
}

#[derive(Debug, thiserror::Error)]
#[error("the fan has stopped")]
struct Hot;

/// A stream that has failed runs nothing, so what follows must not look well, on any rank.
#[test]
fn a_stream_that_fails_ends_a_step_on_every_rank_and_abandoning_it_is_an_error() {
    for host in [Host::Cpu, Host::Lazy(5)] {
        for trains in [false, true] {
            let said = ranks(&Setup::new(2).host(host), |mut rank: Rank| {
                let number = rank.rank();
                let mut step = match trains {
                    true => rank.engine.begin(1).unwrap(),
                    false => rank.engine.begin_evaluation(1).unwrap(),
                };
                if number == 0 {
                    step.stream().wait_for(&Event::failed(Failure::new(Hot)));
                }
                step.round(1);
                let mut passes = (0..UNITS).try_for_each(|unit| step.forward(unit).map(|_| ()));
                if trains {
                    passes =
                        passes.and_then(|()| (0..UNITS).rev().try_for_each(|unit| step.backward(unit).map(|_| ())));
                }
                let ended = match (passes, trains) {
                    (Err(error), _) => {
                        assert!(step.abandon().is_err());
                        Err(error)
                    }
                    (Ok(()), true) => step.finish(&ADAMW, &mut []).map(|_| ()),
                    (Ok(()), false) => step.end(),
                };
                // A deferring device finds out when somebody waits.
                let ended = ended.and_then(|()| Ok(rank.engine.stream().synchronize()?));
                let after = rank.engine.communicator().barrier();
                (ended.err().map(|error| error.to_string()), after.err().map(|error| error.to_string()))
            });
            let own = said[0].0.as_ref().unwrap_or_else(|| panic!("{host:?}, training {trains}: {said:?}"));
            assert!(own.contains("the fan has stopped"), "{said:?}");
            if trains || matches!(host, Host::Cpu) {
                let (during, after) = &said[1];
                assert!(during.is_some() || after.is_some(), "{host:?}, training {trains}: {said:?}");
            }
        }
    }
}
