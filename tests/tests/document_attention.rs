//! Attention within documents: the model against a reference in f64 that masks scores, what a
//! document knows of its neighbours, and `pillion train --document-attention`.

use std::collections::BTreeMap;
use std::fs;
use std::sync::Arc;

use pillion_collectives::{Communicator, Launch, Options};
use pillion_kernels::{AdamW, Cpu, DType, Device, Documents, IGNORED, LazyCpu};
use pillion_llama::config::Config;
use pillion_llama::huggingface::parse_config;
use pillion_llama::model::{Model, Recompute};
use pillion_runtime::{Engine, Policy};
use pillion_tests::golden::Golden;
use pillion_tests::program::{Step, Workplace};
use pillion_tests::reference::{self, Parameters};

const PROGRAM: &str = env!("CARGO_BIN_EXE_pillion-under-test");

/// Required of numbers that f32 and f64 make: |a − b| / |b|, as in `golden.rs`.
const TOLERANCE: f64 = 1e-4;

/// What one rank makes of a micro-batch.
#[derive(PartialEq)]
struct Made {
    logits: Vec<f32>,
    loss: f64,
    gradients: BTreeMap<String, Vec<f32>>,
}

/// A model with the weights of a golden file.
struct Setup {
    golden: Golden,
    config: Config,
    parameters: Parameters,
}

impl Setup {
    fn new() -> Setup {
        let golden = Golden::load("gqa");
        let config = parse_config(&golden.metadata("config").to_string()).unwrap();
        Setup { config, parameters: golden.by_parameter("param"), golden }
    }

    /// Tokens of the golden file, `[batch, seq]`, and its targets.
    fn micro_batch(&self) -> (Vec<u32>, Vec<u32>, usize, usize) {
        let shape = self.golden.shape("tokens");
        (self.golden.tokens("tokens"), self.golden.tokens("targets"), shape[0], shape[1])
    }

    fn make(
        &self,
        device: Arc<dyn Device>,
        recompute: Recompute,
        (inputs, targets, batch, seq): (&[u32], &[u32], usize, usize),
        documents: Option<&Documents>,
    ) -> Made {
        let (config, policy) = (&self.config, Policy { clip: None, ..Policy::default() });
        let communicator = Arc::new(Communicator::connect(&Launch::single(), Options::default()).unwrap());
        let mut engine = Engine::new(communicator, device.clone(), config.layout(1), policy).unwrap();
        let values = |name: &str, _: &[usize]| {
            let values = &self.parameters[name];
            move |index: usize| values[index] as f32
        };
        engine.initialize(values).unwrap();
        let mut model = Model::new(&*device, config, DType::F32, batch, seq, recompute).unwrap();
        let mut step = engine.begin_evaluation(1).unwrap();
        let logits = model.logits(&mut step, inputs, documents).unwrap();
        step.end().unwrap();
        let mut step = engine.begin(1).unwrap();
        model.train(&mut step, inputs, targets, documents).unwrap();
        // With β₁ = 0 the first moment is the mean gradient itself.
        let settings = AdamW { lr: 0.0, beta1: 0.0, beta2: 0.0, epsilon: 1e-8, weight_decay: 0.0 };
        let report = step.finish(&settings, &mut []).unwrap();
        let layout = engine.layout().clone();
        let gradients = (0..layout.units.len()).flat_map(|unit| {
            let moment = engine.state(unit).unwrap().states[0].clone();
            let tensors = &layout.units[unit].tensors;
            let pieces = layout.pieces(unit, 0);
            let named = pieces.map(|piece| (tensors[piece.tensor].name.clone(), moment[piece.in_shard].to_vec()));
            named.collect::<Vec<_>>()
        });
        Made { logits, loss: report.loss_sum / report.tokens, gradients: gradients.collect() }
    }
}

/// The starts of documents that begin at these positions of each sequence.
fn starts(begins: &[&[usize]], seq: usize) -> Vec<u32> {
    let of =
        |begins: &[usize], position: usize| begins.iter().rev().find(|&&begin| begin <= position).map_or(0, |&x| x);
    begins.iter().flat_map(|begins| (0..seq).map(|position| of(begins, position) as u32)).collect()
}

/// Documents of the golden file's sequences: several in the first, one token among them, and all
/// other sequences end with one.
fn borders(batch: usize, seq: usize) -> Vec<Vec<usize>> {
    (0..batch).map(|sequence| if sequence == 0 { vec![3, 4, seq / 2] } else { vec![seq - sequence] }).collect()
}

