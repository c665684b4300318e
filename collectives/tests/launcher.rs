//! What the launcher of local processes must do with exit codes, signals and failures.
//!
//! The tests start this very test binary as a launcher, which starts it again as ranks: `process`
//! is the entry point of both. The variable `TEST_RANKS` says what each rank does: exit with a
//! code, or `wait` for SIGTERM (then it was interrupted) or SIGALRM (then it fails). Files in the folder `TEST_DIRECTORY` tell the test what the
//! processes see. Every wait is for a state; its limit only turns a hang into a failure.

use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Barrier;
use std::time::{Duration, Instant};
use std::{env, fs, thread};

use pillion_collectives::launch::{Launch, LaunchError, Source};
use pillion_collectives::launcher::{
    EXIT_CONSEQUENCE, EXIT_INTERRUPTED, MOST_RANKS, Options, RANKS_PER_CORE, bind_to_launcher, check_ranks,
    run_processes, run_processes_with, run_threads,
};
use rustix::process::{Pid, Signal, kill_process, kill_process_group};
use signal_hook::consts::{SIGALRM, SIGCONT, SIGHUP, SIGINT, SIGTERM, SIGUSR1, SIGUSR2, SIGXCPU};

const ENTRY: [&str; 5] = ["--exact", "process", "--ignored", "--nocapture", "--test-threads=1"];
/// Exit code of a test's launcher, or rank, that met an error, which it prints.
const ERROR: i32 = 99;
/// Exit code of a rank that fails when told to.
const FAILED: i32 = 7;
/// Most ranks in any test.
const MOST_STARTED: usize = 3;
const SHORT_GRACE: Duration = Duration::from_millis(200);
/// Longer than any test may take: its end cannot be what ends the test.
const LONG_GRACE: Duration = Duration::from_secs(600);

#[test]
#[ignore = "the entry point of the processes that the other tests start"]
fn process() {
    let Some(directory) = env::var_os("TEST_DIRECTORY").map(PathBuf::from) else {
        return;
    };
    let launch = Launch::detect().unwrap();
    let result = match launch.source {
        Source::Local => rank(&directory, &launch),
        _ => launcher(&directory),
    };
    std::process::exit(result.unwrap_or_else(|error| {
        eprintln!("{error}");
        ERROR
    }));
}

fn launcher(directory: &Path) -> Result<i32, LaunchError> {
    if env::var_os("TEST_DELETE_PROGRAM").is_some() {
        fs::remove_file(env::current_exe().unwrap()).unwrap();
    }
    let ranks = env::var("TEST_RANKS").unwrap().split(' ').count();
    let grace = Duration::from_millis(env::var("TEST_GRACE_MS").unwrap().parse().unwrap());
    let code = run_processes_with(ranks, &Options { grace, ..Options::default() })?;
    // Whatever was not reaped is still a child, running or zombie.
    let left = rustix::process::wait(rustix::process::WaitOptions::NOHANG);
    let no_child = matches!(left, Err(rustix::io::Errno::CHILD));
    fs::write(directory.join("reaped"), no_child.to_string()).unwrap();
    Ok(code)
}

fn rank(directory: &Path, launch: &Launch) -> Result<i32, LaunchError> {
    let write = |what: &str, content: String| {
        // Renamed, so that the test never reads half of it.
        let file = directory.join(format!("{what}-{}", launch.rank));
        let incomplete = file.with_extension("incomplete");
        fs::write(&incomplete, content).unwrap();
        fs::rename(incomplete, file).unwrap();
    };
    bind_to_launcher()?;
    let all = env::var("TEST_RANKS").unwrap();
    write("job", format!("{} {}", launch.world, launch.job));
    match all.split(' ').nth(launch.rank).unwrap() {
        "nested" => return run_processes(2),
        "wait" => {}
        code => return Ok(code.parse().unwrap()),
    }
    let caught = [SIGALRM, SIGINT, SIGTERM, SIGHUP, SIGUSR1, SIGUSR2, SIGXCPU, SIGCONT];
    let mut signals = signal_hook::iterator::Signals::new(caught).unwrap();
    write("pid", std::process::id().to_string());
    let mut seen = Vec::new();
    for signal in signals.forever() {
        seen.push(signal.to_string());
        write("signals", seen.join(" "));
        match signal {
            SIGTERM => break,
            SIGALRM => return Ok(FAILED),
            _ => {}
        }
    }
    Ok(EXIT_INTERRUPTED)
}

