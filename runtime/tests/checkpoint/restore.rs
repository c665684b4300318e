//! What was saved comes back, bit for bit.

use std::fs;
use std::sync::Arc;

use pillion_kernels::{Cpu, DType, Device, LazyCpu, random};
use pillion_runtime::checkpoint;
use pillion_runtime::{Engine, Gather, Layout, Policy, Sharded};
use proptest::prelude::*;
use safetensors::SafeTensors;
use serde_json::{Value, json};

use super::{
    assert_holds, bits, engines, expected, fill, model, names, newest, on_cpu, save_steps, train, uneven, value,
};

#[test]
fn what_any_number_of_ranks_saves_any_number_restores_bit_for_bit() {
    let dir = tempfile::tempdir().unwrap();
    for saving in 1..=4 {
        let folder = save_steps(dir.path(), saving, &[saving as u64]).remove(0);
        for loading in 1..=4 {
            for (gather, device) in
                [(Gather::Window, Arc::new(Cpu) as Arc<dyn Device>), (Gather::Copy, Arc::new(LazyCpu::new(3)))]
            {
                let policy = Policy { gather, ..Policy::default() };
                engines(loading, &uneven(), policy, device, |mut engine| {
                    fill(&mut engine, 99);
                    let checkpoint = checkpoint::open(&folder).unwrap();
                    checkpoint.load(&mut engine).unwrap();
                    assert_holds(&engine, saving as u64);
                });
            }
        }
    }
}

#[test]
fn what_any_mesh_saves_any_other_restores_bit_for_bit() {
    let dir = tempfile::tempdir().unwrap();
    let policies: Vec<(usize, Policy)> = [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4), (6, 3)]
        .into_iter()
        .flat_map(|(world, replicas)| {
            [Sharded::NOTHING, Sharded::OPTIMIZER, Sharded::EVERYTHING]
                .map(|sharded| (world, Policy { replicas, sharded, ..Policy::default() }))
        })
        .collect();
    for (step, &(world, policy)) in policies.iter().enumerate() {
        let step = step as u64;
        let saved = engines(world, &uneven(), policy, Arc::new(Cpu), |mut engine| {
            fill(&mut engine, step);
            checkpoint::save(&engine, dir.path(), step, &Value::Null).unwrap()
        });
        let (world, policy) = policies[(5 * step as usize + 2) % policies.len()];
        engines(world, &uneven(), policy, Arc::new(Cpu), |mut engine| {
            checkpoint::open(&saved[0]).unwrap().load(&mut engine).unwrap();
            assert_holds(&engine, step);
        });
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn any_model_survives_a_change_of_world(
        shapes in prop::collection::vec(prop::collection::vec(prop::collection::vec(1usize..20, 0..3), 1..5), 1..4),
        saving in 1usize..5,
        loading in 1usize..5,
    ) {
        let (units, dir) = (model(&shapes), tempfile::tempdir().unwrap());
        on_cpu(saving, &units, |mut engine| {
            fill(&mut engine, 5);
            checkpoint::save(&engine, dir.path(), 5, &Value::Null).unwrap();
        });
        let checkpoint = newest(dir.path());
        on_cpu(loading, &units, |mut engine| {
            checkpoint.load(&mut engine).unwrap();
            assert_holds(&engine, 5);
        });
        let tensors = checkpoint.tensors().unwrap();
        for tensor in units.iter().flat_map(|unit| &unit.tensors) {
            let found = tensors.master(&tensor.name).unwrap();
            let elements: usize = tensor.shape.iter().product();
            let expected = (0..elements).map(|index| value(5, 0, &tensor.name, index).to_bits());
            prop_assert!(found.iter().map(|value| value.to_bits()).eq(expected), "{}", tensor.name);
        }
    }
}

