//! What every transport must do, run over ranks as threads on both devices of the host.

mod common;

use std::time::Duration;

use half::bf16;
use pillion_collectives::{Communicator, Error, Launch, Options, Reduce, Reduction, Sideband, Start};
use pillion_kernels::{Buffer, Cpu, DType, Device, Element, Event, LazyCpu, Stream, random};

const WORLDS: [usize; 4] = [1, 2, 3, 4];
const LENGTHS: [usize; 6] = [0, 1, 3, 64, 1023, 20_000];

/// Runs `program` on `world` ranks and returns what each returned.
fn ranks<R: Send>(world: usize, options: Options, program: impl Fn(Communicator) -> R + Sync) -> Vec<R> {
    common::run(Launch::threads(world), options, |_, communicator| program(communicator))
}

fn devices() -> [Box<dyn Device>; 2] {
    [Box::new(Cpu), Box::new(LazyCpu::new(5))]
}

fn value(rank: usize, index: usize) -> f32 {
    random::normal(11, rank as u64, index as u64) as f32
}

fn values(rank: usize, len: usize) -> Vec<f32> {
    (0..len).map(|index| value(rank, index)).collect()
}

fn filled<T: Element>(device: &dyn Device, stream: &dyn Stream, communicator: &Communicator, data: &[T]) -> Buffer {
    let mut buffer = communicator.allocate(device, T::DTYPE, data.len()).unwrap();
    stream.upload(buffer.view_mut(), data);
    buffer
}

/// The sum in order of rank.
fn sum(world: usize, index: usize) -> f32 {
    (1..world).fold(value(0, index), |total, rank| total + value(rank, index))
}

fn bits(data: &[f32]) -> Vec<u32> {
    data.iter().map(|x| x.to_bits()).collect()
}

#[test]
fn all_gather_concatenates_shards_in_order_of_rank() {
    for world in WORLDS {
        ranks(world, Options::default(), |communicator| {
            for device in devices() {
                let stream = device.stream();
                for len in LENGTHS {
                    let shard = filled(&*device, &*stream, &communicator, &values(communicator.rank(), len));
                    let output = device.allocate(DType::F32, world * len).unwrap();
                    let pending = communicator.all_gather(shard, output, stream.record());
                    let (shard, output) = pending.then(&*stream).unwrap();
                    let expected: Vec<f32> = (0..world).flat_map(|rank| values(rank, len)).collect();
                    assert_eq!(stream.download::<f32>(output.view()).unwrap(), expected);
                    assert_eq!(
                        stream.download::<f32>(shard.view()).unwrap(),
                        values(communicator.rank(), len),
                        "the shard is unchanged"
                    );
                }
            }
        });
    }
}

#[test]
fn reduce_scatter_sums_in_order_of_rank_and_carries_the_sideband() {
    for world in WORLDS {
        ranks(world, Options::default(), |communicator| {
            let rank = communicator.rank();
            for device in devices() {
                let stream = device.stream();
                for len in LENGTHS {
                    for accumulate in [false, true] {
                        let input = filled(&*device, &*stream, &communicator, &values(rank, world * len));
                        let mut output = device.allocate(DType::F32, len).unwrap();
                        stream.upload(output.view_mut(), &vec![0.25f32; len]);
                        let mut sideband = device.allocate(DType::F64, 4).unwrap();
                        stream.upload(sideband.view_mut(), &[rank as f64, 1.0, 0.5, 1e-30]);
                        let mut totals = device.allocate(DType::F64, 4).unwrap();
                        stream.upload(totals.view_mut(), &[8.0, 8.0, 8.0, 0.0]);
                        let sideband = Some(Sideband { own: sideband, totals });
                        let reduce =
                            Reduce { input, sections: None, output, reduction: Reduction::Sum, accumulate, sideband };
                        let reduce = communicator.reduce_scatter(reduce, stream.record()).then(&*stream).unwrap();
                        let expected: Vec<f32> = (rank * len..(rank + 1) * len)
                            .map(|index| if accumulate { 0.25 + sum(world, index) } else { sum(world, index) })
                            .collect();
                        assert_eq!(bits(&stream.download(reduce.output.view()).unwrap()), bits(&expected));
                        let ranks = world as f64;
                        let sideband = stream.download::<f64>(reduce.sideband.unwrap().totals.view()).unwrap();
                        let before = if accumulate { 8.0 } else { 0.0 };
                        assert_eq!(
                            sideband[..3],
                            [ranks * (ranks - 1.0) / 2.0, ranks, ranks / 2.0].map(|x| x + before)
                        );
                        assert!(
                            (sideband[3] - ranks * 1e-30).abs() < 1e-45,
                            "a sum of at most four equal numbers rounds twice"
                        );
                    }
                }
            }
        });
    }
}

