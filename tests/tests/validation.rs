//! What a run is validated on, and when, and which checkpoint it keeps for it; rehearsals of runs.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use pillion_tests::program::{TINY, Workplace};
use serde_json::Value;

const PROGRAM: &str = env!("CARGO_BIN_EXE_pillion-under-test");

/// All files of a folder, but for the lock, which names the process that had it last.
fn files(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let (folders, files): (Vec<_>, Vec<_>) = entries.partition(|path| path.is_dir());
    let files = files.into_iter().filter(|path| !path.ends_with(".pillion.lock"));
    let read = files.map(|path| (path.clone(), fs::read(&path).unwrap()));
    read.chain(folders.iter().flat_map(|folder| self::files(folder))).collect()
}

fn eval(place: &Workplace, checkpoint: &str, flags: &str) -> f64 {
    let ended = place.run(&format!("eval --checkpoint {checkpoint} --json {flags}")).succeeded();
    serde_json::from_str::<Value>(ended.stdout.trim()).unwrap()["loss"].as_f64().unwrap()
}

#[test]
fn the_loss_on_each_set_is_that_of_eval() {
    let place = Workplace::new(PROGRAM);
    fs::write(place.path("other.txt"), "pub fn answer() -> u32 { 42 }\n".repeat(200)).unwrap();
    // Micro-batches of one sample, so that all windows are used.
    let flags = "--validation-data other.txt --validation-data code=text --validation-samples 100000 --micro-batch 1";
    place.train("run", &format!("{flags} --ranks 2 --steps 4 --validate-every 2"));
    let lines = place.lines("run");
    let at: Vec<usize> = (0..lines.len()).filter(|&i| !lines[i]["validation_losses"].is_null()).collect();
    assert_eq!(at, [1, 3]);
    let losses = &lines[3]["validation_losses"];
    for (name, data) in [("other", "other.txt"), ("code", "text")] {
        let (found, expected) = (losses[name].as_f64().unwrap(), eval(&place, "run", &format!("--data {data}")));
        // Sums of the same f32 losses in another order, in f64; products of another shape round
        // otherwise.
        assert!((found - expected).abs() < 1e-6 * expected, "{name}: {found} against {expected}");
    }
    // A run that goes on has the same sets, whatever has become of the text.
    fs::remove_file(place.path("other.txt")).unwrap();
    let ended = place.run("train --resume auto --out run --ranks 2 --steps 6 --log json").succeeded();
    let sets = |line: &&str| line.contains(r#""event":"validation""#) && line.contains(r#""set":"other""#);
    assert_eq!(ended.stdout.lines().filter(sets).count(), 2, "{ended}");
}

#[test]
fn runs_of_different_batches_are_validated_at_the_same_samples() {
    let place = Workplace::new(PROGRAM);
    for (out, batch) in [("small", 4), ("large", 12)] {
        let flags = format!(
            "--round-to 4 --batch {batch} --max-batch {batch} --validate-every-samples 24 --controller constant"
        );
        place.train(out, &format!("{flags} --ranks 1 --samples 96"));
        let validated = place.lines(out).into_iter().filter(|line| !line["validation_loss"].is_null());
        let samples: Vec<u64> = validated.map(|line| line["samples_seen"].as_u64().unwrap()).collect();
        assert_eq!(samples, [24, 48, 72, 96], "{out}");
    }
    place
        .run(&format!("train {TINY} --out x --validate-every 5 --validate-every-samples 24"))
        .refused(2, &["cannot be used with"]);
}

#[test]
fn the_best_checkpoint_stays_and_its_loss_is_the_lowest() {
    let place = Workplace::new(PROGRAM);
    // A rate that is far too high after a good beginning: the loss falls, then rises.
    let flags = "--validate-every 2 --keep 1 --keep-best --controller constant --batch 8 --max-batch 8 --samples 240";
    place.train("run", &format!("{flags} --lr 1 --warmup 0.9 --schedule constant --ranks 2 --clip 0"));
    let lines = place.lines("run");
    let validated =
        || lines.iter().filter_map(|line| Some((line["validation_loss"].as_f64()?, line["step"].as_u64()?)));
    let (lowest, step) = validated().min_by(|a, b| a.0.total_cmp(&b.0)).unwrap();
    let last = lines.len() as u64;
    assert!(step < last, "the loss must rise again: {:?}", validated().collect::<Vec<_>>());
    assert_eq!(place.checkpoints("run"), [format!("step-{step:08}"), format!("step-{last:08}")]);
    // It is the model of that step.
    let found = eval(&place, &format!("run/checkpoints/step-{step:08}"), "--data text --split validation");
    assert!((found - lowest).abs() < 1e-2 * lowest, "{found} against {lowest} on some of the samples");
    // Where the run goes on, it is still the best.
    let ended = place.run("train --resume auto --out run --ranks 2 --change samples --samples 256").succeeded();
    assert!(
        ended.stdout.contains(&format!("best        run/checkpoints/step-{step:08}")) || {
            ended.stdout.contains(&format!("step-{step:08}, with validation loss {lowest:.4}"))
        },
        "{ended}"
    );
    assert!(place.checkpoints("run").contains(&format!("step-{step:08}")));
}

#[test]
fn a_rehearsal_finds_what_a_run_would_and_leaves_everything_as_it_was() {
    let place = Workplace::new(PROGRAM);
    place.train("run", "--ranks 2 --steps 3");
    let before = files(&place.path("run"));
    let ended = place.run(&format!("train {TINY} --out run --ranks 2 --dry-run")).succeeded();
    for part in ["dry run: no step was made", "settings and tokens", "weights", "first validation", "in all", "memory"]
    {
        assert!(ended.stdout.contains(part), "{part}: {ended}");
    }
    assert_eq!(files(&place.path("run")), before);
    let ended = place.run("train --resume auto --out run --ranks 2 --dry-run --log json").succeeded();
    let event = ended.stdout.lines().find(|line| line.contains("dry_run")).expect("an event");
    let event: Value = serde_json::from_str(event).unwrap();
    assert!(event["memory"].as_u64().unwrap() > 0 && event["seconds"]["weights"].is_number(), "{event}");
    let nowhere = TINY.replace("--data text", "--data nowhere");
    place.run(&format!("train {nowhere} --out new --ranks 2 --dry-run")).refused(1, &["nowhere"]);
}

#[test]
fn sets_that_cannot_be_are_refused_with_a_remedy() {
    let place = Workplace::new(PROGRAM);
    place.write_tokenizer("tokenizer.json");
    place.run("tokenize text --tokenizer tokenizer.json --out tokens").succeeded();
    fs::write(place.path("short.txt"), "short").unwrap();
    for (flags, code, parts) in [
        ("--validation-data nowhere", 1, &["--validation-data nowhere: nowhere: no such file"][..]),
        ("--validation-data text --validation-data text", 2, &["text twice", "NAME=PATH"]),
        ("--validation-data tokens", 2, &["tokens", "another tokenizer"]),
        ("--validation-data short.txt", 1, &["has 6 tokens"]),
        ("--validation-data =text", 2, &["NAME=PATH"]),
        ("--validation-data synthetic", 2, &["random tokens", "pillion tokenize"]),
    ] {
        place.run(&format!("train {TINY} --out x {flags}")).refused(code, parts);
    }
    // Text is no tokens of a tokenizer's; a run without a validation split needs a set.
    let tokens = format!("train {} --out y --ranks 1 --steps 1", TINY.replace("--data text", "--data tokens"));
    place.run(&format!("{tokens} --validation-data text")).refused(2, &["text is text", "pillion tokenize"]);
    place.run("tokenize text --tokenizer tokenizer.json --out all --validation 0").succeeded();
    let all = tokens.replace("--data tokens", "--data all");
    place.run(&all).refused(2, &["no sample to validate on", "--validation-data"]);
    let ended = place.run(&format!("{all} --validation-data held=tokens")).succeeded();
    assert!(ended.stdout.contains("on held"), "{ended}");
}
