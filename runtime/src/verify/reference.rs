//! The reference verifier for tests. It walks over all earlier operations where [`super::verify`]
//! keeps the last operation of a kind.

use std::collections::HashMap;

use super::Order;
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
    /// Unit → its reductions to shards; its sums over groups; its updates.
    reduced: HashMap<usize, Vec<usize>>,
    replicated: HashMap<usize, usize>,
    updated: HashMap<usize, usize>,
    agreed: Option<usize>,
    /// (unit, pass) → computations.
    uses: HashMap<(usize, Pass), usize>,
}

struct Resident {
    unit: usize,
    gather: usize,
    uses: Vec<usize>,
}

struct Filled {
    unit: usize,
    /// The last backward pass, and whether it is the last before the reduction.
    backward: usize,
    complete: bool,
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
        let within = |slot: usize, slots: usize| match slot < slots {
            true => Ok(()),
            false => Err(PlanError::Slot { index, action, slots }),
        };
        if self.agreed.is_some() && !matches!(action, Action::Update { .. }) {
            return Err(race("nothing: only updates come after the agreement"));
        }
        match action {
            Action::Gather { unit, slot } => {
                let slots = plan.outline.weights.unwrap_or(0);
                within(slot, slots)?;
                if slots >= plan.outline.units() && slot != unit {
                    return Err(race("its own slot, which each unit has where there are as many"));
                }
                if self.weights.values().any(|resident| resident.unit == unit) {
                    return Err(race("the end of what an earlier gather of it brought"));
                }
                if let Some(resident) = self.weights.get(&slot) {
                    need(resident.gather, "the gather that filled its slot")?;
                    resident.uses.iter().try_for_each(|&earlier| need(earlier, "every use of what its slot held"))?;
                }
                self.weights.insert(slot, Resident { unit, gather: index, uses: Vec::new() });
            }
            Action::Compute { unit, pass, weights, gradients } => {
                if plan.outline.weights.is_some() {
                    let resident = self.weights.get_mut(&weights).filter(|resident| resident.unit == unit);
                    let resident = resident.ok_or(race("a gather of its weights"))?;
                    need(resident.gather, "the gather of its weights")?;
                    resident.uses.push(index);
                }
                *self.uses.entry((unit, pass)).or_insert(0) += 1;
                if gradients.is_some() != (pass == Pass::Backward) {
                    return Err(race("a gradient slot of a backward pass"));
                }
                if let Some(Fill { slot, first, last }) = gradients {
                    within(slot, plan.outline.gradients.unwrap_or(plan.outline.units()))?;
                    if let Some(&reduce) = self.reductions.get(&slot) {
                        need(reduce, "the reduction of what its gradient slot held")?;
                    }
                    let goes_on = |filled: &Filled| filled.unit == unit && !filled.complete && !first;
                    match self.filled.get(&slot) {
                        None if first => {}
                        Some(filled) if goes_on(filled) => {}
                        _ => return Err(race("a reduction of what its gradient slot held")),
                    }
                    self.filled.insert(slot, Filled { unit, backward: index, complete: last });
                }
            }
            Action::Reduce { unit, slot, round } => {
                let filled = self.filled.remove(&slot).filter(|filled| filled.unit == unit && filled.complete);
                need(filled.ok_or(race(BACKWARD))?.backward, BACKWARD)?;
                let earlier = self.reduced.entry(unit).or_default();
                if !plan.outline.sharded || self.replicated.contains_key(&unit) || earlier.len() != round {
                    return Err(race("the unit's earlier reductions alone"));
                }
                earlier.push(index);
                self.reductions.insert(slot, index);
            }
            Action::AllReduce { unit } => {
                if plan.outline.sharded {
                    let reduced = self.reduced.get(&unit).ok_or(race("the unit's reductions"))?;
                    reduced.iter().try_for_each(|&earlier| need(earlier, "the unit's reductions"))?;
                } else {
                    let filled = self.filled.remove(&unit).filter(|filled| filled.unit == unit && filled.complete);
                    need(filled.ok_or(race(BACKWARD))?.backward, BACKWARD)?;
                    self.reductions.insert(unit, index);
                }
                *self.replicated.entry(unit).or_insert(0) += 1;
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
        let stays = |filled: &Filled| filled.complete && !outline.sharded && !outline.replicated;
        if let Some(filled) = self.filled.values().find(|filled| !stays(filled)) {
            let (index, action) = (filled.backward, plan.operations[filled.backward].action);
            return Err(PlanError::Race { index, action, what: "a reduction of what it computes" });
        }
        let trains = self.agreed.is_some();
        let expected = |wanted: bool| usize::from(trains && wanted);
        for unit in 0..outline.units() {
            for (what, times, expected) in [
                ("summed over the groups", &self.replicated, expected(outline.replicated)),
                ("updated", &self.updated, expected(true)),
            ] {
                let times = times.get(&unit).copied().unwrap_or(0);
                if times != expected {
                    return Err(PlanError::Count { unit, what, times, expected });
                }
            }
            let [forward, backward] = [Pass::Forward, Pass::Backward].map(|pass| self.uses.get(&(unit, pass)));
            if trains && forward != backward {
                let [expected, times] = [forward, backward].map(|count| count.copied().unwrap_or(0));
                return Err(PlanError::Count { unit, what: "passed backward", times, expected });
            }
        }
        Ok(())
    }
}

const BACKWARD: &str = "the backward pass that fills its slot";
