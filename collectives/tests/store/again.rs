//! Ranks that failed to meet, or met in vain, and come again at once.

use std::sync::Arc;
use std::time::Instant;

use pillion_collectives::{Backend, Communicator, Error, Options, Store};

use super::{Foreign, PATIENCE, patient, ranks, sum, until};

/// Rank 0's store, in which the other ranks' next attempts overtake rank 0. Rank 0 finds all other
/// ranks at its first look. When it has set the first table, it goes on once the others have read
/// this table, have failed, and have looked for the next one.
struct Slow {
    foreign: Arc<Foreign>,
    others: usize,
}

impl Slow {
    fn times(&self, key: &str) -> usize {
        self.foreign.set.lock().unwrap().get(key).copied().unwrap_or(0)
    }
}

impl Store for Slow {
    fn set(&self, key: &str, value: &[u8]) -> Result<(), Error> {
        self.foreign.set(key, value)?;
        if key == "pillion/table" && self.times(key) == 1 {
            until("the ranks fail", || self.foreign.failed.lock().unwrap().len() == self.others);
            let looks = || self.foreign.looks.lock().unwrap()[key];
            let seen = looks();
            until("the ranks look again", || looks() >= seen + 3 * self.others);
        }
        Ok(())
    }

    fn get(&self, key: &str) -> Result<Option<Vec<u8>>, Error> {
        if key == "pillion/rank/1" {
            until("all ranks come", || (1..=self.others).all(|rank| self.times(&format!("pillion/rank/{rank}")) > 0));
        }
        // Not counted as a look.
        Ok(self.foreign.values.lock().unwrap().get(key).cloned())
    }

    fn add(&self, key: &str, amount: i64) -> Result<i64, Error> {
        self.foreign.add(key, amount)
    }
}

/// Three ranks on three hosts, whose first attempt with `first` fails, and whose second does not.
/// Returns the errors of the first.
fn attempt_twice(first: impl Fn(usize) -> Options + Sync) -> Vec<Error> {
    let foreign = Arc::new(Foreign::default());
    ranks(3, |rank| {
        let store: Arc<dyn Store> = match rank {
            0 => Arc::new(Slow { foreign: foreign.clone(), others: 2 }),
            _ => foreign.clone(),
        };
        let host = Some(format!("host{rank}"));
        let options = Options { host: host.clone(), ..first(rank) };
        let error = Communicator::connect_through(store.clone(), rank, 3, options).err().unwrap();
        if rank > 0 {
            foreign.failed.lock().unwrap().insert(rank);
        }
        let all = Communicator::connect_through(store, rank, 3, Options { host, ..patient() });
        let all = all.unwrap_or_else(|again| panic!("rank {rank}: {again}, after {error}"));
        assert_eq!((sum(&all), all.hosts()), (6.0, 3));
        error
    })
}

#[test]
fn ranks_that_met_in_vain_meet_again_at_once() {
    let started = Instant::now();
    for error in attempt_twice(|_| Options { backend: Backend::Shm, ..patient() }) {
        assert!(error.to_string().contains("the ranks are on 3 hosts"), "{error}");
    }
    assert!(started.elapsed() < PATIENCE / 2, "they waited for the deadline");
}

#[test]
fn ranks_that_were_told_why_they_cannot_meet_wait_for_the_next_meeting() {
    let started = Instant::now();
    let differ = |rank| Options { backend: if rank == 1 { Backend::Tcp } else { Backend::Auto }, ..patient() };
    for error in attempt_twice(differ) {
        assert!(error.to_string().contains("is tcp on rank 1 and auto on rank 0"), "{error}");
    }
    assert!(started.elapsed() < PATIENCE / 2, "they waited for the deadline");
}
