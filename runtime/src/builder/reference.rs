//! The reference builder for tests. It searches lists where [`super::Builder`] keeps indices, so
//! its time is quadratic in the plan's length.

use crate::plan::{Action, Fill, Operation, Outline, Pass, Plan};

/// One use of a unit's weights.
#[derive(Clone, Copy)]
struct Use {
    unit: usize,
    pass: Pass,
    round: usize,
}

pub(crate) struct Builder {
    outline: Outline,
    rounds: usize,
    uses: Vec<Use>,
    operations: Vec<Operation>,
    weights: Vec<WeightSlot>,
    gradients: Vec<GradientSlot>,
    /// The last operation of each kind that the agreement waits for.
    last_compute: Option<usize>,
    last_reduce: Option<usize>,
    last_all_reduce: Option<usize>,
    train: bool,
}

#[derive(Clone, Default)]
struct WeightSlot {
    unit: Option<usize>,
    gather: usize,
    /// The last operation that computes with its present content.
    last_use: Option<usize>,
}

#[derive(Clone, Default)]
struct GradientSlot {
    unit: Option<usize>,
    /// The reduction of what it held last.
    reduction: Option<usize>,
}

impl Builder {
    pub(crate) fn new(outline: Outline, rounds: usize, train: bool) -> Builder {
        let units = outline.units();
        let fits = outline.weights.is_none_or(|slots| slots > outline.prefetch)
            && outline.gradients.is_none_or(|slots| slots > outline.used_twice())
            && (outline.sharded || (outline.weights, outline.gradients) == (None, None));
        assert!(units > 0 && fits, "no plan fits {outline:?}");
        let forward = |round| outline.order.iter().map(move |&unit| Use { unit, pass: Pass::Forward, round });
        let backward = |round| outline.order.iter().rev().map(move |&unit| Use { unit, pass: Pass::Backward, round });
        let uses = (0..rounds).flat_map(|round| forward(round).chain(backward(round)));
        let uses = uses.filter(|use_| train || use_.pass == Pass::Forward).collect();
        Builder {
            weights: vec![WeightSlot::default(); outline.weights.unwrap_or(0)],
            gradients: vec![GradientSlot::default(); outline.gradients.unwrap_or(units)],
            outline,
            rounds,
            uses,
            operations: Vec::new(),
            last_compute: None,
            last_reduce: None,
            last_all_reduce: None,
            train,
        }
    }

    pub(crate) fn build(mut self) -> Plan {
        for index in 0..self.uses.len() {
            self.gathers(index);
            self.compute(index);
        }
        if self.train {
            let before = [self.last_compute, self.last_reduce, self.last_all_reduce];
            let agree = self.push(Action::Agree, before.into_iter().flatten());
            for unit in 0..self.outline.units() {
                self.push(Action::Update { unit }, [agree]);
            }
        }
        Plan { outline: self.outline, operations: self.operations }
    }

    fn push(&mut self, action: Action, after: impl IntoIterator<Item = usize>) -> usize {
        self.operations.push(Operation { action, after: after.into_iter().collect() });
        self.operations.len() - 1
    }

    /// Those that start before a use.
    fn gathers(&mut self, index: usize) {
        if self.outline.weights.is_some() {
            for ahead in index..(index + 1 + self.outline.prefetch).min(self.uses.len()) {
                self.gather(index, ahead);
            }
        }
    }

    /// Brings in the unit of use `ahead`, unless it is there, while use `now` is about to start.
    fn gather(&mut self, now: usize, ahead: usize) {
        let unit = self.uses[ahead].unit;
        if self.weights.iter().any(|slot| slot.unit == Some(unit)) {
            return;
        }
        let next_use = |slot: &WeightSlot| {
            let rest = &self.uses[now..];
            slot.unit.and_then(|unit| rest.iter().position(|use_| use_.unit == unit)).unwrap_or(usize::MAX)
        };
        let slot = if self.weights.len() >= self.outline.units() {
            unit
        } else {
            let candidates = (0..self.weights.len()).filter(|&slot| next_use(&self.weights[slot]) > ahead - now);
            let slot = candidates.max_by_key(|&slot| (next_use(&self.weights[slot]), self.weights.len() - slot));
            slot.expect("there are more slots than uses from now to then")
        };
        let released = self.weights[slot].last_use;
        let gather = self.push(Action::Gather { unit, slot }, released);
        self.weights[slot] = WeightSlot { unit: Some(unit), gather, last_use: None };
    }

    fn compute(&mut self, index: usize) {
        let Use { unit, pass, round } = self.uses[index];
        let resident = self.weights.iter().position(|slot| slot.unit == Some(unit));
        let gather = resident.map(|slot| self.weights[slot].gather);
        let (fill, free) = match pass {
            Pass::Forward => (None, None),
            Pass::Backward => {
                let (fill, free) = self.fill(index);
                (Some(fill), free)
            }
        };
        let action = Action::Compute { unit, pass, weights: resident.unwrap_or(unit), gradients: fill };
        let compute = self.push(action, gather.into_iter().chain(free));
        if let Some(slot) = resident {
            self.weights[slot].last_use = Some(compute);
        }
        self.last_compute = Some(compute);
        if let Some(Fill { slot, last: true, .. }) = fill {
            self.reduce(unit, slot, round, compute);
        }
    }

    /// The slot that backward pass `index` adds to, and the reduction that must have read it
    /// before.
    fn fill(&mut self, index: usize) -> (Fill, Option<usize>) {
        let Use { unit, round, .. } = self.uses[index];
        let again = |use_: &Use| use_.unit == unit && use_.pass == Pass::Backward;
        let whole = self.outline.gradients.is_none();
        // Not through the rounds that follow: a plan of many rounds would take their square to
        // make.
        let mut rest = self.uses[index + 1..].iter().take_while(|use_| use_.round == round);
        let last = !rest.any(again) && (!whole || round + 1 == self.rounds);
        if let Some(slot) = self.gradients.iter().position(|slot| slot.unit == Some(unit)) {
            return (Fill { slot, first: false, last }, None);
        }
        let free = (0..self.gradients.len()).filter(|&slot| self.gradients[slot].unit.is_none());
        let longest = free.min_by_key(|&slot| self.gradients[slot].reduction);
        let slot = if whole { unit } else { longest.expect("each unit that is used twice has a slot more") };
        self.gradients[slot].unit = Some(unit);
        (Fill { slot, first: true, last }, self.gradients[slot].reduction)
    }

    fn reduce(&mut self, unit: usize, slot: usize, round: usize, compute: usize) {
        let mut reduced = compute;
        if self.outline.sharded {
            let round = if self.outline.gradients.is_some() { round } else { 0 };
            reduced = self.push(Action::Reduce { unit, slot, round }, [compute]);
            self.gradients[slot] = GradientSlot { unit: None, reduction: Some(reduced) };
            self.last_reduce = Some(reduced);
        }
        if self.outline.replicated && round + 1 == self.rounds {
            self.last_all_reduce = Some(self.push(Action::AllReduce { unit }, [reduced]));
        }
    }
}