/// A launcher with its ranks.
struct Running {
    launcher: Child,
    directory: tempfile::TempDir,
}

/// How a launcher ended, all of whose children were seen to be reaped.
struct Ended {
    status: ExitStatus,
    stderr: String,
}

fn start(ranks: &str, grace: Duration) -> Running {
    // Signals that whoever runs the tests has ignored (nohup, a shell's background job) would stay ignored.
    let mut command = Command::new("env");
    command.arg("--default-signal").arg(env::current_exe().unwrap()).args(ENTRY);
    start_as(&mut command, ranks, grace)
}

fn start_as(command: &mut Command, ranks: &str, grace: Duration) -> Running {
    let directory = tempfile::tempdir().unwrap();
    let launcher = command
        .env("TEST_DIRECTORY", directory.path())
        .env("TEST_RANKS", ranks)
        .env("TEST_GRACE_MS", grace.as_millis().to_string())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(fs::File::create(directory.path().join("stderr")).unwrap())
        .process_group(0)
        .spawn()
        .unwrap();
    Running { launcher, directory }
}

impl Running {
    fn file(&self, name: &str) -> Option<String> {
        fs::read_to_string(self.directory.path().join(name)).ok()
    }

    /// The processes of ranks that wait, once they do.
    fn ranks<const N: usize>(&self) -> [Pid; N] {
        std::array::from_fn(|rank| {
            let name = format!("pid-{rank}");
            wait_for("a rank to start", || self.file(&name).is_some());
            Pid::from_raw(self.file(&name).unwrap().parse().unwrap()).unwrap()
        })
    }

    /// What a rank has caught so far.
    fn signals(&self, rank: usize) -> String {
        self.file(&format!("signals-{rank}")).unwrap_or_default()
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.launcher), signal).unwrap();
    }

    fn finish(&mut self) -> Ended {
        let mut status = None;
        wait_for("the launcher to end", || {
            status = self.launcher.try_wait().unwrap();
            status.is_some()
        });
        let (status, stderr) = (status.unwrap(), self.file("stderr").unwrap());
        if status.code() != Some(ERROR) {
            assert_eq!(self.file("reaped").as_deref(), Some("true"));
        }
        Ended { status, stderr }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.launcher.kill();
        let _ = self.launcher.wait();
        // A launcher that fails its test may leave ranks behind, and they would hold our output open.
        let directory = format!("TEST_DIRECTORY={}", self.directory.path().display());
        for rank in 0..MOST_STARTED {
            let Some(process) = self.file(&format!("pid-{rank}")).and_then(|id| id.parse().ok()) else { continue };
            // The process id may have been given to another since.
            let environment = fs::read(format!("/proc/{process}/environ")).unwrap_or_default();
            if environment.split(|byte| *byte == 0).any(|entry| entry == directory.as_bytes()) {
                let _ = kill_process(Pid::from_raw(process).unwrap(), Signal::KILL);
            }
        }
    }
}

fn wait_for(what: &str, mut reached: impl FnMut() -> bool) {
    let start = Instant::now();
    while !reached() {
        assert!(start.elapsed() < Duration::from_secs(60), "waited in vain for {what}");
        thread::sleep(Duration::from_millis(2));
    }
}

/// The state letter of a process, as in ps; `None` for one that is gone.
fn state(process: Pid) -> Option<char> {
    let stat = fs::read_to_string(format!("/proc/{}/stat", process.as_raw_nonzero())).ok()?;
    stat.rsplit_once(") ")?.1.chars().next()
}

/// Whether a process has ended so that its parent can see it: the leader is a zombie while other threads are still on their way out, too.
fn has_ended(process: Pid) -> bool {
    let threads = fs::read_dir(format!("/proc/{}/task", process.as_raw_nonzero())).map_or(0, Iterator::count);
    state(process) == Some('Z') && threads <= 1
}

