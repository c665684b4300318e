//! `collbench` under `mpirun`: no element is wrong over MPI, flat and hierarchical, and the comparison with MPI's own operations says what it
//! should. Needs the feature `mpi` and Open MPI's `mpirun`; says so where that is missing.

#![cfg(feature = "mpi")]

use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Output};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

const BINARY: &str = env!("CARGO_BIN_EXE_collbench");

/// The most that a run may take. `mpirun` is then asked to end its ranks, and killed if it does not.
const LIMIT: Duration = Duration::from_secs(60);
const GRACE: Duration = Duration::from_secs(5);

/// MPI polls without sleeping: two jobs on few processors slow each other down many times over.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// Runs Open MPI's `mpirun` with these words, of which `collbench` is the binary; nothing where there is no Open MPI.
fn mpirun(words: &str) -> Option<Output> {
    match Command::new("mpirun").arg("--version").output() {
        Ok(output) if text(&output.stdout).contains("Open MPI") => {}
        _ => {
            eprintln!("SKIPPED: there is no Open MPI mpirun on the PATH (Debian: openmpi-bin)");
            return None;
        }
    }
    let _turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let folder = tempfile::tempdir().unwrap();
    let [out, err] = ["out", "err"].map(|name| folder.path().join(name));
    let words = words.split_whitespace().map(|word| if word == "collbench" { BINARY } else { word });
    let mut child = Command::new("mpirun")
        .args(["--oversubscribe", "--bind-to", "none"])
        .args(words)
        .envs([("OMPI_ALLOW_RUN_AS_ROOT", "1"), ("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1"), ("RUST_BACKTRACE", "0")])
        // Ranks that share a processor must not spin for their time slices.
        .env("OMPI_MCA_mpi_yield_when_idle", "1")
        .stdout(File::create(&out).unwrap())
        .stderr(File::create(&err).unwrap())
        .spawn()
        .expect("mpirun starts");
    let pid = Pid::from_child(&child);
    let started = Instant::now();
    let mut asked = false;
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if started.elapsed() > LIMIT {
            child.kill().unwrap();
        } else if !asked && started.elapsed() > LIMIT - GRACE {
            asked = true;
            kill_process(pid, Signal::TERM).unwrap();
        }
        std::thread::sleep(Duration::from_millis(10));
    };
    let output = Output { status, stdout: fs::read(out).unwrap(), stderr: fs::read(err).unwrap() };
    assert!(!asked, "did not end within {:?}: {}{}", LIMIT - GRACE, text(&output.stdout), text(&output.stderr));
    Some(output)
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Results of a run that must succeed; the last words are completed by the file for them.
fn results(words: impl Fn(&Path) -> String) -> Option<Vec<Value>> {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("results.json");
    let words = words(&file);
    let output = mpirun(&words)?;
    assert_eq!(output.status.code(), Some(0), "{words}: {}{}", text(&output.stdout), text(&output.stderr));
    assert!(text(&output.stdout).contains("# Out of bounds values : 0 OK"), "{words}: {}", text(&output.stdout));
    let document: Value = serde_json::from_str(&fs::read_to_string(file).unwrap()).unwrap();
    Some(document["results"].as_array().unwrap().clone())
}

/// Nothing; less than an element of each rank; elements that do not come out even; more than a page.
const MATRIX: &str = "all -t all --sizes 0,4,12,65540 --check -n 1 -w 0";

/// Types of elements.
const TYPES: usize = 11;

/// Operations that move buffers.
const MOVE: usize = 15;

/// Those with all types and four sizes, and two without.
const LINES: usize = MOVE * TYPES * 4 + 2;

fn none_is_wrong(results: &[Value], backend: &str, ranks: usize) {
    assert_eq!(results.len(), LINES);
    for result in results {
        assert_eq!(result["wrong"], 0, "{result}");
        assert_eq!((&result["backend"], &result["ranks"]), (&Value::from(backend), &Value::from(ranks)), "{result}");
    }
}

#[test]
fn no_element_is_wrong_over_mpi_alone() {
    for ranks in [2, 3, 4] {
        let words = |file: &Path| format!("-n {ranks} collbench {MATRIX} --backend mpi --json {}", file.display());
        let Some(results) = results(words) else { return };
        none_is_wrong(&results, "mpi", ranks);
    }
}

#[test]
fn no_element_is_wrong_in_a_hierarchy() {
    // With one rank on each host there is nothing but messages.
    for (each, backend) in [(1, "mpi"), (2, "hierarchical")] {
        let words = |file: &Path| {
            let collbench = format!("collbench {MATRIX} --backend hierarchical --json {}", file.display());
            format!("-n {each} -x PILLION_HOST=a {collbench} : -n {each} -x PILLION_HOST=b {collbench}")
        };
        let Some(results) = results(words) else { return };
        none_is_wrong(&results, backend, 2 * each);
        assert!(results.iter().all(|result| result["hosts"] == 2));
    }
}

