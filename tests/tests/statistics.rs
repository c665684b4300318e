//! The statistics of a step against brute force: every group's gradient is gathered, and taken to mean what the formulas say, in f64.
//!
//! There is no model: backward passes add numbers drawn by lot, of which a part is the same for all tokens and the rest is noise.

use std::sync::Arc;

use half::bf16;
use pillion_abs::{Alignment, Noise, Observation, Unusable};
use pillion_collectives::{Communicator, Launch, Options};
use pillion_kernels::{AdamW, Cpu, DType, Device, LazyCpu};
use pillion_runtime::{Engine, Error, Gather, Layout, Policy, Sharded, StepReport, TensorSpec, UnitSpec};

const ADAMW: AdamW = AdamW { lr: 0.01, beta1: 0.9, beta2: 0.95, epsilon: 1e-8, weight_decay: 0.0 };

/// Elements of each unit's only tensor.
const LENGTHS: [usize; 2] = [120, 41];

fn units() -> Vec<UnitSpec> {
    let unit = |(number, len): (usize, usize)| {
        let tensor = TensorSpec { name: format!("tensor {number}"), shape: vec![len], decay: false, frozen: false };
        UnitSpec { name: format!("unit {number}"), tensors: vec![tensor] }
    };
    LENGTHS.into_iter().enumerate().map(unit).collect()
}

