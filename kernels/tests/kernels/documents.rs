//! Attention in which a token sees its own document alone: each document is compared with an
//! attention over it by itself.

use std::ops::Range;

use pillion_kernels::{AttentionShape, Buffer, DType, Documents};
use proptest::prelude::*;

use crate::attention::{backward, forward, forward_and_backward, inputs, queries, shape};
use crate::bounded::{Bounded, exact};
use crate::common::{Stage, TYPES, Values, assert_within, normals_as, run};

/// Tensors of a micro-batch.
struct Tensors {
    grad_out: Vec<f32>,
    qkv: [Vec<f32>; 3],
}

/// [out, log_sum, grad_q, grad_k, grad_v]
const NAMES: [&str; 5] = ["out", "log_sum", "grad_q", "grad_k", "grad_v"];

impl Tensors {
    fn new(dtype: DType, shape: AttentionShape) -> Tensors {
        Tensors { grad_out: normals_as(dtype, queries(shape), 4), qkv: inputs(dtype, shape) }
    }

    /// Those of some tokens.
    fn of(&self, tokens: &Range<usize>, shape: AttentionShape) -> Tensors {
        let [q, k, v] = &self.qkv;
        let [of_queries, of_keys] = [shape.heads, shape.kv_heads].map(|heads| elements(tokens, heads * shape.head_dim));
        let qkv = [(q, &of_queries), (k, &of_keys), (v, &of_keys)].map(|(x, range)| x[range.clone()].to_vec());
        Tensors { grad_out: self.grad_out[of_queries].to_vec(), qkv }
    }

    /// The same, with NaN in place of all other tokens.
    fn without_others(&self, tokens: &Range<usize>, shape: AttentionShape) -> Tensors {
        let only = |x: &[f32], heads: usize| {
            let (mut all, of) = (vec![f32::NAN; x.len()], elements(tokens, heads * shape.head_dim));
            all[of.clone()].copy_from_slice(&x[of]);
            all
        };
        let [q, k, v] = &self.qkv;
        let qkv = [only(q, shape.heads), only(k, shape.kv_heads), only(v, shape.kv_heads)];
        Tensors { grad_out: only(&self.grad_out, shape.heads), qkv }
    }

    /// What the kernels make of them, in the order of [`NAMES`].
    fn attend(&self, dtype: DType, shape: AttentionShape, documents: Option<&Documents>) -> [Values; 5] {
        run(|stage| self.attend_on(stage, dtype, shape, documents))
    }

    fn attend_on(
        &self,
        stage: &Stage,
        dtype: DType,
        shape: AttentionShape,
        documents: Option<&Documents>,
    ) -> [Buffer; 5] {
        let qkv = self.qkv.each_ref().map(Vec::as_slice);
        forward_and_backward(stage, dtype, &self.grad_out, qkv, shape, documents)
    }

    /// What f64 makes of a sequence, in the order of [`NAMES`].
    fn reference(&self, dtype: DType, shape: AttentionShape) -> [Vec<Bounded>; 5] {
        let qkv = self.qkv.each_ref().map(|x| exact(x));
        let [q, k, v] = qkv.each_ref().map(|x| &x[..]);
        let (out, log_sum) = forward(dtype, q, k, v, shape);
        let [grad_q, grad_k, grad_v] = backward(dtype, &exact(&self.grad_out), [q, k, v], shape);
        [out, log_sum, grad_q, grad_k, grad_v]
    }
}

fn elements(tokens: &Range<usize>, width: usize) -> Range<usize> {
    tokens.start * width..tokens.end * width
}

/// A document as a sequence of its own.
fn alone(tokens: &Range<usize>, shape: AttentionShape) -> AttentionShape {
    AttentionShape { batch: 1, seq: tokens.len(), ..shape }
}

/// Which elements of each tensor in [`NAMES`] are a document's.
fn parts(tokens: &Range<usize>, shape: AttentionShape) -> [Range<usize>; 5] {
    let (wide, narrow) = (shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim);
    [wide, shape.heads, wide, narrow, narrow].map(|width| elements(tokens, width))
}

