//! The model, engine and optimizer against independent references: golden files from Hugging Face and PyTorch, and finite
//! differences of a forward pass in f64.

use std::ops::ControlFlow;
use std::sync::Arc;

use pillion_collectives::{Communicator, Launch, Options};
use pillion_kernels::{AdamW, Cpu, DType, Device, LazyCpu};
use pillion_llama::config::Config;
use pillion_llama::decoder::Decoder;
use pillion_llama::generate::{Error as GenerateError, Sampling, generate};
use pillion_llama::huggingface::parse_config;
use pillion_llama::model::{Model, Recompute};
use pillion_runtime::{Engine, Gather, Policy};
use pillion_tests::golden::Golden;
use pillion_tests::reference::{self, Parameters};

/// Required of every tensor: ‖a − b‖ / ‖b‖. Rounding explains about 1e-6 (each golden file states its own distance from f64).
const TOLERANCE: f64 = 1e-4;

fn config(golden: &Golden) -> Config {
    parse_config(&golden.metadata("config").to_string()).expect("a configuration that we compute")
}

fn distance(ours: impl IntoIterator<Item = f64>, theirs: impl IntoIterator<Item = f64>) -> f64 {
    let (mut difference, mut norm, mut count) = (0.0, 0.0, 0);
    let mut theirs = theirs.into_iter();
    for ours in ours {
        let theirs = theirs.next().expect("as many values");
        difference += (ours - theirs) * (ours - theirs);
        norm += theirs * theirs;
        count += 1;
    }
    assert!(theirs.next().is_none() && count > 0 && norm > 0.0, "tensors have one shape and are not zero");
    (difference / norm).sqrt()
}

/// What a rank has after some steps: by tensor, master weights, first and second moment of the part that it owns.
#[derive(Default)]
struct Result {
    logits: Vec<f32>,
    losses: Vec<f64>,
    norms: Vec<f64>,
    /// (tensor, first element, [master, m, v]).
    pieces: Vec<(String, usize, [Vec<f32>; 3])>,
}

struct Batch {
    tokens: Vec<u32>,
    targets: Vec<u32>,
    batch: usize,
    seq: usize,
}

impl Batch {
    fn of(golden: &Golden, suffix: &str) -> Batch {
        let shape = golden.shape(&format!("tokens{suffix}"));
        Batch {
            tokens: golden.tokens(&format!("tokens{suffix}")),
            targets: golden.tokens(&format!("targets{suffix}")),
            batch: shape[0],
            seq: shape[1],
        }
    }
}

/// Trains on `batches`, one a step, each sequence a micro-batch of its own dealt to the ranks in turn.
fn train(
    config: &Config,
    parameters: &Parameters,
    world: usize,
    device: fn() -> Arc<dyn Device>,
    policy: Policy,
    batches: &[Batch],
    settings: AdamW,
) -> Vec<Result> {
    let steps: Vec<(&Batch, AdamW)> = batches.iter().map(|batch| (batch, settings)).collect();
    train_steps(config, parameters, world, device, policy, &steps)
}

