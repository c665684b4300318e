//! Every operation against its definition: over worlds and hosts, in arenas and in private memory, for lengths at which pieces and
//! chunks are ragged. The expected values are computed from all ranks' inputs, in the order that the documentation promises.

mod numbers;
mod parts;
mod sections;

use std::ptr::NonNull;
use std::sync::Arc;

use half::{bf16, f16};
use numbers::{Number, tree};
use pillion_collectives::{Communicator, Launch, Observation, Options, Pending, Reduce, Reduction, Sideband, Start};
use pillion_kernels::cpu::compare::Comparison;
use pillion_kernels::cpu::observe::Observer;
use pillion_kernels::{Bool, Buffer, Cpu, DType, Device, Event, Space};

/// Ranks, simulated hosts, groups of reduction.
const WORLDS: [(usize, usize, usize); 15] = [
    (1, 1, 1),
    (2, 1, 1),
    (3, 1, 1),
    (4, 1, 2),
    (5, 1, 1),
    (8, 1, 4),
    (2, 2, 1),
    (4, 2, 1),
    (4, 4, 2),
    (6, 3, 3),
    (8, 2, 2),
    // Hosts with different numbers of ranks: 2 and 1, 3 and 2, 3 and 2 and 2, 2 and 1 and 2 and 1.
    (3, 2, 1),
    (5, 2, 1),
    (7, 3, 1),
    (6, 4, 1),
];
/// Elements of a chunk: nothing, less than a header, a cache line and a bit, and, with two ranks, several staged pieces.
const LENGTHS: [usize; 5] = [0, 1, 5, 77, 4_099];
const LONG: usize = 70_001;

/// Lengths for a world.
fn lengths(world: usize) -> impl Iterator<Item = usize> {
    LENGTHS.into_iter().chain([LONG / (world * world).div_ceil(4)])
}

/// Where a rank's buffers lie.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Memory {
    Arena,
    /// That of another program, at addresses that are multiples of the element size and of nothing
    /// more.
    Private,
    /// Inputs of even ranks in arenas, everything else private.
    Mixed,
}

/// Zeroed memory of a `Vec`, one element behind a multiple of 64 bytes.
fn foreign(dtype: DType, len: usize) -> Buffer {
    let mut owner = vec![0u8; 64 + (1 + len) * dtype.bytes()];
    let first = owner.as_ptr().align_offset(64) + dtype.bytes();
    let pointer = NonNull::new(owner[first..].as_mut_ptr()).unwrap();
    // SAFETY: the vector has that many bytes from there, is never resized, and lives in the buffer;
    // nobody else uses it.
    unsafe { Buffer::foreign(pointer, len, dtype, Space::Host, Box::new(owner)) }.unwrap()
}

struct Rank<'a> {
    communicator: &'a Communicator,
    /// Of this rank alone, so that ranks may allocate what they need.
    alone: &'a Communicator,
    memory: Memory,
    /// Whether operations run on this thread.
    here: bool,
    /// Ranks of each group of reduction.
    groups: Vec<usize>,
}

