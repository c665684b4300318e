//! Whether a plan is free of races: follows the memory through it, and asks for each access whether the queues and the
//! edges order it after the accesses that it must not overlap.
//!
//! What is complete when an operation starts is kept as a vector clock: for each queue, how many of
//! its operations. Queues are first-in, first-out, so a number for each says it all. One number
//! more says whether everything is complete that the compute queue was given before this step: the
//! updates of the step before, or a load.

use std::collections::{HashMap, HashSet};
use std::ops::Range;

use crate::buckets::Slots;
use crate::outline::Outline;
use crate::plan::{Action, Fill, Operation, Pass, Plan, PlanError};

const QUEUES: usize = 4;
const COMPUTE: usize = 0;
const GATHER: usize = 1;
const REDUCE: usize = 2;
const REPLICATE: usize = 3;
/// What the compute queue was given before this step.
const EARLIER: usize = QUEUES;

fn queue(action: Action) -> usize {
    match action {
        Action::Compute { .. } | Action::Agree | Action::Update { .. } => COMPUTE,
        Action::Gather { .. } => GATHER,
        Action::Reduce { .. } => REDUCE,
        Action::AllReduce { .. } => REPLICATE,
    }
}

/// See [`Plan::verify`].
pub(crate) fn verify(plan: &Plan) -> Result<(), PlanError> {
    let order = Order::of(plan)?;
    let mut memory = Memory { bucket_of: bucket_of(&plan.outline), ..Memory::default() };
    for index in 0..plan.operations.len() {
        memory.follow(plan, &order, index)?;
    }
    memory.check_end(plan)
}

/// For each unit its bucket.
fn bucket_of(outline: &Outline) -> Vec<usize> {
    outline.buckets.iter().enumerate().flat_map(|(bucket, units)| units.clone().map(move |_| bucket)).collect()
}

/// The slots that a bucket fits, where each has its own unless `slots` says otherwise.
fn fitting(slots: &Option<Slots>, bucket: usize) -> Range<usize> {
    slots.as_ref().map_or(bucket..bucket + 1, |slots| slots.of_bucket(bucket))
}

/// What is in memory at a point of the list.
#[derive(Default)]
struct Memory {
    bucket_of: Vec<usize>,
    weights: HashMap<usize, Resident>,
    /// Buckets that a slot holds.
    resident: HashSet<usize>,
    /// Buckets that were gathered after the writes of an earlier step.
    written: HashSet<usize>,
    /// Gradient slot → what backward passes have added up there and no reduction has read.
    filled: HashMap<usize, Filled>,
    /// Gradient slot → the last reduction that read it.
    reductions: HashMap<usize, usize>,
    /// Bucket → its reductions to shards; its sums over groups.
    reduced: HashMap<usize, Vec<usize>>,
    replicated: HashMap<usize, usize>,
    /// Unit → its updates.
    updated: HashMap<usize, usize>,
    agreed: Option<usize>,
    /// The last computation, gather, reduction and sum over groups. An operation that is ordered
    /// after one of these is also ordered after all earlier ones of that kind, because each kind
    /// has a first-in, first-out queue.
    last: [Option<usize>; QUEUES],
    /// (unit, pass) → computations.
    uses: HashMap<(usize, Pass), usize>,
}

struct Resident {
    bucket: usize,
    gather: usize,
    uses: Vec<usize>,
}

struct Filled {
    bucket: usize,
    /// The last backward pass.
    backward: usize,
    /// Each unit that has been added to, and whether its gradient is complete.
    units: HashMap<usize, bool>,
}

impl Filled {
    /// Whether the gradients of all units of `bucket` are complete in it.
    fn has_all_of(&self, bucket: usize, units: usize) -> bool {
        self.bucket == bucket && self.units.len() == units && self.units.values().all(|&complete| complete)
    }
}

