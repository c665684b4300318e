//! Matrix products, by cuBLASLt: one handle and one workspace for each stream, and one algorithm
//! for each shape, chosen when the shape is first met.

use std::collections::HashMap;
use std::ffi::{CStr, c_void};
use std::sync::Arc;

use cudarc::cublaslt::sys::{
    self, cublasComputeType_t, cublasLtHandle_t, cublasLtMatmulAlgo_t, cublasLtMatmulDesc_t,
    cublasLtMatmulDescAttributes_t as Product, cublasLtMatmulHeuristicResult_t,
    cublasLtMatmulPreferenceAttributes_t as Preference, cublasLtMatrixLayout_t,
    cublasLtMatrixLayoutAttribute_t as Layout, cublasStatus_t, cudaDataType_t,
};
use cudarc::driver::sys::{CUdeviceptr, CUstream};

use super::context::Context;
use super::{CudaError, Inner, slab};
use crate::{DType, Region};

/// Every function of cuBLASLt that is called.
pub(super) const SYMBOLS: &[&str] = &[
    "cublasLtCreate",
    "cublasLtDestroy",
    "cublasLtGetStatusString",
    "cublasLtMatmul",
    "cublasLtMatmulAlgoGetHeuristic",
    "cublasLtMatmulDescCreate",
    "cublasLtMatmulDescDestroy",
    "cublasLtMatmulDescSetAttribute",
    "cublasLtMatmulPreferenceCreate",
    "cublasLtMatmulPreferenceDestroy",
    "cublasLtMatmulPreferenceSetAttribute",
    "cublasLtMatrixLayoutCreate",
    "cublasLtMatrixLayoutDestroy",
    "cublasLtMatrixLayoutSetAttribute",
];

/// Bytes of a stream's workspace: what NVIDIA recommends for GPUs from H100 on.
pub(super) const WORKSPACE: u64 = 32 << 20;

macro_rules! call {
    ($function:ident($($argument:expr),* $(,)?)) => {
        check(stringify!($function), sys::$function($($argument),*))
    };
}

fn check(call: &'static str, status: cublasStatus_t) -> Result<(), CudaError> {
    if status == cublasStatus_t::CUBLAS_STATUS_SUCCESS {
        return Ok(());
    }
    // SAFETY: the text is a constant of the library, or null.
    let text = unsafe {
        let text = sys::cublasLtGetStatusString(status);
        if text.is_null() { String::new() } else { CStr::from_ptr(text).to_string_lossy().into_owned() }
    };
    Err(CudaError::Call { call, code: text, text: String::new() })
}

/// A matrix in memory, row by row: `[rows, columns]`, `stride` elements from one row to the next.
/// Several of them, one for each product of a batch, lie `batch_stride` elements apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Matrix {
    pub(super) dtype: DType,
    pub(super) rows: usize,
    pub(super) columns: usize,
    pub(super) stride: usize,
    pub(super) batch_stride: usize,
    /// Whether the product takes it transposed.
    pub(super) transposed: bool,
}

impl Matrix {
    /// Without gaps.
    pub(super) fn dense(dtype: DType, rows: usize, columns: usize) -> Matrix {
        Matrix { dtype, rows, columns, stride: columns, batch_stride: 0, transposed: false }
    }

    pub(super) fn len(&self) -> usize {
        self.rows * self.columns
    }

    pub(super) fn transposed(self) -> Matrix {
        Matrix { transposed: !self.transposed, ..self }
    }

    /// (rows, columns), as the product takes it.
    fn taken(self) -> (usize, usize) {
        if self.transposed { (self.columns, self.rows) } else { (self.rows, self.columns) }
    }
}

/// out = scale · left · right + start, where `start` is `out` itself or a matrix of its shape.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Gemm {
    pub(super) out: Matrix,
    pub(super) left: Matrix,
    pub(super) right: Matrix,
    pub(super) batch: usize,
    /// How far all addresses are aligned, in bytes: 16 or less.
    pub(super) alignment: u32,
}

/// Where the matrices of a product lie.
#[derive(Clone, Copy)]
pub(super) struct Places {
    pub(super) out: CUdeviceptr,
    pub(super) left: CUdeviceptr,
    pub(super) right: CUdeviceptr,
    /// What is added: `out`, or memory laid out like it; nothing without.
    pub(super) start: Option<CUdeviceptr>,
}

