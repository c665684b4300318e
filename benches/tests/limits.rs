//! `collbench` under limits of the system, and as ranks that were all given the same wrong
//! arguments.

use std::os::unix::process::CommandExt;
use std::process::{Command, Output, Stdio};

const COLLBENCH: &str = env!("CARGO_BIN_EXE_collbench");

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Takes the variables of a launcher around the tests out of a command's environment.
fn clean(command: &mut Command) -> &mut Command {
    let inherited = ["PILLION_", "OMPI_", "PMI", "SLURM_", "RANK", "WORLD_SIZE", "LOCAL_", "TORCHELASTIC", "MPI_"];
    for (name, _) in std::env::vars().filter(|(name, _)| inherited.iter().any(|prefix| name.starts_with(prefix))) {
        command.env_remove(name);
    }
    command
}

fn run(command: &mut Command) -> Output {
    clean(command).output().expect("the command starts")
}

#[test]
fn a_reader_that_has_read_enough_is_no_failure() {
    let kernelbench = env!("CARGO_BIN_EXE_kernelbench");
    let (reader, writer) = std::io::pipe().expect("the system has pipes");
    drop(reader);
    let output = run(Command::new(kernelbench).arg("--list").stdout(writer));
    assert_eq!((output.status.code(), text(&output.stderr)), (Some(0), String::new()));
    let full = std::fs::File::options().write(true).open("/dev/full").expect("Linux has it");
    let output = run(Command::new(kernelbench).arg("--list").stdout(full));
    assert_eq!((output.status.code(), text(&output.stderr).lines().count()), (Some(1), 1));
}

#[test]
fn a_limit_of_file_sizes_is_named_once() {
    for kind in ["--threads", ""] {
        let mut command = Command::new("prlimit");
        command.args(["--fsize=1000000", COLLBENCH]);
        let output = run(command.args(format!("barrier -r 3 {kind}").split_whitespace()));
        let error = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{kind}: {error}");
        assert_eq!(error.matches("ulimit -f unlimited").count(), 1, "{kind}: {error}");
        assert_eq!(error.lines().count(), 1, "{kind}: {error}");
    }
}

/// Copies a program in another process. A child that another test starts meanwhile would inherit
/// this process's open file, and no file that is open for writing can be executed.
fn copy_program(from: impl AsRef<std::ffi::OsStr>, to: impl AsRef<std::ffi::OsStr>) {
    assert!(Command::new("cp").arg(from).arg(to).status().unwrap().success());
}

/// Needs a user of whom nothing else runs, since root's limit of processes does not hold.
#[test]
fn a_limit_of_processes_and_threads_is_named() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED: limits of processes: only root can run the program as a user of whom nothing else runs");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let program = folder.path().join("collbench");
    copy_program(COLLBENCH, &program);
    let user = 2_000_000 + std::process::id();
    for path in [folder.path(), &program] {
        std::os::unix::fs::chown(path, Some(user), None).unwrap();
    }
    for kind in ["--threads", ""] {
        let mut refused = 0;
        for limit in 1..40 {
            let mut command = Command::new("prlimit");
            command.arg(format!("--nproc={limit}")).arg(&program).uid(user).current_dir(folder.path());
            let output = run(command.args(format!("barrier -n 1 -r 4 {kind}").split_whitespace()));
            let error = text(&output.stderr);
            assert!(!error.contains("panicked"), "{limit} {kind}: {error}");
            if output.status.success() {
                break;
            }
            refused += 1;
            assert_eq!(output.status.code(), Some(1), "{limit} {kind}: {error}");
            let lines: Vec<&str> = error.lines().collect();
            assert!((1..=4).contains(&lines.len()), "{limit} {kind}: {error}");
            assert!(lines.iter().all(|line| line.contains("ulimit -u")), "{limit} {kind}: {error}");
        }
        assert!((3..39).contains(&refused), "{kind}: the limit was met {refused} times");
    }
}

#[test]
fn arguments_that_are_wrong_for_all_ranks_are_said_once() {
    for (number, arguments) in ["all-reduce -n 0", "all-reduse", "all-reduce --reduce-groups 2"].into_iter().enumerate()
    {
        let ranks = [0, 1, 2].map(|rank: usize| {
            let mut command = Command::new(COLLBENCH);
            clean(&mut command).args(arguments.split_whitespace()).stdout(Stdio::piped()).stderr(Stdio::piped());
            for (name, value) in [("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", 3), ("LOCAL_WORLD_SIZE", 3)] {
                command.env(name, value.to_string());
            }
            // The test's own process id tells its jobs from those of others.
            command.env("MASTER_ADDR", format!("{}-{number}", std::process::id())).env("MASTER_PORT", "29500");
            command.spawn().expect("the binary starts")
        });
        let outputs = ranks.map(|rank| rank.wait_with_output().expect("it ends"));
        let said: Vec<String> =
            outputs.iter().map(|output| text(&output.stderr)).filter(|text| !text.is_empty()).collect();
        assert_eq!(said.len(), 1, "{arguments}: {said:?}");
        assert_eq!(outputs.each_ref().map(|output| output.status.code()), [Some(2); 3], "{arguments}: {said:?}");
    }
}
