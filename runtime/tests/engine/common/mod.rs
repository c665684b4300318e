//! Ranks as threads that train the little model of `mlp.rs` with an engine, and what a training leaves behind.

pub(crate) mod logged;
pub(crate) mod mlp;
pub(crate) mod reference;

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use pillion_collectives::{Communicator, Launch, Options};
use pillion_kernels::{AdamW, Cpu, DType, Device, LazyCpu};
use pillion_runtime::{
    Agreed, Engine, Error, Gather, Layout, Outline, Policy, Sharded, State, Step, StepReport, Verified,
};

use mlp::Mlp;

/// An epsilon as large as the gradients keeps Adam's quotient smooth where a gradient is nearly zero, so that rounding stays
/// rounding in the parameters.
pub(crate) const ADAMW: AdamW = AdamW { lr: 0.02, beta1: 0.9, beta2: 0.95, epsilon: 0.02, weight_decay: 0.1 };

/// Which device a run computes on. All ranks of a run share it, so on [`LazyCpu`] the seed also
/// decides how their streams interleave.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Host {
    Cpu,
    Lazy(u64),
}

impl Host {
    fn device(self) -> Arc<dyn Device> {
        match self {
            Host::Cpu => Arc::new(Cpu),
            Host::Lazy(seed) => Arc::new(LazyCpu::new(seed)),
        }
    }
}

type Planner = Arc<dyn Fn(&Outline, usize) -> Verified + Send + Sync>;

/// How a run is set up.
#[derive(Clone)]
pub(crate) struct Setup {
    pub(crate) policy: Policy,
    pub(crate) host: Host,
    /// One for each rank.
    pub(crate) options: Vec<Options>,
    pub(crate) planner: Option<Planner>,
}

impl Setup {
    pub(crate) fn new(world: usize) -> Setup {
        // A test that would hang fails instead.
        let options = Options { timeout: Duration::from_secs(20), ..Options::default() };
        let policy = Policy { clip: Some(0.5), ..Policy::default() };
        Setup { policy, host: Host::Cpu, options: vec![options; world], planner: None }
    }

    pub(crate) fn world(&self) -> usize {
        self.options.len()
    }

    pub(crate) fn host(self, host: Host) -> Setup {
        Setup { host, ..self }
    }

    pub(crate) fn gather(self, gather: Gather) -> Setup {
        Setup { policy: Policy { gather, ..self.policy }, ..self }
    }

    pub(crate) fn weights(self, weights: DType) -> Setup {
        Setup { policy: Policy { weights, ..self.policy }, ..self }
    }

    pub(crate) fn sharded(self, sharded: Sharded) -> Setup {
        Setup { policy: Policy { sharded, ..self.policy }, ..self }
    }

    pub(crate) fn replicas(self, replicas: usize) -> Setup {
        Setup { policy: Policy { replicas, ..self.policy }, ..self }
    }

    pub(crate) fn bucket(self, bucket: u64) -> Setup {
        Setup { policy: Policy { bucket, ..self.policy }, ..self }
    }

    pub(crate) fn reduce(self, reduce: DType) -> Setup {
        Setup { policy: Policy { reduce, ..self.policy }, ..self }
    }

    /// Where everything lives.
    pub(crate) fn layout(&self) -> Layout {
        Layout::new(&mlp::units(), self.policy.mesh(self.world()).expect("a policy that fits").shard)
    }

    pub(crate) fn slots(self, prefetch: usize, slots: usize) -> Setup {
        Setup { policy: Policy { prefetch, slots, ..self.policy }, ..self }
    }
}

impl std::fmt::Debug for Setup {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "world {} on {:?} with {:?}", self.world(), self.host, self.policy)
    }
}

/// The micro-batches of each step, by their number of tokens. Which samples they hold depends on nothing else.
#[derive(Clone, Debug)]
pub(crate) struct Schedule(pub(crate) Vec<Vec<usize>>);

impl Schedule {
    /// Two steps of `rounds` rounds; in the last round half of the ranks have no micro-batch.
    pub(crate) fn uneven(world: usize, rounds: usize) -> Schedule {
        let sizes = |step: usize| (0..world * rounds - world / 2).map(move |index| [3, 1, 4, 2, 5][(index + step) % 5]);
        Schedule((0..2).map(|step| sizes(step).collect()).collect())
    }

    /// Samples of a step's micro-batch.
    pub(crate) fn samples(&self, step: usize, micro_batch: usize) -> Range<u64> {
        let before = self.0[..step].iter().flatten().chain(&self.0[step][..micro_batch]).sum::<usize>() as u64;
        before..before + self.0[step][micro_batch] as u64
    }

