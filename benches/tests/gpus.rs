//! `collbench` with buffers on GPUs: no element is wrong, and what GPUs do not have is named. Over
//! the stand-ins of `tests/standins` (`ci/cuda`), or on GPUs.

use std::process::{Command, Output};

use serde_json::Value;

fn collbench(arguments: &str) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_collbench"));
    command.args(arguments.split_whitespace()).output().expect("the binary starts")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn no_element_is_wrong_on_gpus() {
    for (backend, ranks, more) in [
        ("peer", 1, "--threads"),
        ("peer", 3, "--threads --reduce-groups 3"),
        ("peer", 2, ""),
        ("nccl", 2, ""),
        ("nccl", 2, "--threads"),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("results.json");
        let arguments = format!(
            "all --device cuda --backend {backend} -r {ranks} {more} -t all -o all --sizes 0,24,20K -n 2 -w 1 --check \
             --in-place --json {}",
            file.display()
        );
        let output = collbench(&arguments);
        let said = format!("{arguments}\n{}{}", text(&output.stdout), text(&output.stderr));
        assert_eq!(output.status.code(), Some(0), "{said}");
        let document: Value = serde_json::from_str(&std::fs::read_to_string(file).unwrap()).unwrap();
        let results = document["results"].as_array().unwrap();
        let of = |operation: &str| results.iter().filter(|result| result["op"] == operation).count();
        // Gathers of eleven types in two forms; three reductions of two types in two forms.
        let counts = ["all-gather", "broadcast", "reduce-scatter", "all-reduce", "barrier"].map(of);
        assert_eq!(counts, [11 * 3 * 2, 11 * 3, 2 * 3 * 3 * 2, 2 * 3 * 3 * 2, 1], "{said}");
        for result in results {
            assert!(result["wrong"] == 0 && result["backend"] == backend, "{result}");
        }
    }
}

#[test]
fn every_kernel_is_timed_on_a_gpu() {
    let table = |device: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_kernelbench"));
        let output = command.args(["--device", device, "--table", "--small", "--milliseconds", "1"]).output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
        text(&output.stdout).lines().skip(3).map(|row| row[..44].trim().to_owned()).collect()
    };
    let [cpu, gpu]: [Vec<String>; 2] = ["cpu", "cuda:1"].map(table);
    assert!(cpu == gpu && gpu.iter().any(|name| name == "attention_backward/bf16 64 tokens"), "{gpu:?}");
}

#[test]
fn a_gpu_that_there_is_not_is_named_by_kernelbench() {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kernelbench"));
    let output = command.args(["--device", "cuda:99", "--table"]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("no GPU 99"), "{}", text(&output.stderr));
    let mut command = Command::new(env!("CARGO_BIN_EXE_kernelbench"));
    let output = command.args(["--small", "--table", "nothing-like-it"]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("no case has this"), "{}", text(&output.stderr));
}

#[test]
fn what_gpus_do_not_have_is_named() {
    for (arguments, named) in [
        ("gather --device cuda", "reduce-scatter, all-gather, all-reduce, broadcast"),
        ("all-reduce --device cuda -o max", "no max of f32"),
        ("all-reduce --device cuda -t i32", "no sum of i32"),
        ("all-reduce --device cuda --backend shm", "peer and nccl"),
        ("all-reduce --backend nccl", "--device cuda"),
        ("all-reduce --device cuda --cold", "--cold"),
        ("all-reduce --device cuda:99", "no GPU 99"),
        ("all-reduce --device gpu", "cuda:N"),
    ] {
        let output = collbench(arguments);
        let said = text(&output.stderr);
        assert!(output.status.code() == Some(2) && said.contains(named), "{arguments}: {said}");
    }
}
