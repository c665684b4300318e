//! What failed, late and missing events do to the operations and streams that follow them.

use std::any::Any;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::task::{Poll, Waker};
use std::time::Duration;

use parking_lot::Mutex;
use pillion_collectives::{Communicator, Error, Launch, Options, Reduce, Reduction, Summand};
use pillion_kernels::{Completion, Cpu, DType, Device, Event, Failure, LazyCpu, Status};

/// Longer than any machine needs for a few operations; only a hang takes so long.
const HANG: Duration = Duration::from_secs(60);

fn patient(_rank: usize) -> Options {
    Options::default()
}

/// Runs `program` on `world` ranks and returns what each returned. Panics when one hangs.
fn ranks<R: Send + 'static>(
    world: usize,
    options: impl Fn(usize) -> Options,
    program: impl Fn(Communicator) -> R + Send + Sync + 'static,
) -> Vec<R> {
    let program = Arc::new(program);
    let receivers: Vec<_> = Launch::threads(world)
        .into_iter()
        .map(|launch| {
            let (sender, receiver) = mpsc::channel();
            let (options, program) = (options(launch.rank), program.clone());
            std::thread::spawn(move || {
                let communicator = Communicator::connect(&launch, options).expect("ranks of this process meet");
                let _ = sender.send(program(communicator));
            });
            receiver
        })
        .collect();
    let result = |(rank, receiver): (usize, mpsc::Receiver<R>)| {
        receiver.recv_timeout(HANG).unwrap_or_else(|error| panic!("rank {rank}: {error}"))
    };
    receivers.into_iter().enumerate().map(result).collect()
}

/// An event that a test ends.
#[derive(Default)]
struct Manual(Mutex<State>);

#[derive(Default)]
struct State {
    result: Option<Result<(), Failure>>,
    wakers: Vec<Waker>,
}

impl Manual {
    fn end(&self, result: Result<(), Failure>) {
        let wakers = {
            let mut state = self.0.lock();
            state.result = Some(result);
            std::mem::take(&mut state.wakers)
        };
        wakers.into_iter().for_each(Waker::wake);
    }
}

impl Completion for Manual {
    fn status(&self) -> Status {
        self.0.lock().result.clone().map_or(Poll::Pending, Poll::Ready)
    }

    fn call_back(&self, waker: &Waker) {
        self.0.lock().wakers.push(waker.clone());
        if self.status().is_ready() {
            waker.wake_by_ref();
        }
    }

    fn origin(&self) -> &dyn Any {
        self
    }
}

#[derive(Debug, thiserror::Error)]
#[error("the disk is on fire")]
struct Fire;

fn burnt() -> Failure {
    Failure::new(Fire)
}

fn buffer(len: usize) -> pillion_kernels::Buffer {
    let mut buffer = Cpu.allocate(DType::F32, len).unwrap();
    Cpu.stream().upload(buffer.view_mut(), &vec![1.0f32; len]);
    buffer
}

