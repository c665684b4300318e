//! `collbench` over every operation, type, odd size, number of ranks, kind of rank and kind of buffer: no element may be wrong. And what
//! it says to those who ask for what cannot be.

use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

const OPERATIONS: [&str; 17] = [
    "reduce-scatter",
    "all-gather",
    "all-reduce",
    "broadcast",
    "reduce",
    "gather",
    "scatter",
    "all-to-all",
    "send-recv",
    "barrier",
    "window",
    "scalars",
    "reduce-scatter-v",
    "all-gather-v",
    "gather-v",
    "scatter-v",
    "all-to-all-v",
];

/// Operations that are measured out of place and in place, under `--in-place`.
const BOTH_FORMS: [&str; 5] = ["reduce-scatter", "all-gather", "all-reduce", "reduce-scatter-v", "all-gather-v"];

/// Types of elements.
const TYPES: usize = 11;

/// Nothing; less than an element of each rank; elements that do not come out even; more than a page, and odd.
const SIZES: [usize; 5] = [0, 4, 12, 1000, 65_541];

fn collbench(arguments: &str) -> Output {
    // A launcher around the tests is not meant.
    let inherited = [
        "PILLION_",
        "OMPI_",
        "PMI",
        "SLURM_",
        "RANK",
        "WORLD_SIZE",
        "LOCAL_",
        "TORCHELASTIC",
        "MPI_",
        "FLUX_",
        "PALS_",
        "JSM_",
        "MV2_",
        "ALPS_",
        "MPT_",
        "MPIRUN_",
    ];
    let mut command = Command::new(env!("CARGO_BIN_EXE_collbench"));
    for (name, _) in std::env::vars().filter(|(name, _)| inherited.iter().any(|prefix| name.starts_with(prefix))) {
        command.env_remove(name);
    }
    command.args(arguments.split_whitespace()).output().expect("the binary starts")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Results of a run that must succeed.
fn results(arguments: &str, folder: &Path) -> Vec<Value> {
    let file = folder.join("results.json");
    let output = collbench(&format!("{arguments} --json {}", file.display()));
    assert_eq!(output.status.code(), Some(0), "{arguments}: {}{}", text(&output.stdout), text(&output.stderr));
    assert!(text(&output.stdout).contains("# Out of bounds values : 0 OK"), "{}", text(&output.stdout));
    let document: Value = serde_json::from_str(&std::fs::read_to_string(file).unwrap()).unwrap();
    assert!(document["machine"]["cores"].as_u64().unwrap() > 0);
    assert_eq!(document["command"].as_array().unwrap().len(), arguments.split_whitespace().count() + 3);
    document["results"].as_array().unwrap().clone()
}

/// Runs everything on `ranks` ranks and looks at every result.
fn run_matrix(ranks: usize, more: &str) {
    let folder = tempfile::tempdir().unwrap();
    let sizes = SIZES.map(|size| size.to_string()).join(",");
    let arguments = format!("all -t all --sizes {sizes} -n 1 -w 0 --check --in-place -r {ranks} {more}");
    let results = results(&arguments, folder.path());
    let mut seen = std::collections::BTreeMap::<&str, usize>::new();
    for result in &results {
        assert_eq!(result["wrong"], 0, "{result}");
        assert_eq!(result["ranks"], ranks);
        assert_eq!(result["samples_us"].as_array().unwrap().len(), 1);
        *seen.entry(result["op"].as_str().unwrap()).or_default() += 1;
    }
    for operation in OPERATIONS {
        let lines = if ["barrier", "scalars"].contains(&operation) { 1 } else { TYPES * SIZES.len() };
        let forms = if BOTH_FORMS.contains(&operation) { 2 } else { 1 };
        assert_eq!(seen.get(operation), Some(&(lines * forms)), "{operation} with {more}");
    }
}

#[test]
fn no_element_is_wrong_between_threads() {
    for ranks in [1, 2, 3, 4, 8] {
        for buffers in ["arena", "private"] {
            run_matrix(ranks, &format!("--threads --buffers {buffers}"));
        }
    }
}

#[test]
fn no_element_is_wrong_however_types_are_combined() {
    let folder = tempfile::tempdir().unwrap();
    // Six reductions of four floats, eight of six integers, seven of truth values; of which a
    // scalar is f64.
    let calls = 4 * 6 + 6 * 8 + 7;
    for (operation, lines) in
        [("reduce-scatter", 2 * calls), ("all-reduce", 2 * calls), ("reduce", calls), ("scalars", 6)]
    {
        for more in ["-r 3 --buffers arena", "-r 4 --hosts 2 --buffers private", "-r 2 --hosts 2"] {
            let rest = match operation {
                "scalars" => more.split(" --buffers").next().unwrap().to_owned(),
                "reduce" => format!("-t all --sizes 12,1000,30000 {more}"),
                _ => format!("-t all --sizes 12,1000,30000 --in-place {more}"),
            };
            let arguments = format!("{operation} -o all -n 1 -w 0 --check --threads {rest}");
            let results = results(&arguments, folder.path());
            let sizes = if operation == "scalars" { 1 } else { 3 };
            assert_eq!(results.len(), lines * sizes, "{arguments}");
            for result in &results {
                assert_eq!(result["wrong"], 0, "{result}");
            }
        }
    }
}

#[test]
fn reductions_that_a_type_has_not_are_named() {
    let output = collbench("all-reduce -t all -o band --sizes 64 -n 1 -w 0 --check --threads");
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    for dtype in ["f32", "bf16", "f16", "f64"] {
        assert!(text(&output.stdout).contains(&format!("# there is no band of {dtype}: left out")));
    }
    let output = collbench("all-reduce -t f16 -o band --threads");
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output.stderr).contains("there is no band of f16"), "{}", text(&output.stderr));
}

