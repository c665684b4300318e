//! Makes a plan: assigns slots, and edges where slots change hands.
//!
//! Weight slots are a cache whose future is known, so what is needed last is evicted (Belady 1966). A gradient slot is taken by a unit's first
//! backward pass, and free again once its reduction has read it; the longest free one is taken first.
//!
//! The builder never searches the list of uses. Planning time is therefore linear in the plan's
//! length, up to a logarithmic factor.

use std::cmp::Reverse;
use std::collections::BTreeSet;

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
    /// For each use the next one of the same unit, [`NEVER`] after the last.
    next: Vec<usize>,
    operations: Vec<Operation>,
    weights: Vec<WeightSlot>,
    /// Weight slots, ordered by the next use of the unit that they hold. The last entry is evicted
    /// first. Among slots without a next use, that is the lowest slot.
    by_next_use: BTreeSet<(usize, Reverse<usize>)>,
    /// Unit → the weight slot that holds it.
    resident: Vec<Option<usize>>,
    /// Free gradient slots, ordered by the reduction that freed them. Slots that were never used
    /// come first, then the one that has been free longest.
    free: BTreeSet<(Option<usize>, usize)>,
    /// Unit → the gradient slot that it adds to.
    adds_to: Vec<Option<usize>>,
    /// The last operation of each kind that the agreement waits for.
    last_compute: Option<usize>,
    last_reduce: Option<usize>,
    last_all_reduce: Option<usize>,
    train: bool,
}

/// Beyond every use.
const NEVER: usize = usize::MAX;

#[derive(Clone)]
struct WeightSlot {
    unit: Option<usize>,
    next_use: usize,
    gather: usize,
    /// The last operation that computes with its present content.
    last_use: Option<usize>,
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
        let uses: Vec<Use> = uses.filter(|use_| train || use_.pass == Pass::Forward).collect();
        let (mut next, mut later) = (vec![NEVER; uses.len()], vec![NEVER; units]);
        for (index, use_) in uses.iter().enumerate().rev() {
            next[index] = std::mem::replace(&mut later[use_.unit], index);
        }
        let empty = WeightSlot { unit: None, next_use: NEVER, gather: 0, last_use: None };
        let slots = outline.weights.unwrap_or(0);
        Builder {
            weights: vec![empty; slots],
            by_next_use: (0..slots).map(|slot| (NEVER, Reverse(slot))).collect(),
            resident: vec![None; units],
            free: (0..outline.gradients.unwrap_or(units)).map(|slot| (None, slot)).collect(),
            adds_to: vec![None; units],
            outline,
            rounds,
            uses,
            next,
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
                self.gather(ahead);
            }
        }
    }

    /// Gathers the unit of use `ahead`, unless a slot holds it. The units of all earlier uses are
    /// already in slots, and those slots are not evicted, because their next use comes before
    /// `ahead`.
    fn gather(&mut self, ahead: usize) {
        let unit = self.uses[ahead].unit;
        if self.resident[unit].is_some() {
            return;
        }
        let slot = if self.weights.len() >= self.resident.len() {
            unit
        } else {
            let (next_use, Reverse(slot)) = self.by_next_use.last().expect("there are slots");
            assert!(*next_use > ahead, "there are more slots than uses from now to then");
            *slot
        };
        let released = self.weights[slot].last_use;
        let gather = self.push(Action::Gather { unit, slot }, released);
        if let Some(evicted) = self.weights[slot].unit.replace(unit) {
            self.resident[evicted] = None;
        }
        self.resident[unit] = Some(slot);
        (self.weights[slot].gather, self.weights[slot].last_use) = (gather, None);
        self.expect(slot, ahead);
    }

    /// Notes when a weight slot's content is used next.
    fn expect(&mut self, slot: usize, next_use: usize) {
        let before = std::mem::replace(&mut self.weights[slot].next_use, next_use);
        self.by_next_use.remove(&(before, Reverse(slot)));
        self.by_next_use.insert((next_use, Reverse(slot)));
    }

    fn compute(&mut self, index: usize) {
        let Use { unit, pass, round } = self.uses[index];
        let resident = self.resident[unit];
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
            self.expect(slot, self.next[index]);
        }
        self.last_compute = Some(compute);
        if let Some(Fill { slot, last: true, .. }) = fill {
            self.reduce(unit, slot, round, compute);
        }
    }

    /// The slot that backward pass `index` adds to, and the reduction that must have read it before.
    fn fill(&mut self, index: usize) -> (Fill, Option<usize>) {
        let Use { unit, round, .. } = self.uses[index];
        let whole = self.outline.gradients.is_none();
        // After its backward passes of a round, a unit's next use is a forward pass.
        let again = self.uses.get(self.next[index]).is_some_and(|next| next.pass == Pass::Backward);
        let last = !again && (!whole || round + 1 == self.rounds);
        if let Some(slot) = self.adds_to[unit] {
            return (Fill { slot, first: false, last }, None);
        }
        let (slot, reduction) = if whole {
            (unit, None)
        } else {
            let (reduction, slot) = self.free.pop_first().expect("each unit that is used twice has a slot more");
            (slot, reduction)
        };
        self.adds_to[unit] = Some(slot);
        (Fill { slot, first: true, last }, reduction)
    }

    fn reduce(&mut self, unit: usize, slot: usize, round: usize, compute: usize) {
        let mut reduced = compute;
        if self.outline.sharded {
            let round = if self.outline.gradients.is_some() { round } else { 0 };
            reduced = self.push(Action::Reduce { unit, slot, round }, [compute]);
            self.adds_to[unit] = None;
            self.free.insert((Some(reduced), slot));
            self.last_reduce = Some(reduced);
        }
        if self.outline.replicated && round + 1 == self.rounds {
            self.last_all_reduce = Some(self.push(Action::AllReduce { unit }, [reduced]));
        }
    }
}

