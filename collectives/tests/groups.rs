//! Groups of ranks: made by their members alone, cheap, and gone without a trace.

mod common;

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::run;
use parking_lot::{Mutex, MutexGuard};
use pillion_collectives::{Communicator, Error, Launch, Options, Pending, Reduce, Reduction, Start};
use pillion_kernels::{Buffer, Cpu, DType, Device, Event};

/// What a process has is counted, so one test runs at a time.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    ONE_AT_A_TIME.lock()
}

fn on_host(buffer: Buffer, values: &[f32]) -> Buffer {
    let mut buffer = buffer;
    Cpu.stream().upload(buffer.view_mut(), values);
    buffer
}

fn values(buffer: &Buffer) -> Vec<f32> {
    Cpu.stream().download(buffer.view()).unwrap()
}

/// The sum over the members of what they give, from private memory.
fn sum(communicator: &Communicator, own: f32) -> f32 {
    let own = on_host(Cpu.allocate(DType::F32, 1000).unwrap(), &[own; 1000]);
    let sum = communicator.all_reduce(own, Reduction::Sum, Start::Here).wait().unwrap();
    values(&sum)[999]
}

#[test]
fn members_alone_make_a_group_in_any_order_and_from_any_communicator() {
    let _alone = alone();
    run(Launch::threads(5), Options::default(), |_, all| {
        let rank = all.rank();
        // Ranks 0 and 2 take no part, and call nothing.
        if [4, 1, 3].contains(&rank) {
            let part = all.group(&[4, 1, 3]).unwrap();
            assert_eq!((part.world(), [4, 1, 3][part.rank()]), (3, rank));
            assert_eq!(sum(&part, rank as f32), 8.0);
            // Of the group's ranks 2 and 0, which are 3 and 4.
            if rank != 1 {
                let pair = part.group(&[2, 0]).unwrap();
                assert_eq!([3, 4][pair.rank()], rank);
                // It outlives what it was made from, and another of the same ranks is another.
                let again = part.group(&[2, 0]).unwrap();
                drop(part);
                assert_eq!(sum(&pair, rank as f32), 7.0);
                assert_eq!(sum(&again, 1.0), 2.0);
            }
        }
        let own = all.group(&[rank]).unwrap();
        assert_eq!(sum(&own, 3.0), 3.0);
        all.barrier().unwrap();
    });
}

#[test]
fn groups_of_overlapping_ranks_are_in_flight_at_once() {
    let _alone = alone();
    run(Launch::threads(3), Options::default(), |_, all| {
        let pairs = [[0, 1], [0, 2], [1, 2]].map(|pair| pair.contains(&all.rank()).then(|| all.group(&pair).unwrap()));
        let buffer = |communicator: &Communicator| communicator.allocate(&Cpu, DType::F32, 1 << 16).unwrap();
        let ones = vec![1.0; 1 << 16];
        for _ in 0..20 {
            let own = pairs.iter().flatten();
            let pending: Vec<_> = own
                .map(|pair| pair.all_reduce(on_host(buffer(pair), &ones), Reduction::Sum, Event::PAST))
                .chain([all.all_reduce(on_host(buffer(&all), &ones), Reduction::Sum, Event::PAST)])
                .collect();
            let sums: Vec<f32> = pending.into_iter().map(|sum| values(&sum.wait().unwrap())[70]).collect();
            assert_eq!(sums, [2.0, 2.0, 3.0]);
        }
    });
}

#[test]
fn a_list_that_cannot_be_is_misuse_and_harms_nothing() {
    let _alone = alone();
    run(Launch::threads(2), Options::default(), |_, all| {
        let other = 1 - all.rank();
        for ranks in [&[][..], &[other], &[0, 1, 0], &[0, 1, 2], &[usize::MAX, 0, 1]] {
            let error = all.group(ranks).err().unwrap();
            assert!(matches!(error, Error::Misuse { .. }), "{ranks:?}: {error}");
        }
        assert_eq!(sum(&all.group(&[1, 0]).unwrap(), 1.0), 2.0);
    });
}

