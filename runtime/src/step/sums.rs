//! What ranks agree on at the end of a step: sums of scalars.

use std::ops::Range;
use std::time::Duration;

use pillion_collectives::Reduction;
use pillion_kernels::{Event, Stamp};

use super::{REQUESTS, Step};
use crate::Error;
use crate::engine::{Engine, Health, UnitNorms};
use crate::gradients::sideband;
use crate::layout::ALIGNMENT;
use crate::policy::COMPARED;
use crate::report::{StepReport, comparison};

impl Step<'_> {
    /// The one scalar all-reduce of a step.
    pub(super) fn sum(&mut self, requests: &mut [f64]) -> Result<StepReport, Error> {
        let waiting = self.engine.stream.stamp();
        let Engine { stream, gradients, .. } = &mut *self.engine;
        gradients.bring_all(&**stream)?;
        self.waited(waiting, 0..0);
        let Engine { stream, gradients, layout, summary, weights, axes, measures_groups, .. } = &mut *self.engine;
        // Each number is one rank's to give: totals are the same on all ranks of a group, and sums on those that hold the same shard, which divide them.
        let mut values = [0.0f64; SUMS + REQUESTS + COMPARISON];
        let [group_square_norms, _, loss_sum, tokens, square_norm, non_finite, measuring] = [0, 1, 2, 3, 4, 5, 6];
        // Each rank gives its own, in the place that sidebands leave at 0.
        values[tokens] = self.all_tokens as f64;
        values[measuring] = f64::from(u8::from(*measures_groups));
        let world = axes.world.world() as f64;
        for unit in 0..layout.units.len() {
            let (gradient, unit_totals) = gradients.sums(unit);
            let part = part(gradient.len(), axes.mesh.replicate, axes.replica());
            stream.square_norm(summary.norm_mut(unit), gradient.slice(part), 1.0);
            summary.collect_totals(unit, unit_totals, &**stream);
            if self.comparison.is_some() {
                summary.collect_comparison(unit, gradients.compared(unit), &**stream);
            }
        }
        // The host waits for the device here, and nowhere else in a step.
        summary.read(&**stream)?;
        for unit in 0..layout.units.len() {
            if axes.shard_number() == 0 {
                values.iter_mut().zip(summary.totals(unit)).for_each(|(value, total)| *value += total);
            }
            let norm = summary.norm(unit);
            values[square_norm] += norm[0];
            values[non_finite] += norm[1];
        }
        // What was read comes after every kernel that reads weights.
        weights.release(&Event::PAST)?;
        let requested = SUMS..SUMS + requests.len();
        values[requested.clone()].copy_from_slice(requests);
        // The square of this rank's tokens, and what its part of each unit says.
        let compared =
            requested.end..requested.end + if self.comparison.is_some() { 3 + axes.world.world() } else { 0 };
        if let [square, found @ ..] = &mut values[compared.clone()] {
            *square = (self.tokens as f64).powi(2);
            for unit in 0..layout.units.len() {
                found.iter_mut().zip(summary.comparison(unit)).for_each(|(found, of_unit)| *found += of_unit);
            }
        }
        let waiting = Stamp::now();
        axes.world.all_reduce_scalars(&mut values[..compared.end], Reduction::Sum)?;
        self.waited_until(waiting, Stamp::now(), "agree", 0..0);
        self.record_collectives();
        requests.copy_from_slice(&values[requested]);
        let (loss_sum, tokens) = (values[loss_sum], values[tokens]);
        // What is not finite in a micro-batch is not finite in the sum either, which can be infinite where its terms were not.
        if values[non_finite] > 0.0 || !loss_sum.is_finite() {
            self.engine.health = Health::Good;
            return Err(Error::NonFinite {
                step: self.engine.updates + 1,
                count: values[non_finite] as u64,
                loss: loss_sum / tokens,
            });
        }
        if tokens == 0.0 {
            self.engine.health = Health::Good;
            return Err(Error::NoTokens { step: self.engine.updates + 1 });
        }
        self.sum_units()?;
        Ok(StepReport {
            loss_sum,
            tokens,
            gradient_norm: values[square_norm].sqrt() / tokens,
            square_norm: values[square_norm],
            group_square_norms: (values[measuring] == world).then_some(values[group_square_norms]),
            comparison: comparison(&values[compared], tokens, world),
            exposed: Duration::ZERO,
            host_waits: 0,
            operations: 0,
            bytes: 0,
        })
    }

    /// Sums the square norms of each unit, where they are wanted.
    fn sum_units(&mut self) -> Result<(), Error> {
        let Engine { summary, axes, unit_norms, unit_sums, .. } = &mut *self.engine;
        if unit_norms.is_empty() {
            return Ok(());
        }
        let is_first = axes.shard_number() == 0;
        for (unit, pair) in unit_sums.chunks_exact_mut(2).enumerate() {
            pair[0] = if is_first { summary.totals(unit)[sideband::SQUARE_NORM.start] } else { 0.0 };
            pair[1] = summary.norm(unit)[0];
        }
        let waiting = Stamp::now();
        axes.world.all_reduce_scalars(unit_sums, Reduction::Sum)?;
        for (norms, pair) in unit_norms.iter_mut().zip(unit_sums.chunks_exact(2)) {
            *norms = UnitNorms { group_square_norms: pair[0], square_norm: pair[1] };
        }
        self.waited_until(waiting, Stamp::now(), "agree on units", 0..0);
        Ok(())
    }
}

/// Most numbers that a comparison adds to these.
const COMPARISON: usize = 3 + COMPARED;

/// Numbers that the ranks sum in a step, before the requests: totals of the sidebands, with the
/// number of tokens in the place that these do not use; the square norm; the number of values that
/// are not finite, and of ranks that measure groups.
pub(crate) const SUMS: usize = sideband::LEN + 3;

/// The part number `number` of `parts` of a buffer of `len` elements, as a layout would cut it.
fn part(len: usize, parts: usize, number: usize) -> Range<usize> {
    let part = len.div_ceil(parts).next_multiple_of(ALIGNMENT);
    (number * part).min(len)..((number + 1) * part).min(len)
}
