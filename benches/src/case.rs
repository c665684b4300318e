//! One operation at one size: its buffers, how it is called, and whether it gave what it should.

use pillion_collectives::{Communicator, Parts, Pending, Reduce, Start, Window};
use pillion_kernels::{Buffer, Cpu, DType, Device, Event, Stream, View, ViewMut, with_element};

use crate::Error;
use crate::arguments::Buffers;
use crate::integral::{Integral, POISON};
use crate::local::foreign;
use crate::operation::{Form, Operation};
use crate::pattern::{Blocks, Pattern, What, wrong};

/// Elements filled, compared or consumed at a time: they stay in the first-level cache.
pub(crate) const BLOCK: usize = 2048;

/// An operation with its buffers.
pub struct Case {
    pattern: Pattern,
    operands: Operands,
    window: Option<Window>,
    /// Where a window's reader copies each block.
    scratch: Buffer,
    scalar: f64,
    /// What the ranks' scalars came to.
    combined: f64,
    stream: Box<dyn Stream>,
    is_on_gpu: bool,
}

#[derive(Default)]
pub(crate) struct Operands {
    pub(crate) input: Option<Buffer>,
    pub(crate) output: Option<Buffer>,
}

/// An operation in flight.
enum Flight {
    One(Pending<Operands>),
    Messages { sent: Pending<Buffer>, received: Pending<Buffer> },
}

const HAS: &str = "a rank has the buffers of its part";

impl Case {
    /// Bytes that a rank allocates from its communicator, and privately; equal on all ranks.
    pub fn bytes(pattern: &Pattern, dtype: DType, buffers: Buffers) -> (u64, u64) {
        let most = |len: fn(&Pattern) -> Option<usize>| {
            let lens = (0..pattern.world).filter_map(|rank| len(&Pattern { rank, ..*pattern }));
            (lens.max().unwrap_or(0) * dtype.bytes()) as u64
        };
        let (input, output) = (most(Pattern::input_len), most(Pattern::output_len));
        match (pattern.operation, buffers) {
            (Operation::Window, _) => (output, input),
            (_, Buffers::Arena) => (input + output, 0),
            (_, Buffers::Private | Buffers::Foreign) => (0, input + output),
        }
    }

    /// On a GPU.
    ///
    /// # Errors
    /// Those of the allocations.
    pub fn on(device: &dyn Device, pattern: Pattern, dtype: DType) -> Result<Case, Error> {
        let allocate = |len: Option<usize>| len.map(|len| device.allocate(dtype, len)).transpose();
        let operands = Operands { input: allocate(pattern.input_len())?, output: allocate(pattern.output_len())? };
        let (scratch, stream) = (Cpu.allocate(dtype, BLOCK)?, device.stream());
        Ok(Case { pattern, operands, window: None, scratch, scalar: 0.0, combined: 0.0, stream, is_on_gpu: true })
    }

    /// Allocates the buffers; every rank does the same.
    ///
    /// # Errors
    /// Those of the allocations.
    pub fn new(communicator: &Communicator, pattern: Pattern, dtype: DType, buffers: Buffers) -> Result<Case, Error> {
        let is_window = pattern.operation == Operation::Window;
        // Ranks need buffers of different lengths, and some none: each allocates for itself.
        let alone = communicator.group(&[communicator.rank()])?;
        let allocate = |len: Option<usize>| -> Result<Option<Buffer>, Error> {
            match (len, buffers) {
                (Some(len), Buffers::Arena) if !is_window => Ok(Some(alone.allocate(&Cpu, dtype, len)?)),
                (Some(len), Buffers::Foreign) => Ok(Some(foreign(dtype, len)?)),
                (Some(len), _) => Ok(Some(Cpu.allocate(dtype, len)?)),
                (None, _) => Ok(None),
            }
        };
        let input = allocate(pattern.input_len())?;
        let (mut output, mut window) = (None, None);
        match pattern.output_len() {
            Some(len) if is_window => window = Some(communicator.window(&Cpu, dtype, len)?),
            len => output = allocate(len)?,
        }
        let scratch = Cpu.allocate(dtype, BLOCK)?;
        let operands = Operands { input, output };
        Ok(Case {
            pattern,
            operands,
            window,
            scratch,
            scalar: 0.0,
            combined: 0.0,
            stream: Cpu.stream(),
            is_on_gpu: false,
        })
    }

