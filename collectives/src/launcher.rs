//! Starts the ranks of a job as processes of this host: `--ranks N --launch processes`.
//!
//! The launcher starts N copies of its own program, tells each its rank by environment variables
//! (read back by [`Launch::detect`](crate::launch::Launch::detect)), and from then on does nothing
//! but watch them. One loop in one thread sleeps in `poll` on a pipe that the signal handlers write
//! to, and looks at every child whenever it wakes:
//!
//! - Each child has a process group of its own, so a terminal's Ctrl-C reaches the launcher alone,
//!   which passes it on: every rank gets every signal once. (Ranks are background processes to the
//!   terminal, and are stopped if they read from it.)
//! - Ctrl-Z stops the children, then the launcher; going on, it wakes them.
//! - A rank that fails starts a grace period, in which the others notice by themselves and say what
//!   they have to say. What is left then gets SIGKILL, which reaches stopped processes too.
//! - A rank dies with its launcher, however that ends: [`bind_to_launcher`].
//!
//! Only this thread reaps the children, so a process id it signals still belongs to its child.

use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus};
use std::sync::OnceLock;
use std::time::{Duration, Instant};
use std::{env, io, thread};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{Pid, Signal};
use signal_hook::consts::{SIGCHLD, SIGCONT, SIGTSTP};
use signal_hook::iterator::backend::SignalDelivery;
use signal_hook::iterator::exfiltrator::SignalOnly;

use crate::launch::{
    self, ADDRESS, Launch, LaunchError, Meeting, OWN_JOB, OWN_LAUNCHER, OWN_LOCAL_RANK, OWN_LOCAL_WORLD, OWN_RANK,
    OWN_WORLD, Source, fresh_job,
};
use crate::limits::explain_thread;
use crate::stop;

/// Exit code of a rank that stopped early because it was asked to, with its state saved
/// (`EX_TEMPFAIL` of sysexits.h: try again). No failure: the other ranks are left to do the same.
pub const EXIT_INTERRUPTED: i32 = 75;

/// Exit code of a rank that ended because of another's failure, and has said so (`EX_UNAVAILABLE` of sysexits.h). The others
/// get the grace period, and the job ends with the code of the rank that caused it, if that one says.
pub const EXIT_CONSEQUENCE: i32 = 69;

/// Most ranks for each core.
pub const RANKS_PER_CORE: usize = 8;

/// Most ranks that share memory on one host, whatever is asked for: each pair of ranks has a
/// mailbox.
pub const MOST_RANKS: usize = 1024;

/// How [`run_processes_with`] runs a job.
#[derive(Clone, Debug)]
pub struct Options {
    /// Time that the others have to end by themselves once a rank failed; then SIGKILL. Time in
    /// which the job was stopped (Ctrl-Z) does not count.
    pub grace: Duration,
    /// Whether to start more than [`RANKS_PER_CORE`] ranks for each core.
    pub oversubscribe: bool,
    /// Which of several hosts this is.
    pub node: Node,
}

/// One of the hosts of a job. On each, a launcher starts as many ranks.
#[derive(Clone, Debug)]
pub struct Node {
    /// From 0, whose first rank is rank 0 of the job.
    pub number: usize,
    /// Number of hosts.
    pub of: usize,
    /// Where the ranks of all hosts meet, as [`Meeting::address`](crate::Meeting); none for what
    /// the environment says.
    pub address: Option<String>,
}

impl Node {
    /// Where the ranks that are started will meet.
    ///
    /// # Errors
    /// For an address without a port.
    pub fn meeting(&self) -> Result<Option<Meeting>, LaunchError> {
        let get = |name: &str| self.address.clone().filter(|_| name == ADDRESS).or_else(|| env::var(name).ok());
        launch::meeting(Source::Local, &get)
    }
}

impl Node {
    /// The launches of `ranks` threads, where this is the only host.
    ///
    /// # Errors
    /// As for [`Node::meeting`].
    pub fn threads(&self, ranks: usize) -> Result<Vec<Launch>, LaunchError> {
        let meeting = self.meeting()?;
        let launch = |launch| Launch { meeting: meeting.clone(), ..launch };
        Ok(Launch::threads(ranks).into_iter().map(launch).collect())
    }

