//! What a model keeps: it allocates what was predicted, in one allocation. What it computes again
//! instead of keeping it costs the operations that were predicted, and changes no bit.

use std::fs;
use std::sync::{Arc, Mutex};

use pillion_collectives::{Communicator, Launch, Options};
use pillion_kernels::cpu::Profile;
use pillion_kernels::{AdamW, Buffer, Cores, Cpu, DType, Device, Error, LazyCpu, Region, Stream};
use pillion_llama::config::Config;
use pillion_llama::model::{Model, Recompute};
use pillion_runtime::{Engine, Policy};
use pillion_tests::program::Workplace;

const PROGRAM: &str = env!("CARGO_BIN_EXE_pillion-under-test");
const MODES: [Recompute; 3] = [Recompute::None, Recompute::Attention, Recompute::Block];

/// Notes what is allocated, and has another device do it.
struct Counting<D> {
    inner: D,
    /// Bytes of each allocation.
    allocations: Mutex<Vec<u64>>,
}

// SAFETY: its streams and memory are those of the other device.
unsafe impl<D: Device> Device for Counting<D> {
    fn name(&self) -> &'static str {
        "counting"
    }

    fn allocate(&self, dtype: DType, len: usize) -> Result<Buffer, Error> {
        let buffer = self.inner.allocate(dtype, len)?;
        self.allocations.lock().expect("no allocation panics").push(buffer.bytes() as u64);
        Ok(buffer)
    }

    fn stream(&self) -> Box<dyn Stream> {
        self.inner.stream()
    }

    fn take_in(&self, region: Region) -> Result<Region, Error> {
        self.inner.take_in(region)
    }
}

fn config(vocab: usize, layers: usize) -> Config {
    Config {
        vocab_size: vocab,
        hidden_size: 24,
        intermediate_size: 40,
        num_hidden_layers: layers,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        rms_norm_eps: 1e-5,
        rope_theta: 1e4,
        rope_scaling: None,
        head_dim: None,
        tie_word_embeddings: false,
    }
}

fn allocated(inner: impl Device, shape: (&Config, DType, usize, usize, Recompute)) -> Vec<u64> {
    let (config, dtype, batch, seq, recompute) = shape;
    let device = Counting { inner, allocations: Mutex::default() };
    Model::new(&device, config, dtype, batch, seq, recompute).unwrap();
    device.allocations.into_inner().unwrap()
}

#[test]
fn a_model_makes_one_allocation_of_the_predicted_bytes() {
    for config in [config(61, 1), config(257, 5)] {
        for dtype in [DType::F32, DType::Bf16] {
            // One token; odd numbers of them; more than have logits at a time.
            for (batch, seq) in [(1, 1), (3, 7), (5, 128)] {
                let predicted = MODES.map(|mode| Model::activation_bytes(&config, dtype, batch, seq, mode));
                for (mode, predicted) in MODES.into_iter().zip(predicted) {
                    let shape = (&config, dtype, batch, seq, mode);
                    assert_eq!(allocated(Cpu, shape), [predicted], "{dtype}, {batch} × {seq}, {mode:?}");
                    assert_eq!(allocated(LazyCpu::new(1), shape), [predicted], "{dtype}, {batch} × {seq}, {mode:?}");
                }
                // A single block has nothing to share.
                match config.num_hidden_layers {
                    1 => assert_eq!(predicted, [predicted[0]; 3]),
                    _ => assert!(predicted.is_sorted_by(|more, less| more > less), "{predicted:?}"),
                }
            }
        }
    }
}

/// Floating-point operations of the forward kernels in a step: of products with weights, and of
/// attention.
fn forward_flops(config: &Config, batch: usize, seq: usize, recompute: Recompute) -> [f64; 2] {
    let profile = Arc::new(Profile::default());
    let device: Arc<dyn Device> = Arc::new(Cores::default().profiled(profile.clone()));
    let communicator = Arc::new(Communicator::connect(&Launch::single(), Options::default()).unwrap());
    let (layout, policy) = (config.layout(1), Policy::default());
    let mut engine = Engine::new(communicator, device.clone(), layout, policy).unwrap();
    engine.initialize(|name, shape| config.initial_values(1, None, name, shape)).unwrap();
    let mut model = Model::new(&*device, config, policy.weights, batch, seq, recompute).unwrap();
    let tokens = vec![3; batch * seq];
    let mut step = engine.begin(1).unwrap();
    model.train(&mut step, &tokens, &tokens, None).unwrap();
    let settings = AdamW { lr: 1e-3, beta1: 0.9, beta2: 0.95, epsilon: 1e-8, weight_decay: 0.1 };
    step.finish(&settings, &mut []).unwrap();
    let kernels = profile.take();
    let of = |name: &str| kernels.iter().find(|kernel| kernel.name == name).unwrap().flops as f64;
    [of("linear"), of("attention")]
}