#[test]
fn a_resumed_run_goes_on_as_the_run_that_was_not_interrupted() {
    let dir = tempfile::tempdir().unwrap();
    let units = uneven();
    for weights in [DType::F32, DType::Bf16] {
        let policy = Policy { weights, ..Policy::default() };
        let states = |engine: &Engine| (0..3).map(|unit| bits(&engine.state(unit).unwrap())).collect::<Vec<_>>();
        let straight = engines(2, &units, policy, Arc::new(Cpu), |mut engine| {
            let normal = |name: &str, _: &[usize]| {
                let stream = name.len() as u64;
                move |index: usize| random::normal(1, stream, index as u64) as f32
            };
            engine.initialize(normal).unwrap();
            train(&mut engine);
            train(&mut engine);
            checkpoint::save(&engine, dir.path(), 2, &Value::Null).unwrap();
            train(&mut engine);
            (engine.updates(), states(&engine))
        });
        // Neither prefetch, nor slots, nor gathering matters.
        let other = Policy { gather: Gather::Copy, prefetch: 2, slots: 3, ..policy };
        let resumed = engines(2, &units, other, Arc::new(Cpu), |mut engine| {
            let checkpoint = newest(dir.path());
            assert_eq!(checkpoint.differences(engine.policy()), Vec::<String>::new());
            checkpoint.load(&mut engine).unwrap();
            train(&mut engine);
            (engine.updates(), states(&engine))
        });
        assert!(straight == resumed && straight[0].0 == 3, "{weights}");
    }
}

#[test]
fn the_weights_that_are_computed_with_are_those_restored() {
    let dir = tempfile::tempdir().unwrap();
    let folder = save_steps(dir.path(), 3, &[4]).remove(0);
    on_cpu(2, &uneven(), |mut engine| {
        checkpoint::open(&folder).unwrap().load(&mut engine).unwrap();
        let mut step = engine.begin_evaluation(1).unwrap();
        step.round(1);
        for (unit, spec) in uneven().iter().enumerate() {
            let forward = step.forward(unit).unwrap();
            for (index, tensor) in spec.tensors.iter().enumerate() {
                let found = forward.stream.download::<f32>(forward.weights.tensor(index)).unwrap();
                let expected = (0..found.len()).map(|at| value(4, 0, &tensor.name, at).to_bits());
                assert!(found.iter().map(|value| value.to_bits()).eq(expected), "{}", tensor.name);
            }
        }
        step.end().unwrap();
    });
}

#[test]
fn files_are_safetensors_that_hold_each_shard() {
    let dir = tempfile::tempdir().unwrap();
    let folder = save_steps(dir.path(), 2, &[10]).remove(0);
    assert_eq!(folder, dir.path().join("step-00000010"));
    let files = ["manifest.json", "rank-00000-of-00002.safetensors", "rank-00001-of-00002.safetensors"];
    assert_eq!(names(&folder), files);
    let layout = Layout::new(&uneven(), 2);
    for rank in 0..2 {
        let bytes = fs::read(folder.join(files[1 + rank])).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(tensors.len(), 9);
        for (unit, spec) in layout.units.iter().enumerate() {
            let state = expected(&layout, unit, rank, 10);
            let parts = [state.master].into_iter().chain(state.states);
            for (part, values) in ["master", "m", "v"].into_iter().zip(parts) {
                let tensor = tensors.tensor(&format!("{}.{part}", spec.name)).unwrap();
                assert_eq!(tensor.shape(), [spec.shard]);
                assert!(tensor.data() == values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>());
            }
        }
    }
}

#[test]
fn the_manifest_says_what_was_saved() {
    let dir = tempfile::tempdir().unwrap();
    let extra = json!({ "samples": u64::MAX, "noise scale": 0.1 + 0.2, "seed": [1, null, "ü"] });
    let policy = Policy { weights: DType::Bf16, clip: None, ..Policy::default() };
    engines(3, &uneven(), policy, Arc::new(Cpu), |mut engine| {
        fill(&mut engine, 6);
        checkpoint::save(&engine, dir.path(), 7, &extra).unwrap();
    });
    let checkpoint = newest(dir.path());
    assert_eq!(checkpoint.extra(), &extra);
    let manifest = &checkpoint.manifest;
    assert_eq!((manifest.step, manifest.updates, manifest.world), (7, 6, 3));
    assert_eq!((manifest.weights.as_str(), manifest.clip), ("bf16", None));
    assert_eq!(manifest.units, uneven());
    assert_eq!(checkpoint.differences(&policy), Vec::<String>::new());
    assert_eq!(checkpoint.differences(&Policy::default()).len(), 2, "the type of the weights, and the clipping");
}