    /// The only host, with an address of its own for ranks that meet over TCP all the same, unless
    /// there is one already.
    ///
    /// # Errors
    /// When there is no free port.
    pub fn meeting_here(self) -> Result<Node, LaunchError> {
        if self.meeting()?.is_some() {
            return Ok(self);
        }
        let address = Meeting::free_address().map_err(system("find a free port"))?.to_string();
        Ok(Node { address: Some(address), ..self })
    }
}

impl Default for Node {
    /// The only one.
    fn default() -> Node {
        Node { number: 0, of: 1, address: None }
    }
}

impl Default for Options {
    /// 5 s of grace: ranks notice a lost peer within 1 s.
    fn default() -> Options {
        Options { grace: Duration::from_secs(5), oversubscribe: false, node: Node::default() }
    }
}

/// Starts `ranks` copies of this program (same executable, arguments and standard streams) with
/// the `PILLION_*` variables set, waits for all of them, and returns the exit code for the job:
///
/// - 0 if all ranks returned 0; [`EXIT_INTERRUPTED`] if some returned that and all others 0;
/// - else the code of the first rank that failed, or 128 + signal if a signal killed it. A line on
///   stderr names that rank, and any other that a signal killed; codes 1 and 2 are those of programs
///   that have said why themselves, and need no line;
/// - [`EXIT_CONSEQUENCE`] if ranks returned that, and no other failed.
///
/// A program calls this where [`Launch::detect`](crate::launch::Launch::detect) says
/// [`Source::Single`], and leaves with the code it returns: the
/// signals the launcher passes on stay without effect on this process afterwards. The calling
/// thread must be one that lives as long as the process, since children die with the thread that
/// started them.
///
/// # Errors
/// No ranks, more than [`RANKS_PER_CORE`] for each core, a process that is a rank already, or one
/// that could not be started; no child is left then.
pub fn run_processes(ranks: usize) -> Result<i32, LaunchError> {
    run_processes_with(ranks, &Options::default())
}

/// [`run_processes`] with other options than the default ones.
pub fn run_processes_with(ranks: usize, options: &Options) -> Result<i32, LaunchError> {
    check_ranks(ranks, options.oversubscribe)?;
    if let Some(rank) = env::var_os(OWN_RANK) {
        let rank = rank.to_string_lossy().into_owned();
        return Err(LaunchError::Nested { rank, variable: OWN_RANK });
    }
    // Before the first child: a signal that comes while they start must reach them all.
    let mut signals = listen().map_err(system("install signal handlers"))?;
    let mut job = Job::start(ranks, &options.node)?;
    job.watch(&mut signals, options.grace)
}

/// Whether this machine can start that many ranks, as processes or as threads.
///
/// # Errors
/// No ranks, or more than [`RANKS_PER_CORE`] for each core without `oversubscribe`.
pub fn check_ranks(ranks: usize, oversubscribe: bool) -> Result<(), LaunchError> {
    if ranks == 0 {
        return Err(LaunchError::NoRanks);
    }
    if oversubscribe && ranks <= MOST_RANKS {
        return Ok(());
    }
    if oversubscribe {
        return Err(LaunchError::BeyondMost { ranks, limit: MOST_RANKS });
    }
    let cores = thread::available_parallelism().map_err(system("count the cores"))?.get();
    let limit = cores.saturating_mul(RANKS_PER_CORE);
    if ranks > limit {
        return Err(LaunchError::TooManyRanks { ranks, cores, limit });
    }
    Ok(())
}

/// Runs each rank on a thread of this process, and returns what each returned; `None` for one that
/// panicked. Either all ranks run, or none does.
///
/// # Errors
/// [`LaunchError::Threads`] when the system refuses a thread.
pub fn run_threads<T: Send>(
    launches: Vec<Launch>,
    run: impl Fn(Launch) -> T + Sync,
) -> Result<Vec<Option<T>>, LaunchError> {
    let ranks = launches.len();
    let all_started: OnceLock<bool> = OnceLock::new();
    let rank = |launch: Launch| all_started.wait().then(|| run(launch));
    thread::scope(|scope| {
        let start = |launch: Launch| {
            let name = format!("rank-{}", launch.rank);
            thread::Builder::new().name(name).spawn_scoped(scope, || rank(launch))
        };
        let threads: io::Result<Vec<_>> = launches.into_iter().map(start).collect();
        let _ = all_started.set(threads.is_ok());
        let threads = threads.map_err(|error| LaunchError::Threads { ranks, reason: explain_thread(&error) })?;
        // A panic has been printed.
        Ok(threads.into_iter().map(|thread| thread.join().ok().flatten()).collect())
    })
}

