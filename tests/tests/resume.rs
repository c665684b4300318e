//! A run goes on from its checkpoint as if nothing had happened, whoever ended it and however.

use std::fs;

use pillion_tests::program::{Step, TINY, Workplace, is_alive};
use rustix::process::Signal;

const PROGRAM: &str = env!("CARGO_BIN_EXE_pillion-under-test");
const GROWING: &str = "--eta 0.35 --max-batch 64";

/// All 20 steps in one go, on two ranks.
fn whole_run(place: &Workplace, growing: &str) -> Vec<Step> {
    let steps = place.train("whole", &format!("{growing} --ranks 2 --steps 20"));
    let batches: Vec<u64> = steps.iter().map(|step| step.batch_samples).collect();
    assert!(batches[9] < batches[19], "the batch must still change after step 10: {batches:?}");
    steps
}

/// Validation happens at the end of a run, so a run in two parts has one more; everything else must be the same.
fn without_validation(mut steps: Vec<Step>) -> Vec<Step> {
    steps.iter_mut().for_each(|step| step.validation_loss = None);
    steps
}

#[test]
fn two_halves_equal_the_whole_bit_for_bit_with_every_controller_that_grows() {
    for growing in [
        GROWING,
        "--variant debiased --eta 0.4 --patience 2 --growth-limit 1.5 --max-batch 64 --lr-coupling sqrt",
        "--controller noise-scale --ratio 8 --ema 0.8 --test-interval 3 --max-batch 64 --lr-coupling linear",
        "--controller linear-ramp --ramp 64:0.3 --max-batch 64",
        "--controller stagewise --stages 8:0.06,16:0.04,64:0.9 --max-batch 64",
    ] {
        let place = Workplace::new(PROGRAM);
        let whole = whole_run(&place, growing);
        place.train("halves", &format!("{growing} --ranks 2 --steps 10 --save-every 10"));
        assert_eq!(place.checkpoints("halves"), ["step-00000010"]);
        // All that decides numbers comes from the checkpoint.
        let ended =
            place.run("train --resume auto --out halves --ranks 2 --steps 20 --validation-samples 16").succeeded();
        assert!(ended.stdout.contains("step-00000010 after step 10"), "{ended}");
        let halves = place.steps("halves");
        assert_eq!(whole[19], halves[19], "with the validation loss at the end: {growing}");
        assert_eq!(without_validation(whole), without_validation(halves), "{growing}");
    }
}

#[test]
fn a_run_that_was_killed_between_saves_ends_like_one_that_was_not() {
    let place = Workplace::new(PROGRAM);
    let whole = whole_run(&place, GROWING);
    let flags = format!("train {TINY} --out killed {GROWING} --ranks 2");
    let running = place.start(&format!("{flags} --steps 1000 --save-every 4"));
    let ranks = running.ranks(2);
    running.wait_for_step(&place, "killed", 6);
    running.signal(Signal::KILL);
    running.wait_for("the ranks' end", || !ranks.iter().any(|&rank| is_alive(rank)));
    drop(running);
    // How far it came depends on the machine; what it saved by then must lead to the same numbers, so go back to step 4.
    for newer in place.checkpoints("killed").into_iter().filter(|name| name != "step-00000004") {
        fs::remove_dir_all(place.path("killed/checkpoints").join(newer)).unwrap();
    }
    place.run(&format!("{flags} --steps 20 --resume auto")).succeeded();
    assert_eq!(without_validation(whole), without_validation(place.steps("killed")));
}

#[test]
fn another_number_of_ranks_goes_on_alike() {
    let place = Workplace::new(PROGRAM);
    let whole = whole_run(&place, GROWING);
    for ranks in [1, 4] {
        let out = format!("on-{ranks}");
        place.train(&out, &format!("{GROWING} --ranks 2 --steps 10"));
        place.train(&out, &format!("{GROWING} --ranks {ranks} --steps 20 --resume auto"));
        for (whole, resumed) in whole.iter().zip(place.steps(&out)) {
            assert_eq!(whole.batch_samples, resumed.batch_samples, "step {}", whole.step);
            assert!((whole.loss - resumed.loss).abs() <= 1e-4 * whole.loss, "{whole:?} {resumed:?}");
        }
    }
}

