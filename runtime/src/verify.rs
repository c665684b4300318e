//! Whether a plan is free of races: follows the memory through it, and asks for each access whether the queues and the
//! edges order it after the accesses that it must not overlap.
//!
//! What is complete when an operation starts is kept as a vector clock: for each queue, how many of its operations. Queues are
//! first-in, first-out, so three numbers say it all.

use std::collections::HashMap;

use crate::plan::{Action, Operation, Pass, Plan, PlanError};

const QUEUES: usize = 3;

fn queue(action: Action) -> usize {
    match action {
        Action::Compute { .. } | Action::Agree | Action::Update { .. } => 0,
        Action::Gather { .. } => 1,
        Action::Reduce { .. } => 2,
    }
}

/// See [`Plan::verify`].
pub(crate) fn verify(plan: &Plan) -> Result<(), PlanError> {
    let order = Order::of(plan)?;
    let mut memory = Memory::default();
    for (index, operation) in plan.operations.iter().enumerate() {
        let race = |what| PlanError::Race { index, action: operation.action, what };
        let need = |earlier: usize, what| if order.is_before(earlier, index) { Ok(()) } else { Err(race(what)) };
        let all_before = |wanted: fn(Action) -> bool, what| {
            (0..index)
                .filter(|&earlier| wanted(plan.operations[earlier].action))
                .try_for_each(|earlier| need(earlier, what))
        };
        match operation.action {
            Action::Gather { unit, slot } => {
                if let Some(resident) = memory.weights.get(&slot) {
                    need(resident.gather, "the gather that filled its slot")?;
                    resident.uses.iter().try_for_each(|&earlier| need(earlier, "every use of what its slot held"))?;
                }
                memory.weights.insert(slot, Resident { unit, gather: index, uses: Vec::new() });
            }
            Action::Compute { unit, pass, weights, gradients } => {
                let resident = memory.weights.get_mut(&weights).filter(|resident| resident.unit == unit);
                let resident = resident.ok_or(race("a gather of its weights"))?;
                need(resident.gather, "the gather of its weights")?;
                resident.uses.push(index);
                if let (Pass::Backward, Some(slot)) = (pass, gradients) {
                    if let Some(&reduce) = memory.reductions.get(&slot) {
                        need(reduce, "the reduction of what its gradient slot held")?;
                    }
                    if memory.filled.insert(slot, (unit, index)).is_some() {
                        return Err(race("a reduction of what its gradient slot held"));
                    }
                }
            }
            Action::Reduce { unit, slot, round } => {
                let filled = memory.filled.remove(&slot).filter(|&(resident, _)| resident == unit);
                let (_, backward) = filled.ok_or(race("a backward pass that fills its slot"))?;
                need(backward, "the backward pass that fills its slot")?;
                memory.reductions.insert(slot, index);
                *memory.reduced.entry((unit, round)).or_insert(0) += 1;
            }
            Action::Agree => {
                all_before(|action| matches!(action, Action::Compute { .. }), "every use of weights")?;
                all_before(|action| matches!(action, Action::Reduce { .. }), "every reduction")?;
            }
            Action::Update { .. } => {
                if !plan.operations[..index].iter().any(|earlier| earlier.action == Action::Agree) {
                    return Err(race("an agreement"));
                }
                all_before(|action| action == Action::Agree, "the agreement")?;
                all_before(|action| matches!(action, Action::Gather { .. }), "every gather of what it writes")?;
            }
        }
    }
    if let Some(&(_, index)) = memory.filled.values().next() {
        let action = plan.operations[index].action;
        return Err(PlanError::Race { index, action, what: "a reduction of what it computes" });
    }
    match memory.reduced.iter().find(|&(_, &times)| times != 1) {
        Some((&(unit, round), &times)) => Err(PlanError::Reductions { unit, round, times }),
        None => Ok(()),
    }
}