    pub(crate) fn rounds(&self, step: usize, world: usize) -> usize {
        self.0[step].len().div_ceil(world)
    }
}

/// One rank: an engine with its initial parameters, and the model that computes with it.
pub(crate) struct Rank {
    pub(crate) engine: Engine,
    pub(crate) mlp: Mlp,
}

impl Rank {
    pub(crate) fn new(launch: &Launch, setup: &Setup, device: Arc<dyn Device>) -> Result<Rank, Error> {
        let communicator = Arc::new(Communicator::connect(launch, setup.options[launch.rank].clone())?);
        let mut engine = Engine::new(communicator, device.clone(), setup.layout(), setup.policy)?;
        if let Some(planner) = setup.planner.clone() {
            engine = engine.with_planner(move |outline, rounds| planner(outline, rounds));
        }
        engine.initialize(mlp::initial)?;
        Ok(Rank { engine, mlp: Mlp::new(&*device)? })
    }

    pub(crate) fn rank(&self) -> usize {
        self.engine.communicator().rank()
    }

    /// Trains one step: micro-batches are dealt to ranks in turn.
    pub(crate) fn step(&mut self, schedule: &Schedule, index: usize) -> Result<StepReport, Error> {
        self.step_with(schedule, index, |_, _, _| Ok(()))
    }

    /// As [`Rank::step`]; `after_backward(round, unit, pass)` runs when a unit's gradient is complete.
    pub(crate) fn step_with(
        &mut self,
        schedule: &Schedule,
        index: usize,
        mut after_backward: impl FnMut(usize, usize, &mut pillion_runtime::Backward<'_>) -> Result<(), Error>,
    ) -> Result<StepReport, Error> {
        let world = self.engine.communicator().world();
        let rank = self.rank();
        let step = self.rounds(schedule, index, &mut after_backward)?;
        let mut requests = [1.0, rank as f64];
        let report = step.finish(&ADAMW, &mut requests)?;
        assert_eq!(requests, [world as f64, (world * (world - 1) / 2) as f64], "requests are summed over ranks");
        Ok(report)
    }

    /// As [`Rank::step`], up to the update.
    pub(crate) fn agree(&mut self, schedule: &Schedule, index: usize) -> Result<Agreed<'_>, Error> {
        self.rounds(schedule, index, |_, _, _| Ok(()))?.agree(&mut [])
    }

    fn rounds(
        &mut self,
        schedule: &Schedule,
        index: usize,
        mut after_backward: impl FnMut(usize, usize, &mut pillion_runtime::Backward<'_>) -> Result<(), Error>,
    ) -> Result<Step<'_>, Error> {
        let (rank, world) = (self.rank(), self.engine.communicator().world());
        let rounds = schedule.rounds(index, world);
        let mut step = self.engine.begin(rounds)?;
        for round in 0..rounds {
            let micro_batch = round * world + rank;
            if micro_batch < schedule.0[index].len() {
                let samples = schedule.samples(index, micro_batch);
                micro_batch_of(&mut step, &mut self.mlp, samples, |unit, pass| after_backward(round, unit, pass))?;
            } else {
                step.idle_round()?;
            }
        }
        Ok(step)
    }

    /// The sum of the losses of some samples, from forward passes alone.
    pub(crate) fn evaluate(&mut self, samples: Range<u64>) -> Result<f64, Error> {
        let mut step = self.engine.begin_evaluation(1)?;
        self.mlp.load(step.stream(), samples);
        for unit in 0..mlp::UNITS {
            self.mlp.forward(unit, &step.forward(unit)?);
        }
        let loss = self.mlp.loss(step.stream());
        step.end()?;
        Ok(loss)
    }

    pub(crate) fn states(&self) -> Result<Vec<State>, Error> {
        (0..mlp::UNITS).map(|unit| self.engine.state(unit)).collect()
    }
}

