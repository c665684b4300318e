//! Every kernel of [`Kernels`] and [`Stream`](pillion_kernels::Stream), with operands of random
//! numbers, ready to be called: `cargo bench` measures all of them, `kernelbench` lets some take
//! turns with PyTorch's.
//!
//! What moves memory works on [`ELEMENTS`], so that no operand stays in a cache. Products are those of the Llama of 30 M parameters.

use half::bf16;
use pillion_kernels::DType::{Bf16, F32, F64};
use pillion_kernels::{AdamW, AttentionShape, Buffer, Cpu, DType, Device, Kernels, random};

use crate::Error;
use crate::traffic::Traffic;

/// Inputs and outputs of the layers whose products are measured.
pub const LAYERS: [(usize, usize); 4] = [(512, 512), (512, 1408), (1408, 512), (512, 4096)];
/// Tokens that go through a layer at a time.
pub const ROWS: [usize; 2] = [1024, 4096];
/// Elements of a tensor for everything but products: 64 MiB in f32.
pub const ELEMENTS: usize = 16 << 20;

const WIDTH: usize = 512;
const HEADS: usize = 8;
const HEAD_DIM: usize = 64;

/// A kernel with its operands.
pub type Call = Box<dyn FnMut(&dyn Kernels)>;

/// A kernel and its sizes.
pub struct Case {
    /// The method of [`Kernels`].
    pub kernel: &'static str,
    /// Types and sizes.
    pub variant: String,
    /// What a call must do at least.
    pub work: Work,
    operands: Box<dyn Fn() -> Result<Call, Error>>,
}

/// What bounds a kernel.
#[derive(Clone, Copy, Debug)]
pub enum Work {
    /// Multiply-adds.
    Products {
        /// Floating-point operations, two in each multiply-add.
        operations: f64,
        /// Type of the factors.
        dtype: DType,
    },
    /// Memory.
    Memory(Traffic),
}

impl Case {
    /// Its kernel and variant, as criterion writes them.
    pub fn name(&self) -> String {
        format!("{}/{}", self.kernel, self.variant)
    }

    /// Makes the operands.
    ///
    /// # Errors
    /// Those of the allocation.
    pub fn operands(&self) -> Result<Call, Error> {
        (self.operands)()
    }
}

/// All cases, kernel by kernel.
pub fn all() -> Vec<Case> {
    let mut cases: Vec<Case> = Product::ALL.into_iter().flat_map(products).collect();
    cases.extend([F32, Bf16].into_iter().flat_map(|dtype| [256, 1024, 4096].map(|seq| attention(dtype, seq))));
    cases.extend([F32, Bf16].into_iter().flat_map(|dtype| [256, 1024, 4096].map(|seq| attention_backward(dtype, seq))));
    cases.extend([rms_norm(F32), rms_norm(Bf16), rms_norm_backward(F32), rms_norm_backward(Bf16)]);
    cases.extend([swiglu(F32), swiglu(Bf16), swiglu_backward(F32), swiglu_backward(Bf16), rope(F32), rope(Bf16)]);
    cases.extend([cross_entropy(false), cross_entropy(true), adamw(ELEMENTS, false), adamw(ELEMENTS, true)]);
    cases.extend([square_norm(), cast(F32, Bf16), cast(Bf16, F32), zero(), embedding(), embedding_backward()]);
    cases
}

/// The products of a linear layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Product {
    /// y = x · wᵀ
    Forward,
    /// grad_x = grad_y · w
    Input,
    /// grad_w += grad_yᵀ · x
    Weight,
}

impl Product {
    /// Each of them.
    pub const ALL: [Product; 3] = [Product::Forward, Product::Input, Product::Weight];
}

/// A product in both types, on all layers.
pub fn products(product: Product) -> impl Iterator<Item = Case> {
    let sizes = || ROWS.into_iter().flat_map(|rows| LAYERS.map(|(inputs, outputs)| (rows, inputs, outputs)));
    [F32, Bf16].into_iter().flat_map(move |dtype| sizes().map(move |sizes| linear(product, dtype, sizes)))
}

