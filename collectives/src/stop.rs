//! Being asked to end early: by a signal, or by the end of the launcher that started this rank.
//!
//! A training loop looks at the [`flag`] once a step, agrees with the other ranks, and saves.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use std::{env, fs, io, thread};

use rustix::event::{PollFd, PollFlags};
use rustix::process::{Pid, PidfdFlags};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR1, SIGUSR2, SIGXCPU};
use signal_hook::iterator::backend::SignalDelivery;
use signal_hook::iterator::exfiltrator::SignalOnly;

use crate::launch::{Launch, Source, ancestor_without};

/// Signals that ask a run to end early: from a terminal, from a scheduler before its time limit, or
/// from the kernel at a limit of processor time. [`crate::launcher`] passes them on to its ranks.
pub const SIGNALS: [i32; 6] = [SIGINT, SIGTERM, SIGHUP, SIGUSR1, SIGUSR2, SIGXCPU];

/// Signals of one kind within this time are one: `timeout` and some schedulers send each twice, to
/// a process and to its group.
const ONE_SIGNAL: Duration = Duration::from_secs(1);

/// A flag that the first of [`SIGNALS`] raises. A signal that this process was started to ignore
/// (`nohup`) stays ignored. The same signal again, more than a second later, ends the process at
/// once with exit code 128 + signal. Another signal does not, because schedulers and service
/// managers send two kinds (SIGUSR1 or SIGHUP and then SIGTERM) while a run saves. SIGXCPU never
/// does, because the kernel repeats it every second.
///
/// A launcher that is killed cannot end its ranks. So the flag is also raised when the torchrun
/// agent, `mpirun` or `mpirun_rsh` that started this rank is gone. The ranks of our own launcher
/// are killed with it ([`crate::launcher::bind_to_launcher`]).
///
/// # Errors
/// When the system refuses the thread that waits for signals.
pub fn flag(launch: &Launch) -> io::Result<Arc<AtomicBool>> {
    let wanted = signals()?;
    let (read, write) = UnixStream::pair()?;
    let signals = SignalDelivery::with_pipe(read, write, SignalOnly, wanted)?;
    let flag = Arc::new(AtomicBool::new(false));
    let (launcher, says) = (Launcher::of(launch), launch.local_rank == 0);
    let raised = flag.clone();
    thread::Builder::new().name("pillion-signals".into()).spawn(move || watch(signals, launcher, &raised, says))?;
    Ok(flag)
}

/// Those of [`SIGNALS`] that this process was not started to ignore.
///
/// # Errors
/// When `/proc` does not tell.
pub fn signals() -> io::Result<Vec<i32>> {
    let ignored = ignored_signals()?;
    Ok(SIGNALS.into_iter().filter(|signal| ignored >> (signal - 1) & 1 == 0).collect())
}

fn watch(
    mut signals: SignalDelivery<UnixStream, SignalOnly>,
    mut launcher: Option<Launcher>,
    flag: &AtomicBool,
    says: bool,
) {
    let mut first = BTreeMap::new();
    loop {
        let mut events = vec![PollFd::new(signals.get_read(), PollFlags::IN)];
        events.extend(launcher.iter().map(|launcher| PollFd::from_borrowed_fd(launcher.handle.as_fd(), PollFlags::IN)));
        // An interrupted wait is one that finds nothing.
        let _ = rustix::event::poll(&mut events, None);
        let is_gone = events.get(1).is_some_and(|event| !event.revents().is_empty());
        if let Some(gone) = launcher.take_if(|_| is_gone) {
            flag.store(true, Ordering::Relaxed);
            if says {
                crate::launcher::say(&format!(
                    "the {} process that started these ranks is gone: ending early",
                    gone.name
                ));
            }
        }
        for signal in signals.pending() {
            flag.store(true, Ordering::Relaxed);
            let time = *first.entry(signal).or_insert_with(Instant::now);
            if signal != SIGXCPU && time.elapsed() > ONE_SIGNAL {
                // As a shell says it: nothing has been saved.
                signal_hook::low_level::exit(128 + signal);
            }
        }
    }
}

/// The process that started this rank, by a handle that becomes readable when the process ends. Its
/// parent's death signal would not do: the kernel sends that when the parent's thread ends.
struct Launcher {
    name: &'static str,
    handle: OwnedFd,
}

impl Launcher {
    /// `None` for launchers that end their ranks in any case, for a rank that was started by hand,
    /// whose shell may end before it, and where the system does not tell.
    fn of(launch: &Launch) -> Option<Launcher> {
        let (variable, name) = match launch.source {
            Source::Torchrun => ("TORCHELASTIC_RUN_ID", "torchrun"),
            Source::OpenMpi => ("OMPI_COMM_WORLD_RANK", "mpirun"),
            Source::Pmi => ("PMI_RANK", "mpiexec"),
            Source::Mvapich => ("MV2_COMM_WORLD_RANK", "mpirun_rsh"),
            _ => return None,
        };
        env::var_os(variable)?;
        let (pid, start) = ancestor_without(variable, name).ok()?;
        let handle = rustix::process::pidfd_open(Pid::from_raw(pid)?, PidfdFlags::empty()).ok()?;
        // The number may have been given to another process meanwhile.
        let still = ancestor_without(variable, name).ok()?;
        (still == (pid, start)).then_some(Launcher { name, handle })
    }
}

/// The mask of ignored signals, bit `n - 1` for signal n: `SigIgn` of proc(5).
pub(crate) fn ignored_signals() -> io::Result<u64> {
    let status = fs::read_to_string("/proc/self/status")?;
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    mask.ok_or_else(|| io::Error::other("/proc/self/status has no readable SigIgn line"))
}
