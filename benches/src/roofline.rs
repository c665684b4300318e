//! The memory roofline of an operation: the best local loop that reads and writes as many bytes as the operation must, from as many streams,
//! in memory that this rank alone has, while all other ranks do the same. An operation between ranks of a host that moves
//! each byte once takes at least about as long; what it needs beyond that is synchronisation, copies, or other ranks' caches.
//!
//! | operation of S bytes on n ranks | a rank reads | a rank writes |
//! |---|---|---|
//! | reduce-scatter, reduce | n streams of S/n | S/n |
//! | all-reduce | n streams of S/n | n streams of S/n |
//! | all-gather, all-to-all, send-recv | S | S |
//! | broadcast | S, but the root nothing | S, but the root nothing |
//! | gather, scatter | S/n | S/n |
//! | window | S/n, then S block by block | S/n |
//!
//! The loops take turns with the operation, so that what else the machine does meets both. In place, sums are stored where they were read, as the operation's are.

use pillion_kernels::{Buffer, Cpu, DType, Device};
use serde::Serialize;

use crate::Error;
use crate::case::BLOCK;
use crate::local::{self, Sum};
use crate::operation::{Form, Operation};
use crate::pattern::Pattern;
use crate::timing::Summary;

/// Iterations are at most so many: the loops vary less than what they bound.
pub const MOST_ITERATIONS: usize = 20;

/// What was measured, on the busiest rank.
#[derive(Clone, Debug, Serialize)]
pub struct Roofline {
    /// Median time.
    pub p50_us: f64,
    /// Whether stores past the caches were faster.
    pub streaming: bool,
    /// Bytes read by a rank.
    pub bytes_read: usize,
    /// Bytes written by a rank.
    pub bytes_written: usize,
}

/// A local loop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Work {
    Copy { bytes: usize },
    Fold { inputs: usize, outputs: usize, count: usize, in_place: bool },
    Consume { written: usize, read: usize },
}

impl Work {
    /// That of the busiest rank; nothing where an operation moves no bytes.
    fn of(pattern: &Pattern, dtype: DType) -> Option<Work> {
        use Operation::*;
        let Pattern { world, count, .. } = *pattern;
        let part = count * dtype.bytes();
        // A buffer's parts that do not come out even differ by an element.
        let even = count.div_ceil(world);
        let parts = pattern.parts(0);
        let (shortest, longest) = (*parts.iter().min().unwrap_or(&0), *parts.iter().max().unwrap_or(&0));
        let in_place = pattern.form == Form::InPlace;
        let fold = |outputs, count| Work::Fold { inputs: world, outputs, count, in_place };
        let work = match pattern.operation {
            Barrier | Scalars => return None,
            ReduceScatter => fold(1, count),
            ReduceScatterV => fold(1, longest),
            Reduce => fold(1, even),
            AllReduce => fold(world, even),
            // In place, a rank's own shard is where it should be.
            AllGather if in_place => Work::Copy { bytes: part * (world - 1) },
            AllGatherV if in_place => Work::Copy { bytes: part * world - shortest * dtype.bytes() },
            AllGather | AllGatherV | AllToAll | AllToAllV => Work::Copy { bytes: part * world },
            Broadcast | SendRecv | Gather | Scatter => Work::Copy { bytes: part },
            GatherV | ScatterV => Work::Copy { bytes: longest * dtype.bytes() },
            Window => Work::Consume { written: part, read: part * world },
        };
        Some(work).filter(|work| work.traffic(dtype) != (0, 0))
    }

    /// Bytes read and written.
    fn traffic(self, dtype: DType) -> (usize, usize) {
        match self {
            Work::Copy { bytes } => (bytes, bytes),
            Work::Fold { inputs, outputs, count, .. } => {
                (inputs * count * dtype.bytes(), outputs * count * dtype.bytes())
            }
            Work::Consume { written, read } => (written + read, written),
        }
    }

    fn run(self, dtype: DType, from: &mut Buffer, to: &mut Buffer, scratch: &mut Buffer, stream: bool) {
        match self {
            Work::Copy { bytes } => local::copy(from, to, bytes, stream),
            Work::Fold { inputs, outputs, count, in_place } => {
                let to = if in_place { None } else { Some(to) };
                local::fold(Sum { dtype, count, inputs, outputs }, from, to, stream);
            }
            Work::Consume { written, read } => {
                local::copy(from, to, written, stream);
                let stream = Cpu.stream();
                let len = read / dtype.bytes();
                for first in (0..len).step_by(BLOCK) {
                    let count = BLOCK.min(len - first);
                    stream.cast(scratch.slice_mut(0..count), from.slice(first..first + count));
                }
            }
        }
    }
}

