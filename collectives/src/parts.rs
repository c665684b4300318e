//! Operations whose parts, one for each rank, have lengths of their own.

use pillion_kernels::{Buffer, DType, Span};

use crate::checks::{checked, expect};
use crate::operations::Start;
use crate::pending::Pending;
use crate::request::{Collective, Parted, PartedForm, Request};
use crate::{Communicator, Error, Reduction};

/// An operand in parts, one for each rank, in their order: of any lengths, in one buffer or in one
/// each.
#[derive(Debug)]
pub struct Parts {
    buffers: Vec<Buffer>,
    /// How the one buffer is cut, where it is one.
    lengths: Option<Box<[usize]>>,
}

impl Parts {
    /// One buffer, which is a row of parts of these lengths, and maybe more.
    ///
    /// # Errors
    /// [`Error::Misuse`] when the parts are longer than the buffer.
    pub fn cut(buffer: Buffer, lengths: &[usize]) -> Result<Parts, Error> {
        let len = lengths.iter().try_fold(0usize, |sum, &len| sum.checked_add(len));
        expect(len.is_some_and(|len| len <= buffer.len()), || {
            format!("parts of {lengths:?} elements of {buffer:?}: give lengths that fit")
        })?;
        Ok(Parts { buffers: vec![buffer], lengths: Some(lengths.into()) })
    }

    /// A buffer for each part.
    pub fn list(buffers: Vec<Buffer>) -> Parts {
        Parts { buffers, lengths: None }
    }

    /// The one buffer, or one for each part.
    pub fn into_buffers(self) -> Vec<Buffer> {
        self.buffers
    }

    /// As [`Parts::into_buffers`].
    pub fn buffers(&self) -> &[Buffer] {
        &self.buffers
    }

    /// Number of parts.
    fn count(&self) -> usize {
        self.lengths.as_ref().map_or(self.buffers.len(), |lengths| lengths.len())
    }

    fn spans(&self) -> Box<[Span]> {
        let Some(lengths) = &self.lengths else { return self.buffers.iter().map(Buffer::span).collect() };
        let (whole, mut start) = (self.buffers[0].span(), 0);
        let part = |&len: &usize| {
            start += len;
            whole.range(start - len..start)
        };
        lengths.iter().map(part).collect()
    }
}

/// Lengths may differ from rank to rank as far as an operation allows. What one rank sends is what
/// another receives: otherwise the operation ends with [`Error::Mismatch`] on a rank that finds it,
/// before that has written anything, and with [`Error::Aborted`] on the others, as soon as they
/// wait for it; and the communicator with it.
impl Communicator {
    /// Part p of the output = the shard of rank p. `shard: [n_r]` on rank r, unchanged; `output`:
    /// parts of n_0, n_1, … elements.
    pub fn all_gather_v(&self, shard: Buffer, output: Parts, start: impl Into<Start>) -> Pending<(Buffer, Parts)> {
        let (input, spans) = ([shard.span()].into(), output.spans());
        let checked = self.check_parts("an all-gather-v's output", &output, shard.dtype(), &shard).and_then(|()| {
            let own = spans[self.rank()].len();
            expect(shard.len() == own, || format!("{shard:?} where this rank's part of the output has {own} elements"))
        });
        checked!(checked, (shard, output));
        let collective = parted(PartedForm::AllGather, input, spans, shard.dtype(), shard.dtype());
        self.run(collective, start.into(), (shard, output))
    }

    /// Part p of the parts = that of rank p. `parts` as for [`Communicator::all_gather_v`].
    pub fn all_gather_v_in_place(&self, parts: Parts, start: impl Into<Start>) -> Pending<Parts> {
        let dtype = checked!(self.check_own_parts("an all-gather-v", &parts), parts);
        let spans = parts.spans();
        let collective = parted(PartedForm::AllGather, [spans[self.rank()].clone()].into(), spans, dtype, dtype);
        self.run(collective, start.into(), parts)
    }

    /// Part p of the root's output = the shard of rank p. `shard: [n_r]` on rank r, unchanged;
    /// `output`: parts of n_0, n_1, … elements on the root, nothing elsewhere.
    pub fn gather_v(
        &self,
        shard: Buffer,
        output: Option<Parts>,
        root: usize,
        start: impl Into<Start>,
    ) -> Pending<(Buffer, Option<Parts>)> {
        let checked = self.check_root_parts("gather-v", root, &shard, output.as_ref());
        checked!(checked, (shard, output));
        let (input, spans) = ([shard.span()].into(), output.as_ref().map(Parts::spans).unwrap_or_default());
        let collective = parted(PartedForm::Gather { root }, input, spans, shard.dtype(), shard.dtype());
        self.run(collective, start.into(), (shard, output))
    }