impl Memory {
    fn follow(&mut self, plan: &Plan, order: &Order, index: usize) -> Result<(), PlanError> {
        let action = plan.operations[index].action;
        let race = |what| PlanError::Race { index, action, what };
        let need = |earlier: usize, what| if order.is_before(earlier, index) { Ok(()) } else { Err(race(what)) };
        let last = self.last;
        let all_before = |queue: usize, what| last[queue].map_or(Ok(()), |earlier| need(earlier, what));
        let within = |slot: usize, slots: Range<usize>| match slots.contains(&slot) {
            true => Ok(()),
            false => Err(PlanError::Slot { index, action, slots }),
        };
        let units_of = |bucket: usize| plan.outline.buckets.get(bucket).ok_or(race("a bucket that there is"));
        let is_after_earlier = order.clocks[index][EARLIER] > 0;
        if self.agreed.is_some() && !matches!(action, Action::Update { .. }) {
            return Err(race("nothing: only updates come after the agreement"));
        }
        match action {
            Action::Gather { bucket, slot } => {
                units_of(bucket)?;
                // Gathers of a bucket follow each other, so one of them has to wait for the writes.
                let waits = plan.operations[index].after_writes || is_after_earlier;
                if !waits && !self.written.contains(&bucket) {
                    return Err(race("the last update of what it moves"));
                }
                self.written.insert(bucket);
                within(slot, plan.outline.weights.as_ref().map_or(0..0, |slots| slots.of_bucket(bucket)))?;
                if self.resident.contains(&bucket) {
                    return Err(race("the end of what an earlier gather of it brought"));
                }
                if let Some(resident) = self.weights.get(&slot) {
                    need(resident.gather, "the gather that filled its slot")?;
                    if resident.uses.is_empty() {
                        return Err(race("a use of what its slot held"));
                    }
                    resident.uses.iter().try_for_each(|&earlier| need(earlier, "every use of what its slot held"))?;
                }
                let resident = Resident { bucket, gather: index, uses: Vec::new() };
                if let Some(replaced) = self.weights.insert(slot, resident) {
                    self.resident.remove(&replaced.bucket);
                }
                self.resident.insert(bucket);
            }
            Action::Compute { unit, pass, weights, gradients } => {
                let &bucket = self.bucket_of.get(unit).ok_or(race("a unit that there is"))?;
                if plan.outline.weights.is_some() {
                    let resident = self.weights.get_mut(&weights).filter(|resident| resident.bucket == bucket);
                    let resident = resident.ok_or(race("a gather of its weights"))?;
                    need(resident.gather, "the gather of its weights")?;
                    resident.uses.push(index);
                }
                *self.uses.entry((unit, pass)).or_insert(0) += 1;
                if gradients.is_some() != (pass == Pass::Backward) {
                    return Err(race("a gradient slot of a backward pass"));
                }
                if let Some(Fill { slot, first, last }) = gradients {
                    within(slot, fitting(&plan.outline.gradients, bucket))?;
                    if let Some(&reduce) = self.reductions.get(&slot) {
                        need(reduce, "the reduction of what its gradient slot held")?;
                    }
                    let filled =
                        self.filled.entry(slot).or_insert(Filled { bucket, backward: index, units: HashMap::new() });
                    // A unit's first addition finds zeros, and none comes after its last.
                    let before = filled.units.insert(unit, last);
                    let goes_on = if first { before.is_none() } else { before == Some(false) };
                    if filled.bucket != bucket || !goes_on {
                        return Err(race("a reduction of what its gradient slot held"));
                    }
                    filled.backward = index;
                }
            }
            Action::Reduce { bucket, slot, round } => {
                let units = units_of(bucket)?.len();
                let filled = self.filled.remove(&slot).filter(|filled| filled.has_all_of(bucket, units));
                need(filled.ok_or(race(BACKWARD))?.backward, BACKWARD)?;
                if !is_after_earlier {
                    return Err(race("the last update, which reads the sums that it replaces"));
                }
                let earlier = self.reduced.entry(bucket).or_default();
                if !plan.outline.sharded || self.replicated.contains_key(&bucket) || earlier.len() != round {
                    return Err(race("the bucket's earlier reductions alone"));
                }
                earlier.push(index);
                self.reductions.insert(slot, index);
            }
            Action::AllReduce { bucket } => {
                let units = units_of(bucket)?.len();
                if plan.outline.sharded {
                    let reduced = self.reduced.get(&bucket).ok_or(race("the bucket's reductions"))?;
                    reduced.iter().try_for_each(|&earlier| need(earlier, "the bucket's reductions"))?;
                } else {
                    let filled = self.filled.remove(&bucket).filter(|filled| filled.has_all_of(bucket, units));
                    need(filled.ok_or(race(BACKWARD))?.backward, BACKWARD)?;
                    self.reductions.insert(bucket, index);
                }
                *self.replicated.entry(bucket).or_insert(0) += 1;
            }
            Action::Agree => {
                all_before(COMPUTE, "every use of weights")?;
                all_before(REDUCE, "every reduction")?;
                all_before(REPLICATE, "every reduction")?;
                self.agreed = Some(index);
            }
            Action::Update { unit } => {
                need(self.agreed.ok_or(race("an agreement"))?, "the agreement")?;
                all_before(GATHER, "every gather of what it writes")?;
                *self.updated.entry(unit).or_insert(0) += 1;
            }
        }
        self.last[queue(action)] = Some(index);
        Ok(())
    }