#[test]
fn bf16_is_reduced_in_f32() {
    for world in WORLDS {
        ranks(world, Options::default(), |communicator| {
            let (rank, stream) = (communicator.rank(), Cpu.stream());
            let narrow = |rank, index| bf16::from_f32(value(rank, index));
            let data: Vec<bf16> = (0..world * 100).map(|index| narrow(rank, index)).collect();
            let input = filled(&Cpu, &*stream, &communicator, &data);
            let output = Cpu.allocate(DType::F32, 100).unwrap();
            let reduce =
                Reduce { input, sections: None, output, reduction: Reduction::Sum, accumulate: false, sideband: None };
            let reduce = communicator.reduce_scatter(reduce, Event::PAST).wait().unwrap();
            let expected: Vec<f32> = (rank * 100..(rank + 1) * 100)
                .map(|index| {
                    (1..world).fold(narrow(0, index).to_f32(), |total, rank| total + narrow(rank, index).to_f32())
                })
                .collect();
            assert_eq!(bits(&stream.download(reduce.output.view()).unwrap()), bits(&expected));
        });
    }
}

#[test]
fn all_reduce_gives_every_rank_the_same_sum() {
    for world in WORLDS {
        ranks(world, Options::default(), |communicator| {
            for device in devices() {
                let stream = device.stream();
                for len in LENGTHS {
                    let buffer = filled(&*device, &*stream, &communicator, &values(communicator.rank(), len));
                    let buffer =
                        communicator.all_reduce(buffer, Reduction::Sum, stream.record()).then(&*stream).unwrap();
                    let expected: Vec<f32> = (0..len).map(|index| sum(world, index)).collect();
                    assert_eq!(bits(&stream.download(buffer.view()).unwrap()), bits(&expected));
                }
            }
        });
    }
}

#[test]
fn broadcasts_copy_from_any_root() {
    for world in WORLDS {
        ranks(world, Options::default(), |communicator| {
            let stream = Cpu.stream();
            for root in 0..world {
                let buffer = filled(&Cpu, &*stream, &communicator, &values(communicator.rank(), 777));
                let buffer = communicator.broadcast(buffer, root, Event::PAST).wait().unwrap();
                assert_eq!(stream.download::<f32>(buffer.view()).unwrap(), values(root, 777));
                for len in [0, 1, 511, 512, 513, 3000] {
                    let bytes: Vec<u8> = (0..len).map(|index| (index * 7 + communicator.rank()) as u8).collect();
                    let expected: Vec<u8> = (0..len).map(|index| (index * 7 + root) as u8).collect();
                    assert_eq!(communicator.broadcast_bytes(root, &bytes).unwrap(), expected);
                }
            }
        });
    }
}