/// Makes this process, if our launcher started it, die with the launcher. To be called early in
/// `main`, on the main thread: the kernel ties the wish to the thread that utters it.
///
/// # Errors
/// [`LaunchError::LauncherGone`] if the launcher died before; the program should end at once.
pub fn bind_to_launcher() -> Result<(), LaunchError> {
    let Some(launcher) = env::var_os(OWN_LAUNCHER) else {
        return Ok(());
    };
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))
        .map_err(|error| system("ask to die with the launcher")(error.into()))?;
    // A launcher that died before that call sent no signal, but left another parent.
    let found = Pid::as_raw(rustix::process::getppid());
    let expected = launcher.to_string_lossy().into_owned();
    if expected != found.to_string() {
        return Err(LaunchError::LauncherGone { expected, found });
    }
    Ok(())
}

type Signals = SignalDelivery<UnixStream, SignalOnly>;

/// Catches the signals the launcher handles, except those its parent told it to ignore (`nohup`, a
/// shell's background jobs): the children inherit that, too.
fn listen() -> io::Result<Signals> {
    let ignored = stop::ignored_signals()?;
    let wanted = stop::SIGNALS.into_iter().chain([SIGTSTP, SIGCONT]);
    let mut caught: Vec<i32> = wanted.filter(|signal| ignored >> (signal - 1) & 1 == 0).collect();
    // Ignored, this one would make the kernel throw away how children ended.
    caught.push(SIGCHLD);
    let (read, write) = UnixStream::pair()?;
    SignalDelivery::with_pipe(read, write, SignalOnly, caught)
}

/// The children, by rank. Dropping it kills and reaps those that are left.
struct Job {
    /// The first child's rank in the job.
    first: usize,
    /// `None` once reaped.
    children: Vec<Option<Child>>,
    /// What the launcher will return, as far as known.
    code: i32,
    failed: bool,
    /// When what is left is killed, once a rank failed; `None` before, and after the killing.
    deadline: Option<Instant>,
    killed: bool,
}

impl Job {
    fn start(ranks: usize, node: &Node) -> Result<Job, LaunchError> {
        let program = env::current_exe().map_err(system("find this program's own file"))?;
        let name = fresh_job();
        let launcher = std::process::id().to_string();
        let first = node.number * ranks;
        let mut job = Job { first, children: Vec::new(), code: 0, failed: false, deadline: None, killed: false };
        for local in 0..ranks {
            let rank = first + local;
            let mut command = Command::new(&program);
            let numbers =
                [(OWN_RANK, rank), (OWN_WORLD, node.of * ranks), (OWN_LOCAL_RANK, local), (OWN_LOCAL_WORLD, ranks)];
            command.args(env::args_os().skip(1)).envs(numbers.map(|(name, number)| (name, number.to_string())));
            command.env(OWN_JOB, &name).env(OWN_LAUNCHER, &launcher).process_group(0);
            command.envs(node.address.iter().map(|address| (ADDRESS, address)));
            match command.spawn() {
                Ok(child) => job.children.push(Some(child)),
                Err(source) => {
                    return Err(LaunchError::Start { rank, program, reason: explain_thread(&source) });
                }
            }
        }
        Ok(job)
    }