/// The same with settings of their own for each step.
fn train_steps(
    config: &Config,
    parameters: &Parameters,
    world: usize,
    device: fn() -> Arc<dyn Device>,
    policy: Policy,
    steps: &[(&Batch, AdamW)],
) -> Vec<Result> {
    std::thread::scope(|scope| {
        let ranks = Launch::threads(world).into_iter().map(|launch| {
            scope.spawn(move || {
                let communicator = Arc::new(Communicator::connect(&launch, Options::default()).unwrap());
                let device = device();
                let layout = config.layout(world);
                let mut engine = Engine::new(communicator, device.clone(), layout, policy).unwrap();
                engine
                    .initialize(|name, _| {
                        let values = &parameters[name];
                        move |index: usize| values[index] as f32
                    })
                    .unwrap();
                let seq = steps[0].0.seq;
                let mut model = Model::new(&*device, config, policy.weights, 1, seq, Recompute::None).unwrap();
                let mut result = Result::default();
                for sequence in steps[0].0.tokens.chunks_exact(seq) {
                    let mut step = engine.begin_evaluation(1).unwrap();
                    result.logits.extend(model.logits(&mut step, sequence, None).unwrap());
                    step.end().unwrap();
                }
                for &(batch, settings) in steps {
                    let rounds = batch.batch.div_ceil(world);
                    let mut step = engine.begin(rounds).unwrap();
                    for round in 0..rounds {
                        let index = round * world + launch.rank;
                        if index >= batch.batch {
                            step.idle_round().unwrap();
                            continue;
                        }
                        let rows = index * seq..(index + 1) * seq;
                        model.train(&mut step, &batch.tokens[rows.clone()], &batch.targets[rows], None).unwrap();
                    }
                    let report = step.finish(&settings, &mut []).unwrap();
                    result.losses.push(report.loss_sum / report.tokens);
                    result.norms.push(report.gradient_norm);
                }
                let layout = engine.layout().clone();
                for (index, unit) in layout.units.iter().enumerate() {
                    let state = engine.state(index).unwrap();
                    for piece in layout.pieces(index, launch.rank) {
                        let part = |values: &[f32]| values[piece.in_shard.clone()].to_vec();
                        let name = unit.tensors[piece.tensor].name.clone();
                        let parts = [part(&state.master), part(&state.states[0]), part(&state.states[1])];
                        result.pieces.push((name, piece.in_tensor.start, parts));
                    }
                }
                result
            })
        });
        let ranks: Vec<_> = ranks.collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

/// Whole tensors from all ranks' pieces: `which` is 0 for master weights, 1 and 2 for the moments.
fn assembled(results: &[Result], like: &Parameters, which: usize) -> Parameters {
    let mut tensors: Parameters =
        like.iter().map(|(name, values)| (name.clone(), vec![f64::NAN; values.len()])).collect();
    for (name, start, parts) in results.iter().flat_map(|result| &result.pieces) {
        let tensor = tensors.get_mut(name).unwrap_or_else(|| panic!("the golden file has no {name}"));
        for (out, &value) in tensor[*start..].iter_mut().zip(&parts[which]) {
            *out = f64::from(value);
        }
    }
    tensors
}

fn assert_close(what: &str, ours: &Parameters, theirs: &Parameters, tolerance: f64) {
    for (name, theirs) in theirs {
        let distance = distance(ours[name].iter().copied(), theirs.iter().copied());
        assert!(distance < tolerance, "{what} of {name}: {distance:e}");
    }
}

fn cpu() -> Arc<dyn Device> {
    Arc::new(Cpu)
}

fn lazy_cpu() -> Arc<dyn Device> {
    Arc::new(LazyCpu::new(3))
}

fn policy(clip: Option<f64>) -> Policy {
    Policy { clip, ..Policy::default() }
}

/// With β₁ = 0 the first moment is the mean gradient itself.
const GRADIENT: AdamW = AdamW { lr: 0.0, beta1: 0.0, beta2: 0.0, epsilon: 1e-8, weight_decay: 0.0 };

#[test]
fn logits_loss_and_every_gradient_match_hugging_face() {
    for name in ["mha", "gqa", "relative"] {
        let golden = Golden::load(name);
        let parameters = golden.by_parameter("param");
        let batch = Batch::of(&golden, "");
        for (world, device) in [(1, cpu as fn() -> Arc<dyn Device>), (2, cpu), (3, cpu), (2, lazy_cpu)] {
            let batches = std::slice::from_ref(&batch);
            let results = train(&config(&golden), &parameters, world, device, policy(None), batches, GRADIENT);
            for result in &results {
                let logits = distance(
                    result.logits.iter().map(|&x| f64::from(x)),
                    golden.f32("logits").into_iter().map(f64::from),
                );
                assert!(logits < TOLERANCE, "{name} at world {world}: logits {logits:e}");
                let loss = f64::from(golden.f32("loss")[0]);
                assert!((result.losses[0] - loss).abs() < TOLERANCE * loss, "{} against {loss}", result.losses[0]);
            }
            let gradients = golden.by_parameter("grad");
            assert_close("gradient", &assembled(&results, &gradients, 1), &gradients, TOLERANCE);
        }
    }
}

/// An engine of one rank with these weights, for forward passes.
fn evaluating(config: &Config, parameters: &Parameters) -> Engine {
    let communicator = Arc::new(Communicator::connect(&Launch::single(), Options::default()).unwrap());
    let mut engine = Engine::new(communicator, Arc::new(Cpu), config.layout(1), Policy::default()).unwrap();
    engine
        .initialize(|name, _| {
            let values = &parameters[name];
            move |index: usize| values[index] as f32
        })
        .unwrap();
    engine
}

#[test]
fn logits_with_kept_keys_and_values_match_hugging_face() {
    for name in ["mha", "gqa", "relative"] {
        let golden = Golden::load(name);
        let (config, batch) = (config(&golden), Batch::of(&golden, ""));
        let mut engine = evaluating(&config, &golden.by_parameter("param"));
        let mut decoder = Decoder::new(&Cpu, &config, DType::F32, batch.seq).unwrap();
        let rows = golden.f32("logits");
        for (sequence, tokens) in batch.tokens.chunks_exact(batch.seq).enumerate() {
            decoder.clear();
            // Pieces of 1, 2, 3, … tokens.
            let (mut first, mut piece) = (0, 1);
            while first < batch.seq {
                let end = (first + piece).min(batch.seq);
                let mut step = engine.begin_evaluation(1).unwrap();
                let logits = decoder.feed(&mut step, &tokens[first..end]).unwrap();
                step.end().unwrap();
                let row = (sequence * batch.seq + end - 1) * config.vocab_size;
                let theirs = &rows[row..row + config.vocab_size];
                let apart = distance(logits.iter().map(|&x| f64::from(x)), theirs.iter().map(|&x| f64::from(x)));
                assert!(apart < TOLERANCE, "{name}, tokens {first}..{end}: {apart:e}");
                (first, piece) = (end, piece + 1);
            }
        }
    }
}

#[test]
fn a_text_beyond_the_capacity_goes_on_from_its_last_half() {
    let golden = Golden::load("relative");
    let (config, prompt) = (config(&golden), [3, 1, 4]);
    let (capacity, count) = (8, 30);
    let mut engine = evaluating(&config, &golden.by_parameter("param"));
    let sampling = Sampling { temperature: 0.0, ..Sampling::default() };
    let mut decoder = Decoder::new(&Cpu, &config, DType::F32, capacity).unwrap();
    let mut written = Vec::new();
    generate(&mut engine, &mut decoder, config.vocab_size, &prompt, count, &sampling, |token| {
        written.push(token);
        Ok::<_, GenerateError>(ControlFlow::Continue(()))
    })
    .unwrap();
    // By whole forward passes over what the model may see.
    let mut model = Model::new(&Cpu, &config, DType::F32, 1, capacity, Recompute::None).unwrap();
    let mut seen = prompt.to_vec();
    for (index, &token) in written.iter().enumerate() {
        let mut inputs = seen.clone();
        inputs.resize(capacity, 0);
        let mut step = engine.begin_evaluation(1).unwrap();
        let logits = model.logits(&mut step, &inputs, None).unwrap();
        step.end().unwrap();
        let last = &logits[(seen.len() - 1) * config.vocab_size..][..config.vocab_size];
        let likeliest = (0..last.len()).max_by(|&a, &b| last[a].total_cmp(&last[b])).unwrap();
        assert_eq!(token, likeliest as u32, "token {index}");
        seen.push(token);
        if seen.len() > capacity {
            seen.drain(..seen.len() - capacity / 2);
        }
    }
}

#[test]
fn bf16_lies_as_near_to_f64_as_that_of_pytorch() {
    for name in ["mha", "gqa", "relative"] {
        let golden = Golden::load(name);
        let round = |x: &f64| f64::from(half::bf16::from_f32(*x as f32));
        let parameters = golden.by_parameter("param");
        let rounded: Parameters =
            parameters.iter().map(|(name, values)| (name.clone(), values.iter().map(round).collect())).collect();
        let batches = [Batch::of(&golden, "")];
        let run = |weights, gather| {
            let policy = Policy { weights, gather, ..policy(None) };
            let results = train(&config(&golden), &rounded, 2, cpu, policy, &batches, GRADIENT);
            let logits: Vec<f64> = results[0].logits.iter().map(|&x| f64::from(x)).collect();
            (logits, results[0].losses.clone(), assembled(&results, &rounded, 1))
        };
        // f32 is a thousand times nearer to f64 than bf16 (the file's distances), so it stands for f64.
        let exact = run(DType::F32, Gather::Window);
        let narrow = run(DType::Bf16, Gather::Window);
        assert!(run(DType::Bf16, Gather::Copy) == narrow, "how weights are gathered changes no bit");
        let logits = distance(narrow.0.iter().copied(), exact.0.iter().copied());
        let theirs = golden.bf16_distance("logits").rms;
        assert!(logits > 1e-4, "no bf16 was computed with: {logits:e}");
        assert!(logits < theirs, "{name}: logits are {logits:e} off, PyTorch's {theirs:e}");
        // Of all tensors together, since which of two roundings hits a single one harder is chance.
        let (mut ours, mut theirs) = (0.0, 0.0);
        for (tensor, exact) in &exact.2 {
            let off = distance(narrow.2[tensor].iter().copied(), exact.iter().copied());
            let of_pytorch = golden.bf16_distance(&format!("grad.{tensor}")).rms;
            (ours, theirs) = (ours + off * off, theirs + of_pytorch * of_pytorch);
            assert!(
                off < 2.0 * of_pytorch,
                "{name}: the gradient of {tensor} is {off:e} off, PyTorch's {of_pytorch:e}"
            );
        }
        assert!(ours < theirs, "{name}: gradients are {:e} off, PyTorch's {:e}", ours.sqrt(), theirs.sqrt());
    }
}

#[test]
fn three_clipped_adamw_steps_match_pytorch() {
    let (start, golden) = (Golden::load("mha"), Golden::load("adamw"));
    let parameters = start.by_parameter("param");
    let batches: Vec<Batch> = (0..3).map(|step| Batch::of(&golden, &format!(".{step}"))).collect();
    let settings = AdamW { lr: 1e-2, beta1: 0.9, beta2: 0.95, epsilon: 1e-8, weight_decay: 0.1 };
    for world in [1, 2, 4] {
        let results = train(&config(&start), &parameters, world, cpu, policy(Some(1.0)), &batches, settings);
        for step in 0..3 {
            for (what, ours) in [("loss", results[0].losses[step]), ("norm", results[0].norms[step])] {
                let theirs = f64::from(golden.f32(&format!("{what}.{step}"))[0]);
                assert!((ours - theirs).abs() < TOLERANCE * theirs, "{what} of step {step}: {ours} against {theirs}");
            }
        }
        for (which, kind) in ["param", "exp_avg", "exp_avg_sq"].into_iter().enumerate() {
            let theirs = golden.by_parameter(kind);
            assert_close(kind, &assembled(&results, &theirs, which), &theirs, TOLERANCE);
        }
    }
}

/// The 50 steps of the golden file, whose settings `change` may alter step by step, and their
/// losses.
fn fifty_losses(world: usize, clip: f64, change: impl Fn(&mut AdamW, usize)) -> Vec<f64> {
    let (start, golden) = (Golden::load("mha"), Golden::load("losses"));
    let batches: Vec<Batch> = (0..5).map(|number| Batch::of(&golden, &format!(".{number}"))).collect();
    let optimizer = golden.metadata("optimizer");
    let number = |value: &serde_json::Value| value.as_f64().expect("a number") as f32;
    let steps: Vec<(&Batch, AdamW)> = golden
        .f64("lr")
        .iter()
        .enumerate()
        .map(|(step, &lr)| {
            let mut settings = AdamW {
                lr: lr as f32,
                beta1: number(&optimizer["betas"][0]),
                beta2: number(&optimizer["betas"][1]),
                epsilon: number(&optimizer["eps"]),
                weight_decay: number(&optimizer["weight_decay_matrices"]),
            };
            change(&mut settings, step);
            (&batches[step % batches.len()], settings)
        })
        .collect();
    let parameters = start.by_parameter("param");
    let mut results = train_steps(&config(&start), &parameters, world, cpu, policy(Some(clip)), &steps);
    results.swap_remove(0).losses
}

/// The largest difference from the f64 losses, of what a correct run may have: 4 times the largest
/// of three PyTorch f32 runs, whose sums differ in order as ours do from each of theirs.
fn against_fifty_losses(losses: &[f64]) -> f64 {
    let golden = Golden::load("losses");
    let deviations = golden.metadata("deviation").as_object().expect("one for each run");
    assert_eq!(deviations.len(), 3);
    let largest = deviations.values().map(|value| value.as_f64().expect("a number")).fold(0.0, f64::max);
    let exact = golden.f64("loss.f64");
    assert_eq!((losses.len(), exact.len()), (50, 50));
    assert!(exact[49] < 0.5 * exact[0], "the model must learn for the test to mean something");
    losses.iter().zip(&exact).map(|(ours, exact)| (ours - exact).abs()).fold(0.0, f64::max) / (4.0 * largest)
}

#[test]
fn losses_follow_those_of_pytorch_over_fifty_steps() {
    for world in [1, 2, 4] {
        let apart = against_fifty_losses(&fifty_losses(world, 1.0, |_, _| {}));
        println!("{world} ranks: {apart:.2} of the bound");
        assert!(apart <= 1.0, "{world} ranks: {apart} times the bound");
    }
}

/// A mistake: its name, where it clips, and what it changes in the settings of each step.
type Mistake = (&'static str, f64, fn(&mut AdamW, usize));

/// Small mistakes, each of which leaves a run that learns as well.
#[test]
fn fifty_losses_tell_small_mistakes() {
    let mistakes: [Mistake; 8] = [
        ("β₁ of 0.901", 1.0, |settings, _| settings.beta1 = 0.901),
        ("β₂ of 0.951", 1.0, |settings, _| settings.beta2 = 0.951),
        ("ε of 1e-7", 1.0, |settings, _| settings.epsilon = 1e-7),
        ("weight decay of 0.101", 1.0, |settings, _| settings.weight_decay = 0.101),
        ("clipping at 1.001", 1.001, |_, _| {}),
        // Moments that are not divided by 1 − β^t: a smaller step, but for ε, and the same decay.
        ("no bias correction", 1.0, |settings, step| {
            let of_zero = |beta: f32| 1.0 - beta.powi(step as i32 + 1);
            let factor = of_zero(settings.beta1) / of_zero(settings.beta2).sqrt();
            settings.lr *= factor;
            settings.weight_decay /= factor;
        }),
        ("a rate one per mille too high", 1.0, |settings, _| settings.lr *= 1.001),
        ("no decay in the last step but one", 1.0, |settings, step| {
            if step == 48 {
                settings.weight_decay = 0.0;
            }
        }),
    ];
    for (mistake, clip, change) in mistakes {
        let apart = against_fifty_losses(&fifty_losses(1, clip, change));
        println!("{mistake}: {apart:.1} times the bound");
        assert!(apart > 2.0, "{mistake} is not seen: {apart} times the bound");
    }
}

#[test]
fn gradients_are_the_slopes_of_the_loss_in_f64() {
    let golden = Golden::load("gqa");
    let shape = golden.config();
    let parameters = golden.by_parameter("param");
    let batch = Batch::of(&golden, "");
    let batches = std::slice::from_ref(&batch);
    let results = train(&config(&golden), &parameters, 2, cpu, policy(None), batches, GRADIENT);
    let gradients = assembled(&results, &parameters, 1);
    // Along each tensor alone, in the direction of our own gradient: there the slope is its norm, the largest there is, so that an error
    // in any element shows.
    for (name, gradient) in &gradients {
        let norm = gradient.iter().map(|x| x * x).sum::<f64>().sqrt();
        let direction = |tensor: &String, values: &Vec<f64>| {
            let unit = |index: usize| if tensor == name { gradient[index] / norm } else { 0.0 };
            (tensor.clone(), (0..values.len()).map(unit).collect())
        };
        let direction: Parameters = parameters.iter().map(|(tensor, values)| direction(tensor, values)).collect();
        let Batch { tokens, targets, batch, seq } = &batch;
        let slope =
            reference::finite_difference(&shape, &parameters, tokens, targets, None, *batch, *seq, &direction, 1e-5);
        assert!((slope - norm).abs() < TOLERANCE * norm, "{name}: slope {slope}, gradient's norm {norm}");
    }
}
