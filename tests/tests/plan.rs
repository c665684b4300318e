//! `pillion plan`: a step on a machine that is described, as its JSON and its timeline tell it.

use std::fs;

use pillion_tests::program::Workplace;
use serde_json::Value;

const PROGRAM: &str = env!("CARGO_BIN_EXE_pillion-under-test");
const LLAMA: &str = "plan --model llama2-7b --world 512 --seq 4096 --micro-batch 1 --precision bf16";
const MACHINE: &str = "--link 50GB/s --latency 5us";

fn planned(place: &Workplace, flags: &str) -> Value {
    let ended = place.run(&format!("{LLAMA} {MACHINE} --json {flags}")).succeeded();
    serde_json::from_str(&ended.stdout).expect("one JSON object, and nothing else")
}

fn number(value: &Value, path: &str) -> f64 {
    value.pointer(path).and_then(Value::as_f64).unwrap_or_else(|| panic!("no {path} in {value}"))
}

#[test]
fn a_step_is_as_long_as_its_computing_and_its_waiting_and_a_timeline_shows_both() {
    let place = Workplace::new(PROGRAM);
    let plan = planned(&place, "--flops 400T --timeline step.json");
    let step = number(&plan, "/simulation/given/step");
    let [computing, exposed] = ["computing", "exposed"].map(|key| number(&plan, &format!("/simulation/given/{key}")));
    assert!((step - computing - exposed).abs() < 1e-9 * step, "{plan}");
    // 6 operations for each of 6.6 G weights in products, and 12·T/2·C in each of 32 blocks: 42.9 GFLOP a token; 4096 tokens at 400 TFLOP/s.
    let weights = 6_738_415_616.0 - 32_000.0 * 4096.0 - 65.0 * 4096.0;
    let flops = 4096.0 * (6.0 * weights + 32.0 * 12.0 * 2048.0 * 4096.0);
    assert!((computing / (flops / 400e12) - 1.0).abs() < 1e-9, "{computing}");
    // Every kind of memory; their sum is what a rank holds.
    let kinds = ["weights", "gathered", "gradients", "gradient_shard", "master", "moments"];
    let sum: f64 = kinds.iter().map(|kind| number(&plan, &format!("/memory/{kind}"))).sum();
    assert_eq!(sum + number(&plan, "/checkpoints") + number(&plan, "/activations"), number(&plan, "/total"));
    assert!(number(&plan, "/simulation/best/step") <= step * 1.001);

    let timeline = fs::read_to_string(place.path("step.json")).unwrap();
    let timeline: Value = serde_json::from_str(&timeline).unwrap();
    let events = timeline["traceEvents"].as_array().unwrap();
    let complete: Vec<&Value> = events.iter().filter(|event| event["ph"] == "X").collect();
    let of = |event: &Value, key: &str| event[key].as_f64().unwrap();
    assert!(complete.iter().all(|event| of(event, "ts") >= 0.0 && of(event, "dur") >= 0.0));
    let end = complete.iter().map(|event| of(event, "ts") + of(event, "dur")).fold(0.0, f64::max);
    assert!((end / 1e6 / step - 1.0).abs() < 1e-6, "{end} µs of {step} s");
    let count = |what: &str| complete.iter().filter(|event| event["name"].as_str().unwrap().starts_with(what)).count();
    assert_eq!((count("forward"), count("backward"), count("reduce"), count("update")), (34, 34, 34, 34));
}

#[test]
fn what_is_calibrated_with_one_speed_gives_it_back() {
    let place = Workplace::new(PROGRAM);
    let plan = planned(&place, "--calibrate 3000");
    assert!((number(&plan, "/simulation/given/tokens_per_s_per_rank") / 3000.0 - 1.0).abs() < 1e-9);
    let flops = number(&plan, "/simulation/machine/flops");
    let again = planned(&place, &format!("--flops {flops}"));
    assert!((number(&again, "/simulation/given/tokens_per_s_per_rank") / 3000.0 - 1.0).abs() < 1e-9);
}

