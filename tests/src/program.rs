//! Runs the program as a user would, in a folder of its own, on a text made here.
//!
//! Nothing here hangs: whatever still runs when a test's patience ends is killed, and the test fails with what was printed. The
//! limits only bound a broken program; they are far above what a loaded machine needs.

use std::fmt::{self, Write as _};
use std::fs::{self, File};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal};
use serde::Deserialize;
use tempfile::TempDir;

/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(300);
const LOOK_EVERY: Duration = Duration::from_millis(2);

/// What launchers leave in the environment, by prefix; the tests' own runs must not take it for theirs.
const LAUNCHERS: [&str; 20] = [
    "PILLION_",
    "TORCHELASTIC_",
    "OMPI_",
    "PMIX_",
    "PMI_",
    "MPI_",
    "SLURM_",
    "FLUX_",
    "PALS_",
    "JSM_",
    "MV2_",
    "ALPS_",
    "MPT_",
    "MPIRUN_",
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
];

/// A folder to run the program in; holds the text `text`, and what the runs write.
pub struct Workplace {
    program: PathBuf,
    folder: TempDir,
    runs: AtomicUsize,
    /// Variables that programs find, whatever their names.
    variables: Vec<(String, String)>,
}

/// One step, as `metrics.jsonl` has it: everything that does not depend on the clock or on how many ranks share the work.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[allow(missing_docs)]
pub struct Step {
    pub step: u64,
    pub loss: f64,
    pub lr: f64,
    pub grad_norm: f64,
    pub batch_samples: u64,
    pub batch_tokens: u64,
    pub samples_seen: u64,
    pub noise_scale: Option<f64>,
    pub wanted_batch: Option<f64>,
    pub validation_loss: Option<f64>,
}

impl Workplace {
    /// A fresh folder for `program`, with a text of about 100 kB in it.
    ///
    /// # Panics
    /// When files cannot be written.
    pub fn new(program: &str) -> Workplace {
        let folder = tempfile::tempdir().expect("a temporary folder");
        // Elsewhere than where it was built, tests are told where the program is (`ci/gpu`).
        let program = std::env::var_os("PILLION_UNDER_TEST").map_or_else(|| program.into(), PathBuf::from);
        let place = Workplace { program, folder, runs: AtomicUsize::new(0), variables: Vec::new() };
        place.write_text("text", 10);
        place
    }

    /// The same, whose programs find these variables, too.
    pub fn with_variables(self, variables: impl IntoIterator<Item = (String, String)>) -> Workplace {
        Workplace { variables: variables.into_iter().collect(), ..self }
    }

    /// A path in the folder.
    pub fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Writes a folder of `files` files of about 10 kB, always the same.
    ///
    /// # Panics
    /// When it cannot be written.
    pub fn write_text(&self, name: &str, files: u64) {
        fs::create_dir(self.path(name)).expect("a new folder");
        for file in 0..files {
            fs::write(self.path(name).join(format!("module_{file:03}.rs")), module(file)).expect("a new file");
        }
    }

    /// Writes a folder of 900 files of some bytes each, always the same: nearly every sample of it
    /// has several documents.
    ///
    /// # Panics
    /// When it cannot be written.
    pub fn write_notes(&self, name: &str) {
        fs::create_dir(self.path(name)).expect("a new folder");
        for note in 0..900u64 {
            let words: Vec<String> = (0..=note % 4).map(|word| ((note * 37 + word * 11) % 97).to_string()).collect();
            fs::write(self.path(name).join(format!("{note:03}.txt")), words.join(" ")).expect("a new file");
        }
    }

    /// The program with these arguments, split at spaces; run in the folder.
    pub fn command(&self, arguments: &str) -> Command {
        // Signals that whoever runs the tests has ignored (nohup, a shell's background job) would stay ignored.
        let mut command = Command::new("env");
        command.arg("--default-signal").arg(&self.program);
        command.args(arguments.split_whitespace());
        self.prepare(&mut command);
        command
    }

    /// Has a command run in the folder, without a launcher's variables.
    pub fn prepare(&self, command: &mut Command) {
        for (name, _) in std::env::vars_os() {
            if LAUNCHERS.iter().any(|prefix| name.to_string_lossy().starts_with(prefix)) {
                command.env_remove(name);
            }
        }
        command.envs(self.variables.iter().map(|(name, value)| (name, value)));
        command.current_dir(self.folder.path());
    }

    /// The program with two ranks under Open MPI's `mpirun`; none where there is none, which is said.
    pub fn mpirun(&self, arguments: &str) -> Option<Command> {
        match Command::new("mpirun").arg("--version").output() {
            Ok(output) if String::from_utf8_lossy(&output.stdout).contains("Open MPI") => {}
            _ => {
                eprintln!("SKIPPED: there is no Open MPI mpirun on the PATH (Debian: openmpi-bin)");
                return None;
            }
        }
        let mut command = Command::new("mpirun");
        self.prepare(&mut command);
        command.args(["-n", "2", "--oversubscribe"]);
        // Several at once would race to make the folder that they share by default.
        command.env("OMPI_MCA_orte_tmpdir_base", self.folder.path());
        if rustix::process::getuid().is_root() {
            command.arg("--allow-run-as-root");
        }
        command.arg(&self.program).args(arguments.split_whitespace());
        Some(command)
    }

