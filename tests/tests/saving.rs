//! `--save-memory`: checkpoints are the same however a rank's state comes to its file, and what a
//! run does not need is not reserved.

use std::fs;

use pillion_tests::program::{Step, TINY, Workplace, is_alive};
use rustix::process::{Resource, Rlimit, Signal, prlimit};
use serde_json::Value;

const PROGRAM: &str = env!("CARGO_BIN_EXE_pillion-under-test");

/// A rank's part of a checkpoint of [`TINY`] has more than 400 kB, so it passes through this ring
/// several times.
const RING: &str = "--save-memory 64KiB";

/// A run's steps without its validations, one of which is at the end of each command.
fn steps(place: &Workplace, out: &str) -> Vec<Step> {
    place.steps(out).into_iter().map(|step| Step { validation_loss: None, ..step }).collect()
}

#[test]
fn a_ring_saves_the_bytes_that_copies_save_and_a_resume_keeps_it() {
    let place = Workplace::new(PROGRAM);
    let whole = place.run(&format!("train {TINY} --out copies --ranks 2 --steps 6 --save-every 2")).succeeded();
    assert!(whole.stdout.contains("a rank for copies"), "{whole}");
    let first = place.run(&format!("train {TINY} --out ring --ranks 2 --steps 4 --save-every 2 {RING}")).succeeded();
    assert!(first.stdout.contains("64.00 KiB a rank for a ring"), "{first}");
    let waited =
        first.stdout.lines().filter(|line| line.starts_with("saved ") && line.contains("of which steps waited"));
    assert_eq!(waited.count(), 2, "{first}");
    // What decides no number can be given anew, and is kept otherwise.
    let resumed = place.run("train --resume auto --out ring --ranks 2 --steps 5").succeeded();
    assert!(resumed.stdout.contains("64.00 KiB a rank for a ring"), "{resumed}");
    let resumed = place.run("train --resume auto --out ring --ranks 2 --steps 6 --save-memory copies").succeeded();
    assert!(resumed.stdout.contains("a rank for copies"), "{resumed}");
    assert_eq!(steps(&place, "ring"), steps(&place, "copies"));
    for step in ["step-00000002", "step-00000004", "step-00000006"] {
        for rank in ["rank-00000-of-00002.safetensors", "rank-00001-of-00002.safetensors"] {
            let read = |out: &str| fs::read(place.path(out).join("checkpoints").join(step).join(rank)).unwrap();
            let copies = read("copies");
            assert!(copies.len() > 400_000 && copies == read("ring"), "{rank} of {step}");
        }
    }
}

#[test]
fn a_run_that_saves_only_at_its_end_has_no_memory_for_copies() {
    let place = Workplace::new(PROGRAM);
    let number = |value: &Value| value.as_f64().expect("a number");
    let model = "--model small --seq 32 --micro-batch 2";
    let planned = |flags: &str| {
        let plan = place.run(&format!("plan {model} --ranks 2 --json {flags}")).succeeded();
        let plan: Value = serde_json::from_str(&plan.stdout).expect("one JSON object");
        (number(&plan["checkpoints"]), number(&plan["total"]))
    };
    let measured = |out: &str, flags: &str| {
        let steps = "--data text --validation-samples 2 --validate-every 0 --sample 0 --ranks 2 --steps 2";
        place.run(&format!("train {model} {steps} --out {out} {flags}")).succeeded();
        place.lines(out).iter().map(|line| number(&line["memory"])).fold(0.0, f64::max)
    };
    let ((ring, with_a_ring), (copies, with_copies)) = (planned(""), planned("--save-memory copies"));
    assert_eq!((ring, with_copies - with_a_ring), (f64::from(1 << 20), copies - ring));
    let saved = measured("saving", "--save-every 1000") - measured("out", "");
    // What else differs are some megabytes: a rank's share of the program's own pages depends on
    // how many processes of it run at once, such as those of other tests. This is 15.
    let off = saved / (copies - ring) - 1.0;
    assert!(off.abs() < 0.5, "{saved} bytes less, predicted are {}", copies - ring);
}

