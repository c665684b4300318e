//! How ranks wait for each other, over any kind of atomic word: the same code runs on shared memory and under a model checker.
//!
//! A rank publishes by a release store to its own counter, and its peers look at it with acquire loads. Who finds nothing new for a while
//! goes to sleep on a [`Bell`] of its own; who publishes looks whether anybody sleeps. Either the publisher sees the sleeper's
//! interest and rings, or the sleeper sees what was published when it looks for the last time: both store first, then pass a fence, then load, so
//! it cannot be that neither sees the other.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use rustix::thread::futex;

/// An atomic number.
pub(crate) trait Word {
    fn load(&self, order: Ordering) -> u64;
    fn store(&self, value: u64, order: Ordering);
    fn increment(&self, order: Ordering);
    /// A sequentially consistent fence.
    fn fence();
}

/// A word at which a thread can sleep.
pub(crate) trait Futex: Word {
    /// Sleeps while the word is `seen`, until [`Futex::wake`], or for `limit`; or not at all, and
    /// then the caller looks again.
    fn sleep(&self, seen: u64, limit: Duration);
    fn wake(&self);
}

macro_rules! word {
    ($($atomic:ty as $int:ty),*) => {$(
        impl Word for $atomic {
            fn load(&self, order: Ordering) -> u64 {
                <$atomic>::load(self, order) as u64
            }
            fn store(&self, value: u64, order: Ordering) {
                <$atomic>::store(self, value as $int, order);
            }
            fn increment(&self, order: Ordering) {
                self.fetch_add(1, order);
            }
            fn fence() {
                std::sync::atomic::fence(Ordering::SeqCst);
            }
        }
    )*};
}
word!(AtomicU32 as u32, AtomicU64 as u64);

impl Futex for AtomicU32 {
    fn sleep(&self, seen: u64, limit: Duration) {
        let limit = rustix::fs::Timespec { tv_sec: limit.as_secs() as i64, tv_nsec: i64::from(limit.subsec_nanos()) };
        // Every outcome (woken, changed, timed out, interrupted) means: look again.
        let _ = futex::wait(self, futex::Flags::empty(), seen as u32, Some(&limit));
    }

    fn wake(&self) {
        // Fails only for a bad address, and this one is mapped.
        let _ = futex::wake(self, futex::Flags::empty(), u32::MAX >> 1);
    }
}

/// What one thread sleeps on: zeroed memory is a bell at which nobody sleeps.
#[repr(C, align(64))]
#[derive(Default)]
pub(crate) struct Bell<W> {
    /// Changes with every ring; the word that the sleeper's futex compares.
    pub(crate) rings: W,
    /// The subjects, as bits, for which the sleeper wants to be woken; 0 when it is awake.
    interest: W,
}

impl<W: Futex> Bell<W> {
    /// Sleeps until there is news about `interest`, or for as long as a last look says, now that
    /// who has news would ring; it says none where it finds some.
    pub(crate) fn rest(&self, interest: u64, look: impl FnOnce() -> Option<Duration>) {
        let seen = self.prepare(interest);
        if let Some(limit) = look() {
            self.rings.sleep(seen, limit);
        }
        self.interest.store(0, Ordering::Relaxed);
    }

    /// The sleeper declares its interest. It looks for news once more, and sleeps only while `rings` is what this returns.
    fn prepare(&self, interest: u64) -> u64 {
        let seen = self.rings.load(Ordering::Acquire);
        self.interest.store(interest, Ordering::Relaxed);
        W::fence();
        seen
    }

    /// Wakes whoever sleeps here with an interest in `subjects`. What the news are about has been
    /// published, and a fence has followed.
    pub(crate) fn tell(&self, subjects: u64) {
        if self.interest.load(Ordering::Relaxed) & subjects != 0 {
            self.rings.increment(Ordering::Release);
            self.rings.wake();
        }
    }
}

/// Publishes `value` and everything written before. Whoever may sleep is told afterwards, with
/// [`Bell::tell`].
pub(crate) fn publish<W: Word>(word: &W, value: u64) {
    word.store(value, Ordering::Release);
    W::fence();
}