#[test]
fn another_placement_goes_on_with_the_same_batches() {
    let place = Workplace::new(PROGRAM);
    let whole = whole_run(&place, GROWING);
    for (number, shard) in ["zero-2", "zero-1", "nothing"].into_iter().enumerate() {
        let out = format!("placement-{number}");
        place.train(&out, &format!("{GROWING} --ranks 2 --steps 10"));
        place.run(&format!("train --resume auto --out {out} --ranks 2 --steps 20 --shard {shard}")).succeeded();
        let steps = place.steps(&out);
        if shard == "zero-2" {
            // It reduces as often, so it has the same groups and the same sums.
            assert_eq!(without_validation(steps), without_validation(whole.clone()), "{shard}");
            continue;
        }
        // With gradients that are reduced once, a group is a rank, and sums are made in another
        // order. The first step has the same weights, samples, batch and rate: its loss is the same
        // f64 sum of at most 32 micro-batches, in two orders that differ by at most 2·31 roundings
        // of 2^-53.
        let (ours, theirs) = (&steps[10], &whole[10]);
        assert_eq!(
            (ours.batch_samples, ours.lr, ours.samples_seen),
            (theirs.batch_samples, theirs.lr, theirs.samples_seen)
        );
        assert!((ours.loss - theirs.loss).abs() <= 62.0 * 2f64.powi(-53) * theirs.loss, "{shard}: {ours:?} {theirs:?}");
        // Batches go on from there, and never shrink.
        assert!(steps.windows(2).all(|pair| pair[0].batch_samples <= pair[1].batch_samples), "{shard}: {steps:?}");
        // And that run is exact, too.
        let parts = format!("{out}-parts");
        place.train(&parts, &format!("{GROWING} --ranks 2 --steps 10"));
        for steps in [14, 20] {
            let flags = format!("--out {parts} --ranks 2 --steps {steps} --shard {shard}");
            place.run(&format!("train --resume auto {flags}")).succeeded();
        }
        assert_eq!(without_validation(place.steps(&parts)), without_validation(steps), "{shard}");
    }
}

#[test]
fn a_finished_run_says_so_and_is_made_longer_by_a_change() {
    let place = Workplace::new(PROGRAM);
    let short = "--samples 80 --controller stagewise --stages 8:0.5,16:0.5 --max-batch 32";
    let first = place.train("out", &format!("{short} --ranks 2"));
    let manifest = |step: u64| fs::read(place.path(format!("out/checkpoints/step-{step:08}/manifest.json"))).unwrap();
    let saved = manifest(first.len() as u64);
    let resume = |flags: &str| place.run(&format!("train --resume auto --out out --ranks 2 {flags}"));

    let ended = resume("").succeeded();
    assert!(ended.stdout.contains("nothing left to do: all 80 samples were dealt in 8 steps"), "{ended}");
    assert!(ended.stdout.contains("--change samples --samples N"), "{ended}");
    assert_eq!((place.steps("out"), manifest(8)), (first.clone(), saved));
    let ended = resume("--steps 3").succeeded();
    assert!(ended.stdout.contains("nothing left to do"), "{ended}");

    resume("--samples 160").refused(2, &["samples = 80 (here 160)", "--change samples"]);
    let ended = resume("--samples 160 --change samples").succeeded();
    assert!(ended.stdout.contains("changed: schedule.samples from 80 to 160"), "{ended}");
    let longer = place.steps("out");
    // Half of 160 have come when it goes on: the second stage, and the rate of a run of 160.
    let whole = place.train("whole", &format!("{short} --samples 160 --ranks 2"));
    assert_eq!(longer[..8], first);
    assert_eq!(longer.last().unwrap().samples_seen, 160);
    let rates = |steps: &[Step]| {
        let late = steps.iter().filter(|step| step.samples_seen > 80);
        late.map(|step| (step.samples_seen, step.batch_samples, step.lr)).collect::<Vec<_>>()
    };
    assert_eq!(rates(&longer), rates(&whole));
    // What was changed is in the checkpoint.
    assert!(resume("").succeeded().stdout.contains("all 160 samples were dealt"), "{ended}");
}

