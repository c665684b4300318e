//! Executes plans: owns the weights, gradients and optimizer state of one rank, and moves them.

use std::collections::HashMap;
use std::sync::Arc;

use pillion_collectives::Communicator;
use pillion_kernels::cpu::compare::Comparison;
use pillion_kernels::cpu::observe::Observer;
use pillion_kernels::{Buffer, DType, Device, Event, Stamp, Stream};
use xxhash_rust::xxh3::xxh3_64;

use crate::axes::Axes;
use crate::buckets::Buckets;
use crate::gradients::GradientStore;
use crate::layout::Piece;
use crate::outline::Outline;
use crate::plan::{Plan, Verified};
use crate::record::Recording;
use crate::step::Step;
use crate::summary::Summary;
use crate::trace::TraceEvent;
use crate::weights::WeightStore;
use crate::{Error, Layout, Memory, Mesh, Optimizer, Policy};

/// One rank's parameters, and the means to compute with all of them.
pub struct Engine {
    pub(crate) axes: Axes,
    pub(crate) device: Arc<dyn Device>,
    pub(crate) stream: Box<dyn Stream>,
    pub(crate) layout: Arc<Layout>,
    pub(crate) policy: Policy,
    pub(crate) weights: WeightStore,
    pub(crate) gradients: GradientStore,
    pub(crate) optimizer: Vec<OptimizerShard>,
    /// For each unit: the event after which its shard of the weights holds what the last update wrote.
    pub(crate) written: Vec<Event>,
    pub(crate) buckets: Arc<Buckets>,
    /// This rank's parts of the tensors of each unit.
    pub(crate) pieces: Vec<Vec<Piece>>,
    /// `[1]` f32: what makes the sum of a step's gradients their clipped mean.
    pub(crate) scale: Buffer,
    /// What the host reads at the end of a step, all at once.
    pub(crate) summary: Summary,
    /// Of the step under way: for each computation, the moment at which it has run.
    pub(crate) events: Vec<Event>,
    /// Updates made so far.
    pub(crate) updates: u64,
    pub(crate) health: Health,
    /// Whether there are gradients and moments.
    pub(crate) trains: bool,
    pub(crate) recording: Option<Recording>,
    /// When the waits for other ranks began and ended in the step under way.
    pub(crate) waits: Vec<[Stamp; 2]>,
    pub(crate) measures_groups: bool,
    /// Of each unit, with [`Engine::measure_units`]; else empty.
    pub(crate) unit_norms: Vec<UnitNorms>,
    /// Room for their sums.
    pub(crate) unit_sums: Vec<f64>,
    /// How groups are compared with their sum, where they are.
    pub(crate) comparison: Option<Arc<Comparison>>,
    outline: Outline,
    plans: HashMap<(Kind, usize), Arc<Verified>>,
    planner: Planner,
}

/// Plans that are kept: a batch that grows asks for more and more rounds, each for a while.
const PLANS: usize = 8;

/// Makes a plan for a number of rounds.
type Planner = Box<dyn Fn(&Outline, usize) -> Verified + Send>;

/// What a step is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Kind {
    Train,
    Evaluate,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Health {
    Good,
    /// A step was begun and not ended: operations that other ranks expect may not have been started.
    Unfinished,
    /// Some shards may have been updated and others not.
    Torn,
}

pub(crate) fn bytes(buffer: &Buffer) -> u64 {
    (buffer.len() * buffer.dtype().bytes()) as u64
}

/// Square norms of a unit's gradient, as [`StepReport`](crate::StepReport) has them of all units.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct UnitNorms {
    /// Σ over groups of ‖gradient‖² / tokens; 0 where groups are not measured.
    pub group_square_norms: f64,
    /// Square norm of the summed gradient.
    pub square_norm: f64,
}

/// One rank's optimizer state of one unit; each `[shard]` f32.
pub(crate) struct OptimizerShard {
    /// None where the weights that are gathered are f32: they are the master weights.
    pub(crate) master: Option<Buffer>,
    /// Those that [`Policy::states`] names.
    pub(crate) states: Vec<Buffer>,
}