impl Rank<'_> {
    fn start(&self) -> Start {
        if self.here { Start::Here } else { Start::After(Event::PAST) }
    }

    fn buffer<T: Number>(&self, data: &[T], is_input: bool) -> Buffer {
        let arena = match self.memory {
            Memory::Arena => true,
            Memory::Private => false,
            Memory::Mixed => is_input && self.communicator.rank().is_multiple_of(2),
        };
        let mut buffer = match arena {
            true => self.alone.allocate(&Cpu, T::DTYPE, data.len()).unwrap(),
            false => foreign(T::DTYPE, data.len()),
        };
        Cpu.stream().upload(buffer.view_mut(), data);
        buffer
    }

    fn input<T: Number>(&self, len: usize) -> Buffer {
        self.buffer(&self.values::<T>(self.communicator.rank(), len), true)
    }

    /// Filled with what no operation leaves.
    fn output<T: Number>(&self, len: usize) -> Buffer {
        self.buffer(&vec![T::new(999, 999); len], false)
    }

    fn values<T: Number>(&self, rank: usize, len: usize) -> Vec<T> {
        (0..len).map(|index| T::new(rank, index)).collect()
    }

    /// Elements `first..first + len` of all ranks' values combined.
    fn combined<T: Number>(&self, first: usize, len: usize, reduction: Reduction) -> Vec<T> {
        let ranks = 0..self.communicator.world();
        let all = |index| ranks.clone().map(|rank| T::new(rank, index)).collect::<Vec<T>>();
        (first..first + len).map(|index| T::combine(&all(index), reduction, &self.groups)).collect()
    }

    fn check<T: Number>(&self, what: &str, buffer: &Buffer, expected: &[T]) {
        let found = Cpu.stream().download::<T>(buffer.view()).unwrap();
        let wrong = (0..expected.len().max(found.len())).find(|&index| found.get(index) != expected.get(index));
        if let Some(index) = wrong {
            let (rank, found, expected) = (self.communicator.rank(), found.get(index), expected.get(index));
            panic!(
                "{what} of {} in {:?}, rank {rank}: element {index} is {found:?}, not {expected:?}",
                T::DTYPE,
                self.memory
            );
        }
    }

    fn done<V>(&self, pending: Pending<V>) -> V {
        pending.wait().unwrap()
    }

    fn moves<T: Number>(&self, len: usize) {
        let (c, rank, world) = (self.communicator, self.communicator.rank(), self.communicator.world());
        let full: Vec<T> = (0..world).flat_map(|rank| self.values::<T>(rank, len)).collect();

        let (shard, output) =
            self.done(c.all_gather(self.input::<T>(len), self.output::<T>(world * len), self.start()));
        self.check("all-gather", &output, &full);
        self.check("all-gather's input", &shard, &self.values::<T>(rank, len));

        let mut data = vec![T::new(999, 999); world * len];
        data[rank * len..][..len].copy_from_slice(&self.values::<T>(rank, len));
        let buffer = self.done(c.all_gather_in_place(self.buffer(&data, true), self.start()));
        self.check("all-gather in place", &buffer, &full);

        let parts: Vec<T> =
            (0..world).flat_map(|from| self.values::<T>(from, world * len)[rank * len..][..len].to_vec()).collect();
        let (_, output) =
            self.done(c.all_to_all(self.input::<T>(world * len), self.output::<T>(world * len), self.start()));
        self.check("all-to-all", &output, &parts);

        for root in [0, world - 1] {
            let buffer = self.done(c.broadcast(self.input::<T>(len), root, self.start()));
            self.check("broadcast", &buffer, &self.values::<T>(root, len));

            let shard = self.input::<T>(len);
            let output = self.output::<T>(world * len);
            let (_, output) = self.done(c.gather(shard, (rank == root).then_some(output), root, self.start()));
            if let Some(output) = output {
                self.check("gather", &output, &full);
            }

            let input = self.input::<T>(world * len);
            let output = self.output::<T>(len);
            let (_, output) = self.done(c.scatter((rank == root).then_some(input), output, root, self.start()));
            self.check("scatter", &output, &self.values::<T>(root, world * len)[rank * len..][..len]);
        }

        // Around the ring, two messages one way and, where the neighbours differ, one the other way, all in flight at once.
        let (next, previous) = ((rank + 1) % world, (rank + world - 1) % world);
        let after = || Start::After(Event::PAST);
        let forward = [len, len / 2].map(|len| c.send(self.input::<T>(len), next, after()));
        let backward = (next != previous).then(|| c.send(self.input::<T>(len), previous, after()));
        let from_next = (next != previous).then(|| c.receive(self.output::<T>(len), next, after()));
        for len in [len, len / 2] {
            let buffer = self.done(c.receive(self.output::<T>(len), previous, self.start()));
            self.check("receive", &buffer, &self.values::<T>(previous, len));
        }
        if let (Some(received), Some(sent)) = (from_next, backward) {
            self.check("receive", &self.done(received), &self.values::<T>(next, len));
            self.check("send's buffer", &self.done(sent), &self.values::<T>(rank, len));
        }
        forward.into_iter().for_each(|sent| drop(self.done(sent)));
    }

    fn folds<T: Number>(&self, len: usize, reduction: Reduction) {
        let (c, rank, world) = (self.communicator, self.communicator.rank(), self.communicator.world());
        let mine = self.combined::<T>(rank * len, len, reduction);

        let reduce = Reduce {
            input: self.input::<T>(world * len),
            sections: None,
            output: self.output::<T>(len),
            reduction,
            accumulate: false,
            sideband: None,
        };
        let reduce = self.done(c.reduce_scatter(reduce, self.start()));
        self.check("reduce-scatter", &reduce.output, &mine);
        self.check("reduce-scatter's input", &reduce.input, &self.values::<T>(rank, world * len));

        // Onto what is there, which comes first; 16-bit floats would be rounded in between.
        if T::DTYPE.bytes() != 2 {
            let before = self.values::<T>(50, len);
            let (input, output) = (self.input::<T>(world * len), self.buffer(&before, false));
            let reduce = Reduce { input, sections: None, output, reduction, accumulate: true, sideband: None };
            let reduce = self.done(c.reduce_scatter(reduce, self.start()));
            let two = match reduction {
                Reduction::Avg | Reduction::PremulSum(_) => Reduction::Sum,
                other => other,
            };
            let onto = before.iter().zip(&mine).map(|(&before, &total)| T::combine(&[before, total], two, &[2]));
            self.check("accumulated reduce-scatter", &reduce.output, &onto.collect::<Vec<T>>());
        }

        let buffer = self.done(c.reduce_scatter_in_place(self.input::<T>(world * len), reduction, self.start()));
        let mut expected = self.values::<T>(rank, world * len);
        expected[rank * len..][..len].copy_from_slice(&mine);
        self.check("reduce-scatter in place", &buffer, &expected);

        // A length that the world does not divide.
        let odd = world * len + len.min(3);
        let all = self.combined::<T>(0, odd, reduction);
        let buffer = self.done(c.all_reduce(self.input::<T>(odd), reduction, self.start()));
        self.check("all-reduce", &buffer, &all);
        let (input, output) =
            self.done(c.all_reduce_into(self.input::<T>(odd), self.output::<T>(odd), reduction, self.start()));
        self.check("all-reduce out of place", &output, &all);
        self.check("all-reduce's input", &input, &self.values::<T>(rank, odd));

        for root in [0, world - 1] {
            let output = self.output::<T>(odd);
            let output = (rank == root).then_some(output);
            let (input, output) = self.done(c.reduce(self.input::<T>(odd), output, reduction, root, self.start()));
            if let Some(output) = output {
                self.check("reduce", &output, &all);
            }
            self.check("reduce's input", &input, &self.values::<T>(rank, odd));
        }
    }

    /// bf16 into f32, added to what is there, with a sideband.
    fn wide(&self, len: usize) {
        let (c, rank, world) = (self.communicator, self.communicator.rank(), self.communicator.world());
        let numbers = |value: f64| self.buffer(&[value, 1.0, 0.5, -value], false);
        let sideband = Some(Sideband { own: numbers(rank as f64 + 0.25), totals: numbers(100.0) });
        let input = self.input::<bf16>(world * len);
        let output = self.buffer(&self.values::<f32>(50, len), false);
        let reduce = Reduce { input, sections: None, output, reduction: Reduction::Sum, accumulate: true, sideband };
        let reduce = self.done(c.reduce_scatter(reduce, self.start()));
        let expected: Vec<f32> = (0..len)
            .map(|index| {
                let values = (0..world).map(|from| bf16::new(from, rank * len + index).to_f32());
                f32::new(50, index) + tree(&values.collect::<Vec<f32>>(), &self.groups, |a, b| a + b)
            })
            .collect();
        self.check("bf16 to f32", &reduce.output, &expected);
        // Quarters of small numbers are exact.
        let ranks = world as f64;
        let sum = ranks * (ranks - 1.0) / 2.0 + ranks / 4.0;
        let totals = [100.0 + sum, 1.0 + ranks, 0.5 + ranks / 2.0, -100.0 - sum];
        self.check("totals", &reduce.sideband.unwrap().totals, &totals);
    }
}