    /// Writes inputs, and poison where results go; values are those of `round`.
    pub fn prepare(&mut self, round: u64) {
        self.pattern.round = round;
        let (pattern, stream) = (self.pattern, &*self.stream);
        if let Some(input) = &mut self.operands.input {
            fill(stream, input.view_mut(), &pattern, What::Input);
        }
        if let Some(output) = &mut self.operands.output {
            fill(stream, output.view_mut(), &pattern, What::Before);
        }
        self.scalar = pattern.value(pattern.rank, 0) as f64;
        self.combined = POISON as f64;
    }

    /// Runs the operation on this thread.
    ///
    /// # Errors
    /// The communicator's first.
    pub fn run(&mut self, communicator: &Communicator) -> Result<(), Error> {
        match self.pattern.operation {
            Operation::Barrier => Ok(communicator.barrier()?),
            Operation::Scalars => {
                let mut values = [self.scalar];
                communicator.all_reduce_scalars(&mut values, self.pattern.reduction)?;
                [self.combined] = values;
                Ok(())
            }
            Operation::Window => self.run_window(communicator, |stream, block, scratch, _| {
                stream.cast(scratch, block);
            }),
            Operation::AllReduce => {
                // As a program calls it. What `start` wraps around it takes a tenth of the time of
                // a few bytes.
                let Operands { input, output } = std::mem::take(&mut self.operands);
                let (output, reduction, start) = (output.expect(HAS), self.pattern.reduction, self.here());
                self.operands = match input {
                    None => {
                        let output = communicator.all_reduce(output, reduction, start).wait()?;
                        Operands { input: None, output: Some(output) }
                    }
                    Some(input) => {
                        let both = communicator.all_reduce_into(input, output, reduction, start);
                        let (input, output) = both.wait()?;
                        Operands { input: Some(input), output: Some(output) }
                    }
                };
                Ok(())
            }
            _ => {
                let start = self.here();
                let flight = self.start(communicator, start);
                self.finish(flight)
            }
        }
    }

    /// On this thread; on a GPU behind what its stream was given.
    fn here(&self) -> Start {
        if self.is_on_gpu { Start::After(self.stream.record()) } else { Start::Here }
    }

    /// Runs the operation beside `compute`, which this thread calls meanwhile.
    ///
    /// # Errors
    /// The communicator's first.
    pub fn run_beside(&mut self, communicator: &Communicator, compute: impl FnOnce()) -> Result<(), Error> {
        let start = if self.is_on_gpu { self.here() } else { Start::After(Event::PAST) };
        let flight = self.start(communicator, start);
        compute();
        self.finish(flight)
    }

    /// Prepares for `round`, runs the operation once, and counts this rank's wrong elements: of results, and of what
    /// should not have changed.
    ///
    /// # Errors
    /// The communicator's first.
    pub fn check(&mut self, communicator: &Communicator, round: u64) -> Result<u64, Error> {
        if self.pattern.operation == Operation::Window {
            return self.check_window(communicator, round);
        }
        self.check_run(communicator, round, |case| case.run(communicator))
    }

    /// The same for an operation that `run` runs.
    ///
    /// # Errors
    /// The communicator's first, or that of `run`.
    pub(crate) fn check_run(
        &mut self,
        communicator: &Communicator,
        round: u64,
        mut run: impl FnMut(&mut Case) -> Result<(), Error>,
    ) -> Result<u64, Error> {
        self.prepare(round);
        communicator.barrier()?;
        let pattern = self.pattern;
        match pattern.operation {
            Operation::Barrier => return check_barrier(communicator, round, || run(self)),
            Operation::Scalars => {
                run(self)?;
                return Ok(u64::from(self.combined != pattern.combined::<f64>(0)));
            }
            _ => run(self)?,
        }
        let output = self.operands.output.as_ref();
        let of_output = output.map_or(0, |output| differences(&*self.stream, output.view(), &pattern, What::After));
        Ok(of_output + self.differing_input())
    }

    fn check_window(&mut self, communicator: &Communicator, round: u64) -> Result<u64, Error> {
        with_element!(self.scratch.dtype(), T => self.check_window_of::<T>(communicator, round))
    }

    fn check_window_of<T: Integral>(&mut self, communicator: &Communicator, round: u64) -> Result<u64, Error> {
        self.prepare(round);
        communicator.barrier()?;
        let (pattern, mut differing) = (self.pattern, 0);
        let mut expected = Blocks::<T>::new(&pattern, What::After, pattern.count * pattern.world, BLOCK);
        self.run_window(communicator, |stream, block, _, first| {
            differing += differences_of_block(stream, block, first, &mut expected);
        })?;
        Ok(differing + self.differing_input())
    }