#[test]
fn the_table_names_flags_without_effect() {
    let place = Workplace::new(PROGRAM);
    let plan = |flags: &str| place.run(&format!("plan --ranks 2 {flags}")).succeeded().stdout;
    for (flags, named) in [
        ("--shard zero-1 --slots 5", "--slots 5"),
        ("--shard nothing --prefetch 3 --slots 5", "--prefetch 3 and --slots 5"),
    ] {
        let printed = plan(flags);
        assert!(printed.contains(&format!("{named}: a step is the same without")), "{flags}: {printed}");
    }
    for flags in
        ["--shard zero-2 --slots 3", "--slots 1000", "--shard zero-3 --gather copy --prefetch 3", "", "--prefetch 0"]
    {
        let printed = plan(flags);
        assert!(!printed.contains("no effect"), "{flags}: {printed}");
    }
}

#[test]
fn more_rounds_wait_for_more_and_the_largest_model_is_planned_too() {
    let place = Workplace::new(PROGRAM);
    let exposed = |rounds: u64| {
        let plan = planned(&place, &format!("--flops 400T --prefetch 0 --rounds {rounds}"));
        assert_eq!(number(&plan, "/rounds"), rounds as f64);
        number(&plan, "/simulation/given/exposed")
    };
    assert!(exposed(4) > 2.0 * exposed(1));
    let large = "plan --model llama2-70b --world 512 --ranks-per-host 8 --host-link 450GB/s --flops 400T --mesh replicate=8,shard=64";
    let printed = place.run(&format!("{large} {MACHINE}")).succeeded().stdout;
    for part in ["tokens/s a rank", "exposed", "best of 36", "sums over groups"] {
        assert!(printed.contains(part), "{printed}");
    }
}

#[test]
fn gpus_are_known_by_name_and_flags_say_otherwise() {
    let place = Workplace::new(PROGRAM);
    let planned = |flags: &str| {
        let ended = place.run(&format!("plan --model llama3.1-8b --seq 1024 --micro-batch 1 --json {flags}"));
        serde_json::from_str::<Value>(&ended.succeeded().stdout).expect("one JSON object, and nothing else")
    };
    let machine = |plan: &Value, key: &str| number(plan, &format!("/simulation/machine/{key}"));
    let h100 = planned("--device h100 --ranks 8 --precision bf16 --peak-share 0.5");
    // As NVIDIA's data sheet has them: dense, and one direction of NVLink.
    let published = [("flops", 989.4e12 / 2.0), ("memory", 3.35e12), ("host_link/bandwidth", 450e9)];
    for (key, value) in published {
        assert_eq!(machine(&h100, key), value, "{key}");
    }
    assert_eq!(machine(&h100, "ranks_per_host"), 8.0);
    let f32 = planned("--device h100 --ranks 8 --peak-share 0.5");
    assert_eq!(machine(&f32, "flops"), 66.9e12 / 2.0);
    let step = |plan: &Value| number(plan, "/simulation/given/step");
    let faster = planned("--device b200 --ranks 8 --precision bf16 --peak-share 0.5");
    let slower = planned("--device a100 --ranks 8 --precision bf16 --peak-share 0.5");
    assert!(step(&faster) < step(&h100) && step(&h100) < step(&slower));
    let said = planned("--device h100 --ranks 4 --ranks-per-host 2 --link 50GB/s --flops 1T --memory-bandwidth 1TB/s");
    assert_eq!(
        [machine(&said, "flops"), machine(&said, "memory"), machine(&said, "ranks_per_host")],
        [1e12, 1e12, 2.0]
    );
    // A rank takes in as much as was measured, whatever the share.
    let calibrated = planned("--device h100 --ranks 8 --precision bf16 --calibrate 5000");
    assert!((number(&calibrated, "/simulation/given/tokens_per_s_per_rank") / 5000.0 - 1.0).abs() < 1e-9);
    for (flags, named) in [
        ("--device h100 --peak-share 0", "--peak-share 0"),
        ("--device h100 --peak-share 1.5", "--peak-share 1.5"),
        ("--device h100 --ranks 16", "--link"),
    ] {
        place.run(&format!("plan --model small {flags}")).refused(2, &[named]);
    }
    for (flags, named) in [("--peak-share 0.5", "--device"), ("--device tpu", "a100, h100, h200, b200")] {
        let ended = place.run(&format!("plan --model small {flags}"));
        assert!(ended.code() == Some(2) && ended.stderr.contains(named), "{ended}");
    }
}
