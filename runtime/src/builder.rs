//! Makes a plan: assigns slots, and edges where slots change hands.
//!
//! Weight slots are a cache whose future is known, so what is needed last is evicted (Belady 1966).
//! A gradient slot is taken by a bucket's first backward pass, and free again once its reduction
//! has read it; the longest free one is taken first. Buckets that fit different slots do not
//! compete.
//!
//! The builder never searches the list of visits. Planning time is therefore linear in the plan's
//! length, up to a logarithmic factor.

use std::cmp::Reverse;
use std::collections::BTreeSet;
use std::ops::Range;

use crate::buckets::Slots;
use crate::outline::Outline;
use crate::plan::{Action, Fill, Operation, Pass, Plan};

/// One pass over a bucket: its units are used one after another.
#[derive(Clone, Copy)]
struct Visit {
    bucket: usize,
    pass: Pass,
    round: usize,
}

pub(crate) struct Builder {
    outline: Outline,
    rounds: usize,
    visits: Vec<Visit>,
    /// For each visit the next one of the same bucket, [`NEVER`] after the last.
    next: Vec<usize>,
    operations: Vec<Operation>,
    weights: Vec<WeightSlot>,
    /// Weight slots of each class, ordered by the next visit of the bucket that they hold. The last
    /// entry is evicted first. Among slots without a next visit, that is the lowest slot.
    by_next_visit: Vec<BTreeSet<(usize, Reverse<usize>)>>,
    /// Bucket → the weight slot that holds it.
    resident: Vec<Option<usize>>,
    /// Bucket → whether it has been gathered.
    gathered: Vec<bool>,
    /// Free gradient slots of each class, ordered by the reduction that freed them. Slots that were
    /// never used come first, then the one that has been free longest.
    free: Vec<BTreeSet<(Option<usize>, usize)>>,
    /// Bucket → the gradient slot that it adds to.
    adds_to: Vec<Option<usize>>,
    /// The last operation of each kind that the agreement waits for.
    last_compute: Option<usize>,
    last_reduce: Option<usize>,
    last_all_reduce: Option<usize>,
    train: bool,
}

/// Beyond every visit.
const NEVER: usize = usize::MAX;

#[derive(Clone)]
struct WeightSlot {
    bucket: Option<usize>,
    next_visit: usize,
    gather: usize,
    /// The last operation that computes with its present content.
    last_use: Option<usize>,
}

impl Builder {
    pub(crate) fn new(outline: Outline, rounds: usize, train: bool) -> Builder {
        let buckets = outline.buckets.len();
        assert!(outline.is_possible(), "no plan fits {outline:?}");
        let forward: Vec<usize> = outline.visits().collect();
        let visit = |pass, round| move |&bucket: &usize| Visit { bucket, pass, round };
        let visits = (0..rounds).flat_map(|round| {
            let back = forward.iter().rev().map(visit(Pass::Backward, round));
            forward.iter().map(visit(Pass::Forward, round)).chain(back)
        });
        let visits: Vec<Visit> = visits.filter(|visit| train || visit.pass == Pass::Forward).collect();
        let (mut next, mut later) = (vec![NEVER; visits.len()], vec![NEVER; buckets]);
        for (index, visit) in visits.iter().enumerate().rev() {
            next[index] = std::mem::replace(&mut later[visit.bucket], index);
        }
        let empty = WeightSlot { bucket: None, next_visit: NEVER, gather: 0, last_use: None };
        let slots = outline.weights.clone().unwrap_or(Slots { class: Vec::new(), of_class: Vec::new() });
        let gradients = outline.gradients.clone().unwrap_or_else(|| Slots::own(buckets));
        let unused = |slots: &Range<usize>| slots.clone().map(|slot| (NEVER, Reverse(slot))).collect();
        Builder {
            weights: vec![empty; slots.count()],
            by_next_visit: slots.of_class.iter().map(unused).collect(),
            resident: vec![None; buckets],
            gathered: vec![false; buckets],
            free: gradients.of_class.iter().map(|slots| slots.clone().map(|slot| (None, slot)).collect()).collect(),
            adds_to: vec![None; buckets],
            outline,
            rounds,
            visits,
            next,
            operations: Vec::new(),
            last_compute: None,
            last_reduce: None,
            last_all_reduce: None,
            train,
        }
    }

