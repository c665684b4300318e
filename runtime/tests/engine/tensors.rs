//! Tensors that are frozen, and units that are used twice. There is no model: backward passes add small whole numbers, so that every sum is exact.

use std::sync::Arc;

use pillion_collectives::{Communicator, Launch, Options};
use pillion_kernels::{Cpu, DType, Device, LazyCpu};
use pillion_runtime::{Engine, Error, Layout, Policy, Sharded, State, StepReport, TensorSpec, UnitSpec};

use crate::common::ADAMW;

/// The first unit has a tensor of 50 and one of 70 elements, the second one of 40.
fn units(frozen: &str) -> Vec<UnitSpec> {
    let tensor = |&(name, len): &(&str, usize)| TensorSpec {
        name: name.to_owned(),
        shape: vec![len],
        decay: true,
        frozen: name == frozen,
    };
    let unit = |name: &str, tensors: &[(&str, usize)]| UnitSpec {
        name: name.to_owned(),
        tensors: tensors.iter().map(tensor).collect(),
    };
    vec![unit("first", &[("a", 50), ("b", 70)]), unit("second", &[("c", 40)])]
}

/// What visit number `visit` of a backward pass adds to each element of a unit's tensor.
fn added(rank: usize, round: usize, visit: usize, tensor: usize) -> f32 {
    (1 + rank + 2 * round + 3 * visit + 5 * tensor) as f32
}

const WORLD: usize = 2;
const TOKENS: usize = 4;

/// One step of `rounds` rounds that visits the units in `order`; on each rank the report, the gradient's shards and the states.
fn step(
    policy: Policy,
    frozen: &str,
    order: &[usize],
    rounds: usize,
    device: &Arc<dyn Device>,
) -> Vec<(StepReport, Vec<Vec<f32>>, Vec<State>)> {
    let program = |launch: Launch| -> Result<_, Error> {
        let communicator = Arc::new(Communicator::connect(&launch, Options::default())?);
        let shards = policy.mesh(WORLD)?.shard;
        let layout = Layout::new(&units(frozen), shards).visiting(order.to_vec());
        let mut engine = Engine::new(communicator, device.clone(), layout.clone(), policy)?;
        engine.initialize(|_, _| |index: usize| index as f32)?;
        let mut step = engine.begin(rounds)?;
        for round in 0..rounds {
            step.round(TOKENS);
            for &unit in order {
                step.forward(unit)?;
            }
            for (visit, &unit) in order.iter().rev().enumerate() {
                let mut pass = step.backward(unit)?;
                for tensor in 0..layout.units[unit].tensors.len() {
                    let mut values: Vec<f32> = pass.stream.download(pass.gradients.tensor(tensor).as_view()).unwrap();
                    values.iter_mut().for_each(|value| *value += added(launch.rank, round, visit, tensor));
                    pass.stream.upload(pass.gradients.tensor(tensor), &values);
                }
            }
        }
        let agreed = step.agree(&mut [])?;
        let gradients =
            (0..layout.units.len()).map(|unit| agreed.stream().download(agreed.gradient(unit)).unwrap()).collect();
        let report = agreed.update(&ADAMW)?;
        Ok((report, gradients, (0..layout.units.len()).map(|unit| engine.state(unit)).collect::<Result<_, _>>()?))
    };
    std::thread::scope(|scope| {
        let ranks: Vec<_> = Launch::threads(WORLD).into_iter().map(|launch| scope.spawn(|| program(launch))).collect();
        ranks.into_iter().map(|rank| rank.join().unwrap().unwrap()).collect()
    })
}

const PLACEMENTS: [Sharded; 4] = [Sharded::NOTHING, Sharded::OPTIMIZER, Sharded::GRADIENTS, Sharded::EVERYTHING];

fn devices() -> [Arc<dyn Device>; 2] {
    [Arc::new(Cpu), Arc::new(LazyCpu::new(6))]
}

