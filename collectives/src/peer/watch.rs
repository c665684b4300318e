//! What looks after the streams of a rank that wait for other processes.
//!
//! A stream cannot be told that what it waits for will never come. A thread looks whether a rank has
//! died, has given up, or is late for longer than an operation may take. Then it lets this rank's
//! streams go on, by words that no stream writes, and the kernel behind each wait stops what follows.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use pillion_kernels::{Buffer, Cuda, Failure, Words};

use super::LANES;
use crate::Error;
use crate::call::describe;
use crate::limits::explain_thread;
use crate::memory::control::Call;
use crate::transport::Transport;

/// How often a rank looks at the others.
const LOOK_EVERY: Duration = Duration::from_millis(5);
/// How often it writes the words once it has failed: streams that are late may overwrite them.
const POISON_EVERY: Duration = Duration::from_millis(1);
/// A longer gap between two looks means that this rank did not run; only so much of it counts.
const LONGEST_GAP: Duration = Duration::from_millis(200);

/// The marks of the ranks' streams.
pub(super) struct Marks {
    words: Words,
    /// Memory of the words, which goes after them.
    _pages: Buffer,
    rank: usize,
    world: usize,
    lanes: [Mutex<Lane>; LANES],
}

/// What one of this rank's streams was given.
struct Lane {
    /// The last mark.
    last: u32,
    /// Marks that all ranks have enqueued and not all are known to have written, and their steps.
    open: VecDeque<(u32, Call)>,
}

/// Whether a stream that wrote `mark` has written `other`, or is beyond it.
fn has_come(mark: u32, other: u32) -> bool {
    mark.wrapping_sub(other) as i32 >= 0
}

impl Marks {
    /// All streams have written `first`.
    pub(super) fn new(words: Words, pages: Buffer, rank: usize, world: usize, first: u32) -> Marks {
        let lane = || Mutex::new(Lane { last: first, open: VecDeque::new() });
        Marks { words, _pages: pages, rank, world, lanes: std::array::from_fn(|_| lane()) }
    }

    pub(super) fn words(&self) -> &Words {
        &self.words
    }

    /// The next mark of a stream of this rank.
    pub(super) fn next(&self, lane: usize) -> u32 {
        let mut lane = self.lanes[lane].lock();
        lane.last = lane.last.wrapping_add(1);
        lane.last
    }

    /// All ranks have enqueued the mark, at this step of an operation.
    pub(super) fn expect(&self, lane: usize, mark: u32, call: Call) {
        self.lanes[lane].lock().open.push_back((mark, call));
    }

    /// The first mark that this rank's stream has written and others have not, whom it waits for,
    /// and the step.
    fn late(&self, lane: usize) -> Option<(u32, Vec<usize>, Call)> {
        let mut state = self.lanes[lane].lock();
        let written = |rank: usize, mark: u32| has_come(self.words.get(rank, lane), mark);
        while let Some((mark, call)) = state.open.front().copied() {
            let late: Vec<usize> = (0..self.world).filter(|&rank| !written(rank, mark)).collect();
            if !late.is_empty() {
                return written(self.rank, mark).then_some((mark, late, call));
            }
            state.open.pop_front();
        }
        None
    }

    /// Lets go on what waits for the streams of any rank.
    fn poison(&self) {
        self.lanes.iter().enumerate().for_each(|(number, lane)| self.words.poison(number, lane.lock().last));
    }
}