/// On a 2×2 mesh a rank leaves while the others reduce to shards. The rank that shares its group
/// has no sum, and so the other replica must never receive one. Deferring streams have the buffers
/// of the reduction while it is in flight.
#[test]
fn a_sum_that_failed_is_never_passed_on_to_another_group() {
    for how in ["then", "all_reduce_sums", "reduce_scatter_onto"] {
        let received = ranks(4, patient, move |world| {
            let rank = world.rank();
            let shard = world.split(Some(rank as u64 / 2), rank as u64).unwrap().unwrap();
            let replicate = world.split(Some(rank as u64 % 2), rank as u64).unwrap().unwrap();
            if rank == 1 {
                return Ok(Vec::new());
            }
            let device = LazyCpu::new(rank as u64);
            let stream = device.stream();
            let mut input = device.allocate(DType::F32, 2 * 1000).unwrap();
            stream.upload(input.view_mut(), &[7.0f32; 2 * 1000]);
            let output = device.allocate(DType::F32, 1000).unwrap();
            let reduce =
                Reduce { input, sections: None, output, reduction: Reduction::Sum, accumulate: false, sideband: None };
            let reduce = shard.reduce_scatter(reduce, stream.record());
            let sum = match how {
                "all_reduce_sums" => {
                    let (_summand, sums) = reduce.split();
                    replicate.all_reduce_sums(sums, Reduction::Sum).then(&*stream).map(|sums| sums.output)
                }
                "reduce_scatter_onto" => {
                    let (_summand, sums) = reduce.split();
                    let summand = Summand { input: device.allocate(DType::F32, 2 * 1000).unwrap(), own: None };
                    let onto = replicate.reduce_scatter_onto(summand, None, sums, Reduction::Sum, Event::PAST);
                    onto.1.then(&*stream).map(|sums| sums.output)
                }
                _ => reduce.then(&*stream).and_then(|reduce| {
                    replicate.all_reduce(reduce.output, Reduction::Sum, stream.record()).then(&*stream)
                }),
            };
            let sum = sum?;
            Ok::<Vec<f32>, Error>(stream.download::<f32>(sum.view())?)
        });
        // Ranks 0 and 1 share a group; rank 2 has the place of rank 0 in the other group. Rank 3
        // has that of rank 1.
        for rank in [0, 2, 3] {
            let error = received[rank].as_ref().err().unwrap_or_else(|| panic!("rank {rank} received {received:?}"));
            match rank {
                0 => assert!(matches!(error, Error::PeerLost { rank: 1, .. } | Error::Aborted { .. }), "{error}"),
                _ => assert!(matches!(error, Error::PeerLost { .. } | Error::Aborted { .. }), "{error}"),
            }
        }
    }
}

#[test]
fn the_first_failure_surfaces_at_the_end_of_a_chain_on_every_device() {
    let lazy = || Arc::new(LazyCpu::new(4)) as Arc<dyn Device>;
    for device in [Arc::new(Cpu) as Arc<dyn Device>, lazy()] {
        let text = ranks(1, patient, move |communicator| {
            let stream = device.stream();
            let manual = Arc::new(Manual::default());
            let failing = manual.clone();
            let thread = std::thread::spawn(move || failing.end(Err(burnt())));
            let mut buffer = device.allocate(DType::F32, 8).unwrap();
            stream.upload(buffer.view_mut(), &[1.0f32; 8]);
            stream.wait_for(&Event::new(manual));
            stream.upload(buffer.view_mut(), &[2.0f32; 8]);
            thread.join().unwrap();
            let second = device.stream();
            let buffer = match communicator.all_reduce(buffer, Reduction::Sum, stream.record()).then(&*second) {
                Ok(buffer) => buffer,
                Err(error) => return error.to_string(),
            };
            second.download::<f32>(buffer.view()).unwrap_err().to_string()
        });
        assert!(text[0].contains("the disk is on fire"), "{text:?}");
    }
}

#[test]
fn a_queue_runs_nothing_after_an_event_that_failed() {
    for device in [Arc::new(Cpu) as Arc<dyn Device>, Arc::new(LazyCpu::new(2))] {
        let (stream, other) = (device.stream(), device.stream());
        let mut x = device.allocate(DType::F32, 1).unwrap();
        stream.upload(x.view_mut(), &[1.0f32]);
        let before = stream.record();
        stream.wait_for(&Event::failed(burnt()));
        stream.upload(x.view_mut(), &[2.0f32]);
        let failure = stream.synchronize().unwrap_err();
        assert!(failure.cause::<Fire>().is_some());
        assert!(Failure::new(failure).cause::<Fire>().is_some(), "a failure of a failure has its cause");
        assert!(stream.download::<f32>(x.view()).is_err());
        assert!(before.wait().is_ok(), "what came before has happened");
        // Its events pass the failure on, and what did not run has changed nothing.
        assert_eq!(other.download::<f32>(x.view()).unwrap(), [1.0]);
        other.wait_for(&Event::all([Event::PAST, stream.record()]));
        assert!(other.synchronize().is_err());
    }
}