#[test]
fn every_operation_has_its_counterpart_in_mpi() {
    let sizes = [12, 4096];
    let words = |file: &Path| {
        format!("-n 2 collbench all -t all --sizes 12,4096 --check -n 7 -w 1 --compare mpi --json {}", file.display())
    };
    let Some(results) = results(words) else { return };
    let (ours, library): (Vec<&Value>, Vec<&Value>) = results.iter().partition(|result| result["call"].is_null());
    assert_eq!(ours.len(), MOVE * TYPES * sizes.len() + 2);
    for result in &results {
        assert_eq!(result["wrong"], 0, "{result}");
        assert_eq!(result["samples_us"].as_array().unwrap().len(), 7, "{result}");
    }
    let calls = |op: &str, dtype: &str| -> Vec<&str> {
        let of_line = library.iter().filter(|result| result["op"] == op && result["dtype"] == dtype);
        of_line.map(|result| result["call"].as_str().unwrap()).collect()
    };
    for dtype in ["f32", "f64", "i8", "u8", "i32", "u32", "i64", "u64"] {
        let both = ["MPI_Reduce_scatter_block", "MPI_Reduce_scatter"];
        assert_eq!(calls("reduce-scatter", dtype), [both, both].concat());
        for (op, call) in [
            ("all-gather", "MPI_Allgather"),
            ("all-reduce", "MPI_Allreduce"),
            ("broadcast", "MPI_Bcast"),
            ("reduce", "MPI_Reduce"),
            ("gather", "MPI_Gather"),
            ("scatter", "MPI_Scatter"),
            ("all-to-all", "MPI_Alltoall"),
            ("send-recv", "MPI_Sendrecv"),
            ("all-gather-v", "MPI_Allgatherv"),
            ("gather-v", "MPI_Gatherv"),
            ("scatter-v", "MPI_Scatterv"),
            ("all-to-all-v", "MPI_Alltoallv"),
            ("reduce-scatter-v", "MPI_Reduce_scatter"),
        ] {
            assert_eq!(calls(op, dtype), [call; 2], "{op} {dtype}");
        }
        assert!(calls("window", dtype).is_empty());
    }
    assert_eq!((calls("barrier", "none"), calls("scalars", "f64")), (vec!["MPI_Barrier"], vec!["MPI_Allreduce"]));
    for dtype in ["bf16", "f16", "bool"] {
        assert!(library.iter().all(|result| result["dtype"] != dtype), "MPI has no {dtype}");
    }
    for result in library {
        assert!(result["backend"].as_str().unwrap().starts_with("mpi library: Open MPI"), "{result}");
    }
}

#[test]
fn mpi_combines_as_we_do_where_it_can() {
    let words = |file: &Path| {
        let arguments = "all-reduce -t all -o all --sizes 4096 --check -n 1 -w 0 --compare mpi";
        format!("-n 3 collbench {arguments} --json {}", file.display())
    };
    let Some(results) = results(words) else { return };
    assert!(results.iter().all(|result| result["wrong"] == 0), "{results:?}");
    let of_library = results.iter().filter(|result| !result["call"].is_null());
    // Two floats: sum, prod, min, max; six integers: the three of bits as well.
    assert_eq!(of_library.count(), 2 * 4 + 6 * 7);
}

/// The ratio printed is that of the two times printed before it, but for their rounding.
#[test]
fn a_line_says_how_many_times_longer_mpi_takes() {
    let Some(output) = mpirun("-n 2 collbench all-reduce --sizes 64K -t f32 -n 5 --compare mpi") else { return };
    let table = text(&output.stdout);
    assert_eq!(output.status.code(), Some(0), "{table}{}", text(&output.stderr));
    let line = table.lines().find(|line| line.trim_start().starts_with("65536 ")).expect(&table);
    let words: Vec<&str> = line.split_whitespace().collect();
    let number = |word: usize| words[word].parse::<f64>().unwrap_or_else(|_| panic!("{word} of {line}"));
    let (ours, mpi, ratio) = (number(5), number(words.len() - 3), number(words.len() - 2));
    assert!((mpi / ours - ratio).abs() <= 0.005 + 0.01 * ratio, "{line}");
}

#[test]
fn without_mpirun_or_with_two_forms_nothing_is_compared() {
    let run = |words: &str| {
        let mut command = Command::new(BINARY);
        for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("OMPI_") || name.starts_with("PMI")) {
            command.env_remove(name);
        }
        command.args(words.split_whitespace()).output().expect("the binary starts")
    };
    for (words, reason) in [
        ("all-reduce --compare mpi", "start them with `mpirun"),
        ("all-reduce --compare mpi --threads", "start them with `mpirun"),
        ("all-reduce --compare mpi --in-place", "leave --in-place out"),
        ("window --compare mpi", "window has no counterpart"),
    ] {
        let output = run(words);
        let error = text(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{words}: {error}");
        assert!(error.contains(reason) && output.stdout.is_empty(), "{words}: {error}");
    }
}