#[test]
fn what_a_run_keeps_and_checks_is_kept_by_a_resume() {
    let place = Workplace::new(PROGRAM);
    place.train("out", "--ranks 2 --steps 3 --save-every 2 --keep 2 --validate-every 2 --sample 3");
    let ended = place.run("train --resume auto --out out --ranks 2 --steps 9").succeeded();
    assert_eq!(place.checkpoints("out"), ["step-00000008", "step-00000009"], "{ended}");
    let validated = place.steps("out").into_iter().filter(|step| step.validation_loss.is_some());
    assert_eq!(validated.map(|step| step.step).collect::<Vec<_>>(), [2, 3, 4, 6, 8, 9]);
    assert!(ended.stdout.contains("on 16 samples"), "{ended}");
    let ended = place.run("train --resume auto --out out --ranks 2 --steps 12 --keep 1 --save-every 0").succeeded();
    assert_eq!(place.checkpoints("out"), ["step-00000012"], "{ended}");
}

#[test]
fn lines_of_steps_that_a_resume_goes_back_before_are_kept() {
    let place = Workplace::new(PROGRAM);
    let six = place.train("out", "--ranks 2 --steps 6 --save-every 2");
    // What makes no step touches nothing.
    let back = "--resume out/checkpoints/step-00000002 --out out --ranks 2";
    let ended = place.run(&format!("train {back} --steps 2")).succeeded();
    assert!(ended.stdout.contains("nothing left to do: 2 steps were made"), "{ended}");
    assert_eq!((place.steps("out"), place.checkpoints("out").len()), (six.clone(), 3));
    place.run(&format!("train {back} --steps 3")).succeeded();
    assert_eq!(place.steps("out").len(), 3);
    let aside = fs::read_to_string(place.path("out/metrics.aside.jsonl")).unwrap();
    let aside: Vec<Step> = aside.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(aside, six[2..]);
    let ended = place.run("train --resume out/checkpoints/step-00000006.aside --out out --ranks 2 --steps 9");
    ended.refused(1, &["step-00000006.aside", "its name has no step"]);
    let ended = place.run("train --resume auto --out nowhere --change lr --lr 0.1");
    ended.refused(2, &["--change needs a checkpoint", "nowhere"]);
}

#[test]
fn changes_are_named_and_others_are_refused() {
    let place = Workplace::new(PROGRAM);
    place.train("out", "--ranks 2 --steps 2 --controller constant");
    let resume = |flags: &str| place.run(&format!("train --resume auto --out out --ranks 2 --steps 4 {flags}"));
    // All differences at once.
    let ended = resume("--lr 0.001 --clip 0.5 --seq 16 --change lr");
    ended.refused(
        2,
        &["clip = 1.0 (here 0.5)", "seq = 32 (here 16)", "--change clip for these", "cannot change its seq"],
    );
    assert!(!ended.stderr.contains("lr ="), "{ended}");
    let ended = place.run(&format!("train {TINY} --out new --change lr"));
    assert!(ended.code() == Some(2) && ended.stderr.contains("not provided:\n  --resume"), "{ended}");
    resume("--change lr").refused(2, &["--change lr: give --lr as well"]);
    resume("--change samples --samples 8").refused(2, &["--samples 8", "was made after 16 samples"]);
    resume("--change seed").refused(2, &["'seed'", "it can change lr"]);
    // A controller begins with the batch that there is.
    let flags = "--controller norm-test --eta 0.3 --max-batch 64 --lr 0.001";
    resume(flags).refused(2, &["rule", "lr = 0.003", "--change controller,lr"]);
    let ended = resume(&format!("{flags} --change controller,max-batch,lr")).succeeded();
    assert!(ended.stdout.contains("changed: schedule.lr from 0.003 to 0.001"), "{ended}");
    let steps = place.steps("out");
    assert_eq!(steps.iter().map(|step| step.batch_samples).take(3).collect::<Vec<_>>(), [8, 8, 8]);
    assert!(steps[1].wanted_batch.is_none() && steps[2].wanted_batch.is_some(), "{steps:?}");
}

