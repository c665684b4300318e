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

use std::time::Duration;

use pillion_kernels::DType;

use machine::{Groups, Transfer};
pub use machine::{Link, Machine, Sent};
pub use schedule::Times;
use schedule::{Task, schedule};

use crate::buckets::Buckets;
use crate::plan::Fill;
use crate::trace::{self, TraceEvent, Track, label};
use crate::{Action, Gather, Layout, Mesh, Pass, Policy, Verified};

/// Floating-point operations of one use of each unit on one rank.
#[derive(Clone, Debug, PartialEq)]
pub struct Work {
    /// Of the forward pass.
    pub forward: Vec<f64>,
    /// Of the backward pass, with what it repeats of the forward pass.
    pub backward: Vec<f64>,
}

/// A simulated step, of any rank: all are alike.
#[derive(Clone, Debug, PartialEq)]
pub struct Simulation {
    /// When each operation of the plan ran.
    pub spans: Vec<Times>,
    /// Bytes that a rank sent for each operation.
    pub sent: Vec<Sent>,
    /// Seconds of the step.
    pub step: f64,
    /// Seconds for which the rank computed, from the start of each operation.
    computed: Vec<f64>,
}

/// Bytes that AdamW moves for a parameter: it reads gradient, two moments and master weight, and writes all but the gradient.
const UPDATE_BYTES: usize = 7 * 4;
/// Bytes that the agreement carries: the sums of a step, and the four requests of `pillion train`.
pub const AGREEMENT_BYTES: u64 = 8 * (crate::step::SUMS as u64 + 4);

/// Runs a plan for `layout`, `policy` and `mesh`.
///
/// # Panics
/// When the plan, the work or the layout is for something else, or the mesh does not fit the machine ([`Machine::fits`]).
pub fn simulate(
    plan: &Verified,
    layout: &Layout,
    policy: &Policy,
    mesh: Mesh,
    machine: &Machine,
    work: &Work,
) -> Simulation {
    let groups = machine.groups(mesh).unwrap_or_else(|| panic!("{mesh:?} does not fill hosts of {machine:?}"));
    assert_eq!(layout.shards, mesh.shard, "a layout is made for its mesh");
    let buckets = Buckets::new(layout, &plan.outline.buckets);
    let costs = Costs { layout, buckets, policy, mesh, machine, work, groups };
    let costs: Vec<Cost> = plan.operations.iter().map(|operation| costs.of(operation.action)).collect();
    let tasks = plan.operations.iter().zip(&costs).map(|(operation, cost)| Task {
        lane: label(operation.action, &plan.outline).0 as usize,
        after: &operation.after,
        fixed: cost.fixed,
        links: cost.links,
    });
    let spans = schedule(&tasks.collect::<Vec<_>>(), machine.contention);
    Simulation {
        step: spans.iter().fold(0.0, |end: f64, span| end.max(span.end)),
        computed: costs.iter().map(|cost| cost.computing).collect(),
        sent: costs.iter().map(|cost| cost.sent).collect(),
        spans,
    }
}

impl Simulation {
    /// Seconds of the step in which the rank computed.
    pub fn computing(&self) -> f64 {
        self.computed.iter().sum()
    }

    /// Seconds in which the rank waited for collectives.
    pub fn exposed(&self) -> f64 {
        (self.step - self.computing()).max(0.0)
    }

    /// Seconds in which at least one collective was under way.
    pub fn communicating(&self, plan: &Verified) -> f64 {
        let ran = plan.operations.iter().zip(&self.spans).zip(&self.computed);
        let collectives = ran.filter_map(|((operation, span), computed)| match operation.action {
            Action::Compute { .. } | Action::Update { .. } => None,
            _ => Some((span.start + computed, span.end)),
        });
        let mut collectives: Vec<(f64, f64)> = collectives.collect();
        collectives.sort_by(|a, b| a.0.total_cmp(&b.0));
        let (mut seconds, mut until) = (0.0, 0.0);
        for (start, end) in collectives {
            seconds += (end - start.max(until)).max(0.0);
            until = end.max(until);
        }
        seconds
    }

    /// Bytes that a rank sent, and as many that it received, in the operations of a track; on the compute track that is the agreement.
    pub fn sent(&self, plan: &Verified, of: Track) -> Sent {
        let mut sum = Sent::default();
        let wanted = plan
            .operations
            .iter()
            .zip(&self.sent)
            .filter(|(operation, _)| label(operation.action, &plan.outline).0 == of);
        wanted.for_each(|(_, &sent)| sum.add(sent));
        sum
    }

