//! What each operation has NCCL enqueue.

use std::ffi::c_int;

use pillion_kernels::cpu::reduce::Fold;
use pillion_kernels::{CudaStream, DType, Event, Raw, Span, Stream};

use super::communicator::Group;
use super::watch::UnderWay;
use super::{Nccl, Scratch};
use crate::call::describe;
use crate::gpus::operations::{Enqueuing, cut, exchange, fold};
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
        let call = enqueuing.next_step();
        let control = &*enqueuing.gpus.control;
        // Nobody is told of an operation that will not come.
        enqueuing.stream.healthy().map_err(|failure| control.fail_after(failure))?;
        // NCCL says nothing of ranks that call something else.
        let world = exchange(control, call, [], enqueuing.limit)?.len();
        let mut operation = Operation { nccl: self, world, enqueuing, call, reached: Event::PAST };
        let bytes = match collective {
            Collective::AllGather { operands, chunk, sections, in_place } => {
                operation.all_gather(operands, *chunk, &cut(sections, *chunk), *in_place)
            }
            Collective::Broadcast { operands, root, .. } => operation.broadcast(operands, *root),
            Collective::ReduceScatter(scattered) => operation.reduce_scatter(scattered),
            Collective::AllReduce { operands, len, reduction } => operation.all_reduce(operands, *len, *reduction),
            _ => unreachable!("`call_of` refuses the others"),
        }?;
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
    /// this rank's work stops where another's has failed. Returns the riders of all ranks.
    fn ride(&mut self, own: Option<Raw>, calls: impl FnOnce(&Group<'_>) -> Vec<c_int>) -> Result<Raw, Error> {
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
            let with_rider = |group: &Group<'_>| {
                let mut results = calls(group);
                results.push(group.all_gather(all, rider));
                results
            };
            let communicator = &self.nccl.communicators[lane];
            let look = || control.look(&|| describe(self.call));
            let enqueued = communicator.enqueue(handle, &describe(self.call), &look, limit.within, with_rider);
            // What is known of the ranks says more than what NCCL makes of it.
            enqueued.map_err(|error| look().err().unwrap_or(error))?;
            stream.follow_riders(all, world);
        }
        Ok(all)
    }

    /// Working memory of f32, as for [`Operation::ride`].
    fn wide(&self, len: usize) -> Result<Raw, Error> {
        let mut scratch = self.nccl.scratch[self.enqueuing.lane].lock();
        let buffer = Scratch::of(&mut scratch.wide, &self.enqueuing.gpus.gpu, DType::F32, len)?;
        Ok(part(buffer.view().raw(), 0, len))
    }

    /// out = the sum of `inputs`, in order.
    fn combine(&self, inputs: &[Raw], out: Raw, job: Fold<'_>) {
        let sources: Vec<*const u8> = inputs.iter().map(|input| input.pointer.as_ptr().cast_const()).collect();
        let outputs = [out.pointer.as_ptr()];
        // SAFETY: as for `ride`.
        unsafe { self.enqueuing.stream.fold(&Fold { inputs: &sources, outputs: &outputs, count: out.len, ..job }) };
    }

    /// `input` in f32: as it is, or copied to `wide`.
    fn widened(&self, input: Raw, wide: Raw) -> Raw {
        if input.dtype == wide.dtype {
            return input;
        }
        let to = part(wide, 0, input.len);
        self.combine(&[input], to, Fold { output: DType::F32, ..Reduction::Sum.first(input.dtype) });
        to
    }

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
        let calls = |group: &Group<'_>| {
            let each = |section: usize| {
                let own = if in_place { sections.in_full(section, world, rank) } else { sections.in_shard(section) };
                group.all_gather(whole(output, sections, section, world), input.range(own).raw())
            };
            filled(sections).map(each).collect()
        };
        self.ride(None, calls)?;
        Ok(((world - 1) * chunk * operands.dtype.bytes()) as u64)
    }

    fn broadcast(&mut self, operands: &Operands, root: usize) -> Result<u64, Error> {
        let buffer = operands.input.as_ref().or(operands.output.as_ref()).expect("a rank sends or receives").raw();
        self.ride(None, |group| if buffer.len == 0 { Vec::new() } else { vec![group.broadcast(buffer, root)] })?;
        let taken = if operands.input.is_some() { self.world - 1 } else { 0 };
        Ok((taken * buffer.len * operands.dtype.bytes()) as u64)
    }

    fn reduce_scatter(&mut self, scattered: &Scattered) -> Result<u64, Error> {
        let Scattered { operands, chunk, reduction, accumulate, sidebands, sections, .. } = scattered;
        let (world, sections) = (self.world, cut(sections, *chunk));
        let input = operands.input.as_ref().expect("every rank has an input").raw();
        let output = operands.output.as_ref().expect("a reduction has an output").raw();
        // Sums of f32 go where they belong; all others are made in f32 first.
        let is_direct = [operands.dtype, operands.to] == [DType::F32; 2] && *reduction == Reduction::Sum && !accumulate;
        let (mut from, mut sums) = (input, output);
        if !is_direct {
            let widened = if operands.dtype == DType::F32 { 0 } else { input.len };
            let wide = self.wide(chunk + widened)?;
            sums = part(wide, 0, *chunk);
            from = self.widened(input, part(wide, *chunk, widened));
        }
        let numbers = sidebands.as_ref().filter(|sidebands| !sidebands.totals.is_empty());
        let own = numbers.map(|sidebands| sidebands.own.raw());
        let riders = self.ride(own, |group| {
            let each = |section: usize| {
                let (all, own) = (full(&sections, section, world), sections.in_shard(section));
                group.reduce_scatter(part(sums, own.start, own.len()), part(from, all.start, all.len()))
            };
            filled(&sections).map(each).collect()
        })?;
        if !is_direct {
            self.finish(sums, output, operands, *reduction, *accumulate);
        }
        if let Some(Sidebands { totals, accumulate, .. }) = numbers {
            let each = 1 + totals.len();
            let of_ranks: Vec<Raw> = (0..world).map(|rank| part(riders, rank * each + 1, totals.len())).collect();
            // So many at a time as a kernel takes; the order is the ranks' all the same.
            for (index, inputs) in of_ranks.chunks(CudaStream::INPUTS).enumerate() {
                let job = Fold { accumulate: *accumulate || index > 0, ..Reduction::Sum.first(DType::F64) };
                self.combine(inputs, totals.raw(), job);
            }
        }
        Ok(((world - 1) * chunk * operands.dtype.bytes()) as u64)
    }

    /// Puts sums of f32 where they belong, with what is left of the reduction.
    fn finish(&self, sums: Raw, output: Raw, operands: &Operands, reduction: Reduction, accumulate: bool) {
        let whole = fold(operands, reduction, self.world);
        let job = Fold { dtype: DType::F32, accumulate, ..whole };
        self.combine(&[sums], part(output, 0, sums.len), job);
    }

    fn all_reduce(&mut self, operands: &Operands, len: usize, reduction: Reduction) -> Result<u64, Error> {
        let input = operands.input.as_ref().expect("every rank has an input").raw();
        let output = operands.output.as_ref().expect("a reduction has an output").raw();
        let is_direct = operands.dtype == operands.to && operands.dtype != DType::Bf16 && reduction == Reduction::Sum;
        let (mut from, mut sums) = (input, output);
        if !is_direct {
            sums = self.wide(len)?;
            from = self.widened(input, sums);
        }
        let reduce = |group: &Group<'_>| if len == 0 { Vec::new() } else { vec![group.all_reduce(sums, from)] };
        self.ride(None, reduce)?;
        if !is_direct {
            self.finish(sums, output, operands, reduction, false);
        }
        let each = len.div_ceil(self.world);
        Ok(((self.world - 1) * each * (operands.dtype.bytes() + operands.to.bytes())) as u64)
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

fn whole(output: &Span, sections: &Sections, section: usize, world: usize) -> Raw {
    output.range(full(sections, section, world)).raw()
}