impl Rank<'_> {
    /// A sum in f32 of f32 or bf16, compared with its terms. Squares and products of f32 are exact in f64; what passes is decided from sums in order of rank, and added up in order of
    /// elements, as here. The products' sums are not in that order: n of them are off by n·2⁻⁵³ of the sum of their sizes.
    fn compared<T: Number>(&self, len: usize, widen: fn(T) -> f32) {
        let (c, rank, world) = (self.communicator, self.communicator.rank(), self.communicator.world());
        let limit = 0.6 * world as f64;
        let observer = Arc::new(Comparison { limit });
        let totals = self.buffer(&vec![f64::NAN; observer.numbers(world)], false);
        let observation = Observation { totals, observer };
        let (input, output) = (self.input::<T>(world * len), self.output::<f32>(len));
        let reduce =
            Reduce { input, sections: None, output, reduction: Reduction::Sum, accumulate: false, sideband: None };
        let (reduce, observation) = self.done(c.reduce_scatter_observed(reduce, observation, self.start()));
        let (mut sums, mut expected, mut sizes) = (Vec::new(), vec![0.0; 2 + world], vec![0.0; world]);
        for index in rank * len..(rank + 1) * len {
            let terms: Vec<f32> = (0..world).map(|from| widen(T::new(from, index))).collect();
            let sum = tree(&terms, &self.groups, |a, b| a + b);
            sums.push(sum);
            let sum = f64::from(sum);
            let squares = terms.iter().fold(0.0, |squares, &x| squares + f64::from(x) * f64::from(x));
            if sum != 0.0 && world as f64 * squares <= limit * sum * sum {
                expected[0] += 1.0;
                expected[1] += sum * sum;
            }
            for (from, &x) in terms.iter().enumerate() {
                expected[2 + from] += f64::from(x) * sum;
                sizes[from] += (f64::from(x) * sum).abs();
            }
        }
        self.check("compared sum", &reduce.output, &sums);
        let found: Vec<f64> = Cpu.stream().download(observation.totals.view()).unwrap();
        assert_eq!(found[..2], expected[..2], "what passes of {len} {}, {:?}", T::DTYPE, self.memory);
        assert!(len < 1000 || world == 1 || (1.0..len as f64).contains(&found[0]), "some pass, and some do not");
        for ((found, expected), size) in found[2..].iter().zip(&expected[2..]).zip(sizes) {
            let bound = 2.0 * len as f64 * 2f64.powi(-53) * size;
            assert!((found - expected).abs() <= bound, "{found} and {expected} of {len}, {:?}", self.memory);
        }
    }
}