fn linear(product: Product, dtype: DType, (rows, inputs, outputs): (usize, usize, usize)) -> Case {
    let kernel = match product {
        Product::Forward => "linear",
        Product::Input => "linear_backward_input",
        Product::Weight => "linear_backward_weight",
    };
    let work = Work::Products { operations: (2 * rows * inputs * outputs) as f64, dtype };
    case(kernel, format!("{dtype} {rows}x{inputs}x{outputs}"), work, move || {
        let [x, y, w] = [rows * inputs, rows * outputs, inputs * outputs];
        Ok(match product {
            Product::Forward => {
                let (x, w, mut y) = (numbers(1, dtype, x)?, numbers(2, dtype, w)?, numbers(3, dtype, y)?);
                Box::new(move |stream| stream.linear(y.view_mut(), x.view(), w.view(), None, rows))
            }
            Product::Input => {
                let (grad_y, w, mut grad_x) = (numbers(1, dtype, y)?, numbers(2, dtype, w)?, numbers(3, dtype, x)?);
                Box::new(move |stream| {
                    stream.linear_backward_input(grad_x.view_mut(), grad_y.view(), w.view(), rows, false);
                })
            }
            Product::Weight => {
                let (grad_y, x, mut grad_w) = (numbers(1, dtype, y)?, numbers(2, dtype, x)?, numbers(3, F32, w)?);
                Box::new(move |stream| stream.linear_backward_weight(grad_w.view_mut(), grad_y.view(), x.view(), rows))
            }
        })
    })
}

/// AdamW on `len` parameters, with or without a copy in bf16.
pub fn adamw(len: usize, copied: bool) -> Case {
    let settings = AdamW { lr: 1e-4, beta1: 0.9, beta2: 0.95, epsilon: 1e-8, weight_decay: 0.1 };
    let work = Traffic { read: 4, updated: 12, written: if copied { 2 } else { 0 }, elements: len };
    let copy = if copied { ", bf16 copy" } else { "" };
    case("adamw", format!("{} M{copy}", len >> 20), Work::Memory(work), move || {
        let (mut master, mut m, grad) = (numbers(1, F32, len)?, numbers(2, F32, len)?, numbers(3, F32, len)?);
        // Squares are not negative.
        let mut v = upload(&(0..len as u64).map(|index| random::uniform(4, 0, index) as f32).collect::<Vec<f32>>())?;
        let mut weights = if copied { Some(numbers(5, Bf16, len)?) } else { None };
        let scale = upload(&[1.0f32])?;
        Ok(Box::new(move |stream| {
            let weights = weights.as_mut().map(Buffer::view_mut);
            let [master, m, v] = [&mut master, &mut m, &mut v].map(Buffer::view_mut);
            stream.adamw(weights, master, m, v, grad.view(), scale.view(), settings, 10);
        }))
    })
}

fn attention_shape(seq: usize) -> AttentionShape {
    AttentionShape { batch: 1, seq, heads: HEADS, kv_heads: HEADS, head_dim: HEAD_DIM }
}

/// So many products with half of all scores.
fn attention_work(products: usize, dtype: DType, seq: usize) -> Work {
    Work::Products { operations: (products * 2 * seq * seq * WIDTH / 2) as f64, dtype }
}

fn attention(dtype: DType, seq: usize) -> Case {
    case("attention", format!("{dtype} {seq} tokens"), attention_work(2, dtype, seq), move || {
        let tensor = |stream| numbers(stream, dtype, seq * WIDTH);
        let (q, k, v, mut out) = (tensor(1)?, tensor(2)?, tensor(3)?, tensor(4)?);
        let mut log_sum = numbers(5, F32, HEADS * seq)?;
        Ok(Box::new(move |stream| {
            let shape = attention_shape(seq);
            stream.attention(out.view_mut(), log_sum.view_mut(), q.view(), k.view(), v.view(), shape);
        }))
    })
}

fn attention_backward(dtype: DType, seq: usize) -> Case {
    // The scores again, and the gradients of scores, q, k and v.
    case("attention_backward", format!("{dtype} {seq} tokens"), attention_work(5, dtype, seq), move || {
        let tensor = |stream| numbers(stream, dtype, seq * WIDTH);
        let (q, k, v, grad_out, mut out) = (tensor(1)?, tensor(2)?, tensor(3)?, tensor(4)?, tensor(5)?);
        let (mut grad_q, mut grad_k, mut grad_v) = (tensor(6)?, tensor(7)?, tensor(8)?);
        let mut log_sum = numbers(9, F32, HEADS * seq)?;
        let shape = attention_shape(seq);
        // The backward pass relies on what the forward pass leaves.
        Cpu.stream().kernels().expect("Cpu has kernels").attention(
            out.view_mut(),
            log_sum.view_mut(),
            q.view(),
            k.view(),
            v.view(),
            shape,
        );
        Ok(Box::new(move |stream| {
            let grads = [grad_q.view_mut(), grad_k.view_mut(), grad_v.view_mut()];
            let [grad_q, grad_k, grad_v] = grads;
            let (grad_out, q, k, v) = (grad_out.view(), q.view(), k.view(), v.view());
            stream.attention_backward(grad_q, grad_k, grad_v, grad_out, q, k, v, out.view(), log_sum.view(), shape);
        }))
    })
}