#[test]
fn scalars_are_combined_in_order_of_rank() {
    for world in WORLDS {
        ranks(world, Options::default(), |communicator| {
            let of_rank = |rank: usize| (0..100).map(|index| f64::from(value(rank, index))).collect::<Vec<f64>>();
            for reduction in [
                Reduction::Sum,
                Reduction::Avg,
                Reduction::Prod,
                Reduction::Min,
                Reduction::Max,
                Reduction::PremulSum(0.3),
            ] {
                let mut values = of_rank(communicator.rank());
                communicator.all_reduce_scalars(&mut values, reduction).unwrap();
                for (index, &got) in values.iter().enumerate() {
                    let all = (0..world).map(|rank| of_rank(rank)[index]);
                    let expected: f64 = match reduction {
                        Reduction::Sum => all.sum(),
                        Reduction::Avg => all.sum::<f64>() / world as f64,
                        Reduction::Prod => all.product(),
                        Reduction::Min => all.fold(f64::MAX, f64::min),
                        Reduction::Max => all.fold(f64::MIN, f64::max),
                        _ => all.map(|value| value * 0.3).sum(),
                    };
                    assert_eq!(got.to_bits(), expected.to_bits());
                }
            }
            communicator.barrier().unwrap();
        });
    }
}

#[test]
fn a_window_shows_every_rank_what_each_has_written() {
    const ROUNDS: usize = 50;
    for world in WORLDS {
        ranks(world, Options::default(), |communicator| {
            for device in devices() {
                let stream = device.stream();
                let rank = communicator.rank();
                let mut window = communicator.window(&*device, DType::F32, world * 1000).unwrap();
                for round in 0..ROUNDS {
                    let shard = vec![(round * 10 + rank) as f32; 1000];
                    stream.upload(window.shard_mut(0).unwrap(), &shard);
                    window = communicator.gather_window(window, stream.record()).then(&*stream).unwrap();
                    let expected: Vec<f32> =
                        (0..world).flat_map(|rank| vec![(round * 10 + rank) as f32; 1000]).collect();
                    assert_eq!(stream.download::<f32>(window.view().unwrap()).unwrap(), expected);
                    window.release(&stream.record()).unwrap();
                }
            }
        });
    }
}

#[test]
fn operations_in_flight_on_two_channels_do_not_wait_for_each_other() {
    // Ranks start the two operations in opposite order; each channel keeps its own.
    ranks(2, Options::default(), |communicator| {
        let stream = Cpu.stream();
        let rank = communicator.rank();
        let mut shard = Some(filled(&Cpu, &*stream, &communicator, &values(rank, 10)));
        let mut summand = Some(filled(&Cpu, &*stream, &communicator, &values(rank, 10)));
        let (mut gather, mut reduce) = (None, None);
        for turn in 0..2 {
            if (turn == 0) == (rank == 0) {
                let output = Cpu.allocate(DType::F32, 20).unwrap();
                gather = shard.take().map(|shard| communicator.all_gather(shard, output, Event::PAST));
            } else {
                reduce = summand.take().map(|summand| communicator.all_reduce(summand, Reduction::Sum, Event::PAST));
            }
        }
        let (_, output) = gather.unwrap().wait().unwrap();
        assert_eq!(stream.download::<f32>(output.view()).unwrap()[10..], values(1, 10));
        let total = reduce.unwrap().wait().unwrap();
        assert_eq!(stream.download::<f32>(total.view()).unwrap()[3], sum(2, 3));
    });
}

#[test]
fn a_wrong_call_is_named_by_every_other_rank_and_poisons_the_communicator() {
    let errors = ranks(4, Options::default(), |communicator| {
        let stream = Cpu.stream();
        let rank = communicator.rank();
        let buffer = filled(&Cpu, &*stream, &communicator, &values(rank, 16));
        // Rank 2 makes another call on the same channel.
        let error = if rank == 2 {
            communicator.broadcast(buffer, 0, Event::PAST).wait().unwrap_err()
        } else {
            let output = Cpu.allocate(DType::F32, 64).unwrap();
            communicator.all_gather(buffer, output, Event::PAST).wait().unwrap_err()
        };
        assert_eq!(communicator.barrier().unwrap_err().to_string(), error.to_string(), "the first error stays");
        error
    });
    for (rank, error) in errors.iter().enumerate().filter(|&(rank, _)| rank != 2) {
        match error {
            Error::Mismatch { ours, theirs, peer: 2 } => {
                assert!(ours.contains("all-gather") && theirs.contains("broadcast"), "{error}");
            }
            other => panic!("rank {rank} saw {other}"),
        }
    }
    assert!(matches!(errors[2], Error::Mismatch { .. }), "{}", errors[2]);
}