#[cfg(test)]
mod reference;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::verify::tests::outlines;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(512))]
        #[test]
        fn plans_are_those_of_the_plain_builder(outline in outlines(), rounds in 1usize..4, train: bool) {
            let plan = Builder::new(outline.clone(), rounds, train).build();
            prop_assert_eq!(plan, reference::Builder::new(outline, rounds, train).build());
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn a_sum_over_groups_follows_its_reduction_and_nothing_else(outline in outlines(), rounds in 1usize..4) {
            let plan = Builder::new(outline, rounds, true).build();
            for (index, operation) in plan.operations.iter().enumerate() {
                if let Action::AllReduce { unit } = operation.action {
                    prop_assert_eq!(&operation.after, &[index - 1]);
                    let of = match plan.operations[index - 1].action {
                        Action::Reduce { unit, .. } | Action::Compute { unit, pass: Pass::Backward, .. } => Some(unit),
                        _ => None,
                    };
                    prop_assert_eq!(of, Some(unit));
                }
            }
        }
    }

    /// Enough units that a builder or verifier that searches lists would take minutes.
    #[test]
    fn many_units_and_many_rounds_are_planned() {
        let units = 1 << 16;
        let outline = |weights, gradients, prefetch| Outline {
            order: (0..units).collect(),
            prefetch,
            weights: Some(weights),
            gradients,
            sharded: true,
            replicated: true,
        };
        for (outline, rounds) in [
            (outline(2, Some(2), 1), 1),
            (outline(units, None, 1), 1),
            (outline(units / 2, Some(units / 2), 1000), 1),
            (Outline { order: (0..64).collect(), ..outline(2, Some(2), 1) }, 1024),
        ] {
            let units = outline.units();
            let plan = Plan::step(&outline, rounds).verify().expect("the planner makes no races");
            assert!(plan.operations.len() >= (3 * rounds + 1) * units);
        }
    }
}
