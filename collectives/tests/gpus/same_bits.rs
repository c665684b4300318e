//! Every operation between GPUs gives the bits that shared memory gives.

use pillion_collectives::{Communicator, Options, Reduce, Reduction, Sections, Sideband};
use pillion_kernels::{Buffer, DType, Device, Stream};

use crate::{Rank, numbers, run, standin};

const TYPES: [DType; 2] = [DType::F32, DType::Bf16];

/// What a test asks of each rank, on the host and between GPUs.
pub(crate) type Operation<'a> = dyn Fn(&Case<'_>) -> Vec<Buffer> + Sync + 'a;

/// Compares what a rank gets on the host and between GPUs.
pub(crate) fn check(rank: &Rank, world: usize, what: &str, operation: &Operation<'_>) {
    let [host, gpus] = results(rank, world, operation);
    assert!(host == gpus, "{what}: rank {} of {world} has other bits", rank.number);
}

/// What a rank gets on the host and between GPUs: types and bytes.
pub(crate) fn results(rank: &Rank, world: usize, operation: &Operation<'_>) -> [Vec<(DType, Vec<u8>)>; 2] {
    rank.both().map(|(communicator, device)| {
        let stream = device.stream();
        let case = Case { rank: rank.number, world, communicator, device, stream: &*stream };
        let results = operation(&case);
        let bytes = |buffer: &Buffer| (buffer.dtype(), stream.download_bytes(buffer.view()).unwrap());
        results.iter().map(bytes).collect()
    })
}

/// The same, for every rank of jobs of these sizes.
fn compare(what: &str, worlds: &[usize], operation: &Operation<'_>) {
    for (seed, &world) in worlds.iter().enumerate() {
        standin::reset(seed as u64);
        run(world, Options::default(), |rank: &Rank| check(rank, world, what, operation));
    }
}

pub(crate) struct Case<'a> {
    rank: usize,
    world: usize,
    communicator: &'a Communicator,
    device: &'a dyn Device,
    stream: &'a dyn Stream,
}

impl Case<'_> {
    /// Other numbers on each rank.
    fn numbers(&self, dtype: DType, len: usize, seed: u64) -> Buffer {
        numbers(self.stream, self.device, dtype, len, seed + 100 * self.rank as u64)
    }
}

#[test]
fn gathers_and_broadcasts() {
    gathers(&mut |what, operation| compare(what, &[1, 2, 3, 4], operation));
}

