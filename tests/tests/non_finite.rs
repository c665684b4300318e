//! Runs whose numbers are not finite, and each way out: the message's remedies, `skip` and
//! `rewind`.

use std::sync::Arc;

use pillion_collectives::{Communicator, Launch, Options};
use pillion_kernels::Cpu;
use pillion_runtime::{Engine, Layout, Policy, State, checkpoint};
use pillion_tests::program::{Step, TINY, Workplace};

const PROGRAM: &str = env!("CARGO_BIN_EXE_pillion-under-test");

/// Diverges in its second stage, where the batch and with it the rate is 32 times as large: weights
/// then grow 15-fold a step, by a weight decay that overshoots. In the third stage they shrink
/// again.
const DIVERGING: &str = "--data text --model tiny --seq 8 --micro-batch 8 --seed 7 --batch 8 --round-to 8 --max-batch 256 \
    --validation-samples 16 --ranks 2 --samples 5000 --lr 0.0005 --weight-decay 1000 --warmup 0 --final-lr 1 --clip 0 \
    --controller stagewise --stages 8:0.016,256:0.88,8:0.104 --shrink --lr-coupling linear";

fn are_finite(steps: &[Step]) -> bool {
    steps.iter().all(|step| step.loss.is_finite() && step.grad_norm.is_finite())
}

fn left_out(place: &Workplace, out: &str) -> Vec<u64> {
    place.lines(out).iter().map(|line| line["samples_left_out"].as_u64().unwrap()).collect()
}

#[test]
fn a_run_that_stops_names_remedies_and_each_leads_to_a_finite_end() {
    let place = Workplace::new(PROGRAM);
    let ended = place.run(&format!("train {DIVERGING} --save-every 10 --out out"));
    ended.refused(
        1,
        &[
            "not finite",
            "no parameter was changed",
            "--on-non-finite skip",
            "rewind",
            "--change lr --lr X",
            "--resume PATH",
        ],
    );
    assert!(ended.stderr.contains("out/checkpoints/step-00000020"), "{ended}");
    let before = place.checkpoints("out");
    assert_eq!(before, ["step-00000010", "step-00000020"]);

    // Another rate, from before the weights grew.
    let changed = "--resume out/checkpoints/step-00000010 --out slower --change lr-coupling,weight-decay --lr-coupling none \
                   --weight-decay 0.1";
    let ended = place.run(&format!("train {changed}")).succeeded();
    assert!(ended.stdout.contains("changed: coupling from \"linear\" to \"none\""), "{ended}");
    assert!(ended.stdout.contains("changed: weight_decay from 1000.0 to 0.1"), "{ended}");
    let slower = place.steps("slower");
    assert!(are_finite(&slower) && slower.last().unwrap().samples_seen == 5000, "{ended}");

    // Back, and on without what led here.
    let ended = place.run("train --resume auto --out out --on-non-finite rewind").succeeded();
    assert!(ended.stdout.contains("gone back to out/checkpoints/step-00000020"), "{ended}");
    let steps = place.steps("out");
    assert!(are_finite(&steps) && steps.last().unwrap().validation_loss.unwrap().is_finite(), "{ended}");
    assert_eq!(steps.last().unwrap().samples_seen, 5000);
    let dealt: u64 = steps.iter().map(|step| step.batch_samples).sum();
    assert_eq!(dealt + left_out(&place, "out").last().unwrap(), 5000, "samples left out count for the schedule");
}

#[test]
fn what_a_rewind_has_left_out_stays_left_out_in_a_resume() {
    let place = Workplace::new(PROGRAM);
    let flags = format!("train {DIVERGING} --save-every 10 --on-non-finite rewind");
    place.run(&format!("{flags} --out whole")).succeeded();
    let whole = place.steps("whole");
    place.run(&format!("{flags} --out parts --steps 27")).succeeded();
    // Which remedy it uses is in the checkpoint.
    place.run("train --resume auto --out parts").succeeded();
    let without_validation = |mut steps: Vec<Step>| {
        steps.iter_mut().for_each(|step| step.validation_loss = None);
        steps
    };
    assert_eq!(without_validation(place.steps("parts")), without_validation(whole));
    assert_eq!(left_out(&place, "parts"), left_out(&place, "whole"));
    assert!(*left_out(&place, "whole").last().unwrap() > 256, "more than the step that failed");
}

