//! `pillion tokenize`, and what `pillion data` says of its folders and of other programs' files.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use pillion_tests::program::{Ended, Workplace};
use pillion_tests::tokenizer::VOCABULARY;
use rustix::process::Signal;
use serde_json::{Value, json};

const PROGRAM: &str = env!("CARGO_BIN_EXE_pillion-under-test");

fn with_tokenizer() -> Workplace {
    let place = Workplace::new(PROGRAM);
    place.write_tokenizer("tokenizer.json");
    place
}

fn json_of(ended: &Ended) -> Value {
    serde_json::from_str(&ended.stdout).unwrap_or_else(|_| panic!("{ended}"))
}

fn files(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap());
    entries.map(|entry| (entry.file_name().into_string().unwrap(), fs::read(entry.path()).unwrap())).collect()
}

#[test]
fn a_folder_of_text_is_tokenized_shown_and_verified() {
    let place = with_tokenizer();
    let command = "tokenize text --tokenizer tokenizer.json --out tokens --validation 0.3";
    let ended = place.run(command).succeeded();
    assert!(ended.stdout.contains("tokens is complete") && ended.stdout.contains("validation: "), "{ended}");
    let again = place.run(command).succeeded();
    assert!(again.stdout.contains("was complete already"), "{again}");

    let found = json_of(&place.run("data show tokens --json").succeeded());
    let texts = fs::read_dir(place.path("text")).unwrap().count() as u64;
    let number = |key: &str| found[0][key].as_u64().unwrap();
    assert_eq!(number("train_documents") + number("validation_documents"), texts);
    assert_eq!((number("vocabulary"), number("separator"), number("train_masked")), (VOCABULARY, 259, 0));
    assert_eq!(found[0]["kind"], "token folder");
    let shown = place.run("data show tokens").succeeded();
    assert!(shown.stdout.contains("tokenizer.json"), "{shown}");
    // Among others in a folder, too.
    let verified = place.run("data verify .").succeeded();
    assert!(verified.stdout.contains("whole"), "{verified}");

    let shard = place.path("tokens/train-00000.tokens");
    let mut bytes = fs::read(&shard).unwrap();
    bytes[10] ^= 1;
    fs::write(&shard, &bytes).unwrap();
    place.run("data verify tokens").refused(1, &["train-00000.tokens", "expected checksum"]);
    place.run("data show tokens").succeeded();
    fs::write(&shard, &bytes[..10]).unwrap();
    place.run("data show tokens").refused(1, &["train-00000.tokens", "found 10"]);
}

#[test]
fn a_killed_call_goes_on_and_the_bytes_are_those_of_one_call() {
    let place = with_tokenizer();
    // Seconds of work for one thread: no word comes twice.
    let word = |i: u64| format!("{:x} the ", i.wrapping_mul(0x9E37_79B9_7F4A_7C15));
    let words = |i: u64| (100 * i..100 * (i + 1)).map(word).collect::<String>();
    let line = |i: u64| json!({"text": words(i)}).to_string() + "\n";
    fs::write(place.path("data.jsonl"), (0..20_000).map(line).collect::<String>()).unwrap();
    let command = |out: &str, threads: u32| {
        format!("tokenize data.jsonl --tokenizer tokenizer.json --shard-tokens 3000000 --out {out} --threads {threads}")
    };
    let (progress, index) = (place.path("out/progress.json"), place.path("out/index.json"));
    let record = || {
        let text = fs::read(&progress).unwrap_or_default();
        serde_json::from_slice::<Value>(&text).ok().and_then(|value| value["position"]["record"].as_u64()).unwrap_or(0)
    };
    let mut kills = 0;
    while kills < 2 && !index.exists() {
        let before = record();
        let running = place.start(&command("out", 1));
        running.wait_for("progress", || record() > before || index.exists());
        running.signal(Signal::KILL);
        running.finish();
        if !index.exists() {
            kills += 1;
            place.run("data verify out").refused(1, &["out", "unfinished"]);
        }
    }
    let ended = place.run(&command("out", 2)).succeeded();
    assert!(kills > 0 && !ended.stdout.contains("out is complete"), "after {kills} kills: {ended}");
    place.run(&command("once", 2)).succeeded();
    place.run("data verify out").succeeded();
    assert!(files(&place.path("out")) == files(&place.path("once")), "after {kills} kills");
}