impl Engine {
    /// Allocates a rank's share of `layout`, zeroed. Every rank does so with the same arguments. The layout has as many shards as the
    /// policy's mesh ([`Policy::mesh`]).
    ///
    /// # Errors
    /// [`Error::Policy`] when the policy does not fit the ranks, [`Error::Different`] when ranks come with other arguments; also when a device
    /// or the host has no memory, or another rank fails.
    ///
    /// # Panics
    /// When the layout has another number of shards than the policy's mesh.
    pub fn new(
        communicator: Arc<Communicator>,
        device: Arc<dyn Device>,
        layout: Layout,
        policy: Policy,
    ) -> Result<Engine, Error> {
        Engine::make(communicator, device, layout, policy, true)
    }

    /// As [`Engine::new`], but for forward passes alone: without gradients and moments. A load
    /// reads the weights alone; training steps and saves are refused.
    ///
    /// # Errors
    /// As for [`Engine::new`].
    ///
    /// # Panics
    /// As for [`Engine::new`].
    pub fn for_evaluation(
        communicator: Arc<Communicator>,
        device: Arc<dyn Device>,
        layout: Layout,
        policy: Policy,
    ) -> Result<Engine, Error> {
        Engine::make(communicator, device, layout, policy, false)
    }

    fn make(
        communicator: Arc<Communicator>,
        device: Arc<dyn Device>,
        layout: Layout,
        policy: Policy,
        trains: bool,
    ) -> Result<Engine, Error> {
        let mesh = policy.mesh(communicator.world())?;
        assert_eq!(layout.shards, mesh.shard, "a layout is made for its mesh");
        let digest = xxh3_64(format!("{layout:?} {policy:?} {trains}").as_bytes());
        let digests = communicator.all_gather_scalars(&[digest])?;
        if let Some(rank) = digests.iter().position(|other| other != &digests[0]) {
            return Err(Error::Different { rank });
        }
        let axes = Axes::new(communicator.clone(), &policy)?;
        // Of a failure of its own this rank tells the others, which would wait for it.
        let made = Engine::allocate(axes, device, layout, policy, mesh, trains);
        made.inspect_err(|error| communicator.abort(&error.to_string()))
    }

    fn allocate(
        axes: Axes,
        device: Arc<dyn Device>,
        layout: Layout,
        policy: Policy,
        mesh: Mesh,
        trains: bool,
    ) -> Result<Engine, Error> {
        let outline = Outline::new(&layout, &policy, mesh);
        let buckets = Arc::new(Buckets::new(&layout, &outline.buckets));
        let optimizer = layout.units.iter().map(|unit| {
            let allocate = || device.allocate(DType::F32, unit.shard);
            let master = if policy.weights == DType::F32 { None } else { Some(allocate()?) };
            let kept = if trains { policy.states } else { &[] };
            let states = kept.iter().map(|_| allocate()).collect::<Result<_, _>>()?;
            Ok(OptimizerShard { master, states })
        });
        let optimizer = optimizer.collect::<Result<_, Error>>()?;
        Ok(Engine {
            weights: WeightStore::new(&axes, &*device, &layout, &policy, &outline, buckets.clone())?,
            gradients: match trains {
                true => GradientStore::new(&axes, &*device, &layout, &policy, &outline, buckets.clone())?,
                false => GradientStore::default(),
            },
            optimizer,
            buckets,
            written: vec![Event::PAST; layout.units.len()],
            summary: Summary::new(&*device, layout.units.len(), 0)?,
            scale: device.allocate(DType::F32, 1)?,
            pieces: (0..layout.units.len()).map(|unit| layout.pieces(unit, axes.shard_number()).collect()).collect(),
            stream: device.stream(),
            axes,
            device,
            layout: Arc::new(layout),
            policy,
            events: Vec::new(),
            updates: 0,
            health: Health::Good,
            trains,
            recording: None,
            waits: Vec::new(),
            measures_groups: true,
            unit_norms: Vec::new(),
            unit_sums: Vec::new(),
            comparison: None,
            outline,
            plans: HashMap::new(),
            planner: Box::new(|outline, rounds| {
                Plan::step(outline, rounds).verify().expect("the planner makes no races")
            }),
        })
    }