#[test]
fn no_element_is_wrong_between_processes() {
    for ranks in [2, 3] {
        for buffers in ["arena", "private"] {
            run_matrix(ranks, &format!("--buffers {buffers}"));
        }
    }
}

#[test]
fn no_element_is_wrong_between_more_ranks_than_fit() {
    let folder = tempfile::tempdir().unwrap();
    let cores = std::thread::available_parallelism().unwrap().get();
    let ranks = 24.max(8 * cores + 1);
    let refused = collbench(&format!("barrier -r {ranks} --threads"));
    assert_eq!(refused.status.code(), Some(2));
    assert!(text(&refused.stderr).contains("--oversubscribe"), "{}", text(&refused.stderr));
    let arguments = format!("all --sizes 4100 -n 1 -w 0 --check -r {ranks} --threads --oversubscribe");
    for result in results(&arguments, folder.path()) {
        assert_eq!((&result["wrong"], &result["ranks"]), (&Value::from(0), &Value::from(ranks)), "{result}");
    }
}

/// Large enough for the tables of expected values.
#[test]
fn no_element_of_a_large_buffer_is_wrong() {
    let folder = tempfile::tempdir().unwrap();
    for result in results("all -t all --sizes 3M -n 1 -w 0 --check --in-place -r 2 --threads", folder.path()) {
        assert_eq!(result["wrong"], 0, "{result}");
    }
}

#[test]
fn where_nothing_is_moved_there_is_no_bandwidth() {
    let output = collbench("barrier -n 1 -r 2 --threads");
    let said = text(&output.stdout);
    assert!(said.contains("# Avg bus bandwidth    : N/A (nothing was moved)"), "{said}");
}

#[test]
fn no_element_is_wrong_in_groups_and_with_the_largest() {
    run_matrix(4, "--threads --reduce-groups 2");
    run_matrix(6, "--threads --reduce-groups 3 --buffers private");
    run_matrix(3, "--threads -o max");
}

#[test]
fn no_element_is_wrong_between_simulated_hosts() {
    run_matrix(4, "--threads --hosts 2");
    run_matrix(4, "--threads --hosts 2 --buffers private --backend hierarchical");
    run_matrix(3, "--threads --hosts 3 --backend mpi");
}

/// Above the size at which stores pass by the caches, and above the one at which a communicator is replaced.
#[test]
fn large_buffers_cold_and_beside_a_computation() {
    let folder = tempfile::tempdir().unwrap();
    let arguments = "reduce-scatter --sizes 70000004,70000004 -n 2 -w 0 --check --in-place --cold --overlap --threads";
    let results = results(arguments, folder.path());
    assert_eq!(results.len(), 4);
    for result in results {
        assert_eq!((&result["wrong"], &result["size"]), (&Value::from(0), &Value::from(70_000_000)), "{result}");
        let roofline = &result["roofline"];
        assert_eq!(
            (&roofline["bytes_read"], &roofline["bytes_written"]),
            (&Value::from(70_000_000), &Value::from(35_000_000))
        );
        let times = ["min_us", "p50_us", "p95_us", "p99_us"].map(|name| result[name].as_f64().unwrap());
        assert!(times.is_sorted() && times[0] > 0.0, "{times:?}");
        let overlap = &result["overlap"];
        assert_eq!(overlap.is_null(), result["in_place"] == true, "overlap is measured for the first form");
    }
}

#[test]
fn bandwidths_follow_from_size_and_time() {
    let folder = tempfile::tempdir().unwrap();
    for result in results("all-reduce --sizes 1M -r 4 --threads -n 3 --check", folder.path()) {
        let number = |name: &str| result[name].as_f64().unwrap();
        // Bytes in a microsecond are 10⁻³ GB/s; 2(n−1)/n of them cross a link.
        let algbw = 1_048_576.0 / number("p50_us") / 1e3;
        assert!((number("algbw") / algbw - 1.0).abs() < 1e-12);
        assert!((number("busbw") / algbw - 1.5).abs() < 1e-12);
    }
}