/// The start of each token's document, where documents begin at these positions of every sequence.
fn starts(shape: AttentionShape, begins: &[usize]) -> Vec<u32> {
    let start = |position: usize| begins.iter().copied().filter(|&begin| begin <= position).max().unwrap_or(0);
    let of_sequence: Vec<u32> = (0..shape.seq).map(|position| start(position) as u32).collect();
    of_sequence.repeat(shape.batch)
}

fn documents(shape: AttentionShape, begins: &[usize]) -> Documents {
    Documents::new(&starts(shape, begins), shape.seq)
}

/// Compares each document with the reference.
fn check(dtype: DType, shape: AttentionShape, documents: &Documents) {
    let tensors = Tensors::new(dtype, shape);
    let found = tensors.attend(dtype, shape, Some(documents)).map(|values| values.wide());
    for tokens in documents.iter() {
        let expected = tensors.of(&tokens, shape).reference(dtype, alone(&tokens, shape));
        let parts = parts(&tokens, shape);
        for ((name, found), (expected, part)) in NAMES.iter().zip(&found).zip(expected.iter().zip(parts)) {
            assert_within(&format!("{name} of {tokens:?}"), &found[part], expected);
        }
    }
}

/// Shapes, and where documents begin in each sequence: borders beside those of tiles of 64 rows,
/// documents of one token, and one that is longer than a block of 512 keys. The last two have head
/// sizes with kernels of their own on GPUs.
const CASES: [(AttentionShape, &[usize]); 6] = [
    (shape(2, 9, 2, 1, 8), &[1, 2, 5]),
    (shape(2, 70, 4, 2, 8), &[3, 63, 64, 65]),
    (shape(1, 200, 3, 3, 8), &[64, 128]),
    (shape(1, 640, 1, 1, 8), &[7, 600]),
    (shape(2, 150, 2, 1, 64), &[1, 63, 130]),
    (shape(1, 131, 2, 2, 128), &[65, 129]),
];

#[test]
fn each_document_is_within_its_bound() {
    for (shape, begins) in CASES {
        TYPES.into_iter().for_each(|dtype| check(dtype, shape, &documents(shape, begins)));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn any_documents_are_within_their_bounds(
        batch in 1usize..3, kv_heads in 1usize..3, group in 1usize..3, begins: [bool; 40], seq in 1usize..40, narrow: bool,
    ) {
        let shape = shape(batch, seq, kv_heads * group, kv_heads, 4);
        let begins: Vec<usize> = (0..seq).filter(|&position| begins[position]).collect();
        check(TYPES[usize::from(narrow)], shape, &documents(shape, &begins));
    }
}

#[test]
fn a_document_has_the_bits_of_itself_alone_whatever_the_others_hold() {
    for (shape, begins) in CASES {
        for dtype in TYPES {
            let (tensors, documents) = (Tensors::new(dtype, shape), documents(shape, begins));
            for tokens in documents.iter() {
                let expected = tensors.of(&tokens, shape).attend(dtype, alone(&tokens, shape), None);
                let found = tensors.without_others(&tokens, shape).attend(dtype, shape, Some(&documents));
                let parts = parts(&tokens, shape);
                for ((name, found), (expected, part)) in NAMES.iter().zip(&found).zip(expected.iter().zip(parts)) {
                    assert!(found.wide()[part] == expected.wide(), "{name} of {tokens:?} in {shape:?}, {dtype}");
                }
            }
        }
    }
}

#[test]
fn one_document_a_sequence_has_the_bits_of_attention_without_documents() {
    for (shape, _) in CASES {
        for dtype in TYPES {
            let tensors = Tensors::new(dtype, shape);
            let found = tensors.attend(dtype, shape, Some(&documents(shape, &[])));
            let expected = tensors.attend(dtype, shape, None);
            for ((name, found), expected) in NAMES.iter().zip(&found).zip(&expected) {
                assert!(found.bytes() == expected.bytes(), "{name} in {shape:?}, {dtype}");
            }
        }
    }
}

#[test]
fn a_document_that_begins_a_token_later_has_other_outputs_and_gradients() {
    let shape = shape(1, 9, 1, 1, 8);
    let tensors = Tensors::new(DType::F32, shape);
    let [found, late] = [4, 5].map(|begin| tensors.attend(DType::F32, shape, Some(&documents(shape, &[begin]))));
    for ((name, found), late) in NAMES.iter().zip(&found).zip(&late) {
        assert!(found.bytes() != late.bytes(), "{name}");
    }
}
