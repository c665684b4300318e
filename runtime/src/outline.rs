//! What a plan is made for.

use std::ops::Range;

use crate::buckets::{self, Slots};
use crate::{Gather, Layout, Mesh, Policy};

/// What a plan is made for: the memory, and which axes of the mesh there are.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Outline {
    /// The units in the order of a forward pass.
    pub order: Vec<usize>,
    /// The units of each bucket: what moves as one operation. Those of a bucket follow each other
    /// in `order`.
    pub buckets: Vec<Range<usize>>,
    /// Buckets gathered ahead.
    pub prefetch: usize,
    /// Where gathered weights lie: room for more than `prefetch` buckets that follow each other.
    /// None: weights are whole, and never gathered.
    pub weights: Option<Slots>,
    /// Where gradients lie that are reduced in every round. None: every bucket has the slot of its
    /// number, and is reduced in the last round.
    pub gradients: Option<Slots>,
    /// Whether gradients are reduced to shards.
    pub sharded: bool,
    /// Whether there are several groups to sum over.
    pub replicated: bool,
}

impl Outline {
    /// That of an engine with this layout and policy.
    pub fn new(layout: &Layout, policy: &Policy, mesh: Mesh) -> Outline {
        let sharded = policy.sharded;
        let limit = policy.bucket / policy.weights.bytes() as u64;
        let mut outline = Outline {
            order: layout.order.clone(),
            buckets: buckets::runs(layout, usize::try_from(limit).unwrap_or(usize::MAX)),
            prefetch: policy.prefetch,
            weights: None,
            gradients: None,
            sharded: sharded.optimizer,
            replicated: mesh.replicate > 1,
        };
        let lens = outline.bucket_lens(layout);
        let slots = Slots::of(&lens, &outline.all_ways(), policy.slots);
        outline.weights = match (sharded.parameters, policy.gather) {
            (true, Gather::Copy) => Some(slots.clone()),
            // A window holds its bucket and no other.
            (true, Gather::Window) => Some(Slots::own(lens.len())),
            (false, _) => sharded.optimizer.then(|| Slots::own(lens.len())),
        };
        outline.gradients = sharded.gradients.then(|| {
            let least = outline.least_gradients(&slots);
            slots.at_least(&least)
        });
        outline
    }

    /// Elements of each bucket, with padding.
    pub(crate) fn bucket_lens(&self, layout: &Layout) -> Vec<usize> {
        let len = |units: &Range<usize>| layout.units[units.clone()].iter().map(|unit| unit.padded).sum();
        self.buckets.iter().map(len).collect()
    }

    /// The buckets in the order of a forward pass. One of a single unit is visited as often as the
    /// unit.
    pub(crate) fn visits(&self) -> impl DoubleEndedIterator<Item = usize> + '_ {
        let bucket_of = self.bucket_of();
        let first = |&unit: &usize| bucket_of[unit].1;
        let starts: Vec<usize> = self.order.iter().copied().filter(first).collect();
        starts.into_iter().map(move |unit| bucket_of[unit].0)
    }

    /// Visits in all orders that plans have: forward and back, to the next round, and from one
    /// forward pass to the next.
    fn all_ways(&self) -> Vec<usize> {
        let there: Vec<usize> = self.visits().collect();
        let and_back = there.iter().rev();
        there.iter().chain(and_back).chain(&there).chain(&there).copied().collect()
    }

    /// For each unit its bucket, and whether it is the bucket's first unit.
    fn bucket_of(&self) -> Vec<(usize, bool)> {
        let of = |(bucket, units): (usize, &Range<usize>)| {
            let start = units.start;
            units.clone().map(move |unit| (bucket, unit == start))
        };
        self.buckets.iter().enumerate().flat_map(of).collect()
    }

    /// Gradient slots of each class without which no plan can be made: one that is visited twice
    /// keeps its slot in between, and another needs one meanwhile.
    pub(crate) fn least_gradients(&self, slots: &Slots) -> Vec<usize> {
        let mut visits = vec![0; self.buckets.len()];
        self.visits().for_each(|bucket| visits[bucket] += 1);
        let (mut least, mut others) = (vec![0; slots.of_class.len()], vec![0; slots.of_class.len()]);
        for (&class, visits) in slots.class.iter().zip(visits) {
            if visits > 1 {
                least[class] += 1;
            } else {
                others[class] = 1;
            }
        }
        least.into_iter().zip(others).map(|(least, others)| least + others).collect()
    }

    /// Whether there is room for what a step has at a time.
    pub(crate) fn is_possible(&self) -> bool {
        let of_all = |slots: &Slots, least: &[usize]| {
            slots.of_class.iter().zip(least).all(|(slots, &least)| slots.len() >= least)
        };
        // A window of visits that are gathered together.
        let ahead = |slots: &Slots| of_all(slots, &slots.at_a_time(&self.all_ways(), self.prefetch + 1));
        self.units() > 0
            && self.weights.as_ref().is_none_or(ahead)
            && self.gradients.as_ref().is_none_or(|slots| of_all(slots, &self.least_gradients(slots)))
            && (self.sharded || (&self.weights, &self.gradients) == (&None, &None))
    }

    /// Number of units.
    pub fn units(&self) -> usize {
        self.order.iter().max().map_or(0, |last| last + 1)
    }
}
