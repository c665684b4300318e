//! The end of a step: gradients are summed, every rank knows the norm, and no rank reads weights any more.

use std::ops::Range;
use std::time::Instant;

use pillion_kernels::{AdamW, DType, Stream, View, ViewMut};

use crate::engine::Health;
use crate::layout::Piece;
use crate::plan::Action;
use crate::report::StepReport;
use crate::step::Step;
use crate::{Error, Unit};

/// A step whose gradients are summed. It ends with [`Agreed::update`] or [`Agreed::update_with`]; one that is dropped leaves the parameters as they were, and the
/// engine unusable, since other ranks may have updated theirs.
#[must_use = "a step ends with an update"]
pub struct Agreed<'e> {
    step: Step<'e>,
    report: StepReport,
}

/// What an update of one unit's shard needs; the views are `[shard]`.
pub struct ShardUpdate<'s> {
    /// The unit.
    pub unit: usize,
    /// Its name and tensors.
    pub layout: &'s Unit,
    /// Where kernels go.
    pub stream: &'s dyn Stream,
    /// The gradient summed over tokens, f32. Zero for frozen tensors and for padding.
    pub gradient: View<'s>,
    /// What makes it the clipped mean: the clip factor divided by the number of tokens.
    pub gradient_scale: f32,
    /// Number of this update, from 1.
    pub step: u64,
    /// Master weights, f32, to be written. Padding stays zero.
    pub master: ViewMut<'s>,
    /// Two numbers for each weight that are kept between steps and saved in checkpoints, f32; zero at first.
    pub m: ViewMut<'s>,
    /// The second of them.
    pub v: ViewMut<'s>,
    /// The parts of tensors that it holds.
    pub pieces: &'s [Piece],
}

impl<'e> Agreed<'e> {
    pub(crate) fn new(step: Step<'e>, report: StepReport) -> Agreed<'e> {
        Agreed { step, report }
    }

    /// What the step has done so far: loss, tokens, norms. The same on every rank.
    pub fn report(&self) -> &StepReport {
        &self.report
    }

    /// This rank's shard of a unit's gradient, summed over tokens: `[shard]` f32, neither averaged nor clipped.
    pub fn gradient(&self, unit: usize) -> View<'_> {
        self.step.engine.gradients.sums(unit).0
    }

    /// The stream that it is complete on.
    pub fn stream(&self) -> &dyn Stream {
        &*self.step.engine.stream
    }

    /// Updates the parameters by AdamW; see [`Step::finish`].
    ///
    /// # Errors
    /// Another rank's failure, after which the parameters may be invalid.
    pub fn update(self, settings: AdamW) -> Result<StepReport, Error> {
        self.each_unit(|step, unit, scale, number| {
            let settings = AdamW { step: number, gradient_scale: scale, ..settings };
            step.adamw(unit, settings)
        })
    }

    /// Updates the parameters by the caller's own optimizer, which is called for every unit's shard, in order. Clipping is in
    /// [`ShardUpdate::gradient_scale`]; decay and frozen tensors are the caller's to mind.
    ///
    /// # Errors
    /// Another rank's failure, after which the parameters may be invalid.
    pub fn update_with(self, mut optimizer: impl FnMut(ShardUpdate<'_>)) -> Result<StepReport, Error> {
        self.each_unit(|step, unit, scale, number| step.update_with(unit, scale, number, &mut optimizer))
    }

    /// Walks along the plan's updates: `update(step, unit, gradient scale, number of the update)`.
    fn each_unit(
        self,
        mut update: impl FnMut(&mut Step<'e>, usize, f32, u64) -> Result<(), Error>,
    ) -> Result<StepReport, Error> {
        let Agreed { mut step, mut report } = self;
        let mean = 1.0 / report.tokens;
        let clip = match step.engine.policy.clip {
            Some(limit) if report.gradient_norm > limit => limit / report.gradient_norm,
            _ => 1.0,
        };
        step.engine.health = Health::Torn;
        let number = step.engine.updates + 1;
        while let Some(operation) = step.plan.operations.get(step.next) {
            let Action::Update { unit } = operation.action else {
                return Err(step.off_plan("the end of the step"));
            };
            let started = Instant::now();
            update(&mut step, unit, (mean * clip) as f32, number)?;
            if let Some(recording) = &mut step.engine.recording {
                recording.host("update", Some(unit), started);
            }
            step.engine.written[unit] = step.engine.stream.record();
            step.next += 1;
        }
        step.engine.updates = number;
        step.engine.health = Health::Good;
        let traffic = step.engine.axes.traffic();
        report.operations = traffic.operations - step.traffic.operations;
        report.bytes = traffic.bytes - step.traffic.bytes;
        report.exposed = step.exposed;
        Ok(report)
    }
}

impl Step<'_> {
    fn adamw(&mut self, unit: usize, settings: AdamW) -> Result<(), Error> {
        let engine = &mut *self.engine;
        let number = engine.axes.shard_number();
        let mut weights = engine.weights.shard_mut(unit)?;
        let (gradient, _) = engine.gradients.sums(unit);
        let state = &mut engine.optimizer[unit];
        for piece in engine.layout.pieces(unit, number) {
            let range: Range<usize> = piece.in_shard;
            let tensor = &engine.layout.units[unit].tensors[piece.tensor];
            if tensor.frozen {
                continue;
            }
            let settings = AdamW { weight_decay: if tensor.decay { settings.weight_decay } else { 0.0 }, ..settings };
            let weights = weights.reborrow().slice(range.clone());
            let (weights, master) = match &mut state.master {
                Some(master) => (Some(weights), master.slice_mut(range.clone())),
                None => (None, weights),
            };
            engine.stream.adamw(
                weights,
                master,
                state.m.slice_mut(range.clone()),
                state.v.slice_mut(range.clone()),
                gradient.slice(range),
                settings,
            );
        }
        Ok(())
    }

    fn update_with(
        &mut self,
        unit: usize,
        gradient_scale: f32,
        number: u64,
        optimizer: &mut impl FnMut(ShardUpdate<'_>),
    ) -> Result<(), Error> {
        let engine = &mut *self.engine;
        let pieces: Vec<Piece> = engine.layout.pieces(unit, engine.axes.shard_number()).collect();
        let mut weights = engine.weights.shard_mut(unit)?;
        let state = &mut engine.optimizer[unit];
        let master = match &mut state.master {
            Some(master) => master.view_mut(),
            None => weights.reborrow(),
        };
        optimizer(ShardUpdate {
            unit,
            layout: &engine.layout.units[unit],
            stream: &*engine.stream,
            gradient: engine.gradients.sums(unit).0,
            gradient_scale,
            step: number,
            master,
            m: state.m.view_mut(),
            v: state.v.view_mut(),
            pieces: &pieces,
        });
        if let Some(master) = &state.master {
            debug_assert_ne!(weights.dtype(), DType::F32, "f32 weights are their own master");
            engine.stream.cast(weights, master.view());
        }
        Ok(())
    }
}
