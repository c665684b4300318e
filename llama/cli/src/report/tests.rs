//! The page of runs that are made here.

use std::fs;
use std::path::{Path, PathBuf};

use super::*;
use crate::train::lines::tests::line;

/// A run with so many steps and this seed, under `place`.
fn run(place: &Path, name: &str, steps: u64, seed: u64, lr: f64) -> PathBuf {
    let folder = place.join(name);
    fs::create_dir_all(&folder).unwrap();
    let lines: String =
        (1..=steps).map(|step| line(step, 5.0 + seed as f64 / 10.0 - step as f64 / steps as f64)).collect();
    fs::write(folder.join("metrics.jsonl"), lines).unwrap();
    fs::write(folder.join("run.json"), about(seed, lr)).unwrap();
    folder
}

fn about(seed: u64, lr: f64) -> String {
    let arguments = format!("pillion train --model tiny --seed {seed} --lr {lr}");
    let arguments: Vec<String> = arguments.split(' ').map(str::to_owned).collect();
    let Ok(crate::settings::Cli { command: crate::settings::Command::Train(train) }) =
        crate::settings::Cli::from_arguments(&arguments)
    else {
        panic!("{arguments:?}")
    };
    let recipe = crate::train::recipe::Recipe::new(&train, 2).unwrap();
    let placement = [("shard".to_owned(), "zero-3".to_owned())].into();
    let (pillion, data) = ("0.1.0".to_owned(), "0".repeat(16));
    let about = crate::train::about::About { pillion, recipe, data, ranks: Some(2), steps: None, placement };
    serde_json::to_string(&about).unwrap()
}

fn page(runs: &[PathBuf], each: bool) -> Result<String, String> {
    let place = tempfile::tempdir().unwrap();
    let out = place.path().join("page.html");
    let settings = ReportArgs { runs: runs.to_vec(), out: out.clone(), each, tensorboard: None };
    let result = report(&settings).map_err(|error| error.to_string());
    let left: Vec<_> = fs::read_dir(place.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    match result {
        Ok(code) => {
            assert_eq!((code, left.len()), (0, 1), "{left:?}");
            Ok(fs::read_to_string(out).unwrap())
        }
        Err(error) => {
            assert!(left.is_empty(), "{left:?}");
            Err(error)
        }
    }
}

#[test]
fn runs_that_differ_in_their_seed_are_one_line_and_each_of_them_is_one_with_each() {
    let place = tempfile::tempdir().unwrap();
    let names = ["a-seed-1", "a-seed-2", "a-seed-3"];
    let mut runs: Vec<PathBuf> = (1..).zip(names).map(|(seed, name)| run(place.path(), name, 20, seed, 1e-3)).collect();
    runs.push(run(place.path(), "b", 20, 1, 2e-3));
    let together = page(&runs, false).unwrap();
    assert!(together.contains("a (3 seeds)") && together.contains("one line: their mean"));
    // Two lines in each of the plots.
    let lines = |page: &str| page.matches("data-points=").count();
    let plots = together.matches("<figcaption>").count();
    assert_eq!((plots, lines(&together)), (13, 2 * 13));
    assert!(together.contains("class=\"band\""));
    let each = page(&runs, true).unwrap();
    assert_eq!(lines(&each), 4 * 13);
    assert!(!each.contains("class=\"band\"") && !each.contains("3 seeds"));
    // The settings that differ, and no other.
    assert!(each.contains("<th class=\"setting\" scope=\"col\">lr</th>"));
    assert_eq!(each.matches("class=\"setting\"").count(), 1);
    assert!(each.contains("<td>0.002</td>"));
}

#[test]
fn a_run_that_was_made_twice_is_two_lines() {
    let place = tempfile::tempdir().unwrap();
    let runs = [run(place.path(), "a", 5, 1, 1e-3), run(place.path(), "b", 5, 1, 1e-3)];
    let page = page(&runs, false).unwrap();
    assert!(page.contains("<span class=\"name\">a</span>") && page.contains("<span class=\"name\">b</span>"));
}

#[test]
fn six_lines_are_shown_and_the_page_says_so() {
    let place = tempfile::tempdir().unwrap();
    let make = |number: u32| run(place.path(), &format!("run-{number}"), 5, 1, f64::from(number) * 1e-3);
    let runs: Vec<PathBuf> = (1..=8).map(make).collect();
    let eight = page(&runs, false).unwrap();
    assert!(eight.contains("A plot shows 6 lines at most, here of 8."));
    assert_eq!(eight.matches("(not shown)").count(), 2);
    let six = page(&runs[..6], false).unwrap();
    assert!(!six.contains("lines at most") && !six.contains("class=\"of off\""));
}

#[test]
fn text_from_files_is_text() {
    let place = tempfile::tempdir().unwrap();
    let evil = "<script>alert(1)</script>\"'&";
    let name = evil.replace('/', "\u{2044}");
    let folder = run(place.path(), &name, 5, 1, 1e-3);
    let about = fs::read_to_string(folder.join("run.json")).unwrap();
    fs::write(folder.join("run.json"), about.replace("zero-3", "<img src=x onerror=alert(1)>")).unwrap();
    let other = run(place.path(), "other", 5, 1, 1e-3);
    fs::write(folder.join("trace.json"), TRACE.replace("block", "<script>alert(2)</script>")).unwrap();
    let page = page(&[folder, other], false).unwrap();
    assert_eq!(page.matches("<script>").count(), 1, "the page has its own alone");
    assert!(!page.contains("<img") && page.contains("&lt;img src=x") && page.contains("&lt;script&gt;alert(2)"));
}

/// Two steps of two ranks, the first of which is longer.
const TRACE: &str = r#"{"displayTimeUnit":"ms","traceEvents":[
{"args":{"name":"rank 0"},"name":"process_name","ph":"M","pid":0,"tid":0},
{"args":{"bytes":0,"unit":"block 0"},"cat":"compute","dur":9000.0,"name":"forward block 0","ph":"X","pid":0,"tid":0,"ts":0.0},
{"args":{"bytes":0,"unit":"block 0"},"cat":"compute","dur":10.0,"name":"update block 0","ph":"X","pid":0,"tid":0,"ts":9000.0},
{"args":{"bytes":0,"unit":"block 0"},"cat":"compute","dur":1000.0,"name":"forward block 0","ph":"X","pid":0,"tid":0,"ts":10000.0},
{"args":{"bytes":9,"unit":"block 0"},"cat":"reduce","dur":500.0,"name":"reduce block 0","ph":"X","pid":1,"tid":2,"ts":10500.0},
{"args":{"bytes":9,"unit":"block 0"},"cat":"reduce","dur":0.5,"name":"reduce block 1","ph":"X","pid":1,"tid":2,"ts":11000.0},
{"args":{"bytes":0,"unit":"block 0"},"cat":"compute","dur":1000.0,"name":"update block 0","ph":"X","pid":0,"tid":0,"ts":11000.0}
]}
"#;