    /// The program under test.
    pub fn program(&self) -> &Path {
        &self.program
    }

    /// Starts the program.
    pub fn start(&self, arguments: &str) -> Running {
        self.spawn(self.command(arguments))
    }

    /// Starts a command that [`Workplace::prepare`] has seen; its output goes to files.
    ///
    /// # Panics
    /// When it does not start.
    pub fn spawn(&self, command: Command) -> Running {
        self.spawn_to(command, None, None)
    }

    /// As [`Workplace::spawn`], but stdout or stderr goes elsewhere.
    ///
    /// # Panics
    /// When it does not start.
    pub fn spawn_to(&self, mut command: Command, to_stdout: Option<Stdio>, to_stderr: Option<Stdio>) -> Running {
        let number = self.runs.fetch_add(1, Ordering::Relaxed);
        let [stdout, stderr] = ["stdout", "stderr"].map(|name| self.path(format!("{name}-{number}")));
        let create = |path: &Path| Stdio::from(File::create(path).expect("a new file"));
        command.stdout(to_stdout.unwrap_or_else(|| create(&stdout)));
        command.stderr(to_stderr.unwrap_or_else(|| create(&stderr))).stdin(Stdio::null());
        let child = command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"));
        Running { child: Some(child), stdout, stderr }
    }

    /// Runs the program to its end.
    pub fn run(&self, arguments: &str) -> Ended {
        self.start(arguments).finish()
    }

    /// Runs `train` with [`TINY`] and these arguments into folder `out`, which must succeed; returns its steps.
    ///
    /// # Panics
    /// When it does not.
    pub fn train(&self, out: &str, arguments: &str) -> Vec<Step> {
        self.run(&format!("train {TINY} --out {out} {arguments}")).succeeded();
        self.steps(out)
    }

    /// The steps in a run's `metrics.jsonl`.
    ///
    /// # Panics
    /// When it cannot be read, or a line is not a whole step.
    pub fn steps(&self, out: &str) -> Vec<Step> {
        self.lines(out).into_iter().map(|line| serde_json::from_value(line).expect("a step's line")).collect()
    }

    /// The lines of a run's `metrics.jsonl`.
    ///
    /// # Panics
    /// When it cannot be read.
    pub fn lines(&self, out: &str) -> Vec<serde_json::Value> {
        let path = self.path(out).join("metrics.jsonl");
        let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        text.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"))).collect()
    }

    /// Names of the whole checkpoints of a run, in order, and of what else lies beside them.
    pub fn checkpoints(&self, out: &str) -> Vec<String> {
        let entries = fs::read_dir(self.path(out).join("checkpoints")).into_iter().flatten();
        let mut names: Vec<String> =
            entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    }
}

/// A model, a data set and a batch that make a step take milliseconds.
pub const TINY: &str = "--data text --model tiny --seq 32 --micro-batch 2 --seed 7 --samples 2000 --batch 8 --round-to 8 \
                        --validation-samples 16";

/// A program that has been started; dropped, it is killed, and its ranks die with it.
pub struct Running {
    child: Option<Child>,
    stdout: PathBuf,
    stderr: PathBuf,
}

/// How a program ended, and what it printed.
pub struct Ended {
    /// Its exit code or signal.
    pub status: ExitStatus,
    /// What it printed.
    pub stdout: String,
    /// What it and its ranks said on stderr.
    pub stderr: String,
}

impl Running {
    /// Its process id.
    pub fn pid(&self) -> Pid {
        Pid::from_child(self.child.as_ref().expect("it is taken by `finish` only"))
    }

    /// What it printed so far.
    pub fn stdout(&self) -> String {
        fs::read_to_string(&self.stdout).unwrap_or_default()
    }

    /// What it said on stderr so far.
    pub fn stderr(&self) -> String {
        fs::read_to_string(&self.stderr).unwrap_or_default()
    }

    /// Sends it a signal.
    ///
    /// # Panics
    /// When it has ended.
    pub fn signal(&self, signal: Signal) {
        rustix::process::kill_process(self.pid(), signal).expect("it runs");
    }

    /// Waits for `condition`.
    ///
    /// # Panics
    /// When it does not come true in time.
    pub fn wait_for(&self, what: &str, mut condition: impl FnMut() -> bool) {
        let started = Instant::now();
        while !condition() {
            assert!(started.elapsed() < PATIENCE, "{what} did not come\n{}\n{}", self.stdout(), self.stderr());
            std::thread::sleep(LOOK_EVERY);
        }
    }

    /// Waits until it has printed `text`.
    pub fn wait_for_stdout(&self, text: &str) {
        self.wait_for(text, || self.stdout().contains(text));
    }

    /// Waits until the run in `out` has made `step` steps.
    pub fn wait_for_step(&self, place: &Workplace, out: &str, step: usize) {
        let path = place.path(out).join("metrics.jsonl");
        let made = || fs::read_to_string(&path).is_ok_and(|text| text.matches('\n').count() >= step);
        self.wait_for("a step", made);
    }

