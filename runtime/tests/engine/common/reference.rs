//! The model of `mlp.rs` and its training in f64, in as few words as possible: gradients are central differences of the loss, so
//! that nothing here repeats a formula of a backward pass.
//!
//! With h = 1e-5 a difference is off by h²/6·f‴, about 1e-11, and by the loss's rounding over h, about 10·2⁻⁵²/h = 2e-10.

use std::ops::Range;

use pillion_runtime::Layout;

use super::ADAMW;
use super::mlp::{BLOCKS, HEAD, HIDDEN, NORM_EPSILON, VOCAB, WIDTH, initial, sample, units};

const DIFFERENCE: f64 = 1e-5;

pub(crate) struct Reference {
    layout: Layout,
    clip: f64,
    /// Master weights and the two moments of each unit.
    pub(crate) master: Vec<Vec<f64>>,
    m: Vec<Vec<f64>>,
    v: Vec<Vec<f64>>,
    updates: i32,
}

/// What a step computes before its update.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Statistics {
    pub(crate) loss_sum: f64,
    pub(crate) tokens: f64,
    pub(crate) square_norm: f64,
    pub(crate) group_square_norms: f64,
}

impl Reference {
    pub(crate) fn new(clip: f64) -> Reference {
        let layout = Layout::new(&units(), 1);
        let master: Vec<Vec<f64>> = layout
            .units
            .iter()
            .map(|unit| {
                let values = unit.tensors.iter().flat_map(|tensor| {
                    tensor
                        .range
                        .clone()
                        .enumerate()
                        .map(|(index, _)| f64::from(initial(&tensor.name, &tensor.shape)(index)))
                });
                values.collect()
            })
            .collect();
        let zero: Vec<Vec<f64>> = master.iter().map(|unit| vec![0.0; unit.len()]).collect();
        Reference { layout, clip, master, m: zero.clone(), v: zero, updates: 0 }
    }

    fn tensor(&self, unit: usize, index: usize) -> &[f64] {
        &self.master[unit][self.layout.units[unit].tensors[index].range.clone()]
    }

    /// −log softmax(logits)\[target\], summed over samples.
    fn loss(&self, samples: Range<u64>) -> f64 {
        samples
            .map(|index| {
                let (token, target) = sample(index);
                let mut x = self.tensor(0, 0)[token as usize * WIDTH..][..WIDTH].to_vec();
                for block in 1..=BLOCKS {
                    let normed = rms_norm(&x, self.tensor(block, 0));
                    let [gate, up] = [1, 2].map(|index| linear(&normed, self.tensor(block, index), HIDDEN));
                    let act: Vec<f64> =
                        gate.iter().zip(up).map(|(gate, up)| gate / (1.0 + (-gate).exp()) * up).collect();
                    let added = linear(&act, self.tensor(block, 3), WIDTH);
                    x.iter_mut().zip(added).for_each(|(x, added)| *x += added);
                }
                let logits = linear(&rms_norm(&x, self.tensor(HEAD, 0)), self.tensor(HEAD, 1), VOCAB);
                logits.iter().map(|x| x.exp()).sum::<f64>().ln() - logits[target as usize]
            })
            .sum()
    }

    /// The gradient of [`Reference::loss`], all units in one.
    pub(crate) fn gradient(&mut self, samples: Range<u64>) -> Vec<f64> {
        let mut gradient = Vec::new();
        for unit in 0..self.master.len() {
            for index in 0..self.master[unit].len() {
                let value = self.master[unit][index];
                let [above, below] = [DIFFERENCE, -DIFFERENCE].map(|difference| {
                    self.master[unit][index] = value + difference;
                    self.loss(samples.clone())
                });
                self.master[unit][index] = value;
                gradient.push((above - below) / (2.0 * DIFFERENCE));
            }
        }
        gradient
    }

    /// One step over micro-batches, each by its samples: each is a group of the statistics.
    pub(crate) fn step(&mut self, micro_batches: &[Range<u64>]) -> Statistics {
        let square = |x: &[f64]| x.iter().map(|x| x * x).sum::<f64>();
        let loss_sum = micro_batches.iter().map(|samples| self.loss(samples.clone())).sum();
        let groups: Vec<Vec<f64>> = micro_batches.iter().map(|samples| self.gradient(samples.clone())).collect();
        let counts = micro_batches.iter().map(|samples| (samples.end - samples.start) as f64);
        let mut total = vec![0.0; groups[0].len()];
        for group in &groups {
            total.iter_mut().zip(group).for_each(|(total, x)| *total += x);
        }
        let statistics = Statistics {
            loss_sum,
            tokens: counts.clone().sum(),
            square_norm: square(&total),
            group_square_norms: groups.iter().zip(counts).map(|(group, count)| square(group) / count).sum(),
        };
        self.update(&total, statistics);
        statistics
    }

    /// AdamW (Loshchilov and Hutter 2019, algorithm 2) on the mean gradient, clipped to a norm.
    fn update(&mut self, total: &[f64], statistics: Statistics) {
        let [lr, beta1, beta2, epsilon, decay] =
            [ADAMW.lr, ADAMW.beta1, ADAMW.beta2, ADAMW.epsilon, ADAMW.weight_decay].map(f64::from);
        let norm = statistics.square_norm.sqrt() / statistics.tokens;
        let scale = (self.clip / norm).min(1.0) / statistics.tokens;
        self.updates += 1;
        let mut gradient = total.iter();
        for (unit, layout) in self.layout.units.iter().enumerate() {
            for tensor in &layout.tensors {
                let decay = if tensor.decay { decay } else { 0.0 };
                for index in tensor.range.clone() {
                    let g = scale * gradient.next().expect("as many as parameters");
                    let (m, v) = (&mut self.m[unit][index], &mut self.v[unit][index]);
                    *m = beta1 * *m + (1.0 - beta1) * g;
                    *v = beta2 * *v + (1.0 - beta2) * g * g;
                    let (m, v) = (*m / (1.0 - beta1.powi(self.updates)), *v / (1.0 - beta2.powi(self.updates)));
                    let master = &mut self.master[unit][index];
                    *master -= lr * decay * *master + lr * m / (v.sqrt() + epsilon);
                }
            }
        }
    }
}

fn linear(x: &[f64], w: &[f64], outputs: usize) -> Vec<f64> {
    let dot = |row: &[f64]| row.iter().zip(x).map(|(w, x)| w * x).sum();
    (0..outputs).map(|output| dot(&w[output * x.len()..][..x.len()])).collect()
}

fn rms_norm(x: &[f64], weight: &[f64]) -> Vec<f64> {
    let mean_square = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
    let inverse = 1.0 / (mean_square + f64::from(NORM_EPSILON)).sqrt();
    x.iter().zip(weight).map(|(x, weight)| x * inverse * weight).collect()
}