#[test]
fn loss_logits_and_every_gradient_are_those_of_masked_scores_in_f64() {
    let setup = Setup::new();
    let (tokens, targets, batch, seq) = setup.micro_batch();
    let begins = borders(batch, seq);
    let begins: Vec<&[usize]> = begins.iter().map(|begins| &begins[..]).collect();
    let starts = starts(&begins, seq);
    let documents = Documents::new(&starts, seq);
    let made = setup.make(Arc::new(Cpu), Recompute::None, (&tokens, &targets, batch, seq), Some(&documents));
    let (shape, masked) = (setup.golden.config(), Some(&starts[..]));
    let near = |found: f64, expected: f64| (found - expected).abs() < TOLERANCE * expected.abs();
    let loss = |starts| reference::loss(&shape, &setup.parameters, &tokens, &targets, starts, batch, seq);
    assert!(near(made.loss, loss(masked)) && !near(made.loss, loss(None)), "{} against {}", made.loss, loss(masked));
    let logits = reference::logits(&shape, &setup.parameters, &tokens, masked, batch, seq);
    let norm = logits.iter().map(|x| x * x).sum::<f64>().sqrt();
    let apart = made.logits.iter().zip(&logits).map(|(&x, y)| (f64::from(x) - y).powi(2)).sum::<f64>().sqrt();
    assert!(made.logits.len() == logits.len() && apart < TOLERANCE * norm, "logits lie {apart:e} apart of {norm:e}");
    // Along our own gradient of each tensor the slope is its norm, the largest there is.
    for (name, gradient) in &made.gradients {
        let norm = gradient.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt();
        let direction = gradient.iter().map(|&x| f64::from(x) / norm).collect();
        let direction = Parameters::from([(name.clone(), direction)]);
        let slope = reference::finite_difference(
            &shape,
            &setup.parameters,
            &tokens,
            &targets,
            masked,
            batch,
            seq,
            &direction,
            1e-5,
        );
        assert!(near(slope, norm), "{name}: slope {slope}, gradient's norm {norm}");
    }
    assert_eq!(made.gradients.len(), setup.parameters.len());
}

#[test]
fn a_document_changes_no_bit_of_what_comes_from_another() {
    let setup = Setup::new();
    let vocab = setup.config.vocab_size as u32;
    let (tokens, targets, _, seq) = setup.micro_batch();
    let (tokens, mut targets) = (tokens[..seq].to_vec(), targets[..seq].to_vec());
    // The document in the middle is learned alone.
    let middle = 4..seq - 3;
    targets.iter_mut().enumerate().filter(|(at, _)| !middle.contains(at)).for_each(|(_, target)| *target = IGNORED);
    let other = |at: usize| if middle.contains(&at) { tokens[at] } else { (tokens[at] + 1 + at as u32) % vocab };
    let others: Vec<u32> = (0..seq).map(other).collect();
    let documents = Documents::new(&starts(&[&[middle.start, middle.end]], seq), seq);
    let late = Documents::new(&starts(&[&[middle.start + 1, middle.end]], seq), seq);
    for recompute in [Recompute::None, Recompute::Attention, Recompute::Block] {
        for device in [Arc::new(Cpu) as Arc<dyn Device>, Arc::new(LazyCpu::new(5))] {
            let make = |tokens: &[u32], documents: Option<&Documents>| {
                setup.make(device.clone(), recompute, (tokens, &targets, 1, seq), documents)
            };
            let [made, changed] = [&tokens, &others].map(|tokens| make(tokens, Some(&documents)));
            let row = setup.config.vocab_size;
            let of_middle = middle.start * row..middle.end * row;
            assert!(made.logits[of_middle.clone()] == changed.logits[of_middle.clone()]);
            assert!(made.logits[..of_middle.start] != changed.logits[..of_middle.start]);
            assert!(made.logits[of_middle.end..] != changed.logits[of_middle.end..]);
            assert_eq!(made.loss.to_bits(), changed.loss.to_bits());
            for (name, gradient) in &made.gradients {
                assert!(*gradient == changed.gradients[name], "{name}, {recompute:?}");
            }
            // A border that is a token off, or none, is seen.
            assert!(make(&tokens, Some(&late)).loss != made.loss);
            assert!(make(&tokens, None).loss != make(&others, None).loss);
        }
    }
}

/// A run on many short documents, so that nearly every sample has borders.
const FLAGS: &str = "--model tiny --seq 32 --micro-batch 2 --seed 7 --samples 2000 --batch 8 --round-to 8 \
                     --controller constant --validation-samples 16";

fn workplace() -> Workplace {
    let place = Workplace::new(PROGRAM);
    place.write_notes("notes");
    place
}

fn train(place: &Workplace, out: &str, flags: &str) -> Vec<Step> {
    place.run(&format!("train --data notes {FLAGS} --out {out} {flags}")).succeeded();
    place.steps(out)
}

