//! Runs a plan on a machine that there need not be: when each operation starts and ends, and how long the computation waits.
//!
//! | file | subject |
//! |---|---|
//! | `machine` | how long a collective takes alone |
//! | `schedule` | what waits for what, and how links are shared |
//!
//! What is assumed: all ranks are alike, and begin a step at the same moment with no weights gathered, as the engine does. Computing takes
//! a unit's floating-point operations at one speed for all kernels. Kernels run on the thread that calls the step, so an operation is issued when the
//! caller gets to it in the list. Moving bytes costs a rank no computing, and links carry as much as they would if nobody else used them.

mod machine;
mod schedule;

use std::collections::HashMap;
use std::time::Duration;

use pillion_kernels::DType;

use machine::Transfer;
pub use machine::{Link, Machine, Sent};
pub use schedule::Span;
use schedule::{Task, schedule};

use crate::trace::{TraceEvent, Track};
use crate::{Action, Gather, Layout, Pass, Policy, Verified};

/// Floating-point operations of one round on one rank, for each unit.
#[derive(Clone, Debug, PartialEq)]
pub struct Work {
    /// Of the forward pass.
    pub forward: Vec<f64>,
    /// Of the backward pass.
    pub backward: Vec<f64>,
}

/// A simulated step, of any rank: all are alike.
#[derive(Clone, Debug, PartialEq)]
pub struct Simulation {
    /// When each operation of the plan ran.
    pub spans: Vec<Span>,
    /// Bytes that a rank sent for each operation.
    pub sent: Vec<Sent>,
    /// Seconds of the step.
    pub step: f64,
    /// Seconds of these in which the rank computed.
    pub computing: f64,
}

/// What AdamW moves for a parameter: reads gradient, two moments and master weight, writes all but the gradient.
const UPDATE_BYTES: u64 = 7 * 4;
/// What a gradient costs besides computing it: it is zeroed before, and its norm taken after.
const GRADIENT_BYTES: u64 = 2 * 4;
/// What the agreement carries: the square norm, the count of values that are not finite, and the request to stop.
const AGREEMENT_BYTES: u64 = 3 * 8;

/// Runs a plan for `layout` and `policy`.
///
/// # Panics
/// When the plan, the work or the machine is for another layout.
pub fn simulate(plan: &Verified, layout: &Layout, policy: &Policy, machine: &Machine, work: &Work) -> Simulation {
    let costs: Vec<Cost> =
        plan.operations.iter().map(|operation| cost(operation.action, layout, policy, machine, work)).collect();
    let mut reductions = HashMap::new();
    let tasks = plan.operations.iter().zip(&costs).enumerate().map(|(index, (operation, cost))| Task {
        lane: track(operation.action) as usize,
        after: &operation.after,
        issued_after: match operation.action {
            // Both add to the same shard, which the earlier one has until it is complete.
            Action::Reduce { unit, .. } => reductions.insert(unit, index),
            _ => None,
        },
        fixed: cost.fixed,
        links: cost.links,
    });
    let spans = schedule(&tasks.collect::<Vec<_>>());
    Simulation {
        step: spans.iter().fold(0.0, |end: f64, span| end.max(span.end)),
        computing: costs.iter().map(|cost| cost.computing).sum(),
        sent: costs.iter().map(|cost| cost.sent).collect(),
        spans,
    }
}

impl Simulation {
    /// Seconds in which the rank waited for collectives.
    pub fn exposed(&self) -> f64 {
        (self.step - self.computing).max(0.0)
    }

    /// Bytes that a rank sent, and as many that it received, in operations of a track: gathers, reductions, and on the compute track the agreement.
    pub fn sent(&self, plan: &Verified, of: Track) -> Sent {
        let mut sum = Sent::default();
        let wanted = plan.operations.iter().zip(&self.sent).filter(|(operation, _)| track(operation.action) == of);
        wanted.for_each(|(_, &sent)| sum.add(sent));
        sum
    }