impl Places {
    /// How far all addresses are aligned, 16 bytes at most.
    pub(super) fn alignment(&self) -> u32 {
        let all = self.out | self.left | self.right | self.start.unwrap_or(0) | 16;
        1 << all.trailing_zeros()
    }
}

/// The products of one stream.
#[derive(Default)]
pub(super) struct Products {
    library: Option<Library>,
    plans: HashMap<Gemm, Plan>,
}

struct Library {
    context: Arc<Context>,
    handle: cublasLtHandle_t,
    _memory: Region,
    workspace: CUdeviceptr,
}

// SAFETY: a stream is used by one thread at a time, and its handles with it.
unsafe impl Send for Library {}

impl Drop for Library {
    fn drop(&mut self) {
        if self.context.may_release() {
            // SAFETY: created in `Library::open`, destroyed once; its stream's work has run.
            unsafe {
                let _ = call!(cublasLtDestroy(self.handle));
            }
        }
    }
}

impl Library {
    fn open(inner: &Arc<Inner>) -> Result<Library, CudaError> {
        let memory = slab::region(inner, WORKSPACE)?;
        let workspace = memory.start().as_ptr().expose_provenance() as CUdeviceptr;
        let mut handle = std::ptr::null_mut();
        // SAFETY: a pointer to a local.
        unsafe { call!(cublasLtCreate(&mut handle))? };
        Ok(Library { context: inner.context.clone(), handle, _memory: memory, workspace })
    }
}

/// How a shape is multiplied.
struct Plan {
    product: Owned<cublasLtMatmulDesc_t>,
    left: Owned<cublasLtMatrixLayout_t>,
    right: Owned<cublasLtMatrixLayout_t>,
    out: Owned<cublasLtMatrixLayout_t>,
    algorithm: cublasLtMatmulAlgo_t,
}

/// A description of cuBLASLt's, and what destroys it.
struct Owned<T: Copy>(T, unsafe fn(T) -> cublasStatus_t);

// SAFETY: as for `Library`.
unsafe impl<T: Copy> Send for Owned<T> {}

impl<T: Copy> Drop for Owned<T> {
    fn drop(&mut self) {
        // SAFETY: made by its constructor, destroyed once.
        unsafe {
            let _ = (self.1)(self.0);
        }
    }
}

impl Products {
    /// Enqueues a product. `scale` and what is in `places` may differ between calls of one shape.
    ///
    /// # Safety
    /// The places are memory of the stream's GPU that has room for the matrices, and stays valid
    /// until the stream has run the product.
    pub(super) unsafe fn run(
        &mut self,
        inner: &Arc<Inner>,
        stream: CUstream,
        gemm: Gemm,
        places: Places,
        scale: f32,
    ) -> Result<(), CudaError> {
        let library = match &mut self.library {
            Some(library) => library,
            empty => empty.insert(Library::open(inner)?),
        };
        let plan = match self.plans.entry(gemm) {
            std::collections::hash_map::Entry::Occupied(plan) => plan.into_mut(),
            std::collections::hash_map::Entry::Vacant(place) => place.insert(Plan::choose(library.handle, gemm)?),
        };
        let (start, keep) = places.start.map_or((places.out, 0.0f32), |start| (start, 1.0));
        let pointer = |address: CUdeviceptr| address as usize as *mut c_void;
        // cuBLASLt's matrices lie column by column, so it computes outᵀ = rightᵀ · leftᵀ.
        // SAFETY: descriptions that live; numbers are read at the call; the caller's promise.
        unsafe {
            call!(cublasLtMatmul(
                library.handle,
                plan.product.0,
                (&raw const scale).cast(),
                pointer(places.right),
                plan.right.0,
                pointer(places.left),
                plan.left.0,
                (&raw const keep).cast(),
                pointer(start),
                plan.out.0,
                pointer(places.out),
                plan.out.0,
                &plan.algorithm,
                pointer(library.workspace),
                WORKSPACE as usize,
                stream.cast(),
            ))
        }
    }
}

