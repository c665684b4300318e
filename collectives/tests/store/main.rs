//! Ranks that meet through stores: a folder, TCP, and one that a program brings.

mod again;
mod earlier;
mod meeting;
mod own_time;
mod stores;

use std::collections::{BTreeMap, BTreeSet};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use pillion_collectives::{Communicator, Error, FolderStore, Meeting, Options, Reduction, Store, TcpStore};

/// Only turns a hang into a failure.
const PATIENCE: Duration = Duration::from_secs(120);

/// A store that a program brings.
#[derive(Default)]
struct Foreign {
    values: Mutex<BTreeMap<String, Vec<u8>>>,
    counts: Mutex<BTreeMap<String, i64>>,
    /// How often each key has been set.
    set: Mutex<BTreeMap<String, usize>>,
    /// How often ranks have looked at each key.
    looks: Mutex<BTreeMap<String, usize>>,
    /// The ranks whose first attempt to meet has failed, where a test says so.
    failed: Mutex<BTreeSet<usize>>,
}

impl Store for Foreign {
    fn set(&self, key: &str, value: &[u8]) -> Result<(), Error> {
        self.values.lock().unwrap().insert(key.to_owned(), value.to_vec());
        *self.set.lock().unwrap().entry(key.to_owned()).or_default() += 1;
        Ok(())
    }

    fn get(&self, key: &str) -> Result<Option<Vec<u8>>, Error> {
        *self.looks.lock().unwrap().entry(key.to_owned()).or_default() += 1;
        Ok(self.values.lock().unwrap().get(key).cloned())
    }

    fn add(&self, key: &str, amount: i64) -> Result<i64, Error> {
        let mut counts = self.counts.lock().unwrap();
        let sum = counts.entry(key.to_owned()).or_default();
        *sum += amount;
        Ok(*sum)
    }
}

fn patient() -> Options {
    Options { startup_timeout: PATIENCE, ..Options::default() }
}

/// The stores of a job's ranks.
type Stores = Box<dyn Fn(usize) -> Arc<dyn Store> + Sync>;

/// Of each kind, one for a job. The rest is kept meanwhile.
fn kinds() -> Vec<(&'static str, Stores, Option<tempfile::TempDir>)> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("store");
    let address = Meeting::free_address().unwrap().to_string();
    let foreign = Arc::new(Foreign::default());
    vec![
        ("a folder", Box::new(move |_| Arc::new(FolderStore::new(&path).unwrap())), Some(folder)),
        ("TCP", Box::new(move |rank| Arc::new(tcp(rank, &address, "the job's secret"))), None),
        ("a foreign store", Box::new(move |_| foreign.clone()), None),
    ]
}

fn tcp(rank: usize, address: &str, secret: &str) -> TcpStore {
    let open = if rank == 0 { TcpStore::serve } else { TcpStore::visit };
    open(address, secret, PATIENCE).unwrap()
}

/// Waits for what other threads do.
fn until(what: &str, is_so: impl Fn() -> bool) {
    let started = Instant::now();
    while !is_so() {
        assert!(started.elapsed() < PATIENCE, "until {what}");
        thread::sleep(Duration::from_millis(1));
    }
}

/// Runs ranks as threads.
fn ranks<R: Send>(world: usize, program: impl Fn(usize) -> R + Sync) -> Vec<R> {
    thread::scope(|scope| {
        let program = &program;
        let ranks: Vec<_> = (0..world).map(|rank| scope.spawn(move || program(rank))).collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

fn sum(communicator: &Communicator) -> f64 {
    let mut values = [1.0 + communicator.rank() as f64];
    communicator.all_reduce_scalars(&mut values, Reduction::Sum).unwrap();
    values[0]
}

/// This program again, as a process that does what `role` says.
fn process(role: &str, rank: usize, store: &str) -> Child {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "as_a_process", "--nocapture"]);
    command.env("STORE_ROLE", role).env("STORE_RANK", rank.to_string()).env("STORE", store);
    command.env("PILLION_HOST", format!("host{}", rank / 2)).env_remove("RUST_TEST_THREADS");
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

/// Four processes have met twice.
fn have_met(processes: Vec<Child>) {
    for process in processes {
        let output = process.wait_with_output().unwrap();
        let (said, error) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert_eq!(said.matches("met 2 10").count(), 2, "{said} {error}");
    }
}

/// What a process does that [`process`] has started; nothing in the tests' own process.
#[test]
fn as_a_process() {
    let Ok(role) = std::env::var("STORE_ROLE") else { return };
    let (rank, place) = (std::env::var("STORE_RANK").unwrap().parse().unwrap(), std::env::var("STORE").unwrap());
    let store: Arc<dyn Store> = match place.strip_prefix("tcp ") {
        Some(address) => Arc::new(tcp(rank, address, "processes")),
        None => Arc::new(FolderStore::new(&place).unwrap()),
    };
    match role.as_str() {
        "meet" => {
            for _ in 0..2 {
                let communicator = Communicator::connect_through(store.clone(), rank, 4, patient()).unwrap();
                println!("met {} {}", communicator.hosts(), sum(&communicator));
            }
        }
        "add 100" => (0..100).for_each(|_| println!("sum {}", store.add("count", 1).unwrap())),
        "add" => loop {
            println!("sum {}", store.add("count", 1).unwrap());
        },
        "lock" => {
            let file = std::fs::File::options().write(true).open(format!("{place}/c-count")).unwrap();
            rustix::fs::flock(&file, rustix::fs::FlockOperation::LockExclusive).unwrap();
            println!("locked");
            thread::sleep(PATIENCE);
        }
        role => panic!("{role}"),
    }
}