fn rms_norm(dtype: DType) -> Case {
    let traffic = Traffic { read: 4, written: dtype.bytes(), ..Traffic::NOTHING };
    memory("rms_norm", dtype.name(), traffic, move || {
        let (x, weight, mut out) =
            (numbers(1, F32, ELEMENTS)?, numbers(2, dtype, WIDTH)?, numbers(3, dtype, ELEMENTS)?);
        let mut inverse_rms = numbers(4, F32, ELEMENTS / WIDTH)?;
        Ok(Box::new(move |stream| {
            stream.rms_norm(out.view_mut(), inverse_rms.view_mut(), x.view(), weight.view(), 1e-5);
        }))
    })
}

fn rms_norm_backward(weights: DType) -> Case {
    let variant = format!("{weights} weights");
    memory("rms_norm_backward", &variant, Traffic { read: 8, updated: 4, ..Traffic::NOTHING }, move || {
        let (x, grad_out) = (numbers(1, F32, ELEMENTS)?, numbers(2, F32, ELEMENTS)?);
        let (weight, inverse_rms) = (numbers(3, weights, WIDTH)?, numbers(4, F32, ELEMENTS / WIDTH)?);
        let (mut grad_x, mut grad_weight) = (numbers(5, F32, ELEMENTS)?, numbers(6, F32, WIDTH)?);
        Ok(Box::new(move |stream| {
            let (grad_x, grad_weight) = (grad_x.view_mut(), grad_weight.view_mut());
            stream.rms_norm_backward(grad_x, grad_weight, grad_out.view(), x.view(), inverse_rms.view(), weight.view());
        }))
    })
}

fn swiglu(dtype: DType) -> Case {
    let traffic = Traffic { read: 2 * dtype.bytes(), written: dtype.bytes(), ..Traffic::NOTHING };
    memory("swiglu", dtype.name(), traffic, move || {
        let tensor = |stream| numbers(stream, dtype, ELEMENTS);
        let (gate, up, mut out) = (tensor(1)?, tensor(2)?, tensor(3)?);
        Ok(Box::new(move |stream| stream.swiglu(out.view_mut(), gate.view(), up.view())))
    })
}

fn swiglu_backward(dtype: DType) -> Case {
    let traffic = Traffic { read: 3 * dtype.bytes(), written: 3 * dtype.bytes(), ..Traffic::NOTHING };
    memory("swiglu_backward", dtype.name(), traffic, move || {
        let tensor = |stream| numbers(stream, dtype, ELEMENTS);
        let (gate, up, grad_out) = (tensor(1)?, tensor(2)?, tensor(3)?);
        let (mut out, mut grad_gate, mut grad_up) = (tensor(4)?, tensor(5)?, tensor(6)?);
        Ok(Box::new(move |stream| {
            let (out, grad_gate, grad_up) = (out.view_mut(), grad_gate.view_mut(), grad_up.view_mut());
            stream.swiglu_backward(out, grad_gate, grad_up, grad_out.view(), gate.view(), up.view());
        }))
    })
}

fn rope(dtype: DType) -> Case {
    const SEQ: usize = 1024;
    memory("rope", dtype.name(), Traffic { updated: dtype.bytes(), ..Traffic::NOTHING }, move || {
        let mut x = numbers(1, dtype, ELEMENTS)?;
        let angles: Vec<f32> = (0..(SEQ * HEAD_DIM / 2) as u64).map(|at| random::uniform(2, 0, at) as f32).collect();
        let cos = upload(&angles.iter().map(|angle| angle.cos()).collect::<Vec<f32>>())?;
        let sin = upload(&angles.iter().map(|angle| angle.sin()).collect::<Vec<f32>>())?;
        Ok(Box::new(move |stream| stream.rope(x.view_mut(), cos.view(), sin.view(), HEADS, HEAD_DIM, false)))
    })
}

fn cross_entropy(rounded: bool) -> Case {
    const VOCABULARY: usize = 4096;
    let (variant, traffic) = match rounded {
        true => ("rounded to bf16", Traffic { read: 4, written: 2, ..Traffic::NOTHING }),
        false => ("f32", Traffic { updated: 4, ..Traffic::NOTHING }),
    };
    memory("cross_entropy", variant, traffic, move || {
        let mut logits = numbers(1, F32, ELEMENTS)?;
        let targets =
            (0..(ELEMENTS / VOCABULARY) as u64).map(|row| (random::bits(2, 0, row) % VOCABULARY as u64) as u32);
        let (targets, mut loss) = (upload(&targets.collect::<Vec<u32>>())?, Cpu.allocate(F64, 1)?);
        let mut narrow = if rounded { Some(numbers(3, Bf16, ELEMENTS)?) } else { None };
        Ok(Box::new(move |stream| {
            let narrow = narrow.as_mut().map(Buffer::view_mut);
            stream.cross_entropy(logits.view_mut(), narrow, targets.view(), loss.view_mut());
        }))
    })
}