#[test]
fn checkpoints_of_the_first_version_go_on_with_the_same_losses() {
    // Made by the program as it was before checkpoints kept the path of their text: six steps of
    // two ranks, and the metrics of the twelve that they belong to. With portable instructions, and
    // rounding as IEEE 754 says, the losses have the same bits on every machine.
    const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/golden/checkpoint");
    let place = Workplace::new(PROGRAM);
    fs::create_dir_all(place.path("out/checkpoints/step-00000006")).unwrap();
    let metrics = fs::read_to_string(format!("{GOLDEN}/metrics.jsonl")).unwrap();
    fs::write(place.path("out/metrics.jsonl"), &metrics).unwrap();
    let golden = place.steps("out");
    for file in fs::read_dir(format!("{GOLDEN}/step-00000006")).unwrap().flatten() {
        fs::copy(file.path(), place.path("out/checkpoints/step-00000006").join(file.file_name())).unwrap();
    }
    place.run("checkpoint verify out").succeeded();
    let mut command =
        place.command("train --resume auto --out out --data text --ranks 2 --steps 12 --validation-samples 16");
    command.env("PILLION_ISA", "portable");
    let ended = place.spawn(command).finish().succeeded();
    assert!(ended.stdout.contains("step-00000006 after step 6: 96 samples"), "{ended}");
    // Square norms were summed in another order then. The sums S of n positive numbers in two
    // orders differ by 2·n·2⁻⁵³·S at most (Higham 2002, section 4.2): by δ·S, with n no more than
    // the 4,928 elements of 16 groups. A norm differs by half of that.
    let delta = 2.0 * (4928.0 * 16.0) * 2f64.powi(-53);
    let near = |a: Option<f64>, b: Option<f64>, bound: f64| match (a, b) {
        (Some(a), Some(b)) => (a - b).abs() <= bound * b.abs(),
        (a, b) => a == b,
    };
    // In a step of K groups and b = 2·K samples, σ² is (A − b·Q)/(K − 1) for a sum A of square
    // norms, up to a factor, so it is off by δ·(A + b·Q)/(K − 1) = δ·(σ² + 2·b·Q/(K − 1)). Here K ≥
    // 4, so b/(K − 1) ≤ 8/3. The sums over steps are off by the sums of this. With w = Σσ²/ΣQ, that
    // is a share δ·(1 + 16/(3·w)) of Σσ². The sum of D = Q − σ²/b is off by δ·(Q + σ²/b + 2·Q/(K −
    // 1)), summed, which is δ·8/3·ΣQ at most, because Σσ²/b ≤ ΣQ where ΣD is positive. With s =
    // Σσ²/ΣD, the noise scale, that is a share δ·8·s/(3·w) of ΣD. The controller wants w/η²
    // samples.
    const ETA: f64 = 0.5;
    let found = place.steps("out");
    assert_eq!(found.len(), golden.len());
    for (found, golden) in found.iter().zip(&golden) {
        let (s, w) = (golden.noise_scale.unwrap(), ETA * ETA * golden.wanted_batch.unwrap());
        let of_variance = delta * (1.0 + 16.0 / (3.0 * w));
        let of_scale = of_variance + delta * 8.0 * s / (3.0 * w);
        let both = format!("{found:?} and {golden:?}");
        assert!(near(Some(found.grad_norm), Some(golden.grad_norm), delta / 2.0), "{both}");
        assert!(near(found.noise_scale, golden.noise_scale, of_scale), "{both}");
        assert!(near(found.wanted_batch, golden.wanted_batch, of_variance + delta), "{both}");
        let Step { grad_norm, noise_scale, wanted_batch, .. } = golden.clone();
        assert_eq!(Step { grad_norm, noise_scale, wanted_batch, ..found.clone() }, *golden);
    }
    // And it can be resumed at another number of ranks.
    place.run("train --resume out/checkpoints/step-00000006 --out other --data text --ranks 3 --steps 7").succeeded();
}

