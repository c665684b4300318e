//! Operations on buffers that are cut into sections, against an operation on each section alone.

use std::sync::Arc;

use half::bf16;
use pillion_collectives::{Observation, Reduce, Reduction, Sections, Sideband};
use pillion_kernels::cpu::compare::Comparison;
use pillion_kernels::cpu::observe::Observer;
use pillion_kernels::{Cpu, DType, Device, Event};

use crate::{Memory, Number, Rank, WORLDS, ranks};

/// Chunks of sections: one; empty ones; less than a header; pieces that end within a section, and
/// sections that end within a piece; as many as four numbers of each leave room for.
fn cuts() -> [Vec<usize>; 6] {
    [
        vec![77],
        vec![0, 5, 0, 3, 0],
        vec![1, 1, 2],
        vec![4_099, 1, 20_000, 64],
        vec![70_001, 333],
        (0..Sideband::MAX / 4).map(|section| 32 * section).collect(),
    ]
}

/// The numbers of a rank that ride with a section.
fn numbers(rank: usize, section: usize) -> [f64; 4] {
    let number = (10 * section + rank) as f64;
    [number + 0.25, 1.0, number / 2.0, -number]
}

impl Rank<'_> {
    /// A full buffer whose chunks are those that each rank has in its shard.
    fn full<T: Number>(&self, sections: &Sections) -> Vec<T> {
        let world = self.communicator.world();
        let mut full = vec![T::new(7, 7); world * sections.shard_len()];
        for section in 0..sections.count() {
            for rank in 0..world {
                let shard = self.values::<T>(rank, sections.shard_len());
                full[sections.in_full(section, world, rank)].copy_from_slice(&shard[sections.in_shard(section)]);
            }
        }
        full
    }

    fn gathers_sections<T: Number>(&self, sections: &Sections) {
        let (c, rank, world) = (self.communicator, self.communicator.rank(), self.communicator.world());
        let (len, full) = (sections.shard_len(), self.full::<T>(sections));
        let (shard, output) = (self.input::<T>(len), self.output::<T>(world * len + 5));
        let (shard, output) = self.done(c.all_gather_sections(sections, shard, output, self.start()));
        let unchanged = [T::new(999, 999); 5];
        self.check("sections", &output, &[&full[..], &unchanged].concat());
        self.check("a shard of sections", &shard, &self.values::<T>(rank, len));

        let mut own = vec![T::new(3, 3); world * len];
        for section in 0..sections.count() {
            let chunk = sections.in_full(section, world, rank);
            own[chunk.clone()].copy_from_slice(&full[chunk]);
        }
        let buffer = self.buffer(&own, true);
        let buffer = self.done(c.all_gather_sections_in_place(sections, buffer, self.start()));
        self.check("sections in place", &buffer, &full);
    }

    fn reduces_sections<T: Number>(&self, sections: &Sections, reduction: Reduction) {
        let (c, rank, world) = (self.communicator, self.communicator.rank(), self.communicator.world());
        let (len, count) = (sections.shard_len(), sections.count());
        let own: Vec<f64> = (0..count).flat_map(|section| numbers(rank, section)).collect();
        let totals = vec![100.0; 4 * count];
        let (own, totals) = (self.buffer(&own, false), self.buffer(&totals, false));
        let accumulate = reduction == Reduction::Sum;
        let reduce = Reduce {
            input: self.input::<T>(world * len),
            sections: Some(sections.clone()),
            output: self.buffer(&vec![T::new(50, 0); len], false),
            reduction,
            accumulate,
            sideband: Some(Sideband { own, totals }),
        };
        let reduce = self.done(c.reduce_scatter(reduce, self.start()));
        let mut expected = Vec::new();
        for section in 0..count {
            let chunk = sections.in_full(section, world, rank);
            for sum in self.combined::<T>(chunk.start, chunk.len(), reduction) {
                let before = T::new(50, 0);
                expected.push(if accumulate { T::combine(&[before, sum], reduction, &[2]) } else { sum });
            }
        }
        self.check("sums of sections", &reduce.output, &expected);
        self.check("a summand of sections", &reduce.input, &self.values::<T>(rank, world * len));
        // Quarters of small numbers are exact.
        let of_all = |section, index: usize| (0..world).map(|rank| numbers(rank, section)[index]).sum::<f64>();
        let before = if accumulate { 100.0 } else { 0.0 };
        let totals: Vec<f64> = (0..4 * count).map(|index| before + of_all(index / 4, index % 4)).collect();
        self.check("totals of sections", &reduce.sideband.unwrap().totals, &totals);
    }

    /// A comparison of each section has the bits of a comparison of the section alone.
    fn compares_sections(&self, sections: &Sections) {
        let (c, rank, world) = (self.communicator, self.communicator.rank(), self.communicator.world());
        let observer = Arc::new(Comparison { limit: 0.6 * world as f64 });
        let numbers = observer.numbers(world);
        let compare = |input: &[f32], sections: Option<&Sections>, len: usize| {
            let count = sections.map_or(1, Sections::count);
            let totals = self.buffer(&vec![f64::NAN; count * numbers], false);
            let observation = Observation { totals, observer: observer.clone() };
            let (input, output) = (self.buffer(input, true), self.output::<f32>(len));
            let sections = sections.cloned();
            let reduce =
                Reduce { input, sections, output, reduction: Reduction::Sum, accumulate: false, sideband: None };
            let (_, observation) = self.done(c.reduce_scatter_observed(reduce, observation, self.start()));
            Cpu.stream().download::<f64>(observation.totals.view()).unwrap()
        };
        let all = self.values::<f32>(rank, world * sections.shard_len());
        let found = compare(&all, Some(sections), sections.shard_len());
        for section in 0..sections.count() {
            let len = sections.in_shard(section).len();
            let alone = sections.in_full(section, world, 0).start..sections.in_full(section, world, world - 1).end;
            let expected = compare(&all[alone], None, len);
            let bits = |numbers: &[f64]| numbers.iter().map(|number| number.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&found[section * numbers..][..numbers]), bits(&expected), "section {section}");
        }
    }
}

