//! The engine on a device that is written outside the crate of kernels, and what it asks of such a
//! device.

use std::sync::Arc;

use pillion_collectives::Launch;
use pillion_kernels::LazyCpu;
use pillion_runtime::{Gather, Sharded};

use crate::common::logged::Logged;
use crate::common::{Rank, Schedule, Setup, bits_of, ranks};

/// Each rank's bits of a step, and what it asked its device for. Ranks have devices of their own.
fn logged(setup: &Setup, schedule: &Schedule) -> Vec<(Vec<u64>, Vec<&'static str>)> {
    std::thread::scope(|scope| {
        let start = |launch: Launch| {
            scope.spawn(move || {
                let device = Arc::new(Logged::default());
                let mut rank = Rank::new(&launch, setup, device.clone()).expect("ranks of this process meet");
                device.take();
                let report = rank.step(schedule, 0).expect("the step ends well");
                (bits_of(&report), device.take())
            })
        };
        let ranks: Vec<_> = Launch::threads(setup.world()).into_iter().map(start).collect();
        ranks.into_iter().map(|rank| rank.join().expect("a rank does not panic")).collect()
    })
}

#[test]
fn a_device_from_outside_computes_the_same_bits() {
    let schedule = Schedule::uneven(2, 2);
    for gather in [Gather::Copy, Gather::Window] {
        let setup = Setup::new(2).gather(gather);
        let expected = ranks(&setup, |mut rank| bits_of(&rank.step(&schedule, 0).unwrap()));
        for (rank, (bits, log)) in logged(&setup, &schedule).into_iter().enumerate() {
            assert_eq!(bits, expected[rank]);
            for name in ["record", "wait_for", "upload_bytes", "zero", "square_norm", "adamw", "linear", "rms_norm"] {
                assert!(log.contains(&name), "{name}: {log:?}");
            }
        }
    }
}

/// Between groups, sums follow reductions without the stream that computes: on a grid a rank asks
/// its device for the same work, and has it wait at the same places, as in a group alone.
#[test]
fn sums_over_groups_ask_nothing_of_the_stream_that_computes() {
    for rounds in [1, 2] {
        // As many micro-batches as ranks in each round, of equal length, so that every rank
        // computes alike.
        let schedule = |world: usize| Schedule(vec![vec![2; world * rounds]]);
        for gather in [Gather::Copy, Gather::Window] {
            let alone = logged(&Setup::new(2).gather(gather), &schedule(2));
            let grid = logged(&Setup::new(4).replicas(2).gather(gather), &schedule(4));
            for (rank, (_, log)) in grid.iter().enumerate() {
                assert_eq!(log, &alone[rank % 2].1, "rank {rank}, {rounds} rounds, {gather:?}");
            }
        }
    }
}

/// A device that runs work later would be idle while the host waits for it. In a step the host
/// reads once, at the end, whatever is sharded, however often gradients are reduced, and however
/// many units there are; the report says so.
#[test]
fn the_host_waits_once_in_a_step() {
    let placements = [Sharded::NOTHING, Sharded::OPTIMIZER, Sharded::GRADIENTS, Sharded::EVERYTHING];
    for (index, sharded) in placements.into_iter().enumerate() {
        for gather in [Gather::Copy, Gather::Window] {
            for (rounds, replicas, bucket) in [(1, 1, 0), (2, 2, 3_700), (3, 1, 1 << 20)] {
                let setup = &Setup::new(2).sharded(sharded).gather(gather).replicas(replicas).bucket(bucket);
                let schedule = &Schedule::uneven(2, rounds);
                std::thread::scope(|scope| {
                    for launch in Launch::threads(2) {
                        let device = Arc::new(Logged::over(Arc::new(LazyCpu::new(index as u64))));
                        scope.spawn(move || {
                            let mut rank = Rank::new(&launch, setup, device.clone()).unwrap();
                            rank.step(schedule, 0).unwrap();
                            let before = (device.take(), device.waits()).1;
                            let report = rank.step(schedule, 1).unwrap();
                            let log = device.take();
                            let asked = log.iter().filter(|&&name| ["read_bytes", "synchronize"].contains(&name));
                            let waits = asked.count() as u64 + device.waits() - before;
                            assert_eq!((waits, report.host_waits), (1, 1), "{setup:?}: {log:?}");
                        });
                    }
                });
            }
        }
    }
}