#[test]
fn map_forms_nothing_from_a_failed_operation_and_not_before_it_is_complete() {
    for fails in [true, false] {
        let formed = ranks(1, patient, move |communicator| {
            let device = LazyCpu::new(1);
            let stream = device.stream();
            let (manual, complete) = (Arc::new(Manual::default()), Arc::new(AtomicBool::new(false)));
            let pending = communicator.all_reduce(buffer(4), Reduction::Sum, Event::new(manual.clone()));
            let seen = complete.clone();
            let pending = pending.map(move |buffer| (buffer, seen.load(Ordering::Acquire)));
            let thread = std::thread::spawn(move || {
                std::thread::sleep(Duration::from_millis(20));
                complete.store(true, Ordering::Release);
                manual.end(if fails { Err(burnt()) } else { Ok(()) });
            });
            let result = pending.then(&*stream).map(|(_, complete)| complete);
            thread.join().unwrap();
            result.map_err(|error| error.to_string())
        });
        match fails {
            true => assert!(formed[0].as_ref().unwrap_err().contains("the disk is on fire"), "{formed:?}"),
            false => assert_eq!(formed, [Ok(true)]),
        }
    }
}

/// Rank 0 waits for 300 ms at most.
fn impatient(rank: usize) -> Options {
    match rank {
        0 => Options { timeout: Duration::from_millis(300), warn_after: Duration::from_millis(100), ..patient(0) },
        _ => patient(rank),
    }
}

/// Dropping, waiting and messages: each ends with an error that says what has not happened, and the
/// other rank hears of it.
#[test]
fn an_operation_whose_start_event_never_happens_ends_at_the_deadline() {
    let errors = ranks(2, impatient, |communicator| {
        if communicator.rank() == 1 {
            return communicator.all_reduce(buffer(8), Reduction::Sum, Event::PAST).wait().unwrap_err().to_string();
        }
        let never = || Event::new(Arc::new(Manual::default()));
        drop(communicator.all_reduce(buffer(8), Reduction::Sum, never()));
        communicator.barrier().unwrap_err().to_string()
    });
    assert!(errors[0].contains("all-reduce #1") && errors[0].contains("event"), "{errors:?}");
    assert!(errors[1].contains("rank 0 aborted"), "{errors:?}");

    let errors = ranks(2, impatient, |communicator| {
        let never = || Event::new(Arc::new(Manual::default()));
        match communicator.rank() {
            0 => communicator.send(buffer(8), 1, never()).wait().unwrap_err().to_string(),
            _ => communicator.receive(buffer(8), 0, Event::PAST).wait().unwrap_err().to_string(),
        }
    });
    assert!(errors[0].contains("message #1") && errors[0].contains("event"), "{errors:?}");
    assert!(errors[1].contains("rank 0 aborted"), "{errors:?}");
}

/// The deadline is far away; a rank that is gone is seen before this rank's own event happens.
#[test]
fn a_rank_that_left_is_named_before_the_start_event_happens() {
    for message in [false, true] {
        let errors = ranks(2, patient, move |communicator| {
            if communicator.rank() == 1 {
                return String::new();
            }
            let never = Event::new(Arc::new(Manual::default()));
            let result = match message {
                true => communicator.send(buffer(8), 1, never).wait(),
                false => communicator.all_reduce(buffer(8), Reduction::Sum, never).wait(),
            };
            result.unwrap_err().to_string()
        });
        assert!(errors[0].contains("lost rank 1"), "{errors:?}");
    }
}

