//! What the bindings of kernels check and decide: types, shapes, and whether several threads pay.

use crate::DType;

/// Elements below which a thread more does not pay for a kernel that does little with each.
pub(super) const SHARE: usize = 1 << 16;

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
pub(super) use with_type;

/// All types equal the first, which is returned.
pub(super) fn same_type(what: &str, types: &[DType]) -> DType {
    for &other in types {
        assert!(other == types[0], "{what}: {} and {other} should be one type", types[0]);
    }
    types[0]
}

/// `len = rows · columns` with known rows gives the columns.
pub(super) fn columns(what: &str, len: usize, rows: usize) -> usize {
    assert!(rows > 0 && len.is_multiple_of(rows), "{what}: {len} elements in {rows} rows");
    len / rows
}

/// `len = rows · columns` with known columns gives the rows.
pub(super) fn rows(what: &str, len: usize, columns: usize) -> usize {
    assert!(columns > 0 && len.is_multiple_of(columns), "{what}: {len} elements in rows of {columns}");
    len / columns
}

/// All lengths equal the first.
pub(super) fn same(what: &str, lens: &[usize]) {
    assert!(lens.iter().all(|&len| len == lens[0]), "{what}: lengths {lens:?} should be equal");
}