#[test]
fn sizes_that_are_none_are_refused_with_those_that_are() {
    let place = Workplace::new(PROGRAM);
    for value in ["copy", "0", "-1", "64MB/s", "many", "inf", "1e300GB"] {
        for command in [format!("train {TINY} --out out"), "plan".to_owned()] {
            let ended = place.run(&format!("{command} --save-memory={value}"));
            ended.refused(2, &["--save-memory", "64MiB or 1GB", "`copies`"]);
        }
    }
    place.run("plan --save-memory 1KiB").refused(2, &["--save-memory", "at least 64KiB", "`copies`"]);
    assert!(!place.path("out").exists());
}

/// The files may not become as large as they must while one save is under way, or some.
#[test]
fn a_file_that_cannot_be_written_whole_costs_its_checkpoint_alone() {
    for staging in ["--save-memory copies", RING] {
        let place = Workplace::new(PROGRAM);
        let flags = "--samples 1000000 --validate-every 0 --ranks 2 --save-every 3 --keep 2";
        let running = place.start(&format!("train {TINY} {flags} --out out {staging}"));
        running.wait_for_step(&place, "out", 2);
        // Less than a rank's part, and more than its ring.
        let limit = |bytes| {
            for process in running.ranks(2) {
                prlimit(Some(process), Resource::Fsize, Rlimit { current: bytes, maximum: None }).unwrap();
            }
        };
        limit(Some(200_000));
        running.wait_for_stdout("no checkpoint of this step");
        limit(None);
        running.wait_for("a save after those that failed", || {
            running
                .stdout()
                .rsplit_once("no checkpoint of this step")
                .is_some_and(|(_, after)| after.contains("saved out"))
        });
        running.signal(Signal::TERM);
        let ended = running.finish();
        assert_eq!(ended.code(), Some(75), "{ended}");
        ended.has_no_panic();
        let failed = ended.stdout.lines().filter(|line| line.contains("no checkpoint of this step"));
        assert!(failed.clone().all(|line| line.contains("cannot be written")), "{ended}");
        assert!(place.steps("out").windows(2).all(|steps| steps[1].step == steps[0].step + 1), "{ended}");
        assert_eq!(place.checkpoints("out").len(), 2, "{ended}");
        place.run("checkpoint verify out").succeeded();
    }
}

#[test]
fn a_run_that_is_killed_while_its_state_passes_through_a_ring_goes_on_from_a_whole_checkpoint() {
    let place = Workplace::new(PROGRAM);
    let flags = "--controller constant --ranks 2 --samples 1000000 --validate-every 0";
    let mut made = 0;
    for _ in 0..3 {
        let saving = format!("train {TINY} {flags} --out out --resume auto --save-every 1 --keep 2 {RING}");
        let running = place.start(&saving);
        running.wait_for_step(&place, "out", made + 3);
        let ranks = running.ranks(2);
        running.signal(Signal::KILL);
        running.wait_for("the ranks' end", || !ranks.iter().any(|&rank| is_alive(rank)));
        drop(running);
        // The kill may have cut the last line.
        made = fs::read_to_string(place.path("out/metrics.jsonl")).unwrap().matches('\n').count();
        place.run("checkpoint verify out").succeeded();
        // The save of the last step may not have begun, and the one before may have been under way.
        let newest = place.checkpoints("out").into_iter().filter(|name| name.len() == "step-00000001".len()).max();
        assert!(newest.expect("one is whole") >= format!("step-{:08}", made - 2));
    }
    place.train("out", &format!("{flags} --resume auto --steps {}", made + 2));
    place.train("whole", &format!("{flags} --steps {}", made + 2));
    assert_eq!(steps(&place, "whole"), steps(&place, "out"));
}
