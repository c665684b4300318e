//! How long ranks wait for each other and for a store, and what they leave behind.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use pillion_collectives::{Communicator, Error, Meeting, Options, Store, TcpStore, WireKind};

use super::{Foreign, PATIENCE, patient, ranks, sum, until};

/// A store of which one call waits until something is so.
struct Held {
    foreign: Arc<Foreign>,
    /// Before this key is looked at, or set.
    get: &'static str,
    set: &'static str,
    /// Raised when a call waits.
    waits: AtomicBool,
    /// What is waited for.
    is_free: Box<dyn Fn(&Foreign) -> bool + Send + Sync>,
}

impl Held {
    fn wait(&self) {
        self.waits.store(true, Ordering::Relaxed);
        until("a call goes on", || (self.is_free)(&self.foreign));
    }
}

impl Store for Held {
    fn set(&self, key: &str, value: &[u8]) -> Result<(), Error> {
        if !self.set.is_empty() && key.starts_with(self.set) {
            self.wait();
        }
        self.foreign.set(key, value)
    }

    fn get(&self, key: &str) -> Result<Option<Vec<u8>>, Error> {
        if !self.get.is_empty() && key.starts_with(self.get) {
            self.wait();
        }
        self.foreign.get(key)
    }

    fn add(&self, key: &str, amount: i64) -> Result<i64, Error> {
        self.foreign.add(key, amount)
    }
}

fn has(foreign: &Foreign, key: &str) -> bool {
    foreign.values.lock().unwrap().contains_key(key)
}

#[test]
fn rank_0_can_end_its_store_when_the_ranks_have_met() {
    let address = Meeting::free_address().unwrap().to_string();
    ranks(2, |rank| {
        let open = if rank == 0 { TcpStore::serve } else { TcpStore::visit };
        let store = Arc::new(open(&address, "the job's secret", PATIENCE).unwrap());
        let weak = Arc::downgrade(&store);
        let all = Communicator::connect_through(store, rank, 2, patient()).unwrap();
        assert!(weak.upgrade().is_none(), "rank {rank} keeps the store");
        assert_eq!(sum(&all), 3.0);
    });
    TcpStore::serve(&address, "another secret", Duration::ZERO).unwrap();
}

#[test]
fn a_rank_that_cannot_join_does_not_wait_for_a_store_that_is_silent() {
    // Rank 0's first call sets a value, and that of the others looks at one.
    for rank in [0, 1] {
        for stops in [false, true] {
            let (free, stop) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
            let is_free = free.clone();
            let foreign = Arc::new(Foreign::default());
            let is_free = Box::new(move |_: &Foreign| is_free.load(Ordering::Relaxed));
            let store = Arc::new(Held {
                foreign: foreign.clone(),
                get: "pillion/",
                set: "pillion/",
                waits: AtomicBool::new(false),
                is_free,
            });
            let weak = Arc::downgrade(&store);
            let options = Options { wire: WireKind::Mpi, stop: Some(stop.clone()), ..patient() };
            let started = Instant::now();
            let error = thread::scope(|scope| {
                let through = store.clone();
                let joining = scope.spawn(|| Communicator::connect_through(through, rank, 2, options));
                if stops {
                    until("the store is called", || store.waits.load(Ordering::Relaxed));
                    stop.store(true, Ordering::Relaxed);
                }
                joining.join().unwrap().err().unwrap()
            });
            assert!(matches!(error, Error::Options { .. }), "{error}");
            assert!(started.elapsed() < PATIENCE / 2, "it waited for the store");
            stop.store(false, Ordering::Relaxed);
            free.store(true, Ordering::Relaxed);
            drop(store);
            until("the thread ends", || weak.upgrade().is_none());
            // The thread was setting rank 0's record. It has set nothing after that.
            assert_eq!(foreign.set.lock().unwrap().len(), 1 - rank);
        }
    }
}

