//! The reference verifier for tests. It walks over all earlier operations where [`super::verify`]
//! keeps the last operation of a kind.

use std::collections::HashMap;

use super::{EARLIER, Order, fitting};
use crate::plan::{Action, Fill, Pass, Plan, PlanError};

pub(crate) fn verify(plan: &Plan) -> Result<(), PlanError> {
    let order = Order::of(plan)?;
    let mut memory = Memory::default();
    for index in 0..plan.operations.len() {
        memory.follow(plan, &order, index)?;
    }
    memory.check_end(plan)
}

/// What is in memory at a point of the list.
#[derive(Default)]
struct Memory {
    weights: HashMap<usize, Resident>,
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
    /// Backward passes, with whether each was its unit's last.
    passes: Vec<(usize, usize, bool)>,
}

impl Filled {
    /// The last backward pass, where all units of `bucket` have had their last.
    fn complete(&self, bucket: usize, units: std::ops::Range<usize>) -> Option<usize> {
        let mut units = units;
        let has_last = |unit| self.passes.iter().any(|&(_, of, last)| of == unit && last);
        (self.bucket == bucket && units.all(has_last)).then(|| self.last())
    }

    fn last(&self) -> usize {
        self.passes.last().expect("a slot is filled by a pass").0
    }
}

impl Memory {
    fn follow(&mut self, plan: &Plan, order: &Order, index: usize) -> Result<(), PlanError> {
        let action = plan.operations[index].action;
        let race = |what| PlanError::Race { index, action, what };
        let need = |earlier: usize, what| if order.is_before(earlier, index) { Ok(()) } else { Err(race(what)) };
        let all_before = |wanted: fn(Action) -> bool, what| {
            (0..index)
                .filter(|&earlier| wanted(plan.operations[earlier].action))
                .try_for_each(|earlier| need(earlier, what))
        };
        let within = |slot: usize, slots: std::ops::Range<usize>| match slots.contains(&slot) {
            true => Ok(()),
            false => Err(PlanError::Slot { index, action, slots }),
        };
        let buckets = &plan.outline.buckets;
        let units_of = |bucket: usize| buckets.get(bucket).cloned().ok_or(race("a bucket that there is"));
        if self.agreed.is_some() && !matches!(action, Action::Update { .. }) {
            return Err(race("nothing: only updates come after the agreement"));
        }
        match action {
            Action::Gather { bucket, slot } => {
                units_of(bucket)?;
                let is_gather = |earlier: &usize| match plan.operations[*earlier].action {
                    Action::Gather { bucket: other, .. } => other == bucket,
                    _ => false,
                };
                let waits = |index: usize| plan.operations[index].after_writes || order.clocks[index][EARLIER] > 0;
                if !(0..=index).filter(is_gather).any(waits) {
                    return Err(race("the last update of what it moves"));
                }
                within(slot, plan.outline.weights.as_ref().map_or(0..0, |slots| slots.of_bucket(bucket)))?;
                if self.weights.values().any(|resident| resident.bucket == bucket) {
                    return Err(race("the end of what an earlier gather of it brought"));
                }
                if let Some(resident) = self.weights.get(&slot) {
                    need(resident.gather, "the gather that filled its slot")?;
                    if resident.uses.is_empty() {
                        return Err(race("a use of what its slot held"));
                    }
                    resident.uses.iter().try_for_each(|&earlier| need(earlier, "every use of what its slot held"))?;
                }
                self.weights.insert(slot, Resident { bucket, gather: index, uses: Vec::new() });
            }
            Action::Compute { unit, pass, weights, gradients } => {
                let bucket = buckets.iter().position(|units| units.contains(&unit));
                let bucket = bucket.ok_or(race("a unit that there is"))?;
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
                    let filled = self.filled.entry(slot).or_insert(Filled { bucket, passes: Vec::new() });
                    let before = filled.passes.iter().rev().find(|&&(_, of, _)| of == unit);
                    let goes_on = match before {
                        None => first,
                        Some(&(_, _, last)) => !first && !last,
                    };
                    if filled.bucket != bucket || !goes_on {
                        return Err(race("a reduction of what its gradient slot held"));
                    }
                    filled.passes.push((index, unit, last));
                }
            }
            Action::Reduce { bucket, slot, round } => {
                let units = units_of(bucket)?;
                let filled = self.filled.remove(&slot).and_then(|filled| filled.complete(bucket, units));
                need(filled.ok_or(race(BACKWARD))?, BACKWARD)?;
                if order.clocks[index][EARLIER] == 0 {
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
                let units = units_of(bucket)?;
                if plan.outline.sharded {
                    let reduced = self.reduced.get(&bucket).ok_or(race("the bucket's reductions"))?;
                    reduced.iter().try_for_each(|&earlier| need(earlier, "the bucket's reductions"))?;
                } else {
                    let filled = self.filled.remove(&bucket).and_then(|filled| filled.complete(bucket, units));
                    need(filled.ok_or(race(BACKWARD))?, BACKWARD)?;
                    self.reductions.insert(bucket, index);
                }
                *self.replicated.entry(bucket).or_insert(0) += 1;
            }
            Action::Agree => {
                all_before(|action| matches!(action, Action::Compute { .. }), "every use of weights")?;
                let reduces = |action| matches!(action, Action::Reduce { .. } | Action::AllReduce { .. });
                all_before(reduces, "every reduction")?;
                self.agreed = Some(index);
            }
            Action::Update { unit } => {
                need(self.agreed.ok_or(race("an agreement"))?, "the agreement")?;
                all_before(|action| matches!(action, Action::Gather { .. }), "every gather of what it writes")?;
                *self.updated.entry(unit).or_insert(0) += 1;
            }
        }
        Ok(())
    }

    /// Whether every gradient was reduced, once, and every unit updated, once.
    fn check_end(&self, plan: &Plan) -> Result<(), PlanError> {
        let outline = &plan.outline;
        // With nothing to sum over, gradients stay where they are.
        let stays = |filled: &Filled| {
            let all = filled.complete(filled.bucket, outline.buckets[filled.bucket].clone());
            all.is_some() && !outline.sharded && !outline.replicated
        };
        if let Some(filled) = self.filled.values().find(|filled| !stays(filled)) {
            let (index, action) = (filled.last(), plan.operations[filled.last()].action);
            return Err(PlanError::Race { index, action, what: "a reduction of what it computes" });
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

const BACKWARD: &str = "the backward pass that fills its slot";
