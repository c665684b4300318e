//! What the engine computes against the same training in f64, whose gradients are finite differences.

use std::ops::Range;

use crate::common::reference::Reference;
use crate::common::{ADAMW, Host, Schedule, Setup, ranks};
use crate::{GATHERS, WORLDS, must_train};

/// Unit roundoff of f32.
const ROUNDOFF: f64 = 1.0 / (1u64 << 24) as f64;

/// A bound on the relative error of a loss. Each logit is the end of at most 3·13 + 2·11 additions and multiplications in dot products,
/// 2·13 + 13 in the mean squares of the norms and 20 in the elementwise functions, so it is off by at most 120 roundoffs of
/// the terms that it sums, which are of the order of the logits. A loss moves by at most twice the error of its logits, and
/// losses here (about ln 19 ≈ 3) are larger than twice the logits' errors are wide.
const LOSS_BOUND: f64 = 130.0 * ROUNDOFF;

/// A bound on the relative error of norms: backward doubles the length of the chain, and squaring doubles the error again.
const NORM_BOUND: f64 = 4.0 * LOSS_BOUND;

/// A bound on the error of a master weight after three steps. A clipped gradient's elements are below 0.5, and off by 2·LOSS_BOUND of
/// that: δ. Adam's quotient m/(√v + ε) changes by at most (1 + |m|/√v)·δ/ε ≤ 2.2·δ/ε: both m and √v are weighted means of the
/// gradients, the weights of which differ by less than a fifth in three steps. Each step adds lr of that; a factor of two leaves
/// room for what earlier errors do to later gradients.
fn weight_bound() -> f64 {
    let delta = 0.5 * 2.0 * LOSS_BOUND;
    2.0 * 3.0 * f64::from(ADAMW.lr) * 2.2 * delta / f64::from(ADAMW.epsilon)
}

fn near(what: &str, ours: f64, theirs: f64, relative: f64) {
    let error = (ours - theirs).abs() / theirs.abs();
    assert!(error <= relative, "{what}: {ours} and {theirs} differ by {error:.1e} of it, bound {relative:.1e}");
}

#[test]
fn every_world_agrees_with_training_in_f64() {
    // No world divides the micro-batches of the first step, nor do they have equally many tokens.
    let schedule = Schedule(vec![vec![3, 1, 4, 2, 5], vec![2, 6, 1], vec![5, 3, 8, 1]]);
    let mut reference = Reference::new(0.5);
    let steps: Vec<_> = (0..schedule.0.len())
        .map(|step| {
            let micro_batches = 0..schedule.0[step].len();
            reference.step(&micro_batches.map(|index| schedule.samples(step, index)).collect::<Vec<_>>())
        })
        .collect();
    let initial = Reference::new(0.5);
    for world in WORLDS {
        for gather in GATHERS {
            let training = must_train(&Setup::new(world).gather(gather), &schedule);
            for (step, (ours, theirs)) in training.reports.iter().zip(&steps).enumerate() {
                let named = |what: &str| format!("{what} of step {step} at world {world}");
                assert_eq!(ours.tokens, theirs.tokens, "{}", named("tokens"));
                near(&named("loss sum"), ours.loss_sum, theirs.loss_sum, LOSS_BOUND);
                near(&named("square norm"), ours.square_norm, theirs.square_norm, NORM_BOUND);
                near(&named("group norms"), ours.group_square_norms.unwrap(), theirs.group_square_norms, NORM_BOUND);
                let norm = theirs.square_norm.sqrt() / theirs.tokens;
                near(&named("mean gradient's norm"), ours.gradient_norm, norm, NORM_BOUND);
                assert!(norm > 0.5, "the limit of the norm is reached");
            }
            let mut moved = 0.0f64;
            for (unit, state) in training.states.iter().enumerate() {
                let elements = state.master.iter().zip(&reference.master[unit]).zip(&initial.master[unit]);
                for ((&ours, &theirs), &first) in elements {
                    let error = (f64::from(ours) - theirs).abs();
                    assert!(error <= weight_bound(), "a weight of unit {unit} at world {world} is off by {error:.1e}");
                    moved = moved.max((theirs - first).abs());
                }
            }
            assert!(moved > 100.0 * weight_bound(), "weights move by {moved:.1e}, much more than the bound");
        }
    }
}

#[test]
fn statistics_equal_brute_force() {
    // A group is a micro-batch of a rank, so every world has the same groups.
    let schedule = Schedule(vec![vec![1, 8, 2, 5, 3, 7, 4]]);
    let micro_batches: Vec<Range<u64>> = (0..7).map(|index| schedule.samples(0, index)).collect();
    let brute = Reference::new(0.5).step(&micro_batches);
    // Another grouping of the same samples would give another number, by far more than the bound.
    let whole = Reference::new(0.5).step(std::slice::from_ref(&(0..30)));
    near("the same gradient", whole.square_norm, brute.square_norm, 1e-8);
    assert!((whole.group_square_norms / brute.group_square_norms - 1.0).abs() > 0.1, "{whole:?}, {brute:?}");
    for world in WORLDS {
        for host in [Host::Cpu, Host::Lazy(7)] {
            let bucket = if host == Host::Cpu { 0 } else { 3_700 };
            let report = must_train(&Setup::new(world).host(host).bucket(bucket), &schedule).reports.remove(0);
            assert_eq!(report.tokens, 30.0);
            near("loss sum", report.loss_sum, brute.loss_sum, 1e-5);
            near("square norm", report.square_norm, brute.square_norm, 1e-5);
            near("group square norms", report.group_square_norms.unwrap(), brute.group_square_norms, 1e-5);
        }
    }
}

#[test]
fn the_norms_of_each_unit_equal_brute_force() {
    let schedule = Schedule(vec![vec![1, 8, 2, 5, 3, 7, 4]]);
    let mut reference = Reference::new(0.5);
    let lens: Vec<usize> = reference.master.iter().map(Vec::len).collect();
    let groups: Vec<_> = (0..7).map(|index| schedule.samples(0, index)).collect();
    let gradients: Vec<Vec<f64>> = groups.iter().map(|samples| reference.gradient(samples.clone())).collect();
    let square = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>();
    for world in WORLDS {
        for replicas in [1, world] {
            let found = ranks(&Setup::new(world).replicas(replicas), |mut rank| {
                rank.engine.measure_units(true);
                rank.step(&schedule, 0)?;
                Ok::<_, pillion_runtime::Error>(rank.engine.unit_norms().to_vec())
            });
            for norms in found {
                let norms = norms.unwrap();
                assert_eq!(norms.len(), lens.len());
                let mut first = 0;
                for (unit, (norms, len)) in norms.iter().zip(&lens).enumerate() {
                    let elements = first..first + len;
                    first += len;
                    let each = gradients.iter().zip(&groups).map(|(gradient, samples)| {
                        square(&mut gradient[elements.clone()].iter().copied()) / (samples.end - samples.start) as f64
                    });
                    let sum = elements.clone().map(|i| gradients.iter().map(|gradient| gradient[i]).sum());
                    let named = |what: &str| format!("{what} of unit {unit}, {replicas} of {world}");
                    near(&named("square norm"), norms.square_norm, square(&mut sum.into_iter()), 1e-5);
                    near(&named("group norms"), norms.group_square_norms, each.sum(), 1e-5);
                }
            }
        }
    }
}