    /// Waits until all children ended.
    fn watch(&mut self, signals: &mut Signals, grace: Duration) -> Result<i32, LaunchError> {
        loop {
            let arrived: Vec<i32> = signals.pending().collect();
            self.pass_on(&arrived, grace)?;
            self.reap(grace)?;
            if self.children.iter().all(Option::is_none) {
                if self.code == EXIT_CONSEQUENCE && self.first > 0 {
                    say("the ranks of this host ended because another rank did: the first host's output says why");
                }
                return Ok(self.code);
            }
            let left = self.deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            if left == Some(Duration::ZERO) {
                self.kill_rest(grace);
                continue;
            }
            let timeout = left.map(|left| Timespec {
                tv_sec: left.as_secs().try_into().unwrap_or(i64::MAX),
                tv_nsec: left.subsec_nanos().into(),
            });
            let mut pipe = [PollFd::new(signals.get_read(), PollFlags::IN)];
            match rustix::event::poll(&mut pipe, timeout.as_ref()) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(system("wait for the ranks")(error.into())),
            }
        }
    }

    fn pass_on(&mut self, arrived: &[i32], grace: Duration) -> Result<(), LaunchError> {
        for &signal in arrived {
            match signal {
                SIGCHLD => {}
                // Stopped and continued before we looked: the job should be running.
                SIGTSTP if arrived.contains(&SIGCONT) => {}
                SIGTSTP => {
                    self.signal(Signal::STOP)?;
                    rustix::process::kill_process(rustix::process::getpid(), Signal::STOP)
                        .map_err(|error| system("stop the launcher")(error.into()))?;
                }
                SIGCONT => {
                    self.signal(Signal::CONT)?;
                    self.deadline = self.deadline.map(|_| Instant::now() + grace);
                }
                _ => {
                    let named = Signal::from_named_raw(signal).expect("only named signals are caught");
                    self.signal(named)?;
                }
            }
        }
        Ok(())
    }

    fn signal(&self, signal: Signal) -> Result<(), LaunchError> {
        for child in self.children.iter().flatten() {
            rustix::process::kill_process(Pid::from_child(child), signal)
                .map_err(|error| system("send a signal to a rank")(error.into()))?;
        }
        Ok(())
    }

    /// Reaps every child that ended, and takes note of how.
    fn reap(&mut self, grace: Duration) -> Result<(), LaunchError> {
        let mut ended = Vec::new();
        for (rank, slot) in self.children.iter_mut().enumerate() {
            let Some(child) = slot else { continue };
            if let Some(status) = child.try_wait().map_err(system("wait for a rank"))? {
                *slot = None;
                ended.push((rank, status));
            }
        }
        // Among those found at once, what a signal killed is a cause, an exit code a consequence.
        ended.sort_by_key(|(_, status)| status.signal().is_none());
        for (rank, status) in ended {
            self.note(rank, status, grace);
        }
        Ok(())
    }

    fn note(&mut self, rank: usize, status: ExitStatus, grace: Duration) {
        let (code, ending) = match (status.code(), status.signal()) {
            (Some(0), _) => return,
            (Some(EXIT_INTERRUPTED), _) => {
                if !self.failed && self.code == 0 {
                    self.code = EXIT_INTERRUPTED;
                }
                return;
            }
            (Some(EXIT_CONSEQUENCE), _) => {
                if !self.failed {
                    self.code = EXIT_CONSEQUENCE;
                    self.deadline.get_or_insert_with(|| Instant::now() + grace);
                }
                return;
            }
            (Some(code), _) => (code, format!("exited with code {code}")),
            (None, Some(signal)) => {
                let name = signal_hook::low_level::signal_name(signal).unwrap_or("no name");
                (128 + signal, format!("was killed by signal {signal} ({name})"))
            }
            (None, None) => (1, format!("ended with {status}")),
        };
        if self.killed {
            return;
        }
        let has_said_why = matches!(status.code(), Some(1 | 2));
        if (!self.failed && !has_said_why) || status.signal().is_some() {
            say(&format!("rank {} {ending}", self.first + rank));
        }
        if !self.failed {
            self.failed = true;
            self.code = code;
            self.deadline.get_or_insert_with(|| Instant::now() + grace);
        }
    }

    fn kill_rest(&mut self, grace: Duration) {
        let left: Vec<String> = (0..self.children.len())
            .filter(|rank| self.children[*rank].is_some())
            .map(|rank| (self.first + rank).to_string())
            .collect();
        say(&format!(
            "ending with SIGKILL what still runs {} s after that: rank {}",
            grace.as_secs_f64(),
            left.join(", ")
        ));
        self.killed = true;
        self.deadline = None;
        self.kill();
    }

    fn kill(&mut self) {
        for child in self.children.iter_mut().flatten() {
            // Fails only for a child that has ended, and it will be reaped as such.
            let _ = child.kill();
        }
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        self.kill();
        for child in self.children.iter_mut().flatten() {
            let _ = child.wait();
        }
    }
}

/// A line on stderr, in one piece, since ranks write there too; a closed stderr must not bring the launcher down.
pub(crate) fn say(line: &str) {
    use io::Write;
    let _ = io::stderr().write_all(format!("pillion: {line}\n").as_bytes());
}

fn system(action: &'static str) -> impl Fn(io::Error) -> LaunchError {
    move |source| LaunchError::System { action, source }
}