    /// output = part r of the root's input, on rank r. `input`: parts of n_0, n_1, … elements on
    /// the root, unchanged, nothing elsewhere; `output: [n_r]` on rank r.
    pub fn scatter_v(
        &self,
        input: Option<Parts>,
        output: Buffer,
        root: usize,
        start: impl Into<Start>,
    ) -> Pending<(Option<Parts>, Buffer)> {
        let checked = self.check_root_parts("scatter-v", root, &output, input.as_ref());
        checked!(checked, (input, output));
        let (spans, own) = (input.as_ref().map(Parts::spans).unwrap_or_default(), [output.span()].into());
        let collective = parted(PartedForm::Scatter { root }, spans, own, output.dtype(), output.dtype());
        self.run(collective, start.into(), (input, output))
    }

    /// Part p of the output = part r of the input of rank p, on rank r. `input`: what each rank
    /// gets, unchanged; `output`: what comes from each rank.
    pub fn all_to_all_v(&self, input: Parts, output: Parts, start: impl Into<Start>) -> Pending<(Parts, Parts)> {
        let checked = self.check_own_parts("an all-to-all-v", &input).and_then(|dtype| {
            self.check_parts("an all-to-all-v's output", &output, dtype, &input.buffers[0]).map(|()| dtype)
        });
        let dtype = checked!(checked, (input, output));
        let collective = parted(PartedForm::AllToAll, input.spans(), output.spans(), dtype, dtype);
        self.run(collective, start.into(), (input, output))
    }

    /// output = part r of the ranks' inputs combined, in order of rank, on rank r. `input`: parts
    /// of n_0, n_1, … elements, the same on every rank, unchanged; `output: [n_r]` on rank r, of
    /// their type, or f32 for 16-bit floats.
    pub fn reduce_scatter_v(
        &self,
        input: Parts,
        output: Buffer,
        reduction: Reduction,
        start: impl Into<Start>,
    ) -> Pending<(Parts, Buffer)> {
        let checked = self.check_own_parts("a reduce-scatter-v", &input).and_then(|dtype| {
            self.check_reduction(reduction, &input.buffers[0], &output)?;
            let own = input.spans()[self.rank()].len();
            expect(output.len() == own, || {
                format!("{output:?} where this rank's part of the input has {own} elements")
            })?;
            Ok(dtype)
        });
        let dtype = checked!(checked, (input, output));
        let form = PartedForm::ReduceScatter { reduction };
        let collective = parted(form, input.spans(), [output.span()].into(), dtype, output.dtype());
        self.run(collective, start.into(), (input, output))
    }

    /// Part r of rank r's parts = the ranks' parts r combined, in order of rank; the other parts
    /// are unchanged. `parts` as for [`Communicator::reduce_scatter_v`].
    pub fn reduce_scatter_v_in_place(
        &self,
        parts: Parts,
        reduction: Reduction,
        start: impl Into<Start>,
    ) -> Pending<Parts> {
        let checked = self.check_own_parts("a reduce-scatter-v", &parts).and_then(|dtype| {
            self.check_reduction(reduction, &parts.buffers[0], &parts.buffers[0])?;
            Ok(dtype)
        });
        let dtype = checked!(checked, parts);
        let spans = parts.spans();
        let own = [spans[self.rank()].clone()].into();
        let collective = parted(PartedForm::ReduceScatter { reduction }, spans, own, dtype, dtype);
        self.run(collective, start.into(), parts)
    }

    /// As many parts as ranks, of one type, in memory of one device: that type.
    fn check_own_parts(&self, what: &str, parts: &Parts) -> Result<DType, Error> {
        let world = self.world();
        let Some(dtype) = parts.buffers.first().map(Buffer::dtype) else {
            return Err(Error::Misuse { reason: format!("{what} of no parts: give one for each of {world} ranks") });
        };
        self.check_parts(what, parts, dtype, &parts.buffers[0])?;
        Ok(dtype)
    }

    /// As many parts as ranks, of this type, in memory of the same device as `beside`.
    fn check_parts(&self, what: &str, parts: &Parts, dtype: DType, beside: &Buffer) -> Result<(), Error> {
        let (world, count) = (self.world(), parts.count());
        expect(count == world, || format!("{what} of {count} parts: give one for each of {world} ranks"))?;
        self.check_space(beside)?;
        for buffer in &parts.buffers {
            expect(buffer.dtype() == dtype, || format!("{what} of {buffer:?} beside {dtype}: give one type"))?;
            self.same_device(beside, buffer)?;
        }
        Ok(())
    }

    /// What only the root has: parts of the type of what every rank has, its own as long as that.
    fn check_root_parts(&self, name: &str, root: usize, every: &Buffer, only: Option<&Parts>) -> Result<(), Error> {
        self.check_rank(&format!("a {name} with root"), root)?;
        expect(only.is_some() == (self.rank() == root), || {
            format!("a {name}'s root, rank {root}, gives the parts, and nobody else")
        })?;
        self.check_space(every)?;
        let Some(only) = only else { return Ok(()) };
        self.check_parts(&format!("a {name}"), only, every.dtype(), every)?;
        let own = only.spans()[root].len();
        expect(every.len() == own, || format!("{every:?} where the root's part for itself has {own} elements"))
    }
}

fn parted(form: PartedForm, input: Box<[Span]>, output: Box<[Span]>, dtype: DType, to: DType) -> Request {
    Request::Collective(Collective::Parts(Parted { form, input, output, dtype, to }))
}
