//! The runtime in somebody else's program: under a model of candle's, beside a second engine, and without touching what is the process's.

use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;

use pillion_collectives::{Communicator, Launch, Options};
use pillion_kernels::{AdamW, Cpu, random};
use pillion_runtime::{Engine, Gather, Layout, Policy, Sharded, State, Step, StepReport, TensorSpec, UnitSpec};
use pillion_tests::program::{Ended, Workplace};

/// The example, in the profile of this test. For all packages at once, as `cargo test --workspace` has built it: fewer would make other features,
/// and candle once more.
fn candle() -> PathBuf {
    let this = std::env::current_exe().expect("this program");
    let folder = this.ancestors().nth(2).expect("deps, in the folder of a profile");
    let profile = match folder.file_name().and_then(|name| name.to_str()) {
        Some("debug") => "dev",
        Some(name) => name,
        None => panic!("{} has no name", folder.display()),
    };
    let mut cargo = Command::new(env!("CARGO"));
    let built = cargo.args(["build", "--quiet", "--workspace", "--example", "candle", "--profile", profile]).status();
    assert!(built.expect("cargo runs").success(), "the example is built");
    folder.join("examples").join("candle")
}

/// Runs it with one thread a rank for candle's products. It fails by itself when it has not learned.
fn run(place: &Workplace, mut command: Command) -> Ended {
    command.env("RAYON_NUM_THREADS", "1");
    place.spawn(command).finish().succeeded()
}

/// The losses that it printed, every tenth step's.
fn losses(ended: &Ended) -> Vec<f64> {
    let lines = ended.stdout.lines().filter(|line| line.starts_with("step"));
    lines.map(|line| line.split_whitespace().nth(3).and_then(|loss| loss.parse().ok()).expect(line)).collect()
}

#[test]
fn a_model_of_candle_learns_alike_on_any_number_of_ranks() {
    let place = Workplace::new(candle().to_str().expect("a path in UTF-8"));
    let [one, several @ ..] =
        ["1", "2", "3", "4"].map(|ranks| losses(&run(&place, place.command(&format!("--ranks {ranks}")))));
    assert_eq!(one.len(), 11, "{one:?}");
    for other in several {
        assert_eq!(one.len(), other.len());
        for (one, other) in one.iter().zip(&other) {
            // The same samples and the same first model. A step adds four gradients up in another order, three roundings of 2⁻²⁴ each; all
            // roundings of 101 steps in one direction make 2e-5. A micro-batch left out, or another's, makes 1e-2 and more.
            assert!((one - other).abs() <= 2e-5 * one, "{one} and {other}");
        }
    }
}

#[test]
fn a_model_of_candle_has_the_same_bits_on_threads_processes_and_under_mpirun() {
    let place = Workplace::new(candle().to_str().expect("a path in UTF-8"));
    let processes = run(&place, place.command("--ranks 2")).stdout;
    assert!(processes.contains("the loss went from"), "with all digits: {processes}");
    assert_eq!(run(&place, place.command("--ranks 2 --threads")).stdout, processes);
    if let Some(command) = place.mpirun("") {
        assert_eq!(run(&place, command).stdout, processes);
    }
}

const WORLD: usize = 2;
const UNITS: usize = 3;
const ROUNDS: usize = 2;
const STEPS: usize = 4;
const TOKENS: usize = 5;

/// A training without a model: each weight w is drawn to random targets t, its loss Σ (w − t)²/2. So gradients depend on all that happened before.
struct Job {
    seed: u64,
    /// Elements of each unit's one tensor.
    lengths: [usize; UNITS],
    policy: Policy,
}

fn jobs() -> [Job; 2] {
    let whole = Policy { sharded: Sharded::OPTIMIZER, gather: Gather::Copy, prefetch: 0, ..Policy::default() };
    [
        Job { seed: 1, lengths: [50, 700, 40], policy: Policy::default() },
        Job { seed: 2, lengths: [33, 90, 500], policy: whole },
    ]
}

/// What a rank has after a training, in bits.
#[derive(Debug, PartialEq)]
struct Outcome {
    losses: Vec<u64>,
    norms: Vec<u64>,
    states: Vec<State>,
}

impl Job {
    fn engine(&self, communicator: Arc<Communicator>) -> Engine {
        let tensor = |unit| TensorSpec {
            name: format!("{unit}.weight"),
            shape: vec![self.lengths[unit]],
            decay: false,
            frozen: false,
        };
        let unit = |unit| UnitSpec { name: unit_name(unit), tensors: vec![tensor(unit)] };
        let units: Vec<UnitSpec> = (0..UNITS).map(unit).collect();
        let shards = self.policy.mesh(communicator.world()).expect("a policy that fits").shard;
        let mut engine =
            Engine::new(communicator, Arc::new(Cpu), Layout::new(&units, shards), self.policy).expect("an engine");
        engine.initialize(|_, _| |index: usize| index as f32 / 1000.0).expect("initialised");
        engine
    }

