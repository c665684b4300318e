//! A little model on the kernels of [`Stream`]: an embedding, two residual SwiGLU blocks and a
//! head. A sample is a token and the one that follows it. Widths are odd, so that tensors straddle
//! ranks and shards end in padding.

use std::ops::Range;

use pillion_kernels::{Buffer, DType, Device, Kernels, Stream, ViewMut, random};
use pillion_runtime::{Backward, Error, Forward, TensorSpec, UnitSpec};

pub(crate) const VOCAB: usize = 19;
pub(crate) const WIDTH: usize = 13;
pub(crate) const HIDDEN: usize = 11;
pub(crate) const BLOCKS: usize = 2;
pub(crate) const UNITS: usize = BLOCKS + 2;
pub(crate) const HEAD: usize = UNITS - 1;
pub(crate) const NORM_EPSILON: f32 = 1e-5;
/// Most tokens of a micro-batch.
pub(crate) const TOKENS: usize = 8;

/// Tensors: the table; norm, gate, up and down of each block; norm and projection of the head.
pub(crate) fn units() -> Vec<UnitSpec> {
    let unit = |name: String, tensors: &[(&str, &[usize])]| {
        let tensor = |&(tensor, shape): &(&str, &[usize])| TensorSpec {
            name: format!("{name}.{tensor}"),
            shape: shape.to_vec(),
            decay: shape.len() > 1,
            frozen: false,
        };
        UnitSpec { tensors: tensors.iter().map(tensor).collect(), name }
    };
    let (wide, deep) = ([HIDDEN, WIDTH], [WIDTH, HIDDEN]);
    let block = [("norm", &[WIDTH][..]), ("gate", &wide[..]), ("up", &wide[..]), ("down", &deep[..])];
    let mut units = vec![unit("embedding".to_owned(), &[("table", &[VOCAB, WIDTH])])];
    units.extend((0..BLOCKS).map(|index| unit(format!("block{index}"), &block)));
    units.push(unit("head".to_owned(), &[("norm", &[WIDTH]), ("projection", &[VOCAB, WIDTH])]));
    units
}

/// The first value of an element: norms near 1, matrices with variance 1/WIDTH, so that activations stay of order 1.
pub(crate) fn initial(name: &str, shape: &[usize]) -> impl Fn(usize) -> f32 + use<> {
    let stream = name.bytes().fold(0u64, |hash, byte| hash.wrapping_mul(257) + u64::from(byte));
    let is_norm = shape.len() == 1;
    move |index| {
        let normal = random::normal(1, stream, index as u64);
        (if is_norm { 1.0 + 0.1 * normal } else { normal / (WIDTH as f64).sqrt() }) as f32
    }
}

/// A sample's token and the token that follows.
pub(crate) fn sample(index: u64) -> (u32, u32) {
    let bits = random::bits(2, 0, index);
    let token = bits % VOCAB as u64;
    (token as u32, ((3 * token + (bits >> 32) % 3) % VOCAB as u64) as u32)
}

/// Activations of one micro-batch, and their gradients.
pub(crate) struct Mlp {
    tokens: Buffer,
    targets: Buffer,
    /// The residual stream before each block, and before the head.
    residual: Vec<Buffer>,
    blocks: Vec<Block>,
    normed: Buffer,
    inverse_rms: Buffer,
    logits: Buffer,
    /// The gradient of the residual stream, and of what a norm gives.
    grad: Buffer,
    grad_normed: Buffer,
    grad_gate: Buffer,
    grad_up: Buffer,
    grad_act: Buffer,
    /// What the backward pass makes again.
    act_again: Buffer,
    loss: Buffer,
    /// Tokens of the present micro-batch.
    rows: usize,
}

struct Block {
    normed: Buffer,
    inverse_rms: Buffer,
    gate: Buffer,
    up: Buffer,
    act: Buffer,
}

impl Mlp {
    pub(crate) fn new(device: &dyn Device) -> Result<Mlp, Error> {
        let f32 = |columns| device.allocate(DType::F32, TOKENS * columns);
        let block = |_| {
            Ok(Block {
                normed: f32(WIDTH)?,
                inverse_rms: f32(1)?,
                gate: f32(HIDDEN)?,
                up: f32(HIDDEN)?,
                act: f32(HIDDEN)?,
            })
        };
        Ok(Mlp {
            tokens: device.allocate(DType::U32, TOKENS)?,
            targets: device.allocate(DType::U32, TOKENS)?,
            residual: (0..=BLOCKS).map(|_| Ok(f32(WIDTH)?)).collect::<Result<_, Error>>()?,
            blocks: (0..BLOCKS).map(block).collect::<Result<_, Error>>()?,
            normed: f32(WIDTH)?,
            inverse_rms: f32(1)?,
            logits: f32(VOCAB)?,
            grad: f32(WIDTH)?,
            grad_normed: f32(WIDTH)?,
            grad_gate: f32(HIDDEN)?,
            grad_up: f32(HIDDEN)?,
            grad_act: f32(HIDDEN)?,
            act_again: f32(HIDDEN)?,
            loss: device.allocate(DType::F64, 1)?,
            rows: 0,
        })
    }

    /// Begins a micro-batch.
    pub(crate) fn load(&mut self, stream: &dyn Stream, samples: Range<u64>) {
        let (tokens, targets): (Vec<u32>, Vec<u32>) = samples.map(sample).unzip();
        self.rows = tokens.len();
        stream.upload(self.tokens.slice_mut(0..self.rows), &tokens);
        stream.upload(self.targets.slice_mut(0..self.rows), &targets);
    }