pub(crate) fn gathers(each: &mut dyn FnMut(&str, &Operation<'_>)) {
    for dtype in TYPES {
        each("all-gather", &|case| {
            let sections = Sections::new(&[5, 0, 1000, 7]).unwrap();
            let len = sections.shard_len();
            let (shard, output) = (case.numbers(dtype, len, 1), case.numbers(dtype, case.world * len + 3, 2));
            let after = case.stream.record();
            let gathered = case.communicator.all_gather(shard, output, after).then(case.stream).unwrap();
            let (shard, output) = (case.numbers(dtype, len, 3), case.numbers(dtype, case.world * len, 4));
            let after = case.stream.record();
            let cut = case.communicator.all_gather_sections(&sections, shard, output, after);
            let in_place = case.numbers(dtype, case.world * len, 5);
            let in_sections = case.numbers(dtype, case.world * len, 6);
            let root = case.world - 1;
            let sent = case.numbers(dtype, 1234, 7);
            let after = case.stream.record();
            let in_place = case.communicator.all_gather_in_place(in_place, after.clone());
            let in_sections = case.communicator.all_gather_sections_in_place(&sections, in_sections, after.clone());
            let sent = case.communicator.broadcast(sent, root, after);
            let (shard, output) = cut.then(case.stream).unwrap();
            let [in_place, in_sections, sent] = [in_place, in_sections, sent].map(|x| x.then(case.stream).unwrap());
            vec![gathered.0, gathered.1, shard, output, in_place, in_sections, sent]
        });
    }
}

#[test]
fn reductions() {
    sums(&mut |what, operation| compare(what, &[1, 2, 3, 4], operation));
}

pub(crate) fn sums(each: &mut dyn FnMut(&str, &Operation<'_>)) {
    for (from, to) in TYPES.iter().flat_map(|&from| TYPES.map(|to| (from, to))) {
        let reductions = [Reduction::Sum, Reduction::Avg, Reduction::PremulSum(0.37)];
        for reduction in reductions.into_iter().filter(|reduction| reduction.supports(from, to)) {
            each("reduce-scatter", &|case| {
                let sections = Sections::new(&[3, 4000, 0, 9]).unwrap();
                let len = sections.shard_len();
                let mut results = Vec::new();
                for (round, cut) in [None, Some(sections.clone()), Some(sections)].into_iter().enumerate() {
                    let sideband = Sideband {
                        own: case.numbers(DType::F64, 11, 3),
                        totals: numbers(case.stream, case.device, DType::F64, 11, 9),
                    };
                    let reduce = Reduce {
                        input: case.numbers(from, case.world * len, 1 + round as u64),
                        sections: cut,
                        output: case.numbers(to, len, 20),
                        reduction,
                        accumulate: round == 2,
                        sideband: (round > 0).then_some(sideband),
                    };
                    let after = case.stream.record();
                    let Reduce { input, output, sideband, .. } =
                        case.communicator.reduce_scatter(reduce, after).then(case.stream).unwrap();
                    results.extend([input, output]);
                    results.extend(sideband.map(|sideband| sideband.totals));
                }
                results
            });
            each("all-reduce", &|case| {
                let (input, output) = (case.numbers(from, 1001, 1), case.numbers(to, 1001, 2));
                let (tiny, after) = (case.numbers(from, 2, 3), case.stream.record());
                let into = case.communicator.all_reduce_into(input, output, reduction, after.clone());
                let tiny = case.communicator.all_reduce(tiny, reduction, after).then(case.stream).unwrap();
                let (input, output) = into.then(case.stream).unwrap();
                vec![input, output, tiny]
            });
        }
    }
}

#[test]
fn groups_of_ranks() {
    grid(&mut |what, operation| compare(what, &[4], operation));
}

pub(crate) fn grid(each: &mut dyn FnMut(&str, &Operation<'_>)) {
    each("a grid", &|case| {
        let [row, column] = [case.rank / 2, case.rank % 2]
            .map(|color| case.communicator.split(Some(color as u64), case.rank as u64).unwrap().unwrap());
        let (shard, output) = (case.numbers(DType::F32, 333, 1), case.numbers(DType::F32, 666, 2));
        let (_, output) = row.all_gather(shard, output, case.stream.record()).then(case.stream).unwrap();
        let summed = column.all_reduce(output, Reduction::Sum, case.stream.record()).then(case.stream).unwrap();
        vec![summed]
    });
}

#[test]
fn sums_of_groups_in_a_tree() {
    for groups in [1, 2] {
        standin::reset(groups);
        run(4, Options { reduce_groups: groups as usize, ..Options::default() }, |rank: &Rank| {
            let [host, gpus] = rank.both().map(|(communicator, device)| {
                let stream = device.stream();
                let buffer = numbers(&*stream, device, DType::F32, 5000, rank.number as u64);
                let sum = communicator.all_reduce(buffer, Reduction::Sum, stream.record()).then(&*stream).unwrap();
                stream.download_bytes(sum.view()).unwrap()
            });
            let first = host.iter().zip(&gpus).position(|(host, gpu)| host != gpu);
            assert!(host == gpus, "{groups} groups: byte {first:?} of {}", host.len());
        });
    }
}

#[test]
fn operations_follow_each_other_without_the_host() {
    for seed in 0..8 {
        standin::reset(seed);
        run(3, Options::default(), |rank: &Rank| in_order(rank, 3));
    }
}

pub(crate) fn in_order(rank: &Rank, world: usize) {
    let stream = rank.gpu.stream();
    let mut buffer = rank.gpu.allocate(DType::F32, 700).unwrap();
    stream.upload(buffer.view_mut(), &[1.0f32; 700]);
    for _ in 0..5 {
        let pending = rank.gpus.all_reduce(buffer, Reduction::Sum, stream.record());
        buffer = pending.then(&*stream).unwrap();
        // Alternately by the stream and by the next operation's own start event.
        let again = rank.gpus.all_reduce(buffer, Reduction::Sum, stream.record());
        let event = again.event();
        let value = rank.gpus.broadcast(rank.gpu.allocate(DType::F32, 1).unwrap(), 0, event);
        value.then(&*stream).unwrap();
        buffer = again.then(&*stream).unwrap();
    }
    assert_eq!(stream.host_waits(), 0);
    assert_eq!(stream.download::<f32>(buffer.view()).unwrap(), [(world as f32).powi(10); 700]);
}
