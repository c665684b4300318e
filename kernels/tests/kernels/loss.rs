//! Cross-entropy, and sums of squares.

use half::bf16;
use pillion_kernels::{DType, Element, IGNORED};

use crate::bounded::{Bounded, exact, max, sum, to};
use crate::common::{TYPES, assert_certain, assert_gradient, assert_within, integers, normals, run};

/// N, V: threads share rows.
const SHAPES: [(usize, usize); 8] = [(1, 1), (1, 3), (3, 15), (7, 15), (7, 33), (33, 64), (5, 257), (257, 3)];

/// (the rows' losses, gradients)
fn cross_entropy(logits: &[Bounded], targets: &[u32], z_loss: f32) -> (Vec<Bounded>, Vec<Bounded>) {
    let mut losses = Vec::new();
    let mut gradients = Vec::new();
    for (row, &target) in logits.chunks(logits.len() / targets.len()).zip(targets) {
        if target == IGNORED {
            losses.push(Bounded::exact(0.0));
            gradients.extend(vec![Bounded::exact(0.0); row.len()]);
            continue;
        }
        let largest = max(row);
        let exponentials: Vec<Bounded> = row.iter().map(|&x| (x - largest).exp()).collect();
        let total = sum(exponentials.iter().copied());
        losses.push(total.ln() - (row[target as usize] - largest));
        let slope = Bounded::exact(2.0) * Bounded::exact(z_loss) * (largest + total.ln());
        let factor = (Bounded::exact(1.0) + slope) / total;
        gradients.extend(
            exponentials.iter().enumerate().map(|(column, &x)| {
                if column == target as usize { x * factor - Bounded::exact(1.0) } else { x * factor }
            }),
        );
    }
    (losses, gradients)
}

/// (sum, gradients), where the sum starts at 3.5; the gradients in place of the logits, or of this
/// type.
fn cross_entropy_by_kernel(rounded: Option<DType>, logits: &[f32], targets: &[u32], z_loss: f32) -> (f64, Vec<f32>) {
    let [sum, gradients] = run(|stage| {
        let mut rounded = rounded.map(|dtype| stage.output_as(dtype, logits.len()));
        let (mut logits, targets, mut sum) = (stage.buffer(logits), stage.buffer(targets), stage.buffer(&[3.5f64]));
        let rounded_view = rounded.as_mut().map(|x| x.view_mut());
        stage.kernels().cross_entropy(logits.view_mut(), rounded_view, targets.view(), sum.view_mut(), z_loss);
        [sum, rounded.unwrap_or(logits)]
    });
    (sum.of::<f64>()[0], gradients.wide())
}

/// Returns the gradients before they are rounded.
fn check_cross_entropy(logits: &[f32], targets: &[u32], z_loss: f32) -> Vec<Bounded> {
    let (losses, expected) = cross_entropy(&exact(logits), targets, z_loss);
    let (found, gradients) = cross_entropy_by_kernel(None, logits, targets, z_loss);
    assert_within("gradients", &gradients, &expected);
    // The rows' losses are f32; their sum is f64, whose rounding the slack in the bounds covers.
    let (loss, bound) = losses.iter().fold((3.5, 0.0), |(sum, bound), loss| (sum + loss.value, bound + loss.error));
    assert!((found - loss).abs() <= bound, "{found} against {loss}, bound {bound:e}");
    for dtype in TYPES {
        let (found_beside, gradients) = cross_entropy_by_kernel(Some(dtype), logits, targets, z_loss);
        assert_eq!(found_beside, found, "where the gradients go does not change the loss");
        assert_within("rounded gradients", &gradients, &to(dtype, &expected));
    }
    expected
}

#[test]
fn loss_and_gradient_are_within_their_bounds() {
    for (rows, vocab) in SHAPES {
        let (logits, targets) = (normals(rows * vocab, 1), integers(rows, vocab, 2));
        let gradients = check_cross_entropy(&logits, &targets, 0.0);
        assert_gradient(&[&logits], &[&gradients], |inputs| sum(cross_entropy(&inputs[0], &targets, 0.0).0));
        if rows * vocab > 100 {
            assert_certain("rounded gradients", &to(DType::Bf16, &gradients));
        }
    }
}

#[test]
fn logits_of_hundreds_neither_overflow_nor_lose_the_bound() {
    for (rows, vocab) in SHAPES {
        let logits: Vec<f32> = normals(rows * vocab, 1).iter().map(|x| 200.0 * x).collect();
        check_cross_entropy(&logits, &integers(rows, vocab, 2), 0.0);
    }
}

