//! Operations that combine the ranks' buffers.
//!
//! Reductions run in order of rank; on several hosts in order of rank on each, and then in order of
//! hosts.

use pillion_kernels::{Buffer, DType, Event};

use crate::algorithms::{self, BriefAllReduce, Combination, Operands, Sidebands};
use crate::checks::{checked, expect, same_device};
use crate::memory::control::Channel;
use crate::operations::{Start, operands};
use crate::reduce::{Comparison, Reduce, Sideband, Summand, Sums};
use crate::sections::SIDEBAND;
use crate::{Communicator, Error, Pending, Reduction, Sections};

/// Buffers and arguments are as for the other operations.
impl Communicator {
    /// Combines the inputs of all ranks, and gives each rank its part.
    pub fn reduce_scatter(&self, reduce: Reduce, start: impl Into<Start>) -> Pending<Reduce> {
        let operation = checked!(self.scatter_operation(&reduce, None), reduce);
        self.run(operation, Channel::Reduce, start.into(), reduce)
    }

    /// Adds the ranks' summands to the output of an earlier reduction, and their numbers to its
    /// totals, once that is complete. The host does not wait. One of the two with a sideband and
    /// the other without is misuse.
    pub fn reduce_scatter_onto(
        &self,
        summand: Summand,
        sections: Option<Sections>,
        mut earlier: Pending<Sums>,
        reduction: Reduction,
        after: Event,
    ) -> (Pending<Summand>, Pending<Sums>) {
        let after = Event::all([after, earlier.event()]);
        let Some(Sums { output, totals }) = earlier.take_in_flight() else {
            // The other ranks of this communicator would wait for this one.
            earlier.failure().map(|failure| self.group.fail_after(failure));
            return (earlier.like(summand), earlier);
        };
        let Summand { input, own } = summand;
        if own.is_some() != totals.is_some() {
            let error =
                Error::Misuse { reason: "a reduction adds a sideband where the earlier one had one".to_owned() };
            let ended = || Err(error.clone());
            return (Pending::ended(ended(), Summand { input, own }), Pending::ended(ended(), Sums { output, totals }));
        }
        let sideband = own.zip(totals).map(|(own, totals)| Sideband { own, totals });
        let reduce = Reduce { input, sections, output, reduction, accumulate: true, sideband };
        self.reduce_scatter(reduce, after).split()
    }

    /// Whether a rank that combines reads every rank's input where it lies, as
    /// [`Communicator::reduce_scatter_compared`] must: all ranks are on one host.
    pub fn can_compare(&self) -> bool {
        !self.group.has_wire()
    }

    /// As [`Communicator::reduce_scatter`], and compares every rank's part with the sum while it is
    /// made. Nothing more is moved. Misuse unless [`Communicator::can_compare`], for a sum in f32
    /// that is not accumulated.
    pub fn reduce_scatter_compared(
        &self,
        reduce: Reduce,
        comparison: Comparison,
        start: impl Into<Start>,
    ) -> Pending<(Reduce, Comparison)> {
        let operation = self
            .check_comparison(&reduce, &comparison)
            .and_then(|comparing| self.scatter_operation(&reduce, Some(comparing)));
        let operation = checked!(operation, (reduce, comparison));
        self.run(operation, Channel::Reduce, start.into(), (reduce, comparison))
    }

    fn check_comparison(&self, reduce: &Reduce, comparison: &Comparison) -> Result<algorithms::Comparing, Error> {
        let Comparison { totals, limit } = comparison;
        expect(self.can_compare(), || "terms are compared on one host".to_owned())?;
        let is_sum = reduce.reduction == Reduction::Sum && reduce.output.dtype() == DType::F32 && !reduce.accumulate;
        let is_sum = is_sum && matches!(reduce.input.dtype(), DType::F32 | DType::Bf16);
        expect(is_sum, || "terms, f32 or bf16, are compared with their sum in f32".to_owned())?;
        let sections = reduce.sections.as_ref().map_or(1, Sections::count);
        let len = sections * Comparison::len(self.world());
        let fits = totals.len() == len && totals.dtype() == DType::F64;
        expect(fits, || format!("a comparison is {len} × f64, and not {totals:?}"))?;
        same_device(&reduce.input, totals)?;
        Ok(algorithms::Comparing { totals: totals.span(), sections, limit: *limit })
    }

    fn scatter_operation(
        &self,
        reduce: &Reduce,
        comparison: Option<algorithms::Comparing>,
    ) -> Result<algorithms::Operation, Error> {
        let Reduce { input, sections, output, reduction, accumulate, sideband } = reduce;
        let combination = self.combination(*reduction, input, output)?;
        let world = self.world();
        let is_cut = sections.as_ref().is_none_or(|sections| sections.shard_len() == output.len());
        let fits = is_cut && world.checked_mul(output.len()).is_some_and(|len| input.len() >= len);
        expect(fits, || {
            format!(
                "a reduce-scatter of {input:?} over {world} ranks into {output:?}: the input has a part for each rank"
            )
        })?;
        let sidebands = match sideband {
            None => None,
            Some(Sideband { own, totals }) => {
                let len = SIDEBAND * sections.as_ref().map_or(1, Sections::count);
                let fits = own.len() >= len && totals.len() == len;
                for numbers in [own, totals] {
                    let fits = fits && numbers.dtype() == DType::F64;
                    expect(fits, || format!("a sideband is {len} × f64, and not {own:?} and {totals:?}"))?;
                    same_device(input, numbers)?;
                }
                Some(Sidebands { own: own.span().range(0..len), totals: totals.span(), accumulate: *accumulate })
            }
        };
        let (chunk, operands) = (output.len(), operands(Some(input), Some(output)));
        let (hosts, sections) = (&self.group.hosts, sections.clone());
        let operation = algorithms::reduce_scatter(
            hosts,
            operands,
            chunk,
            combination,
            *accumulate,
            sections,
            sidebands,
            comparison,
        );
        Ok(operation)
    }