fn square_norm() -> Case {
    memory("square_norm", "f32", Traffic { read: 4, ..Traffic::NOTHING }, || {
        let (x, mut out) = (numbers(1, F32, ELEMENTS)?, Cpu.allocate(F64, 2)?);
        Ok(Box::new(move |stream| stream.square_norm(out.view_mut(), x.view(), 1.0)))
    })
}

fn cast(from: DType, to: DType) -> Case {
    let traffic = Traffic { read: from.bytes(), written: to.bytes(), ..Traffic::NOTHING };
    memory("cast", &format!("{from} to {to}"), traffic, move || {
        let (x, mut out) = (numbers(1, from, ELEMENTS)?, numbers(2, to, ELEMENTS)?);
        Ok(Box::new(move |stream| stream.cast(out.view_mut(), x.view())))
    })
}

fn zero() -> Case {
    memory("zero", "f32", Traffic { written: 4, ..Traffic::NOTHING }, || {
        let mut out = numbers(1, F32, ELEMENTS)?;
        Ok(Box::new(move |stream| stream.zero(out.view_mut())))
    })
}

/// Each row of a table once, in random order: more than a vocabulary has, so that it does not stay in a cache.
fn shuffled_rows() -> Result<Buffer, Error> {
    let mut rows: Vec<u32> = (0..(ELEMENTS / WIDTH) as u32).collect();
    rows.sort_by_key(|&row| random::bits(7, 0, row.into()));
    upload(&rows)
}

fn embedding() -> Case {
    memory("embedding", "f32", Traffic { read: 4, written: 4, ..Traffic::NOTHING }, || {
        let (table, mut out) = (numbers(1, F32, ELEMENTS)?, numbers(2, F32, ELEMENTS)?);
        let tokens = shuffled_rows()?;
        Ok(Box::new(move |stream| stream.embedding(out.view_mut(), table.view(), tokens.view())))
    })
}

fn embedding_backward() -> Case {
    memory("embedding_backward", "f32", Traffic { read: 4, updated: 4, ..Traffic::NOTHING }, || {
        let (grad_out, mut grad_table) = (numbers(1, F32, ELEMENTS)?, numbers(2, F32, ELEMENTS)?);
        let tokens = shuffled_rows()?;
        Ok(Box::new(move |stream| stream.embedding_backward(grad_table.view_mut(), grad_out.view(), tokens.view())))
    })
}

fn case(
    kernel: &'static str,
    variant: String,
    work: Work,
    operands: impl Fn() -> Result<Call, Error> + 'static,
) -> Case {
    Case { kernel, variant, work, operands: Box::new(operands) }
}

fn memory(
    kernel: &'static str,
    variant: &str,
    traffic: Traffic,
    operands: impl Fn() -> Result<Call, Error> + 'static,
) -> Case {
    case(kernel, variant.to_string(), Work::Memory(Traffic { elements: ELEMENTS, ..traffic }), operands)
}

/// Numbers in [−1, 1), others for every `stream`: zeros would be multiplied faster.
fn numbers(stream: u64, dtype: DType, len: usize) -> Result<Buffer, Error> {
    let values = (0..len as u64).map(|index| 2.0 * random::uniform(1, stream, index) as f32 - 1.0);
    match dtype {
        Bf16 => upload(&values.map(bf16::from_f32).collect::<Vec<bf16>>()),
        _ => upload(&values.collect::<Vec<f32>>()),
    }
}

fn upload<T: pillion_kernels::Element>(values: &[T]) -> Result<Buffer, Error> {
    let mut buffer = Cpu.allocate(T::DTYPE, values.len())?;
    Cpu.stream().upload(buffer.view_mut(), values);
    Ok(buffer)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn every_kernel_has_its_cases_under_names_of_their_own() {
        let cases = all();
        let names: HashSet<String> = cases.iter().map(Case::name).collect();
        assert_eq!(names.len(), cases.len());
        // The methods of `Kernels` and `Stream` but those of events and transfers.
        let kernels: HashSet<&str> = cases.iter().map(|case| case.kernel).collect();
        assert_eq!(kernels.len(), 17);
    }

    #[test]
    fn a_product_runs_on_its_operands() {
        for product in Product::ALL {
            for dtype in [F32, Bf16] {
                linear(product, dtype, (3, 16, 8)).operands().unwrap()(Cpu.stream().kernels().unwrap());
            }
        }
        adamw(100, true).operands().unwrap()(Cpu.stream().kernels().unwrap());
        attention_backward(Bf16, 4).operands().unwrap()(Cpu.stream().kernels().unwrap());
    }
}
