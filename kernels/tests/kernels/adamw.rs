//! The fused AdamW update.

use pillion_kernels::{AdamW, Buffer, DType, View, ViewMut};

use crate::bounded::Bounded;
use crate::common::{Stage, TYPES, assert_within, normals, rounded_as, run};

const LENGTHS: [usize; 7] = [1, 3, 15, 33, 7 * 15, 257, 1025];
/// So many that three threads share them.
const MANY: usize = (3 << 16) + 7;

/// One update.
#[derive(Clone, Copy)]
struct Update {
    adamw: AdamW,
    step: u64,
    scale: f32,
}

fn update(step: u64, weight_decay: f32) -> Update {
    Update { adamw: AdamW { lr: 3e-3, beta1: 0.9, beta2: 0.95, epsilon: 1e-8, weight_decay }, step, scale: 0.37 }
}

impl Update {
    /// Enqueues it.
    fn run(self, stage: &Stage, weights: Option<ViewMut<'_>>, state: [&mut Buffer; 3], grad: View<'_>) {
        let scale = stage.buffer(&[self.scale]);
        let [master, m, v] = state.map(Buffer::view_mut);
        stage.stream.adamw(weights, master, m, v, grad, scale.view(), self.adamw, self.step);
    }
}

/// master, m, v and gradient before an update.
struct State([Vec<f32>; 4]);

impl State {
    fn random(len: usize) -> State {
        let squares = normals(len, 3).iter().map(|x| 0.1 * x * x).collect();
        State([normals(len, 1), normals(len, 2), squares, normals(len, 4)])
    }

    /// (weights as f32, [master, m, v]) after an update by the kernel.
    fn updated(&self, dtype: DType, update: Update) -> (Vec<f32>, [Vec<f32>; 3]) {
        let [weights, master, m, v] = run(|stage| {
            let mut weights = stage.output_as(dtype, self.0[0].len());
            let [mut master, mut m, mut v, grad] = self.0.each_ref().map(|x| stage.buffer(x));
            update.run(stage, Some(weights.view_mut()), [&mut master, &mut m, &mut v], grad.view());
            [weights, master, m, v]
        });
        (weights.wide(), [master, m, v].map(|x| x.of()))
    }
}

#[test]
fn an_update_without_a_copy_gives_the_same_state() {
    for len in [77, MANY] {
        let (state, update) = (State::random(len), update(3, 0.1));
        let alone = run(|stage| {
            let [mut master, mut m, mut v, grad] = state.0.each_ref().map(|x| stage.buffer(x));
            update.run(stage, None, [&mut master, &mut m, &mut v], grad.view());
            [master, m, v]
        });
        let (weights, copied) = state.updated(DType::F32, update);
        assert_eq!(alone.map(|x| x.of::<f32>()), copied);
        assert_eq!(weights, copied[0]);
    }
}

/// [master, m, v] of one element after an update: the formula, with each setting and result rounded to f32.
fn updated(before: [f32; 4], update: Update) -> [Bounded; 3] {
    let (Update { adamw, step, .. }, [master, m, v, grad]) = (update, before.map(Bounded::exact));
    let [lr, beta1, beta2, epsilon, decay, scale] =
        [adamw.lr, adamw.beta1, adamw.beta2, adamw.epsilon, adamw.weight_decay, update.scale].map(Bounded::exact);
    let one = Bounded::exact(1.0);
    let correction = |beta: f32| 1.0 - f64::from(beta).powi(step as i32);
    let g = grad * scale;
    let m = beta1 * m + (one - beta1) * g;
    let v = beta2 * v + (one - beta2) * g * g;
    let rate = Bounded::rounded(f64::from(adamw.lr) / correction(adamw.beta1));
    let root = Bounded::rounded(correction(adamw.beta2).sqrt());
    [master * (one - lr * decay) - rate * (m / (v.sqrt() / root + epsilon)), m, v]
}

