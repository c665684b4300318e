//! How ranks meet, and what they say where they do not.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use pillion_collectives::{Backend, Communicator, Error, Meeting, Options, Store, WireKind};

use super::{Foreign, PATIENCE, have_met, kinds, patient, process, ranks, sum, tcp};

fn host(rank: usize) -> Option<String> {
    Some(format!("host{}", rank / 2))
}

#[test]
fn ranks_meet_through_any_store_on_one_host_and_on_two() {
    for (kind, stores, _folder) in kinds() {
        ranks(4, |rank| {
            let store = stores(rank);
            let connect = |options| Communicator::connect_through(store.clone(), rank, 4, options).expect(kind);
            // One after the other, some while others live.
            let one = connect(patient());
            let two = connect(Options { host: host(rank), ..patient() });
            assert_eq!((one.hosts(), two.hosts(), one.rank(), two.world()), (1, 2, rank, 4), "{kind}");
            assert_eq!((one.backend(), two.backend()), (Backend::Shm, Backend::Hierarchical), "{kind}");
            assert_eq!((sum(&one), sum(&two)), (10.0, 10.0), "{kind}");
            drop(one);
            let three = connect(Options { backend: Backend::Tcp, ..patient() });
            assert_eq!((three.hosts(), sum(&three), sum(&two)), (4, 10.0, 10.0), "{kind}");
            let members = [rank / 2 * 2, rank / 2 * 2 + 1];
            let group = three.group(&members).unwrap();
            assert_eq!(sum(&group), 3.0);
        });
    }
}

#[test]
fn ranks_that_are_processes_meet_through_a_folder_and_through_tcp() {
    let folder = tempfile::tempdir().unwrap();
    let address = Meeting::free_address().unwrap();
    for place in [folder.path().display().to_string(), format!("tcp {address}")] {
        let processes: Vec<_> = (0..4).map(|rank| process("meet", rank, &place)).collect();
        have_met(processes);
    }
}

#[test]
fn a_rank_alone_needs_no_store() {
    struct None;
    impl Store for None {
        fn set(&self, _: &str, _: &[u8]) -> Result<(), Error> {
            panic!("nobody else sees it")
        }
        fn get(&self, _: &str) -> Result<Option<Vec<u8>>, Error> {
            panic!("nobody else sets it")
        }
        fn add(&self, _: &str, _: i64) -> Result<i64, Error> {
            panic!("nobody else adds")
        }
    }
    let alone = Communicator::connect_through(Arc::new(None), 0, 1, patient()).unwrap();
    assert_eq!(sum(&alone), 1.0);
    for (rank, world, expected) in [
        (1, 1, "counted from 0"),
        (7, 3, "counted from 0"),
        (0, 0, "a job of 0 ranks"),
        (0, (1 << 20) + 1, "a job of 1048577 ranks, and at most 1048576"),
        (0, 1 << 46, "at most 1048576"),
        (1, usize::MAX, "at most 1048576"),
    ] {
        let error = Communicator::connect_through(Arc::new(None), rank, world, patient()).err().unwrap();
        assert!(matches!(&error, Error::Misuse { reason } if reason.contains(expected)), "{error}");
    }
}

#[test]
fn ranks_that_do_not_come_are_named_by_all_that_came() {
    let short = || Options { startup_timeout: Duration::from_secs(6), ..Options::default() };
    let kinds = kinds();
    // Two of four ranks, of each kind at once.
    ranks(2 * kinds.len(), |number| {
        let ((kind, stores, _), rank) = (&kinds[number / 2], number % 2);
        let error = Communicator::connect_through(stores(rank), rank, 4, short()).err().unwrap();
        assert!(matches!(error, Error::Rendezvous { .. }), "{kind}: {error}");
        // With rank 1 beside them where this machine had no time for it.
        assert!(error.to_string().contains("2 and 3 did not come"), "{kind}: {error}");
    });
    let short = || Options { startup_timeout: Duration::from_millis(500), ..Options::default() };
    let error = Communicator::connect_through(Arc::new(Foreign::default()), 1, 2, short()).err().unwrap().to_string();
    assert!(error.contains("rank 0 did not come: was it started, with the same store?"), "{error}");
}

