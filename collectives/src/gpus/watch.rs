//! A thread that looks after the streams of a rank.
//!
//! A stream cannot be told that what it waits for will never come. So a thread looks whether a rank
//! has died, has given up, or is late for longer than an operation may take. Then it keeps this
//! rank's work from being believed, and lets its streams go on.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use pillion_kernels::Cuda;

use crate::Error;
use crate::call::describe;
use crate::limits::explain_thread;
use crate::memory::control::Call;
use crate::memory::fork::Maker;
use crate::transport::{Limit, Transport};

/// How often it looks.
const LOOK_EVERY: Duration = Duration::from_millis(5);
/// How often it lets the streams go on once something has failed.
const LET_GO_EVERY: Duration = Duration::from_millis(1);
/// A longer gap between two looks means that this rank did not run; only so much of it counts.
const LONGEST_GAP: Duration = Duration::from_millis(200);

/// What the streams of a rank wait for.
pub(super) trait Waiting: Send + 'static {
    /// Looks whether it will come; the last look was `gap` ago.
    fn look(&mut self, gap: Duration) -> Result<(), Error>;

    /// It will not come, because of `error`: what the streams leave must not be believed.
    fn give_up(&mut self, error: Error);

    /// Lets the streams go on. Called again and again from then on.
    fn let_go(&mut self);
}

/// The thread.
pub(super) struct Watch {
    maker: Maker,
    ending: Arc<AtomicBool>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Watch {
    /// Starts it.
    ///
    /// # Errors
    /// [`Error::System`] where the system starts no thread.
    pub(super) fn start(
        control: &Arc<dyn Transport>,
        gpu: &Cuda,
        rank: usize,
        mut waiting: impl Waiting,
    ) -> Result<Watch, Error> {
        let ending = Arc::new(AtomicBool::new(false));
        let (is_ending, control, gpu) = (ending.clone(), control.clone(), gpu.clone());
        let thread = std::thread::Builder::new()
            .name(format!("pillion-gpu-watch-{rank}"))
            .spawn(move || run(&*control, &gpu, &mut waiting, &is_ending))
            .map_err(|error| Error::System { what: "starting a thread", reason: explain_thread(&error) })?;
        Ok(Watch { maker: Maker::this(), ending, thread: Mutex::new(Some(thread)) })
    }

    /// Ends it, after a last look. The streams have run what they were given.
    pub(super) fn end(&self) {
        let Some(thread) = self.thread.lock().take() else { return };
        if self.maker.is_another() {
            // A forked child has no such thread.
            return std::mem::forget(thread);
        }
        self.ending.store(true, Ordering::Release);
        thread.thread().unpark();
        // It has printed a panic by itself.
        let _ = thread.join();
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.end();
    }
}

fn run(control: &dyn Transport, gpu: &Cuda, waiting: &mut dyn Waiting, ending: &AtomicBool) {
    let (mut has_failed, mut looked) = (false, Instant::now());
    loop {
        let is_last = ending.load(Ordering::Acquire);
        if !has_failed {
            let gap = looked.elapsed().min(LONGEST_GAP);
            let mut look = || {
                control.look(&|| "what its GPU waits for".to_owned())?;
                gpu.healthy().map_err(|failure| control.fail_after(failure))?;
                waiting.look(gap)
            };
            let seen = catch_unwind(AssertUnwindSafe(&mut look)).unwrap_or_else(|_| {
                let reason = "the thread that looks after it panicked".to_owned();
                Err(control.fail(Error::System { what: "waiting for a GPU", reason }))
            });
            looked = Instant::now();
            if let Err(error) = seen {
                if matches!(error, Error::Timeout { .. }) {
                    // What follows ends the others' waits before their own limits do.
                    control.abort(&error.to_string());
                }
                // Before any stream goes on, because this is the error that its events have then.
                waiting.give_up(error);
                has_failed = true;
            }
        }
        if has_failed {
            waiting.let_go();
        }
        if is_last {
            return;
        }
        std::thread::park_timeout(if has_failed { LET_GO_EVERY } else { LOOK_EVERY });
    }
}

/// How long a stream has waited for the other ranks.
#[derive(Default)]
pub(super) struct Lateness {
    /// At which of its operations' steps.
    at: Option<u64>,
    waited: Duration,
    has_warned: bool,
}

/// What a stream waits for.
pub(super) struct Late {
    /// Tells the steps of operations apart.
    pub(super) at: u64,
    pub(super) call: Call,
    pub(super) limit: Limit,
    /// The ranks that have not come.
    pub(super) ranks: Vec<usize>,
    pub(super) how: &'static str,
}

impl Lateness {
    /// Counts the time since the last look, and says once when it is long.
    ///
    /// # Errors
    /// [`Error::Timeout`], when the operation's limit is over.
    pub(super) fn count(
        &mut self,
        late: Option<Late>,
        rank: usize,
        gap: Duration,
        control: &dyn Transport,
    ) -> Result<(), Error> {
        let Some(Late { at, call, limit, ranks, how }) = late else {
            *self = Lateness::default();
            return Ok(());
        };
        if self.at != Some(at) {
            *self = Lateness { at: Some(at), ..Lateness::default() };
        }
        self.waited += gap;
        let (seconds, op, how) = (self.waited.as_secs(), describe(call), how.to_owned());
        if self.waited >= limit.within {
            return Err(control.fail(Error::Timeout { op, waiting_on: ranks, seconds, how }));
        }
        if !self.has_warned && self.waited >= control.options().warn_after {
            self.has_warned = true;
            let ranks: Vec<String> = ranks.iter().map(usize::to_string).collect();
            let ranks = ranks.join(", ");
            let said = format_args!("pillion: rank {rank} has waited {seconds} s for rank {ranks} in {op} ({how})\n");
            // A closed stderr must not end this thread.
            let _ = std::io::Write::write_fmt(&mut std::io::stderr(), said);
        }
        Ok(())
    }
}