/// A thread that looks after the streams of a rank.
pub(super) struct Watch {
    marks: Arc<Marks>,
    ending: Arc<AtomicBool>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Watch {
    /// Starts it.
    ///
    /// # Errors
    /// [`Error::System`] where the system starts no thread.
    pub(super) fn start(marks: Marks, control: &Arc<dyn Transport>, gpu: &Cuda) -> Result<Watch, Error> {
        let (marks, ending) = (Arc::new(marks), Arc::new(AtomicBool::new(false)));
        let mut watcher = Watcher {
            marks: marks.clone(),
            control: control.clone(),
            gpu: gpu.clone(),
            ending: ending.clone(),
            waits: Default::default(),
        };
        let thread = std::thread::Builder::new()
            .name(format!("pillion-gpu-watch-{}", marks.rank))
            .spawn(move || watcher.run())
            .map_err(|error| Error::System { what: "starting a thread", reason: explain_thread(&error) })?;
        Ok(Watch { marks, ending, thread: Mutex::new(Some(thread)) })
    }

    pub(super) fn marks(&self) -> &Marks {
        &self.marks
    }

    /// Ends it. The streams have run what they were given.
    pub(super) fn end(&self) {
        if let Some(thread) = self.thread.lock().take() {
            self.ending.store(true, Ordering::Release);
            thread.thread().unpark();
            // It has printed a panic by itself.
            let _ = thread.join();
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.end();
    }
}

/// What the thread has.
struct Watcher {
    marks: Arc<Marks>,
    control: Arc<dyn Transport>,
    gpu: Cuda,
    ending: Arc<AtomicBool>,
    waits: [Wait; LANES],
}

/// How long a stream has waited at a mark.
#[derive(Default)]
struct Wait {
    mark: Option<u32>,
    waited: Duration,
    has_warned: bool,
}

impl Watcher {
    fn run(&mut self) {
        let mut has_failed = false;
        let mut looked = Instant::now();
        while !self.ending.load(Ordering::Acquire) {
            if !has_failed && let Err(error) = self.look(looked.elapsed().min(LONGEST_GAP)) {
                if matches!(error, Error::Timeout { .. }) {
                    // What follows ends the others' waits before their own limits do.
                    self.control.abort(&error.to_string());
                }
                // Before any stream goes on, because this is the error that its events have then.
                self.gpu.fail(Failure::new(error));
                has_failed = true;
            }
            looked = Instant::now();
            if has_failed {
                self.marks.poison();
            }
            std::thread::park_timeout(if has_failed { POISON_EVERY } else { LOOK_EVERY });
        }
    }

    /// Whether all ranks are well and none is late, and this one's GPU is well. Where it is not, the
    /// others hear of it. The last look was `gap` ago.
    fn look(&mut self, gap: Duration) -> Result<(), Error> {
        self.control.look()?;
        self.gpu.healthy().map_err(|failure| self.control.fail_after(failure))?;
        for lane in 0..LANES {
            let wait = &mut self.waits[lane];
            let Some((mark, late, call)) = self.marks.late(lane) else {
                *wait = Wait::default();
                continue;
            };
            if wait.mark != Some(mark) {
                *wait = Wait { mark: Some(mark), ..Wait::default() };
            }
            wait.waited += gap;
            let (seconds, how) = (wait.waited.as_secs(), "its GPU has not come so far".to_owned());
            let options = self.control.options();
            if wait.waited >= options.timeout {
                let error = Error::Timeout { op: describe(call), waiting_on: late, seconds, how };
                return Err(self.control.fail(error));
            }
            if !wait.has_warned && wait.waited >= options.warn_after {
                wait.has_warned = true;
                let (rank, op) = (self.marks.rank, describe(call));
                let late: Vec<String> = late.iter().map(usize::to_string).collect();
                let line = format!(
                    "pillion: the GPU of rank {rank} has waited {seconds} s for rank {} in {op} ({how})",
                    late.join(", ")
                );
                // A closed stderr must not end this thread.
                let _ = std::io::Write::write_fmt(&mut std::io::stderr(), format_args!("{line}\n"));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::has_come;

    #[test]
    fn marks_wrap() {
        assert!(has_come(5, 5) && has_come(6, 5) && !has_come(4, 5));
        assert!(has_come(0, u32::MAX) && !has_come(u32::MAX, 0) && has_come(3, u32::MAX - 3));
    }
}
