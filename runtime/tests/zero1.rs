//! `Zero1` beside AdamW in f64, and beside itself on another number of ranks.

use std::sync::Arc;

use pillion_collectives::{Communicator, FolderStore, Options};
use pillion_kernels::{AdamW, Buffer, Cpu, DType, Device};
use pillion_runtime::{Error, StepReport, Zero1};

const SETTINGS: AdamW = AdamW { lr: 0.01, beta1: 0.9, beta2: 0.95, epsilon: 1e-8, weight_decay: 0.1 };
const STEPS: usize = 5;

/// A gradient's element: of group `group` in step `step`.
fn gradient(step: usize, group: usize, index: usize) -> f32 {
    ((index * 7 + group * 13 + step * 29) % 101) as f32 / 50.0 - 1.0
}

fn parameter(index: usize) -> f32 {
    (index % 17) as f32 / 10.0
}

fn filled(values: impl Fn(usize) -> f32, n: usize) -> Buffer {
    let mut buffer = Cpu.allocate(DType::F32, n).unwrap();
    let values: Vec<f32> = (0..n).map(values).collect();
    Cpu.stream().upload(buffer.view_mut(), &values);
    buffer
}

/// What `program` returns on each of `world` ranks, which are threads.
fn ranks<T: Send>(world: usize, program: impl Fn(Arc<Communicator>) -> T + Sync) -> Vec<T> {
    let folder = tempfile::tempdir().unwrap();
    let (folder, program) = (folder.path(), &program);
    std::thread::scope(|scope| {
        let rank = |rank| {
            scope.spawn(move || {
                let store = Arc::new(FolderStore::new(folder).unwrap());
                let communicator = Communicator::connect_through(store, rank, world, Options::default()).unwrap();
                program(Arc::new(communicator))
            })
        };
        let threads: Vec<_> = (0..world).map(rank).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// Trains on as many groups as `groups`, which the ranks divide among them; each group's gradient has
/// the weight of one token.
fn train(world: usize, groups: usize, n: usize, clip: Option<f64>) -> Vec<(Vec<f32>, Vec<StepReport>)> {
    ranks(world, |communicator| {
        let rank = communicator.rank();
        // Those of rank 0 are the ones that count.
        let params = filled(|index| parameter(index) + rank as f32, n);
        let mut zero1 = Zero1::new(communicator, &Cpu, params, filled(|_| 0.0, n), clip).unwrap();
        let mut reports = Vec::new();
        for step in 0..STEPS {
            let own = (0..groups).filter(|group| group % world == rank);
            let sum = |index: usize| own.clone().map(|group| gradient(step, group, index)).sum::<f32>();
            let values: Vec<f32> = (0..n).map(sum).collect();
            Cpu.stream().upload(zero1.memory().unwrap().1.view_mut(), &values);
            let tokens = own.clone().count() as u64;
            reports.push(zero1.step(&SETTINGS, 2.0 * tokens as f64, tokens).unwrap());
        }
        let params = zero1.memory().unwrap().0.view().as_slice::<f32>().unwrap().to_vec();
        (params, reports)
    })
}

/// The same in f64, with the square norms of each step's mean and of its groups.
fn reference(groups: usize, n: usize, clip: f64) -> (Vec<f64>, Vec<(f64, f64)>) {
    let (mut p, mut m, mut v) =
        ((0..n).map(|i| f64::from(parameter(i))).collect::<Vec<_>>(), vec![0.0; n], vec![0.0; n]);
    let [lr, beta1, beta2, epsilon, decay] =
        [SETTINGS.lr, SETTINGS.beta1, SETTINGS.beta2, SETTINGS.epsilon, SETTINGS.weight_decay].map(f64::from);
    let mut norms = Vec::new();
    for step in 0..STEPS {
        let of = |group, index| f64::from(gradient(step, group, index));
        let mean: Vec<f64> =
            (0..n).map(|index| (0..groups).map(|group| of(group, index)).sum::<f64>() / groups as f64).collect();
        let norm = mean.iter().map(|g| g * g).sum::<f64>().sqrt();
        let each = (0..groups).map(|group| (0..n).map(|index| of(group, index).powi(2)).sum::<f64>()).sum();
        norms.push((norm, each));
        let (scale, t) = ((clip / norm).min(1.0), step as i32 + 1);
        for index in 0..n {
            let g = scale * mean[index];
            m[index] = beta1 * m[index] + (1.0 - beta1) * g;
            v[index] = beta2 * v[index] + (1.0 - beta2) * g * g;
            let (m, v) = (m[index] / (1.0 - beta1.powi(t)), v[index] / (1.0 - beta2.powi(t)));
            p[index] = p[index] * (1.0 - lr * decay) - lr * m / (v.sqrt() + epsilon);
        }
    }
    (p, norms)
}

#[test]
fn parameters_follow_adamw_in_f64_and_are_the_same_on_every_rank() {
    for (world, n) in [(1, 100), (2, 100), (3, 1000), (3, 5), (2, 1), (4, 0)] {
        let (groups, clip) = (4, 0.5);
        let results = train(world, groups, n, Some(clip));
        let (expected, norms) = reference(groups, n, clip);
        for (params, reports) in &results {
            assert_eq!(*params, results[0].0, "{world} ranks, {n} parameters");
            for (value, expected) in params.iter().zip(&expected) {
                // A step changes a weight by about lr; in f32 each step's change is off by some units of
                // its last place, and the weight by one: STEPS · (8 · lr + 2) · 2⁻²⁴.
                let bound = STEPS as f64 * (8.0 * 0.01 + 2.0) * 2f64.powi(-24) * 2.0;
                assert!((f64::from(*value) - expected).abs() <= bound, "{value} where {expected} was expected");
            }
            for (report, (norm, each)) in reports.iter().zip(&norms) {
                let tokens = groups as f64;
                assert_eq!((report.tokens, report.loss_sum), (tokens, 2.0 * tokens));
                // Gradients are sums in f32 of at most four numbers below 1.
                assert!((report.gradient_norm - norm).abs() <= 1e-6 * (norm + 1e-3), "{report:?}, {norm}");
                if world == groups {
                    assert!((report.group_square_norms.unwrap() - each).abs() <= 1e-6 * each, "{report:?}, {each}");
                }
            }
        }
    }
}

#[test]
fn what_is_not_finite_or_empty_changes_nothing_on_any_rank() {
    for (bad, tokens) in [(f32::NAN, 1), (f32::INFINITY, 1), (0.5, 0)] {
        let n = 40;
        let results = ranks(2, |communicator| {
            let rank = communicator.rank();
            let (params, grads) = (filled(parameter, n), filled(|_| if rank == 1 { bad } else { 0.5 }, n));
            let mut zero1 = Zero1::new(communicator, &Cpu, params, grads, None).unwrap();
            let error = zero1.step(&SETTINGS, 0.0, tokens).unwrap_err();
            assert!(matches!(error, Error::NonFinite { step: 1, .. } | Error::NoTokens { step: 1 }), "{error}");
            // It can go on, here with the same.
            assert!(zero1.step(&SETTINGS, 0.0, tokens).is_err());
            assert_eq!(zero1.state().2, 0);
            let mut moments = vec![9.0f32; zero1.own().len()];
            Cpu.stream().read(zero1.state().0.view(), &mut moments).unwrap();
            moments
        });
        assert!(results.iter().flatten().all(|&moment| moment == 0.0));
    }
}

#[test]
fn operands_that_do_not_fit_are_refused() {
    let refused = |params: Buffer, grads: Buffer, clip, words: &str| {
        let communicator =
            Arc::new(Communicator::connect(&pillion_collectives::Launch::single(), Options::default()).unwrap());
        let error = Zero1::new(communicator, &Cpu, params, grads, clip).err().unwrap().to_string();
        assert!(error.contains(words), "{error}");
    };
    let f32s = |n| filled(|_| 0.0, n);
    refused(f32s(4), f32s(5), None, "as many of each");
    refused(f32s(4), Cpu.allocate(DType::Bf16, 4).unwrap(), None, "of f32");
    refused(f32s(4), f32s(4), Some(0.0), "positive");
    refused(f32s(4), f32s(4), Some(f64::NAN), "positive");
}
