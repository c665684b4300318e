//! What each operation has NCCL enqueue.

use pillion_kernels::cpu::reduce::Fold;
use pillion_kernels::{CudaStream, DType, Event, Raw, Stream};

use super::communicator as nccl;
use super::watch::UnderWay;
use super::{Nccl, Scratch};
use crate::call::describe;
use crate::gpus::operations::{Enqueuing, Moves, cut, exchange, fold, unsupported};
use crate::memory::control::Call;
use crate::request::{Collective, Operands, Scattered, Sidebands};
use crate::{Error, Reduction, Sections};

/// An operation of a rank.
struct Operation<'a> {
    nccl: &'a Nccl,
    enqueuing: Enqueuing<'a>,
    call: Call,
    world: usize,
    /// The moment at which this rank's stream has come to it.
    reached: Event,
}

impl Nccl {
    /// Enqueues an operation; how many bytes other ranks take from this one.
    pub(in crate::gpus) fn enqueue(&self, mut enqueuing: Enqueuing<'_>, collective: &Collective) -> Result<u64, Error> {
        if let Collective::ReduceScatter(Scattered { operands, accumulate: true, .. }) = collective
            && operands.dtype == DType::F64
        {
            return Err(unsupported("sums of f64 that are added to what is there, by NCCL"));
        }
        // NCCL takes calls for one GPU from one thread at a time.
        let _one = enqueuing.gpus.lanes.calls.lock();
        let call = enqueuing.next_step();
        let control = &*enqueuing.gpus.control;
        // Nobody is told of an operation that will not come.
        enqueuing.stream.healthy().map_err(|failure| control.fail_after(failure))?;
        // NCCL says nothing of ranks that call something else.
        let world = exchange(control, call, [], enqueuing.limit)?.len();
        let mut operation = Operation { nccl: self, world, enqueuing, call, reached: Event::PAST };
        let bytes = operation.enqueue(collective)?;
        let Operation { enqueuing: Enqueuing { lane, stream, limit, .. }, reached, .. } = operation;
        self.operations.expect(lane, UnderWay { reached, done: stream.record(), call, limit });
        Ok(bytes)
    }
}

/// The first `len` elements from `start` on.
fn part(raw: Raw, start: usize, len: usize) -> Raw {
    assert!(start + len <= raw.len, "elements {start}..{} of {}", start + len, raw.len);
    // SAFETY: inside what `raw` names, by the assertion.
    let pointer = unsafe { raw.pointer.add(start * raw.dtype.bytes()) };
    Raw { pointer, len, ..raw }
}

