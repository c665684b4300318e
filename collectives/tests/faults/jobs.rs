//! Jobs whose ranks are processes: copies of this test binary, which do what `program.rs` says.
//!
//! A rank writes what happens to it, line by line, into a file of its own in the job's folder, with the time by the clock that all
//! processes share. Nothing here hangs: whatever still runs when patience ends is killed, and the test fails with all that was said.

use std::fs::{self, File};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

/// Only turns a hang into a failure.
const PATIENCE: Duration = Duration::from_secs(30);
const LOOK_EVERY: Duration = Duration::from_millis(1);
/// The entry point of a rank in this binary.
const ENTRY: [&str; 5] = ["--exact", "a_rank", "--ignored", "--nocapture", "--test-threads=1"];

/// What the ranks of a job do, and how patient they are.
#[derive(Clone)]
pub(crate) struct Settings {
    pub(crate) program: &'static str,
    pub(crate) world: usize,
    /// The rank to which it happens.
    pub(crate) victim: usize,
    pub(crate) timeout: Duration,
    pub(crate) warn_after: Duration,
    pub(crate) startup: Duration,
    /// Of the programs that draw by lot.
    pub(crate) seed: u64,
}

impl Settings {
    /// Far more patient than a test.
    pub(crate) fn new(program: &'static str, world: usize, victim: usize) -> Settings {
        let long = Duration::from_secs(600);
        Settings { program, world, victim, timeout: long, warn_after: long, startup: PATIENCE, seed: 0 }
    }

    pub(crate) fn others(&self) -> Vec<usize> {
        (0..self.world).filter(|&rank| rank != self.victim).collect()
    }
}

/// An error as its rank reported it.
#[derive(Clone, Debug)]
pub(crate) struct Said {
    /// Nanoseconds of the monotonic clock.
    pub(crate) at: u64,
    /// The error's variant.
    pub(crate) variant: String,
    /// The rank that it names, if it names one.
    pub(crate) named: Option<usize>,
    /// The whole message.
    pub(crate) text: String,
}

/// A running job.
pub(crate) struct Job {
    pub(crate) settings: Settings,
    pub(crate) name: String,
    folder: TempDir,
    ranks: Vec<Option<Child>>,
}