    /// Seconds for which a track had something under way.
    pub fn busy(&self, plan: &Verified, of: Track) -> f64 {
        let wanted = plan.operations.iter().zip(&self.spans).filter(|(operation, _)| track(operation.action) == of);
        wanted.map(|(_, span)| span.end - span.start).sum()
    }

    /// Its timeline, as one of rank 0.
    pub fn trace(&self, plan: &Verified, layout: &Layout) -> Vec<TraceEvent> {
        let event = |(index, &Span { start, end }): (usize, &Span)| {
            let action = plan.operations[index].action;
            let (name, unit) = match action {
                Action::Gather { unit, .. } => ("gather", Some(unit)),
                Action::Compute { unit, pass: Pass::Forward, .. } => ("forward", Some(unit)),
                Action::Compute { unit, pass: Pass::Backward, .. } => ("backward", Some(unit)),
                Action::Reduce { unit, .. } => ("reduce", Some(unit)),
                Action::Agree => ("agree", None),
                Action::Update { unit } => ("update", Some(unit)),
            };
            TraceEvent {
                rank: 0,
                track: track(action),
                name,
                unit: unit.map(|unit| layout.units[unit].name.clone()),
                bytes: self.sent[index].total(),
                start: Duration::from_secs_f64(start),
                duration: Duration::from_secs_f64(end - start),
            }
        };
        self.spans.iter().enumerate().map(event).collect()
    }
}

fn track(action: Action) -> Track {
    match action {
        Action::Compute { .. } | Action::Agree | Action::Update { .. } => Track::Compute,
        Action::Gather { .. } => Track::Gather,
        Action::Reduce { .. } => Track::Reduce,
    }
}

/// What an operation takes by itself.
#[derive(Default)]
struct Cost {
    sent: Sent,
    fixed: f64,
    links: [f64; schedule::LINKS],
    /// Seconds of `fixed` in which the rank computes.
    computing: f64,
}

fn cost(action: Action, layout: &Layout, policy: &Policy, machine: &Machine, work: &Work) -> Cost {
    let computing = |seconds: f64| Cost { fixed: seconds, computing: seconds, ..Cost::default() };
    let moving = |bytes: usize| machine.memory.map_or(0.0, |speed| bytes as f64 / speed);
    let flowing = |Transfer { sent, latency, links }| Cost { sent, fixed: latency, links, computing: 0.0 };
    let bytes = |elements: usize, dtype: DType| (elements * dtype.bytes()) as u64;
    match action {
        Action::Gather { unit, .. } => {
            let shard = bytes(layout.units[unit].shard, policy.weights);
            flowing(match policy.gather {
                Gather::Copy => machine.exchange(layout.world, shard),
                Gather::Window => machine.exchange_in_place(layout.world, shard),
            })
        }
        Action::Compute { unit, pass: Pass::Forward, .. } => computing(work.forward[unit] / machine.flops),
        Action::Compute { unit, pass: Pass::Backward, .. } => {
            let gradient = moving(GRADIENT_BYTES as usize * layout.units[unit].padded);
            computing(work.backward[unit] / machine.flops + gradient)
        }
        Action::Reduce { unit, .. } => {
            flowing(machine.exchange(layout.world, bytes(layout.units[unit].shard, DType::F32)))
        }
        Action::Agree => {
            let norms = moving(DType::F32.bytes() * layout.shards());
            let agreement = machine.agreement(layout.world, AGREEMENT_BYTES);
            Cost { sent: agreement.sent, fixed: norms + agreement.seconds(), computing: norms, ..Cost::default() }
        }
        Action::Update { unit } => {
            let narrow = if policy.weights == DType::F32 { 0 } else { policy.weights.bytes() };
            computing(moving((UPDATE_BYTES as usize + narrow) * layout.units[unit].shard))
        }
    }
}

#[cfg(test)]
mod tests;
