//! A training step as data: operations, and what each must wait for.
//!
//! Operations run on three queues, each first-in, first-out: compute, gather and reduce. Whatever else must be ordered is an
//! edge. The engine executes just these edges, so a plan that passes [`Plan::verify`] is a step without races, and a plan that
//! lacks an edge is a race that a test can show.
//!
//! The order of the list is the order in which operations are started. It is the same on every rank.

use crate::verify::verify;

/// Which way through the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Pass {
    /// Activations.
    Forward,
    /// Gradients.
    Backward,
}

/// What an operation does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Brings a unit's weights into a slot. Gather queue.
    Gather {
        /// The unit.
        unit: usize,
        /// The weight slot.
        slot: usize,
    },
    /// Lets the caller compute with a unit's weights. Compute queue.
    Compute {
        /// The unit.
        unit: usize,
        /// Which way.
        pass: Pass,
        /// The weight slot that holds the unit.
        weights: usize,
        /// The gradient slot that a backward pass fills.
        gradients: Option<usize>,
    },
    /// Sums a gradient slot over ranks into the shards. Reduce queue.
    Reduce {
        /// The unit.
        unit: usize,
        /// The gradient slot.
        slot: usize,
        /// The round of the step, from 0: later rounds add.
        round: usize,
    },
    /// The scalar all-reduce after which every rank knows the norm, and no rank reads weights any more. Compute queue.
    Agree,
    /// Updates this rank's shard of a unit. Compute queue.
    Update {
        /// The unit.
        unit: usize,
    },
}

/// One operation of a plan.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Operation {
    /// What it does.
    pub action: Action,
    /// Earlier operations that must be complete before it starts.
    pub after: Vec<usize>,
}

/// A step, or a forward pass, as a list of operations.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// The operations, in the order in which they start.
    pub operations: Vec<Operation>,
}

/// Why a plan is no plan.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PlanError {
    /// An edge points forward, or to itself.
    #[error("operation {index} waits for operation {after}, which starts no earlier")]
    Order {
        /// The operation.
        index: usize,
        /// What it waits for.
        after: usize,
    },
    /// An operation may start before another that it needs.
    #[error("operation {index} ({action:?}) is not ordered after {what}")]
    Race {
        /// The operation.
        index: usize,
        /// What it does.
        action: Action,
        /// What it needs.
        what: &'static str,
    },
    /// Gradients are not each reduced exactly once.
    #[error("unit {unit} is reduced {times} times in round {round}")]
    Reductions {
        /// The unit.
        unit: usize,
        /// The round.
        round: usize,
        /// How often.
        times: usize,
    },
}

/// A plan that has been verified.
#[derive(Clone, Debug)]
pub struct Verified(Plan);

impl std::ops::Deref for Verified {
    type Target = Plan;

    fn deref(&self) -> &Plan {
        &self.0
    }
}

impl Verified {
    /// Takes a plan at its word, for tests that show what a missing edge does.
    pub fn unchecked(plan: Plan) -> Verified {
        Verified(plan)
    }
}

/// One use of a unit's weights.
#[derive(Clone, Copy)]
struct Use {
    unit: usize,
    pass: Pass,
    round: usize,
}

/// Memory that plans are made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slots {
    /// Number of units.
    pub units: usize,
    /// Units gathered ahead.
    pub prefetch: usize,
    /// Gathered units that exist at a time; more than `prefetch`.
    pub weights: usize,
    /// Gradients that exist at a time.
    pub gradients: usize,
}

impl Plan {
    /// A training step of `rounds` micro-batches: forward and backward through all units in each, a reduction of each
    /// unit's gradient in each, then the agreement and the updates.
    ///
    /// # Panics
    /// When there are no rounds, no units, no gradient slot, or no more weight slots than prefetched units.
    pub fn step(slots: Slots, rounds: usize) -> Plan {
        assert!(rounds > 0, "a training step has at least one round");
        let forward = |round| (0..slots.units).map(move |unit| Use { unit, pass: Pass::Forward, round });
        let backward = |round| (0..slots.units).rev().map(move |unit| Use { unit, pass: Pass::Backward, round });
        let uses = (0..rounds).flat_map(|round| forward(round).chain(backward(round))).collect();
        let mut builder = Builder::new(slots, uses);
        builder.uses();
        builder.finish();
        Plan { operations: builder.operations }
    }

    /// Forward passes alone, for evaluation.
    ///
    /// # Panics
    /// As for [`Plan::step`].
    pub fn forward(slots: Slots, rounds: usize) -> Plan {
        let forward = |round| (0..slots.units).map(move |unit| Use { unit, pass: Pass::Forward, round });
        let mut builder = Builder::new(slots, (0..rounds).flat_map(forward).collect());
        builder.uses();
        Plan { operations: builder.operations }
    }