/// Polls until `poll` has a value: as long as `spin` says at once, then after each sleep at `bell`,
/// which news about `subjects` end, and `nap`.
///
/// Two threads that sleep at one bell can hide each other's interest; each then looks again after a
/// nap.
pub(crate) fn wait_at<W: Futex, T, E>(
    bell: &Bell<W>,
    subjects: u64,
    nap: Duration,
    mut spin: impl FnMut() -> bool,
    mut poll: impl FnMut() -> Result<Option<T>, E>,
) -> Result<T, E> {
    loop {
        loop {
            if let Some(value) = poll()? {
                return Ok(value);
            }
            if !spin() {
                break;
            }
        }
        let mut found = Ok(None);
        bell.rest(subjects, || {
            found = poll();
            matches!(found, Ok(None)).then_some(nap)
        });
        if let Some(value) = found? {
            return Ok(value);
        }
    }
}

#[cfg(test)]
mod tests {
    use loom::sync::atomic::{AtomicU64 as Modelled, fence};
    use loom::sync::{Arc, Condvar, Mutex};
    use loom::thread;

    use super::*;

    impl Word for Modelled {
        fn load(&self, order: Ordering) -> u64 {
            Modelled::load(self, order)
        }
        fn store(&self, value: u64, order: Ordering) {
            Modelled::store(self, value, order);
        }
        fn increment(&self, order: Ordering) {
            self.fetch_add(1, order);
        }
        fn fence() {
            fence(Ordering::SeqCst);
        }
    }

    /// A futex made of what the checker has, without any time limit: a wake-up that is lost is a
    /// deadlock, which the checker reports.
    #[derive(Default)]
    struct ModelledFutex {
        word: Modelled,
        queue: Mutex<()>,
        woken: Condvar,
    }

    impl Word for ModelledFutex {
        fn load(&self, order: Ordering) -> u64 {
            self.word.load(order)
        }
        fn store(&self, value: u64, order: Ordering) {
            self.word.store(value, order);
        }
        fn increment(&self, order: Ordering) {
            self.word.fetch_add(1, order);
        }
        fn fence() {
            fence(Ordering::SeqCst);
        }
    }

    impl Futex for ModelledFutex {
        fn sleep(&self, seen: u64, _limit: Duration) {
            let mut queue = self.queue.lock().unwrap();
            while self.word.load(Ordering::Acquire) == seen {
                queue = self.woken.wait(queue).unwrap();
            }
        }
        fn wake(&self) {
            let _queue = self.queue.lock().unwrap();
            self.woken.notify_all();
        }
    }

    /// One rank as the others see it.
    #[derive(Default)]
    struct Rank {
        steps: Modelled,
        bell: Bell<ModelledFutex>,
    }

    impl Rank {
        /// Takes a step, and tells who may sleep.
        fn step(&self, steps: u64, peers: &[&Rank]) {
            publish(&self.steps, steps);
            peers.iter().for_each(|peer| peer.bell.tell(1));
        }

        /// Waits until all of `ranks` have taken `steps`, as callers do, without spinning.
        fn wait(&self, steps: u64, ranks: &[&Rank]) {
            let here = || ranks.iter().all(|rank| rank.steps.load(Ordering::Acquire) >= steps).then_some(());
            let Ok(()) = wait_at(&self.bell, 1, Duration::MAX, || false, || Ok::<_, std::convert::Infallible>(here()));
        }

        /// The same as the progress thread does.
        fn drive(&self, steps: u64, ranks: &[&Rank]) {
            let is_here = || ranks.iter().all(|rank| rank.steps.load(Ordering::Acquire) >= steps);
            while !is_here() {
                self.bell.rest(1, || (!is_here()).then_some(Duration::MAX));
            }
        }
    }

    /// Memory that one rank writes and others read; the checker reports two accesses that nothing orders.
    #[derive(Default)]
    struct Arena(loom::cell::UnsafeCell<u64>);

    // SAFETY: the checker itself watches that accesses are ordered; that is the test.
    unsafe impl Sync for Arena {}

    impl Arena {
        fn write(&self, value: u64) {
            // SAFETY: as above.
            self.0.with_mut(|cell| unsafe { *cell = value });
        }
        fn read(&self) -> u64 {
            // SAFETY: as above.
            self.0.with(|cell| unsafe { *cell })
        }
    }

    #[derive(Default)]
    struct Job {
        ranks: [Rank; 2],
        /// Two headers of each rank, by the parity of the operation; its arena; and what its peer pushes into.
        headers: [[Arena; 2]; 2],
        arenas: [Arena; 2],
    }

