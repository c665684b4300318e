//! Operations that combine the ranks' buffers.
//!
//! Reductions run in order of rank; on several hosts in order of rank on each, and then in order of
//! hosts.

use pillion_kernels::{Buffer, DType, Event};

use crate::checks::{checked, expect};
use crate::operations::Start;
use crate::reduce::{Observation, Reduce, Sideband, Summand, Sums};
use crate::request::{Collective, Observing, Operands, Request, Scattered, Sidebands};
use crate::{Communicator, Error, Pending, Reduction, Sections};

/// Buffers and arguments are as for the other operations.
impl Communicator {
    /// Combines the inputs of all ranks, and gives each rank its part.
    pub fn reduce_scatter(&self, reduce: Reduce, start: impl Into<Start>) -> Pending<Reduce> {
        let collective = checked!(self.scatter_request(&reduce, None), reduce);
        self.run(Request::Collective(collective), start.into(), reduce)
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
            earlier.failure().map(|failure| self.transport.fail_after(failure));
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

    /// As [`Communicator::reduce_scatter`], while an observer looks at every rank's part beside the
    /// sum. Nothing more is moved. Misuse unless
    /// [`reads_peers_in_place`](crate::Capabilities::reads_peers_in_place), for a sum in f32 that
    /// is not accumulated, of terms that the observer supports.
    pub fn reduce_scatter_observed(
        &self,
        reduce: Reduce,
        observation: Observation,
        start: impl Into<Start>,
    ) -> Pending<(Reduce, Observation)> {
        let collective = self
            .check_observation(&reduce, &observation)
            .and_then(|observing| self.scatter_request(&reduce, Some(observing)));
        let collective = checked!(collective, (reduce, observation));
        self.run(Request::Collective(collective), start.into(), (reduce, observation))
    }

    fn check_observation(&self, reduce: &Reduce, observation: &Observation) -> Result<Observing, Error> {
        let Observation { totals, observer } = observation;
        expect(self.capabilities().reads_peers_in_place, || "terms are observed on one host".to_owned())?;
        let is_sum = reduce.reduction == Reduction::Sum && reduce.output.dtype() == DType::F32 && !reduce.accumulate;
        expect(is_sum, || "terms are observed beside their sum in f32, which is not accumulated".to_owned())?;
        let dtype = reduce.input.dtype();
        expect(observer.supports(dtype), || format!("{observer:?} does not look at terms of {dtype}"))?;
        let sections = reduce.sections.as_ref().map_or(1, Sections::count);
        let len = sections * observer.numbers(self.world());
        let fits = totals.len() == len && totals.dtype() == DType::F64;
        expect(fits, || format!("an observation is {len} × f64, and not {totals:?}"))?;
        self.same_device(&reduce.input, totals)?;
        Ok(Observing { totals: totals.span(), sections, observer: observer.clone() })
    }

    fn scatter_request(&self, reduce: &Reduce, observing: Option<Observing>) -> Result<Collective, Error> {
        let Reduce { input, sections, output, reduction, accumulate, sideband } = reduce;
        self.check_reduction(*reduction, input, output)?;
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
                let len = totals.len();
                let fits = own.len() >= len && len <= Sideband::MAX;
                for numbers in [own, totals] {
                    let fits = fits && numbers.dtype() == DType::F64;
                    expect(fits, || {
                        let most = Sideband::MAX;
                        format!(
                            "a sideband is as many × f64 on both sides, at most {most}, and not {own:?} and {totals:?}"
                        )
                    })?;
                    self.same_device(input, numbers)?;
                }
                Some(Sidebands { own: own.span().range(0..len), totals: totals.span(), accumulate: *accumulate })
            }
        };
        Ok(Collective::ReduceScatter(Scattered {
            operands: Operands::of(Some(input), Some(output)),
            chunk: output.len(),
            sections: sections.clone(),
            reduction: *reduction,
            accumulate: *accumulate,
            sidebands,
            observing,
        }))
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
        checked!(self.check_reduction(reduction, &buffer, &buffer), buffer);
        let mut operands = Operands::of(Some(&buffer), Some(&buffer));
        operands.output = Some(buffer.span().range(self.rank() * chunk..(self.rank() + 1) * chunk));
        let collective = Collective::ReduceScatter(Scattered {
            operands,
            chunk,
            sections: None,
            reduction,
            accumulate: false,
            sidebands: None,
            observing: None,
        });
        self.run(Request::Collective(collective), start.into(), buffer)
    }

    /// buffer = the ranks' buffers combined, in order of rank. `buffer: [n]`.
    pub fn all_reduce(&self, buffer: Buffer, reduction: Reduction, start: impl Into<Start>) -> Pending<Buffer> {
        checked!(self.check_reduction(reduction, &buffer, &buffer), buffer);
        let (operands, len) = (Operands::of(Some(&buffer), Some(&buffer)), buffer.len());
        self.run(Request::Collective(Collective::AllReduce { operands, len, reduction }), start.into(), buffer)
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
        checked!(fits.and_then(|()| self.check_reduction(reduction, &input, &output)), (input, output));
        let (operands, len) = (Operands::of(Some(&input), Some(&output)), input.len());
        self.run(Request::Collective(Collective::AllReduce { operands, len, reduction }), start.into(), (input, output))
    }

    /// Combines the output of a reduce-scatter over the ranks of this communicator, in place, once
    /// the reduce-scatter is complete. It may be one of another communicator: that of the ranks
    /// that share the output's place with this one. The host does not wait.
    pub fn all_reduce_sums(&self, mut sums: Pending<Sums>, reduction: Reduction) -> Pending<Sums> {
        let after = sums.event();
        let Some(sums) = sums.take_in_flight() else {
            // The other ranks of this communicator would wait for this one.
            sums.failure().map(|failure| self.transport.fail_after(failure));
            return sums;
        };
        checked!(self.check_reduction(reduction, &sums.output, &sums.output), sums);
        let (operands, len) = (Operands::of(Some(&sums.output), Some(&sums.output)), sums.output.len());
        self.run(Request::Collective(Collective::AllReduce { operands, len, reduction }), Start::After(after), sums)
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
        let checked = self
            .check_root("reduce", root, &input, output.as_ref(), input.len())
            .and_then(|()| self.check_reduction(reduction, &input, output.as_ref().unwrap_or(&input)));
        checked!(checked, (input, output));
        let (operands, len) = (Operands::of(Some(&input), output.as_ref()), input.len());
        self.run(
            Request::Collective(Collective::Reduce { operands, len, reduction, root }),
            start.into(),
            (input, output),
        )
    }

    pub(crate) fn check_reduction(&self, reduction: Reduction, input: &Buffer, output: &Buffer) -> Result<(), Error> {
        let (dtype, output_dtype) = (input.dtype(), output.dtype());
        let name = reduction.name();
        let fits = reduction.supports(dtype, output_dtype);
        expect(fits, || format!("there is no {name} of {dtype} into {output_dtype}: see Reduction::supports"))?;
        self.same_device(input, output)
    }
}