impl Plan {
    fn choose(handle: cublasLtHandle_t, gemm: Gemm) -> Result<Plan, CudaError> {
        let Gemm { out, left, right, batch, alignment } = gemm;
        let ((rows, inner), (inner_too, columns)) = (left.taken(), right.taken());
        assert!(inner == inner_too && out.taken() == (rows, columns) && !out.transposed, "no product: {gemm:?}");
        let (compute, number) = (cublasComputeType_t::CUBLAS_COMPUTE_32F, cudaDataType_t::CUDA_R_32F);
        let mut product = std::ptr::null_mut();
        // SAFETY: a pointer to a local.
        unsafe { call!(cublasLtMatmulDescCreate(&mut product, compute, number))? };
        let product = Owned(product, sys::cublasLtMatmulDescDestroy as unsafe fn(_) -> _);
        for (attribute, matrix) in
            [(Product::CUBLASLT_MATMUL_DESC_TRANSA, right), (Product::CUBLASLT_MATMUL_DESC_TRANSB, left)]
        {
            let transposed = i32::from(matrix.transposed);
            // SAFETY: the attribute is an i32, which is copied.
            unsafe { call!(cublasLtMatmulDescSetAttribute(product.0, attribute, (&raw const transposed).cast(), 4))? };
        }
        let [left, right, out] = [left, right, out].map(|matrix| layout(matrix, batch));
        let (left, right, out) = (left?, right?, out?);
        let mut preference = std::ptr::null_mut();
        // SAFETY: a pointer to a local.
        unsafe { call!(cublasLtMatmulPreferenceCreate(&mut preference))? };
        let preference = Owned(preference, sys::cublasLtMatmulPreferenceDestroy as unsafe fn(_) -> _);
        // SAFETY: the attribute is a u64, the others are u32; they are copied.
        unsafe {
            let (most, workspace) = (Preference::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, WORKSPACE);
            call!(cublasLtMatmulPreferenceSetAttribute(preference.0, most, (&raw const workspace).cast(), 8))?;
            for least in [
                Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
                Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
                Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
                Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
            ] {
                call!(cublasLtMatmulPreferenceSetAttribute(preference.0, least, (&raw const alignment).cast(), 4))?;
            }
        }
        // SAFETY: numbers, for which zeros are values.
        let mut found: cublasLtMatmulHeuristicResult_t = unsafe { std::mem::zeroed() };
        let mut count = 0;
        // SAFETY: descriptions that live, and room for one result.
        unsafe {
            call!(cublasLtMatmulAlgoGetHeuristic(
                handle,
                product.0,
                right.0,
                left.0,
                out.0,
                out.0,
                preference.0,
                1,
                &mut found,
                &mut count,
            ))?;
        }
        if count == 0 {
            return Err(CudaError::Call {
                call: "cublasLtMatmulAlgoGetHeuristic",
                code: "no algorithm".to_owned(),
                text: format!("{gemm:?}"),
            });
        }
        Ok(Plan { product, left, right, out, algorithm: found.algo })
    }
}

/// A matrix as cuBLASLt sees it: column by column, and so with rows and columns exchanged.
fn layout(matrix: Matrix, batch: usize) -> Result<Owned<cublasLtMatrixLayout_t>, CudaError> {
    let dtype = match matrix.dtype {
        DType::F32 => cudaDataType_t::CUDA_R_32F,
        DType::Bf16 => cudaDataType_t::CUDA_R_16BF,
        other => panic!("products are of f32 or bf16, not {other}"),
    };
    let mut layout = std::ptr::null_mut();
    let (rows, columns, stride) = (matrix.columns as u64, matrix.rows as u64, matrix.stride as i64);
    // SAFETY: a pointer to a local.
    unsafe { call!(cublasLtMatrixLayoutCreate(&mut layout, dtype, rows, columns, stride))? };
    let layout = Owned(layout, sys::cublasLtMatrixLayoutDestroy as unsafe fn(_) -> _);
    let (count, apart) = (batch as i32, matrix.batch_stride as i64);
    let (counts, strides) =
        (Layout::CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, Layout::CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET);
    // SAFETY: an i32 and an i64, which are copied.
    unsafe {
        call!(cublasLtMatrixLayoutSetAttribute(layout.0, counts, (&raw const count).cast(), 4))?;
        call!(cublasLtMatrixLayoutSetAttribute(layout.0, strides, (&raw const apart).cast(), 8))?;
    }
    Ok(layout)
}