#[test]
fn different_counts_and_types_are_mismatches() {
    for (dtype, len) in [(DType::F32, 17), (DType::F64, 16)] {
        let errors = ranks(3, Options::default(), |communicator| {
            // The sizes in bytes agree, or the allocation would already be a mismatch.
            let odd = communicator.rank() == 1;
            let buffer = communicator.allocate(&Cpu, DType::F32, 64).unwrap();
            drop(buffer);
            let (dtype, len) = if odd { (dtype, len) } else { (DType::F32, 16) };
            communicator.allocate(&Cpu, dtype, len).unwrap_err()
        });
        assert!(matches!(errors[0], Error::Mismatch { peer: 1, .. }), "{}", errors[0]);
        assert!(matches!(errors[2], Error::Mismatch { peer: 1, .. }), "{}", errors[2]);
    }
}

#[test]
fn a_rank_that_leaves_or_aborts_or_panics_is_named() {
    let errors = ranks(3, Options::default(), |communicator| match communicator.rank() {
        1 => None,
        _ => Some(communicator.barrier().unwrap_err()),
    });
    for error in errors.into_iter().flatten() {
        assert!(matches!(error, Error::PeerLost { rank: 1, how: "it left early", .. }), "{error}");
    }
    let errors = ranks(3, Options::default(), |communicator| {
        if communicator.rank() == 1 {
            communicator.abort("the disk is full");
        }
        communicator.barrier().unwrap_err()
    });
    for error in errors {
        assert!(matches!(&error, Error::Aborted { rank: 1, reason } if reason == "the disk is full"), "{error}");
    }
    let errors = ranks(3, Options::default(), |communicator| {
        if communicator.rank() == 1 {
            let panic = std::panic::catch_unwind(std::panic::AssertUnwindSafe(move || {
                let _communicator = communicator;
                std::panic::resume_unwind(Box::new("a rank's own mistake"));
            }));
            assert!(panic.is_err());
            return None;
        }
        Some(communicator.barrier().unwrap_err())
    });
    for error in errors.into_iter().flatten() {
        assert!(matches!(error, Error::Aborted { rank: 1, .. }), "{error}");
    }
}

#[test]
fn missing_ranks_are_named_at_the_start() {
    let launches = Launch::threads(3);
    let options = Options { startup_timeout: Duration::from_millis(200), ..Options::default() };
    let error = Communicator::connect(&launches[0], options.clone()).err().expect("nobody else is there").to_string();
    assert!(error.contains("ranks [1, 2] did not come"), "{error}");
    let error = Communicator::connect(&launches[1], options).err().expect("rank 0 is not there").to_string();
    assert!(error.contains("rank 0 did not come"), "{error}");
}

#[test]
fn an_arena_larger_than_memory_is_refused() {
    let errors =
        ranks(2, Options::default(), |communicator| communicator.allocate(&Cpu, DType::F32, 1 << 44).unwrap_err());
    assert!(errors.iter().all(|error| matches!(error, Error::OutOfMemory { .. })), "{errors:?}");
}

