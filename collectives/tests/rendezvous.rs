//! Jobs that start beside each other, beside strangers and with mistakes, seen through the communicator.

use std::io::Write;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use pillion_collectives::{Backend, Communicator, Error, Launch, Meeting, Options, Reduction, WireKind};

/// Only turns a hang into a failure.
const PATIENCE: Duration = Duration::from_secs(120);

/// A rank that joins and returns the sum of all ranks' values.
fn start(launch: &Launch, value: f64) -> JoinHandle<Result<f64, String>> {
    let launch = launch.clone();
    thread::spawn(move || {
        let options = Options { startup_timeout: PATIENCE, ..Options::default() };
        let communicator = Communicator::connect(&launch, options).map_err(|error| error.to_string())?;
        let mut values = [value];
        communicator.all_reduce_scalars(&mut values, Reduction::Sum).map_err(|error| error.to_string())?;
        Ok(values[0])
    })
}

/// Connects to a job's rank 0, which is about to listen.
fn dial(job: &str) -> UnixStream {
    let address = SocketAddr::from_abstract_name(format!("pillion/{job}")).unwrap();
    let deadline = Instant::now() + PATIENCE;
    loop {
        match UnixStream::connect_addr(&address) {
            Ok(stream) => break stream,
            Err(error) => assert!(Instant::now() < deadline, "{error}"),
        }
        thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn jobs_of_different_names_do_not_meet() {
    let jobs = [1.0, 10.0, 100.0].map(|value| (value, Launch::threads(3)));
    // Rank by rank, so that the jobs form at the same time.
    let ranks: Vec<_> =
        (0..3).flat_map(|rank| jobs.each_ref().map(|(value, job)| (*value, start(&job[rank], *value)))).collect();
    for (value, rank) in ranks {
        assert_eq!(rank.join().unwrap(), Ok(3.0 * value));
    }
}

#[test]
fn strangers_at_the_door_do_not_disturb_the_job() {
    let job = Launch::threads(3);
    let zero = start(&job[0], 1.0);
    let mut strangers = Vec::new();
    for said in [&b""[..], b"pillion4\x01", b"GET / HTTP/1.1\r\n\r\n"].repeat(20) {
        let mut stream = dial(&job[0].job);
        stream.write_all(said).unwrap();
        strangers.push(stream);
        drop(dial(&job[0].job));
    }
    let ranks = [zero, start(&job[1], 2.0), start(&job[2], 4.0)];
    assert_eq!(ranks.map(|rank| rank.join().unwrap()), [Ok(7.0), Ok(7.0), Ok(7.0)]);
    drop(strangers);
}

#[test]
fn a_rank_that_is_started_twice_is_told_and_the_job_goes_on() {
    let job = Launch::threads(3);
    let zero = start(&job[0], 1.0);
    let twins = [start(&job[1], 2.0), start(&job[1], 2.0)];
    let deadline = Instant::now() + PATIENCE;
    while !twins.iter().any(JoinHandle::is_finished) {
        assert!(Instant::now() < deadline, "neither twin is refused");
        thread::sleep(Duration::from_millis(1));
    }
    let two = start(&job[2], 4.0);
    let [refused, joined] = {
        let mut twins = twins.map(|twin| twin.join().unwrap());
        twins.sort_by_key(Result::is_ok);
        twins
    };
    let error = refused.unwrap_err();
    assert!(error.ends_with("rank 1 has come already: start each rank once"), "{error}");
    assert_eq!([joined, zero.join().unwrap(), two.join().unwrap()], [Ok(7.0), Ok(7.0), Ok(7.0)]);
}

#[test]
fn a_rank_that_expects_another_world_is_told_both_numbers() {
    let job = Launch::threads(3);
    let zero = start(&job[0], 1.0);
    let error = start(&Launch { world: 2, local_world: 2, ..job[1].clone() }, 2.0).join().unwrap().unwrap_err();
    assert!(error.contains("rank 0 expects 3 ranks here, this process 2"), "{error}");
    let ranks = [zero, start(&job[1], 2.0), start(&job[2], 4.0)];
    for rank in ranks {
        assert_eq!(rank.join().unwrap(), Ok(7.0));
    }
}

#[test]
fn a_rank_with_another_setting_is_told_which_and_both_values_while_rank_0_waits() {
    let job = Launch::threads(2);
    let zero = start(&job[0], 1.0);
    let with = |options: Options| {
        let options = Options { startup_timeout: PATIENCE, ..options };
        Communicator::connect(&job[1], options).err().expect("it is refused").to_string()
    };
    let error = with(Options { reduce_groups: 2, ..Options::default() });
    assert!(error.contains("`reduce_groups` (--reduce-groups) is 2 on this rank and 1 on rank 0"), "{error}");
    let error = with(Options { backend: Backend::Shm, ..Options::default() });
    assert!(
        error.ends_with(
            "`backend` (--backend) is shm on this rank and auto on rank 0: give every rank the same settings"
        ),
        "{error}"
    );
    assert!(!zero.is_finished(), "rank 0 has not been waiting for these");
    let one = start(&job[1], 2.0);
    assert_eq!([zero, one].map(|rank| rank.join().unwrap()), [Ok(3.0), Ok(3.0)]);
}

#[test]
fn a_rank_that_is_told_to_end_waits_for_nobody() {
    let address = Meeting::free_address().unwrap().to_string();
    let meeting = Some(Meeting { secret: address.clone(), address });
    for launch in Launch::threads(2) {
        // Alone on its host, it would wait at an address.
        let on_hosts = Launch { local_rank: 0, local_world: 1, meeting: meeting.clone(), ..launch.clone() };
        for launch in [launch, on_hosts] {
            let stop = Arc::new(AtomicBool::new(false));
            let options = Options {
                startup_timeout: PATIENCE,
                stop: Some(stop.clone()),
                wire: WireKind::Tcp,
                ..Options::default()
            };
            let started = Instant::now();
            let rank = thread::spawn(move || Communicator::connect(&launch, options).err());
            // Most often it waits by now; it ends whether it does or not.
            thread::sleep(Duration::from_millis(20));
            assert!(!rank.is_finished(), "it waits for nobody");
            stop.store(true, Ordering::Relaxed);
            assert!(matches!(rank.join().unwrap(), Some(Error::Interrupted)));
            assert!(started.elapsed() < PATIENCE / 2, "it waited for the deadline");
        }
    }
}

#[test]
fn a_limit_of_any_length_can_be_given() {
    for limit in [Duration::from_secs(u64::MAX), Duration::MAX] {
        let options = Options { startup_timeout: limit, timeout: limit, ..Options::default() };
        Communicator::connect(&Launch::single(), options).unwrap().barrier().unwrap();
    }
}

#[test]
fn options_that_are_wrong_for_all_ranks_are_said_by_rank_zero() {
    let ranks = Launch::threads(4).into_iter().map(|launch| {
        thread::spawn(move || {
            let options = Options { reduce_groups: 3, ..Options::default() };
            match Communicator::connect(&launch, options).err().unwrap() {
                Error::Options { reason, said_by_rank_zero } => {
                    assert_eq!(reason, "3 groups of reduction do not divide 4 ranks: choose a divisor");
                    said_by_rank_zero
                }
                other => panic!("{other}"),
            }
        })
    });
    let said: Vec<bool> = ranks.collect::<Vec<_>>().into_iter().map(|rank| rank.join().unwrap()).collect();
    assert_eq!(said, [false, true, true, true]);
}

#[cfg(not(feature = "mpi"))]
#[test]
fn ranks_of_several_hosts_are_pointed_to_the_build_that_joins_them() {
    let launch = Launch { local_world: 1, local_rank: 0, ..Launch::threads(2)[1].clone() };
    let error = start(&launch, 1.0).join().unwrap().unwrap_err();
    assert!(error.contains("1 of 2 ranks are on this host"), "{error}");
    assert!(error.contains("build with `--features mpi` and start with mpirun"), "{error}");
}