#[test]
fn a_rewind_goes_back_before_a_change_of_the_batch() {
    let place = Workplace::new(PROGRAM);
    place.train("out", "--controller constant --ranks 2 --steps 2");
    // Diverges at once, in the first step with the changed batch.
    let changed = "--batch 32 --max-batch 32 --lr 1000 --weight-decay 1000 --clip 0 --warmup 0";
    let flags = format!("--change batch,max-batch,lr,weight-decay,clip,warmup {changed} --on-non-finite rewind");
    let ended = place.run(&format!("train --resume auto --out out --ranks 2 {flags} --non-finite-limit 2"));
    ended.refused(1, &["3 times since the newest checkpoint", "--non-finite-limit is 2"]);
    assert_eq!(ended.stdout.matches("gone back to out/checkpoints/step-00000002").count(), 2, "{ended}");
    assert!(ended.stdout.contains("without samples 16 to"), "{ended}");
}

#[test]
fn a_run_that_stops_before_its_first_save_keeps_what_it_has_learnt() {
    let place = Workplace::new(PROGRAM);
    let ended = place.run(&format!("train {DIVERGING} --out out"));
    ended.refused(1, &["not finite", "go on from out/checkpoints/step-"]);
    assert_eq!(place.checkpoints("out").len(), 1);
    place.run("checkpoint verify out").succeeded();
}

#[test]
fn without_a_checkpoint_or_beyond_the_limit_a_run_stops_and_says_so() {
    let place = Workplace::new(PROGRAM);
    let ended = place.run(&format!("train {DIVERGING} --out none --on-non-finite rewind"));
    ended.refused(1, &["found no checkpoint to go back to", "--save-every", "go on from none/checkpoints/step-"]);
    assert_eq!(place.checkpoints("none").len(), 1, "what was learnt is kept");
    // The weights are too large by then: each further step fails as well.
    let ended = place.run(&format!("train {DIVERGING} --out limit --on-non-finite skip --non-finite-limit 3"));
    ended.refused(1, &["4 times in a row", "--non-finite-limit is 3", "older checkpoint with --resume PATH"]);
    assert_eq!(ended.stdout.matches("going on after step").count(), 3, "{ended}");
}

/// A copy of a checkpoint whose embedding `change` has spoiled; it is told the embedding's width.
fn spoil(place: &Workplace, from: &str, to: &str, change: impl Fn(&mut State, usize)) {
    let saved = checkpoint::open(&place.path(from)).unwrap();
    let communicator = Arc::new(Communicator::connect(&Launch::single(), Options::default()).unwrap());
    let layout = Layout::new(&saved.manifest.units, 1);
    let mut engine = Engine::new(communicator, Arc::new(Cpu), layout, Policy::default()).unwrap();
    saved.load(&mut engine).unwrap();
    let mut state = engine.state(0).unwrap();
    change(&mut state, engine.layout().units[0].tensors[0].shape[1]);
    engine.set_state(0, &state).unwrap();
    checkpoint::save(&engine, &place.path(to), saved.manifest.step, saved.extra()).unwrap();
}

/// Weights that no step can mend are a failure at once, and those of the last step are one, too.
#[test]
fn broken_weights_at_the_beginning_or_the_end_are_a_failure() {
    let place = Workplace::new(PROGRAM);
    place.train("first", "--steps 1");
    let first = "first/checkpoints/step-00000001";
    spoil(&place, first, "broken", |state, _| state.master.fill(f32::NAN));
    let ended = place.run("train --resume broken/step-00000001 --out out --on-non-finite skip");
    ended.refused(1, &["validation loss of broken/step-00000001 is NaN", "--resume PATH", "start again"]);
    for temperature in ["0", "1"] {
        let ended = place.run(&format!("generate --checkpoint broken --tokens 4 --temperature {temperature}"));
        ended.refused(1, &["not finite", "older checkpoint"]);
    }
    // The weights are as they were, until the first update divides this by the root of nearly
    // nothing.
    spoil(&place, first, "breaking", |state, _| state.states[0].fill(f32::MAX));
    let ended = place.run("train --resume breaking/step-00000001 --out end --steps 2");
    ended.refused(1, &["validation loss of the last step is", "--resume PATH", "start again"]);
    assert_eq!(place.checkpoints("end"), ["step-00000002"]);
}