    /// For tests: takes training plans from `planner` instead, to show what a missing edge does.
    pub fn with_planner(mut self, planner: impl Fn(&Outline, usize) -> Verified + Send + 'static) -> Engine {
        self.planner = Box::new(planner);
        self
    }

    /// Where everything lives.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// How it is moved.
    pub fn policy(&self) -> &Policy {
        &self.policy
    }

    /// The ranks it moves between.
    pub fn communicator(&self) -> &Arc<Communicator> {
        &self.axes.world
    }

    /// The grid that they make.
    pub fn mesh(&self) -> Mesh {
        self.axes.mesh
    }

    /// Number of this rank's shard of each unit.
    pub fn shard_number(&self) -> usize {
        self.axes.shard_number()
    }

    /// Number of this rank's group: every group holds the same.
    pub fn replica(&self) -> usize {
        self.axes.replica()
    }

    /// The device it computes on.
    pub fn device(&self) -> &Arc<dyn Device> {
        &self.device
    }

    /// The stream that kernels run on, for work between steps.
    pub fn stream(&self) -> &dyn Stream {
        &*self.stream
    }

    /// What this rank's parameters take, counted from the buffers that there are, between steps; [`Memory::of`] predicts it.
    pub fn memory(&self) -> Memory {
        let mut memory = Memory::default();
        (memory.weights, memory.gathered) = self.weights.bytes();
        (memory.gradients, memory.gradient_shard) = self.gradients.bytes();
        for OptimizerShard { master, states } in &self.optimizer {
            memory.master += master.as_ref().map_or(0, bytes);
            memory.moments += states.iter().map(bytes).sum::<u64>();
        }
        memory
    }

    /// Whether the steps from now on measure the gradients of their groups ([`StepReport::group_square_norms`](crate::StepReport)), as they do unless told otherwise. To be called alike on
    /// every rank. It costs one reading of the gradient a round; the collectives are the same either way.
    pub fn measure_groups(&mut self, wanted: bool) {
        self.measures_groups = wanted;
    }

    /// Whether the steps from now on sum [`Engine::unit_norms`] too: a second all-reduce of scalars
    /// at the end of a step, of two numbers for each unit. To be called alike on every rank.
    pub fn measure_units(&mut self, wanted: bool) {
        let units = if wanted { self.layout.units.len() } else { 0 };
        self.unit_norms = vec![UnitNorms::default(); units];
        self.unit_sums = vec![0.0; 2 * units];
    }

    /// The square norms of each unit's gradient in the last step that was updated; empty without
    /// [`Engine::measure_units`].
    pub fn unit_norms(&self) -> &[UnitNorms] {
        &self.unit_norms
    }

    /// Compares from now on the gradient of each group with that of all, in steps that reduce once ([`StepReport::comparison`](crate::StepReport)): one more reading of what is
    /// summed, while it is summed, and nothing more to move. A coordinate passes where its noise is at most `eta` times its gradient. To be called alike on every rank; none ends it.
    ///
    /// # Errors
    /// [`Error::Policy`] where no rank reads all gradients that it sums: with gradients that are whole on every rank, several groups of ranks or several hosts; with more than [`COMPARED`](crate::COMPARED)
    /// ranks; for an `eta` that is no positive number. [`Error::Device`] when there is no memory.
    pub fn compare_groups(&mut self, eta: Option<f64>) -> Result<(), Error> {
        let world = self.axes.world.world();
        // σ̂ᵢ²/N ≤ η²(Gᵢ/N)² with σ̂ᵢ² = (K·Σₖ Gₖᵢ² − Gᵢ²)/(N·(K − 1)) is K·Σₖ Gₖᵢ² ≤ (1 + η²(K −
        // 1))·Gᵢ².
        let limit = |eta: f64| 1.0 + eta * eta * (world as f64 - 1.0);
        let comparison = eta.map(|eta| Arc::new(Comparison { limit: limit(eta) }));
        if let (Some(eta), Some(comparison)) = (eta, &comparison) {
            self.policy.check_comparison(world, eta)?;
            if !self.axes.world.capabilities().reads_peers_in_place {
                let why = "across hosts, or over MPI: use the shared memory of one host";
                return Err(Error::Policy(format!("groups cannot be compared {why}")));
            }
            let numbers = comparison.numbers(world);
            self.gradients.compare(&*self.device, numbers)?;
            self.summary = Summary::new(&*self.device, self.layout.units.len(), numbers)?;
        }
        self.comparison = comparison;
        Ok(())
    }