#[test]
fn what_cannot_be_tokenized_is_refused_with_a_remedy() {
    let place = with_tokenizer();
    let run = |arguments: &str| place.run(&format!("tokenize --tokenizer tokenizer.json --out out {arguments}"));
    run("nowhere").refused(1, &["nowhere: no such file or folder"]);
    run("text --validation 1").refused(2, &["--validation 1 must be"]);
    run("text --shard-tokens 0").refused(2, &["--shard-tokens 0 must be"]);
    run("text --append </s>").refused(2, &["--append \"</s>\" is no token"]);
    place.run("tokenize text --tokenizer text --out out").refused(1, &["text/tokenizer.json", "cannot read"]);
    fs::write(place.path("bad.jsonl"), "{\"text\": \"a\"}\n{\"text\": 1}\n").unwrap();
    run("bad.jsonl").refused(1, &["bad.jsonl: line 2: its field text is a number", "--skip-bad"]);
    let ended = run("bad.jsonl --skip-bad").succeeded();
    assert!(ended.stderr.contains("line 2") && ended.stdout.contains("1 bad documents left out"), "{ended}");
    run("bad.jsonl").succeeded();
    run("text").refused(1, &["out", "other files or settings", "--restart"]);
    run("text --restart").succeeded();
    run("text text/module_000.rs --restart").refused(1, &["is read twice"]);
    place.run("tokenize . --tokenizer tokenizer.json --out new/tokens").refused(1, &["--out lies in it"]);
    std::os::unix::fs::symlink("module_000.rs", place.path("text/again.rs")).unwrap();
    let ended = run("text --restart").succeeded();
    assert!(ended.stdout.contains("1 links to files that are read anyway"), "{ended}");
    let name = std::ffi::OsStr::from_bytes(b"text/\xff.rs");
    fs::write(place.path(name), "text").unwrap();
    run("text --restart").refused(1, &["its name is not UTF-8"]);
    fs::remove_file(place.path(name)).unwrap();
    // The folder of a model is nobody's to clear.
    fs::create_dir(place.path("model")).unwrap();
    fs::write(place.path("model/config.json"), "{}").unwrap();
    let model = "tokenize text --tokenizer tokenizer.json --out model --restart";
    place.run(model).refused(1, &["holds config.json"]);
    assert_eq!(fs::read_to_string(place.path("model/config.json")).unwrap(), "{}");
    fs::rename(place.path("model/config.json"), place.path("model/plan.json")).unwrap();
    place.run(model).refused(1, &["holds plan.json"]);
    assert_eq!(fs::read_to_string(place.path("model/plan.json")).unwrap(), "{}");
}

#[test]
fn files_of_other_programs_are_shown_and_verified() {
    let place = with_tokenizer();
    let mut header = vec![0u8; 1024];
    for (at, number) in [20240520u32, 1, 3].into_iter().enumerate() {
        header[4 * at..4 * at + 4].copy_from_slice(&number.to_le_bytes());
    }
    header.extend([50256u16, 1, 2].iter().flat_map(|token| token.to_le_bytes()));
    fs::write(place.path("gpt.bin"), &header).unwrap();
    let found = json_of(&place.run("data verify gpt.bin --json").succeeded());
    assert_eq!((&found[0]["kind"], &found[0]["vocabulary"]), (&"llm.c, GPT-2".into(), &50257.into()));
    assert_eq!(found[0]["train_tokens"], 3);
    fs::write(place.path("gpt.bin"), &header[..1029]).unwrap();
    place.run("data verify gpt.bin").refused(1, &["gpt.bin", "cut short"]);

    fs::write(place.path("nano.bin"), [1, 0, 4, 1]).unwrap();
    let found = json_of(&place.run("data show nano.bin --json").succeeded());
    assert_eq!((&found[0]["kind"], &found[0]["vocabulary"]), (&"nanoGPT".into(), &Value::Null));
    let ended = place.run("data verify nano.bin --tokenizer tokenizer.json");
    ended.refused(1, &["nano.bin", "token 260 at 1 is outside the vocabulary of 260"]);
}