    /// Checks that every order that the memory needs follows from the queues and the edges: no use before its gather, no gather or
    /// backward pass into a slot that is still in use, no reduction before its gradient, every gradient reduced exactly once, the agreement after
    /// everything, updates after the agreement.
    ///
    /// # Errors
    /// The first order that does not follow.
    pub fn verify(self) -> Result<Verified, PlanError> {
        verify(&self)?;
        Ok(Verified(self))
    }

    /// Number of collective operations in it.
    pub fn collectives(&self) -> usize {
        let is_collective = |operation: &&Operation| {
            matches!(operation.action, Action::Gather { .. } | Action::Reduce { .. } | Action::Agree)
        };
        self.operations.iter().filter(is_collective).count()
    }
}

/// Makes a plan: assigns slots, and edges where slots change hands.
struct Builder {
    slots: Slots,
    uses: Vec<Use>,
    operations: Vec<Operation>,
    weights: Vec<WeightSlot>,
    /// The last reduction of each gradient slot.
    reductions: Vec<Option<usize>>,
    next_gradient: usize,
    last_reduce: Option<usize>,
    last_compute: Option<usize>,
}

#[derive(Clone, Default)]
struct WeightSlot {
    unit: Option<usize>,
    gather: usize,
    /// The last operation that computes with its present content.
    last_use: Option<usize>,
}

impl Builder {
    fn new(slots: Slots, uses: Vec<Use>) -> Builder {
        assert!(slots.units > 0 && slots.gradients > 0 && slots.weights > slots.prefetch, "no plan fits {slots:?}");
        Builder {
            slots,
            uses,
            operations: Vec::new(),
            weights: vec![WeightSlot::default(); slots.weights],
            reductions: vec![None; slots.gradients],
            next_gradient: 0,
            last_reduce: None,
            last_compute: None,
        }
    }

    fn push(&mut self, action: Action, after: impl IntoIterator<Item = usize>) -> usize {
        self.operations.push(Operation { action, after: after.into_iter().collect() });
        self.operations.len() - 1
    }

    /// All uses in order, each with the gathers that start before it.
    fn uses(&mut self) {
        for index in 0..self.uses.len() {
            for ahead in index..(index + 1 + self.slots.prefetch).min(self.uses.len()) {
                self.gather(index, ahead);
            }
            self.compute(self.uses[index]);
        }
    }

    /// Brings in the unit of use `ahead`, unless it is there, while use `now` is about to start.
    fn gather(&mut self, now: usize, ahead: usize) {
        let unit = self.uses[ahead].unit;
        if self.weights.iter().any(|slot| slot.unit == Some(unit)) {
            return;
        }
        // Evict what is needed last among the slots that no use from now to then needs (Belady 1966).
        let next_use = |slot: &WeightSlot| {
            let rest = &self.uses[now..];
            slot.unit.and_then(|unit| rest.iter().position(|use_| use_.unit == unit)).unwrap_or(usize::MAX)
        };
        let candidates = (0..self.slots.weights).filter(|&slot| next_use(&self.weights[slot]) > ahead - now);
        let slot = candidates.max_by_key(|&slot| (next_use(&self.weights[slot]), self.slots.weights - slot));
        let slot = slot.expect("there are more slots than uses from now to then");
        let released = self.weights[slot].last_use;
        let gather = self.push(Action::Gather { unit, slot }, released);
        self.weights[slot] = WeightSlot { unit: Some(unit), gather, last_use: None };
    }

    fn compute(&mut self, use_: Use) {
        let Use { unit, pass, round } = use_;
        let weights = self.weights.iter().position(|slot| slot.unit == Some(unit)).expect("gathered just before");
        let gather = self.weights[weights].gather;
        let (gradients, free) = match pass {
            Pass::Forward => (None, None),
            Pass::Backward => {
                let slot = self.next_gradient;
                self.next_gradient = (slot + 1) % self.slots.gradients;
                (Some(slot), self.reductions[slot])
            }
        };
        let compute = self.push(Action::Compute { unit, pass, weights, gradients }, [gather].into_iter().chain(free));
        self.weights[weights].last_use = Some(compute);
        self.last_compute = Some(compute);
        if let Some(slot) = gradients {
            let reduce = self.push(Action::Reduce { unit, slot, round }, [compute]);
            self.reductions[slot] = Some(reduce);
            self.last_reduce = Some(reduce);
        }
    }

    fn finish(&mut self) {
        let agree = self.push(Action::Agree, self.last_compute.into_iter().chain(self.last_reduce));
        for unit in 0..self.slots.units {
            self.push(Action::Update { unit }, [agree]);
        }
    }
}