impl Job {
    pub(crate) fn start(settings: &Settings) -> Job {
        static NUMBER: AtomicUsize = AtomicUsize::new(0);
        let name = format!("faults-{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        let mut job = Job::start_none(settings, &name);
        (0..settings.world).for_each(|rank| job.start_rank(rank));
        job
    }

    /// A job of this name, whose ranks have yet to start.
    pub(crate) fn start_none(settings: &Settings, name: &str) -> Job {
        let ranks = (0..settings.world).map(|_| None).collect();
        Job { settings: settings.clone(), name: name.to_owned(), folder: tempfile::tempdir().unwrap(), ranks }
    }

    pub(crate) fn start_rank(&mut self, rank: usize) {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(ENTRY);
        self.start_as(rank, &mut command);
    }

    /// Starts a rank with `command`, which ends in running this binary.
    fn start_as(&mut self, rank: usize, command: &mut Command) {
        let Settings { program, world, victim, timeout, warn_after, startup, seed } = &self.settings;
        let milliseconds = |limit: &Duration| limit.as_millis().to_string();
        let output = |name: &str| File::create(self.folder.path().join(format!("{name}-{rank}"))).unwrap();
        let child = command
            .env("FAULTS_FOLDER", self.folder.path())
            .env("FAULTS_JOB", &self.name)
            .env("FAULTS_RANK", rank.to_string())
            .env("FAULTS_PROGRAM", program)
            .env("FAULTS_WORLD", world.to_string())
            .env("FAULTS_VICTIM", victim.to_string())
            .env("FAULTS_TIMEOUT", milliseconds(timeout))
            .env("FAULTS_WARN", milliseconds(warn_after))
            .env("FAULTS_STARTUP", milliseconds(startup))
            .env("FAULTS_SEED", seed.to_string())
            .env("RUST_BACKTRACE", "0")
            // One heap for all threads, so that mappings can be counted.
            .env("MALLOC_ARENA_MAX", "1")
            .stdin(Stdio::null())
            .stdout(output("stdout"))
            .stderr(output("stderr"))
            .spawn()
            .unwrap();
        self.ranks[rank] = Some(child);
    }

    /// Starts a rank through a shell's script, whose `$0` is this path, and which ends in `exec "$@"`.
    pub(crate) fn start_rank_through(&mut self, rank: usize, script: &str, path: &Path) {
        let mut command = Command::new("sh");
        command.args(["-c", script]).arg(path).arg(std::env::current_exe().unwrap()).args(ENTRY);
        self.start_as(rank, &mut command);
    }

    fn read(&self, what: &str, rank: usize) -> String {
        let bytes = fs::read(self.folder.path().join(format!("{what}-{rank}"))).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// What a rank has said so far, but for an unfinished line.
    pub(crate) fn said(&self, rank: usize) -> Vec<String> {
        self.read("said", rank)
            .split_inclusive('\n')
            .filter_map(|line| Some(line.strip_suffix('\n')?.to_owned()))
            .collect()
    }

    pub(crate) fn stderr(&self, rank: usize) -> String {
        self.read("stderr", rank)
    }

    /// Waits until a rank has said that.
    pub(crate) fn wait_for(&self, rank: usize, line: &str) {
        self.wait(&format!("rank {rank} to say {line}"), || self.said(rank).iter().any(|said| said == line));
    }

    /// Waits until every rank has said that.
    pub(crate) fn wait_for_all(&self, line: &str) {
        (0..self.settings.world).for_each(|rank| self.wait_for(rank, line));
    }

    /// Tells the ranks to go on.
    pub(crate) fn go(&self) {
        fs::write(self.folder.path().join("go"), "").unwrap();
    }

    pub(crate) fn wait(&self, what: &str, mut reached: impl FnMut() -> bool) {
        let start = Instant::now();
        while !reached() {
            assert!(start.elapsed() < PATIENCE, "waited in vain for {what}\n{}", self.transcript());
            thread::sleep(LOOK_EVERY);
        }
    }

    /// All that was said, for messages of failed tests.
    pub(crate) fn transcript(&self) -> String {
        let Settings { program, world, victim, seed, .. } = &self.settings;
        let of = |rank| format!("-- rank {rank}\n{}\n{}\n", self.said(rank).join("\n"), self.stderr(rank));
        let all: String = (0..*world).map(of).collect();
        format!("program {program}, {world} ranks, victim {victim}, seed {seed}\n{all}")
    }

    pub(crate) fn signal(&self, rank: usize, signal: Signal) {
        let child = self.ranks[rank].as_ref().expect("a rank that was started");
        kill_process(Pid::from_child(child), signal).unwrap();
    }

    /// Kills the victim, and says when.
    pub(crate) fn kill(&self) -> u64 {
        let at = now();
        self.signal(self.settings.victim, Signal::KILL);
        at
    }

    /// Waits for a rank's end.
    pub(crate) fn end_of(&mut self, rank: usize) -> ExitStatus {
        let start = Instant::now();
        loop {
            let child = self.ranks[rank].as_mut().expect("a rank that was started, and has not ended");
            if let Some(status) = child.try_wait().unwrap() {
                self.ranks[rank] = None;
                return status;
            }
            assert!(start.elapsed() < PATIENCE, "rank {rank} does not end\n{}", self.transcript());
            thread::sleep(LOOK_EVERY);
        }
    }

    /// The error that a rank ended with.
    pub(crate) fn error_of(&self, rank: usize) -> Said {
        let said = self.said(rank);
        let line = said.iter().find_map(|line| line.strip_prefix("error\t"));
        let line = line.unwrap_or_else(|| panic!("rank {rank} reported no error\n{}", self.transcript()));
        let [at, variant, named, text] = line.splitn(4, '\t').collect::<Vec<_>>().try_into().expect("four fields");
        Said { at: at.parse().unwrap(), variant: variant.to_owned(), named: named.parse().ok(), text: text.to_owned() }
    }

    /// Waits for every rank's end, and checks that none panicked and nothing is left; the errors of all but the victim, in order of rank.
    pub(crate) fn errors(&mut self) -> Vec<Said> {
        let others = self.settings.others();
        for &rank in &others {
            let status = self.end_of(rank);
            assert_eq!(status.code(), Some(1), "rank {rank}: {status}\n{}", self.transcript());
            assert!(!self.stderr(rank).contains("panicked"), "{}", self.transcript());
        }
        let errors = others.iter().map(|&rank| self.error_of(rank)).collect();
        if let Some(victim) = &self.ranks[self.settings.victim] {
            // It may be stopped, or parked.
            let _ = kill_process(Pid::from_child(victim), Signal::KILL);
            self.end_of(self.settings.victim);
        }
        self.nothing_is_left();
        errors
    }

    /// Waits for every rank's end, which must be a good one.
    pub(crate) fn succeed(&mut self) {
        for rank in 0..self.settings.world {
            let status = self.end_of(rank);
            assert!(status.success(), "rank {rank}: {status}\n{}", self.transcript());
        }
        self.nothing_is_left();
    }

    pub(crate) fn nothing_is_left(&self) {
        let sockets = fs::read_to_string("/proc/net/unix").unwrap();
        assert!(!sockets.contains(&format!("pillion/{}", self.name)), "the job's socket\n{}", self.transcript());
        for entry in fs::read_dir("/dev/shm").into_iter().flatten().flatten() {
            assert!(!entry.file_name().to_string_lossy().contains("pillion"), "{entry:?}\n{}", self.transcript());
        }
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        for child in self.ranks.iter_mut().flatten() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Nanoseconds of the clock that all processes share.
pub(crate) fn now() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}