#[test]
fn every_way_of_running_attends_within_documents_alike() {
    let place = workplace();
    let flags = "--document-attention --steps 4 --validate-every 2";
    let expected = train(&place, "base", &format!("{flags} --ranks 2"));
    let without = train(&place, "without", "--steps 4 --validate-every 2 --ranks 2");
    assert_eq!(expected.len(), 4);
    for (with, without) in expected.iter().zip(&without) {
        assert_ne!(with.loss, without.loss);
    }
    assert_ne!(expected[3].validation_loss.unwrap(), without[3].validation_loss.unwrap());
    for (number, way) in [
        "--launch threads --recompute attention",
        "--device lazy-cpu --gather copy --recompute block",
        "--launch threads --gather copy --prefetch 2",
    ]
    .into_iter()
    .enumerate()
    {
        let found = train(&place, &format!("way-{number}"), &format!("{flags} --ranks 2 {way}"));
        for (found, expected) in found.iter().zip(&expected) {
            assert_eq!((found.loss, found.validation_loss), (expected.loss, expected.validation_loss), "{way}");
        }
    }
    // Two micro-batches are the two terms of each sum, on one rank as on two.
    let two = "--document-attention --steps 4 --batch 4 --round-to 4 --clip 0";
    let [one, two] = [1, 2].map(|ranks| train(&place, &format!("ranks-{ranks}"), &format!("{two} --ranks {ranks}")));
    for (one, two) in one.iter().zip(&two) {
        assert_eq!(one.loss, two.loss);
    }
    assert_eq!((one.len(), two.len()), (4, 4));
}

#[test]
fn a_resumed_run_keeps_it_and_changes_it_when_told_to() {
    let place = workplace();
    let whole = train(&place, "whole", "--document-attention --ranks 2 --steps 4");
    train(&place, "out", "--document-attention --ranks 2 --steps 2");
    place.run("train --resume auto --out out --ranks 2 --steps 4").succeeded();
    let losses = |steps: &[Step]| steps.iter().map(|step| step.loss).collect::<Vec<_>>();
    assert_eq!(losses(&place.steps("out")), losses(&whole));
    let change = "train --resume auto --out out --ranks 2 --steps 5 --change document-attention";
    let ended = place.run(change).succeeded();
    assert!(ended.stdout.contains("changed: document_attention from true to false"), "{ended}");
    let resume = "train --resume auto --out out --ranks 2 --steps 6";
    let ended = place.run(&format!("{resume} --document-attention"));
    let parts = ["document_attention = false (here true)", "--change document-attention", "step-00000005"];
    ended.refused(2, &parts);
    place.run(&format!("{resume} --document-attention --change document-attention")).succeeded();
}

#[test]
fn an_evaluation_attends_as_the_run_did() {
    let place = workplace();
    // A micro-batch of one sample, so that the run validates on all there are.
    let flags = "--ranks 1 --steps 2 --validation-samples 100000 --micro-batch 1 --lr 0";
    let losses = ["", "--document-attention"].map(|attention| {
        train(&place, "run", &format!("{flags} --validation-data all=notes {attention}"));
        let last = place.lines("run").pop().unwrap();
        let [split, all] = ["--split validation", ""].map(|split| {
            let ended = place.run(&format!("eval --checkpoint run --data notes --json {split}")).succeeded();
            let found: serde_json::Value = serde_json::from_str(&ended.stdout).unwrap();
            found["loss"].as_f64().unwrap()
        });
        for (loss, expected) in [(split, &last["validation_loss"]), (all, &last["validation_losses"]["all"])] {
            let expected = expected.as_f64().unwrap();
            assert!((loss - expected).abs() < 1e-6 * loss, "{loss} against {expected}");
        }
        all
    });
    assert!((losses[0] - losses[1]).abs() > 1e-5 * losses[0], "{losses:?}");
}

#[test]
fn tokens_without_documents_are_refused_by_name() {
    let place = workplace();
    let ended = place.run(&format!("train --data synthetic {FLAGS} --out out --document-attention"));
    ended.refused(2, &["synthetic data has no documents", "leave out --document-attention"]);
    fs::write(place.path("gpt.bin"), [0; 4000]).unwrap();
    let ended = place.run(&format!("train --data gpt.bin --vocab-size 257 {FLAGS} --out out --document-attention"));
    ended.refused(1, &["gpt.bin", "does not say where documents begin", "pillion tokenize"]);
    let sets = "--validation-data other=gpt.bin";
    train(&place, "out", &format!("--steps 1 {sets}"));
    let ended = place.run(&format!("train --data notes {FLAGS} --out out --document-attention {sets}"));
    ended.refused(1, &["gpt.bin", "does not say where documents begin"]);
}