#[test]
fn defaults_that_depend_on_the_ranks_stay_those_of_the_start() {
    let place = Workplace::new(PROGRAM);
    let flags =
        "train --data text --model tiny --seq 32 --micro-batch 2 --samples 2000 --validation-samples 16 --out out";
    place.run(&format!("{flags} --ranks 2 --steps 2")).succeeded();
    place.run(&format!("{flags} --ranks 4 --steps 4 --resume auto")).succeeded();
    assert!(place.steps("out").iter().all(|step| step.batch_samples.is_multiple_of(4)));
    assert_eq!(place.steps("out").len(), 4);
}

#[test]
fn another_run_is_refused_by_the_key_that_differs() {
    let place = Workplace::new(PROGRAM);
    place.train("out", "--ranks 2 --steps 2");
    place.write_text("other", 9);
    let before = fs::read(place.path("out/metrics.jsonl")).unwrap();
    for (flag, parts) in [
        ("--lr 0.001", &["lr = 0.003", "0.001", "leave out --lr ", "--change lr "][..]),
        ("--max-batch 16", &["cap", "16", "--change max-batch"]),
        ("--controller constant", &["rule", "constant", "--change controller"]),
        ("--model tiny --layers 3", &["num_hidden_layers = 2", "3"]),
        ("--seed 8", &["seed = 7", "8", "a run cannot change its seed"]),
        ("--seed 8 --lr 1e-4", &["seed = 7", "lr = 0.003", "leave out --lr and --seed", "--change lr for these"]),
        ("--precision bf16", &["precision", "f32", "bf16"]),
        ("--eta 0.125", &["eta", "0.125"]),
        ("--variant debiased", &["variant", "unbiased", "debiased"]),
        ("--lr-coupling sqrt", &["coupling", "none", "sqrt"]),
        ("--samples 4000", &["samples = 2000"]),
        ("--data other", &["other text", "leave --data out"]),
    ] {
        // Data that is given twice is a mixture.
        let settings = if flag.starts_with("--data") { TINY.replace("--data text", "") } else { TINY.to_owned() };
        let ended = place.run(&format!("train {settings} --out out --ranks 2 --steps 4 --resume auto {flag}"));
        ended.refused(2, parts);
        ended.refused(2, &["step-00000002", "start afresh"]);
    }
    assert_eq!(place.checkpoints("out"), ["step-00000002"]);
    assert_eq!(fs::read(place.path("out/metrics.jsonl")).unwrap(), before);
}

#[test]
fn a_damaged_newest_checkpoint_is_passed_over_with_its_reason() {
    let place = Workplace::new(PROGRAM);
    let whole = place.train("out", "--ranks 2 --steps 4 --save-every 2");
    let shard = place.path("out/checkpoints/step-00000004/rank-00001-of-00002.safetensors");
    let mut bytes = fs::read(&shard).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&shard, bytes).unwrap();

    // By name it is refused; found by itself, passed over.
    let named = place.run(&format!("train {TINY} --out other --ranks 2 --resume out/checkpoints/step-00000004"));
    named.refused(1, &["rank-00001-of-00002.safetensors", "is damaged", "older checkpoint"]);
    let ended = place.run(&format!("train {TINY} --out out --ranks 2 --steps 4 --resume auto")).succeeded();
    let line = ended.stdout.lines().find(|line| line.contains("passed over")).unwrap_or_else(|| panic!("{ended}"));
    assert!(line.contains("rank-00001-of-00002.safetensors") && line.contains("damaged"), "{line}");
    assert!(ended.stdout.contains("step-00000002 after step 2"), "{ended}");
    assert_eq!(place.steps("out"), whole);
    // Made again, it is whole.
    let again = place.run(&format!("train {TINY} --out out --ranks 2 --steps 4 --resume auto")).succeeded();
    assert!(again.stdout.contains("step-00000004 after step 4"), "{again}");
}