    /// Records from now on what this rank does and when, or no longer. Collective: times count from a barrier.
    ///
    /// # Errors
    /// When another rank has failed.
    pub fn record(&mut self, wanted: bool) -> Result<(), Error> {
        let Axes { world, shard, replicate, .. } = &self.axes;
        [shard, replicate].into_iter().flatten().for_each(|axis| axis.record(wanted));
        world.barrier()?;
        self.recording = wanted.then(|| Recording::new(world.rank(), self.layout.clone()));
        Ok(())
    }

    /// What was recorded since this was last asked, for
    /// [`write_trace`](crate::trace::write_trace), as far as the device has come: the updates of a
    /// step may still be under way on a device that runs its work later.
    pub fn recorded(&mut self) -> Vec<TraceEvent> {
        self.recording.as_mut().map_or_else(Vec::new, Recording::take)
    }

    /// Updates made so far.
    pub fn updates(&self) -> u64 {
        self.updates
    }

    /// The plan of a training step of `rounds` rounds.
    pub fn plan(&mut self, rounds: usize) -> Arc<Verified> {
        self.plan_for(Kind::Train, rounds)
    }

    /// Begins a training step of `rounds` rounds, the same number on every rank.
    ///
    /// # Errors
    /// When an earlier step did not end well.
    pub fn begin(&mut self, rounds: usize) -> Result<Step<'_>, Error> {
        self.check_trains()?;
        self.begin_kind(Kind::Train, rounds)
    }

    /// Begins `rounds` forward passes, the same number on every rank.
    ///
    /// # Errors
    /// When an earlier step did not end well.
    pub fn begin_evaluation(&mut self, rounds: usize) -> Result<Step<'_>, Error> {
        self.begin_kind(Kind::Evaluate, rounds)
    }

    fn begin_kind(&mut self, kind: Kind, rounds: usize) -> Result<Step<'_>, Error> {
        self.check_health()?;
        if rounds == 0 {
            return Err(Error::OffPlan {
                expected: "at least one round".to_owned(),
                found: "a step of none".to_owned(),
            });
        }
        let plan = self.plan_for(kind, rounds);
        Ok(Step::new(self, kind, plan))
    }

    fn plan_for(&mut self, kind: Kind, rounds: usize) -> Arc<Verified> {
        let (planner, outline) = (&self.planner, &self.outline);
        let plan = || match kind {
            Kind::Train => planner(outline, rounds),
            Kind::Evaluate => Plan::forward(outline, rounds).verify().expect("the planner makes no races"),
        };
        if let Some(plan) = self.plans.get(&(kind, rounds)) {
            return plan.clone();
        }
        if self.plans.len() == PLANS {
            self.plans.clear();
        }
        let plan = Arc::new(plan());
        self.plans.insert((kind, rounds), plan.clone());
        plan
    }

    pub(crate) fn check_optimizer(&self, optimizer: &dyn Optimizer) -> Result<(), Error> {
        let (theirs, ours) = (optimizer.states(), self.policy.states);
        if theirs == ours {
            return Ok(());
        }
        let reason = format!(
            "the optimizer keeps {theirs:?} for each weight, but the policy says {ours:?}: name these in Policy::states"
        );
        Err(Error::Policy(reason))
    }

    pub(crate) fn check_trains(&self) -> Result<(), Error> {
        if self.trains {
            return Ok(());
        }
        let reason = "this engine has no gradients and no optimizer state: make one that trains, with Engine::new";
        Err(Error::Policy(reason.to_owned()))
    }

    pub(crate) fn check_health(&self) -> Result<(), Error> {
        // What went wrong first explains a step that was not ended.
        self.axes.healthy()?;
        match self.health {
            Health::Good => Ok(()),
            Health::Torn => Err(Error::Poisoned),
            Health::Unfinished => Err(Error::Unfinished),
        }
    }
}
