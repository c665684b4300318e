//! `pillion experiment paper` on a text of a few kilobytes: that it goes on, and that it reports what its runs have written.

use std::fs;

use pillion_tests::program::Workplace;
use rustix::process::Signal;

const PROGRAM: &str = env!("CARGO_BIN_EXE_pillion-under-test");
/// Ten steps of the largest batch: a run outlasts the wait for one that is ending.
const SAMPLES: u64 = 640;

#[test]
fn an_interrupted_experiment_goes_on_and_reports_its_runs() {
    let place = Workplace::new(PROGRAM);
    let flags = format!(
        "experiment paper --quick --only constant-64 --samples {SAMPLES} --validation-samples 16 --data text --out paper"
    );
    place.run(&format!("{flags} --report")).refused(1, &["paper", "no run in it is finished", "leave --report out"]);
    let running = place.start(&flags);
    let first = "paper/3.3M/constant-64-seed-1";
    running.wait_for("a second run", || place.path("paper/3.3M/constant-64-warm-up-8-seed-1.log").exists());
    place.run(&flags).refused(1, &["paper", "another run is writing here", "--out DIR"]);
    let metrics = |run: &str| fs::read(place.path(run).join("metrics.jsonl")).unwrap();
    let made = metrics(first);
    running.signal(Signal::TERM);
    let ended = running.finish();
    assert_eq!(ended.code(), Some(75), "{ended}");
    assert!(ended.stdout.contains("the same command goes on from here"), "{ended}");

    let ended = place.run(&flags).succeeded();
    assert_eq!(metrics(first), made, "a finished run is not made again");
    let tables = fs::read_to_string(place.path("paper/report/tables.md")).unwrap();
    assert!(ended.stdout.contains(tables.trim()), "{ended}");
    let rows: Vec<Vec<&str>> = tables
        .lines()
        .skip_while(|line| !line.starts_with("|---"))
        .skip(1)
        .take_while(|line| line.starts_with('|'))
        .map(|line| line.trim_matches('|').split('|').map(str::trim).collect())
        .collect();
    assert_eq!(rows.len(), 2, "{tables}");
    for (row, run) in [(0, "constant-64"), (1, "constant-64-warm-up-8")] {
        let steps = place.steps(&format!("paper/3.3M/{run}-seed-1"));
        let last = steps.last().unwrap();
        assert_eq!(last.samples_seen, SAMPLES);
        let expected = [
            "1".to_owned(),
            steps.len().to_string(),
            format!("{:.1}", SAMPLES as f64 / steps.len() as f64),
            steps.iter().map(|step| step.batch_samples).max().unwrap().to_string(),
        ];
        assert_eq!(rows[row][1..5], expected, "{run}");
        assert_eq!(rows[row][9], format!("{:.4}", last.validation_loss.unwrap()), "{run}");
        let csv = fs::read_to_string(place.path(format!("paper/report/steps/3.3M/{run}-seed-1.csv"))).unwrap();
        assert_eq!(csv.lines().count(), 1 + steps.len());
    }
    let [usual, longer] = ["constant-64", "constant-64-warm-up-8"]
        .map(|run| place.steps(&format!("paper/3.3M/{run}-seed-1")).last().unwrap().validation_loss.unwrap());
    let difference = format!("| constant 64, warm-up × 8 | 1 | {:+.3} |  |", longer - usual);
    assert!(tables.contains(&difference), "{difference} in {tables}");
    let page = fs::read_to_string(place.path("paper/report/report.html")).unwrap();
    assert_eq!(page.matches("<svg").count(), 4);
    for figure in ["loss-samples", "loss-steps", "loss-time", "batch-samples"] {
        let svg = fs::read_to_string(place.path(format!("paper/report/3.3M-{figure}.svg"))).unwrap();
        assert!(page.contains(&svg) && svg.contains("constant 64, warm-up"), "{figure}");
    }
    let other = flags.replace("--validation-samples 16", "--validation-samples 8");
    place
        .run(&format!("{other} --report"))
        .refused(1, &["constant-64-seed-1.log", "validation-samples 16", "--out DIR"]);
    assert_eq!(metrics(first), made);
    // Half a line may be under way; what ends like a line must be one.
    let path = place.path(first).join("metrics.jsonl");
    fs::write(&path, [&made[..], b"{\"step\":"].concat()).unwrap();
    place.run(&format!("{flags} --report")).succeeded();
    let lines: Vec<&[u8]> = made.split_inclusive(|&byte| byte == b'\n').collect();
    for (damaged, line) in [
        ([lines[0], lines[0], lines[1]].concat(), "line 2"),
        (lines[1].to_vec(), "line 1"),
        (vec![0xff], "metrics.jsonl"),
    ] {
        fs::write(&path, damaged).unwrap();
        place.run(&format!("{flags} --report")).refused(1, &["metrics.jsonl", line, "remove the run's folder"]);
    }
    fs::write(&path, [b"{}\n", &made[..]].concat()).unwrap();
    place.run(&format!("{flags} --report")).refused(1, &["metrics.jsonl", "line 1", "remove the run's folder"]);
    fs::write(&path, &made).unwrap();
    // From the same files, the same report.
    place.run(&format!("{flags} --report")).succeeded();
    assert_eq!(fs::read_to_string(place.path("paper/report/report.html")).unwrap(), page);
    assert_eq!(fs::read_to_string(place.path("paper/report/tables.md")).unwrap(), tables);
}

