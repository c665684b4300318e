//! Matrix products, by the crate `gemm`.

/// A matrix inside a slice: element (i, j) at `i·row_stride + j·column_stride`.
#[derive(Clone, Copy)]
pub(super) struct Matrix<S> {
    pub(super) data: S,
    pub(super) rows: usize,
    pub(super) columns: usize,
    pub(super) row_stride: usize,
    pub(super) column_stride: usize,
}

impl<S> Matrix<S> {
    /// Row-major without gaps.
    pub(super) fn dense(data: S, rows: usize, columns: usize) -> Self {
        Matrix { data, rows, columns, row_stride: columns, column_stride: 1 }
    }

    /// Row-major, rows `row_stride` apart.
    pub(super) fn strided(data: S, rows: usize, columns: usize, row_stride: usize) -> Self {
        Matrix { data, rows, columns, row_stride, column_stride: 1 }
    }

    /// Rows and columns exchanged.
    pub(super) fn transposed(self) -> Self {
        Matrix {
            data: self.data,
            rows: self.columns,
            columns: self.rows,
            row_stride: self.column_stride,
            column_stride: self.row_stride,
        }
    }

    /// One more than the largest index.
    fn extent(&self) -> usize {
        if self.rows == 0 || self.columns == 0 {
            return 0;
        }
        (self.rows - 1) * self.row_stride + (self.columns - 1) * self.column_stride + 1
    }

    /// Whether different elements have different indices.
    fn is_injective(&self) -> bool {
        let (inner, inner_len, outer) = if self.row_stride >= self.column_stride {
            (self.column_stride, self.columns, self.row_stride)
        } else {
            (self.row_stride, self.rows, self.column_stride)
        };
        inner > 0 && outer >= inner * inner_len.max(1)
    }
}

/// out = alpha · a·b, or out += that.
pub(super) fn product(out: Matrix<&mut [f32]>, a: Matrix<&[f32]>, b: Matrix<&[f32]>, alpha: f32, accumulate: bool) {
    assert!(
        out.rows == a.rows && out.columns == b.columns && a.columns == b.rows,
        "a product [{}, {}] · [{}, {}] into [{}, {}]",
        a.rows,
        a.columns,
        b.rows,
        b.columns,
        out.rows,
        out.columns
    );
    assert!(
        out.extent() <= out.data.len() && a.extent() <= a.data.len() && b.extent() <= b.data.len(),
        "a matrix reaches beyond its slice"
    );
    assert!(out.is_injective(), "an output matrix overlaps itself");
    if out.rows == 0 || out.columns == 0 {
        return;
    }
    // SAFETY: all indices stay inside the slices and no two elements of `out` share one (asserts above); `out` is exclusive, so it
    // overlaps neither `a` nor `b`. Strides fit isize, being bounded by slice lengths.
    unsafe {
        gemm::gemm(
            out.rows,
            out.columns,
            a.columns,
            out.data.as_mut_ptr(),
            out.column_stride as isize,
            out.row_stride as isize,
            accumulate,
            a.data.as_ptr(),
            a.column_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.column_stride as isize,
            b.row_stride as isize,
            1.0,
            alpha,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn random(len: usize, stream: u64) -> Vec<f32> {
        (0..len as u64).map(|index| crate::random::normal(1, stream, index) as f32).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn products_agree_with_f64(
            rows in 1usize..40, inner in 0usize..70, columns in 1usize..40,
            gap in 0usize..3, transpose_a: bool, transpose_b: bool, accumulate: bool,
        ) {
            let a_data = random(rows * (inner + gap) + inner * (rows + gap), 1);
            let b_data = random(inner * (columns + gap) + columns * (inner + gap), 2);
            let a = if transpose_a { Matrix::strided(&a_data[..], inner, rows, rows + gap).transposed() }
                else { Matrix::strided(&a_data[..], rows, inner, inner + gap) };
            let b = if transpose_b { Matrix::strided(&b_data[..], columns, inner, inner + gap).transposed() }
                else { Matrix::strided(&b_data[..], inner, columns, columns + gap) };
            let before = random(rows * (columns + gap), 3);
            let mut out = before.clone();
            product(Matrix::strided(&mut out[..], rows, columns, columns + gap), a, b, 0.5, accumulate);
            for (index, (&got, &was)) in out.iter().zip(&before).enumerate() {
                let (row, column) = (index / (columns + gap), index % (columns + gap));
                if column >= columns {
                    prop_assert_eq!(got, was, "a gap between rows was written");
                    continue;
                }
                let element = |m: &Matrix<&[f32]>, i: usize, j: usize| f64::from(m.data[i * m.row_stride + j * m.column_stride]);
                let terms = (0..inner).map(|k| 0.5 * element(&a, row, k) * element(&b, k, column));
                let (sum, magnitude) = terms.fold((0.0, 0.0), |(sum, magnitude), term| (sum + term, magnitude + term.abs()));
                let (sum, magnitude) = if accumulate { (sum + f64::from(was), magnitude + f64::from(was).abs()) } else { (sum, magnitude) };
                // A sum of n products in any order is off by at most (n + 1)·u·Σ|terms| (Higham 2002, section 3.1), u = 2⁻²⁴; one more for alpha.
                let bound = (inner as f64 + 3.0) * 2f64.powi(-24) * magnitude;
                prop_assert!((f64::from(got) - sum).abs() <= bound, "{} against {}", got, sum);
            }
        }
    }
}