#[test]
fn terms_are_compared_with_their_sum_wherever_they_lie() {
    for (world, hosts, groups) in WORLDS {
        ranks(world, hosts, groups, |rank| {
            assert_eq!(rank.communicator.capabilities().reads_peers_in_place, hosts == 1);
            for len in lengths(world).filter(|_| hosts == 1) {
                rank.compared::<f32>(len, |x| x);
                rank.compared::<bf16>(len, bf16::to_f32);
            }
        });
    }
}

/// Runs `program` on the ranks of a world, over both kinds of start, and where private memory is
/// read in place also with stages.
fn ranks(world: usize, hosts: usize, groups: usize, program: impl Fn(&Rank<'_>) + Sync) {
    ranks_with(world, Options { simulated_hosts: hosts, reduce_groups: groups, ..Options::default() }, &program);
    if hosts == 1 && world > 1 {
        ranks_with(world, Options { reads_private: false, reduce_groups: groups, ..Options::default() }, &program);
    }
}

fn ranks_with(world: usize, options: Options, program: &(impl Fn(&Rank<'_>) + Sync)) {
    let Options { simulated_hosts: hosts, reduce_groups: groups, reads_private, .. } = options;
    std::thread::scope(|scope| {
        for launch in Launch::threads(world) {
            let options = options.clone();
            scope.spawn(move || {
                let communicator = Communicator::connect(&launch, options).unwrap();
                assert_eq!(communicator.hosts(), hosts);
                let alone = communicator.group(&[communicator.rank()]).unwrap();
                // With several ranks on some of several hosts the hosts are the groups.
                let groups = match hosts > 1 && world > hosts {
                    true => {
                        (0..hosts).map(|host| (0..world).filter(|rank| rank * hosts / world == host).count()).collect()
                    }
                    false => vec![world / groups; groups],
                };
                let memories = [Memory::Private, Memory::Mixed, Memory::Arena];
                for memory in memories.into_iter().take(if reads_private { 3 } else { 2 }) {
                    for here in [false, true] {
                        let groups = groups.clone();
                        program(&Rank { communicator: &communicator, alone: &alone, memory, here, groups });
                    }
                }
            });
        }
    });
}

#[test]
fn what_is_moved_arrives() {
    for (world, hosts, groups) in WORLDS {
        ranks(world, hosts, groups, |rank| {
            for len in lengths(world) {
                rank.moves::<f32>(len);
            }
            rank.moves::<bf16>(1_001);
            rank.moves::<f16>(501);
            rank.moves::<f64>(333);
            rank.moves::<i8>(70);
            rank.moves::<u8>(2_003);
            rank.moves::<i32>(9);
            rank.moves::<u32>(130);
            rank.moves::<i64>(3);
            rank.moves::<u64>(600);
            rank.moves::<Bool>(1_100);
        });
    }
}

#[test]
fn what_is_combined_is_combined_in_order_and_rounded_once() {
    for (world, hosts, groups) in WORLDS {
        ranks(world, hosts, groups, |rank| {
            for len in lengths(world) {
                rank.folds::<f32>(len, Reduction::Sum);
            }
            for len in [1, 130, 5_003] {
                rank.folds::<bf16>(len, Reduction::Sum);
                rank.folds::<u8>(len, Reduction::Avg);
                rank.wide(len);
            }
        });
    }
}

#[test]
fn every_type_has_its_reductions_and_no_others() {
    fn all<T: Number>(rank: &Rank<'_>) {
        for &reduction in T::REDUCTIONS {
            for len in [1, 130] {
                rank.folds::<T>(len, reduction);
            }
        }
        // By their names, which leave out the factor.
        let names: Vec<&str> = T::REDUCTIONS.iter().map(|reduction| reduction.name()).collect();
        for reduction in [f32::REDUCTIONS, i32::REDUCTIONS].concat() {
            let is_there = names.contains(&reduction.name());
            assert_eq!(reduction.supports(T::DTYPE, T::DTYPE), is_there, "{reduction:?} of {}", T::DTYPE);
        }
    }
    for (world, hosts, groups) in [(1, 1, 1), (3, 1, 1), (4, 1, 2), (2, 2, 1), (6, 3, 3)] {
        ranks(world, hosts, groups, |rank| {
            all::<f32>(rank);
            all::<bf16>(rank);
            all::<f16>(rank);
            all::<f64>(rank);
            all::<i8>(rank);
            all::<u8>(rank);
            all::<i32>(rank);
            all::<u32>(rank);
            all::<i64>(rank);
            all::<u64>(rank);
            all::<Bool>(rank);
        });
    }
}

#[test]
fn ranks_with_other_factors_are_named() {
    std::thread::scope(|scope| {
        for launch in Launch::threads(3) {
            scope.spawn(move || {
                let communicator = Communicator::connect(&launch, Options::default()).unwrap();
                let factor = if launch.rank == 1 { 0.25 } else { 0.5 };
                let buffer = Cpu.allocate(DType::F32, 1000).unwrap();
                let reduction = Reduction::PremulSum(factor);
                let error = communicator.all_reduce(buffer, reduction, Start::Here).wait().unwrap_err().to_string();
                assert!(error.contains("premul by 0.25") && error.contains("premul by 0.5"), "{error}");
            });
        }
    });
}

#[test]
fn windows_show_what_ranks_of_all_hosts_have_written() {
    for (world, hosts, groups) in WORLDS {
        ranks(world, hosts, groups, |rank| {
            let (c, stream) = (rank.communicator, Cpu.stream());
            let mut window = c.window(&Cpu, DType::F32, world * 1000).unwrap();
            for round in 0..10 {
                let shard: Vec<f32> = (0..1000).map(|index| f32::new(c.rank() + 100 * round, index)).collect();
                stream.upload(window.shard_mut(0).unwrap(), &shard);
                window = c.gather_window(window, rank.start()).wait().unwrap();
                let expected: Vec<f32> = (0..world)
                    .flat_map(|from| (0..1000).map(move |index| f32::new(from + 100 * round, index)))
                    .collect();
                assert_eq!(stream.download::<f32>(window.view().unwrap()).unwrap(), expected);
                window.release(&Event::PAST).unwrap();
            }
        });
    }
}

#[test]
fn split_communicators_number_their_ranks_by_key_and_do_not_disturb_each_other() {
    for (world, hosts, _) in WORLDS {
        ranks(world, hosts, 1, |rank| {
            let c = rank.communicator;
            if rank.here || rank.memory != Memory::Arena {
                return;
            }
            // Odd and even ranks, numbered backwards; the last rank takes no part.
            let color = (c.rank() + 1 < world).then_some((c.rank() % 2) as u64);
            let part = c.split(color, (world - c.rank()) as u64).unwrap();
            assert_eq!(part.is_some(), color.is_some());
            if let Some(part) = part {
                let mut members: Vec<usize> = (0..world - 1).filter(|member| member % 2 == c.rank() % 2).collect();
                members.reverse();
                assert_eq!((part.world(), members[part.rank()]), (members.len(), c.rank()));
                let mut buffer = Cpu.allocate(DType::I64, 100).unwrap();
                Cpu.stream().upload(buffer.view_mut(), &[c.rank() as i64; 100]);
                let sum: i64 = members.iter().map(|&member| member as i64).sum();
                let buffer = part.all_reduce(buffer, Reduction::Sum, Start::Here).wait().unwrap();
                assert_eq!(Cpu.stream().download::<i64>(buffer.view()).unwrap(), [sum; 100]);
            }
            c.barrier().unwrap();
        });
    }
}