    /// Seconds for which a track had something under way.
    pub fn busy(&self, plan: &Verified, of: Track) -> f64 {
        let wanted = plan
            .operations
            .iter()
            .zip(&self.spans)
            .filter(|(operation, _)| label(operation.action, &plan.outline).0 == of);
        wanted.map(|(_, span)| span.end - span.start).sum()
    }

    /// Its timeline, as one of rank 0.
    pub fn trace(&self, plan: &Verified, layout: &Layout) -> Vec<TraceEvent> {
        let event = |(index, &Times { start, end }): (usize, &Times)| {
            let action = plan.operations[index].action;
            let (track, name, units) = label(action, &plan.outline);
            TraceEvent {
                rank: 0,
                track,
                name,
                unit: trace::name(layout, units),
                bytes: self.sent[index].total(),
                start: Duration::from_secs_f64(start),
                duration: Duration::from_secs_f64(end - start),
            }
        };
        self.spans.iter().enumerate().map(event).collect()
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

/// What costs depend on.
struct Costs<'a> {
    layout: &'a Layout,
    buckets: Buckets,
    policy: &'a Policy,
    mesh: Mesh,
    machine: &'a Machine,
    work: &'a Work,
    groups: Groups,
}

impl Costs<'_> {
    fn of(&self, action: Action) -> Cost {
        let Costs { policy, machine, work, groups, .. } = *self;
        let (units, buckets) = (&self.layout.units, &self.buckets.buckets);
        let bytes = |elements: usize, dtype: DType| (elements * dtype.bytes()) as u64;
        match action {
            Action::Gather { bucket, .. } => {
                let shard = bytes(buckets[bucket].shard, policy.weights);
                flowing(match policy.gather {
                    Gather::Window if policy.sharded.parameters => machine.exchange_in_place(groups.shard, shard),
                    _ => machine.exchange(groups.shard, shard),
                })
            }
            Action::Compute { unit, pass: Pass::Forward, .. } => computing(work.forward[unit] / machine.flops),
            Action::Compute { unit, pass: Pass::Backward, gradients, .. } => {
                let moved = gradients.map_or(0, |fill| self.gradient_bytes(fill)) * units[unit].padded;
                computing(work.backward[unit] / machine.flops + self.moving(moved))
            }
            Action::Reduce { bucket, .. } => {
                flowing(machine.exchange(groups.shard, bytes(buckets[bucket].shard, policy.reduce)))
            }
            Action::AllReduce { bucket } => {
                // Shards have been summed, and are f32.
                let travelling = if policy.sharded.optimizer { DType::F32 } else { policy.reduce };
                let part = buckets[bucket].shard.div_ceil(self.mesh.replicate);
                let reduced = machine.exchange(groups.replicate, bytes(part, travelling));
                flowing(reduced.then(machine.exchange(groups.replicate, bytes(part, DType::F32))))
            }
            Action::Agree => {
                let norms = self.moving(DType::F32.bytes() * self.layout.shard_len() / self.mesh.replicate);
                let agreement = machine.agreement(groups.world, AGREEMENT_BYTES);
                Cost { sent: agreement.sent, fixed: norms + agreement.seconds(), computing: norms, ..Cost::default() }
            }
            Action::Update { unit } => {
                let narrow = if policy.weights == DType::F32 { 0 } else { policy.weights.bytes() };
                computing(self.moving((UPDATE_BYTES + narrow) * units[unit].shard))
            }
        }
    }

    /// Bytes that a parameter's gradient costs besides computing it: it is zeroed before; after, its norm is taken, and it may be rounded.
    fn gradient_bytes(&self, fill: Fill) -> usize {
        let f32 = DType::F32.bytes();
        let zeroing = if fill.first { f32 } else { 0 };
        let rounding = if self.policy.reduce == DType::F32 { 0 } else { f32 + self.policy.reduce.bytes() };
        zeroing + if fill.last { f32 + rounding } else { 0 }
    }

    fn moving(&self, bytes: usize) -> f64 {
        self.machine.memory.map_or(0.0, |speed| bytes as f64 / speed)
    }
}

fn computing(seconds: f64) -> Cost {
    Cost { fixed: seconds, computing: seconds, ..Cost::default() }
}

fn flowing(transfer: Transfer) -> Cost {
    Cost { sent: transfer.sent, fixed: transfer.latency, links: transfer.links, computing: 0.0 }
}

#[cfg(test)]
mod tests;