impl Operation<'_> {
    /// Has NCCL enqueue `calls` and this rank's rider with `own` behind the latch's code. Behind it
    /// this rank's work stops where another's has failed. Returns this rank's rider, which is free
    /// behind that, and those of all ranks.
    fn ride(&mut self, own: Option<Raw>, mut calls: Vec<nccl::Call>) -> Result<(Raw, Raw), Error> {
        let &mut Enqueuing { gpus, stream, lane, limit, .. } = &mut self.enqueuing;
        let (world, each) = (self.world, 1 + own.map_or(0, |own| own.len));
        let mut scratch = self.nccl.scratch[lane].lock();
        let riders = Scratch::of(&mut scratch.riders, &gpus.gpu, DType::F64, (1 + world) * each)?.view().raw();
        let (rider, all) = (part(riders, 0, each), part(riders, each, world * each));
        let control = &gpus.control;
        // SAFETY: the scratch stays until the next operation of this stream, and longer where the
        // stream may still use it; `own` and what the calls name is this operation's until its
        // event. This stream alone touches any of it meanwhile.
        unsafe {
            stream.write_rider(rider, own);
            self.reached = stream.record();
            let handle = stream.handle()?;
            calls.push(nccl::Call::AllGather(all, rider));
            let communicator = &self.nccl.communicators[lane];
            let look = || control.look(&|| describe(self.call));
            let enqueued = communicator.enqueue(handle, &calls, &describe(self.call), &look, limit.within);
            // What is known of the ranks says more than what NCCL makes of it.
            enqueued.map_err(|error| look().err().unwrap_or(error))?;
            stream.follow_riders(all, world);
        }
        Ok((rider, all))
    }

    /// Working memory of f32, as for [`Operation::ride`].
    fn wide(&self, len: usize) -> Result<Raw, Error> {
        let mut scratch = self.nccl.scratch[self.enqueuing.lane].lock();
        let buffer = Scratch::of(&mut scratch.wide, &self.enqueuing.gpus.gpu, DType::F32, len)?;
        Ok(part(buffer.view().raw(), 0, len))
    }

    /// out = the sum of `inputs`, in order.
    fn combine(&self, inputs: &[Raw], out: Raw, job: Fold<'_>) {
        // SAFETY: as for `ride`.
        unsafe { self.enqueuing.combine(inputs, out, job) };
    }

    /// totals = the sum of `numbers` of f64, in order, however many there are; `partial` is free.
    fn add_up(&self, numbers: &[Raw], partial: Raw, totals: Raw, accumulate: bool) {
        const MOST: usize = CudaStream::INPUTS;
        let job = |accumulate: bool| Fold { accumulate, ..Reduction::Sum.first(DType::F64) };
        if numbers.len() <= MOST {
            return self.combine(numbers, totals, job(accumulate));
        }
        let (first, rest) = numbers.split_at(MOST);
        self.combine(first, partial, job(false));
        for more in rest.chunks(MOST - 1) {
            let inputs: Vec<Raw> = [partial].iter().chain(more).copied().collect();
            self.combine(&inputs, partial, job(false));
        }
        self.combine(&[partial], totals, job(accumulate));
    }

    /// What NCCL sums, and where it puts the sums.
    fn begin(&self, sum: &Sum) -> Result<[Raw; 2], Error> {
        if sum.is_direct {
            return Ok([sum.input, sum.output]);
        }
        let copied = if sum.is_copied { sum.input.len } else { 0 };
        let wide = self.wide(sum.len + copied)?;
        let (sums, copy) = (part(wide, 0, sum.len), part(wide, sum.len, copied));
        if !sum.is_copied {
            return Ok([sum.input, sums]);
        }
        // Each term is multiplied before it is added.
        let job = Fold { output: DType::F32, factor: sum.whole.factor, ..Reduction::Sum.first(sum.input.dtype) };
        self.combine(&[sum.input], copy, job);
        Ok([copy, sums])
    }

    /// Puts sums where they belong, with what is left of the reduction.
    fn finish(&self, sum: &Sum, sums: Raw) {
        if !sum.is_direct {
            let job = Fold { dtype: DType::F32, factor: None, accumulate: sum.accumulate, ..sum.whole.clone() };
            self.combine(&[sums], part(sum.output, 0, sum.len), job);
        }
    }
}

