//! The tokens of a run: a resume has those that it began with, whatever became of the text; content
//! decides what is the same text; damage is found by who reads it, and all of it by `pillion data
//! verify`.

use std::fs;

use pillion_tests::program::{Step, TINY, Workplace};
use xxhash_rust::xxh3::xxh3_64;

const PROGRAM: &str = env!("CARGO_BIN_EXE_pillion-under-test");

fn losses(steps: &[Step]) -> Vec<f64> {
    steps.iter().map(|step| step.loss).collect()
}

#[test]
fn a_text_that_changed_or_is_gone_stops_no_resume_and_is_named() {
    let place = Workplace::new(PROGRAM);
    let whole = place.train("whole", "--ranks 2 --steps 8");
    let grown = place.path("text/module_003.rs");
    let text = fs::read_to_string(&grown).unwrap();
    place.train("out", "--ranks 2 --steps 2");

    fs::write(&grown, format!("{text}{text}")).unwrap();
    // Not asked for, it is not looked at.
    let ended = place.run("train --resume auto --out out --ranks 2 --steps 4").succeeded();
    assert!(!ended.stdout.contains("has changed"), "{ended}");
    let ended = place.run("train --resume auto --out out --ranks 2 --data text --steps 6").succeeded();
    let line = ended.stdout.lines().find(|line| line.contains("has changed")).unwrap_or_else(|| panic!("{ended}"));
    assert!(
        line.starts_with("text has changed (checksum") && line.contains("the tokens that the run began with"),
        "{ended}"
    );
    fs::remove_dir_all(place.path("text")).unwrap();
    let ended = place.run("train --resume auto --out out --ranks 2 --data text --steps 7").succeeded();
    assert!(ended.stdout.contains("text cannot be read any more"), "{ended}");
    // In another folder, too, which gets a copy of them.
    place.run("train --resume out --out other --ranks 2 --steps 8").succeeded();
    place.run("train --resume auto --out other --ranks 2 --steps 8").succeeded();
    assert_eq!(losses(&place.steps("out")), losses(&whole[..7]));
    assert_eq!(losses(&place.steps("other")), losses(&whole[7..]));
}

#[test]
fn another_text_is_refused_and_the_same_elsewhere_is_not() {
    let place = Workplace::new(PROGRAM);
    place.train("out", "--ranks 1 --steps 1");
    place.write_text("other", 9);
    let resume = |data: &str| place.run(&format!("train --resume auto --out out --ranks 1 --steps 2 --data {data}"));
    resume("other").refused(2, &["other text", "leave --data out", "start afresh"]);
    fs::rename(place.path("text"), place.path("moved")).unwrap();
    resume("moved").succeeded();
    // Without its tokens, and with another text in its place, nothing is left to go on with.
    fs::remove_dir_all(place.path("out/tokens")).unwrap();
    fs::rename(place.path("moved"), place.path("kept")).unwrap();
    fs::rename(place.path("other"), place.path("moved")).unwrap();
    let ended = place.run("train --resume auto --out out --ranks 1 --steps 3");
    ended.refused(2, &["other text", "is gone, so bring the text back as it was"]);
    fs::remove_dir_all(place.path("moved")).unwrap();
    fs::rename(place.path("kept"), place.path("moved")).unwrap();
    place.run("train --resume auto --out out --ranks 1 --steps 3").succeeded();
}

#[test]
fn a_change_that_keeps_size_and_time_is_seen() {
    let place = Workplace::new(PROGRAM);
    let first = place.train("out", "--ranks 1 --steps 2");
    let file = place.path("text/module_003.rs");
    let (text, time) = (fs::read_to_string(&file).unwrap(), fs::metadata(&file).unwrap().modified().unwrap());
    fs::write(&file, text.to_uppercase()).unwrap();
    fs::File::open(&file).unwrap().set_modified(time).unwrap();
    assert_ne!(losses(&place.train("out", "--ranks 1 --steps 2")), losses(&first));
    fs::write(&file, text).unwrap();
    assert_eq!(losses(&place.train("out", "--ranks 1 --steps 2")), losses(&first));
}

#[test]
fn random_tokens_go_on_without_being_named() {
    let place = Workplace::new(PROGRAM);
    let flags = TINY.replace("--data text", "--data synthetic");
    for (out, steps) in [("whole", 3), ("parts", 1)] {
        place.run(&format!("train {flags} --out {out} --ranks 1 --steps {steps}")).succeeded();
    }
    let ended = place.run("train --resume auto --out parts --ranks 1 --steps 3").succeeded();
    assert!(ended.stdout.contains("guessing reaches"), "{ended}");
    assert_eq!(losses(&place.steps("parts")), losses(&place.steps("whole")));
}

#[test]
fn verify_reads_all_tokens_and_a_run_those_that_it_needs() {
    let place = Workplace::new(PROGRAM);
    place.train("out", "--ranks 2 --steps 1");
    let whole = place.run("data verify out").succeeded();
    assert!(whole.stdout.contains("whole") && !whole.stdout.contains("damaged"), "{whole}");
    let folder = place.path("out/tokens");
    let file = fs::read_dir(&folder).unwrap().next().unwrap().unwrap().path();
    let name = format!("out/tokens/{}", file.file_name().unwrap().to_str().unwrap());
    let json = |path: &str| {
        let ended = place.run(&format!("data verify --json {path}"));
        let found: serde_json::Value = serde_json::from_str(&ended.stdout).unwrap_or_else(|_| panic!("{ended}"));
        (ended.code(), found)
    };
    for path in ["out", "out/tokens", &name] {
        let (code, found) = json(path);
        assert_eq!((code, found.as_array().unwrap().len()), (Some(0), 1));
        assert_eq!((&found[0]["error"], &found[0]["vocabulary"]), (&serde_json::Value::Null, &257.into()));
    }

    // A token within the vocabulary: only the checksum tells.
    let bytes = fs::read(&file).unwrap();
    let mut damaged = bytes.clone();
    damaged[1000] ^= 1;
    fs::write(&file, &damaged).unwrap();
    place.run("data verify out").refused(1, &[&name, "damaged: expected checksum", "delete the file"]);
    let (code, found) = json("out");
    assert!(code == Some(1) && found[0]["error"].as_str().unwrap().contains("damaged"), "{found}");

    // Tokens beyond it: whoever reads one says so, on every rank's behalf, and nothing panics.
    damaged[72..].fill(0xff);
    fs::write(&file, &damaged).unwrap();
    let ended = place.run("train --resume auto --out out --ranks 2 --steps 3");
    assert!(
        ended.code() == Some(1) && ended.stderr.contains("token 65535 is outside the vocabulary of 257"),
        "{ended}"
    );
    ended.has_no_panic();

    // Tokens that the model does not know.
    let mut unknown = bytes.clone();
    unknown[12..16].copy_from_slice(&300u32.to_le_bytes());
    let checksum = xxh3_64(&unknown[..64]);
    unknown[64..72].copy_from_slice(&checksum.to_le_bytes());
    fs::write(&file, &unknown).unwrap();
    let resumed = place.run("train --resume auto --out out --ranks 2 --steps 3");
    resumed.refused(1, &["a vocabulary of 300 tokens instead of 257", "remove it"]);
    fs::write(&file, &bytes[..500]).unwrap();
    place.run("data verify out").refused(1, &[&name, "expected", "found 500"]);

    place.run("data verify nowhere").refused(1, &["nowhere", "there is no token file here"]);
    place.run("data verify text").refused(1, &["text", "there is no token file here"]);
    let ended = place.run("data verify text/module_000.rs");
    ended.refused(1, &["text/module_000.rs", "not a token file"]);
}
