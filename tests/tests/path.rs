//! The path of a new user: documents to tokens, a run that is killed and goes on, the model out and
//! in again with the same text, and the report. `ci/path` goes it with a tokenizer and text of
//! others, and has transformers write the text, too.

use std::fs;

use pillion_tests::program::Workplace;
use rustix::process::Signal;
use serde_json::Value;

const PROGRAM: &str = env!("CARGO_BIN_EXE_pillion-under-test");

#[test]
fn from_documents_to_a_model_for_others() {
    let place = Workplace::new(PROGRAM);
    place.write_tokenizer("tokenizer.json");
    place.run("tokenize text --tokenizer tokenizer.json --out tokens --validation 0.2").succeeded();
    let settings = "train --data tokens --model tiny --seq 32 --ranks 2 --samples 160 --validation-samples 16 \
                    --save-every 2 --controller constant --out run";
    place.run(&format!("{settings} --out whole")).succeeded();

    // Killed once it has saved something.
    let run = place.start(settings);
    run.wait_for("a checkpoint", || place.path("run/checkpoints/step-00000004/manifest.json").exists());
    run.signal(Signal::KILL);
    run.finish();
    place.run(&format!("{settings} --resume auto")).succeeded();
    let losses = |out: &str| place.steps(out).into_iter().map(|step| step.loss.to_bits()).collect::<Vec<_>>();
    assert_eq!(losses("run"), losses("whole"), "a run that was killed has the losses of one that was not");

    place.run("export --checkpoint run --to out").succeeded();
    let config: Value = serde_json::from_slice(&fs::read(place.path("out/config.json")).unwrap()).unwrap();
    assert_eq!(config["eos_token_id"], 259, "the token that ends a text");
    place.run("import out --out again").succeeded();
    let text = |checkpoint: &str| {
        let command = format!("generate --checkpoint {checkpoint} --temperature 0 --tokens 40 --context 32 --json");
        let ended = place.run(&command).succeeded();
        serde_json::from_str::<Value>(ended.stdout.trim()).unwrap()["text"].clone()
    };
    assert_eq!(text("run"), text("again"));
    assert!(text("run").as_str().is_some_and(|text| !text.is_empty()));
    let loss = |checkpoint: &str| {
        let ended = place.run(&format!("eval --checkpoint {checkpoint} --data tokens --seq 32 --json")).succeeded();
        serde_json::from_str::<Value>(ended.stdout.trim()).unwrap()["loss"].clone()
    };
    assert_eq!(loss("run"), loss("again"));
    place.run("report run whole --out report.html").succeeded();
    let page = fs::read_to_string(place.path("report.html")).unwrap();
    assert!(page.starts_with("<!DOCTYPE html>") || page.starts_with("<!doctype html>"), "{}", &page[..40]);

    // That tokens change under a run is said, and costs nothing.
    let mut slow = place
        .command("train --data tokens --model tiny --seq 32 --ranks 1 --steps 100000 --validate-every 1 --out slow");
    slow.args(["--samples", "8000000", "--validation-samples", "4", "--micro-batch", "4"]);
    let slow = place.spawn(slow);
    slow.wait_for_step(&place, "slow", 2);
    let shard = fs::File::options().write(true).open(place.path("tokens/train-00000.tokens")).unwrap();
    let made = shard.metadata().unwrap().modified().unwrap();
    shard.set_modified(made + std::time::Duration::from_secs(5)).unwrap();
    slow.wait_for("the warning", || slow.stderr().contains("changed since"));
    slow.signal(Signal::TERM);
    let slow = slow.finish();
    assert!(slow.code() == Some(75) && slow.stderr.contains("train-00000.tokens"), "{slow}");
    shard.set_modified(made).unwrap();

    // A model and tokens of two tokenizers do not go together.
    fs::write(
        place.path("other.json"),
        fs::read_to_string(place.path("tokenizer.json"))
            .unwrap()
            .replace("\"version\":\"1.0\"", "\"version\": \"1.0\""),
    )
    .unwrap();
    place.run("tokenize text --tokenizer other.json --out others --validation 0.2").succeeded();
    place.run("train --from again --data text --seq 32").refused(2, &["each byte would be a token", "--from"]);
    place.run("train --from again --data others --seq 32").refused(2, &["another tokenizer", "--from"]);
    place.run("train --model tiny --data tokens:0.5 --data others:0.5 --seq 32").refused(2, &["different tokenizers"]);
    place.run("train --model tiny --data tokens --data others --seq 32").refused(2, &["has no share"]);
    place.run("train --model tiny --data tokens:0.5 --data text:0.5").refused(2, &["text", "pillion tokenize"]);
    place
        .run("train --model tiny --data tokens --vocab-size 100 --seq 32")
        .refused(1, &["260 different tokens", "knows 100"]);
}
