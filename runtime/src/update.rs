//! The end of a step: gradients are summed, every rank knows the norm, and no rank reads weights any more.

use pillion_kernels::{Stream, View};

use crate::engine::{Health, OptimizerShard};
use crate::optimizer::{Optimizer, ShardUpdate, States};
use crate::plan::Action;
use crate::report::StepReport;
use crate::step::Step;
use crate::{Engine, Error};

/// A step whose gradients are summed. It ends with [`Agreed::update`]; one that is dropped leaves
/// the parameters as they were, and the engine unusable, since other ranks may have updated theirs.
#[must_use = "a step ends with an update"]
pub struct Agreed<'e> {
    step: Step<'e>,
    report: StepReport,
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

    /// Updates the parameters; see [`Step::finish`]. Clipping is in [`ShardUpdate::scale`]; decay
    /// and frozen tensors are the optimizer's to mind.
    ///
    /// # Errors
    /// [`Error::Policy`] when the optimizer keeps something else than the policy says; another
    /// rank's failure, after which the parameters may be invalid.
    pub fn update(self, optimizer: &dyn Optimizer) -> Result<StepReport, Error> {
        let Agreed { mut step, mut report } = self;
        step.engine.check_optimizer(optimizer)?;
        let mean = 1.0 / report.tokens;
        let clip = match step.engine.policy.clip {
            Some(limit) if report.gradient_norm > limit => limit / report.gradient_norm,
            _ => 1.0,
        };
        step.engine.health = Health::Torn;
        let number = step.engine.updates + 1;
        let Engine { stream, scale, .. } = &mut *step.engine;
        stream.upload(scale.view_mut(), &[(mean * clip) as f32]);
        while let Some(operation) = step.plan.operations.get(step.next) {
            let Action::Update { unit } = operation.action else {
                return Err(step.off_plan("the end of the step"));
            };
            let started = step.engine.recording.is_some().then(|| step.engine.stream.stamp());
            step.update(unit, optimizer, number)?;
            let Engine { recording, stream, .. } = &mut *step.engine;
            if let (Some(recording), Some(started)) = (recording, started) {
                recording.push("update", unit..unit + 1, started, stream.stamp());
            }
            step.engine.written[unit] = step.engine.stream.record();
            step.next += 1;
        }
        step.engine.updates = number;
        step.engine.health = Health::Good;
        let traffic = step.engine.axes.traffic();
        report.operations = traffic.operations - step.traffic.operations;
        report.bytes = traffic.bytes - step.traffic.bytes;
        report.exposed = step.exposed();
        report.host_waits = step.engine.stream.host_waits() - step.host_waits;
        Ok(report)
    }
}

impl Step<'_> {
    fn update(&mut self, unit: usize, optimizer: &dyn Optimizer, number: u64) -> Result<(), Error> {
        let Engine { stream, weights, gradients, optimizer: shards, layout, pieces, scale, .. } = &mut *self.engine;
        let mut weights = weights.shard_mut(unit)?;
        let OptimizerShard { master, states } = &mut shards[unit];
        let (master_view, copy) = match master {
            Some(master) => (master.view_mut(), Some(weights.reborrow())),
            None => (weights.reborrow(), None),
        };
        let shard = ShardUpdate {
            unit,
            layout: &layout.units[unit],
            stream: &**stream,
            gradient: gradients.sums(unit).0,
            scale: scale.view(),
            step: number,
            weights: copy,
            master: master_view,
            states: States(states),
            pieces: &pieces[unit],
        };
        optimizer.update(shard);
        if let (Some(master), false) = (master, optimizer.writes_weights()) {
            stream.cast(weights, master.view());
        }
        Ok(())
    }
}