impl Moves for Operation<'_> {
    fn all_gather(
        &mut self,
        operands: &Operands,
        chunk: usize,
        sections: &Sections,
        in_place: bool,
    ) -> Result<u64, Error> {
        let (world, rank) = (self.world, self.enqueuing.gpus.rank);
        let output = operands.output.as_ref().expect("a gather has an output");
        let input = operands.input.as_ref().expect("every rank has a shard");
        let of_section = |section: usize| {
            let own = if in_place { sections.in_full(section, world, rank) } else { sections.in_shard(section) };
            nccl::Call::AllGather(output.range(full(sections, section, world)).raw(), input.range(own).raw())
        };
        self.ride(None, filled(sections).map(of_section).collect())?;
        Ok(((world - 1) * chunk * operands.dtype.bytes()) as u64)
    }

    fn broadcast(&mut self, operands: &Operands, root: usize) -> Result<u64, Error> {
        let buffer = operands.input.as_ref().or(operands.output.as_ref()).expect("a rank sends or receives").raw();
        let calls = (buffer.len > 0).then_some(nccl::Call::Broadcast(buffer, root));
        self.ride(None, calls.into_iter().collect())?;
        let taken = if operands.input.is_some() { self.world - 1 } else { 0 };
        Ok((taken * buffer.len * operands.dtype.bytes()) as u64)
    }

    fn reduce_scatter(&mut self, scattered: &Scattered) -> Result<u64, Error> {
        let Scattered { operands, chunk, reduction, accumulate, sidebands, sections, .. } = scattered;
        let (world, sections) = (self.world, cut(sections, *chunk));
        let sum = Sum::of(operands, *reduction, *accumulate, *chunk, world);
        let [from, sums] = self.begin(&sum)?;
        let numbers = sidebands.as_ref().filter(|sidebands| !sidebands.totals.is_empty());
        let own = numbers.map(|sidebands| sidebands.own.raw());
        let of_section = |section: usize| {
            let (all, own) = (full(&sections, section, world), sections.in_shard(section));
            nccl::Call::ReduceScatter(part(sums, own.start, own.len()), part(from, all.start, all.len()))
        };
        let (rider, riders) = self.ride(own, filled(&sections).map(of_section).collect())?;
        self.finish(&sum, sums);
        if let Some(Sidebands { totals, accumulate, .. }) = numbers {
            let len = totals.len();
            let of_ranks: Vec<Raw> = (0..world).map(|rank| part(riders, rank * (1 + len) + 1, len)).collect();
            self.add_up(&of_ranks, part(rider, 1, len), totals.raw(), *accumulate);
        }
        Ok(((world - 1) * chunk * operands.dtype.bytes()) as u64)
    }

    fn all_reduce(&mut self, operands: &Operands, len: usize, reduction: Reduction) -> Result<u64, Error> {
        let sum = Sum::of(operands, reduction, false, len, self.world);
        let [from, sums] = self.begin(&sum)?;
        let calls = (len > 0).then_some(nccl::Call::AllReduce(sums, from));
        self.ride(None, calls.into_iter().collect())?;
        self.finish(&sum, sums);
        let each = len.div_ceil(self.world);
        Ok(((self.world - 1) * each * (operands.dtype.bytes() + operands.to.bytes())) as u64)
    }
}

/// A reduction.
struct Sum {
    input: Raw,
    output: Raw,
    /// Elements of the sum on this rank.
    len: usize,
    accumulate: bool,
    whole: Fold<'static>,
    /// Whether NCCL sums from the input to the output. Otherwise sums are made in f32 first.
    is_direct: bool,
    /// Whether the terms are copied first, because they are not f32 or are multiplied.
    is_copied: bool,
}

impl Sum {
    fn of(operands: &Operands, reduction: Reduction, accumulate: bool, len: usize, world: usize) -> Sum {
        let input = operands.input.as_ref().expect("every rank has an input").raw();
        let output = operands.output.as_ref().expect("a reduction has an output").raw();
        let whole = fold(operands, reduction, world);
        let is_one_type = operands.dtype == operands.to && operands.dtype != DType::Bf16;
        let is_direct = is_one_type && reduction == Reduction::Sum && !accumulate;
        let is_copied = operands.dtype != DType::F32 || whole.factor.is_some();
        Sum { input, output, len, accumulate, whole, is_direct, is_copied }
    }
}

/// The sections that have elements.
fn filled(sections: &Sections) -> impl Iterator<Item = usize> + '_ {
    (0..sections.count()).filter(|&section| !sections.in_shard(section).is_empty())
}

/// Where all ranks' parts of a section lie in a full buffer.
fn full(sections: &Sections, section: usize, world: usize) -> std::ops::Range<usize> {
    sections.in_full(section, world, 0).start..sections.in_full(section, world, world - 1).end
}