    /// Two ranks make `operations` all-reduces: write the header and the arena, step, read both, step, then write again.
    fn all_reduces(job: &Job, rank: usize, operations: u64) {
        let (own, other) = (&job.ranks[rank], &job.ranks[1 - rank]);
        for operation in 1..=operations {
            let parity = (operation % 2) as usize;
            job.headers[rank][parity].write(operation);
            job.arenas[rank].write(10 * operation + rank as u64);
            own.step(2 * operation - 1, &[other]);
            own.wait(2 * operation - 1, &[other]);
            assert_eq!(job.headers[1 - rank][parity].read(), operation);
            assert_eq!(job.arenas[1 - rank].read(), 10 * operation + 1 - rank as u64);
            own.step(2 * operation, &[other]);
            own.drive(2 * operation, &[other]);
        }
    }

    /// Two ranks make barriers, whose only step is the first: headers alternate, so that none is overwritten while it is read.
    fn barriers(job: &Job, rank: usize, operations: u64) {
        let (own, other) = (&job.ranks[rank], &job.ranks[1 - rank]);
        for operation in 1..=operations {
            let parity = (operation % 2) as usize;
            job.headers[rank][parity].write(operation);
            own.step(operation, &[other]);
            own.wait(operation, &[other]);
            assert_eq!(job.headers[1 - rank][parity].read(), operation);
        }
    }

    fn check(program: fn(&Job, usize, u64), operations: u64) {
        let mut model = loom::model::Builder::new();
        model.preemption_bound = Some(3);
        model.check(move || {
            let job = Arc::new(Job::default());
            let other = job.clone();
            let thread = thread::spawn(move || program(&other, 1, operations));
            program(&job, 0, operations);
            thread.join().unwrap();
        });
    }

    #[test]
    fn no_wake_up_is_lost_and_nothing_is_read_while_it_is_written() {
        check(all_reduces, 1);
        check(barriers, 3);
    }

    /// Runs a broken program in a process of its own, since the checker may panic twice, and returns what it says.
    fn verdict(test: &str) -> String {
        let name = format!("memory::protocol::tests::{test}");
        let program = std::env::current_exe().unwrap();
        let run = std::process::Command::new(program).args(["--ignored", "--exact", &name]).output().unwrap();
        assert!(!run.status.success(), "{test} passes");
        String::from_utf8_lossy(&[run.stdout, run.stderr].concat()).into_owned()
    }

    #[test]
    fn the_model_notices_what_is_broken_on_purpose() {
        assert!(verdict("broken_one_header").contains("Causality violation"));
        assert!(verdict("broken_no_last_look").contains("deadlock"));
        assert!(verdict("broken_no_fence").contains("deadlock"));
    }

    #[test]
    #[ignore = "run by the test above, which expects it to fail"]
    fn broken_one_header() {
        // The barriers above without alternating places.
        check(
            |job, rank, operations| {
                let (own, other) = (&job.ranks[rank], &job.ranks[1 - rank]);
                for operation in 1..=operations {
                    job.headers[rank][0].write(operation);
                    own.step(operation, &[other]);
                    own.wait(operation, &[other]);
                    job.headers[1 - rank][0].read();
                }
            },
            2,
        );
    }

    /// One rank waits, in the given way, for the one step of another.
    fn check_wait(wait: fn(&Rank, &Rank), step: fn(&Rank, &Rank)) {
        loom::model(move || {
            let job = Arc::new(Job::default());
            let other = job.clone();
            let thread = thread::spawn(move || step(&other.ranks[1], &other.ranks[0]));
            wait(&job.ranks[0], &job.ranks[1]);
            thread.join().unwrap();
        });
    }

    #[test]
    #[ignore = "run by a test above, which expects it to fail"]
    fn broken_no_last_look() {
        check_wait(
            |own, other| {
                while other.steps.load(Ordering::Acquire) < 1 {
                    own.bell.rest(1, || Some(Duration::MAX));
                }
            },
            |own, other| own.step(1, &[other]),
        );
    }

    #[test]
    #[ignore = "run by a test above, which expects it to fail"]
    fn broken_no_fence() {
        check_wait(
            |own, other| own.wait(1, &[other]),
            |own, other| {
                // As `step`, but nothing orders the store before the look at the sleeper.
                own.steps.store(1, Ordering::Release);
                other.bell.tell(1);
            },
        );
    }
}
