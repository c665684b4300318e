//! Runs commands with a full or closed stdout or stderr. No output is lost silently, and nothing
//! panics.

use std::ffi::OsStr;
use std::fs::File;
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use pillion_tests::program::{Ended, TINY, Workplace};
use rustix::process::Signal;

const PROGRAM: &str = env!("CARGO_BIN_EXE_pillion-under-test");
const ENOUGH: Duration = Duration::from_secs(60);

/// Accepts no byte, as a full disk does.
fn full() -> Stdio {
    File::options().write(true).open("/dev/full").expect("Linux has /dev/full").into()
}

/// A pipe whose reader has gone.
fn closed() -> Stdio {
    let (reader, writer) = std::io::pipe().expect("a pipe");
    drop(reader);
    writer.into()
}

fn to_stdout(place: &Workplace, arguments: &str, stdout: Stdio) -> Ended {
    place.spawn_to(place.command(arguments), Some(stdout), None).finish()
}

/// Commands whose result is what they print.
const RESULTS: [&str; 12] = [
    "generate --checkpoint run --tokens 3",
    "generate --checkpoint run --tokens 0",
    "plan",
    "plan --json",
    "plan --operations",
    "plan --flops 1T --link 1GB/s",
    "checkpoint show run",
    "checkpoint show run --json",
    "checkpoint verify run",
    "checkpoint verify run --json",
    "abs simulate --steps 400 --dimensions 4 --groups 2 --ema 0.5",
    "experiment paper --report --quick --only 3.3M/constant-16-seed-1 --out paper",
];

/// A finished run to look at, and one of an experiment.
fn with_runs() -> Workplace {
    let place = Workplace::new(PROGRAM);
    place.train("run", "--ranks 1 --steps 1");
    let made = "experiment paper --quick --only 3.3M/constant-16-seed-1 --out paper --samples 64 --ranks 1 --validation-samples 4 --data text";
    place.run(made).succeeded();
    place
}

#[test]
fn a_result_that_cannot_be_written_is_a_failure_and_a_reader_that_has_gone_is_none() {
    let place = with_runs();
    let report = " --samples 64 --ranks 1 --validation-samples 4 --data text";
    for command in RESULTS {
        let command = if command.contains("--report") { command.to_owned() + report } else { command.to_owned() };
        let ended = to_stdout(&place, &command, full());
        ended.refused(1, &["cannot write to stdout", "No space left on device", "free some space"]);
        let ended = to_stdout(&place, &command, closed());
        assert_eq!((ended.code(), ended.stderr.as_str()), (Some(0), ""), "{command}: {ended}");
        place.run(&command).succeeded();
    }
}

#[test]
fn what_verify_finds_counts_when_its_reader_has_gone() {
    let place = Workplace::new(PROGRAM);
    place.train("run", "--ranks 1 --steps 1");
    let shard = place.path("run/checkpoints/step-00000001/rank-00000-of-00001.safetensors");
    let bytes = std::fs::read(&shard).unwrap();
    std::fs::write(&shard, &bytes[..bytes.len() - 1]).unwrap();
    assert_eq!(to_stdout(&place, "checkpoint verify run", closed()).code(), Some(1));
}

#[test]
fn a_run_goes_on_without_its_screen_and_says_so_once() {
    let place = Workplace::new(PROGRAM);
    let train = |out: &str, stdout| to_stdout(&place, &format!("train {TINY} --ranks 2 --steps 3 --out {out}"), stdout);
    let ended = train("full", full());
    assert_eq!(ended.code(), Some(0), "{ended}");
    assert_eq!(ended.stderr.matches("cannot write to stdout").count(), 1, "{ended}");
    assert!(ended.stderr.contains("the run goes on"), "{ended}");
    let ended = train("closed", closed());
    assert_eq!((ended.code(), ended.stderr.as_str()), (Some(0), ""), "{ended}");
    assert_eq!(place.steps("full"), place.steps("closed"));
    assert_eq!(place.steps("full").len(), 3);
}