    pub(crate) fn forward(&mut self, unit: usize, pass: &Forward<'_>) {
        let (stream, rows) = (kernels(pass.stream), self.rows);
        let (wide, deep) = (0..rows * WIDTH, 0..rows * HIDDEN);
        let weight = |index| pass.weights.tensor(index);
        match unit {
            0 => {
                let out = self.residual[0].slice_mut(wide);
                stream.embedding(out, weight(0), self.tokens.slice(0..rows));
            }
            HEAD => {
                let (out, inverse) = (self.normed.slice_mut(wide.clone()), self.inverse_rms.slice_mut(0..rows));
                stream.rms_norm(out, inverse, self.residual[BLOCKS].slice(wide.clone()), weight(0), NORM_EPSILON);
                let logits = self.logits.slice_mut(0..rows * VOCAB);
                stream.linear(logits, self.normed.slice(wide), weight(1), None, rows);
            }
            _ => {
                let block = &mut self.blocks[unit - 1];
                let (before, after) = self.residual.split_at_mut(unit);
                let (x, out) = (&before[unit - 1], &mut after[0]);
                let (normed, inverse) = (block.normed.slice_mut(wide.clone()), block.inverse_rms.slice_mut(0..rows));
                stream.rms_norm(normed, inverse, x.slice(wide.clone()), weight(0), NORM_EPSILON);
                let normed = block.normed.slice(wide.clone());
                stream.linear(block.gate.slice_mut(deep.clone()), normed.clone(), weight(1), None, rows);
                stream.linear(block.up.slice_mut(deep.clone()), normed, weight(2), None, rows);
                let (gate, up) = (block.gate.slice(deep.clone()), block.up.slice(deep.clone()));
                stream.swiglu(block.act.slice_mut(deep.clone()), gate, up);
                let out = out.slice_mut(wide.clone());
                stream.linear(out, block.act.slice(deep), weight(3), Some(x.slice(wide)), rows);
            }
        }
    }

    pub(crate) fn backward(&mut self, unit: usize, pass: &mut Backward<'_>) {
        let (stream, rows) = (kernels(pass.stream), self.rows);
        let (wide, deep) = (0..rows * WIDTH, 0..rows * HIDDEN);
        let weight = |index| pass.weights.tensor(index);
        let gradients = &mut pass.gradients;
        match unit {
            0 => {
                stream.embedding_backward(gradients.tensor(0), self.grad.slice(wide), self.tokens.slice(0..rows));
            }
            HEAD => {
                let logits = 0..rows * VOCAB;
                cross_entropy(stream, &mut self.logits, &self.targets, rows, pass.loss.reborrow());
                let grad_logits = self.logits.slice(logits);
                stream.linear_backward_weight(
                    gradients.tensor(1),
                    grad_logits.clone(),
                    self.normed.slice(wide.clone()),
                    rows,
                );
                let grad_normed = self.grad_normed.slice_mut(wide.clone());
                stream.linear_backward_input(grad_normed, grad_logits, weight(1), rows, false);
                stream.zero(self.grad.slice_mut(wide.clone()));
                stream.rms_norm_backward(
                    self.grad.slice_mut(wide.clone()),
                    gradients.tensor(0),
                    self.grad_normed.slice(wide.clone()),
                    self.residual[BLOCKS].slice(wide),
                    self.inverse_rms.slice(0..rows),
                    weight(0),
                );
            }
            _ => {
                let block = &self.blocks[unit - 1];
                let grad = self.grad.slice(wide.clone());
                stream.linear_backward_weight(gradients.tensor(3), grad.clone(), block.act.slice(deep.clone()), rows);
                stream.linear_backward_input(self.grad_act.slice_mut(deep.clone()), grad, weight(3), rows, false);
                stream.swiglu_backward(
                    self.act_again.slice_mut(deep.clone()),
                    self.grad_gate.slice_mut(deep.clone()),
                    self.grad_up.slice_mut(deep.clone()),
                    self.grad_act.slice(deep.clone()),
                    block.gate.slice(deep.clone()),
                    block.up.slice(deep.clone()),
                );
                let normed = block.normed.slice(wide.clone());
                let inputs = [&self.grad_gate, &self.grad_up];
                for (index, grad) in inputs.into_iter().enumerate() {
                    let grad = grad.slice(deep.clone());
                    stream.linear_backward_weight(gradients.tensor(1 + index), grad.clone(), normed.clone(), rows);
                    let grad_normed = self.grad_normed.slice_mut(wide.clone());
                    stream.linear_backward_input(grad_normed, grad, weight(1 + index), rows, index > 0);
                }
                stream.rms_norm_backward(
                    self.grad.slice_mut(wide.clone()),
                    gradients.tensor(0),
                    self.grad_normed.slice(wide.clone()),
                    self.residual[unit - 1].slice(wide),
                    block.inverse_rms.slice(0..rows),
                    weight(0),
                );
            }
        }
    }

    /// The sum of the losses, after forward passes alone.
    pub(crate) fn loss(&mut self, stream: &dyn Stream) -> f64 {
        stream.zero(self.loss.view_mut());
        cross_entropy(stream, &mut self.logits, &self.targets, self.rows, self.loss.view_mut());
        stream.download::<f64>(self.loss.view()).unwrap()[0]
    }
}

fn kernels(stream: &dyn Stream) -> &dyn Kernels {
    stream.kernels().expect("devices of the host have kernels")
}

fn cross_entropy(stream: &dyn Stream, logits: &mut Buffer, targets: &Buffer, rows: usize, loss: ViewMut<'_>) {
    kernels(stream).cross_entropy(logits.slice_mut(0..rows * VOCAB), None, targets.slice(0..rows), loss, 0.0);
}
