//! One step under way: follows the plan, operation by operation, as the caller asks for units.

mod sums;

use std::ops::Range;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use pillion_collectives::Traffic;
use pillion_kernels::cpu::compare::Comparison;
use pillion_kernels::cpu::observe::Observer;
use pillion_kernels::{Event, Stamp, Stream, View, ViewMut};

use crate::engine::{Engine, Health, Kind};
use crate::gradients::sideband;
use crate::plan::{Action, Fill, Operation, Pass, Verified};
use crate::report::StepReport;
use crate::trace::label;
use crate::update::Agreed;
use crate::{Error, Optimizer, Unit};
pub(crate) use sums::SUMS;

/// A step under way. It ends with [`Step::finish`] (training), [`Step::end`] (evaluation) or
/// [`Step::abandon`]. A step that is dropped before leaves the engine unusable, because other ranks
/// wait for the rest of its collectives.
pub struct Step<'e> {
    pub(crate) engine: &'e mut Engine,
    kind: Kind,
    pub(crate) plan: Arc<Verified>,
    /// The next operation.
    pub(crate) next: usize,
    /// The computation that the caller is enqueuing.
    open: Option<usize>,
    /// When it was opened, where that is recorded.
    opened: Option<Stamp>,
    /// Tokens of this rank since its gradient was last reduced: of this round, or, where gradients are whole, of all rounds so far.
    tokens: usize,
    /// Tokens of this rank in all rounds so far.
    all_tokens: usize,
    /// Of the comparison of groups, in a step that makes one.
    comparison: Option<Arc<Comparison>>,
    /// Times that the host had waited for the stream before this step.
    pub(crate) host_waits: u64,
    pub(crate) traffic: Traffic,
}

/// What a forward pass through one unit needs. The borrow ends before the step is asked for the next.
pub struct Forward<'s> {
    /// Where kernels go.
    pub stream: &'s dyn Stream,
    /// The unit's weights.
    pub weights: Weights<'s>,
}

/// What a backward pass through one unit needs.
pub struct Backward<'s> {
    /// Where kernels go.
    pub stream: &'s dyn Stream,
    /// The unit's weights.
    pub weights: Weights<'s>,
    /// The unit's gradients, to add to.
    pub gradients: Gradients<'s>,
    /// `[1]` f64, to add to: the sum of the losses of this rank's tokens, in nats. One unit of a
    /// model adds to it.
    pub loss: ViewMut<'s>,
}

/// A unit's gathered weights.
pub struct Weights<'s> {
    view: View<'s>,
    unit: &'s Unit,
}

impl<'s> Weights<'s> {
    /// The unit's tensor number `index`.
    pub fn tensor(&self, index: usize) -> View<'s> {
        self.view.slice(self.unit.tensors[index].range.clone())
    }
}

/// A unit's gradients: sums over tokens, not means. What is added to a frozen tensor's counts nowhere.
pub struct Gradients<'s> {
    view: ViewMut<'s>,
    unit: &'s Unit,
}

impl Gradients<'_> {
    /// That of tensor number `index`.
    pub fn tensor(&mut self, index: usize) -> ViewMut<'_> {
        self.view.reborrow().slice(self.unit.tensors[index].range.clone())
    }
}

/// Most numbers that the ranks can ask each other for with a step.
pub const REQUESTS: usize = 32;