/// Uniform in ±1; a pure function of its arguments (SplitMix64).
fn random(words: [usize; 3]) -> f64 {
    let mut state = 0u64;
    for word in words {
        state = state.wrapping_add(word as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        state = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        state = (state ^ (state >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        state ^= state >> 31;
    }
    (state >> 11) as f64 / (1u64 << 52) as f64 - 1.0
}

/// The gradient of a micro-batch, summed over its tokens.
fn gradient(micro_batch: usize, tokens: usize, unit: usize) -> Vec<f32> {
    let tokens = tokens as f64;
    let element =
        |index| tokens * random([unit, index, 1000]) + tokens.sqrt() * 2.0 * random([unit, index, micro_batch]);
    (0..LENGTHS[unit]).map(|index| element(index) as f32).collect()
}

/// How a step is made.
#[derive(Clone, Debug)]
struct Case {
    world: usize,
    rounds: usize,
    policy: Policy,
    lazy: bool,
    /// A micro-batch with an element that is not a number.
    bad: Option<usize>,
    measured: bool,
    /// The ratio by which coordinates are counted, where groups are compared.
    compared: Option<f64>,
    /// Whether micro-batches have different numbers of tokens, and ranks of them.
    uneven: bool,
}

impl Case {
    /// Where they are uneven, half of the ranks have none in the last round, if there is another round or rank.
    fn micro_batches(&self) -> usize {
        let missing = if self.uneven { self.world / 2 } else { 0 };
        (self.world * self.rounds - missing).max(1)
    }

    /// Tokens of a micro-batch.
    fn tokens(&self, micro_batch: usize) -> usize {
        if self.uneven { [3, 1, 4, 2, 5][micro_batch % 5] } else { 3 }
    }

    /// The gradients that travel, each with its tokens.
    fn groups(&self) -> Vec<(f64, Vec<f64>)> {
        let round = |x: f32| match self.policy.reduce {
            DType::Bf16 if self.world > 1 => f64::from(bf16::from_f32(x)),
            _ => f64::from(x),
        };
        let whole = |micro_batch: usize| {
            (0..LENGTHS.len()).flat_map(move |unit| gradient(micro_batch, self.tokens(micro_batch), unit))
        };
        let micro_batches = 0..self.micro_batches();
        if self.policy.sharded.gradients {
            let group = |micro_batch| (self.tokens(micro_batch) as f64, whole(micro_batch).map(round).collect());
            return micro_batches.map(group).collect();
        }
        // A rank adds up its own first, in f32.
        let of_rank = |rank: usize| {
            let mut sum = (0.0, vec![0.0f32; LENGTHS.iter().sum()]);
            for micro_batch in micro_batches.clone().skip(rank).step_by(self.world) {
                sum.0 += self.tokens(micro_batch) as f64;
                sum.1.iter_mut().zip(whole(micro_batch)).for_each(|(sum, x)| *sum += x);
            }
            (sum.0, sum.1.into_iter().map(round).collect())
        };
        (0..self.world.min(self.micro_batches())).map(of_rank).collect()
    }

    /// Two steps, on every rank.
    fn run(&self) -> Vec<Vec<Result<StepReport, Error>>> {
        let device: Arc<dyn Device> = if self.lazy { Arc::new(LazyCpu::new(5)) } else { Arc::new(Cpu) };
        let program = |launch: Launch| -> Result<_, Error> {
            let communicator = Arc::new(Communicator::connect(&launch, Options::default())?);
            let layout = Layout::new(&units(), self.policy.mesh(self.world)?.shard);
            let mut engine = Engine::new(communicator, device.clone(), layout, self.policy)?;
            engine.initialize(|_, _| |index: usize| index as f32)?;
            engine.measure_groups(self.measured);
            engine.compare_groups(self.compared)?;
            Ok([self.bad, None].map(|bad| self.step(&mut engine, launch.rank, bad)).into())
        };
        std::thread::scope(|scope| {
            let ranks: Vec<_> =
                Launch::threads(self.world).into_iter().map(|launch| scope.spawn(|| program(launch))).collect();
            ranks.into_iter().map(|rank| rank.join().unwrap().unwrap()).collect()
        })
    }

    fn step(&self, engine: &mut Engine, rank: usize, bad: Option<usize>) -> Result<StepReport, Error> {
        let mut step = engine.begin(self.rounds)?;
        for round in 0..self.rounds {
            let micro_batch = round * self.world + rank;
            if micro_batch >= self.micro_batches() {
                step.idle_round()?;
                continue;
            }
            step.round(self.tokens(micro_batch));
            for unit in 0..LENGTHS.len() {
                step.forward(unit)?;
            }
            for unit in (0..LENGTHS.len()).rev() {
                let mut pass = step.backward(unit)?;
                let mut values: Vec<f32> = pass.stream.download(pass.gradients.tensor(0).as_view()).unwrap();
                values
                    .iter_mut()
                    .zip(gradient(micro_batch, self.tokens(micro_batch), unit))
                    .for_each(|(value, x)| *value += x);
                if bad == Some(micro_batch) && unit == 0 {
                    values[7] = f32::NAN;
                }
                pass.stream.upload(pass.gradients.tensor(0), &values);
                if unit + 1 == LENGTHS.len() {
                    pass.stream.accumulate_from(pass.loss, &[1.0]).unwrap();
                }
            }
        }
        step.finish(&ADAMW, &mut [])
    }

    fn observation(&self, report: &StepReport, groups: usize) -> Observation {
        Observation {
            groups: groups as u64,
            samples: report.tokens as u64,
            tokens: report.tokens as u64,
            group_square_norms: report.group_square_norms.expect("measured"),
            square_norm: report.square_norm,
            non_finite: 0,
        }
    }
}

/// From the groups' mean gradients and their weighted mean, as the quantities are defined; a token is a sample.
fn brute_force(groups: &[(f64, Vec<f64>)]) -> Noise {
    let count = groups.len() as f64;
    let total: f64 = groups.iter().map(|(n, _)| n).sum();
    let elements = 0..LENGTHS.iter().sum();
    let mean: Vec<f64> = elements.map(|i| groups.iter().map(|(_, g)| g[i]).sum::<f64>() / total).collect();
    let square_norm: f64 = mean.iter().map(|x| x * x).sum();
    let distance = |(n, g): &(f64, Vec<f64>)| n * g.iter().zip(&mean).map(|(g, m)| (g / n - m).powi(2)).sum::<f64>();
    let spread: f64 = groups.iter().map(distance).sum();
    let variance = spread / (count - 1.0);
    Noise {
        variance,
        square_norm,
        debiased_square_norm: square_norm - variance / total,
        printed_variance: spread / total,
    }
}

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for world in 1..=4 {
        for rounds in 1..=4 {
            for reduce in [DType::F32, DType::Bf16] {
                for (sharded, gather) in [
                    (Sharded::EVERYTHING, Gather::Window),
                    (Sharded::EVERYTHING, Gather::Copy),
                    (Sharded::GRADIENTS, Gather::Window),
                    (Sharded::OPTIMIZER, Gather::Window),
                    (Sharded::NOTHING, Gather::Window),
                ] {
                    let policy = Policy { reduce, sharded, gather, ..Policy::default() };
                    let lazy = (world + rounds) % 2 == 0;
                    cases.push(Case {
                        world,
                        rounds,
                        policy,
                        lazy,
                        bad: None,
                        measured: true,
                        compared: None,
                        uneven: true,
                    });
                }
            }
        }
    }
    cases
}

/// Square norms and their sums are f64. What is not is the sum of K gradients in f32, at most K roundings of 2⁻²⁴ of the terms, so that its norm is off by at most
/// K·2⁻²⁴·Σ‖G_k‖ ≤ K·2⁻²⁴·√(N·S) with S = Σ‖G_k‖²/n_k. Relative to the norm √T that is ε = K·2⁻²⁴·√(N·S/T), and 2ε to T; the noise, of which T/N is
/// subtracted, is off by 2ε·(T/N)/(S − T/N) of itself, |Ĝ|² by 2ε·(1 + 1/(K − 1))·Q/|Ĝ|².
#[test]
fn statistics_equal_brute_force() {
    for case in cases() {
        let groups = case.groups();
        let expected = brute_force(&groups);
        let ranks = case.run();
        for (rank, steps) in ranks.iter().enumerate() {
            for (step, report) in steps.iter().enumerate() {
                let report = report.as_ref().unwrap();
                let first = ranks[0][step].as_ref().unwrap();
                let bits = |r: &StepReport| [r.square_norm.to_bits(), r.group_square_norms.unwrap().to_bits()];
                assert_eq!(bits(report), bits(first), "ranks must decide alike: {case:?}");
                let noise = case.observation(report, groups.len()).noise();
                if groups.len() < 2 {
                    assert_eq!(noise, Err(Unusable::TooFewGroups), "{case:?}");
                    continue;
                }
                let found = noise.unwrap();
                let (count, total) = (groups.len() as f64, report.tokens);
                let mean = expected.square_norm * total; // T/N
                let sum = mean + expected.variance * (count - 1.0); // S
                let twice = 2.0 * count * 2f64.powi(-24) * (sum / mean).sqrt();
                let whole = expected.square_norm;
                for (what, found, expected, bound) in [
                    ("square norm", found.square_norm, expected.square_norm, twice),
                    ("noise", found.variance, expected.variance, twice * mean / (sum - mean)),
                    ("printed", found.printed_variance, expected.printed_variance, twice * mean / (sum - mean)),
                    (
                        "signal",
                        found.debiased_square_norm,
                        expected.debiased_square_norm,
                        twice * (1.0 + 1.0 / (count - 1.0)) * expected.square_norm
                            / expected.debiased_square_norm.abs(),
                    ),
                ] {
                    let error = (found - expected).abs() / expected.abs();
                    assert!(error <= bound, "{what} on rank {rank}: {error:.1e} above {bound:.1e}, {case:?}");
                    // The signal is a difference that can be next to nothing: its bound is a share of the square that it is taken from.
                    let of = if what == "signal" { expected.abs() / whole } else { 1.0 };
                    assert!(bound * of <= 1e-5, "{what}: the bound is {bound:.1e}, {case:?}");
                }
            }
        }
    }
}

/// One rank's number that is not finite: every rank refuses the step, and the next one is as if it had not been.
#[test]
fn what_is_not_finite_on_one_rank_is_refused_by_all_and_leaves_nothing() {
    for case in cases().into_iter().filter(|case| case.world > 1) {
        let whole = case.run();
        let bad = Case { bad: Some(case.micro_batches() - 1), ..case.clone() }.run();
        for (rank, (steps, whole)) in bad.iter().zip(&whole).enumerate() {
            assert!(matches!(steps[0], Err(Error::NonFinite { .. })), "rank {rank}: {:?}, {case:?}", steps[0]);
            let [ours, theirs] = [&steps[1], &whole[1]].map(|report| report.as_ref().unwrap());
            assert_eq!(ours.group_square_norms, theirs.group_square_norms, "{case:?}");
            assert_eq!(ours.square_norm, theirs.square_norm, "{case:?}");
        }
    }
}

#[test]
fn without_the_statistic_there_are_the_same_collectives_and_numbers() {
    for case in cases() {
        let with = case.run();
        let without = Case { measured: false, ..case.clone() }.run();
        for (with, without) in with.iter().flatten().zip(without.iter().flatten()) {
            let [with, without] = [with, without].map(|report| report.as_ref().unwrap());
            assert!(with.group_square_norms.is_some() && without.group_square_norms.is_none(), "{case:?}");
            let numbers = |r: &StepReport| (r.operations, r.bytes, r.square_norm.to_bits(), r.loss_sum.to_bits());
            assert_eq!(numbers(with), numbers(without), "{case:?}");
        }
    }
}

/// The products, and the coordinates that pass, from the definitions. All is f64 but the sum, of which an element s is off by ε·Σ|x_k| with ε = K·2⁻²⁴, at most ε·√(K·q) with q = Σ x_k²:
/// - a product Σ_i x_k,i·s_i by ε·‖G_k‖·Σ‖G_j‖ ≤ ε·K·Σ‖G_j‖²;
/// - s² by 2ε·K·q, a little more with its square; with the limit's factor 1 + η²(K − 1), below 3 here, the two sides of the test of a coordinate, in units of K·q ≤ 3s², by 7ε·K·q. What is nearer to the limit
///   may fall on either side;
/// - Σ s² over those that pass by 3ε·K·Σq;
/// - along + across by as much of it as the noise and the square norm of which σ̂²/Q is made, each bounded as in `statistics_equal_brute_force`, and what both are compared with once more.
#[test]
fn a_comparison_of_groups_equals_brute_force_where_a_step_reduces_once() {
    let eta = 0.8;
    let mut passed = 0.0;
    for case in cases().into_iter().filter(|case| case.world > 1 && case.policy.sharded != Sharded::NOTHING) {
        for uneven in [false, true] {
            let case = Case { compared: Some(eta), uneven, ..case.clone() };
            let groups = case.groups();
            let once = case.rounds == 1 || !case.policy.sharded.gradients;
            let even = groups.len() == case.world && groups.iter().all(|(n, _)| *n == groups[0].0);
            for report in case.run().iter().flatten() {
                let report = report.as_ref().unwrap();
                assert_eq!(report.comparison.is_some(), once && even, "{case:?}");
                let Some(found) = &report.comparison else { continue };
                let elements: usize = LENGTHS.iter().sum();
                let sum: Vec<f64> = (0..elements).map(|i| groups.iter().map(|(_, g)| g[i]).sum()).collect();
                let count = groups.len() as f64;
                let total: f64 = groups.iter().map(|(n, _)| n).sum();
                let products: Vec<f64> =
                    groups.iter().map(|(_, g)| g.iter().zip(&sum).map(|(x, s)| x * s).sum()).collect();
                let scale: f64 = groups.iter().map(|(_, g)| g.iter().map(|x| x * x).sum::<f64>()).sum();
                let epsilon = count * 2f64.powi(-24);
                for (found, expected) in found.products.iter().zip(&products) {
                    assert!((found - expected).abs() <= epsilon * count * scale, "{found} and {expected}, {case:?}");
                }
                // σ̂ᵢ²/N against η²(Gᵢ/N)², with σ̂ᵢ² = Σ n(Gₖᵢ/n − Gᵢ/N)²/(K − 1).
                let (mut surely, mut perhaps) = ([0.0; 2], [0.0; 2]);
                for i in 0..elements {
                    let spread = |(n, g): &(f64, Vec<f64>)| n * (g[i] / n - sum[i] / total).powi(2);
                    let noise = groups.iter().map(spread).sum::<f64>() / (count - 1.0) / total;
                    let limit = eta * eta * (sum[i] / total).powi(2);
                    let squares: f64 = groups.iter().map(|(_, g)| g[i] * g[i]).sum();
                    // In the units of both: K·q ≤ 3s² was divided by N²(K − 1).
                    let near = 7.0 * epsilon * count * squares / (total * total * (count - 1.0));
                    for (passing, counted) in
                        [(noise + near <= limit, &mut surely), (noise - near <= limit, &mut perhaps)]
                    {
                        if passing {
                            counted[0] += 1.0;
                            counted[1] += sum[i] * sum[i];
                        }
                    }
                }
                assert!(
                    (surely[0]..=perhaps[0]).contains(&found.passing),
                    "{found:?}, {surely:?}, {perhaps:?}, {case:?}"
                );
                let rounding = 3.0 * epsilon * count * scale;
                let between = surely[1] - rounding..=perhaps[1] + rounding;
                assert!(between.contains(&found.passing_square_norm), "{found:?}, {between:?}, {case:?}");
                passed += found.passing;
                let observation = case.observation(report, groups.len());
                let alignment = Alignment::of(&observation, &found.products).unwrap();
                let noise = observation.noise().unwrap();
                let relative = noise.variance / noise.square_norm;
                let sums = report.group_square_norms.unwrap() * total / report.square_norm; // S·N/T
                let bound = 4.0 * epsilon * sums.sqrt() * (1.0 + 1.0 / (sums - 1.0));
                let error = (alignment.along + alignment.across - relative).abs() / relative;
                assert!(error <= bound && bound <= 1e-4, "{error:.1e} above {bound:.1e}, {case:?}");
            }
        }
    }
    assert!(passed > 0.0, "some coordinates must pass for the test to mean something");
}

#[test]
fn groups_that_cannot_be_compared_are_refused() {
    let whole = Policy { sharded: Sharded::NOTHING, ..Policy::default() };
    let grid = Policy { replicas: 2, ..Policy::default() };
    for (world, policy, eta, why) in [
        (2, Policy::default(), f64::NAN, "eta of NaN"),
        (2, Policy::default(), 0.0, "eta of 0"),
        (2, whole, 0.5, "shard at least the optimizer"),
        (4, grid, 0.5, "in one group"),
    ] {
        let program = |launch: Launch| {
            let communicator = Arc::new(Communicator::connect(&launch, Options::default()).unwrap());
            let layout = Layout::new(&units(), policy.mesh(world).unwrap().shard);
            let mut engine = Engine::new(communicator, Arc::new(Cpu), layout, policy).unwrap();
            engine.compare_groups(Some(eta)).unwrap_err().to_string()
        };
        std::thread::scope(|scope| {
            let ranks: Vec<_> =
                Launch::threads(world).into_iter().map(|launch| scope.spawn(|| program(launch))).collect();
            for rank in ranks {
                let message = rank.join().unwrap();
                assert!(message.contains(why), "{message}");
            }
        });
    }
}
