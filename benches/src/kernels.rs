//! Every kernel of [`Kernels`] and [`Stream`](pillion_kernels::Stream), with operands of random
//! numbers, ready to be called: `cargo bench` measures all of them beside what bounds them,
//! `kernelbench` on any device, or some in turn with PyTorch's.
//!
//! What moves memory works on so many elements that no operand stays in a cache. Products are those
//! of a Llama's layers.

mod operands;

use pillion_kernels::DType::{Bf16, F32, F64};
use pillion_kernels::{AdamW, Buffer, DType, Kernels, random};

use crate::Error;
use crate::traffic::Traffic;
pub use operands::{Place, Sizes};

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
    operands: Box<Operands>,
}

type Operands = dyn Fn(&Place<'_>) -> Result<Call, Error>;

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
    pub fn operands(&self, place: &Place<'_>) -> Result<Call, Error> {
        (self.operands)(place)
    }
}

/// All cases, kernel by kernel.
pub fn all(sizes: Sizes) -> Vec<Case> {
    let of = Of { sizes };
    let types = || [F32, Bf16].into_iter();
    let lengths = |dtype| sizes.tokens.iter().map(move |&seq| (dtype, seq));
    let mut cases: Vec<Case> = products(sizes).collect();
    cases.extend(types().flat_map(lengths).map(|(dtype, seq)| of.attention(dtype, seq)));
    cases.extend(types().flat_map(lengths).map(|(dtype, seq)| of.attention_backward(dtype, seq)));
    cases.extend(types().map(|dtype| of.rms_norm(dtype)));
    cases.extend(types().map(|dtype| of.rms_norm_backward(dtype)));
    cases.extend(types().map(|dtype| of.swiglu(dtype)));
    cases.extend(types().map(|dtype| of.swiglu_backward(dtype)));
    cases.extend(types().map(|dtype| of.rope(dtype)));
    cases.extend([of.cross_entropy(false), of.cross_entropy(true)]);
    cases.extend([adamw(sizes.elements, false), adamw(sizes.elements, true)]);
    cases.extend([of.square_norm(), of.cast(F32, Bf16), of.cast(Bf16, F32), of.copy(), of.accumulate(), of.zero()]);
    cases.extend([of.embedding(), of.embedding_backward()]);
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

/// The products of all layers, in both types.
pub fn products(sizes: Sizes) -> impl Iterator<Item = Case> {
    let layers = move || sizes.rows.iter().flat_map(move |&rows| sizes.layers.iter().map(move |&layer| (rows, layer)));
    let of_type = move |product, dtype| layers().map(move |(rows, layer)| linear(product, dtype, rows, layer));
    Product::ALL
        .into_iter()
        .flat_map(move |product| [F32, Bf16].into_iter().flat_map(move |dtype| of_type(product, dtype)))
}

fn linear(product: Product, dtype: DType, rows: usize, (inputs, outputs): (usize, usize)) -> Case {
    let kernel = match product {
        Product::Forward => "linear",
        Product::Input => "linear_backward_input",
        Product::Weight => "linear_backward_weight",
    };
    let work = Work::Products { operations: (2 * rows * inputs * outputs) as f64, dtype };
    case(kernel, format!("{dtype} {rows}x{inputs}x{outputs}"), work, move |place| {
        let [x, y, w] = [rows * inputs, rows * outputs, inputs * outputs];
        Ok(match product {
            Product::Forward => {
                let (x, w, mut y) =
                    (place.numbers(1, dtype, x)?, place.numbers(2, dtype, w)?, place.numbers(3, dtype, y)?);
                Box::new(move |stream| stream.linear(y.view_mut(), x.view(), w.view(), None, rows))
            }
            Product::Input => {
                let (grad_y, w, mut grad_x) =
                    (place.numbers(1, dtype, y)?, place.numbers(2, dtype, w)?, place.numbers(3, dtype, x)?);
                Box::new(move |stream| {
                    stream.linear_backward_input(grad_x.view_mut(), grad_y.view(), w.view(), rows, false);
                })
            }
            Product::Weight => {
                let (grad_y, x, mut grad_w) =
                    (place.numbers(1, dtype, y)?, place.numbers(2, dtype, x)?, place.numbers(3, F32, w)?);
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
    case("adamw", format!("{} M{copy}", len >> 20), Work::Memory(work), move |place| {
        let (mut master, mut m, grad) =
            (place.numbers(1, F32, len)?, place.numbers(2, F32, len)?, place.numbers(3, F32, len)?);
        // Squares are not negative.
        let mut v =
            place.upload(&(0..len as u64).map(|index| random::uniform(4, 0, index) as f32).collect::<Vec<f32>>())?;
        let mut weights = if copied { Some(place.numbers(5, Bf16, len)?) } else { None };
        let scale = place.upload(&[1.0f32])?;
        Ok(Box::new(move |stream| {
            let weights = weights.as_mut().map(Buffer::view_mut);
            let [master, m, v] = [&mut master, &mut m, &mut v].map(Buffer::view_mut);
            stream.adamw(weights, master, m, v, grad.view(), scale.view(), settings, 10);
        }))
    })
}

/// What a device without kernels would lack.
const KERNELS: &str = "the device has kernels";

/// Cases of some sizes.
struct Of {
    sizes: Sizes,
}

impl Of {
    /// So many products with half of all scores.
    fn attention_work(&self, products: usize, dtype: DType, seq: usize) -> Work {
        Work::Products { operations: (products * 2 * seq * seq * self.sizes.width() / 2) as f64, dtype }
    }

    fn attention(&self, dtype: DType, seq: usize) -> Case {
        let (shape, width) = (self.sizes.attention_of(seq), self.sizes.width());
        case("attention", format!("{dtype} {seq} tokens"), self.attention_work(2, dtype, seq), move |place| {
            let tensor = |stream| place.numbers(stream, dtype, seq * width);
            let (q, k, v, mut out) = (tensor(1)?, tensor(2)?, tensor(3)?, tensor(4)?);
            let mut log_sum = place.numbers(5, F32, shape.heads * seq)?;
            Ok(Box::new(move |stream| {
                stream.attention(out.view_mut(), log_sum.view_mut(), q.view(), k.view(), v.view(), shape, None);
            }))
        })
    }

    fn attention_backward(&self, dtype: DType, seq: usize) -> Case {
        let (shape, width) = (self.sizes.attention_of(seq), self.sizes.width());
        // The scores again, and the gradients of scores, q, k and v.
        case("attention_backward", format!("{dtype} {seq} tokens"), self.attention_work(5, dtype, seq), move |place| {
            let tensor = |stream| place.numbers(stream, dtype, seq * width);
            let (q, k, v, grad_out, mut out) = (tensor(1)?, tensor(2)?, tensor(3)?, tensor(4)?, tensor(5)?);
            let (mut grad_q, mut grad_k, mut grad_v) = (tensor(6)?, tensor(7)?, tensor(8)?);
            let mut log_sum = place.numbers(9, F32, shape.heads * seq)?;
            // The backward pass relies on what the forward pass leaves.
            place.stream.kernels().expect(KERNELS).attention(
                out.view_mut(),
                log_sum.view_mut(),
                q.view(),
                k.view(),
                v.view(),
                shape,
                None,
            );
            place.ready()?;
            Ok(Box::new(move |stream| {
                let grads = [grad_q.view_mut(), grad_k.view_mut(), grad_v.view_mut()];
                let [grad_q, grad_k, grad_v] = grads;
                let (grad_out, q, k, v) = (grad_out.view(), q.view(), k.view(), v.view());
                stream.attention_backward(
                    grad_q,
                    grad_k,
                    grad_v,
                    grad_out,
                    q,
                    k,
                    v,
                    out.view(),
                    log_sum.view(),
                    shape,
                    None,
                );
            }))
        })
    }

    fn rms_norm(&self, dtype: DType) -> Case {
        let (elements, width) = (self.sizes.elements, self.sizes.width());
        let traffic = Traffic { read: 4, written: dtype.bytes(), ..Traffic::NOTHING };
        self.memory("rms_norm", dtype.name(), traffic, move |place| {
            let (x, weight, mut out) =
                (place.numbers(1, F32, elements)?, place.numbers(2, dtype, width)?, place.numbers(3, dtype, elements)?);
            let mut inverse_rms = place.numbers(4, F32, elements / width)?;
            Ok(Box::new(move |stream| {
                stream.rms_norm(out.view_mut(), inverse_rms.view_mut(), x.view(), weight.view(), 1e-5);
            }))
        })
    }

    fn rms_norm_backward(&self, weights: DType) -> Case {
        let (elements, width) = (self.sizes.elements, self.sizes.width());
        let variant = format!("{weights} weights");
        self.memory("rms_norm_backward", &variant, Traffic { read: 8, updated: 4, ..Traffic::NOTHING }, move |place| {
            let (x, grad_out) = (place.numbers(1, F32, elements)?, place.numbers(2, F32, elements)?);
            let (weight, inverse_rms) = (place.numbers(3, weights, width)?, place.numbers(4, F32, elements / width)?);
            let (mut grad_x, mut grad_weight) = (place.numbers(5, F32, elements)?, place.numbers(6, F32, width)?);
            Ok(Box::new(move |stream| {
                let (grad_x, grad_weight) = (grad_x.view_mut(), grad_weight.view_mut());
                stream.rms_norm_backward(
                    grad_x,
                    grad_weight,
                    grad_out.view(),
                    x.view(),
                    inverse_rms.view(),
                    weight.view(),
                );
            }))
        })
    }

    fn swiglu(&self, dtype: DType) -> Case {
        let elements = self.sizes.elements;
        let traffic = Traffic { read: 2 * dtype.bytes(), written: dtype.bytes(), ..Traffic::NOTHING };
        self.memory("swiglu", dtype.name(), traffic, move |place| {
            let tensor = |stream| place.numbers(stream, dtype, elements);
            let (gate, up, mut out) = (tensor(1)?, tensor(2)?, tensor(3)?);
            Ok(Box::new(move |stream| stream.swiglu(out.view_mut(), gate.view(), up.view())))
        })
    }

    fn swiglu_backward(&self, dtype: DType) -> Case {
        let elements = self.sizes.elements;
        let traffic = Traffic { read: 3 * dtype.bytes(), written: 3 * dtype.bytes(), ..Traffic::NOTHING };
        self.memory("swiglu_backward", dtype.name(), traffic, move |place| {
            let tensor = |stream| place.numbers(stream, dtype, elements);
            let (gate, up, grad_out) = (tensor(1)?, tensor(2)?, tensor(3)?);
            let (mut out, mut grad_gate, mut grad_up) = (tensor(4)?, tensor(5)?, tensor(6)?);
            Ok(Box::new(move |stream| {
                let (out, grad_gate, grad_up) = (out.view_mut(), grad_gate.view_mut(), grad_up.view_mut());
                stream.swiglu_backward(out, grad_gate, grad_up, grad_out.view(), gate.view(), up.view());
            }))
        })
    }

    fn rope(&self, dtype: DType) -> Case {
        let elements = self.sizes.elements;
        let (heads, head_dim) = self.sizes.heads;
        const SEQ: usize = 1024;
        self.memory("rope", dtype.name(), Traffic { updated: dtype.bytes(), ..Traffic::NOTHING }, move |place| {
            let mut x = place.numbers(1, dtype, elements)?;
            let angles: Vec<f32> =
                (0..(SEQ * head_dim / 2) as u64).map(|at| random::uniform(2, 0, at) as f32).collect();
            let cos = place.upload(&angles.iter().map(|angle| angle.cos()).collect::<Vec<f32>>())?;
            let sin = place.upload(&angles.iter().map(|angle| angle.sin()).collect::<Vec<f32>>())?;
            Ok(Box::new(move |stream| stream.rope(x.view_mut(), cos.view(), sin.view(), heads, head_dim, false)))
        })
    }

    fn cross_entropy(&self, rounded: bool) -> Case {
        let elements = self.sizes.elements;
        let vocabulary = self.sizes.vocabulary;
        let (variant, traffic) = match rounded {
            true => ("rounded to bf16", Traffic { read: 4, written: 2, ..Traffic::NOTHING }),
            false => ("f32", Traffic { updated: 4, ..Traffic::NOTHING }),
        };
        self.memory("cross_entropy", variant, traffic, move |place| {
            let mut logits = place.numbers(1, F32, elements)?;
            let targets =
                (0..(elements / vocabulary) as u64).map(|row| (random::bits(2, 0, row) % vocabulary as u64) as u32);
            let (targets, mut loss) = (place.upload(&targets.collect::<Vec<u32>>())?, place.allocate(F64, 1)?);
            let mut narrow = if rounded { Some(place.numbers(3, Bf16, elements)?) } else { None };
            Ok(Box::new(move |stream| {
                let narrow = narrow.as_mut().map(Buffer::view_mut);
                stream.cross_entropy(logits.view_mut(), narrow, targets.view(), loss.view_mut(), 0.0);
            }))
        })
    }

    fn square_norm(&self) -> Case {
        let elements = self.sizes.elements;
        self.memory("square_norm", "f32", Traffic { read: 4, ..Traffic::NOTHING }, move |place| {
            let (x, mut out) = (place.numbers(1, F32, elements)?, place.allocate(F64, 2)?);
            Ok(Box::new(move |stream| stream.square_norm(out.view_mut(), x.view(), 1.0)))
        })
    }

    fn cast(&self, from: DType, to: DType) -> Case {
        let elements = self.sizes.elements;
        let traffic = Traffic { read: from.bytes(), written: to.bytes(), ..Traffic::NOTHING };
        self.memory("cast", &format!("{from} to {to}"), traffic, move |place| {
            let (x, mut out) = (place.numbers(1, from, elements)?, place.numbers(2, to, elements)?);
            Ok(Box::new(move |stream| stream.cast(out.view_mut(), x.view())))
        })
    }

    fn zero(&self) -> Case {
        let elements = self.sizes.elements;
        self.memory("zero", "f32", Traffic { written: 4, ..Traffic::NOTHING }, move |place| {
            let mut out = place.numbers(1, F32, elements)?;
            Ok(Box::new(move |stream| stream.zero(out.view_mut())))
        })
    }

    /// Each row of a table once, in random order: more than a vocabulary has, so that it does not
    /// stay in a cache.
    fn shuffled_rows(&self) -> Vec<u32> {
        let mut rows: Vec<u32> = (0..(self.sizes.elements / self.sizes.width()) as u32).collect();
        rows.sort_by_key(|&row| random::bits(7, 0, row.into()));
        rows
    }

    fn embedding(&self) -> Case {
        let (elements, rows) = (self.sizes.elements, self.shuffled_rows());
        self.memory("embedding", "f32", Traffic { read: 4, written: 4, ..Traffic::NOTHING }, move |place| {
            let (table, mut out) = (place.numbers(1, F32, elements)?, place.numbers(2, F32, elements)?);
            let tokens = place.upload(&rows)?;
            Ok(Box::new(move |stream| stream.embedding(out.view_mut(), table.view(), tokens.view())))
        })
    }

    fn embedding_backward(&self) -> Case {
        let (elements, rows) = (self.sizes.elements, self.shuffled_rows());
        self.memory("embedding_backward", "f32", Traffic { read: 4, updated: 4, ..Traffic::NOTHING }, move |place| {
            let (grad_out, mut grad_table) = (place.numbers(1, F32, elements)?, place.numbers(2, F32, elements)?);
            let tokens = place.upload(&rows)?;
            Ok(Box::new(move |stream| stream.embedding_backward(grad_table.view_mut(), grad_out.view(), tokens.view())))
        })
    }

    fn copy(&self) -> Case {
        let elements = self.sizes.elements;
        self.memory("copy", "f32", Traffic { read: 4, written: 4, ..Traffic::NOTHING }, move |place| {
            let (x, mut out) = (place.numbers(1, F32, elements)?, place.numbers(2, F32, elements)?);
            Ok(Box::new(move |stream| stream.copy(out.view_mut(), x.view())))
        })
    }

    fn accumulate(&self) -> Case {
        let elements = self.sizes.elements;
        self.memory("accumulate", "f32", Traffic { read: 4, updated: 4, ..Traffic::NOTHING }, move |place| {
            let (x, mut out) = (place.numbers(1, F32, elements)?, place.numbers(2, F32, elements)?);
            Ok(Box::new(move |stream| stream.accumulate(out.view_mut(), x.view())))
        })
    }

    fn memory(
        &self,
        kernel: &'static str,
        variant: &str,
        traffic: Traffic,
        operands: impl Fn(&Place<'_>) -> Result<Call, Error> + 'static,
    ) -> Case {
        let traffic = Traffic { elements: self.sizes.elements, ..traffic };
        case(kernel, variant.to_string(), Work::Memory(traffic), operands)
    }
}

fn case(
    kernel: &'static str,
    variant: String,
    work: Work,
    operands: impl Fn(&Place<'_>) -> Result<Call, Error> + 'static,
) -> Case {
    Case { kernel, variant, work, operands: Box::new(operands) }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use pillion_kernels::{Cpu, Device};

    use super::*;

    #[test]
    fn every_kernel_has_its_cases_under_names_of_their_own() {
        let cases = all(Sizes::CORE);
        let names: HashSet<String> = cases.iter().map(Case::name).collect();
        assert_eq!(names.len(), cases.len());
        // The methods of `Kernels` and `Stream` but those of events and transfers.
        let kernels: HashSet<&str> = cases.iter().map(|case| case.kernel).collect();
        assert_eq!(kernels.len(), 19);
    }

    #[test]
    fn every_case_runs_on_its_operands() {
        let stream = Cpu.stream();
        for case in all(Sizes::SMALL) {
            case.operands(&Place::new(&Cpu)).unwrap()(stream.kernels().unwrap());
        }
    }
}