#[test]
fn skipped_samples_are_the_failing_steps_and_a_resume_is_exact() {
    let place = Workplace::new(PROGRAM);
    for number in [0, 3, 5] {
        // Not in the last file, which is for validation.
        let path = place.path(format!("text/module_{number:03}.rs"));
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, text.replacen("usize", "~size", 12)).unwrap();
    }
    let flags = "--samples 800 --controller linear-ramp --ramp 32:0.5 --max-batch 32 --lr-coupling sqrt";
    place.train("first", &format!("{flags} --steps 2 --ranks 2"));
    // The byte `~` has an infinite embedding: samples with this byte have no finite loss, and no
    // others are touched.
    spoil(&place, "first/checkpoints/step-00000002", "poisoned", |state, width| {
        state.master[usize::from(b'~') * width..][..width].fill(f32::INFINITY);
    });
    let from = "--resume poisoned/step-00000002 --ranks 2";

    let ended = place.run(&format!("train {from} --out whole --on-non-finite skip --save-every 5")).succeeded();
    let whole = place.steps("whole");
    let validated = ended.stdout.lines().rfind(|line| line.starts_with("validation loss")).unwrap();
    assert!(are_finite(&whole) && !validated.contains("NaN"), "{ended}");
    let skipped = ended.stdout.matches("going on after step").count() as u64;
    assert!(skipped >= 2, "the text has such samples: {ended}");
    // Every sample was dealt once or left out, and the schedules went on over both.
    let last = whole.last().unwrap();
    let dealt: u64 = whole.iter().map(|step| step.batch_samples).sum();
    let out = *left_out(&place, "whole").last().unwrap();
    assert_eq!(last.samples_seen, 16 + dealt + out, "the first two steps had 16");
    // The last steps may have been left out, too, which no line tells.
    let again = place.run("train --resume auto --out whole --ranks 2").succeeded();
    assert!(again.stdout.contains(&format!(": 800 samples, {} of them left out", 800 - 16 - dealt)), "{again}");
    assert!(again.stdout.contains("nothing left to do: all 800 samples were dealt"), "{again}");
    let numbers: Vec<u64> = whole.iter().map(|step| step.step).collect();
    assert_eq!(numbers, (3..=2 + whole.len() as u64).collect::<Vec<_>>(), "only updates count as steps");

    // In parts: before, between and after steps that were left out.
    place.run(&format!("train {from} --out parts --on-non-finite skip --steps 6")).succeeded();
    for steps in [12, 19, 1000] {
        place.run(&format!("train --resume auto --out parts --ranks 2 --steps {steps}")).succeeded();
    }
    let parts = place.steps("parts");
    let numbers =
        |steps: &[Step]| steps.iter().map(|s| (s.loss, s.lr, s.grad_norm, s.samples_seen)).collect::<Vec<_>>();
    assert_eq!(numbers(&parts), numbers(&whole));
    assert_eq!(left_out(&place, "parts"), left_out(&place, "whole"));

    // Nothing can be gone back to: the newest checkpoint holds the infinite weights.
    let ended = place.run(&format!("train {from} --out back --on-non-finite rewind"));
    ended.refused(1, &["poisoned/step-00000002", "what it has saved is not finite", "older checkpoint"]);
}

#[test]
fn what_diverges_is_said_once_whatever_started_the_ranks() {
    let place = Workplace::new(PROGRAM);
    for launch in ["processes", "threads"] {
        let flags = "--lr 1000 --clip 0 --warmup 0 --weight-decay 1000 --steps 200 --save-every 1";
        let ended = place.run(&format!("train {TINY} --ranks 2 --out {launch} --launch {launch} {flags}"));
        ended.refused(1, &["not finite", "no parameter was changed"]);
        let steps = place.steps(launch).len();
        assert_eq!(place.checkpoints(launch).len(), steps, "{ended}");
    }
}