#[test]
fn when_no_checkpoint_is_whole_nothing_is_started_afresh() {
    let place = Workplace::new(PROGRAM);
    place.train("out", "--ranks 2 --steps 2");
    let manifest = place.path("out/checkpoints/step-00000002/manifest.json");
    fs::write(&manifest, "{").unwrap();
    let ended = place.run(&format!("train {TINY} --out out --ranks 2 --steps 4 --resume auto"));
    ended.refused(1, &["no checkpoint", "manifest.json", "name another one by its path"]);
    assert_eq!(place.steps("out").len(), 2);
}

#[test]
fn half_a_checkpoint_is_not_taken_for_a_whole_one() {
    let place = Workplace::new(PROGRAM);
    let whole = place.train("out", "--ranks 2 --steps 4 --save-every 2");
    // As a crash in the midst of saving step 4 leaves it.
    let folder = place.path("out/checkpoints");
    fs::rename(folder.join("step-00000004"), folder.join("step-00000004.incomplete")).unwrap();
    fs::remove_file(folder.join("step-00000004.incomplete/manifest.json")).unwrap();
    let ended = place.run(&format!("train {TINY} --out out --ranks 2 --steps 4 --resume auto")).succeeded();
    assert!(ended.stdout.contains("step-00000002 after step 2"), "{ended}");
    assert_eq!(place.steps("out"), whole);
    assert_eq!(place.checkpoints("out"), ["step-00000002", "step-00000004"]);
}

#[test]
fn a_new_run_moves_the_old_one_aside() {
    let place = Workplace::new(PROGRAM);
    let first = place.train("out", "--ranks 1 --steps 3");
    let ended = place.run(&format!("train {TINY} --out out --ranks 1 --steps 2 --seed 8")).succeeded();
    assert!(ended.stdout.contains("the earlier run in out is now out/earlier-1"), "{ended}");
    let second = place.steps("out");
    place.train("out", "--ranks 1 --steps 1");
    assert_eq!((place.steps("out/earlier-1"), place.steps("out/earlier-2")), (first, second));
    assert_eq!(place.checkpoints("out/earlier-1"), ["step-00000003"]);
    assert_eq!(place.checkpoints("out"), ["step-00000001"]);
    // And it can go on from where it is now.
    place.train("out/earlier-1", "--ranks 1 --steps 4 --resume auto");
}

#[test]
fn a_resume_without_a_checkpoint_starts_at_the_beginning_and_says_so() {
    let place = Workplace::new(PROGRAM);
    let ended = place.run(&format!("train {TINY} --out out --ranks 2 --steps 1 --resume auto")).succeeded();
    assert!(ended.stdout.contains("no checkpoint in out: starting from the beginning"), "{ended}");
}

#[test]
fn two_runs_at_once_do_not_share_a_folder() {
    let place = Workplace::new(PROGRAM);
    let first = place.start(&format!("train {TINY} --samples 1000000 --out shared"));
    first.wait_for_step(&place, "shared", 1);
    let second = format!("train {TINY} --samples 1000000 --steps 1 --out shared");
    place.run(&second).refused(1, &["shared", "another run is writing here", "--out DIR"]);
    first.signal(Signal::TERM);
    assert_eq!(first.finish().code(), Some(75));
    place.run(&second).succeeded();
}
