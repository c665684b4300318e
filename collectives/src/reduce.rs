//! The buffers of a reduce-scatter.

use std::sync::Arc;

use pillion_kernels::Buffer;
use pillion_kernels::cpu::observe::Observer;

use crate::memory::control::PAYLOAD;
use crate::{Pending, Reduction, Sections};

/// A reduce-scatter's buffers.
#[derive(Debug)]
pub struct Reduce {
    /// This rank's summand, `[≥ world · n]`; unchanged, and not read beyond.
    pub input: Buffer,
    /// How the summand is cut; none: into one chunk for each rank.
    pub sections: Option<Sections>,
    /// `[n]`: the ranks' parts of this rank combined, in order of rank. Of the input's type, or f32
    /// for 16-bit floats.
    pub output: Buffer,
    /// How elements are combined.
    pub reduction: Reduction,
    /// Whether the result is combined with `output` (and sums are added to totals) instead of replacing it.
    pub accumulate: bool,
    /// Numbers that ride along.
    pub sideband: Option<Sideband>,
}

/// Numbers that ride on a reduce-scatter: no operation more, no buffer more.
#[derive(Debug)]
pub struct Sideband {
    /// `[≥ n]` f64: n numbers of this rank; unchanged, and not read beyond.
    pub own: Buffer,
    /// `[n]` f64: the sums of the ranks' numbers, in order of rank. At most [`Sideband::MAX`].
    pub totals: Buffer,
}

impl Sideband {
    /// Most numbers: they travel in the operation's header.
    pub const MAX: usize = PAYLOAD;
}

/// What a reduce-scatter reads, until it is complete.
#[derive(Debug)]
pub struct Summand {
    /// As in [`Reduce`].
    pub input: Buffer,
    /// [`Sideband::own`].
    pub own: Option<Buffer>,
}

/// What a reduce-scatter writes.
#[derive(Debug)]
pub struct Sums {
    /// As in [`Reduce`].
    pub output: Buffer,
    /// [`Sideband::totals`].
    pub totals: Option<Buffer>,
}

impl Reduce {
    /// What is read, and what is written.
    pub fn split(self) -> (Summand, Sums) {
        let (own, totals) = self.sideband.map(|Sideband { own, totals }| (own, totals)).unzip();
        (Summand { input: self.input, own }, Sums { output: self.output, totals })
    }
}

impl Pending<Reduce> {
    /// The same reduce-scatter, whose summand and sums come back apart.
    pub fn split(self) -> (Pending<Summand>, Pending<Sums>) {
        self.form_in_flight(Reduce::split).split()
    }
}

/// The ranks' inputs of a reduce-scatter beside their sum, in this rank's part, as an observer sees
/// them.
#[derive(Debug)]
pub struct Observation {
    /// What the observer takes of this rank's part, replaced: `[numbers]` f64 for each section, as
    /// [`Observer::numbers`] says of as many terms as there are ranks.
    pub totals: Buffer,
    /// Who looks.
    pub observer: Arc<dyn Observer>,
}