    /// Whether every gradient was reduced, once, and every unit updated, once.
    fn check_end(&self, plan: &Plan) -> Result<(), PlanError> {
        let outline = &plan.outline;
        // With nothing to sum over, gradients stay where they are.
        let stays = |filled: &Filled| {
            let all = filled.has_all_of(filled.bucket, outline.buckets[filled.bucket].len());
            all && !outline.sharded && !outline.replicated
        };
        if let Some(filled) = self.filled.values().find(|filled| !stays(filled)) {
            let (index, action) = (filled.backward, plan.operations[filled.backward].action);
            return Err(PlanError::Race { index, action, what: UNREDUCED });
        }
        let trains = self.agreed.is_some();
        let count = |what: String, times: Option<&usize>, expected: usize| {
            let times = times.copied().unwrap_or(0);
            if times == expected { Ok(()) } else { Err(PlanError::Count { what, times, expected }) }
        };
        for bucket in 0..outline.buckets.len() {
            let expected = usize::from(trains && outline.replicated);
            let what = format!("bucket {bucket} is summed over the groups");
            count(what, self.replicated.get(&bucket), expected)?;
        }
        for unit in 0..outline.units() {
            count(format!("unit {unit} is updated"), self.updated.get(&unit), usize::from(trains))?;
            let [forward, backward] = [Pass::Forward, Pass::Backward].map(|pass| self.uses.get(&(unit, pass)));
            if trains {
                count(format!("unit {unit} is passed backward"), backward, forward.copied().unwrap_or(0))?;
            }
        }
        Ok(())
    }
}

const UNREDUCED: &str = "a reduction of what it computes";
const BACKWARD: &str = "the backward pass that fills its slot";

/// What is complete when an operation starts.
struct Order {
    clocks: Vec<[usize; QUEUES + 1]>,
    /// An operation's queue, and its place on it from 1.
    places: Vec<(usize, usize)>,
}

impl Order {
    fn of(plan: &Plan) -> Result<Order, PlanError> {
        let mut order = Order { clocks: Vec::new(), places: Vec::new() };
        let mut last: [Option<usize>; QUEUES] = [None; QUEUES];
        let mut lengths = [0; QUEUES];
        for (index, Operation { action, after, .. }) in plan.operations.iter().enumerate() {
            if let Some(&after) = after.iter().find(|&&after| after >= index) {
                return Err(PlanError::Order { index, after });
            }
            let queue = queue(*action);
            let mut clock = [0; QUEUES + 1];
            clock[EARLIER] = usize::from(queue == COMPUTE);
            for &earlier in after.iter().chain(&last[queue]) {
                // Complete with all that was complete before it.
                let (its_queue, place) = order.places[earlier];
                for (now, then) in clock.iter_mut().zip(order.clocks[earlier]) {
                    *now = then.max(*now);
                }
                clock[its_queue] = clock[its_queue].max(place);
            }
            lengths[queue] += 1;
            last[queue] = Some(index);
            order.places.push((queue, lengths[queue]));
            order.clocks.push(clock);
        }
        Ok(order)
    }

    fn is_before(&self, earlier: usize, later: usize) -> bool {
        let (queue, place) = self.places[earlier];
        self.clocks[later][queue] >= place
    }
}