#[test]
fn all_ranks_of_a_good_job_share_its_name_and_give_zero() {
    let mut job = start("0 0 0", LONG_GRACE);
    let ended = job.finish();
    assert_eq!((ended.status.code(), ended.stderr.as_str()), (Some(0), ""));
    let names = [0, 1, 2].map(|rank| job.file(&format!("job-{rank}")).unwrap());
    assert!(names[0].starts_with("3 "));
    assert!(names[0] == names[1] && names[1] == names[2], "{names:?}");
}

#[test]
fn the_first_failure_gives_the_exit_code_and_a_line() {
    let ended = start("0 42 0", LONG_GRACE).finish();
    assert_eq!(ended.status.code(), Some(42));
    assert_eq!(ended.stderr, "pillion: rank 1 exited with code 42\n");
}

#[test]
fn interrupted_ranks_are_no_failure() {
    for ranks in ["75 75", "75 0", "0 75"] {
        let ended = start(ranks, LONG_GRACE).finish();
        assert_eq!((ended.status.code(), ended.stderr.as_str()), (Some(EXIT_INTERRUPTED), ""), "{ranks}");
    }
    for ranks in ["75 3", "3 75"] {
        assert_eq!(start(ranks, LONG_GRACE).finish().status.code(), Some(3), "{ranks}");
    }
}

#[test]
fn a_killed_rank_is_named_and_ends_the_others_after_the_grace_period() {
    let mut job = start("wait wait wait", SHORT_GRACE);
    let [_, victim, _] = job.ranks();
    kill_process(victim, Signal::KILL).unwrap();
    let ended = job.finish();
    assert_eq!(ended.status.code(), Some(128 + 9));
    let lines: Vec<&str> = ended.stderr.lines().collect();
    assert_eq!(lines[0], "pillion: rank 1 was killed by signal 9 (SIGKILL)");
    assert!(lines.len() == 2 && lines[1].ends_with("0.2 s after that: rank 0, 2"), "{lines:?}");
}

#[test]
fn the_end_of_the_grace_period_reaches_a_stopped_rank() {
    let mut job = start("wait wait", SHORT_GRACE);
    let [stopped, victim] = job.ranks();
    kill_process(stopped, Signal::STOP).unwrap();
    wait_for("rank 0 to stop", || state(stopped) == Some('T'));
    kill_process(victim, Signal::KILL).unwrap();
    let ended = job.finish();
    assert_eq!(ended.status.code(), Some(128 + 9));
    assert!(ended.stderr.starts_with("pillion: rank 1 was killed"), "{}", ended.stderr);
    assert_eq!(state(stopped), None);
}

#[test]
fn among_failures_found_together_a_kill_is_the_cause() {
    let mut job = start("wait wait", LONG_GRACE);
    let [failing, victim] = job.ranks();
    // The launcher sleeps through both ends.
    job.signal(Signal::STOP);
    wait_for("the launcher to stop", || state(Pid::from_child(&job.launcher)) == Some('T'));
    kill_process(failing, Signal::ALARM).unwrap();
    wait_for("rank 0 to fail", || has_ended(failing));
    kill_process(victim, Signal::KILL).unwrap();
    wait_for("rank 1 to die", || has_ended(victim));
    job.signal(Signal::CONT);
    let ended = job.finish();
    assert_eq!(ended.status.code(), Some(128 + 9));
    assert_eq!(ended.stderr, "pillion: rank 1 was killed by signal 9 (SIGKILL)\n");
}

#[test]
fn a_kill_found_after_the_first_failure_is_named_too() {
    // Memory of a killed process may take longer to free than its peers to notice and fail.
    let mut job = start("wait wait", LONG_GRACE);
    let [failing, victim] = job.ranks();
    kill_process(failing, Signal::ALARM).unwrap();
    let first = format!("pillion: rank 0 exited with code {FAILED}\n");
    wait_for("the line about rank 0", || job.file("stderr").as_deref() == Some(&first));
    kill_process(victim, Signal::KILL).unwrap();
    let ended = job.finish();
    assert_eq!(ended.status.code(), Some(FAILED));
    assert_eq!(ended.stderr, format!("{first}pillion: rank 1 was killed by signal 9 (SIGKILL)\n"));
}