#[test]
fn help_versions_and_refusals_do_not_panic_whatever_the_streams_are() {
    let place = Workplace::new(PROGRAM);
    for asked in ["--help", "--version", "train --help", "help plan", "abs simulate --help"] {
        assert_eq!(to_stdout(&place, asked, closed()).code(), Some(0), "{asked}");
        to_stdout(&place, asked, full()).refused(1, &["cannot write to stdout"]);
    }
    for (wrong, code) in [
        ("--unknown", 2),
        ("train --unknown", 2),
        ("", 2),
        ("plan --ranks 0", 2),
        ("generate --checkpoint nowhere", 1),
        ("train --data nowhere --ranks 2", 1),
        ("train --data nowhere --ranks 2 --launch threads", 1),
    ] {
        for stderr in [full, closed] {
            let both = place.spawn_to(place.command(wrong), Some(stderr()), Some(stderr())).finish();
            assert_eq!(both.code(), Some(code), "{wrong}");
        }
    }
    // An argument that is no text.
    let mut command = place.command("");
    command.arg(OsStr::from_bytes(b"\xff"));
    assert_eq!(place.spawn_to(command, None, Some(full())).finish().code(), Some(2));
}

/// More text than the patience of any test has time for.
const LONG: &str = "generate --checkpoint run --tokens 1000000 --temperature 0";

#[test]
fn text_comes_as_it_is_made_and_stays_when_it_is_interrupted() {
    let place = Workplace::new(PROGRAM);
    place.train("run", "--ranks 1 --steps 1");
    let running = place.start(LONG);
    running.wait_for("the first tokens", || running.stdout().len() > "pub fn ".len() + 3);
    running.signal(Signal::INT);
    let ended = running.finish();
    assert_eq!(ended.code(), Some(75), "{ended}");
    assert!(ended.stdout.starts_with("pub fn ") && ended.stdout.len() > "pub fn ".len() + 3, "{ended}");

    // A reader that leaves ends it, too.
    let mut command = place.command(LONG);
    command.stdout(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut first = [0; 10];
    child.stdout.take().unwrap().read_exact(&mut first).unwrap();
    let started = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if started.elapsed() > ENOUGH {
            let _ = child.kill();
            let _ = child.wait();
            panic!("it writes on though nobody reads");
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    assert!(status.success(), "{status}");
}

/// Runs the program on a pseudo-terminal that util-linux's `script` makes. Returns nothing, and
/// says so, where `script` is missing.
fn on_terminal(place: &Workplace, arguments: &str) -> Option<Ended> {
    let found = Command::new("script").arg("--version").output();
    if !found.is_ok_and(|output| String::from_utf8_lossy(&output.stdout).contains("util-linux")) {
        eprintln!("SKIPPED: there is no util-linux `script` on the PATH, which makes terminals");
        return None;
    }
    let mut command = Command::new("script");
    place.prepare(&mut command);
    let line = format!("{} {arguments}", place.program().display());
    command.args(["--quiet", "--return", "--command", &line, "/dev/null"]);
    Some(place.spawn(command).finish())
}

#[test]
fn a_terminal_is_sent_no_control_characters_by_a_model() {
    let place = Workplace::new(PROGRAM);
    // Hardly trained, a model chooses among all bytes.
    place.train("run", "--ranks 1 --steps 1 --lr 0");
    let arguments = "generate --checkpoint run --tokens 300 --temperature 1";
    let is_control = |shown: char| shown.is_control() && !"\n\t\r".contains(shown);
    let piped = place.run(arguments).succeeded().stdout;
    assert!(piped.contains(is_control), "a pipe gets what the model writes: {piped:?}");
    let Some(ended) = on_terminal(&place, arguments) else { return };
    let shown = ended.succeeded().stdout;
    assert!(!shown.contains(is_control) && shown.contains("\\u{"), "{shown:?}");
    // So does the sample at the end of a run.
    let arguments = format!("train {TINY} --ranks 1 --steps 1 --lr 0 --out shown");
    let shown = on_terminal(&place, &arguments).expect("it was there").succeeded().stdout;
    let sample = shown.split("pub fn ").nth(1).expect("a sample of text").split("metrics  ").next().unwrap();
    assert!(!sample.contains(is_control) && sample.contains("\\u{"), "{sample:?}");
}