fn micro_batch_of(
    step: &mut Step<'_>,
    mlp: &mut Mlp,
    samples: Range<u64>,
    mut after_backward: impl FnMut(usize, &mut pillion_runtime::Backward<'_>) -> Result<(), Error>,
) -> Result<(), Error> {
    step.round(samples.clone().count());
    mlp.load(step.stream(), samples);
    for unit in 0..mlp::UNITS {
        mlp.forward(unit, &step.forward(unit)?);
    }
    for unit in (0..mlp::UNITS).rev() {
        let mut pass = step.backward(unit)?;
        mlp.backward(unit, &mut pass);
        after_backward(unit, &mut pass)?;
    }
    Ok(())
}

/// Runs `program` on every rank, and returns what each returned. A rank's engine and communicator end with its program.
pub(crate) fn ranks<R: Send>(setup: &Setup, program: impl Fn(Rank) -> R + Sync) -> Vec<R> {
    let device = setup.host.device();
    std::thread::scope(|scope| {
        let start = |launch: Launch| {
            let (device, program) = (device.clone(), &program);
            scope.spawn(move || program(Rank::new(&launch, setup, device).expect("ranks of this process meet")))
        };
        let handles: Vec<_> = Launch::threads(setup.world()).into_iter().map(start).collect();
        handles.into_iter().map(|handle| handle.join().expect("a rank does not panic")).collect()
    })
}

/// What a training has computed, by its bits.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Training {
    pub(crate) reports: Vec<StepReport>,
    /// Master weights, first and second moments of each unit, without padding.
    pub(crate) states: Vec<State>,
    /// The loss of an evaluation on rank 0 after the last step.
    pub(crate) evaluation: f64,
}

/// Trains `schedule` and puts the ranks' results together.
///
/// # Panics
/// When ranks report different numbers.
pub(crate) fn train(setup: &Setup, schedule: &Schedule) -> Result<Training, Error> {
    let program = |mut rank: Rank| {
        let reports = (0..schedule.0.len()).map(|index| rank.step(schedule, index));
        let reports = reports.collect::<Result<Vec<_>, Error>>()?;
        Ok((reports, rank.states()?, rank.evaluate(1000..1005)?))
    };
    let ranks = ranks(setup, program).into_iter().collect::<Result<Vec<_>, Error>>()?;
    for (reports, _, evaluation) in &ranks {
        let same = reports.iter().zip(&ranks[0].0).all(|(one, other)| bits_of(one) == bits_of(other));
        assert!(same && evaluation.to_bits() == ranks[0].2.to_bits(), "ranks report different numbers: {setup:?}");
    }
    Ok(Training { reports: ranks[0].0.clone(), states: joined(setup, &ranks, |rank| &rank.1), evaluation: ranks[0].2 })
}

/// Whole units from the ranks' shards.
///
/// # Panics
/// When groups hold different ones.
pub(crate) fn joined<R>(setup: &Setup, ranks: &[R], states: impl Fn(&R) -> &Vec<State>) -> Vec<State> {
    let layout = setup.layout();
    let (first, others) = ranks.split_at(layout.shards);
    for (index, rank) in others.iter().enumerate() {
        assert!(states(rank) == states(&first[index % layout.shards]), "groups hold the same: {setup:?}");
    }
    let join = |unit: usize, part: &dyn Fn(&State) -> &Vec<f32>| {
        let mut whole: Vec<f32> = first.iter().flat_map(|rank| part(&states(rank)[unit]).iter().copied()).collect();
        assert!(whole[layout.units[unit].len..].iter().all(|&x| x == 0.0), "padding stays zero");
        whole.truncate(layout.units[unit].len);
        whole
    };
    let kept = setup.policy.states.len();
    let unit = |unit| State {
        master: join(unit, &|state| &state.master),
        states: (0..kept).map(|kept| join(unit, &|state| &state.states[kept])).collect(),
    };
    (0..layout.units.len()).map(unit).collect()
}

/// The bits of a report's numbers, but for those of traffic and time.
pub(crate) fn bits_of(report: &StepReport) -> Vec<u64> {
    let StepReport { loss_sum, tokens, gradient_norm, square_norm, group_square_norms, .. } = report;
    let group_square_norms = group_square_norms.expect("groups are measured unless told otherwise");
    let numbers = [*loss_sum, *tokens, *gradient_norm, *square_norm, group_square_norms];
    numbers.into_iter().map(|x| x.to_bits()).collect()
}

impl Training {
    /// What differs in bits from another training, in words; none when nothing does.
    pub(crate) fn difference(&self, other: &Training) -> Option<String> {
        for (step, (ours, theirs)) in self.reports.iter().zip(&other.reports).enumerate() {
            if bits_of(ours) != bits_of(theirs) {
                return Some(format!("step {step} reports\n  {ours:?} and\n  {theirs:?}"));
            }
        }
        let bits = |data: &[f32]| data.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        for (unit, (ours, theirs)) in self.states.iter().zip(&other.states).enumerate() {
            let kept = ours.states.iter().zip(&theirs.states).any(|(ours, theirs)| bits(ours) != bits(theirs));
            if kept || bits(&ours.master) != bits(&theirs.master) {
                return Some(format!("the state of unit {unit} differs"));
            }
        }
        let (ours, theirs) = (self.evaluation, other.evaluation);
        (ours.to_bits() != theirs.to_bits()).then(|| format!("evaluations are {ours} and {theirs}"))
    }
}