    fn differing_input(&self) -> u64 {
        let pattern = self.pattern;
        let input = self.operands.input.as_ref();
        input.map_or(0, |input| differences(&*self.stream, input.view(), &pattern, What::Input))
    }

    fn start(&mut self, communicator: &Communicator, start: Start) -> Flight {
        let Pattern { operation, form, reduction, rank, world, .. } = self.pattern;
        let Operands { input, output } = std::mem::take(&mut self.operands);
        let only_output = |buffer| Operands { input: None, output: Some(buffer) };
        let both = |(input, output)| Operands { input: Some(input), output: Some(output) };
        let pattern = &self.pattern;
        let cut = |buffer: Buffer| Parts::cut(buffer, &pattern.parts(rank)).expect("a buffer holds its parts");
        let whole = |parts: Parts| parts.into_buffers().pop().expect("the one that was cut");
        Flight::One(match (operation, form) {
            (Operation::ReduceScatter, Form::InPlace) => {
                communicator.reduce_scatter_in_place(output.expect(HAS), reduction, start).map(only_output)
            }
            (Operation::ReduceScatter, Form::OutOfPlace) => {
                let (input, output) = (input.expect(HAS), output.expect(HAS));
                let reduce = Reduce { input, sections: None, output, reduction, accumulate: false, sideband: None };
                communicator.reduce_scatter(reduce, start).map(move |reduce| both((reduce.input, reduce.output)))
            }
            (Operation::AllGather, Form::InPlace) => {
                communicator.all_gather_in_place(output.expect(HAS), start).map(only_output)
            }
            (Operation::AllGather, Form::OutOfPlace) => {
                communicator.all_gather(input.expect(HAS), output.expect(HAS), start).map(both)
            }
            (Operation::AllReduce, Form::InPlace) => {
                communicator.all_reduce(output.expect(HAS), reduction, start).map(only_output)
            }
            (Operation::AllReduce, Form::OutOfPlace) => {
                communicator.all_reduce_into(input.expect(HAS), output.expect(HAS), reduction, start).map(both)
            }
            (Operation::Broadcast, _) => communicator.broadcast(output.expect(HAS), 0, start).map(only_output),
            (Operation::Reduce, _) => communicator
                .reduce(input.expect(HAS), output, reduction, 0, start)
                .map(|(input, output)| Operands { input: Some(input), output }),
            (Operation::Gather, _) => communicator
                .gather(input.expect(HAS), output, 0, start)
                .map(|(input, output)| Operands { input: Some(input), output }),
            (Operation::Scatter, _) => communicator
                .scatter(input, output.expect(HAS), 0, start)
                .map(|(input, output)| Operands { input, output: Some(output) }),
            (Operation::AllToAll, _) => communicator.all_to_all(input.expect(HAS), output.expect(HAS), start).map(both),
            (Operation::ReduceScatterV, Form::InPlace) => communicator
                .reduce_scatter_v_in_place(cut(output.expect(HAS)), reduction, start)
                .map(move |parts| only_output(whole(parts))),
            (Operation::ReduceScatterV, Form::OutOfPlace) => communicator
                .reduce_scatter_v(cut(input.expect(HAS)), output.expect(HAS), reduction, start)
                .map(move |(parts, output)| both((whole(parts), output))),
            (Operation::AllGatherV, Form::InPlace) => communicator
                .all_gather_v_in_place(cut(output.expect(HAS)), start)
                .map(move |parts| only_output(whole(parts))),
            (Operation::AllGatherV, Form::OutOfPlace) => communicator
                .all_gather_v(input.expect(HAS), cut(output.expect(HAS)), start)
                .map(move |(input, parts)| both((input, whole(parts)))),
            (Operation::GatherV, _) => communicator
                .gather_v(input.expect(HAS), output.map(cut), 0, start)
                .map(move |(input, parts)| Operands { input: Some(input), output: parts.map(whole) }),
            (Operation::ScatterV, _) => communicator
                .scatter_v(input.map(cut), output.expect(HAS), 0, start)
                .map(move |(parts, output)| Operands { input: parts.map(whole), output: Some(output) }),
            (Operation::AllToAllV, _) => communicator
                .all_to_all_v(cut(input.expect(HAS)), cut(output.expect(HAS)), start)
                .map(move |(input, output)| both((whole(input), whole(output)))),
            (Operation::SendRecv, _) => {
                // Not sent with `Here`: a long message would wait for a receiver that waits for its own send.
                let sent = communicator.send(input.expect(HAS), (rank + 1) % world, Event::PAST);
                let received = communicator.receive(output.expect(HAS), (rank + world - 1) % world, start);
                return Flight::Messages { sent, received };
            }
            (Operation::Barrier | Operation::Window | Operation::Scalars, _) => {
                unreachable!("they are run whole, in `run`")
            }
        })
    }