#[test]
fn what_is_computed_again_takes_the_predicted_operations() {
    let (config, batch, seq) = (config(61, 4), 2, 12);
    let tokens = (batch * seq) as f64;
    let none = forward_flops(&config, batch, seq, Recompute::None);
    for mode in MODES {
        let counted = forward_flops(&config, batch, seq, mode);
        let predicted = |seq: usize| tokens * config.recomputed_flops(seq, mode).iter().sum::<f64>();
        assert_eq!(counted[0] - none[0], predicted(0), "products of {mode:?}");
        // Predictions count half of all pairs of tokens; the kernel counts each with itself, too.
        let attention = (predicted(seq) - predicted(0)) * (seq + 1) as f64 / seq as f64;
        assert!((counted[1] - none[1] - attention).abs() < 0.5, "attention of {mode:?}: {counted:?}");
        assert_eq!(mode == Recompute::None, predicted(seq) == 0.0);
    }
}

const MORE_BLOCKS: &str = "--layers 3 --ranks 2 --steps 6 --eta 0.35 --max-batch 32 --validate-every 3";

/// Names and contents of the files of a run's last checkpoint, by name.
fn checkpoint(place: &Workplace, out: &str) -> Vec<(String, Vec<u8>)> {
    let newest = place.checkpoints(out).pop().expect("a run saves at its end");
    let files = fs::read_dir(place.path(out).join("checkpoints").join(newest)).unwrap();
    let read = |file: fs::DirEntry| {
        (file.file_name().to_string_lossy().into_owned(), fs::read(file.path()).expect("a file of the checkpoint"))
    };
    let mut files: Vec<_> = files.map(|file| read(file.unwrap())).collect();
    files.sort();
    files
}

#[test]
fn every_way_to_compute_again_and_any_bucket_give_the_same_losses_and_checkpoints() {
    for precision in ["f32", "bf16"] {
        let place = Workplace::new(PROGRAM);
        let base = format!("{MORE_BLOCKS} --precision {precision}");
        let (expected, saved) = (place.train("base", &base), checkpoint(&place, "base"));
        assert_eq!(expected.len(), 6);
        assert!(saved.len() > 2, "files of two ranks and a manifest");
        let ways = [
            "block",
            "attention",
            "block --device lazy-cpu",
            "attention --device lazy-cpu --gather copy",
            "none --bucket 300KB",
        ];
        for (number, way) in ways.into_iter().enumerate() {
            let out = format!("way-{number}");
            assert_eq!(expected, place.train(&out, &format!("{base} --recompute {way}")), "{precision}, {way}");
            assert!(saved == checkpoint(&place, &out), "{precision}, {way}: another checkpoint");
        }
    }
}

#[test]
fn a_resume_computes_again_what_it_likes() {
    let place = Workplace::new(PROGRAM);
    let expected = place.train("whole", MORE_BLOCKS);
    let steps = |steps: u64| MORE_BLOCKS.replace("--steps 6", &format!("--steps {steps}"));
    place.train("parts", &format!("{} --recompute block", steps(2)));
    place.train("parts", &format!("{} --resume auto --recompute attention", steps(4)));
    // Not given, it is none again.
    let found = place.train("parts", &format!("{} --resume auto", steps(6)));
    let numbers = |steps: &[pillion_tests::program::Step]| {
        steps.iter().map(|step| (step.step, step.loss, step.grad_norm, step.batch_samples)).collect::<Vec<_>>()
    };
    assert_eq!(numbers(&expected), numbers(&found));
    assert!(checkpoint(&place, "whole") == checkpoint(&place, "parts"));
}

#[test]
fn a_plan_shows_what_is_saved_and_what_it_costs() {
    let place = Workplace::new(PROGRAM);
    let plan = |flags: &str| {
        let flags = format!("plan --model llama2-7b --ranks 8 --flops 400T --link 50GB/s {flags}");
        let printed = place.run(&flags).succeeded().stdout;
        let json = place.run(&format!("{flags} --json")).succeeded().stdout;
        (printed, serde_json::from_str::<serde_json::Value>(&json).expect("one JSON object"))
    };
    let [none, attention, block] =
        ["--seq 4096", "--seq 4096 --recompute attention", "--seq 4096 --recompute block"].map(plan);
    for (printed, said) in [
        (&attention.0, "attention is computed again in the backward pass"),
        (&block.0, "all blocks but the last are computed again in the backward pass"),
    ] {
        assert!(printed.contains(said) && printed.contains("FLOP more compute activations again"), "{printed}");
        assert!(!none.0.contains("again"), "{}", none.0);
    }
    let number = |(_, json): &(String, serde_json::Value), path: &str| json.pointer(path).unwrap().as_f64().unwrap();
    let plans = [&none, &attention, &block];
    for path in ["/activations", "/total", "/simulation/given/memory"] {
        assert!(plans.is_sorted_by(|more, less| number(more, path) > number(less, path)), "{path}");
    }
    let seconds = |plan| number(plan, "/simulation/given/computing");
    for (plan, name) in plans.into_iter().zip(["none", "attention", "block"]) {
        assert_eq!(plan.1["recompute"], name);
        // Computing in it, at 400 TFLOP/s, is longer by just that.
        let more = number(plan, "/simulation/given/recomputed_flops") / 400e12;
        let rounding = 1e-9 * seconds(&none);
        assert!((seconds(plan) - seconds(&none) - more).abs() < rounding, "{name}: {}", plan.1);
    }
    assert!(seconds(&attention) > seconds(&none) && seconds(&block) > seconds(&attention));
}