#[cfg(test)]
mod reference;

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Any mesh, placement, depth, order of units, some of which may be used twice, and buckets of
    /// any lengths.
    pub(crate) fn outlines() -> impl Strategy<Value = Outline> {
        let order = (1usize..7).prop_flat_map(|units| {
            let again = prop::collection::vec(0..units, 0..3);
            let lens = prop::collection::vec(1usize..200, units);
            (again, lens).prop_map(|(again, lens)| {
                (crate::buckets::tests::layout(&lens, 1), (0..lens.len()).chain(again).collect::<Vec<usize>>())
            })
        });
        let placement = (0usize..4, 1usize..4, 0usize..600, 0usize..5, 1usize..3, any::<bool>());
        (order, placement).prop_map(|((layout, order), (prefetch, more, bucket, placement, replicate, window))| {
            let [parameters, gradients, optimizer] = match placement {
                0 => [false; 3],
                1 => [false, false, true],
                2 => [false, true, true],
                3 => [true, false, true],
                _ => [true; 3],
            };
            let policy = crate::Policy {
                sharded: crate::Sharded { parameters, gradients, optimizer },
                gather: if window { crate::Gather::Window } else { crate::Gather::Copy },
                prefetch,
                slots: prefetch + more,
                bucket: 4 * bucket as u64,
                ..crate::Policy::default()
            };
            Outline::new(&layout.visiting(order), &policy, crate::Mesh { replicate, shard: 1 })
        })
    }

    fn count(plan: &Plan, wanted: fn(&Action) -> bool) -> usize {
        plan.operations.iter().filter(|operation| wanted(&operation.action)).count()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn every_plan_verifies_and_moves_what_it_must(outline in outlines(), rounds in 1usize..4) {
            let plan = Plan::step(&outline, rounds).verify().expect("the planner makes no races");
            let (units, buckets) = (outline.units(), outline.buckets.len());
            let reduces = count(&plan, |action| matches!(action, Action::Reduce { .. }));
            let expected = if outline.gradients.is_some() { buckets * rounds } else { buckets };
            prop_assert_eq!(reduces, if outline.sharded { expected } else { 0 });
            let all_reduces = count(&plan, |action| matches!(action, Action::AllReduce { .. }));
            prop_assert_eq!(all_reduces, if outline.replicated { buckets } else { 0 });
            prop_assert_eq!(count(&plan, |action| matches!(action, Action::Update { .. })), units);
            let gathers = count(&plan, |action| matches!(action, Action::Gather { .. }));
            match &outline.weights {
                None => prop_assert_eq!(gathers, 0),
                Some(slots) if slots.are_own() => {
                    prop_assert_eq!(gathers, buckets, "with room for all each is gathered once");
                }
                Some(_) => prop_assert!(gathers >= buckets && gathers <= 2 * outline.order.len() * rounds),
            }
            let forward = Plan::forward(&outline, rounds).verify().expect("nor for forward passes");
            let computes = count(&forward, |action| matches!(action, Action::Compute { .. }));
            prop_assert_eq!(computes, outline.order.len() * rounds);
        }

        #[test]
        fn every_edge_matters_unless_the_others_imply_it(outline in outlines(), rounds in 1usize..3) {
            let plan = Plan::step(&outline, rounds);
            for index in 0..plan.operations.len() {
                if plan.operations[index].after_writes {
                    let mut mutant = plan.clone();
                    mutant.operations[index].after_writes = false;
                    let implied = Order::of(&mutant).unwrap().clocks[index][EARLIER] > 0;
                    prop_assert_eq!(mutant.verify().is_ok(), implied, "without the writes before {}", index);
                }
                for edge in 0..plan.operations[index].after.len() {
                    let mut mutant = plan.clone();
                    let removed = mutant.operations[index].after.remove(edge);
                    let implied = Order::of(&mutant).unwrap().is_before(removed, index);
                    prop_assert_eq!(mutant.verify().is_ok(), implied, "without {} → {}", removed, index);
                }
            }
        }

        #[test]
        fn any_change_is_judged_as_by_the_plain_verifier(
            outline in outlines(),
            rounds in 1usize..3,
            changes in prop::collection::vec((any::<prop::sample::Index>(), 0usize..7, 0usize..8), 1..3),
        ) {
            let mut plan = Plan::step(&outline, rounds);
            for (index, kind, value) in changes {
                let index = index.index(plan.operations.len());
                change(&mut plan, index, kind, value);
            }
            let (ours, plain) = (verify(&plan), reference::verify(&plan));
            match (&ours, &plain) {
                // One of several, in no order.
                (Err(PlanError::Race { what: UNREDUCED, .. }), Err(PlanError::Race { what: UNREDUCED, .. })) => {}
                _ => prop_assert_eq!(ours, plain),
            }
        }

        #[test]
        fn no_operation_can_be_left_out_or_done_twice(outline in outlines(), rounds in 1usize..3) {
            let plan = Plan::step(&outline, rounds);
            for index in 0..plan.operations.len() {
                let action = plan.operations[index].action;
                for twice in [false, true] {
                    let changed = with_or_without(&plan, index, twice).verify();
                    prop_assert!(changed.is_err(), "{:?}, twice: {}", action, twice);
                }
            }
        }

        #[test]
        fn a_slot_beyond_the_last_is_refused(outline in outlines(), rounds in 1usize..3) {
            let mut fewer = Plan::step(&outline, rounds);
            let used = |action: &Action| match action { Action::Gather { slot, .. } => slot + 1, _ => 0 };
            let most = fewer.operations.iter().map(|operation| used(&operation.action)).max().unwrap();
            if most > 0 {
                let slots = fewer.outline.weights.as_mut().unwrap();
                slots.of_class.iter_mut().for_each(|slots| slots.end = slots.end.min(most - 1).max(slots.start));
                let refused = matches!(fewer.verify(), Err(PlanError::Slot { .. }));
                prop_assert!(refused, "slot {}", most - 1);
            }
        }
    }

    /// Replaces a number of an operation by `value`, one of its edges, or the operation's place.
    fn change(plan: &mut Plan, index: usize, kind: usize, value: usize) {
        let operations = plan.operations.len();
        let operation = &mut plan.operations[index];
        match (kind, &mut operation.action) {
            (0, Action::Compute { unit, .. } | Action::Update { unit }) => *unit = value,
            (0, Action::Gather { bucket, .. } | Action::Reduce { bucket, .. } | Action::AllReduce { bucket }) => {
                *bucket = value;
            }
            (1, Action::Gather { slot, .. } | Action::Reduce { slot, .. }) => *slot = value,
            (1, Action::Compute { weights, .. }) => *weights = value,
            (2, Action::Compute { gradients: Some(fill), .. }) => fill.slot = value,
            (3, Action::Compute { gradients: Some(fill), .. }) => {
                (fill.first, fill.last) = (value & 1 > 0, value & 2 > 0)
            }
            (4, Action::Reduce { round, .. }) => *round = value,
            (4, Action::Gather { .. }) => operation.after_writes = value & 1 > 0,
            (5, _) if index > 0 && index + 1 < operations => plan.operations.swap(index, index + 1),
            _ if operation.after.is_empty() => operation.after.extend(index.checked_sub(value + 1)),
            _ => operation.after.clear(),
        }
    }

    /// The plan without an operation, or with it twice in a row; edges to it go to what it waited for, or to the second.
    fn with_or_without(plan: &Plan, changed: usize, twice: bool) -> Plan {
        let moved = |index: usize| match (twice, index > changed) {
            (true, _) if index >= changed => index + 1,
            (false, true) => index - 1,
            _ => index,
        };
        let mut operations = Vec::new();
        for (index, operation) in plan.operations.iter().enumerate() {
            let mut after = Vec::new();
            for &earlier in &operation.after {
                match earlier == changed && !twice {
                    true => after.extend(plan.operations[changed].after.iter().copied()),
                    false => after.push(moved(earlier)),
                }
            }
            let operation = Operation { after, ..operation.clone() };
            if index == changed && twice {
                operations.push(operation.clone());
            }
            if index != changed || twice {
                operations.push(operation);
            }
        }
        Plan { outline: plan.outline.clone(), operations }
    }
}