#[test]
fn sections_move_as_one_operation_as_they_would_alone() {
    for (world, hosts, groups) in WORLDS {
        ranks(world, hosts, groups, |rank| {
            for cut in cuts() {
                let sections = Sections::new(&cut).unwrap();
                rank.gathers_sections::<f32>(&sections);
                rank.gathers_sections::<bf16>(&sections);
                rank.reduces_sections::<f32>(&sections, Reduction::Sum);
                rank.reduces_sections::<i64>(&sections, Reduction::Max);
                // Staged pieces end elsewhere in a section than in the section alone, and a
                // comparison adds up what it finds piece by piece.
                if hosts == 1 && rank.memory == Memory::Arena {
                    rank.compares_sections(&sections);
                }
            }
        });
    }
}

#[test]
fn a_window_of_sections_shows_what_ranks_of_all_hosts_have_written() {
    for (world, hosts, groups) in WORLDS {
        ranks(world, hosts, groups, |rank| {
            let (c, stream) = (rank.communicator, Cpu.stream());
            for cut in cuts() {
                let sections = Sections::new(&cut).unwrap();
                let mut window = c.window_of(&Cpu, DType::F32, &sections).unwrap();
                assert_eq!(window.len(), world * sections.shard_len());
                for _ in 0..3 {
                    let shard = rank.values::<f32>(c.rank(), sections.shard_len());
                    for section in 0..sections.count() {
                        stream.upload(window.shard_mut(section).unwrap(), &shard[sections.in_shard(section)]);
                    }
                    window = c.gather_window(window, rank.start()).wait().unwrap();
                    assert_eq!(stream.download::<f32>(window.view().unwrap()).unwrap(), rank.full::<f32>(&sections));
                    window.release(&Event::PAST).unwrap();
                }
            }
        });
    }
}