#[test]
fn the_others_may_end_by_themselves_in_the_grace_period() {
    let mut job = start("wait wait", LONG_GRACE);
    let [victim, other] = job.ranks();
    kill_process(victim, Signal::ABORT).unwrap();
    wait_for("the line about rank 0", || job.file("stderr").is_some_and(|text| text.ends_with('\n')));
    kill_process(other, Signal::TERM).unwrap();
    let ended = job.finish();
    assert_eq!(ended.status.code(), Some(128 + 6));
    assert_eq!(ended.stderr, "pillion: rank 0 was killed by signal 6 (SIGABRT)\n");
}

#[test]
fn every_rank_gets_every_forwarded_signal_once() {
    let mut job = start("wait wait wait", LONG_GRACE);
    let ranks: [Pid; 3] = job.ranks();
    for rank in ranks {
        assert_eq!(rustix::process::getpgid(Some(rank)).unwrap(), rank, "its own group");
    }
    let mut expected = String::new();
    for (signal, number) in [(Signal::USR1, SIGUSR1), (Signal::USR2, SIGUSR2), (Signal::HUP, SIGHUP)]
        .into_iter()
        .chain([(Signal::XCPU, SIGXCPU), (Signal::INT, SIGINT), (Signal::TERM, SIGTERM)])
    {
        // To the group, as a terminal does it.
        kill_process_group(Pid::from_child(&job.launcher), signal).unwrap();
        expected = format!("{expected} {number}").trim().to_string();
        for rank in 0..ranks.len() {
            wait_for("a signal", || job.signals(rank).len() >= expected.len());
            assert_eq!(job.signals(rank), expected, "rank {rank}");
        }
    }
    let ended = job.finish();
    assert_eq!((ended.status.code(), ended.stderr.as_str()), (Some(EXIT_INTERRUPTED), ""));
    for rank in 0..ranks.len() {
        assert_eq!(job.signals(rank), expected, "rank {rank}");
    }
}

#[test]
fn the_whole_job_stops_and_goes_on() {
    let mut job = start("wait wait", LONG_GRACE);
    let ranks: [Pid; 2] = job.ranks();
    job.signal(Signal::TSTP);
    for process in [ranks[0], ranks[1], Pid::from_child(&job.launcher)] {
        wait_for("a process to stop", || state(process) == Some('T'));
    }
    job.signal(Signal::CONT);
    for rank in 0..ranks.len() {
        wait_for("a rank to go on", || job.signals(rank) == SIGCONT.to_string());
    }
    job.signal(Signal::TERM);
    assert_eq!(job.finish().status.code(), Some(EXIT_INTERRUPTED));
}

#[test]
fn ranks_die_with_their_launcher() {
    let mut job = start("wait wait wait", LONG_GRACE);
    let ranks: [Pid; 3] = job.ranks();
    // One that is stopped cannot look after itself.
    kill_process(ranks[2], Signal::STOP).unwrap();
    job.signal(Signal::KILL);
    assert_eq!(job.launcher.wait().unwrap().signal(), Some(9));
    for rank in ranks {
        wait_for("a rank to die", || matches!(state(rank), None | Some('Z' | 'X')));
    }
}

#[test]
fn a_rank_whose_launcher_is_gone_ends() {
    // This test plays the stranger that the children of a dead launcher get for a parent.
    let own = [("PILLION_RANK", "0"), ("PILLION_WORLD", "1"), ("PILLION_JOB", "j")];
    let mut command = Command::new(env::current_exe().unwrap());
    command.args(ENTRY).envs(own).env("PILLION_LAUNCHER_PID", "1");
    let ended = start_as(&mut command, "wait", LONG_GRACE).finish();
    assert_eq!(ended.status.code(), Some(ERROR));
    let expected = format!("process 1, is gone (the parent is now {})", std::process::id());
    assert!(ended.stderr.contains(&expected), "{}", ended.stderr);
}

