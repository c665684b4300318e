//! Where ranks that are threads of one process see what the others have enqueued.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use pillion_kernels::{Cuda, Event};

use super::meeting::{Lends, Step};
use crate::Error;
use crate::call::describe;
use crate::memory::control::Call;

/// How often a rank that waits for another looks whether something has failed.
const LOOK_EVERY: Duration = Duration::from_millis(2);

/// What a rank shows the others of one step of an operation.
#[derive(Clone)]
pub(super) struct Post {
    pub(super) call: Call,
    pub(super) lends: Lends,
    /// Behind the work that the others wait for.
    pub(super) event: Event,
}

/// The steps that not all ranks of a group have seen.
pub(super) struct Board {
    world: usize,
    gpus: Mutex<Vec<Cuda>>,
    steps: Mutex<Open>,
    changed: Condvar,
}

#[derive(Default)]
struct Open {
    /// Number of the first.
    first: u64,
    open: VecDeque<Posts>,
}

/// What has been shown of one step.
struct Posts {
    posts: Vec<Option<Post>>,
    seen: usize,
}

/// Boards by the numbers of their groups.
type Boards = HashMap<u64, Weak<Board>>;

/// The boards that are in use.
static BOARDS: Mutex<Option<Boards>> = Mutex::new(None);

impl Board {
    /// The board of a group: the same for all its ranks, which give the same number.
    pub(super) fn of(number: u64, world: usize) -> Arc<Board> {
        let mut boards = BOARDS.lock();
        let boards = boards.get_or_insert_default();
        boards.retain(|_, board| board.strong_count() > 0);
        if let Some(board) = boards.get(&number).and_then(Weak::upgrade) {
            return board;
        }
        let board = Arc::new(Board { world, gpus: Mutex::default(), steps: Mutex::default(), changed: Condvar::new() });
        boards.insert(number, Arc::downgrade(&board));
        board
    }

    /// Shows the GPU of a rank.
    pub(super) fn introduce(&self, gpu: &Cuda) {
        self.gpus.lock().push(gpu.clone());
    }

    /// A GPU whose memory `gpu` does not reach, among those of all ranks.
    pub(super) fn out_of_reach(&self, gpu: &Cuda) -> Option<Cuda> {
        self.gpus.lock().iter().find(|other| !gpu.reaches(other)).cloned()
    }

    /// Shows what a rank has enqueued for a step, and returns what all have, once they have. Every
    /// rank has enqueued its own work before it waits, so a stream that waits for another rank's
    /// event waits for work that is there.
    ///
    /// # Errors
    /// What `control` says of the others, and [`Error::Timeout`].
    pub(super) fn meet(&self, at: &Step<'_>, post: Post) -> Result<Vec<Post>, Error> {
        let Step { control, rank, call, limit, .. } = *at;
        let step = call.sequence - 1;
        let mut steps = self.steps.lock();
        let index = usize::try_from(step - steps.first).expect("steps that are open are few");
        while steps.open.len() <= index {
            steps.open.push_back(Posts { posts: vec![None; self.world], seen: 0 });
        }
        steps.open[index].posts[rank] = Some(post);
        self.changed.notify_all();
        let began = Instant::now();
        loop {
            let index = (step - steps.first) as usize;
            if steps.open[index].posts.iter().all(Option::is_some) {
                let posts = steps.open[index].posts.iter().flatten().cloned().collect();
                steps.open[index].seen += 1;
                while steps.open.front().is_some_and(|first| first.seen == self.world) {
                    steps.open.pop_front();
                    steps.first += 1;
                }
                return Ok(posts);
            }
            if self.changed.wait_for(&mut steps, LOOK_EVERY).timed_out() {
                let late = |steps: &Open| -> Vec<usize> {
                    let posts = &steps.open[(step - steps.first) as usize].posts;
                    (0..self.world).filter(|&rank| posts[rank].is_none()).collect()
                };
                let (waited, waiting_on) = (began.elapsed(), late(&steps));
                let healthy = parking_lot::MutexGuard::unlocked(&mut steps, || control.healthy());
                if late(&steps).is_empty() {
                    // They came meanwhile, and have enqueued what they were shown.
                    continue;
                }
                healthy?;
                if waited > limit.within && !waiting_on.is_empty() {
                    let (op, how) = (describe(call), "not there yet".to_owned());
                    return Err(Error::Timeout { op, waiting_on, seconds: waited.as_secs(), how });
                }
            }
        }
    }
}