/// The gradient of each unit that the step should have: of each tensor the value of all of its elements.
fn expected(order: &[usize], rounds: usize, frozen: &str) -> Vec<Vec<f32>> {
    let value = |unit: usize, tensor: usize, name: &str| {
        let visits = order.iter().rev().enumerate().filter(|&(_, &other)| other == unit).map(|(visit, _)| visit);
        let all = visits.flat_map(|visit| (0..WORLD * rounds).map(move |index| (visit, index % WORLD, index / WORLD)));
        let sum: f32 = all.map(|(visit, rank, round)| added(rank, round, visit, tensor)).sum();
        if name == frozen { 0.0 } else { sum }
    };
    let unit = |(unit, spec): (usize, &UnitSpec)| {
        let tensors = spec.tensors.iter().enumerate();
        let values = tensors.flat_map(|(at, tensor)| vec![value(unit, at, &tensor.name); tensor.shape[0]]);
        values.collect::<Vec<f32>>()
    };
    units(frozen).iter().enumerate().map(unit).collect()
}

#[test]
fn a_unit_that_is_used_twice_has_the_sum_of_both_gradients_and_is_reduced_once() {
    for sharded in PLACEMENTS {
        for device in devices() {
            for rounds in [1, 2] {
                for order in [&[0, 1, 0][..], &[0, 1, 0, 1], &[1, 0, 0]] {
                    let ranks = step(Policy { sharded, ..Policy::default() }, "", order, rounds, &device);
                    let expected = expected(order, rounds, "");
                    for (unit, expected) in expected.iter().enumerate() {
                        let shards = if sharded == Sharded::NOTHING { 1 } else { WORLD };
                        let mut found: Vec<f32> =
                            ranks[..shards].iter().flat_map(|rank| rank.1[unit].clone()).collect();
                        found.truncate(expected.len());
                        assert_eq!(&found, expected, "{sharded}, order {order:?}, {rounds} rounds");
                    }
                    let square: f64 = expected.iter().flatten().map(|&x| f64::from(x) * f64::from(x)).sum();
                    assert_eq!(ranks[0].0.square_norm, square);
                    // A group's norm is that of its whole gradient, which two visits have added up.
                    let groups = if sharded.gradients { rounds } else { 1 };
                    let of_group = |rank: usize, group: usize| {
                        let rounds = if groups == 1 { 0..rounds } else { group..group + 1 };
                        let tokens = (TOKENS * rounds.len()) as f64;
                        let mut square = 0.0;
                        for (unit, spec) in units("").iter().enumerate() {
                            for (at, tensor) in spec.tensors.iter().enumerate() {
                                let visits = order.iter().rev().enumerate().filter(|&(_, &other)| other == unit);
                                let visits =
                                    visits.flat_map(|(visit, _)| rounds.clone().map(move |round| (visit, round)));
                                let sum: f32 = visits.map(|(visit, round)| added(rank, round, visit, at)).sum();
                                square += tensor.shape[0] as f64 * f64::from(sum) * f64::from(sum);
                            }
                        }
                        square / tokens
                    };
                    let all = (0..WORLD).flat_map(|rank| (0..groups).map(move |group| (rank, group)));
                    let sum: f64 = all.map(|(rank, group)| of_group(rank, group)).sum();
                    assert_eq!(ranks[0].0.group_square_norms, Some(sum), "{sharded}, order {order:?}");
                }
            }
        }
    }
}

#[test]
fn a_frozen_tensor_stays_as_it_is_and_counts_nowhere() {
    for sharded in PLACEMENTS {
        for weights in [DType::F32, DType::Bf16] {
            for device in devices() {
                let policy = Policy { sharded, weights, clip: None, ..Policy::default() };
                let layout = Layout::new(&units("b"), policy.mesh(WORLD).unwrap().shard);
                let ranks = step(policy, "b", &[0, 1], 2, &device);
                let expected = expected(&[0, 1], 2, "b");
                let square: f64 = expected.iter().flatten().map(|&x| f64::from(x) * f64::from(x)).sum();
                for (rank, (report, gradients, states)) in ranks.iter().enumerate() {
                    assert_eq!(report.square_norm, square, "{sharded}");
                    for unit in 0..layout.units.len() {
                        let shard = rank % layout.shards;
                        for piece in layout.pieces(unit, shard) {
                            let frozen = layout.units[unit].tensors[piece.tensor].frozen;
                            for (in_tensor, at) in piece.in_tensor.zip(piece.in_shard) {
                                let State { master, states } = &states[unit];
                                let unchanged =
                                    master[at] == in_tensor as f32 && states.iter().all(|kept| kept[at] == 0.0);
                                assert_eq!(unchanged, frozen, "{sharded}, element {in_tensor} of unit {unit}");
                                assert_eq!(gradients[unit][at] == 0.0, frozen);
                            }
                        }
                    }
                }
            }
        }
    }
}