#[test]
fn the_timeline_is_one_step() {
    let place = tempfile::tempdir().unwrap();
    let folder = run(place.path(), "run", 5, 1, 1e-3);
    fs::write(folder.join("trace.json"), TRACE).unwrap();
    let read = page(std::slice::from_ref(&folder), false).unwrap();
    // The median of two is the longer one.
    assert!(read.contains("A step of run") && read.contains("of median length, 9.01 ms, of 2 ranks"), "{read}");
    fs::write(folder.join("trace.json"), TRACE.replace("9000.0", "900.0")).unwrap();
    let read = page(std::slice::from_ref(&folder), false).unwrap();
    assert!(read.contains("reduce block 0: 0.5 ms from 0.5 ms") && !read.contains("reduce block 1"), "{read}");
    for (damaged, words) in
        [(&TRACE[..400], "is damaged"), ("{\"traceEvents\":[]}", "no whole step"), ("[]", "is damaged")]
    {
        fs::write(folder.join("trace.json"), damaged).unwrap();
        let read = page(std::slice::from_ref(&folder), false).unwrap();
        assert!(read.contains("its timeline is not drawn: trace.json") && read.contains(words), "{damaged}");
    }
}

#[test]
fn what_cannot_be_read_or_written_is_one_error_and_no_page() {
    let place = tempfile::tempdir().unwrap();
    let good = run(place.path(), "good", 5, 1, 1e-3);
    let empty = place.path().join("empty");
    fs::create_dir(&empty).unwrap();
    fs::write(empty.join("metrics.jsonl"), "").unwrap();
    let broken = run(place.path(), "broken", 5, 1, 1e-3);
    fs::write(broken.join("run.json"), "{\"pillion\":").unwrap();
    for (runs, words) in [
        (vec![place.path().join("none")], "no such folder"),
        (vec![good.clone(), place.path().to_owned()], "no run has written"),
        (vec![good.clone(), empty], "has not made a step yet"),
        (vec![good.clone(), place.path().join("none/../good"), good.clone()], "given twice"),
        (vec![broken], "run.json"),
    ] {
        let error = page(&runs, false).unwrap_err();
        assert!(error.contains(words) && !error.contains('\n'), "{error}");
    }
    for out in [place.path().join("none/page.html"), place.path().join("good"), PathBuf::from("/proc/page.html")] {
        let settings = ReportArgs { runs: vec![good.clone()], out: out.clone(), each: false, tensorboard: None };
        let error = report(&settings).unwrap_err().to_string();
        assert!(error.contains("--out FILE") && error.contains(&*out.to_string_lossy()), "{error}");
    }
    assert!(good.join("metrics.jsonl").exists());
}

#[test]
fn notes_say_what_is_missing() {
    let place = tempfile::tempdir().unwrap();
    let folder = run(place.path(), "run", 5, 1, 1e-3);
    fs::remove_file(folder.join("run.json")).unwrap();
    let metrics = fs::read_to_string(folder.join("metrics.jsonl")).unwrap();
    fs::write(folder.join("metrics.jsonl"), metrics.replace("\"noise_scale\":20.0", "\"noise_scale\":null") + "{\"st")
        .unwrap();
    let page = page(&[folder], false).unwrap();
    for words in ["is cut off", "there is no run.json", "Gradient noise scale: no run has a value"] {
        assert!(page.contains(words), "{words}");
    }
    assert!(!page.contains("NaN") && !page.contains("inf "));
}

#[test]
fn a_page_is_small_however_long_the_runs_are() {
    let place = tempfile::tempdir().unwrap();
    let runs: Vec<PathBuf> = (1..=2).map(|run_| run(place.path(), &format!("run-{run_}"), 20_000, 1, 1e-3)).collect();
    let page = page(&runs, false).unwrap();
    assert!(page.len() < 500_000, "{}", page.len());
}

#[test]
fn event_files_are_by_the_names_of_runs() {
    let place = tempfile::tempdir().unwrap();
    let runs = ["x/run", "y/run"].map(|name| run(place.path(), name, 5, 1, 1e-3)).to_vec();
    let tensorboard = Some(place.path().join("events"));
    let settings = ReportArgs { runs, out: place.path().join("page.html"), each: false, tensorboard };
    report(&settings).unwrap();
    for name in ["x/run", "y/run"] {
        let names = crate::train::events::files(&place.path().join("events").join(name)).unwrap();
        assert_eq!(names.len(), 1, "{name}");
    }
}