#[test]
fn a_member_that_does_not_come_is_named_and_a_failed_group_leaves_others_alone() {
    let _alone = alone();
    let options = Options { startup_timeout: Duration::from_millis(500), ..Options::default() };
    run(Launch::threads(3), options, |_, all| {
        let pair = (all.rank() < 2).then(|| all.group(&[0, 1]).unwrap());
        if let Some(pair) = pair {
            match pair.rank() {
                0 => pair.abort("enough"),
                _ => assert!(matches!(pair.barrier(), Err(Error::Aborted { rank: 0, .. }))),
            }
        }
        assert_eq!(sum(&all, 1.0), 3.0);
        let rank = all.rank();
        let some = all.split(Some(0), 0).unwrap().unwrap();
        if rank != 1 {
            let error = some.group(&[0, 1, 2]).err().unwrap();
            match error {
                Error::Timeout { ref waiting_on, .. } => assert_eq!(waiting_on, &[1], "{error}"),
                // Whoever is the first to give up is seen to have left.
                Error::PeerLost { rank: 1, .. } => {}
                error => panic!("{error}"),
            }
        }
        // Nobody leaves before all have seen it.
        all.barrier().unwrap();
        assert_eq!(sum(&all, 1.0), 3.0);
    });
}

#[test]
fn a_callback_that_panics_or_drops_a_communicator_harms_no_group() {
    let _alone = alone();
    run(Launch::threads(2), Options::default(), |_, all| {
        let [one, other, third] = [(); 3].map(|()| all.group(&[0, 1]).unwrap());
        let own = || on_host(Cpu.allocate(DType::F32, 10).unwrap(), &[1.0; 10]);
        let pending = one.all_reduce(own(), Reduction::Sum, Event::PAST);
        pending.on_complete(|_| panic!("this is printed: a callback that panics on purpose"));
        pending.wait().unwrap();
        let pending = one.all_reduce(own(), Reduction::Sum, Event::PAST);
        pending.on_complete(move |_| drop(third));
        pending.wait().unwrap();
        for communicator in [&one, &other, &all] {
            assert_eq!(sum(communicator, 1.0), 2.0);
        }
    });
}

/// What this process has: threads, descriptors, and bytes of shared memory.
fn belongings() -> [u64; 3] {
    let count = |path: &str| fs::read_dir(path).unwrap().count() as u64;
    let files = fs::read_dir("/proc/self/fd").unwrap().flatten();
    let shared = files.filter(|file| {
        fs::read_link(file.path()).is_ok_and(|target| target.to_string_lossy().contains("memfd:pillion"))
    });
    let bytes = shared.filter_map(|file| Some(fs::metadata(file.path()).ok()?.blocks() * 512)).sum();
    [count("/proc/self/task"), count("/proc/self/fd"), bytes]
}

/// Uses a communicator in every way that takes memory.
fn use_up(communicator: &Communicator) {
    let (rank, world) = (communicator.rank(), communicator.world());
    assert_eq!(sum(communicator, 1.0), world as f32);
    let allocate = |len| communicator.allocate(&Cpu, DType::F32, len).unwrap();
    let input = on_host(allocate(1 << 12), &[1.0; 1 << 12]);
    let output = allocate((1 << 12) / world);
    let reduction = Reduction::Sum;
    let reduce = Reduce { input, sections: None, output, reduction, accumulate: false, sideband: None };
    let reduced = communicator.reduce_scatter(reduce, Event::PAST).wait().unwrap();
    assert_eq!(values(&reduced.output)[3], world as f32);
    let mut window = communicator.window(&Cpu, DType::F32, 16 * world).unwrap();
    let ones = vec![1.0f32; 16];
    Cpu.stream().upload(window.shard_mut(0).unwrap(), &ones);
    let mut window = communicator.gather_window(window, Event::PAST).wait().unwrap();
    assert_eq!(Cpu.stream().download::<f32>(window.view().unwrap()).unwrap(), vec![1.0; 16 * world]);
    window.release(&Event::PAST).unwrap();
    // A message that is taken after its sender has dropped the communicator.
    let message = Cpu.allocate(DType::F32, 3000).unwrap();
    if rank == 0 {
        communicator.send(on_host(message, &[7.0; 3000]), 1, Event::PAST).wait().unwrap();
    } else if rank == 1 {
        std::thread::yield_now();
        let message = communicator.receive(message, 0, Event::PAST).wait().unwrap();
        assert_eq!(values(&message), [7.0; 3000]);
    }
}