/// A message that was put out before its sender left is received, whenever the receiver's event
/// happens.
#[test]
fn a_message_outlives_its_sender() {
    let received = ranks(2, patient, |communicator| {
        if communicator.rank() == 0 {
            communicator.send(buffer(8), 1, Event::PAST).wait().unwrap();
            return Vec::new();
        }
        let manual = Arc::new(Manual::default());
        let pending = communicator.receive(Cpu.allocate(DType::F32, 8).unwrap(), 0, Event::new(manual.clone()));
        std::thread::sleep(Duration::from_millis(100));
        manual.end(Ok(()));
        Cpu.stream().download::<f32>(pending.wait().unwrap().view()).unwrap()
    });
    assert_eq!(received[1], [1.0; 8]);
}

/// Whether a waker was woken.
struct Woken(AtomicBool);

impl std::task::Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::Release);
    }
}

/// What an event wakes from now on.
fn woken_by(event: &Event) -> Arc<Woken> {
    let woken = Arc::new(Woken(AtomicBool::new(false)));
    event.call_back(&Waker::from(woken.clone()));
    woken
}

/// Counts calls instead of time. `engine/start.rs` tests that a call rings the progress thread.
#[test]
fn events_call_back_who_waits_for_them() {
    let woken = woken_by;
    let seen = |count: &Woken| count.0.load(Ordering::Acquire);
    assert!(seen(&woken(&Event::PAST)) && seen(&woken(&Event::failed(burnt()))));
    let manual = Arc::new(Manual::default());
    let (one, both) = (Event::new(manual.clone()), Event::new(Arc::new(Manual::default())));
    let all = Event::all([one.clone(), both]);
    let (one, all) = (woken(&one), woken(&all));
    assert!(!seen(&one) && !seen(&all));
    manual.end(Ok(()));
    assert!(seen(&one));

    ranks(1, patient, move |communicator| {
        let manual = Arc::new(Manual::default());
        let pending = communicator.all_reduce(buffer(8), Reduction::Sum, Event::new(manual.clone()));
        let count = woken(&pending.event());
        assert!(!seen(&count));
        while manual.0.lock().wakers.is_empty() {
            // The progress thread asks to be woken before it sleeps.
            std::thread::yield_now();
        }
        manual.end(Ok(()));
        pending.wait().unwrap();
        // The result is there before its wakers are called, on the progress thread.
        while !seen(&count) {
            std::thread::yield_now();
        }
    });

    // A deferring stream that waits for another device's event lets its own waiters know.
    let device = LazyCpu::new(0);
    let stream = device.stream();
    let manual = Arc::new(Manual::default());
    stream.wait_for(&Event::new(manual.clone()));
    let event = stream.record();
    assert!(event.advance().is_pending());
    let count = woken(&event);
    manual.end(Ok(()));
    assert!(seen(&count) && event.advance().is_ready());
}

/// Streams of deferring devices that wait for each other's moments, also through [`Event::all`],
/// wake each other without end unless a device knows its own waker.
#[test]
fn deferring_streams_that_wait_for_each_other_get_there() {
    let (one, other) = (LazyCpu::new(3), LazyCpu::new(4));
    let manual = || Arc::new(Manual::default());
    let (x, y) = (manual(), manual());
    let (first, second, third, far) = (one.stream(), one.stream(), one.stream(), other.stream());
    first.wait_for(&Event::new(x.clone()));
    let e1 = first.record();
    second.wait_for(&Event::all([e1.clone(), Event::new(y.clone())]));
    let e2 = second.record();
    far.wait_for(&Event::all([e1.clone(), e2.clone()]));
    let e3 = far.record();
    third.wait_for(&e3);
    let e4 = third.record();
    for event in [&e1, &e2, &e3, &e4] {
        assert!(event.advance().is_pending());
        woken_by(event);
    }
    x.end(Ok(()));
    assert!(e1.advance().is_ready() && e2.advance().is_pending() && e3.advance().is_pending());
    y.end(Err(burnt()));
    for event in [&e2, &e3, &e4] {
        assert!(matches!(event.advance(), Poll::Ready(Err(_))));
    }
}