#[test]
fn a_rank_with_another_setting_is_named_with_both_values_by_all() {
    let store = Arc::new(Foreign::default());
    let started = Instant::now();
    for error in ranks(3, |rank| {
        let options = if rank == 1 { Options { backend: Backend::Hierarchical, ..patient() } } else { patient() };
        Communicator::connect_through(store.clone(), rank, 3, options).err().unwrap().to_string()
    }) {
        assert!(error.contains("`backend` (--backend) is hierarchical on rank 1 and auto on rank 0"), "{error}");
    }
    // A rank too many, for which rank 0 does not look.
    let store = Arc::new(Foreign::default());
    for (rank, error) in ranks(3, |rank| {
        while rank == 1 && !store.set.lock().unwrap().contains_key("pillion/rank/2") {
            assert!(started.elapsed() < PATIENCE, "rank 2 sets no record");
            thread::sleep(Duration::from_millis(1));
        }
        let world = if rank == 2 { 3 } else { 2 };
        Communicator::connect_through(store.clone(), rank, world, patient()).err().map(|error| error.to_string())
    })
    .into_iter()
    .enumerate()
    {
        match error {
            Some(error) => {
                assert!(rank == 2 && error.contains("the number of ranks is 3 on this rank and 2 on rank 0"), "{error}")
            }
            None => assert!(rank < 2),
        }
    }
    assert!(started.elapsed() < PATIENCE / 2, "they waited for the deadline");
    // The same, and a twin of rank 1, when the others have met.
    let late = || Options { startup_timeout: Duration::from_millis(100), ..Options::default() };
    let met = ranks(2, |rank| Communicator::connect_through(store.clone(), rank, 2, patient()).unwrap());
    for (rank, world, expected) in
        [(2, 3, "the number of ranks is 3 on this rank and 2 on rank 0"), (1, 2, "rank 1 has come already")]
    {
        let error = Communicator::connect_through(store.clone(), rank, world, late()).err().unwrap().to_string();
        assert!(error.contains(expected), "{error}");
    }
    drop(met);
}

#[test]
fn a_store_that_does_not_answer_is_named() {
    let nowhere = Meeting::free_address().unwrap().to_string();
    let options = Options { startup_timeout: Duration::from_millis(100), ..Options::default() };
    let store = Arc::new(tcp(1, &nowhere, "nobody"));
    let error = Communicator::connect_through(store, 1, 2, options).err().unwrap().to_string();
    assert!(error.contains("the store does not answer: is it there, and is rank 0"), "{error}");
}

#[test]
fn a_rank_that_cannot_join_ends_the_wait_of_all() {
    for quitter in 0..3 {
        let (store, started) = (Arc::new(Foreign::default()), Instant::now());
        let errors = ranks(3, |rank| {
            let wire = if rank == quitter { WireKind::Mpi } else { WireKind::Auto };
            Communicator::connect_through(store.clone(), rank, 3, Options { wire, ..patient() }).err().unwrap()
        });
        for (rank, error) in errors.into_iter().enumerate() {
            match error {
                Error::Options { reason, .. } if rank == quitter => assert!(reason.contains("over TCP"), "{reason}"),
                Error::Aborted { rank, reason } => assert!(rank == quitter && reason.contains("over TCP"), "{reason}"),
                error => panic!("{error}"),
            }
        }
        assert!(started.elapsed() < PATIENCE / 2, "they waited for the deadline");
    }
    // What all say, rank 0 says.
    let store = Arc::new(Foreign::default());
    for (rank, error) in ranks(2, |rank| {
        let options = Options { reduce_groups: 3, ..patient() };
        Communicator::connect_through(store.clone(), rank, 2, options).err().unwrap()
    })
    .into_iter()
    .enumerate()
    {
        let Error::Options { reason, said_by_rank_zero } = error else { panic!("{error}") };
        assert!(reason.contains("3 groups of reduction do not divide 2 ranks"), "{reason}");
        assert_eq!(said_by_rank_zero, rank > 0);
    }
}

#[test]
fn shared_memory_alone_does_not_reach_two_hosts() {
    let store = Arc::new(Foreign::default());
    for error in ranks(2, |rank| {
        let options = Options { backend: Backend::Shm, host: Some(format!("host{rank}")), ..patient() };
        Communicator::connect_through(store.clone(), rank, 2, options).err().unwrap().to_string()
    }) {
        assert!(error.contains("the ranks are on 2 hosts: choose another backend than shm"), "{error}");
    }
}

#[test]
fn a_rank_that_is_started_twice_is_told() {
    let store = Arc::new(Foreign::default());
    let started = Instant::now();
    let results = ranks(4, |number| {
        // Numbers 1 and 3 are rank 1. Rank 2 comes when both have set their records.
        while number == 2 && store.set.lock().unwrap().get("pillion/rank/1").is_none_or(|&count| count < 2) {
            assert!(started.elapsed() < PATIENCE, "two ranks set no records");
            thread::sleep(Duration::from_millis(1));
        }
        let rank = if number == 3 { 1 } else { number };
        Communicator::connect_through(store.clone(), rank, 3, patient()).map(|all| sum(&all))
    });
    let refused: Vec<String> =
        results.iter().filter_map(|result| result.as_ref().err().map(Error::to_string)).collect();
    assert_eq!(refused.len(), 1, "{refused:?}");
    assert!(refused[0].contains("rank 1 has come already: start each rank once"), "{refused:?}");
    assert!(started.elapsed() < PATIENCE / 2, "it waited for the deadline");
}

