//! The reference builder for tests. It searches lists where [`super::Builder`] keeps indices, so
//! its time is quadratic in the plan's length.

use super::Visit;
use crate::buckets::Slots;
use crate::outline::Outline;
use crate::plan::{Action, Fill, Operation, Pass, Plan};

pub(crate) struct Builder {
    outline: Outline,
    rounds: usize,
    visits: Vec<Visit>,
    operations: Vec<Operation>,
    weights: Vec<WeightSlot>,
    gradients: Vec<GradientSlot>,
    train: bool,
}

#[derive(Clone, Default)]
struct WeightSlot {
    bucket: Option<usize>,
    gather: usize,
    /// The last operation that computes with its present content.
    last_use: Option<usize>,
}

#[derive(Clone, Default)]
struct GradientSlot {
    bucket: Option<usize>,
    /// The reduction of what it held last.
    reduction: Option<usize>,
}

impl Builder {
    pub(crate) fn new(outline: Outline, rounds: usize, train: bool) -> Builder {
        let mut visits = Vec::new();
        for round in 0..rounds {
            let forward: Vec<usize> = outline.visits().collect();
            visits.extend(forward.iter().map(|&bucket| Visit { bucket, pass: Pass::Forward, round }));
            if train {
                visits.extend(forward.iter().rev().map(|&bucket| Visit { bucket, pass: Pass::Backward, round }));
            }
        }
        let gradients = outline.gradients.as_ref().map_or(outline.buckets.len(), Slots::count);
        Builder {
            weights: vec![WeightSlot::default(); outline.weights.as_ref().map_or(0, Slots::count)],
            gradients: vec![GradientSlot::default(); gradients],
            outline,
            rounds,
            visits,
            operations: Vec::new(),
            train,
        }
    }

    pub(crate) fn build(mut self) -> Plan {
        for index in 0..self.visits.len() {
            for ahead in index..(index + 1 + self.outline.prefetch).min(self.visits.len()) {
                self.gather(index, ahead);
            }
            self.compute(index);
        }
        if self.train {
            let last =
                |wanted: fn(&Action) -> bool| self.operations.iter().rposition(|operation| wanted(&operation.action));
            let before = [
                last(|action| matches!(action, Action::Compute { .. })),
                last(|action| matches!(action, Action::Reduce { .. })),
                last(|action| matches!(action, Action::AllReduce { .. })),
            ];
            let agree = self.push(Action::Agree, before.into_iter().flatten());
            for unit in 0..self.outline.units() {
                self.push(Action::Update { unit }, [agree]);
            }
        }
        Plan { outline: self.outline, operations: self.operations }
    }

    fn push(&mut self, action: Action, after: impl IntoIterator<Item = usize>) -> usize {
        let after = after.into_iter().collect();
        let again = |operation: &Operation| match (operation.action, action) {
            (Action::Gather { bucket: earlier, .. }, Action::Gather { bucket, .. }) => earlier == bucket,
            _ => false,
        };
        let after_writes = matches!(action, Action::Gather { .. }) && !self.operations.iter().any(again);
        self.operations.push(Operation { action, after, after_writes });
        self.operations.len() - 1
    }

    /// Brings in the bucket of visit `ahead`, unless it is there, while visit `now` is about to
    /// start.
    fn gather(&mut self, now: usize, ahead: usize) {
        let Some(slots) = &self.outline.weights else { return };
        let bucket = self.visits[ahead].bucket;
        if self.weights.iter().any(|slot| slot.bucket == Some(bucket)) {
            return;
        }
        let next_visit = |slot: &WeightSlot| {
            let rest = &self.visits[now..];
            slot.bucket.and_then(|bucket| rest.iter().position(|visit| visit.bucket == bucket)).unwrap_or(usize::MAX)
        };
        let candidates = slots.of_bucket(bucket).filter(|&slot| next_visit(&self.weights[slot]) > ahead - now);
        let slot = candidates.max_by_key(|&slot| (next_visit(&self.weights[slot]), self.weights.len() - slot));
        let slot = slot.expect("there are more slots than visits from now to then");
        let released = self.weights[slot].last_use;
        let gather = self.push(Action::Gather { bucket, slot }, released);
        self.weights[slot] = WeightSlot { bucket: Some(bucket), gather, last_use: None };
    }

    fn compute(&mut self, index: usize) {
        let Visit { bucket, pass, round } = self.visits[index];
        let resident = self.weights.iter().position(|slot| slot.bucket == Some(bucket));
        let gather = resident.map(|slot| self.weights[slot].gather);
        let (fill, free) = match pass {
            Pass::Forward => (None, None),
            Pass::Backward => {
                let (fill, free) = self.fill(index);
                (Some(fill), free)
            }
        };
        let mut units: Vec<usize> = self.outline.buckets[bucket].clone().collect();
        if pass == Pass::Backward {
            units.reverse();
        }
        let mut compute = 0;
        for (at, unit) in units.into_iter().enumerate() {
            let action = Action::Compute { unit, pass, weights: resident.unwrap_or(bucket), gradients: fill };
            let edges = gather.into_iter().chain(free).filter(|_| at == 0);
            compute = self.push(action, edges);
        }
        if let Some(slot) = resident {
            self.weights[slot].last_use = Some(compute);
        }
        if let Some(Fill { slot, last: true, .. }) = fill {
            self.reduce(bucket, slot, round, compute);
        }
    }

    /// The slot that the backward passes of visit `index` add to, and the reduction that must have
    /// read it before.
    fn fill(&mut self, index: usize) -> (Fill, Option<usize>) {
        let Visit { bucket, round, .. } = self.visits[index];
        let again = |visit: &Visit| visit.bucket == bucket && visit.pass == Pass::Backward;
        let whole = self.outline.gradients.is_none();
        // Not through the rounds that follow: a plan of many rounds would take their square to
        // make.
        let mut rest = self.visits[index + 1..].iter().take_while(|visit| visit.round == round);
        let last = !rest.any(again) && (!whole || round + 1 == self.rounds);
        if let Some(slot) = self.gradients.iter().position(|slot| slot.bucket == Some(bucket)) {
            return (Fill { slot, first: false, last }, None);
        }
        let slots = self.outline.gradients.as_ref().map_or(bucket..bucket + 1, |slots| slots.of_bucket(bucket));
        let free = slots.filter(|&slot| self.gradients[slot].bucket.is_none());
        let longest = free.min_by_key(|&slot| self.gradients[slot].reduction);
        let slot = longest.expect("each bucket that is visited twice has a slot more");
        self.gradients[slot].bucket = Some(bucket);
        (Fill { slot, first: true, last }, self.gradients[slot].reduction)
    }

    fn reduce(&mut self, bucket: usize, slot: usize, round: usize, compute: usize) {
        let mut reduced = compute;
        if self.outline.sharded {
            let round = if self.outline.gradients.is_some() { round } else { 0 };
            reduced = self.push(Action::Reduce { bucket, slot, round }, [compute]);
            self.gradients[slot] = GradientSlot { bucket: None, reduction: Some(reduced) };
        }
        if self.outline.replicated && round + 1 == self.rounds {
            self.push(Action::AllReduce { bucket }, [reduced]);
        }
    }
}
