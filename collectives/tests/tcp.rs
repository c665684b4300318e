//! Communicators over TCP, between threads that count themselves to hosts of their own.

mod common;

use common::{launches, run};
use pillion_collectives::{Backend, Communicator, Launch, Options, Reduction, Start, WireKind};
use pillion_kernels::{Buffer, Cpu, DType, Device};

fn numbers(values: &[i64]) -> Buffer {
    let mut buffer = Cpu.allocate(DType::I64, values.len()).unwrap();
    Cpu.stream().upload(buffer.view_mut(), values);
    buffer
}

/// The sum of the ranks' numbers in the job.
fn sum(communicator: &Communicator, launch: &Launch) -> i64 {
    let own = numbers(&vec![launch.rank as i64; 10_000]);
    let buffer = communicator.all_reduce(own, Reduction::Sum, Start::Here).wait().unwrap();
    let sums = Cpu.stream().download::<i64>(buffer.view()).unwrap();
    assert!(sums.iter().all(|sum| *sum == sums[0]));
    sums[0]
}

#[test]
fn parts_of_hosts_and_across_hosts_come_and_go() {
    run(launches(&[2, 2], true), Options::default(), |launch, all| {
        assert_eq!((all.backend(), all.hosts(), all.wire()), (Backend::Hierarchical, 2, WireKind::Tcp));
        assert_eq!(sum(&all, launch), 6);
        let host = launch.rank / 2;
        let of_host = all.split(Some(host as u64), 0).unwrap().unwrap();
        assert_eq!((of_host.hosts(), sum(&of_host, launch)), (1, if host == 0 { 1 } else { 5 }));
        let column = all.split(Some((launch.rank % 2) as u64), 0).unwrap().unwrap();
        assert_eq!((column.hosts(), sum(&column, launch)), (2, if launch.rank % 2 == 0 { 2 } else { 4 }));
        // Without the one that all made first; one host alone needs no other.
        drop(all);
        if host == 0 {
            let again = of_host.split(Some(0), 0).unwrap().unwrap();
            assert_eq!(sum(&again, launch), 1);
        }
        let alone = of_host.split((launch.rank == 0).then_some(0), 0).unwrap();
        assert_eq!(alone.map(|alone| sum(&alone, launch)), (launch.rank == 0).then_some(0));
        assert_eq!(sum(&column, launch), if launch.rank % 2 == 0 { 2 } else { 4 });
    });
}

#[test]
fn a_job_meets_again_while_a_part_of_it_lives() {
    run(launches(&[1, 1, 1], true), Options::default(), |launch, all| {
        assert_eq!((all.backend(), all.hosts()), (Backend::Tcp, 3));
        let part = all.split((launch.rank < 2).then_some(0), 0).unwrap();
        drop(all);
        let again = Communicator::connect(launch, Options::default()).unwrap();
        assert_eq!(sum(&again, launch), 3);
        assert_eq!(part.map(|part| sum(&part, launch)), (launch.rank < 2).then_some(1));
    });
}

#[test]
fn launchers_of_one_machine_make_one_host() {
    run(launches(&[2, 1], false), Options::default(), |launch, all| {
        assert_eq!((all.backend(), all.hosts(), sum(&all, launch)), (Backend::Shm, 1, 3));
    });
}

#[test]
fn a_hierarchy_of_one_host_is_split_without_meeting_again() {
    let options = Options { backend: Backend::Hierarchical, ..Options::default() };
    run(launches(&[3], true), options, |launch, all| {
        assert_eq!(all.hosts(), 1);
        let part = all.split((launch.rank > 0).then_some(0), 0).unwrap();
        assert_eq!(part.map(|part| sum(&part, launch)), (launch.rank > 0).then_some(3));
    });
}

#[test]
fn every_rank_talks_to_every_other_over_tcp_alone() {
    let options = Options { backend: Backend::Tcp, ..Options::default() };
    run(launches(&[3], true), options, |launch, all| {
        assert_eq!((all.backend(), all.hosts(), sum(&all, launch)), (Backend::Tcp, 3, 3));
    });
}

/// Every form that ranks of several hosts have, with as many ranks on each as can be.
#[test]
fn hosts_with_different_numbers_of_ranks_share_memory_on_each() {
    for hosts in [&[2, 1][..], &[1, 3], &[3, 1, 2]] {
        run(launches(hosts, true), Options::default(), |launch, all| {
            let (rank, world) = (all.rank(), all.world());
            assert_eq!((all.backend(), all.hosts(), rank), (Backend::Hierarchical, hosts.len(), launch.rank));
            let own = |len: usize| numbers(&(0..len).map(|index| (rank * 1000 + index) as i64).collect::<Vec<_>>());
            let read = |buffer: &Buffer| Cpu.stream().download::<i64>(buffer.view()).unwrap();
            let sums = |len: usize| -> Vec<i64> {
                (0..len).map(|index| (0..world).map(|rank| (rank * 1000 + index) as i64).sum()).collect()
            };
            // A length that no number of ranks divides, and one that leaves some ranks without a chunk.
            for len in [3, 10_007] {
                let sum = all.all_reduce(own(len), Reduction::Sum, Start::Here).wait().unwrap();
                assert_eq!(read(&sum), sums(len));
                for root in 0..world {
                    let output = (rank == root).then(|| numbers(&vec![-1; len]));
                    let (_, output) = all.reduce(own(len), output, Reduction::Sum, root, Start::Here).wait().unwrap();
                    assert_eq!(output.as_ref().map(read), (rank == root).then(|| sums(len)));
                    let sent = all.broadcast(own(len), root, Start::Here).wait().unwrap();
                    assert_eq!(read(&sent), (0..len).map(|index| (root * 1000 + index) as i64).collect::<Vec<_>>());
                }
            }
            let gathered = all.all_gather_scalars(&[rank as u64, 7]).unwrap();
            assert_eq!(gathered, (0..world).map(|rank| vec![rank as u64, 7]).collect::<Vec<_>>());
            let mut window = all.window(&Cpu, DType::I64, 11 * world).unwrap();
            let chunk = window.shard_mut(0).unwrap();
            let values = vec![rank as i64; chunk.len()];
            Cpu.stream().upload(chunk, &values);
            let window = all.gather_window(window, Start::Here).wait().unwrap();
            let values = Cpu.stream().download::<i64>(window.view().unwrap()).unwrap();
            assert!(values.iter().enumerate().all(|(index, &value)| value == (index / 11) as i64), "{values:?}");
            all.barrier().unwrap();
            // Ranks of which each host has another number, in another order.
            let part = all.group(&[world - 1, 0]).ok().filter(|_| [0, world - 1].contains(&rank));
            if let Some(part) = part {
                assert_eq!(sum(&part, launch), world as i64 - 1);
            }
        });
    }
}