#[test]
fn a_flag_ends_the_wait_for_others_and_for_a_store_that_is_not_there() {
    let nowhere = Meeting::free_address().unwrap().to_string();
    let stores: [(usize, Arc<dyn Store>); 3] = [
        (0, Arc::new(Foreign::default())),
        (1, Arc::new(Foreign::default())),
        (1, Arc::new(tcp(1, &nowhere, "nobody"))),
    ];
    for (rank, store) in stores {
        let (stop, started) = (Arc::new(AtomicBool::new(false)), Instant::now());
        let options = Options { stop: Some(stop.clone()), ..patient() };
        let error = thread::scope(|scope| {
            scope.spawn(|| {
                thread::sleep(Duration::from_millis(100));
                stop.store(true, Ordering::Relaxed);
            });
            Communicator::connect_through(store, rank, 2, options).err().unwrap()
        });
        assert!(matches!(error, Error::Interrupted), "{error}");
        // A tenth of a second, and what a loaded machine takes.
        assert!(started.elapsed() < PATIENCE / 12, "the flag did not end the wait");
    }
}

#[test]
fn a_store_that_fails_ends_the_start_at_once() {
    struct Broken;
    impl Store for Broken {
        fn set(&self, _: &str, _: &[u8]) -> Result<(), Error> {
            Err(Error::Store { reason: "it is full: make room".to_owned() })
        }
        fn get(&self, key: &str) -> Result<Option<Vec<u8>>, Error> {
            Err(Error::Store { reason: format!("it is broken at {key}: repair it") })
        }
        fn add(&self, _: &str, _: i64) -> Result<i64, Error> {
            unreachable!()
        }
    }
    for (rank, expected) in [(0, "it is full: make room"), (1, "it is broken at pillion/")] {
        let error = Communicator::connect_through(Arc::new(Broken), rank, 2, patient()).err().unwrap();
        assert!(matches!(error, Error::Store { .. }) && error.to_string().contains(expected), "{error}");
    }
}

/// Ends a rank when it has read where the others are.
struct Fatal(Arc<Foreign>);

impl Store for Fatal {
    fn set(&self, key: &str, value: &[u8]) -> Result<(), Error> {
        match key.starts_with("pillion/read/") {
            true => Err(Error::Store { reason: "this rank ends now".to_owned() }),
            false => self.0.set(key, value),
        }
    }

    fn get(&self, key: &str) -> Result<Option<Vec<u8>>, Error> {
        self.0.get(key)
    }

    fn add(&self, key: &str, amount: i64) -> Result<i64, Error> {
        self.0.add(key, amount)
    }
}

#[test]
fn a_rank_that_ends_when_all_have_come_is_named_long_before_the_deadline() {
    let (foreign, started) = (Arc::new(Foreign::default()), Instant::now());
    let errors = ranks(3, |rank| {
        let store: Arc<dyn Store> = if rank == 1 { Arc::new(Fatal(foreign.clone())) } else { foreign.clone() };
        Communicator::connect_through(store, rank, 3, patient()).err().unwrap()
    });
    assert!(matches!(errors[0], Error::PeerLost { rank: 1, .. }), "{}", errors[0]);
    assert!(errors[1].to_string().contains("this rank ends now"), "{}", errors[1]);
    // Rank 2 may see first that rank 0 has ended because of it.
    assert!(matches!(errors[2], Error::PeerLost { .. }), "{}", errors[2]);
    assert!(started.elapsed() < PATIENCE / 2, "they waited for the deadline");
}

#[test]
fn a_rank_offers_the_address_of_the_interface_that_it_is_told() {
    let store = Arc::new(Foreign::default());
    let options =
        |rank, interface: &str| Options { host: host(2 * rank), interface: Some(interface.to_owned()), ..patient() };
    for sum in
        ranks(
            2,
            |rank| sum(&Communicator::connect_through(store.clone(), rank, 2, options(rank, "127.0.0.1")).unwrap()),
        )
    {
        assert_eq!(sum, 3.0);
    }
    let table = store.get("pillion/table").unwrap().unwrap();
    let mapped = [&[0; 10][..], &[0xff, 0xff, 127, 0, 0, 1]].concat();
    assert_eq!(table.windows(16).filter(|window| *window == mapped).count(), 2);
    // A rank that has no such interface tells the others.
    for wrong in [0, 1] {
        let started = Instant::now();
        let errors = ranks(2, |rank| {
            let interface = if rank == wrong { "docker9" } else { "127.0.0.1" };
            Communicator::connect_through(store.clone(), rank, 2, options(rank, interface)).err().unwrap()
        });
        assert!(
            errors.iter().all(|error| error.to_string().contains("PILLION_INTERFACE is \"docker9\"")),
            "{errors:?}"
        );
        assert!(matches!(errors[1 - wrong], Error::Aborted { rank, .. } if rank == wrong), "{errors:?}");
        assert!(started.elapsed() < PATIENCE / 2, "they waited for the deadline");
    }
}
