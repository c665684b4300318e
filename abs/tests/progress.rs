//! What `docs/src/batch-sizes.md` derives of steps, samples and time, computed from numbers.
//!
//! The model is that of McCandlish et al. 2018: a step of batch b makes 1/(1 + B/b) of the progress
//! of a perfect one, where the noise scale B changes as training goes on. A step costs t₀ + t₁·b.

/// B at equal parts of the progress: a run whose noise scale rises a hundredfold, as ours do.
fn noise_scales() -> Vec<f64> {
    (0..1000).map(|part| 2.0 * 100f64.powf(f64::from(part) / 999.0)).collect()
}

fn mean(values: impl ExactSizeIterator<Item = f64>) -> f64 {
    let count = values.len() as f64;
    values.sum::<f64>() / count
}

/// Steps and samples for a unit of progress, by a rule that gives the batch at each noise scale.
fn cost(rule: impl Fn(f64) -> f64) -> [f64; 2] {
    let scales = noise_scales();
    let steps = mean(scales.iter().map(|&scale| 1.0 + scale / rule(scale)));
    let samples = mean(scales.iter().map(|&scale| rule(scale) + scale));
    [steps, samples]
}

fn time(t0: f64, t1: f64, rule: impl Fn(f64) -> f64) -> f64 {
    let [steps, samples] = cost(rule);
    t0 * steps + t1 * samples
}

/// ⟨B⟩ and γ = ⟨√B⟩²/⟨B⟩.
fn moments() -> (f64, f64) {
    let scales = noise_scales();
    let scale = mean(scales.iter().copied());
    (scale, mean(scales.iter().map(|scale| scale.sqrt())).powi(2) / scale)
}

/// Sums of a thousand terms in f64.
const ROUNDING: f64 = 1e-12;

fn assert_equal(found: f64, expected: f64) {
    assert!((found / expected - 1.0).abs() < ROUNDING, "{found} and {expected}");
}

#[test]
fn constants_and_shares_of_the_noise_scale_have_one_front_and_its_root_a_better_one() {
    let (scale, gamma) = moments();
    assert!(gamma < 0.75, "{gamma}: a noise scale that changes little tells little");
    for factor in [0.1, 0.5, 1.0, 3.0, 20.0] {
        let product = |[steps, samples]: [f64; 2]| (steps - 1.0) * (samples - scale);
        assert_equal(product(cost(|_| factor * scale)), scale);
        assert_equal(product(cost(|noise| factor * noise)), scale);
        assert_equal(product(cost(|noise| factor * noise.sqrt())), gamma * scale);
    }
}

#[test]
fn no_rule_is_faster_than_the_root_and_it_saves_at_most_half_of_one_less_the_root_of_gamma() {
    let (scale, gamma) = moments();
    let mut largest: f64 = 0.0;
    for ratio in [0.01, 0.1, 0.5, 1.0, 2.0, 10.0, 100.0] {
        // t₁⟨B⟩/t₀.
        let (t0, t1) = (1.0, ratio / scale);
        let constant = time(t0, t1, |_| (scale * t0 / t1).sqrt());
        assert_equal(constant, (1.0 + ratio.sqrt()).powi(2));
        let root = time(t0, t1, |noise| (noise * t0 / t1).sqrt());
        assert_equal(root, 1.0 + ratio + 2.0 * (gamma * ratio).sqrt());
        for factor in [0.25, 0.5, 0.9, 1.1, 2.0, 4.0] {
            assert!(time(t0, t1, |_| factor * (scale * t0 / t1).sqrt()) > constant);
            assert!(time(t0, t1, |noise| factor * (noise * t0 / t1).sqrt()) > root);
        }
        for power in [0.25, 0.4, 0.6, 0.75, 1.0] {
            let at = |factor: f64| time(t0, t1, |noise| factor * (t0 / t1).sqrt() * noise.powf(power));
            let best = (-400..400).map(|step| at((f64::from(step) / 100.0).exp())).fold(f64::INFINITY, f64::min);
            assert!(best > root, "{power}");
        }
        let share = |factor: f64| time(t0, t1, |noise| factor * noise);
        assert_equal(share((t0 / (t1 * scale)).sqrt()), constant);
        // A batch of the noise scale itself takes at most twice as long as the best constant.
        assert_equal(share(1.0), 2.0 * (1.0 + ratio));
        assert!(share(1.0) < 2.0 * constant);
        largest = largest.max(1.0 - root / constant);
    }
    assert_equal(largest, (1.0 - gamma.sqrt()) / 2.0);
}

/// At t₀ = t₁⟨B⟩, where the best constant is ⟨B⟩: (1 + 4) + (1/4 + 1) = 6.25 in place of 4.
#[test]
fn a_constant_four_times_off_costs_more_than_half_as_much_again() {
    let (scale, _) = moments();
    let at = |factor: f64| time(1.0, 1.0 / scale, |_| factor * scale);
    assert_equal(at(4.0) / at(1.0), 1.5625);
    assert_equal(at(0.25) / at(1.0), 1.5625);
}

/// β₁ ≤ √β₂ − 8(1 + η²)(1 − β₂)/β₂², at the β₂ of the paper's runs and ours.
#[test]
fn the_theorem_wants_a_smaller_first_beta() {
    let limit = |beta2: f64, eta: f64| beta2.sqrt() - 8.0 * (1.0 + eta * eta) * (1.0 - beta2) / (beta2 * beta2);
    assert_eq!(format!("{:.2}", limit(0.95, 0.0)), "0.53");
    assert_eq!(format!("{:.2}", limit(0.95, 0.9)), "0.17");
    // A β₁ of 0.9 needs a β₂ of about 0.9885 even for the smallest η.
    assert!(limit(0.9885, 0.0) > 0.9 && limit(0.988, 0.0) < 0.9);
}

/// (J − 1)/η² with J = 4, by model, for the η of the paper's tables.
#[test]
fn the_cap_of_the_printed_test_is_below_the_first_batch_of_the_smallest_model_alone() {
    let caps = |etas: &[f64]| etas.iter().map(|eta| 3.0 / (eta * eta)).collect::<Vec<_>>();
    let rounded = |etas: &[f64]| caps(etas).iter().map(|cap| cap.round() as u64).collect::<Vec<_>>();
    assert_eq!(rounded(&[0.15, 0.2, 0.25, 0.275]), [133, 75, 48, 40]);
    assert!(caps(&[0.15, 0.2, 0.25, 0.275]).iter().all(|&cap| cap < 256.0));
    assert_eq!(rounded(&[0.05, 0.075, 0.08, 0.085]), [1200, 533, 469, 415]);
    assert_eq!(rounded(&[0.05, 0.1, 0.15]), [1200, 300, 133]);
    assert!(caps(&[0.05, 0.075, 0.08, 0.085, 0.1, 0.15]).iter().all(|&cap| cap > 128.0 && cap < 8192.0));
}