#[test]
fn the_ranks_have_time_to_read_the_table_when_the_last_comes_at_rank_0s_deadline() {
    let foreign = Arc::new(Foreign::default());
    let limit = Duration::from_secs(5);
    ranks(2, |rank| {
        let started = Instant::now();
        let is_free: Box<dyn Fn(&Foreign) -> bool + Send + Sync> = match rank {
            // Rank 0 sees its deadline pass while it looks for rank 1, which has come.
            0 => Box::new(move |foreign| started.elapsed() > limit && has(foreign, "pillion/rank/1")),
            // Rank 1 reads the table when rank 0 has looked twice whether it has.
            _ => {
                Box::new(|foreign| foreign.looks.lock().unwrap().get("pillion/read/1").is_some_and(|&looks| looks > 1))
            }
        };
        let (get, set) = if rank == 0 { ("pillion/rank/1", "") } else { ("", "pillion/read/1") };
        let store = Arc::new(Held { foreign: foreign.clone(), get, set, waits: AtomicBool::new(false), is_free });
        let options = Options { startup_timeout: if rank == 0 { limit } else { PATIENCE }, ..Options::default() };
        let all = Communicator::connect_through(store, rank, 2, options).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(sum(&all), 3.0);
    });
}

#[test]
fn ranks_that_have_come_learn_that_rank_0_was_told_to_end() {
    let (foreign, started) = (Arc::new(Foreign::default()), Instant::now());
    let stop = Arc::new(AtomicBool::new(false));
    let errors = ranks(3, |rank| {
        if rank == 2 {
            until("rank 1 comes", || has(&foreign, "pillion/rank/1"));
            stop.store(true, Ordering::Relaxed);
            return None;
        }
        let stop = (rank == 0).then(|| stop.clone());
        Communicator::connect_through(foreign.clone(), rank, 3, Options { stop, ..patient() }).err()
    });
    assert!(matches!(errors[0], Some(Error::Interrupted)), "{:?}", errors[0]);
    let Some(Error::Aborted { rank: 0, reason }) = &errors[1] else { panic!("{:?}", errors[1]) };
    assert!(reason.contains("told to end"), "{reason}");
    assert!(started.elapsed() < PATIENCE / 2, "rank 1 waited for the deadline");
}

#[test]
fn an_attempt_that_was_given_up_sets_nothing() {
    let foreign = Arc::new(Foreign::default());
    let (stop, free) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let is_free = free.clone();
    let is_free = Box::new(move |_: &Foreign| is_free.load(Ordering::Relaxed) > 0);
    // Rank 1 looks for rank 0, and the store takes its time.
    let store = Arc::new(Held {
        foreign: foreign.clone(),
        get: "pillion/table",
        set: "",
        waits: AtomicBool::new(false),
        is_free,
    });
    let weak = Arc::downgrade(&store);
    // A session is open.
    let short = || Options { startup_timeout: Duration::from_millis(1), ..Options::default() };
    Communicator::connect_through(foreign.clone(), 0, 2, short()).err().unwrap();
    thread::scope(|scope| {
        let options = Options { stop: Some(stop.clone()), ..patient() };
        let joining = scope.spawn(|| Communicator::connect_through(store, 1, 2, options).err().unwrap());
        until("rank 1 looks", || foreign.looks.lock().unwrap().contains_key("pillion/rank/0"));
        stop.store(true, Ordering::Relaxed);
        assert!(matches!(joining.join().unwrap(), Error::Interrupted));
    });
    // Whoever owns the flag may use it again.
    stop.store(false, Ordering::Relaxed);
    free.store(1, Ordering::Relaxed);
    until("the thread ends", || weak.upgrade().is_none());
    assert!(!has(&foreign, "pillion/rank/1"), "a record of an attempt that is over");
}

#[test]
fn a_rank_reports_what_it_has_read_though_the_store_is_silent_then() {
    let foreign = Arc::new(Foreign::default());
    let free = Arc::new(AtomicBool::new(false));
    let errors = ranks(2, |rank| {
        let is_free = free.clone();
        let is_free = Box::new(move |_: &Foreign| is_free.load(Ordering::Relaxed));
        let set = if rank == 1 { "pillion/read/" } else { "" };
        let store = Arc::new(Held { foreign: foreign.clone(), get: "", set, waits: AtomicBool::new(false), is_free });
        let startup_timeout = if rank == 1 { PATIENCE } else { Duration::from_secs(5) };
        let wire = if rank == 0 { WireKind::Mpi } else { WireKind::Auto };
        let options = Options { wire, startup_timeout, ..Options::default() };
        let started = Instant::now();
        let error = Communicator::connect_through(store, rank, 2, options).err().unwrap();
        assert!(started.elapsed() < PATIENCE / 2, "rank {rank} waited for the store");
        error
    });
    free.store(true, Ordering::Relaxed);
    assert!(matches!(errors[1], Error::Aborted { rank: 0, .. }), "{}", errors[1]);
}