/// What is in memory at a point of the list.
#[derive(Default)]
struct Memory {
    weights: HashMap<usize, Resident>,
    /// Gradient slot → the last reduction that read it.
    reductions: HashMap<usize, usize>,
    /// Gradient slot → (unit, the backward pass that fills it), until it is reduced.
    filled: HashMap<usize, (usize, usize)>,
    /// (unit, round) → number of reductions.
    reduced: HashMap<(usize, usize), usize>,
}

struct Resident {
    unit: usize,
    gather: usize,
    uses: Vec<usize>,
}

/// What is complete when an operation starts.
struct Order {
    clocks: Vec<[usize; QUEUES]>,
    /// An operation's queue, and its place on it from 1.
    places: Vec<(usize, usize)>,
}

impl Order {
    fn of(plan: &Plan) -> Result<Order, PlanError> {
        let mut order = Order { clocks: Vec::new(), places: Vec::new() };
        let mut last: [Option<usize>; QUEUES] = [None; QUEUES];
        let mut lengths = [0; QUEUES];
        for (index, Operation { action, after }) in plan.operations.iter().enumerate() {
            if let Some(&after) = after.iter().find(|&&after| after >= index) {
                return Err(PlanError::Order { index, after });
            }
            let queue = queue(*action);
            let mut clock = [0; QUEUES];
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
mod tests {
    use super::*;
    use crate::plan::Slots;
    use proptest::prelude::*;

    fn slots() -> impl Strategy<Value = Slots> {
        (1usize..7, 0usize..4, 1usize..4, 1usize..4).prop_map(|(units, prefetch, more, gradients)| Slots {
            units,
            prefetch,
            weights: prefetch + more,
            gradients,
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn every_plan_verifies_and_gathers_what_it_must(slots in slots(), rounds in 1usize..4) {
            let plan = Plan::step(slots, rounds).verify().expect("the planner makes no races");
            let count = |wanted: fn(&Action) -> bool| plan.operations.iter().filter(|op| wanted(&op.action)).count();
            prop_assert_eq!(count(|action| matches!(action, Action::Reduce { .. })), slots.units * rounds);
            prop_assert_eq!(count(|action| matches!(action, Action::Update { .. })), slots.units);
            let gathers = count(|action| matches!(action, Action::Gather { .. }));
            prop_assert!(gathers >= slots.units && gathers <= 2 * slots.units * rounds);
            if slots.weights >= slots.units {
                prop_assert_eq!(gathers, slots.units, "with room for all units each is gathered once");
            }
            Plan::forward(slots, rounds).verify().expect("nor for forward passes");
        }

        #[test]
        fn every_edge_matters_unless_the_others_imply_it(slots in slots(), rounds in 1usize..3) {
            let plan = Plan::step(slots, rounds);
            for index in 0..plan.operations.len() {
                for edge in 0..plan.operations[index].after.len() {
                    let mut mutant = plan.clone();
                    let removed = mutant.operations[index].after.remove(edge);
                    let implied = Order::of(&mutant).unwrap().is_before(removed, index);
                    prop_assert_eq!(mutant.verify().is_ok(), implied, "without {} → {}", removed, index);
                }
            }
        }
    }

    #[test]
    fn a_gradient_reduced_twice_or_never_is_refused() {
        let slots = Slots { units: 2, prefetch: 0, weights: 1, gradients: 1 };
        let is_reduce = |operation: &Operation| matches!(operation.action, Action::Reduce { .. });
        let plan = Plan::step(slots, 1);
        let reduce = plan.operations.iter().position(is_reduce).unwrap();
        let mut twice = plan.clone();
        let again = twice.operations[reduce].clone();
        twice.operations.push(again);
        assert!(twice.verify().is_err());
        let mut never = plan;
        // Its place is kept by a gather's twin, so that the indices of the edges stay right.
        never.operations[reduce].action = never.operations[0].action;
        assert!(never.verify().is_err());
    }
}
