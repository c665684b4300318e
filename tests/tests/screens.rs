//! What a run shows besides text: objects with `pillion train --log json`, and frames of `pillion top`.

use pillion_tests::program::{TINY, Workplace};
use serde_json::Value;

const PROGRAM: &str = env!("CARGO_BIN_EXE_pillion-under-test");

/// The objects of a run's stdout.
fn events(stdout: &str) -> Vec<Value> {
    let parse = |line: &str| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"));
    stdout.lines().map(parse).collect()
}

fn of<'e>(events: &'e [Value], kind: &str) -> Vec<&'e Value> {
    events.iter().filter(|event| event["event"] == kind).collect()
}

#[test]
fn a_run_is_told_in_objects() {
    let place = Workplace::new(PROGRAM);
    let flags = format!("{TINY} --ranks 2 --steps 6 --validate-every 2 --save-every 3 --sample 8 --profile --out out");
    let ended = place.run(&format!("train {flags} --log json")).succeeded();
    let events = events(&ended.stdout);
    let kinds: Vec<&str> = events.iter().map(|event| event["event"].as_str().unwrap()).collect();
    let wanted = ["plan", "validation", "step", "step", "validation", "step"];
    let without_messages: Vec<&str> = kinds.iter().copied().filter(|kind| *kind != "message").collect();
    assert_eq!(without_messages[..6], wanted);
    assert_eq!(kinds.last(), Some(&"end"));
    // Steps are those of the metrics.
    let metrics = std::fs::read_to_string(place.path("out/metrics.jsonl")).unwrap();
    let steps = of(&events, "step");
    assert_eq!(steps.len(), 6);
    for (step, line) in steps.iter().zip(metrics.lines()) {
        let mut step = (*step).clone();
        step.as_object_mut().unwrap().remove("event");
        assert_eq!(step, serde_json::from_str::<Value>(line).unwrap());
    }
    let plan = of(&events, "plan")[0];
    assert_eq!((&plan["ranks"], &plan["placement"]["shard"]), (&2.into(), &"parameters,gradients,optimizer".into()));
    let validations: Vec<&Value> = of(&events, "validation").iter().map(|event| &event["step"]).collect();
    assert_eq!(validations, [0, 2, 4, 6]);
    let saved: Vec<&Value> = of(&events, "checkpoint").iter().map(|event| &event["step"]).collect();
    assert_eq!(saved, [3, 6]);
    let end = of(&events, "end")[0];
    assert_eq!((&end["steps"], end["sample"].is_string()), (&6.into(), true));
    assert_eq!(end["validation_loss"], of(&events, "validation")[3]["loss"]);
    assert!(of(&events, "message").iter().all(|message| message["text"].is_string()));
    // The text has the same messages.
    let ended = place.run(&format!("train {flags}")).succeeded();
    assert!(!ended.stdout.contains("{\"event\""), "{}", ended.stdout);
    assert!(ended.stdout.contains("\n  step    loss    norm ") && ended.stdout.contains("\nvalidation loss "));
}

#[test]
fn ranks_that_are_threads_are_told_in_objects_too() {
    let place = Workplace::new(PROGRAM);
    let ended =
        place.run(&format!("train {TINY} --launch threads --ranks 2 --steps 2 --out out --log json")).succeeded();
    assert_eq!(of(&events(&ended.stdout), "step").len(), 2);
    // Nothing is left to do.
    let ended = place.run("train --resume auto --steps 2 --out out --log json").succeeded();
    let events = events(&ended.stdout);
    let message = events.last().unwrap();
    assert!(message["text"].as_str().unwrap().contains("nothing left to do"), "{message}");
}

#[test]
fn top_prints_a_frame_and_wants_a_terminal_for_more() {
    let place = Workplace::new(PROGRAM);
    place.train("out", "--ranks 2 --steps 4 --validate-every 2");
    let frame = place.run("top out --once").succeeded().stdout;
    for words in ["out: 131,520 parameters, 2 ranks", "step 4 ", "validation ", "to go", "loss by samples"] {
        assert!(frame.contains(words), "{words} in\n{frame}");
    }
    place.run("top out").refused(2, &["stdin or stdout is none", "--once"]);
    place.run("top none --once").refused(1, &["none: there is no such folder"]);
    let metrics = std::fs::read_to_string(place.path("out/metrics.jsonl")).unwrap();
    std::fs::write(place.path("out/metrics.jsonl"), metrics + "{}\n{}\n").unwrap();
    place.run("top out --once").refused(1, &["metrics.jsonl: line 5 is no step"]);
}