#[test]
fn a_thousand_groups_leave_no_thread_no_descriptor_and_no_memory() {
    let _alone = alone();
    run(Launch::threads(3), Options::default(), |_, all| {
        let make = |times: usize| {
            for time in 0..times {
                let lists = [[0, 1], [2, 0], [1, 2]];
                let members = lists[time % 3];
                if members.contains(&all.rank()) {
                    use_up(&all.group(&members).unwrap());
                }
            }
            all.barrier().unwrap();
        };
        make(30);
        let before = belongings();
        all.barrier().unwrap();
        make(1000);
        // Memory that the last groups used is given back when more is asked for.
        let started = Instant::now();
        loop {
            let [threads, files, bytes] = belongings();
            if threads <= before[0] && files <= before[1] && bytes <= before[2] + (64 << 10) {
                break;
            }
            assert!(started.elapsed() < Duration::from_secs(20), "{:?} before, {:?} now", before, belongings());
            drop(all.group(&[all.rank()]).unwrap());
        }
        all.barrier().unwrap();
    });
}

#[test]
fn buffers_return_their_memory_and_new_ones_are_zeroed() {
    let _alone = alone();
    const LEN: usize = 3 << 20;
    run(Launch::threads(2), Options::default(), |_, all| {
        let mut kept = Vec::new();
        for round in 0..40 {
            let buffer = all.allocate(&Cpu, DType::F32, LEN + round).unwrap();
            assert!(values(&buffer).iter().all(|&value| value == 0.0), "round {round}");
            let buffer = on_host(buffer, &vec![1.0; LEN + round]);
            let buffer = all.all_reduce(buffer, Reduction::Sum, Event::PAST).wait().unwrap();
            let small = all.allocate(&Cpu, DType::F32, 100).unwrap();
            assert_eq!(values(&small), [0.0; 100]);
            kept.push(on_host(small, &[round as f32; 100]));
            drop(buffer);
        }
        all.barrier().unwrap();
        // Of 40 buffers of 12 MiB a rank, none is left.
        assert!(belongings()[2] < (24 << 20), "{:?}", belongings());
        for (round, small) in kept.iter().enumerate() {
            assert_eq!(values(small), [round as f32; 100]);
        }
        all.barrier().unwrap();
    });
}

/// Whoever hears of the end has the buffers alone: the thread that ends an operation keeps nothing.
#[test]
fn what_an_operation_gives_back_nobody_else_holds() {
    let _alone = alone();
    const LEN: usize = 1 << 20;
    let (held, told) = (std::sync::Barrier::new(2), std::sync::mpsc::channel());
    let told = (Mutex::new(told.0), Mutex::new(told.1));
    run(Launch::threads(2), Options::default(), |_, all| {
        let buffer = all.allocate(&Cpu, DType::F32, LEN).unwrap();
        if all.rank() == 1 {
            held.wait();
            let buffer = all.all_reduce(buffer, Reduction::Sum, Event::PAST).wait().unwrap();
            let freed: u64 = told.1.lock().recv_timeout(Duration::from_secs(20)).unwrap();
            assert_eq!(freed, 4 * LEN as u64);
            return drop(buffer);
        }
        let pending = all.all_reduce(buffer, Reduction::Sum, Event::PAST);
        let (holder, tell) = (Arc::new(Mutex::new(None)), told.0.lock().clone());
        let taken = holder.clone();
        pending.on_complete(move |_| {
            let before = belongings()[2];
            drop(taken.lock().take().map(Pending::wait));
            let _ = tell.send(before - belongings()[2]);
        });
        *holder.lock() = Some(pending);
        held.wait();
    });
}

#[test]
fn memory_outlives_the_communicator_that_allocated_it_and_serves_any_other() {
    let _alone = alone();
    run(Launch::threads(2), Options::default(), |_, all| {
        let pair = all.group(&[0, 1]).unwrap();
        let buffer = on_host(pair.allocate(&Cpu, DType::F32, 1 << 18).unwrap(), &vec![2.0; 1 << 18]);
        drop(pair);
        let buffer = all.all_reduce(buffer, Reduction::Sum, Event::PAST).wait().unwrap();
        drop(all);
        assert!(values(&buffer).iter().all(|&value| value == 4.0));
    });
}
