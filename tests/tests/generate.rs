//! Text and losses of trained models: `pillion generate` and `pillion eval`.

use std::fs;

use pillion_tests::program::{Ended, Workplace};
use serde_json::Value;

const PROGRAM: &str = env!("CARGO_BIN_EXE_pillion-under-test");

fn object(ended: &Ended) -> Value {
    serde_json::from_str(ended.stdout.trim()).unwrap_or_else(|_| panic!("{ended}"))
}

#[test]
fn a_text_is_the_same_on_any_number_of_ranks_and_ends_where_it_is_told() {
    let place = Workplace::new(PROGRAM);
    place.train("run", "--ranks 2 --steps 3");
    let text =
        |flags: &str| object(&place.run(&format!("generate --checkpoint run --tokens 60 --json {flags}")).succeeded());
    let all = text("--ignore-end");
    assert_eq!((all["tokens"].as_u64(), all["finish"].as_str()), (Some(60), Some("length")));
    for flags in ["--ranks 2", "--ranks 3 --launch threads", "--threads 1"] {
        assert_eq!(text(&format!("--ignore-end {flags}"))["text"], all["text"], "{flags}");
    }
    assert_ne!(text("--ignore-end --seed 2")["text"], all["text"]);
    assert_ne!(text("--ignore-end --context 16")["text"], all["text"], "it has seen less");
    let greedy = text("--ignore-end --temperature 0");
    assert_eq!(text("--ignore-end --top-k 1")["text"], greedy["text"]);
    assert_eq!(text("--ignore-end --min-p 1")["text"], greedy["text"]);
    // A letter of the text.
    let whole = all["text"].as_str().unwrap();
    let letter = whole.chars().skip(1).find(char::is_ascii_alphanumeric).expect("bytes by chance have letters");
    let stopped = text(&format!("--ignore-end --stop {letter}"));
    assert_eq!(stopped["text"].as_str().unwrap(), &whole[..whole.find(letter).unwrap()]);
    assert_eq!(stopped["finish"], "stop");
    // Each line of a file.
    fs::write(place.path("prompts"), "fn a\nlet b\n").unwrap();
    let lines = place.run("generate --checkpoint run --prompts prompts --tokens 5 --json").succeeded();
    let prompts: Vec<Value> = lines.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(prompts.iter().map(|line| line["prompt"].as_str().unwrap()).collect::<Vec<_>>(), ["fn a", "let b"]);
    fs::write(place.path("prompts"), "fn a\n\nlet b\n").unwrap();
    for (flags, code, parts) in [
        ("--prompts prompts", 1, &["prompts", "line 2 is empty"][..]),
        ("--prompts nowhere", 1, &["nowhere", "cannot be read"]),
        ("--top-p 0", 2, &["--top-p 0", "above 0"]),
        ("--min-p 2", 2, &["--min-p 2"]),
        ("--repetition-penalty 0", 2, &["--repetition-penalty 0"]),
        ("--context 0", 2, &["--context"]),
        ("--context 3", 2, &["the prompt has 7 tokens", "--context is 3"]),
        ("--stop=", 2, &["--stop is empty"]),
        ("--tokens 9999999", 2, &["--tokens 9999999"]),
    ] {
        place.run(&format!("generate --checkpoint run {flags}")).refused(code, parts);
    }
}

#[test]
fn a_loss_is_that_of_the_run_and_the_same_on_any_number_of_ranks() {
    let place = Workplace::new(PROGRAM);
    // A micro-batch of one sample, so that the run validates on all there are.
    place.train("run", "--ranks 1 --steps 3 --validation-samples 100000 --micro-batch 1");
    let last = place.steps("run").last().unwrap().validation_loss.unwrap();
    let eval = |flags: &str| object(&place.run(&format!("eval --checkpoint run --json {flags}")).succeeded());
    let found = eval("--data text --split validation");
    let loss = found["loss"].as_f64().unwrap();
    // Sums of the same f32 losses in another order, in f64; products of another shape round otherwise.
    assert!((loss - last).abs() < 1e-6 * loss, "{loss} against {last}");
    assert!((found["perplexity"].as_f64().unwrap() - loss.exp()).abs() < 1e-9 * loss.exp());
    // A byte is a token, but for the ends of documents.
    let bits = found["bits_per_byte"].as_f64().unwrap() * std::f64::consts::LN_2 / loss;
    assert!((1.0..1.01).contains(&bits), "{bits}");
    for flags in ["--ranks 2", "--micro-batch 3", "--ranks 3 --launch threads --micro-batch 5"] {
        let other = eval(&format!("--data text --split validation {flags}"));
        assert!((other["loss"].as_f64().unwrap() - loss).abs() < 1e-6 * loss, "{flags}");
        assert_eq!((&other["tokens"], &other["samples"]), (&found["tokens"], &found["samples"]), "{flags}");
    }
    // Without a split it is all of the text.
    let (all, train) = (eval("--data text"), eval("--data text --split train"));
    let samples = |found: &Value| found["samples"].as_u64().unwrap();
    assert_eq!(samples(&all), samples(&found) + samples(&train));
    let few = eval("--data text --split train --samples 5 --seq 64");
    assert_eq!((few["samples"].as_u64(), few["tokens"].as_u64()), (Some(5), Some(5 * 64)));
    for (flags, code, parts) in [
        ("--data nowhere", 1, &["nowhere"][..]),
        ("--data synthetic", 2, &["synthetic"]),
        ("--data text --seq 0", 2, &["--seq"]),
        ("--data text --samples 0", 2, &["--samples is 0"]),
        ("--data text --seq 1000000", 2, &["a sample needs 1000001", "--seq"]),
    ] {
        place.run(&format!("eval --checkpoint run {flags}")).refused(code, parts);
    }
}