fn check(len: usize, dtype: DType, update: Update) {
    let state = State::random(len);
    let (weights, after) = state.updated(dtype, update);
    let expected: Vec<[Bounded; 3]> = (0..len).map(|i| updated(state.0.each_ref().map(|x| x[i]), update)).collect();
    for (which, name) in ["master", "m", "v"].iter().enumerate() {
        let expected: Vec<Bounded> = expected.iter().map(|element| element[which]).collect();
        assert_within(name, &after[which], &expected);
    }
    assert_eq!(weights, rounded_as(dtype, &after[0]));
}

#[test]
fn an_update_is_within_its_bound_and_weights_are_the_rounded_master() {
    for dtype in TYPES {
        for len in LENGTHS {
            for (step, decay) in [(1, 0.0), (2, 0.1), (1000, 0.1), (1_000_000, 0.1)] {
                check(len, dtype, update(step, decay));
            }
        }
        check(MANY, dtype, update(2, 0.1));
    }
}

#[test]
fn the_type_of_the_weights_changes_no_bit_of_the_state() {
    let (state, update) = (State::random(1025), update(3, 0.1));
    assert_eq!(state.updated(DType::F32, update).1, state.updated(DType::Bf16, update).1);
}

#[test]
fn a_bf16_gradient_is_what_it_says_in_f32() {
    for len in [33, MANY] {
        let State([master, m, v, grad]) = State::random(len);
        let state = State([master, m, v, rounded_as(DType::Bf16, &grad)]);
        let update = update(3, 0.1);
        let expected = state.updated(DType::Bf16, update);
        for copied in [false, true] {
            let [weights, master, m, v] = run(|stage| {
                let mut weights = stage.output_as(DType::Bf16, len);
                let [mut master, mut m, mut v, _] = state.0.each_ref().map(|x| stage.buffer(x));
                let grad = stage.buffer_as(DType::Bf16, &state.0[3]);
                let copy = copied.then(|| weights.view_mut());
                update.run(stage, copy, [&mut master, &mut m, &mut v], grad.view());
                [weights, master, m, v]
            });
            assert_eq!([master, m, v].map(|x| x.of::<f32>()), expected.1);
            assert!(!copied || weights.wide() == expected.0);
        }
    }
}

#[test]
fn the_first_step_from_rest_moves_by_the_learning_rate() {
    let len = 33;
    let gradient: Vec<f32> = normals(len, 4).iter().map(|x| x + x.signum()).collect();
    let state = State([vec![0.0; len], vec![0.0; len], vec![0.0; len], gradient.clone()]);
    let update = Update { scale: 1.0, ..update(1, 0.0) };
    let (_, [master, ..]) = state.updated(DType::F32, update);
    for (&x, &g) in master.iter().zip(&gradient) {
        // m/(1−β₁) = g and √(v/(1−β₂)) = |g| ≥ 1 at step 1. Nine roundings of the result and its factors, and ε against |g|.
        let expected = -f64::from(update.adamw.lr) * f64::from(g.signum());
        let relative = 10.0 * 2f64.powi(-24) + f64::from(update.adamw.epsilon);
        assert!((f64::from(x) - expected).abs() <= relative * expected.abs(), "{x} after a gradient of {g}");
    }
}

#[test]
fn without_gradient_or_momentum_only_decay_moves_a_weight() {
    let zeros = vec![0.0; 15];
    let state = State([normals(15, 1), zeros.clone(), zeros.clone(), zeros.clone()]);
    let still = state.updated(DType::F32, update(1, 0.0)).1;
    assert_eq!(still, [state.0[0].clone(), zeros.clone(), zeros]);
    let [decayed, ..] = state.updated(DType::F32, update(1, 0.1)).1;
    let keep = Bounded::exact(1.0) - Bounded::exact(3e-3f32) * Bounded::exact(0.1f32);
    let expected: Vec<Bounded> = state.0[0].iter().map(|&x| Bounded::exact(x) * keep).collect();
    assert_within("master", &decayed, &expected);
}