/// Private bytes that [`Loops`] need on each rank.
pub fn bytes(pattern: &Pattern, dtype: DType) -> u64 {
    Work::of(pattern, dtype).map_or(0, |work| {
        let (read, written) = work.traffic(dtype);
        (read + written) as u64
    })
}

/// The local loops that bound an operation, with their memory.
pub struct Loops {
    work: Work,
    dtype: DType,
    from: Buffer,
    to: Buffer,
    scratch: Buffer,
    /// A broadcast's root has nothing to read.
    idle: bool,
}

impl Loops {
    /// Number of loops: storing through the caches, and past them.
    pub const COUNT: usize = 2;

    /// Nothing where an operation moves no bytes.
    ///
    /// # Errors
    /// Those of the allocation.
    pub fn new(pattern: &Pattern, dtype: DType) -> Result<Option<Loops>, Error> {
        let Some(work) = Work::of(pattern, dtype) else { return Ok(None) };
        let touched = |bytes: usize| -> Result<Buffer, Error> {
            let mut buffer = Cpu.allocate(dtype, bytes / dtype.bytes())?;
            // Pages that were never written are all one page.
            Cpu.stream().zero(buffer.view_mut());
            Ok(buffer)
        };
        let (read, written) = work.traffic(dtype);
        let (from, to, scratch) = (touched(read)?, touched(written)?, touched(BLOCK * dtype.bytes())?);
        let idle = pattern.operation == Operation::Broadcast && pattern.rank == 0;
        Ok(Some(Loops { work, dtype, from, to, scratch, idle }))
    }

    /// Runs a loop once. Every rank does at once.
    pub fn run(&mut self, index: usize) {
        if !self.idle {
            self.work.run(self.dtype, &mut self.from, &mut self.to, &mut self.scratch, STREAMING[index]);
        }
    }

    /// The fastest of the loops, given the times of each in nanoseconds.
    pub fn roofline(&self, samples: &[Vec<u64>]) -> Roofline {
        let (bytes_read, bytes_written) = self.work.traffic(self.dtype);
        let timed = samples.iter().map(|samples| Summary::of(samples).p50_us).zip(STREAMING);
        let fastest = timed.min_by(|one, other| one.0.total_cmp(&other.0));
        let (p50_us, streaming) = fastest.expect("there are two loops");
        Roofline { p50_us, streaming, bytes_read, bytes_written }
    }
}

const STREAMING: [bool; Loops::COUNT] = [false, true];

#[cfg(test)]
mod tests {
    use super::*;
    use pillion_collectives::Reduction;

    /// The table above at S = 4800 bytes, f32, n = 4.
    #[test]
    fn traffic_is_each_operations_lower_bound() {
        for (operation, read, written) in [
            (Operation::ReduceScatter, 4800, 1200),
            (Operation::Reduce, 4800, 1200),
            (Operation::AllReduce, 4800, 4800),
            (Operation::AllGather, 4800, 4800),
            (Operation::AllToAll, 4800, 4800),
            (Operation::SendRecv, 4800, 4800),
            (Operation::Broadcast, 4800, 4800),
            (Operation::Gather, 1200, 1200),
            (Operation::Scatter, 1200, 1200),
            (Operation::Window, 6000, 1200),
        ] {
            let count = operation.count(4800, 4, DType::F32);
            let form = operation.forms()[0];
            let pattern = Pattern {
                operation,
                form,
                reduction: Reduction::Sum,
                dtype: DType::F32,
                rank: 1,
                world: 4,
                count,
                round: 0,
            };
            let work = Work::of(&pattern, DType::F32).unwrap();
            assert_eq!(work.traffic(DType::F32), (read, written), "{}", operation.name());
        }
    }

    #[test]
    fn local_sums_are_sums() {
        let mut from = Cpu.allocate(DType::F32, 12).unwrap();
        let mut to = Cpu.allocate(DType::F32, 8).unwrap();
        let stream = Cpu.stream();
        stream.upload(from.view_mut(), &[1f32, 2.0, 3.0, 4.0, 10.0, 20.0, 30.0, 40.0, 0.5, 0.5, 0.5, 0.5]);
        let sum = Sum { dtype: DType::F32, count: 4, inputs: 3, outputs: 2 };
        local::fold(sum, &mut from, Some(&mut to), true);
        let sums = [11.5f32, 22.5, 33.5, 44.5];
        assert_eq!(stream.download::<f32>(to.view()).unwrap(), [sums, sums].concat());
        local::fold(sum, &mut from, None, false);
        assert_eq!(stream.download::<f32>(from.view()).unwrap(), [&sums[..], &sums, &[0.5; 4]].concat());
    }
}