#[test]
fn gradients_have_the_auxiliary_loss_and_the_loss_does_not() {
    for (rows, vocab) in SHAPES {
        for z_loss in [1e-4, 0.5] {
            let (logits, targets) = (normals(rows * vocab, 1), integers(rows, vocab, 2));
            let gradients = check_cross_entropy(&logits, &targets, z_loss);
            assert_gradient(&[&logits], &[&gradients], |inputs| {
                let (losses, _) = cross_entropy(&inputs[0], &targets, 0.0);
                let rows = inputs[0].chunks(vocab).zip(&targets).zip(losses);
                sum(rows.map(|((row, &target), loss)| {
                    let log_z = loss + row[target as usize];
                    loss + Bounded::exact(z_loss) * log_z * log_z
                }))
            });
        }
    }
}

#[test]
fn rows_without_a_target_have_neither_a_loss_nor_a_gradient() {
    for (rows, vocab) in SHAPES {
        let mut targets = integers(rows, vocab, 2);
        targets.iter_mut().step_by(2).for_each(|target| *target = IGNORED);
        let gradients = check_cross_entropy(&normals(rows * vocab, 1), &targets, 0.1);
        assert!(gradients[..vocab].iter().all(|gradient| gradient.value == 0.0));
    }
}

#[test]
fn equal_logits_lose_the_logarithm_of_the_vocabulary() {
    let vocab = 64;
    let (found, gradients) = cross_entropy_by_kernel(None, &vec![7.0; vocab], &[5], 0.0);
    // ln 64 in f32 is one rounding and one of logf away: 3u·ln 64.
    assert!((found - 3.5 - 64f64.ln()).abs() <= 3.0 * 2f64.powi(-24) * 64f64.ln());
    assert!(gradients.iter().enumerate().all(|(i, &x)| x == if i == 5 { 1.0 / 64.0 - 1.0 } else { 1.0 / 64.0 }));
}

#[test]
fn a_nan_among_the_logits_reaches_the_loss_and_its_rows_gradient() {
    let mut logits = normals(3 * 15, 1);
    logits[20] = f32::NAN;
    for rounded in [None, Some(DType::F32), Some(DType::Bf16)] {
        let (loss, gradients) = cross_entropy_by_kernel(rounded, &logits, &[0, 1, 2], 0.0);
        assert!(loss.is_nan());
        assert!(gradients.iter().enumerate().all(|(index, x)| x.is_nan() == (index / 15 == 1)));
    }
}

fn square_norm_by_kernel<T: Element>(x: &[T], weight: f64) -> Vec<f64> {
    let [sums] = run(|stage| {
        let (mut sums, x) = (stage.buffer(&[f64::NAN; 2]), stage.buffer(x));
        stage.stream.square_norm(sums.view_mut(), x.view(), weight);
        [sums]
    });
    sums.of()
}

#[test]
fn squares_of_integers_are_summed_exactly() {
    // The last is one that three threads share.
    for len in [0, 1, 3, 7 * 15, 33, 257, 100_003, (3 << 16) + 17] {
        let x: Vec<f32> = integers(len, 4096, 1).iter().map(|&x| x as f32).collect();
        // Squares below 2²⁴, fewer than 2¹⁸ of them: every partial sum is an integer below 2⁵³.
        let exact: u64 = x.iter().map(|&x| (x as u64).pow(2)).sum();
        assert_eq!(square_norm_by_kernel(&x, 0.25), [0.25 * exact as f64, 0.0]);
    }
}

#[test]
fn squares_of_narrow_numbers_are_those_of_their_values() {
    let narrow: Vec<bf16> = normals(100_003, 2).into_iter().map(bf16::from_f32).collect();
    let wide: Vec<f32> = narrow.iter().map(|x| x.to_f32()).collect();
    assert_eq!(square_norm_by_kernel(&narrow, 3.0), square_norm_by_kernel(&wide, 3.0));
    let bad = [bf16::ONE, bf16::NAN, bf16::INFINITY, bf16::NEG_ONE];
    assert_eq!(square_norm_by_kernel(&bad, 1.0), [2.0, 2.0]);
}

#[test]
fn squares_are_summed_in_f64() {
    let x = normals(100_003, 1);
    let exact: f64 = x.iter().map(|&x| f64::from(x).powi(2)).sum();
    // Squares are exact, both sums are off by at most (n − 1)·2⁻⁵³ of a sum of positive terms (Higham 2002, section 4.2).
    let bound = 2.0 * 100_002.0 * 2f64.powi(-53) * exact;
    assert!((square_norm_by_kernel(&x, 1.0)[0] - exact).abs() <= bound);
}

#[test]
fn numbers_that_are_not_finite_are_counted_and_left_out() {
    for len in [3, 16, 33, (3 << 16) + 17] {
        let mut x = vec![2.0; len];
        (x[0], x[1], x[len - 1]) = (f32::NAN, f32::INFINITY, f32::NEG_INFINITY);
        assert_eq!(square_norm_by_kernel(&x, 1.0), [4.0 * (len - 3) as f64, 3.0]);
    }
}
