//! Limits that the system sets: the message names the limit and the remedy, once, and every rank
//! ends.

use std::os::unix::process::CommandExt;
use std::process::Command;

use pillion_tests::program::{Ended, TINY, Workplace};
use rustix::process::{Resource, Rlimit, Signal, prlimit};

const PROGRAM: &str = env!("CARGO_BIN_EXE_pillion-under-test");

/// Runs the program with limits in prlimit's notation, such as `--fsize=100`.
fn under(place: &Workplace, limits: &str, arguments: &str) -> Ended {
    let mut command = Command::new("prlimit");
    command.args(limits.split_whitespace()).arg(place.program()).args(arguments.split_whitespace());
    place.prepare(&mut command);
    place.spawn(command).finish()
}

#[test]
fn a_limit_of_file_sizes_is_named_by_every_command_that_needs_shared_memory() {
    let place = Workplace::new(PROGRAM);
    place.train("run", "--ranks 1 --steps 1");
    for arguments in [
        format!("train {TINY} --ranks 1 --steps 2 --out out"),
        format!("train {TINY} --ranks 3 --steps 2 --out out"),
        format!("train {TINY} --ranks 3 --steps 2 --out out --launch threads"),
        "generate --checkpoint run --tokens 1".to_owned(),
    ] {
        // Large enough for the token file and the test's own output.
        let ended = under(&place, "--fsize=10000000", &arguments);
        ended.refused(1, &["shared memory", "10000000 bytes", "ulimit -f unlimited"]);
        assert_eq!(ended.stderr.lines().count(), 1, "{arguments}: {ended}");
    }
}

#[test]
fn a_file_that_grows_beyond_the_limit_is_named_and_ends_no_rank_by_a_signal() {
    let place = Workplace::new(PROGRAM);
    for (launch, save_memory) in [("processes", "64KiB"), ("threads", "copies")] {
        let running = place.start(&format!(
            "train {TINY} --samples 1000000 --validate-every 0 --out {launch} --ranks 2 --launch {launch} --save-memory {save_memory}"
        ));
        running.wait_for_step(&place, launch, 2);
        // The shared memory exists by now. The metrics of some 40 steps and a rank's part of a
        // checkpoint are larger than this.
        let limit = Rlimit { current: Some(20_000), maximum: None };
        let processes = if launch == "threads" { vec![running.pid()] } else { running.ranks(2) };
        for process in processes {
            prlimit(Some(process), Resource::Fsize, limit).unwrap();
        }
        running.wait_for_stdout("no metrics of this step");
        running.signal(Signal::TERM);
        let ended = running.finish();
        assert_eq!(ended.code(), Some(1), "{ended}");
        let said = |text: &str, parts: &[&str]| text.lines().any(|line| parts.iter().all(|part| line.contains(part)));
        assert!(said(&ended.stderr, &["cannot be written", "ulimit -f unlimited"]), "{ended}");
        assert!(said(&ended.stdout, &["no metrics of this step", "ulimit -f unlimited"]), "{ended}");
        assert!(!ended.stderr.contains("signal"), "{ended}");
        ended.has_no_panic();
    }
}

/// Copies a program in another process. A child that another test starts meanwhile would inherit
/// this process's open file, and no file that is open for writing can be executed.
fn copy_program(from: impl AsRef<std::ffi::OsStr>, to: impl AsRef<std::ffi::OsStr>) {
    assert!(Command::new("cp").arg(from).arg(to).status().unwrap().success());
}

/// A user of whom nothing else runs, whose limit of processes holds (root's does not); `None`, and
/// a line that says so, where this user may not become another.
fn lonely_user(place: &Workplace) -> Option<u32> {
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED: limits of processes: only root can run the program as a user of whom nothing else runs");
        return None;
    }
    // Each test process has its own, so that tests that run at once do not count together.
    let user = 1_000_000 + std::process::id();
    copy_program(place.program(), place.path("program"));
    for path in ["", "text", "program"].map(|name| place.path(name)) {
        std::os::unix::fs::chown(path, Some(user), None).unwrap();
    }
    Some(user)
}

#[test]
fn a_limit_of_processes_and_threads_is_named_wherever_it_is_met() {
    for (launch, ranks) in [("threads", 3), ("processes", 3), ("processes", 1)] {
        let place = Workplace::new(PROGRAM);
        let Some(user) = lonely_user(&place) else { return };
        let mut refused = 0;
        // Until there are enough for everything.
        for limit in 1..60 {
            let mut command = Command::new("prlimit");
            command.arg(format!("--nproc={limit}")).arg(place.path("program"));
            let flags =
                format!("train {TINY} --steps 1 --threads 1 --ranks {ranks} --out out-{limit} --launch {launch}");
            command.args(flags.split_whitespace()).uid(user);
            place.prepare(&mut command);
            let ended = place.spawn(command).finish();
            ended.has_no_panic();
            if ended.code() == Some(0) {
                break;
            }
            refused += 1;
            assert_eq!(ended.code(), Some(1), "{limit} {launch}: {ended}");
            // Ranks that fail at the same moment, after all have joined, each say so. Nobody else
            // does.
            let lines: Vec<&str> = ended.stderr.lines().collect();
            assert!((1..=ranks).contains(&lines.len()), "{limit} {launch}: {ended}");
            for line in lines {
                assert!(line.contains("ulimit -u") && line.contains("raise"), "{limit} {launch}: {ended}");
            }
        }
        assert!((3..59).contains(&refused), "{launch}: the limit was met {refused} times");
    }
}

#[test]
fn a_limit_of_open_files_is_named_by_whoever_meets_it() {
    let place = Workplace::new(PROGRAM);
    let mut refused = 0;
    for limit in 4..40 {
        let ended =
            under(&place, &format!("--nofile={limit}"), &format!("train {TINY} --steps 1 --ranks 3 --out out-{limit}"));
        ended.has_no_panic();
        if ended.code() == Some(0) {
            break;
        }
        refused += 1;
        assert!(!ended.stderr.contains("refused"), "{limit}: {ended}");
        assert!(ended.stderr.contains("Too many open files") || ended.stderr.contains("ulimit -n"), "{limit}: {ended}");
    }
    assert!((2..35).contains(&refused), "the limit was met {refused} times");
}
