//! What earlier jobs have left in a store, and how the next ones meet there.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use pillion_collectives::{Communicator, Error, FolderStore, Meeting, Options, Store};

use super::{have_met, patient, process, ranks, sum, tcp, until};

#[test]
fn twenty_jobs_one_after_the_other_meet_in_one_folder_and_at_one_port() {
    let folder = tempfile::tempdir().unwrap();
    let address = Meeting::free_address().unwrap().to_string();
    for over_tcp in [false, true] {
        // No rank waits for others between two jobs, so one may come to the job before.
        ranks(3, |rank| {
            for job in 0..20 {
                let store: Arc<dyn Store> = match over_tcp {
                    true => Arc::new(tcp(rank, &address, "always the same")),
                    false => Arc::new(FolderStore::new(folder.path()).unwrap()),
                };
                let communicator = Communicator::connect_through(store, rank, 3, patient());
                let communicator = communicator.unwrap_or_else(|error| panic!("job {job}, rank {rank}: {error}"));
                assert_eq!(sum(&communicator), 6.0);
            }
        });
    }
    // One record for each rank, one table, and what each rank but rank 0 has read.
    assert_eq!(folder.path().read_dir().unwrap().count(), 6);
}

/// A folder that counts the looks at the table, which a rank takes after all others.
struct Watched {
    folder: FolderStore,
    looks: AtomicUsize,
}

impl Store for Watched {
    fn set(&self, key: &str, value: &[u8]) -> Result<(), Error> {
        self.folder.set(key, value)
    }

    fn get(&self, key: &str) -> Result<Option<Vec<u8>>, Error> {
        let value = self.folder.get(key);
        self.looks.fetch_add(usize::from(key == "pillion/table"), Ordering::Relaxed);
        value
    }

    fn add(&self, key: &str, amount: i64) -> Result<i64, Error> {
        self.folder.add(key, amount)
    }
}

#[test]
fn what_earlier_jobs_and_others_have_left_harms_nobody() {
    let folder = tempfile::tempdir().unwrap();
    let store = || Arc::new(FolderStore::new(folder.path()).unwrap());
    let short = || Options { startup_timeout: Duration::from_secs(1), reduce_groups: 2, ..Options::default() };
    // Of a larger job with another setting, one rank never came.
    ranks(3, |rank| Communicator::connect_through(store(), rank, 4, short()).err().unwrap());
    std::fs::write(folder.path().join("0.part"), "half").unwrap();
    std::fs::write(folder.path().join("notes"), "of a user").unwrap();
    let met = |garbage: &[u8]| {
        let watched =
            Arc::new(Watched { folder: FolderStore::new(folder.path()).unwrap(), looks: AtomicUsize::new(0) });
        ranks(2, |rank| {
            let store: Arc<dyn Store> = if rank == 0 { store() } else { watched.clone() };
            if rank == 0 {
                // At all that is there.
                until("rank 1 has looked twice", || watched.looks.load(Ordering::Relaxed) > 1);
            }
            sum(&Communicator::connect_through(store, rank, 2, patient()).unwrap_or_else(|error| panic!("{error}")))
        })
        .into_iter()
        .for_each(|sum| assert_eq!(sum, 3.0, "{garbage:?}"));
    };
    met(b"");
    for garbage in [&b""[..], b"x", b"pilltab1", &[0xff; 700]] {
        for key in ["pillion/rank/0", "pillion/rank/1", "pillion/table"] {
            store().set(key, garbage).unwrap();
        }
        met(garbage);
    }
}

#[test]
fn ranks_that_are_killed_while_they_meet_keep_nobody_from_it() {
    let folder = tempfile::tempdir().unwrap();
    let (place, store) = (folder.path().display().to_string(), FolderStore::new(folder.path()).unwrap());
    // Two of four have come, and wait for the others when they are killed.
    let mut killed: Vec<_> = (0..2).map(|rank| process("meet", rank, &place)).collect();
    until("they come", || (0..2).all(|rank| store.get(&format!("pillion/rank/{rank}")).unwrap().is_some()));
    for process in &mut killed {
        process.kill().unwrap();
        process.wait().unwrap();
    }
    have_met((0..4).map(|rank| process("meet", rank, &place)).collect());
    // One of them is killed, and its own next attempt meets the others, which wait for it.
    let folder = tempfile::tempdir().unwrap();
    let (place, store) = (folder.path().display().to_string(), FolderStore::new(folder.path()).unwrap());
    let mut processes: Vec<_> = [0, 1, 3].map(|rank| process("meet", rank, &place)).into();
    until("they come", || store.get("pillion/rank/3").unwrap().is_some());
    let before = store.get("pillion/rank/3").unwrap();
    let mut killed = processes.pop().unwrap();
    killed.kill().unwrap();
    killed.wait().unwrap();
    processes.push(process("meet", 3, &place));
    until("it comes again", || store.get("pillion/rank/3").unwrap() != before);
    processes.push(process("meet", 2, &place));
    have_met(processes);
}
