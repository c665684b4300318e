//! `--trace` and the accounting of memory: what a run writes about itself.

use std::collections::BTreeSet;
use std::fs;

use pillion_tests::program::{TINY, Workplace};
use serde_json::Value;

const PROGRAM: &str = env!("CARGO_BIN_EXE_pillion-under-test");

#[test]
fn a_run_leaves_one_timeline_of_all_ranks_and_no_parts() {
    let place = Workplace::new(PROGRAM);
    let flags = "--mesh replicate=2,shard=2 --steps 3 --trace";
    let ended = place.run(&format!("train {TINY} --out run --ranks 4 {flags}")).succeeded();
    assert!(ended.stdout.contains("timeline    run/trace.json"), "{ended}");
    assert!(!place.path("run/trace").exists(), "the parts are joined");
    let trace = fs::read_to_string(place.path("run/trace.json")).expect("a timeline");
    let trace: Value = serde_json::from_str(&trace).expect("it is JSON");
    let events = trace["traceEvents"].as_array().expect("a list").iter().filter(|event| event["ph"] == "X");
    let mut seen = BTreeSet::new();
    let mut updates = 0;
    for event in events {
        seen.insert((event["pid"].as_u64().expect("a rank"), event["cat"].as_str().expect("a track").to_owned()));
        updates += usize::from(event["name"].as_str().expect("a name").starts_with("update "));
    }
    let tracks = ["compute", "gather", "reduce", "replicate"];
    let all = (0..4).flat_map(|rank| tracks.map(|track| (rank, track.to_owned()))).collect::<BTreeSet<_>>();
    assert_eq!(seen, all);
    let units = trace["traceEvents"].as_array().unwrap().iter().filter(|event| event["ph"] == "X");
    let units: BTreeSet<&str> = units.filter_map(|event| event["args"]["unit"].as_str()).collect();
    assert_eq!(updates, 4 * 3 * units.len(), "each rank updates each unit once a step");
}

#[test]
fn the_memory_of_each_kind_is_what_the_plan_predicts() {
    let place = Workplace::new(PROGRAM);
    for flags in ["--gather copy", "--gather window", "--shard zero-1", "--precision bf16 --mesh replicate=2,shard=2"] {
        let planned =
            place.run(&format!("plan --model tiny --seq 32 --micro-batch 2 --batch 8 --world 4 --json {flags}"));
        let planned: Value = serde_json::from_str(&planned.succeeded().stdout).expect("one JSON object");
        place.run(&format!("train {TINY} --out run --ranks 4 --steps 1 {flags}")).succeeded();
        let counted = &place.lines("run")[0]["parameter_memory"];
        let predicted = planned["memory"].as_object().expect("kinds");
        for (kind, bytes) in predicted {
            assert_eq!(&counted[kind], bytes, "{kind} with {flags}");
        }
        assert!(counted["moments"].as_u64() > Some(0), "{counted}");
    }
}
