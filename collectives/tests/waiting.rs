//! How long an operation waits, whom it names, and how a caller can wait for it.

mod common;

use std::sync::Barrier;
use std::sync::mpsc::channel;
use std::time::Duration;

use pillion_collectives::{Communicator, Error, Launch, Options, Reduction, Start};
use pillion_kernels::{Cpu, DType, Device, Event};

/// Runs `program` on `world` ranks and returns what each returned.
fn ranks<R: Send>(world: usize, options: Options, program: impl Fn(Communicator) -> R + Sync) -> Vec<R> {
    common::run(Launch::threads(world), options, |_, communicator| program(communicator))
}

#[test]
fn a_rank_that_does_not_come_is_named_at_the_deadline() {
    let options = Options { timeout: Duration::from_millis(200), ..Options::default() };
    let errors = ranks(3, options, |communicator| {
        if communicator.rank() == 2 {
            // Stays past every other rank's deadline, without a call.
            std::thread::sleep(Duration::from_millis(600));
            return None;
        }
        Some(communicator.barrier().unwrap_err())
    });
    for error in errors.into_iter().flatten() {
        match &error {
            Error::Timeout { waiting_on, .. } => assert_eq!(*waiting_on, [2], "{error}"),
            other => assert!(matches!(other, Error::PeerLost { rank: 2, .. }), "{error}"),
        }
    }
}

#[test]
fn a_barrier_names_every_late_rank() {
    let options = Options { timeout: Duration::from_millis(200), ..Options::default() };
    let come = Barrier::new(5);
    let errors = ranks(5, options, |communicator| {
        let error = [0, 2].contains(&communicator.rank()).then(|| communicator.barrier().unwrap_err());
        // The others stay until these have given up.
        come.wait();
        error
    });
    let named: Vec<_> = errors
        .iter()
        .flatten()
        .filter_map(|error| match error {
            Error::Timeout { waiting_on, .. } => Some((waiting_on.clone(), error.to_string())),
            // Told by the other, which had given up a moment before.
            _ => None,
        })
        .collect();
    assert!(!named.is_empty(), "{errors:?}");
    for (waiting_on, words) in named {
        assert_eq!(waiting_on, [1, 3, 4]);
        assert!(words.contains("for ranks 1, 3 and 4 in"), "{words}");
    }
}

#[test]
fn on_several_hosts_the_late_rank_is_named_and_nobody_who_has_called() {
    for (world, hosts) in [(4, 2), (3, 2), (3, 3)] {
        for late in 0..world {
            let options = Options { timeout: Duration::from_millis(600), simulated_hosts: hosts, ..Options::default() };
            let (ready, come) = (Barrier::new(world), Barrier::new(world));
            let errors = ranks(world, options, |communicator| {
                // Limits count from each rank's call.
                ready.wait();
                let error = (communicator.rank() != late).then(|| communicator.barrier().unwrap_err());
                // The late rank stays until the others have given up.
                come.wait();
                error
            });
            for error in errors.into_iter().flatten() {
                match &error {
                    Error::Timeout { waiting_on, .. } => assert_eq!(*waiting_on, [late], "{world}, {hosts}: {error}"),
                    Error::PeerLost { rank, .. } => assert_eq!(*rank, late, "{world}, {hosts}: {error}"),
                    // What a rank of another host says that has given up.
                    error => {
                        let named = format!("for rank {late} ");
                        assert!(error.to_string().contains(&named), "{world}, {hosts}, {late}: {error}");
                    }
                }
            }
        }
    }
}

#[test]
fn a_rank_that_has_called_something_else_is_named_with_it() {
    let options = Options { timeout: Duration::from_millis(500), ..Options::default() };
    let come = Barrier::new(2);
    let errors = ranks(2, options, |communicator| {
        let error = match communicator.rank() {
            0 => communicator.barrier().unwrap_err(),
            _ => {
                let buffer = Cpu.allocate(DType::F32, 1 << 16).unwrap();
                communicator.all_reduce(buffer, Reduction::Sum, Start::Here).wait().map(drop).unwrap_err()
            }
        };
        come.wait();
        error
    });
    let timeouts: Vec<String> =
        errors.iter().filter(|error| matches!(error, Error::Timeout { .. })).map(|error| error.to_string()).collect();
    assert!(!timeouts.is_empty(), "{errors:?}");
    for error in timeouts {
        let calls = [
            "it is running, and has called barrier #1, which this rank has not",
            "it is running, and has called all-reduce #1 of 65536 × f32 (sum), which this rank has not",
        ];
        assert!(calls.iter().any(|call| error.contains(call)), "{error}");
    }
}

#[test]
fn an_operation_has_a_limit_of_its_own() {
    let come = Barrier::new(2);
    for kind in 0..3 {
        let errors = ranks(2, Options::default(), |communicator| {
            if communicator.rank() == 1 {
                come.wait();
                return None;
            }
            let buffer = || Cpu.allocate(DType::F32, 1 << 16).unwrap();
            let limit = Duration::from_millis(100);
            let within = |event| Start::Within { event, limit };
            let error = match kind {
                0 => communicator.barrier_within(limit).unwrap_err(),
                1 => {
                    communicator.all_reduce(buffer(), Reduction::Sum, within(Event::PAST)).wait().map(drop).unwrap_err()
                }
                _ => communicator.receive(buffer(), 1, within(Event::PAST)).wait().map(drop).unwrap_err(),
            };
            come.wait();
            Some(error)
        });
        match &errors[0] {
            Some(Error::Timeout { waiting_on, .. }) => assert_eq!(*waiting_on, [1]),
            other => panic!("{kind}: {other:?}"),
        }
    }
}

#[test]
fn an_operation_can_be_looked_at_waited_for_a_moment_and_tell_of_its_end() {
    let (arrive, depart) = (Barrier::new(2), Barrier::new(2));
    ranks(2, Options::default(), |communicator| {
        let mut buffer = Cpu.allocate(DType::F32, 100).unwrap();
        Cpu.stream().upload(buffer.view_mut(), &[1.0f32 + communicator.rank() as f32; 100]);
        if communicator.rank() == 1 {
            // Rank 0 has seen that its operation does not end.
            arrive.wait();
            communicator.all_reduce(buffer, Reduction::Sum, Start::Here).wait().unwrap();
            depart.wait();
            return;
        }
        let (told, tell) = channel();
        let pending = communicator.all_reduce(buffer, Reduction::Sum, Event::PAST);
        let teller = told.clone();
        pending.on_complete(move |result| teller.send(result.is_ok()).unwrap());
        let pending = pending.try_wait().map(drop).unwrap_err();
        let pending = pending.wait_timeout(Duration::from_millis(20)).map(drop).unwrap_err();
        assert!(tell.try_recv().is_err());
        arrive.wait();
        // Ends the wait at once where it is there, and gives up long after it must be.
        let buffer = pending.wait_timeout(Duration::from_secs(60)).map_err(drop).unwrap().unwrap();
        assert_eq!(Cpu.stream().download::<f32>(buffer.view()).unwrap(), [3.0; 100]);
        assert_eq!(tell.recv(), Ok(true));
        depart.wait();
        // The other rank has left.
        let pending = communicator.all_reduce(buffer, Reduction::Sum, Event::PAST);
        pending.on_complete(move |result| told.send(result.is_ok()).unwrap());
        assert_eq!(tell.recv(), Ok(false));
        let ended = pending.try_wait().map_err(drop).unwrap();
        assert!(matches!(ended, Err(Error::PeerLost { rank: 1, .. })));
    });
}