    pub(crate) fn build(mut self) -> Plan {
        for index in 0..self.visits.len() {
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
        let after = after.into_iter().collect();
        self.operations.push(Operation { action, after, after_writes: false });
        self.operations.len() - 1
    }

    /// Those that start before a visit.
    fn gathers(&mut self, index: usize) {
        if self.outline.weights.is_some() {
            for ahead in index..(index + 1 + self.outline.prefetch).min(self.visits.len()) {
                self.gather(ahead);
            }
        }
    }

    /// Gathers the bucket of visit `ahead`, unless a slot holds it. The buckets of all earlier
    /// visits are already in slots, and those slots are not evicted, because their next visit comes
    /// before `ahead`.
    fn gather(&mut self, ahead: usize) {
        let bucket = self.visits[ahead].bucket;
        if self.resident[bucket].is_some() {
            return;
        }
        let class = self.class(bucket);
        let (next_visit, Reverse(slot)) = *self.by_next_visit[class].last().expect("each class has slots");
        assert!(next_visit > ahead, "there are more slots than visits from now to then");
        let released = self.weights[slot].last_use;
        let gather = self.push(Action::Gather { bucket, slot }, released);
        self.operations[gather].after_writes = !std::mem::replace(&mut self.gathered[bucket], true);
        if let Some(evicted) = self.weights[slot].bucket.replace(bucket) {
            self.resident[evicted] = None;
        }
        self.resident[bucket] = Some(slot);
        (self.weights[slot].gather, self.weights[slot].last_use) = (gather, None);
        self.expect(slot, ahead);
    }

    /// A bucket's class of weight slots.
    fn class(&self, bucket: usize) -> usize {
        self.outline.weights.as_ref().expect("what is gathered has slots").class[bucket]
    }

    /// Notes when a weight slot's content is visited next.
    fn expect(&mut self, slot: usize, next_visit: usize) {
        let class = self.class(self.weights[slot].bucket.expect("what is expected is in a slot"));
        let before = std::mem::replace(&mut self.weights[slot].next_visit, next_visit);
        self.by_next_visit[class].remove(&(before, Reverse(slot)));
        self.by_next_visit[class].insert((next_visit, Reverse(slot)));
    }

    fn compute(&mut self, index: usize) {
        let Visit { bucket, pass, round } = self.visits[index];
        let resident = self.resident[bucket];
        let gather = resident.map(|slot| self.weights[slot].gather);
        let (fill, free) = match pass {
            Pass::Forward => (None, None),
            Pass::Backward => {
                let (fill, free) = self.fill(index);
                (Some(fill), free)
            }
        };
        let mut after: Vec<usize> = gather.into_iter().chain(free).collect();
        let units = self.outline.buckets[bucket].clone();
        for at in 0..units.len() {
            let unit = if pass == Pass::Forward { units.start + at } else { units.end - 1 - at };
            let action = Action::Compute { unit, pass, weights: resident.unwrap_or(bucket), gradients: fill };
            // The rest of the visit follows on the same queue.
            self.last_compute = Some(self.push(action, std::mem::take(&mut after)));
        }
        let compute = self.last_compute.expect("a bucket has units");
        if let Some(slot) = resident {
            self.weights[slot].last_use = Some(compute);
            self.expect(slot, self.next[index]);
        }
        if let Some(Fill { slot, last: true, .. }) = fill {
            self.reduce(bucket, slot, round, compute);
        }
    }

    /// The slot that the backward passes of visit `index` add to, and the reduction that must have
    /// read it before.
    fn fill(&mut self, index: usize) -> (Fill, Option<usize>) {
        let Visit { bucket, round, .. } = self.visits[index];
        let whole = self.outline.gradients.is_none();
        // After its backward passes of a round, a bucket's next visit is a forward pass.
        let again = self.visits.get(self.next[index]).is_some_and(|next| next.pass == Pass::Backward);
        let last = !again && (!whole || round + 1 == self.rounds);
        if let Some(slot) = self.adds_to[bucket] {
            return (Fill { slot, first: false, last }, None);
        }
        let class = self.gradient_class(bucket);
        let (reduction, slot) = self.free[class].pop_first().expect(FREE);
        self.adds_to[bucket] = Some(slot);
        (Fill { slot, first: true, last }, reduction)
    }

    /// A bucket's class of gradient slots.
    fn gradient_class(&self, bucket: usize) -> usize {
        self.outline.gradients.as_ref().map_or(bucket, |slots| slots.class[bucket])
    }

    fn reduce(&mut self, bucket: usize, slot: usize, round: usize, compute: usize) {
        let mut reduced = compute;
        if self.outline.sharded {
            let round = if self.outline.gradients.is_some() { round } else { 0 };
            reduced = self.push(Action::Reduce { bucket, slot, round }, [compute]);
            self.adds_to[bucket] = None;
            let class = self.gradient_class(bucket);
            self.free[class].insert((Some(reduced), slot));
            self.last_reduce = Some(reduced);
        }
        if self.outline.replicated && round + 1 == self.rounds {
            self.last_all_reduce = Some(self.push(Action::AllReduce { bucket }, [reduced]));
        }
    }
}

const FREE: &str = "each bucket that is visited twice has a slot more";

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
                if let Action::AllReduce { bucket } = operation.action {
                    prop_assert_eq!(&operation.after, &[index - 1]);
                    let of = match plan.operations[index - 1].action {
                        Action::Reduce { bucket, .. } => Some(bucket),
                        Action::Compute { unit, pass: Pass::Backward, .. } => {
                            plan.outline.buckets.iter().position(|units| units.contains(&unit))
                        }
                        _ => None,
                    };
                    prop_assert_eq!(of, Some(bucket));
                }
            }
        }
    }

    /// Enough units that a builder or verifier that searches lists would take minutes.
    #[test]
    fn many_units_and_many_rounds_are_planned() {
        let units = 1 << 16;
        let outline = |weights, gradients: Option<usize>, prefetch| {
            // No two are of one length.
            let (lens, visits) =
                ((1..=units).collect::<Vec<_>>(), (0..units).chain((0..units).rev()).collect::<Vec<_>>());
            let slots = |count| Slots::of(&lens, &visits, count);
            Outline {
                order: (0..units).collect(),
                buckets: (0..units).map(|unit| unit..unit + 1).collect(),
                prefetch,
                weights: Some(slots(weights)),
                gradients: gradients.map(slots),
                sharded: true,
                replicated: true,
            }
        };
        for outline in [outline(2, Some(2), 1), outline(units, None, 1), outline(units / 2, Some(units / 2), 1000)] {
            let plan = Plan::step(&outline, 1).verify().expect("the planner makes no races");
            assert!(plan.operations.len() > 4 * units);
        }
        let layout = crate::buckets::tests::layout(&[32; 64], 1);
        let policy = crate::Policy { gather: crate::Gather::Copy, ..crate::Policy::default() };
        let outline = Outline::new(&layout, &policy, policy.mesh(1).unwrap());
        let plan = Plan::step(&outline, 1024).verify().expect("the planner makes no races");
        assert!(plan.operations.len() > 3 * 1024 * 64);
    }
}