#[test]
fn settings_that_cannot_be_are_named() {
    let place = Workplace::new(PROGRAM);
    for (flags, parts) in [
        ("experiment paper --samples 100", &["--samples 100", "multiple of 64"][..]),
        ("experiment paper --samples 0", &["--samples 0", "multiple of 64"]),
        ("experiment paper --seeds 0", &["--seeds 0", "at least 1"]),
        ("experiment paper --only sgd", &["--only sgd", "norm-test"]),
        ("experiment paper --ranks 3", &["--ranks 3", "1, 2 or 4"]),
        ("abs simulate --groups 1", &["--groups: 1", "at least 2"]),
        ("abs simulate --groups 4 --batch 3", &["--batch: 3", "each group"]),
        ("abs simulate --ema 1", &["--ema: 1", "below 1"]),
        ("abs simulate --ema 0.999", &["--ema: 0.999", "at least 19990 steps", "simulate more"]),
        ("abs simulate --noise-scale nan", &["--noise-scale: NaN", "a millionth of the batch"]),
        ("abs simulate --noise-scale 1e308", &["--noise-scale: 1", "a millionth of the batch"]),
        ("abs simulate --groups 2 --dimensions 8000000000 --steps 2", &["--dimensions: 8000000000", "at most 2^22"]),
        ("abs simulate --groups 2 --dimensions 1 --steps 8000000000", &["--steps: 8000000000", "at most 2^22"]),
        ("abs simulate --dimensions 18446744073709551615", &["fewer --groups, --dimensions or --steps"]),
        ("abs simulate --noise-scale -1", &["--noise-scale: -1", "a millionth of the batch"]),
        ("abs simulate --steps 0", &["--steps: 0", "at least 1"]),
    ] {
        place.run(flags).refused(2, parts);
    }
    for (data, part) in [("nowhere", "no such file or folder"), ("-", "cannot be read twice")] {
        place.run(&format!("experiment paper --data {data} --quick")).refused(1, &[part, "--data"]);
    }
    std::fs::write(place.path("short"), "a few words").unwrap();
    place.run("experiment paper --data short --quick").refused(1, &["constant-16-seed-1", "failed", "see this log"]);
}

#[test]
fn a_simulation_is_a_function_of_its_settings() {
    let place = Workplace::new(PROGRAM);
    let print = |flags: &str| place.run(&format!("abs simulate --groups 2,4 {flags}")).succeeded().stdout;
    assert_eq!(print("--json"), print("--json"));
    assert_ne!(print("--json"), print("--json --seed 2"));
    let rows: serde_json::Value = serde_json::from_str(&print("--json")).unwrap();
    assert_eq!(rows.as_array().unwrap().len(), 8);
    assert!(print("").contains("95 % of the estimates"));
}