#[test]
fn delays_change_no_result() {
    let delay = Duration::from_millis(20);
    let options = Options { gather_delay: delay, reduce_delay: delay, ..Options::default() };
    ranks(2, options, |communicator| {
        let stream = Cpu.stream();
        let shard = filled(&Cpu, &*stream, &communicator, &values(communicator.rank(), 5));
        let output = Cpu.allocate(DType::F32, 10).unwrap();
        let (_, output) = communicator.all_gather(shard, output, Event::PAST).then(&*stream).unwrap();
        assert_eq!(stream.download::<f32>(output.view()).unwrap(), [values(0, 5), values(1, 5)].concat());
    });
}

#[test]
fn traffic_counts_operations_and_the_bytes_that_peers_read() {
    let traffic = ranks(4, Options::default(), |communicator| {
        let shard = communicator.allocate(&Cpu, DType::F32, 8).unwrap();
        let before = communicator.traffic();
        let output = Cpu.allocate(DType::F32, 32).unwrap();
        communicator.all_gather(shard, output, Event::PAST).wait().unwrap();
        let after = communicator.traffic();
        (after.operations - before.operations, after.bytes - before.bytes)
    });
    assert!(traffic.iter().all(|&moved| moved == (1, 3 * 8 * 4)), "{traffic:?}");
    // An all-reduce of fewer elements than ranks: whoever combines one gives it to the others,
    // which read no more of its input.
    let traffic = ranks(4, Options::default(), |communicator| {
        let buffer = communicator.allocate(&Cpu, DType::F32, 3).unwrap();
        let wide = communicator.allocate(&Cpu, DType::F64, 3).unwrap();
        let before = communicator.traffic().bytes;
        communicator.all_reduce(wide, Reduction::Sum, Event::PAST).wait().unwrap();
        communicator.all_reduce(buffer, Reduction::Max, Event::PAST).wait().unwrap();
        communicator.traffic().bytes - before
    });
    // Of three f64 each of ranks 0 to 2 combines one, 3 · 8 + 2 · 8 bytes; rank 3 gives its three.
    // 12 bytes travel whole.
    assert_eq!(traffic, [40, 40, 40, 24].map(|bytes| bytes + 3 * 12));
}

#[test]
fn more_ranks_than_processors_agree_on_every_element() {
    const WORLD: usize = 24;
    const LEN: usize = 301;
    ranks(WORLD, Options { reduce_groups: 4, ..Options::default() }, |communicator| {
        let (rank, stream) = (communicator.rank(), Cpu.stream());
        let mut turn = [0.0];
        for _ in 0..20 {
            communicator.barrier().unwrap();
            communicator.all_reduce_scalars(&mut turn, Reduction::Max).unwrap();
            turn[0] += 1.0;
        }
        assert_eq!(turn, [20.0]);
        let input = filled(&Cpu, &*stream, &communicator, &values(rank, WORLD * LEN));
        let output = Cpu.allocate(DType::F32, LEN).unwrap();
        let reduce =
            Reduce { input, sections: None, output, reduction: Reduction::Sum, accumulate: false, sideband: None };
        let reduce = communicator.reduce_scatter(reduce, Event::PAST).wait().unwrap();
        let partial = |group: usize, index| {
            (6 * group + 1..6 * group + 6).fold(value(6 * group, index), |sum, rank| sum + value(rank, index))
        };
        let expected: Vec<f32> = (rank * LEN..(rank + 1) * LEN)
            .map(|index| (1..4).fold(partial(0, index), |sum, group| sum + partial(group, index)))
            .collect();
        assert_eq!(bits(&stream.download(reduce.output.view()).unwrap()), bits(&expected));
        let shard = filled(&Cpu, &*stream, &communicator, &values(rank, LEN));
        let all = Cpu.allocate(DType::F32, WORLD * LEN).unwrap();
        let (_, all) = communicator.all_gather(shard, all, Start::Here).wait().unwrap();
        let expected: Vec<f32> = (0..WORLD).flat_map(|rank| values(rank, LEN)).collect();
        assert_eq!(stream.download::<f32>(all.view()).unwrap(), expected);
    });
}
