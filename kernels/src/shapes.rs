//! What every device checks before it enqueues a kernel: types and shapes.

use crate::{AttentionShape, DType, Documents};

/// `$body` with `$T` the type of activations or weights.
macro_rules! with_type {
    ($dtype:expr, $T:ident => $body:expr) => {
        match $dtype {
            $crate::DType::F32 => {
                type $T = f32;
                $body
            }
            $crate::DType::Bf16 => {
                type $T = half::bf16;
                $body
            }
            other => panic!("activations and weights are f32 or bf16, not {other}"),
        }
    };
}
pub(crate) use with_type;

/// All types equal the first, which is returned.
pub(crate) fn same_type(what: &str, types: &[DType]) -> DType {
    for &other in types {
        assert!(other == types[0], "{what}: {} and {other} should be one type", types[0]);
    }
    types[0]
}

/// `len = rows · columns` with known rows gives the columns.
pub(crate) fn columns(what: &str, len: usize, rows: usize) -> usize {
    assert!(rows > 0 && len.is_multiple_of(rows), "{what}: {len} elements in {rows} rows");
    len / rows
}

/// `len = rows · columns` with known columns gives the rows.
pub(crate) fn rows(what: &str, len: usize, columns: usize) -> usize {
    assert!(columns > 0 && len.is_multiple_of(columns), "{what}: {len} elements in rows of {columns}");
    len / columns
}

/// All lengths equal the first.
pub(crate) fn same(what: &str, lens: &[usize]) {
    assert!(lens.iter().all(|&len| len == lens[0]), "{what}: lengths {lens:?} should be equal");
}

/// `y = x · wᵀ` over `rows` rows: how many (outputs, inputs) a row of y and of x has.
pub(crate) fn linear(y: usize, x: usize, w: usize, rows: usize) -> (usize, usize) {
    let (outputs, inputs) = (columns("linear y", y, rows), columns("linear x", x, rows));
    same("linear w", &[w, outputs * inputs]);
    (outputs, inputs)
}

/// Two tables of half a head's width a position turn whole sequences: the length of one.
pub(crate) fn rope(x: usize, cos: usize, sin: usize, heads: usize, head_dim: usize) -> usize {
    same("rope tables", &[cos, sin]);
    let seq = columns("rope tables", cos, head_dim / 2);
    assert!(head_dim.is_multiple_of(2) && x.is_multiple_of(seq * heads * head_dim), "rope: {x} elements");
    seq
}

/// Queries, keys and values are as long as the shape says.
pub(crate) fn check_attention_from(first: usize, shape: AttentionShape, queries: &[usize], keys: &[usize]) {
    assert!(first <= shape.seq, "attention from token {first} of {shape:?}");
    let of_queries = AttentionShape { seq: shape.seq - first, ..shape };
    check_attention(of_queries, queries, &[], shape.batch * shape.heads * of_queries.seq);
    check_attention(shape, &[], keys, shape.batch * shape.heads * shape.seq);
}

/// The documents are those of such a micro-batch.
pub(crate) fn check_documents(shape: AttentionShape, documents: Option<&Documents>) {
    if let Some(documents) = documents {
        assert_eq!(documents.shape(), (shape.batch, shape.seq), "documents of another micro-batch");
    }
}

pub(crate) fn check_attention(shape: AttentionShape, queries: &[usize], keys: &[usize], log_sums: usize) {
    let AttentionShape { batch, seq, heads, kv_heads, head_dim } = shape;
    assert!(kv_heads > 0 && heads.is_multiple_of(kv_heads), "{kv_heads} key/value heads do not divide {heads} heads");
    assert!(
        queries.iter().all(|&len| len == batch * seq * heads * head_dim),
        "attention queries {queries:?}: {shape:?}"
    );
    assert!(keys.iter().all(|&len| len == batch * seq * kv_heads * head_dim), "attention keys {keys:?}: {shape:?}");
    assert_eq!(log_sums, batch * heads * seq, "attention log_sum: {shape:?}");
}