#[test]
fn signals_ignored_at_the_start_stay_ignored() {
    // As nohup does it: an empty trap is inherited as "ignore".
    let mut command = Command::new("sh");
    command.args(["-c", "trap '' HUP; exec \"$@\"", "sh"]).arg(env::current_exe().unwrap()).args(ENTRY);
    let mut job = start_as(&mut command, "wait", LONG_GRACE);
    let _: [Pid; 1] = job.ranks();
    // HUP has the lower number: were it caught, it would be passed on first.
    job.signal(Signal::HUP);
    job.signal(Signal::TERM);
    assert_eq!(job.finish().status.code(), Some(EXIT_INTERRUPTED));
    assert_eq!(job.signals(0), SIGTERM.to_string());
}

/// Copies a program in another process. A child that another test starts meanwhile would inherit
/// this process's open file, and no file that is open for writing can be executed.
fn copy_program(from: impl AsRef<std::ffi::OsStr>, to: impl AsRef<std::ffi::OsStr>) {
    assert!(Command::new("cp").arg(from).arg(to).status().unwrap().success());
}

#[test]
fn a_program_that_cannot_be_started_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let program = directory.path().join("program");
    copy_program(env::current_exe().unwrap(), &program);
    let mut command = Command::new(&program);
    command.args(ENTRY).env("TEST_DELETE_PROGRAM", "1");
    let ended = start_as(&mut command, "0 0", LONG_GRACE).finish();
    assert_eq!(ended.status.code(), Some(ERROR));
    let expected = format!("cannot start rank 0 as {}", program.display());
    assert!(ended.stderr.contains(&expected), "{}", ended.stderr);
}

#[test]
fn the_cause_counts_more_than_what_followed_from_it() {
    for (codes, cause) in [("69 7", 1), ("7 69", 0)] {
        let ended = start(codes, LONG_GRACE).finish();
        assert_eq!(ended.status.code(), Some(FAILED));
        assert_eq!(ended.stderr, format!("pillion: rank {cause} exited with code {FAILED}\n"));
    }
    let ended = start("69 0", LONG_GRACE).finish();
    assert_eq!((ended.status.code(), ended.stderr.as_str()), (Some(EXIT_CONSEQUENCE), ""));
}

#[test]
fn a_rank_that_has_said_why_needs_no_line() {
    for code in [1, 2] {
        let ended = start(&format!("0 {code}"), LONG_GRACE).finish();
        assert_eq!((ended.status.code(), ended.stderr.as_str()), (Some(code), ""));
    }
}

#[test]
fn a_rank_does_not_start_ranks() {
    let ended = start("nested", LONG_GRACE).finish();
    assert_eq!(ended.status.code(), Some(ERROR));
    assert!(ended.stderr.contains("already rank 0"), "{}", ended.stderr);
    assert!(ended.stderr.contains("unset PILLION_RANK"), "{}", ended.stderr);
}

#[test]
fn impossible_numbers_of_ranks_are_refused() {
    assert!(matches!(run_processes(0), Err(LaunchError::NoRanks)));
    let cores = thread::available_parallelism().unwrap().get();
    let ranks = cores * RANKS_PER_CORE + 1;
    let text = run_processes(ranks).unwrap_err().to_string();
    assert!(text.contains(&format!("{ranks} ranks asked for on {cores} cores")), "{text}");
    assert!(text.contains("--oversubscribe"), "{text}");
    check_ranks(ranks, true).unwrap();
    let text = check_ranks(MOST_RANKS + 1, true).unwrap_err().to_string();
    assert!(text.contains(&format!("at most {MOST_RANKS} can share")), "{text}");
}

#[test]
fn ranks_that_are_threads_all_run_and_a_panic_is_one_ranks_end() {
    let met = Barrier::new(24);
    let results = run_threads(Launch::threads(24), |launch| {
        met.wait();
        assert_ne!(launch.rank, 7, "this rank panics");
        2 * launch.rank
    });
    let expected: Vec<Option<usize>> = (0..24).map(|rank| (rank != 7).then_some(2 * rank)).collect();
    assert_eq!(results.unwrap(), expected);
}
