//! Checkpoints of optimizers that keep more or less for each weight than AdamW does.

use std::sync::Arc;

use pillion_kernels::Cpu;
use pillion_runtime::{Policy, State, checkpoint};
use serde_json::Value;

use super::{engines, uneven};

const KEPT: [&[&str]; 4] = [&[], &["velocity"], &["m", "v"], &["a", "b", "c"]];

fn policy(states: &'static [&'static str]) -> Policy {
    Policy { states, ..Policy::default() }
}

#[test]
fn any_number_of_states_is_saved_and_restored_at_any_number_of_ranks() {
    for states in KEPT {
        let dir = tempfile::tempdir().unwrap();
        let number = |unit: usize, part: usize, element: usize| (1000 * unit + 100 * part + element % 97) as f32;
        let saved = engines(3, &uneven(), policy(states), Arc::new(Cpu), |mut engine| {
            let layout = engine.layout().clone();
            for (index, unit) in layout.units.iter().enumerate() {
                let mut parts = vec![vec![0.0; unit.shard]; 1 + states.len()];
                let first = engine.shard_number() * unit.shard;
                for (part, values) in parts.iter_mut().enumerate() {
                    let own = values.iter_mut().enumerate().filter(|(at, _)| first + at < unit.len);
                    own.for_each(|(at, value)| *value = number(index, part, first + at));
                }
                let master = parts.remove(0);
                engine.set_state(index, &State { master, states: parts }).unwrap();
            }
            checkpoint::save(&engine, dir.path(), 1, &Value::Null).unwrap()
        });
        let checkpoint = checkpoint::open(&saved[0]).unwrap();
        assert_eq!(checkpoint.manifest.states, states);
        engines(2, &uneven(), policy(states), Arc::new(Cpu), |mut engine| {
            checkpoint.load(&mut engine).unwrap();
            for (index, unit) in engine.layout().units.iter().enumerate() {
                let State { master, states: kept } = engine.state(index).unwrap();
                assert_eq!(kept.len(), states.len());
                let first = engine.shard_number() * unit.shard;
                for (part, values) in [master].iter().chain(&kept).enumerate() {
                    let own = values.iter().enumerate().filter(|(at, _)| first + at < unit.len);
                    own.for_each(|(at, &value)| assert_eq!(value, number(index, part, first + at)));
                }
            }
        });
        // Another optimizer's numbers mean something else.
        for others in KEPT.into_iter().filter(|&others| others != states) {
            engines(2, &uneven(), policy(others), Arc::new(Cpu), |mut engine| {
                let error = checkpoint.load(&mut engine).unwrap_err().to_string();
                assert!(error.contains(&format!("{states:?}")) && error.contains(&format!("{others:?}")), "{error}");
                assert!(engine.begin(1).is_ok(), "nothing was changed");
            });
        }
    }
}

#[test]
fn memory_counts_what_the_optimizer_keeps() {
    for states in KEPT {
        engines(2, &uneven(), policy(states), Arc::new(Cpu), |engine| {
            let shards: usize = engine.layout().units.iter().map(|unit| unit.shard).sum();
            assert_eq!(engine.memory().moments, (4 * states.len() * shards) as u64);
            let predicted = pillion_runtime::Memory::of(engine.layout(), engine.policy(), engine.mesh());
            assert_eq!(predicted.moments, engine.memory().moments);
        });
    }
}