    /// Part r of rank r's buffer = the ranks' parts r combined, in order of rank; the other parts
    /// are unchanged. `buffer: [world · n]`.
    pub fn reduce_scatter_in_place(
        &self,
        buffer: Buffer,
        reduction: Reduction,
        start: impl Into<Start>,
    ) -> Pending<Buffer> {
        let chunk = checked!(self.chunk_of(&buffer), buffer);
        let combination = checked!(self.combination(reduction, &buffer, &buffer), buffer);
        let mut operands = operands(Some(&buffer), Some(&buffer));
        operands.output = Some(buffer.span().range(self.rank() * chunk..(self.rank() + 1) * chunk));
        let hosts = &self.group.hosts;
        let operation = algorithms::reduce_scatter(hosts, operands, chunk, combination, false, None, None, None);
        self.run(operation, Channel::Reduce, start.into(), buffer)
    }

    /// buffer = the ranks' buffers combined, in order of rank. `buffer: [n]`.
    pub fn all_reduce(&self, buffer: Buffer, reduction: Reduction, start: impl Into<Start>) -> Pending<Buffer> {
        let combination = checked!(self.combination(reduction, &buffer, &buffer), buffer);
        let operands = operands(Some(&buffer), Some(&buffer));
        self.run_all_reduce(operands, buffer.len(), combination, start.into(), buffer)
    }

    /// output = the ranks' inputs combined, in order of rank. `input: [n]`, unchanged; `output:
    /// [n]` of its type, or f32 for 16-bit floats.
    pub fn all_reduce_into(
        &self,
        input: Buffer,
        output: Buffer,
        reduction: Reduction,
        start: impl Into<Start>,
    ) -> Pending<(Buffer, Buffer)> {
        let fits = expect(input.len() == output.len(), || {
            format!("an all-reduce of {input:?} into {output:?}: give lengths that are equal")
        });
        let combination = fits.and_then(|()| self.combination(reduction, &input, &output));
        let combination = checked!(combination, (input, output));
        let operands = operands(Some(&input), Some(&output));
        self.run_all_reduce(operands, input.len(), combination, start.into(), (input, output))
    }

    /// Combines the output of a reduce-scatter over the ranks of this communicator, in place, once
    /// the reduce-scatter is complete. It may be one of another communicator: that of the ranks
    /// that share the output's place with this one. The host does not wait.
    pub fn all_reduce_sums(&self, mut sums: Pending<Sums>, reduction: Reduction) -> Pending<Sums> {
        let after = sums.event();
        let Some(sums) = sums.take_in_flight() else {
            // The other ranks of this communicator would wait for this one.
            sums.failure().map(|failure| self.group.fail_after(failure));
            return sums;
        };
        let combination = checked!(self.combination(reduction, &sums.output, &sums.output), sums);
        let operands = operands(Some(&sums.output), Some(&sums.output));
        self.run_all_reduce(operands, sums.output.len(), combination, Start::After(after), sums)
    }

    fn run_all_reduce<T>(
        &self,
        operands: Operands,
        len: usize,
        combination: Combination,
        start: Start,
        value: T,
    ) -> Pending<T> {
        let hosts = &self.group.hosts;
        if BriefAllReduce::fits(hosts, len * operands.dtype.bytes()) {
            return self.run(BriefAllReduce::new(operands, len, combination), Channel::Reduce, start, value);
        }
        let operation = algorithms::all_reduce(hosts, self.rank(), operands, len, combination);
        self.run(operation, Channel::Reduce, start, value)
    }

    /// The root's output = the ranks' inputs combined, in order of rank. `input: [n]`, unchanged;
    /// `output: [n]` of its type on the root, nothing elsewhere.
    pub fn reduce(
        &self,
        input: Buffer,
        output: Option<Buffer>,
        reduction: Reduction,
        root: usize,
        start: impl Into<Start>,
    ) -> Pending<(Buffer, Option<Buffer>)> {
        let combination = self
            .check_root("reduce", root, &input, output.as_ref(), input.len())
            .and_then(|()| self.combination(reduction, &input, output.as_ref().unwrap_or(&input)));
        let combination = checked!(combination, (input, output));
        let operands = operands(Some(&input), output.as_ref());
        let operation = algorithms::reduce(&self.group.hosts, operands, input.len(), combination, root);
        self.run(operation, Channel::Reduce, start.into(), (input, output))
    }

    fn combination(&self, reduction: Reduction, input: &Buffer, output: &Buffer) -> Result<Combination, Error> {
        let (dtype, output_dtype) = (input.dtype(), output.dtype());
        let name = reduction.name();
        let fits = reduction.supports(dtype, output_dtype);
        expect(fits, || format!("there is no {name} of {dtype} into {output_dtype}: see Reduction::supports"))?;
        same_device(input, output)?;
        let (world, groups) = (self.world(), self.group.options.reduce_groups);
        Ok(Combination { reduction, output: output_dtype, world, groups })
    }
}
