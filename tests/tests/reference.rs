//! The f64 reference against Hugging Face's Llama: losses, logits, and gradients by finite differences.

use pillion_kernels::random;
use pillion_tests::golden::{Distance, Golden};
use pillion_tests::reference::{Config, Parameters, finite_difference, logits, loss};

/// Between differences of the loss.
const STEP: f64 = 1.0 / 4096.0;

/// A golden file's model and micro-batch.
struct Case {
    name: &'static str,
    golden: Golden,
    config: Config,
    parameters: Parameters,
    tokens: Vec<u32>,
    targets: Vec<u32>,
    batch: usize,
    seq: usize,
}

fn cases() -> [Case; 2] {
    ["mha", "gqa"].map(|name| {
        let golden = Golden::load(name);
        let shape = golden.shape("tokens");
        Case {
            name,
            config: golden.config(),
            parameters: golden.by_parameter("param"),
            tokens: golden.tokens("tokens"),
            targets: golden.tokens("targets"),
            batch: shape[0],
            seq: shape[1],
            golden,
        }
    })
}

impl Case {
    fn loss(&self) -> f64 {
        loss(&self.config, &self.parameters, &self.tokens, &self.targets, None, self.batch, self.seq)
    }

    /// How far a loss in f64 may lie from the exact one. The golden f32 logits lie δ away; f64 rounds 2²⁹ times finer. Two logits make
    /// a loss, log Σ eˣ − x. PyTorch adds in blocks and the reference in sequence, where the rounding of n terms grows by up to √n, n ≤ F.
    fn loss_rounding(&self) -> f64 {
        let logits = self.golden.distance("logits").max_abs;
        2.0 * logits * 2f64.powi(-29) * (self.config.ffn as f64).sqrt()
    }

    /// The slope of the loss by a central difference D(h), and its bound:
    /// * truncation h²/6·L‴ + O(h⁴), a third of D(2h) − D(h), whole here to cover O(h⁴);
    /// * rounding of two losses over 2h in D(h), and half of that in D(2h).
    fn slope(&self, direction: &Parameters) -> (f64, f64) {
        let Case { config, parameters, tokens, targets, batch, seq, .. } = self;
        let difference =
            |step| finite_difference(config, parameters, tokens, targets, None, *batch, *seq, direction, step);
        let (fine, coarse) = (difference(STEP), difference(2.0 * STEP));
        (fine, (coarse - fine).abs() + 1.5 * self.loss_rounding() / STEP)
    }

    /// A bound on the f32 rounding of one golden gradient, as a Euclidean norm.
    fn gradient_rounding(&self, parameter: &str, gradient: &[f64]) -> f64 {
        Distance::ROUNDING * self.golden.distance(&format!("grad.{parameter}")).rms * norm(gradient)
    }
}

fn inner(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn norm(x: &[f64]) -> f64 {
    inner(x, x).sqrt()
}

#[test]
fn the_loss_is_that_of_the_f64_run() {
    for case in cases() {
        let (loss, expected) = (case.loss(), case.golden.f64("loss.f64")[0]);
        let bound = 2.0 * case.loss_rounding();
        assert!((loss - expected).abs() <= bound, "{}: {loss} against {expected}, bound {bound:e}", case.name);
    }
}

#[test]
fn logits_lie_as_far_from_the_f32_run_as_the_f64_run_does() {
    for case in cases() {
        let logits = logits(&case.config, &case.parameters, &case.tokens, None, case.batch, case.seq);
        let golden = case.golden.f32("logits");
        assert_eq!(logits.len(), golden.len());
        let apart = logits.iter().zip(&golden).map(|(x, &y)| (x - f64::from(y)).abs()).fold(0.0, f64::max);
        let stated = case.golden.distance("logits").max_abs;
        assert!(
            (1.0 / Distance::ROUNDING..=Distance::ROUNDING).contains(&(apart / stated)),
            "{}: logits lie {apart:e} apart, not {stated:e}",
            case.name
        );
    }
}

/// One parameter at a time, so that each gradient is tested by itself.
#[test]
fn slopes_along_random_directions_are_those_of_the_golden_gradients() {
    for case in cases() {
        let gradients = case.golden.by_parameter("grad");
        assert!(gradients.keys().eq(case.parameters.keys()), "a gradient for each parameter");
        for (seed, (name, gradient)) in gradients.iter().enumerate() {
            let random: Vec<f64> =
                (0..gradient.len()).map(|index| random::normal(seed as u64, 0, index as u64)).collect();
            let length = norm(&random);
            let unit: Vec<f64> = random.iter().map(|x| x / length).collect();
            let (slope, bound) = case.slope(&Parameters::from([(name.clone(), unit.clone())]));
            // By Cauchy and Schwarz, the direction having length 1.
            let tolerance = bound + case.gradient_rounding(name, gradient);
            // A random direction of length 1 has a slope of about ‖gradient‖/√n.
            let typical = norm(gradient) / (gradient.len() as f64).sqrt();
            assert!(tolerance <= 1e-2 * typical, "{}: {tolerance:e} for {name} tests little", case.name);
            let expected = inner(gradient, &unit);
            assert!(
                (slope - expected).abs() <= tolerance,
                "{}: {name} has slope {slope:e} by differences, {expected:e} by the gradient, tolerance {tolerance:e}",
                case.name
            );
        }
    }
}

/// Along the gradient nothing cancels, so the comparison is at its sharpest.
#[test]
fn the_slope_along_the_golden_gradient_is_its_norm() {
    for case in cases() {
        let gradients = case.golden.by_parameter("grad");
        let squared =
            |of: &dyn Fn(&String, &Vec<f64>) -> f64| gradients.iter().map(|(name, g)| of(name, g).powi(2)).sum::<f64>();
        let length = squared(&|_, gradient| norm(gradient)).sqrt();
        let unit = |gradient: &Vec<f64>| gradient.iter().map(|x| x / length).collect();
        let (slope, bound) = case.slope(&gradients.iter().map(|(name, g)| (name.clone(), unit(g))).collect());
        let tolerance = bound + squared(&|name, gradient| case.gradient_rounding(name, gradient)).sqrt();
        assert!(tolerance <= 1e-4 * length, "{}: {tolerance:e} tests little", case.name);
        assert!((slope - length).abs() <= tolerance, "{}: {slope} against {length}, {tolerance:e}", case.name);
    }
}