    /// The processes of its ranks, once all `world` are there.
    pub fn ranks(&self, world: usize) -> Vec<Pid> {
        let mut ranks = Vec::new();
        self.wait_for("every rank's process", || {
            let children: Vec<Pid> = processes().into_iter().filter(|&pid| parent(pid) == Some(self.pid())).collect();
            let of_rank = |rank: usize| {
                let number = rank.to_string();
                children.iter().copied().find(|&pid| variable(pid, "PILLION_RANK").as_ref() == Some(&number))
            };
            ranks = (0..world).map_while(of_rank).collect();
            ranks.len() == world
        });
        ranks
    }

    /// Waits for its end.
    ///
    /// # Panics
    /// When it does not end in time.
    pub fn finish(mut self) -> Ended {
        let mut status = None;
        let mut child = self.child.take().expect("finished once");
        let started = Instant::now();
        while status.is_none() && started.elapsed() < PATIENCE {
            status = child.try_wait().expect("our own child");
            std::thread::sleep(LOOK_EVERY);
        }
        let status = status.unwrap_or_else(|| {
            let _ = child.kill();
            let _ = child.wait();
            panic!("it did not end\n{}\n{}", self.stdout(), self.stderr());
        });
        Ended { status, stdout: read(&self.stdout), stderr: read(&self.stderr) }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Ended {
    /// Checks for exit code 0.
    ///
    /// # Panics
    /// When it is another.
    pub fn succeeded(self) -> Ended {
        assert!(self.status.success(), "{self}");
        self
    }

    /// The exit code; none when a signal killed it.
    pub fn code(&self) -> Option<i32> {
        assert_eq!(self.status.code().is_none(), self.status.signal().is_some());
        self.status.code()
    }

    /// Checks for a failure with exactly one line that holds all of `parts`, and no panic.
    ///
    /// # Panics
    /// When it is not so.
    pub fn refused(&self, code: i32, parts: &[&str]) {
        assert_eq!(self.code(), Some(code), "{self}");
        let fits = |line: &&str| parts.iter().all(|part| line.contains(part));
        assert_eq!(self.stderr.lines().filter(fits).count(), 1, "one line with {parts:?}\n{self}");
        self.has_no_panic();
    }

    /// Checks that nothing panicked.
    ///
    /// # Panics
    /// When something did.
    pub fn has_no_panic(&self) {
        assert!(!self.stderr.contains("panicked") && !self.stdout.contains("panicked"), "{self}");
    }
}

impl fmt::Display for Ended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}\n-- stdout\n{}\n-- stderr\n{}", self.status, self.stdout, self.stderr)
    }
}

/// A variable in a process's environment; none when it has ended.
pub fn variable(pid: Pid, name: &str) -> Option<String> {
    let bytes = fs::read(format!("/proc/{}/environ", pid.as_raw_nonzero())).ok()?;
    let text = String::from_utf8_lossy(&bytes).into_owned();
    text.split('\0').find_map(|entry| entry.strip_prefix(name)?.strip_prefix('=').map(str::to_owned))
}

/// Whether a process exists and is no zombie.
pub fn is_alive(pid: Pid) -> bool {
    status(pid, "State:").is_some_and(|state| !state.starts_with(['Z', 'X']))
}

fn parent(pid: Pid) -> Option<Pid> {
    Pid::from_raw(status(pid, "PPid:")?.parse().ok()?)
}

/// A field of proc(5)'s `status`.
fn status(pid: Pid, field: &str) -> Option<String> {
    let text = fs::read_to_string(format!("/proc/{}/status", pid.as_raw_nonzero())).ok()?;
    Some(text.lines().find_map(|line| line.strip_prefix(field))?.trim().to_owned())
}

fn processes() -> Vec<Pid> {
    let entries = fs::read_dir("/proc").expect("a mounted /proc").flatten();
    entries.filter_map(|entry| Pid::from_raw(entry.file_name().to_str()?.parse().ok()?)).collect()
}

fn read(path: &Path) -> String {
    // Text generated by an untrained model need not be UTF-8.
    String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned()
}

/// A file that looks like a program: enough order for a loss to fall, enough chance for no two samples to be alike.
fn module(number: u64) -> String {
    const SYLLABLES: [&str; 8] = ["ba", "di", "ko", "lu", "me", "ri", "so", "tun"];
    let mut state = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x5851_f42d_4c95_7f2d;
    let mut chance = |bound: u64| {
        // Marsaglia's xorshift64.
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % bound
    };
    let mut text = String::new();
    while text.len() < 10_000 {
        let mut word = || (0..2).map(|_| SYLLABLES[chance(8) as usize]).collect::<String>();
        let (name, argument) = (word(), word());
        let (kind, operator) = (["u32", "i64", "usize"][chance(3) as usize], ["+", "-", "*"][chance(3) as usize]);
        let constant = chance(100);
        writeln!(text, "fn {name}({argument}: {kind}) -> {kind} {{\n    {argument} {operator} {constant}\n}}\n")
            .expect("a String takes all");
    }
    text
}