    fn finish(&mut self, flight: Flight) -> Result<(), Error> {
        self.operands = match flight {
            Flight::One(pending) => pending.wait()?,
            Flight::Messages { sent, received } => {
                let output = received.wait()?;
                Operands { input: Some(sent.wait()?), output: Some(output) }
            }
        };
        Ok(())
    }

    /// Writes this rank's shard, gathers, and gives `consume` each block, scratch memory of its size, and its first index.
    fn run_window(
        &mut self,
        communicator: &Communicator,
        mut consume: impl FnMut(&dyn Stream, View<'_>, ViewMut<'_>, usize),
    ) -> Result<(), Error> {
        let mut window = self.window.take().expect("a window's case has one");
        let shard = self.operands.input.as_ref().expect("and a shard to write");
        self.stream.cast(window.shard_mut(0)?, shard.view());
        let mut window = communicator.gather_window(window, Start::Here).wait()?;
        for first in (0..window.len()).step_by(BLOCK) {
            let len = BLOCK.min(window.len() - first);
            let block = window.view()?.slice(first..first + len);
            consume(&*self.stream, block, self.scratch.slice_mut(0..len), first);
        }
        window.release(&self.stream.record())?;
        self.window = Some(window);
        Ok(())
    }
}

/// For whoever runs the operation otherwise than [`Case::run`].
#[cfg(feature = "mpi")]
impl Case {
    /// What it is a case of.
    pub(crate) fn pattern(&self) -> &Pattern {
        &self.pattern
    }

    /// Its buffers.
    pub(crate) fn operands(&mut self) -> &mut Operands {
        &mut self.operands
    }

    /// This rank's scalar, and where the combination of all goes.
    pub(crate) fn scalars(&mut self) -> (&f64, &mut f64) {
        (&self.scalar, &mut self.combined)
    }
}

/// Whether nobody left before the last had come: 1 for each other rank that was still to come when this one left. One rank comes
/// 2 ms after the others. Ranks on one host read the same clock; those on others are not looked at.
fn check_barrier(
    communicator: &Communicator,
    round: u64,
    barrier: impl FnOnce() -> Result<(), Error>,
) -> Result<u64, Error> {
    let now = || {
        let time = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
        time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
    };
    if round as usize % communicator.world() == communicator.rank() {
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    let came = now();
    barrier()?;
    let left = now();
    let all = communicator.all_gather_scalars(&[came])?;
    Ok(if communicator.hosts() == 1 { all.iter().filter(|other| other[0] > left).count() as u64 } else { 0 })
}

fn fill(stream: &dyn Stream, view: ViewMut<'_>, pattern: &Pattern, what: What) {
    with_element!(view.dtype(), T => fill_with::<T>(stream, view, pattern, what))
}

fn fill_with<T: Integral>(stream: &dyn Stream, mut view: ViewMut<'_>, pattern: &Pattern, what: What) {
    let (mut first, len) = (0, view.len());
    let mut blocks = Blocks::<T>::new(pattern, what, len, BLOCK);
    while first < len {
        let block = blocks.from(first, len - first);
        stream.upload(view.reborrow().slice(first..first + block.len()), block);
        first += block.len();
    }
}

fn differences(stream: &dyn Stream, view: View<'_>, pattern: &Pattern, what: What) -> u64 {
    fn of<T: Integral>(stream: &dyn Stream, view: View<'_>, pattern: &Pattern, what: What) -> u64 {
        let mut expected = Blocks::<T>::new(pattern, what, view.len(), BLOCK);
        differences_of_block(stream, view, 0, &mut expected)
    }
    with_element!(view.dtype(), T => of::<T>(stream, view, pattern, what))
}

/// Wrong elements of a part of a buffer that starts at `first`.
fn differences_of_block<T: Integral>(
    stream: &dyn Stream,
    view: View<'_>,
    first: usize,
    expected: &mut Blocks<'_, T>,
) -> u64 {
    let (mut at, mut differing) = (0, 0);
    while at < view.len() {
        let block = expected.from(first + at, view.len() - at);
        differing += wrong(
            &stream.download::<T>(view.slice(at..at + block.len())).expect("the operations before have ended well"),
            block,
        );
        at += block.len();
    }
    differing
}