impl<'e> Step<'e> {
    pub(crate) fn new(engine: &'e mut Engine, kind: Kind, plan: Arc<Verified>) -> Step<'e> {
        engine.health = Health::Unfinished;
        let traffic = engine.axes.traffic();
        if engine.recording.is_some() {
            // Of what was done between steps.
            drop(engine.axes.recorded());
        }
        engine.waits.clear();
        engine.events.clear();
        engine.events.resize(plan.operations.len(), Event::PAST);
        let reduces_once = || {
            let is_reduction = |operation: &&Operation| matches!(operation.action, Action::Reduce { .. });
            plan.operations.iter().filter(is_reduction).count() == plan.outline.buckets.len()
        };
        let comparison = engine.comparison.clone().filter(|_| reduces_once());
        let host_waits = engine.stream.host_waits();
        Step {
            engine,
            kind,
            plan,
            next: 0,
            open: None,
            opened: None,
            tokens: 0,
            all_tokens: 0,
            comparison,
            host_waits,
            traffic,
        }
    }

    /// Begins a round whose micro-batch on this rank has `tokens` tokens in its loss: tokens that a
    /// mask leaves out do not count. This is the only count of tokens. The update divides the
    /// gradient by its sum over all ranks and rounds, and the statistics weigh each group by its
    /// own ([`StepReport::group_square_norms`]).
    pub fn round(&mut self, tokens: usize) {
        self.close();
        self.all_tokens += tokens;
        let whole = self.plan.outline.gradients.is_none();
        self.tokens = if whole { self.tokens + tokens } else { tokens };
    }

    /// Passes a round without a micro-batch on this rank: takes part in its collectives, with zeros.
    ///
    /// # Errors
    /// When another rank has failed.
    pub fn idle_round(&mut self) -> Result<(), Error> {
        self.round(0);
        let layout = self.engine.layout.clone();
        layout.order.iter().try_for_each(|&unit| self.forward(unit).map(|_| ()))?;
        if self.kind == Kind::Evaluate {
            return Ok(());
        }
        layout.order.iter().rev().try_for_each(|&unit| self.backward(unit).map(|_| ()))
    }

    /// The stream that kernels run on, for work that belongs to no unit.
    pub fn stream(&self) -> &dyn Stream {
        &*self.engine.stream
    }

    /// Orders the stream after the gather of a unit, and starts the gathers that the plan wants
    /// under way by now.
    ///
    /// # Errors
    /// [`Error::OffPlan`] when the plan says otherwise, or another rank's failure.
    pub fn forward(&mut self, unit: usize) -> Result<Forward<'_>, Error> {
        let slot = self.enter(unit, Pass::Forward)?.0;
        let engine = &*self.engine;
        let weights = Weights { view: engine.weights.gathered(unit, slot), unit: &engine.layout.units[unit] };
        Ok(Forward { stream: &*engine.stream, weights })
    }