    /// Visit number `visit` of a step: forward through the units, then backward, in each round.
    fn visit(&self, step: &mut Step<'_>, rank: usize, number: usize, visit: usize) {
        let (round, place) = (visit / (2 * UNITS), visit % (2 * UNITS));
        if place == 0 {
            step.round(TOKENS);
        }
        if place < UNITS {
            step.forward(place).expect("a forward pass");
            return;
        }
        let unit = 2 * UNITS - 1 - place;
        let mut pass = step.backward(unit).expect("a backward pass");
        let weights: Vec<f32> = pass.stream.download(pass.weights.tensor(0)).unwrap();
        let mut gradient = vec![0.0f32; weights.len()];
        let mut loss = 0.0;
        let stream = ((number * ROUNDS + round) * WORLD + rank) * UNITS + unit;
        for (index, (weight, gradient)) in weights.iter().zip(&mut gradient).enumerate() {
            let distance = weight - 1.0 - 0.1 * random::normal(self.seed, stream as u64, index as u64) as f32;
            *gradient = distance;
            loss += f64::from(distance).powi(2) / 2.0;
        }
        pass.stream.accumulate_from(pass.gradients.tensor(0), &gradient).unwrap();
        // One unit's loss is enough to see that weights come nearer.
        if unit == 0 {
            pass.stream.accumulate_from(pass.loss, &[loss]).unwrap();
        }
    }
}

fn unit_name(unit: usize) -> String {
    format!("unit {unit}")
}

/// One rank of several jobs on one communicator, which take turns at every unit.
fn train(communicator: Arc<Communicator>, jobs: &[Job]) -> Vec<Outcome> {
    let settings = AdamW { lr: 0.02, beta1: 0.9, beta2: 0.95, epsilon: 1e-8, weight_decay: 0.0 };
    let rank = communicator.rank();
    let mut engines: Vec<Engine> = jobs.iter().map(|job| job.engine(communicator.clone())).collect();
    let mut reports: Vec<Vec<StepReport>> = jobs.iter().map(|_| Vec::new()).collect();
    for number in 0..STEPS {
        let mut steps: Vec<Step<'_>> = engines.iter_mut().map(|engine| engine.begin(ROUNDS).expect("a step")).collect();
        for visit in 0..ROUNDS * 2 * UNITS {
            for (job, step) in jobs.iter().zip(&mut steps) {
                job.visit(step, rank, number, visit);
            }
        }
        for (step, reports) in steps.into_iter().zip(&mut reports) {
            reports.push(step.finish(&settings, &mut []).expect("an update"));
        }
    }
    let outcome = |(engine, reports): (&Engine, Vec<StepReport>)| {
        assert!(reports.iter().all(|report| report.tokens == (WORLD * ROUNDS * TOKENS) as f64), "{reports:?}");
        assert!(reports[STEPS - 1].loss_sum < reports[0].loss_sum, "weights come nearer: {reports:?}");
        Outcome {
            losses: reports.iter().map(|report| report.loss_sum.to_bits()).collect(),
            norms: reports.iter().map(|report| report.gradient_norm.to_bits()).collect(),
            states: (0..UNITS).map(|unit| engine.state(unit).expect("a state")).collect(),
        }
    };
    engines.iter().zip(reports).map(outcome).collect()
}

/// What `program` returns on each of [`WORLD`] ranks, which are threads of this process.
fn ranks<R: Send>(program: impl Fn(Arc<Communicator>) -> R + Sync) -> Vec<R> {
    std::thread::scope(|scope| {
        let start = |launch: Launch| {
            let program = &program;
            let connect = move || Communicator::connect(&launch, Options::default()).expect("ranks meet");
            scope.spawn(move || program(Arc::new(connect())))
        };
        let ranks: Vec<_> = Launch::threads(WORLD).into_iter().map(start).collect();
        ranks.into_iter().map(|rank| rank.join().expect("a rank does not panic")).collect()
    })
}

/// Of each job alone: what each rank has.
fn alone() -> [Vec<Outcome>; 2] {
    jobs().map(|job| ranks(|communicator| train(communicator, std::slice::from_ref(&job)).remove(0)))
}

#[test]
fn two_engines_on_one_communicator_train_as_each_does_alone() {
    let [first, second] = alone();
    let together = ranks(|communicator| train(communicator, &jobs()));
    for ((first, second), together) in first.into_iter().zip(second).zip(together) {
        assert_eq!(together, [first, second]);
    }
}

#[test]
fn two_engines_on_threads_of_their_own_train_as_each_does_alone() {
    let at_once = ranks(|communicator| {
        let own = || communicator.split(Some(0), 0).expect("a split").expect("every rank has the color");
        let communicators = [own(), own()];
        std::thread::scope(|scope| {
            let start = |(job, communicator): (Job, Communicator)| {
                scope.spawn(move || train(Arc::new(communicator), &[job]).remove(0))
            };
            jobs()
                .into_iter()
                .zip(communicators)
                .map(start)
                .collect::<Vec<_>>()
                .into_iter()
                .map(|job| job.join().unwrap())
                .collect::<Vec<_>>()
        })
    });
    let [first, second] = alone();
    for ((first, second), at_once) in first.into_iter().zip(second).zip(at_once) {
        assert_eq!(at_once, [first, second]);
    }
}

/// Which signals this process catches and ignores, and this thread blocks, as the kernel has it.
fn signals() -> Vec<String> {
    let status = std::fs::read_to_string("/proc/thread-self/status").expect("the kernel's word");
    let signals: Vec<String> =
        status.lines().filter(|line| ["SigBlk", "SigIgn", "SigCgt"].contains(&&line[..6])).map(str::to_owned).collect();
    assert_eq!(signals.len(), 3, "{status}");
    signals
}

#[test]
fn training_changes_no_signal_of_the_process() {
    let before = signals();
    let after = ranks(|communicator| {
        train(communicator, &jobs());
        signals()
    });
    assert_eq!(after, vec![before.clone(); WORLD]);
    assert_eq!(signals(), before);
}
