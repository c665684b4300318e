//! One rank fails, and the others hear of it.

use std::sync::Barrier;
use std::time::Duration;

use pillion_collectives::{Error, Options, Reduction};
use pillion_kernels::{Cpu, DType, Device, Event, Failure};

use crate::gate::Gate;
use crate::{Rank, numbers, run, standin};

fn impatient() -> Options {
    Options { timeout: Duration::from_millis(300), ..Options::default() }
}

#[test]
fn what_gpus_do_not_have_is_refused_by_name() {
    run(2, Options::default(), |rank: &Rank| {
        let stream = rank.gpu.stream();
        let buffer = |len| numbers(&*stream, &rank.gpu, DType::F32, len, 1);
        let refused = |error: Error, what: &str| {
            assert!(matches!(error, Error::Misuse { .. }), "{error}");
            assert!(error.to_string().contains(what), "{error}");
        };
        let gpus = &rank.gpus;
        refused(gpus.all_to_all(buffer(4), buffer(4), Event::PAST).wait().unwrap_err(), "all-to-all");
        refused(gpus.all_reduce(buffer(4), Reduction::Max, Event::PAST).wait().unwrap_err(), "of f32 into f32");
        refused(gpus.send(buffer(4), 1 - rank.number, Event::PAST).wait().unwrap_err(), "messages");
        refused(gpus.window(&rank.gpu, DType::F32, 4).err().unwrap(), "windows");
        let host = Cpu.allocate(DType::F32, 4).unwrap();
        refused(gpus.all_reduce(host, Reduction::Sum, Event::PAST).wait().unwrap_err(), "host memory");
        refused(rank.host.all_reduce(buffer(4), Reduction::Sum, Event::PAST).wait().unwrap_err(), "memory of device");
        // Nothing of that has broken anything.
        let sum = gpus.all_reduce(buffer(4), Reduction::Sum, stream.record()).wait().unwrap();
        assert_eq!(sum.len(), 4);
    });
}

#[test]
fn a_rank_that_calls_something_else_is_named_by_all() {
    run(3, Options::default(), |rank: &Rank| {
        let stream = rank.gpu.stream();
        let len = if rank.number == 1 { 5 } else { 6 };
        let buffer = numbers(&*stream, &rank.gpu, DType::F32, len, 1);
        let error = rank.gpus.all_reduce(buffer, Reduction::Sum, stream.record()).wait().unwrap_err();
        match error {
            Error::Mismatch { ours, theirs, peer } => {
                assert!(ours != theirs && (peer == 1 || rank.number == 1), "{ours}, {theirs}, {peer}");
            }
            Error::Aborted { .. } => {}
            other => panic!("{other}"),
        }
        assert!(rank.gpus.barrier().is_err() && rank.host.barrier().is_ok());
    });
}

#[test]
fn a_rank_that_does_not_come_is_named() {
    /// Waits for the other ranks at its end, also when an assertion fails.
    struct Together<'a>(&'a Barrier);

    impl Drop for Together<'_> {
        fn drop(&mut self) {
            self.0.wait();
        }
    }

    let end = Barrier::new(3);
    run(3, impatient(), |rank: &Rank| {
        let _together = Together(&end);
        if rank.number == 2 {
            return;
        }
        let stream = rank.gpu.stream();
        let buffer = numbers(&*stream, &rank.gpu, DType::F32, 6, 1);
        match rank.gpus.all_reduce(buffer, Reduction::Sum, stream.record()).wait().unwrap_err() {
            Error::Timeout { waiting_on, .. } => assert_eq!(waiting_on, [2]),
            Error::Aborted { reason, .. } => {
                assert!(reason.contains("rank 2") || reason.contains("ranks 2"), "{reason}")
            }
            other => panic!("{other}"),
        }
    });
}

#[test]
fn a_rank_whose_work_fails_stops_the_others() {
    for seed in 0..6 {
        standin::reset(seed);
        run(3, Options::default(), |rank: &Rank| {
            let stream = rank.gpu.stream();
            let buffer = numbers(&*stream, &rank.gpu, DType::F32, 600, 1);
            let gate = Gate::new();
            if rank.number == 1 {
                stream.wait_for(&Event::new(gate.clone()));
            }
            let pending = rank.gpus.all_reduce(buffer, Reduction::Sum, stream.record());
            gate.end(Err(Failure::new(std::io::Error::other("no memory for the next micro-batch"))));
            let error = pending.wait().unwrap_err().to_string();
            match rank.number {
                1 => assert!(error.contains("no memory for the next micro-batch"), "{error}"),
                _ => assert!(error.contains("another rank") || error.contains("rank 1"), "{error}"),
            }
            assert!(rank.gpus.healthy().is_err());
            let mut x = rank.gpu.allocate(DType::F32, 3).unwrap();
            stream.zero(x.view_mut());
            stream.wait_for(&rank.gpu.stream().record());
            assert!(stream.synchronize().is_err(), "nothing runs on this rank any more");
        });
    }
}