    /// As [`Step::forward`], with room for the unit's gradients. What kernels add to them is reduced from the next call on.
    ///
    /// # Errors
    /// As for [`Step::forward`].
    pub fn backward(&mut self, unit: usize) -> Result<Backward<'_>, Error> {
        let (slot, fill) = self.enter(unit, Pass::Backward)?;
        let Fill { slot: gradients, .. } = fill.expect("a backward pass has a gradient slot");
        let Engine { stream, weights, gradients: store, layout, .. } = &mut *self.engine;
        let unit_layout = &layout.units[unit];
        let weights = Weights { view: weights.gathered(unit, slot), unit: unit_layout };
        let (view, sideband) = store.opened(gradients, unit);
        let loss = sideband.slice(sideband::LOSS);
        Ok(Backward { stream: &**stream, weights, gradients: Gradients { view, unit: unit_layout }, loss })
    }

    /// Ends a training step: agrees with every rank on the norm and on `requests` (at most
    /// [`REQUESTS`] numbers, which become their sums over ranks), then updates the parameters with
    /// the gradient averaged over tokens and clipped. Of AdamW, weight decay applies to the tensors
    /// whose specification says so.
    ///
    /// # Errors
    /// [`Error::NonFinite`] and [`Error::NoTokens`] with the parameters as they were and the
    /// requests summed; [`Error::Policy`] when the optimizer keeps something else than the policy
    /// says; another rank's failure, after which the parameters may be invalid.
    pub fn finish(self, optimizer: &dyn Optimizer, requests: &mut [f64]) -> Result<StepReport, Error> {
        self.engine.check_optimizer(optimizer)?;
        self.agree(requests)?.update(optimizer)
    }

    /// The first half of [`Step::finish`]: what comes back lends the summed gradients, and updates the parameters in whichever way.
    ///
    /// # Errors
    /// As for [`Step::finish`].
    pub fn agree(mut self, requests: &mut [f64]) -> Result<Agreed<'e>, Error> {
        assert!(requests.len() <= REQUESTS, "{} requests of at most {REQUESTS}", requests.len());
        self.issue_until(|action| action == Action::Agree, |_| "the agreement".to_owned())?;
        let report = self.sum(requests)?;
        self.next += 1;
        Ok(Agreed::new(self, report))
    }

    /// Ends an evaluation.
    ///
    /// # Errors
    /// [`Error::OffPlan`] when forward passes are missing.
    pub fn end(mut self) -> Result<(), Error> {
        self.close();
        if self.next < self.plan.operations.len() {
            return Err(self.off_plan("the end of the evaluation"));
        }
        self.leave()
    }

    /// Ends a step without an update: parameters, optimizer state and the number of updates are as
    /// they were before it, and the engine can begin another step. Collective: every rank abandons
    /// the same step, each from wherever it is, because a rank takes part in the collectives that
    /// it has not come to yet. They move what is in the slots, so the sums mean nothing. No kernel
    /// of the model runs.
    ///
    /// # Errors
    /// When another rank has failed.
    pub fn abandon(mut self) -> Result<(), Error> {
        // After a failure there is nothing left to take part in.
        self.engine.axes.healthy()?;
        let rest = self.plan.clone();
        loop {
            self.close();
            match rest.operations.get(self.next).map(|operation| operation.action) {
                Some(Action::Compute { unit, pass, .. }) => drop(self.enter(unit, pass)?),
                Some(Action::Gather { .. } | Action::Reduce { .. } | Action::AllReduce { .. }) => self.issue()?,
                Some(Action::Agree | Action::Update { .. }) | None => break,
            }
        }
        let engine = &mut *self.engine;
        engine.gradients.bring_all(&*engine.stream)?;
        self.leave()?;
        // No rank is still reading this one's shards when the caller goes on to write them.
        Ok(self.engine.axes.world.barrier()?)
    }

    /// Leaves the engine ready for another step, after the last operation that this one has issued.
    fn leave(&mut self) -> Result<(), Error> {
        // Kernels may still read the slots: the next gathers start after them.
        let done = self.engine.stream.record();
        if let Poll::Ready(Err(failure)) = done.status() {
            // Kernels of this step did not run, and the other ranks would wait for this one.
            self.engine.axes.world.abort(&failure.to_string());
            return Err(failure.into());
        }
        self.engine.weights.release(&done)?;
        self.engine.written.fill(done);
        self.engine.health = Health::Good;
        self.record_collectives();
        Ok(())
    }

    /// The stream has waited for a collective since then.
    pub(crate) fn waited(&mut self, since: Stamp, units: Range<usize>) {
        self.waited_until(since, self.engine.stream.stamp(), "wait", units);
    }

    /// The stream, or the host, has waited for other ranks.
    fn waited_until(&mut self, since: Stamp, until: Stamp, name: &'static str, units: Range<usize>) {
        if let Some(recording) = &mut self.engine.recording {
            recording.push(name, units, since.clone(), until.clone());
        }
        self.engine.waits.push([since, until]);
    }

    /// For how long this rank has waited for others, of the waits that have ended.
    pub(crate) fn exposed(&self) -> Duration {
        let long = |[since, until]: &[Stamp; 2]| Some(until.time()?.saturating_duration_since(since.time()?));
        self.engine.waits.iter().filter_map(long).sum()
    }

    /// Records the collectives of this step.
    pub(crate) fn record_collectives(&mut self) {
        let Engine { recording, axes, .. } = &mut *self.engine;
        if let Some(recording) = recording {
            recording.collectives(&self.plan, axes);
        }
    }

    /// Starts what the plan wants before a computation, and opens it; returns its weight slot, and what it adds to.
    fn enter(&mut self, unit: usize, pass: Pass) -> Result<(usize, Option<Fill>), Error> {
        let wanted = |action| matches!(action, Action::Compute { unit: u, pass: p, .. } if (u, p) == (unit, pass));
        self.issue_until(wanted, |step| format!("the {pass:?} pass of {}", step.engine.layout.units[unit].name))?;
        let Action::Compute { weights, gradients, .. } = self.plan.operations[self.next].action else {
            unreachable!("issue_until stops at what was wanted");
        };
        let waiting = self.engine.stream.stamp();
        let engine = &mut *self.engine;
        engine.weights.bring(engine.buckets.places[unit].bucket, weights, &*engine.stream)?;
        if let Some(Fill { slot, first, .. }) = gradients {
            engine.gradients.open(slot, unit, first, &*engine.stream)?;
        }
        self.waited(waiting, unit..unit + 1);
        self.open = Some(self.next);
        self.opened = self.engine.recording.is_some().then(|| self.engine.stream.stamp());
        self.next += 1;
        Ok((weights, gradients))
    }

    /// Starts collectives up to the operation that is wanted.
    fn issue_until(&mut self, wanted: impl Fn(Action) -> bool, what: impl Fn(&Self) -> String) -> Result<(), Error> {
        self.close();
        loop {
            match self.plan.operations.get(self.next).map(|operation| operation.action) {
                Some(action) if wanted(action) => return Ok(()),
                Some(Action::Gather { .. } | Action::Reduce { .. } | Action::AllReduce { .. }) => self.issue()?,
                _ => return Err(self.off_plan(&what(self))),
            }
        }
    }

    /// Starts the collective that is the plan's next operation.
    fn issue(&mut self) -> Result<(), Error> {
        let operation = &self.plan.operations[self.next];
        let after = Event::all(operation.after.iter().map(|&earlier| self.engine.events[earlier].clone()));
        let engine = &mut *self.engine;
        match operation.action {
            Action::Gather { bucket, slot } => {
                let units = self.plan.outline.buckets[bucket].clone();
                let written = engine.written[units.clone()].iter().filter(|_| operation.after_writes).cloned();
                let after = Event::all(std::iter::once(after).chain(written));
                let group = engine.axes.shard.as_ref().expect(AXIS);
                engine.weights.gather(group, bucket, slot, after);
                if !engine.policy.overlap {
                    let waiting = engine.stream.stamp();
                    engine.weights.bring(bucket, slot, &*engine.stream)?;
                    self.waited(waiting, units);
                }
            }
            Action::Reduce { bucket, slot, round } => {
                let group = engine.axes.shard.as_ref().expect(AXIS);
                let observer = self.comparison.clone().map(|comparison| comparison as Arc<dyn Observer>);
                engine.gradients.reduce(group, bucket, slot, round > 0, observer, after);
                if !engine.policy.overlap {
                    let waiting = engine.stream.stamp();
                    engine.gradients.wait()?;
                    self.waited(waiting, self.plan.outline.buckets[bucket].clone());
                }
            }
            Action::AllReduce { bucket } => {
                let groups = engine.axes.replicate.as_ref().expect(AXIS);
                engine.gradients.all_reduce(groups, bucket, after);
                if !engine.policy.overlap {
                    let waiting = engine.stream.stamp();
                    engine.gradients.wait()?;
                    self.waited(waiting, self.plan.outline.buckets[bucket].clone());
                }
            }
            action => unreachable!("{action:?} is no collective"),
        }
        self.next += 1;
        Ok(())
    }

    /// Ends the computation that the caller has enqueued: takes its gradient's norm if that is complete, and marks its end.
    fn close(&mut self) {
        let Some(index) = self.open.take() else { return };
        let engine = &mut *self.engine;
        let action = self.plan.operations[index].action;
        if let Action::Compute { unit, gradients: Some(Fill { slot, last: true, .. }), .. } = action {
            let Unit { len, tensors, .. } = &engine.layout.units[unit];
            let (mut gradient, _) = engine.gradients.opened(slot, unit);
            for tensor in tensors.iter().filter(|tensor| tensor.frozen) {
                engine.stream.zero(gradient.reborrow().slice(tensor.range.clone()));
            }
            let weight = if self.tokens == 0 { 0.0 } else { 1.0 / self.tokens as f64 };
            let weight = engine.measures_groups.then_some(weight);
            engine.gradients.complete(slot, unit, *len, weight, &*engine.stream);
        }
        if let (Some(recording), Some(opened)) = (&mut engine.recording, self.opened.take()) {
            let (_, name, units) = label(action, &self.plan.outline);
            recording.push(name, units, opened, engine.stream.stamp());
        }
        // Behind the stamp, so that nothing which waits for this event begins before that time.
        engine.events[index] = engine.stream.record();
    }

    pub(crate) fn off_plan(&self, found: &str) -> Error {
        let expected = match self.plan.operations.get(self.next) {
            Some(operation) => format!("{:?}", operation.action),
            None => "nothing".to_owned(),
        };
        Error::OffPlan { expected, found: found.to_owned() }
    }
}

const AXIS: &str = "a plan moves along the axes that there are";