/// Two processors or more give two ranks one or more each, and none in common.
#[test]
fn ranks_are_bound_apart_unless_told_otherwise() {
    let processors = rustix::thread::sched_getaffinity(None).unwrap().count();
    for kind in ["--threads", ""] {
        for (flag, binding) in
            [("", if processors > 1 { "core" } else { "none" }), ("--bind core", "core"), ("--bind none", "none")]
        {
            let folder = tempfile::tempdir().unwrap();
            let file = folder.path().join("results.json");
            let output = collbench(&format!("barrier -n 1 -r 2 {kind} {flag} --json {}", file.display()));
            assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
            let head = text(&output.stdout);
            assert!(head.contains(&format!("# binding {binding}, processors 0:")), "{kind} {flag}: {head}");
            let document: Value = serde_json::from_str(&std::fs::read_to_string(file).unwrap()).unwrap();
            let affinity = &document["machine"]["affinity"];
            assert_eq!(affinity[0] != affinity[1], binding == "core" && processors > 1, "{kind} {flag}: {affinity}");
        }
    }
}

#[test]
fn without_a_check_nothing_is_said_to_be_right() {
    let output = collbench("all-gather --sizes 64 -n 1 --threads");
    assert_eq!(output.status.code(), Some(0));
    let table = text(&output.stdout);
    assert!(table.contains("N/A") && !table.contains("0 OK"), "{table}");
}

#[test]
fn what_cannot_be_ends_with_code_2_and_a_reason() {
    for (arguments, reason) in [
        ("all-reduse", "all-reduce"),
        ("all-reduce -b 2K -e 1K", "-b 2048 is more than -e 1024"),
        ("all-reduce -f 1", "-f 1"),
        ("all-reduce -n 0", "-n 0"),
        ("all-reduce -r 0", "-r 0"),
        ("all-reduce -r 100000", "100000 ranks asked for"),
        ("all-reduce -t f8", "f16"),
        ("all-gather -o max", "leave it out"),
        ("gather --in-place", "gather"),
        ("all-reduce --threads --reduce-groups 3", "--reduce-groups 3 does not divide 2"),
        ("all-reduce --reduce-groups 2 -r 3", "--reduce-groups 2 does not divide 3"),
        ("all-reduce --hosts 2", "--threads"),
        ("all-reduce --threads -r 3 --hosts 2", "--hosts 2 does not divide 3"),
        ("all-reduce --compare mpi", "--compare mpi"),
        ("all-reduce --bind socket", "socket"),
        ("", "<OP>"),
    ] {
        let output = collbench(arguments);
        let error = text(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{arguments}: {error}");
        assert!(error.contains(reason) && !error.contains("panicked"), "{arguments}: {error}");
        assert!(output.stdout.is_empty(), "{arguments}: {}", text(&output.stdout));
    }
}

#[test]
fn failures_end_every_rank_with_code_1_and_one_message() {
    for kind in ["--threads", ""] {
        for (arguments, reason) in [
            ("all-reduce --sizes 100000G", "B on this host for its ranks' buffers"),
            ("all-reduce --sizes 100000G --buffers private", "B on this host for its ranks' buffers"),
            ("window --sizes 100000G", "B on this host for its ranks' buffers"),
            ("all-reduce --sizes 8 --json /nowhere/results.json", "cannot write /nowhere/results.json"),
        ] {
            let output = collbench(&format!("{arguments} -r 3 {kind}"));
            let error = text(&output.stderr);
            assert_eq!(output.status.code(), Some(1), "{arguments} {kind}: {error}");
            assert_eq!(error.matches(reason).count(), 1, "{arguments} {kind}: {error}");
            assert!(!error.contains("panicked"), "{arguments} {kind}: {error}");
        }
    }
}

#[test]
fn other_launchers_ranks_are_found_and_not_contradicted() {
    let rank = |arguments: &str| {
        Command::new(env!("CARGO_BIN_EXE_collbench"))
            .args(arguments.split_whitespace())
            .envs([("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "1")])
            .env("TORCHELASTIC_RUN_ID", "collbench-test")
            .output()
            .expect("the binary starts")
    };
    let alone = rank("all-reduce --sizes 8 -n 1 --check");
    assert_eq!(alone.status.code(), Some(0), "{}", text(&alone.stderr));
    assert!(text(&alone.stdout).contains("ranks 1 (torchrun)"), "{}", text(&alone.stdout));
    for (arguments, reason) in [("-r 2", "-r 2 contradicts the 1 ranks"), ("--threads", "--threads starts ranks")] {
        let output = rank(&format!("all-reduce --sizes 8 {arguments}"));
        assert_eq!(output.status.code(), Some(2));
        assert!(text(&output.stderr).contains(reason), "{}", text(&output.stderr));
    }
}
