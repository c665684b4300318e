//! Kernels whose bits must be the processor's.

use half::bf16;
use pillion_kernels::cpu::reduce::{self, Fold, Operator};
use pillion_kernels::{AdamW, Buffer, Cpu, DType, Stream};
use proptest::prelude::*;

use crate::common::{Stage, TYPES, integers, normals, normals_as, run, values};
use crate::devices::cuda;

/// Asserts that the GPU writes what the processor writes.
fn assert_equal<const N: usize>(what: &str, kernel: impl Fn(&Stage) -> [Buffer; N]) {
    let (gpu, cpu) = (run(&kernel), values(&Stage::new(Cpu), &kernel));
    for (index, (gpu, cpu)) in gpu.iter().zip(&cpu).enumerate() {
        assert!(gpu.bytes() == cpu.bytes(), "{what}: output {index} differs from the processor's");
    }
}

/// Numbers of all magnitudes, infinities and NaN of several kinds, among normal ones.
fn wild(len: usize, stream: u64) -> Vec<f32> {
    let (bits, tame) = (integers(len, 1 << 32, stream), normals(len, stream + 1));
    bits.iter()
        .zip(tame)
        .enumerate()
        .map(|(i, (&bits, tame))| if i % 3 == 0 { f32::from_bits(bits) } else { tame })
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn casts_and_sums(len in 0usize..9000, seed in 0u64..1000) {
        let (x, y) = (wild(len, seed), wild(len, seed + 2));
        let narrow: Vec<bf16> = integers(len, 1 << 16, seed).iter().map(|&bits| bf16::from_bits(bits as u16)).collect();
        assert_equal("cast and accumulate", |stage| {
            let (x, y, narrow) = (stage.buffer(&x), stage.buffer(&y), stage.buffer(&narrow));
            let [mut to_wide, mut to_narrow] = [DType::F32, DType::Bf16].map(|dtype| stage.output_as(dtype, len));
            stage.stream.cast(to_wide.view_mut(), narrow.view());
            stage.stream.cast(to_narrow.view_mut(), x.view());
            let mut copy = stage.zeros(DType::F32, len);
            stage.stream.copy(copy.view_mut(), y.view());
            [to_wide, to_narrow, copy]
        });
        // The sign of a NaN that an addition makes is the processor's own.
        let (x, y) = (normals(len, seed), normals(len, seed + 1));
        assert_equal("accumulate", |stage| {
            let (mut x, y) = (stage.buffer(&x), stage.buffer(&y));
            stage.stream.accumulate(x.view_mut(), y.view());
            [x]
        });
    }

    #[test]
    fn square_norms(len in 0usize..300_000, seed in 0u64..1000, weight in -3.0..3.0) {
        let mut x = normals(len, seed);
        x.iter_mut().step_by(997).skip(1).for_each(|x| *x = f32::NAN);
        x.iter_mut().step_by(1009).skip(1).for_each(|x| *x = f32::NEG_INFINITY);
        for dtype in TYPES {
            assert_equal("square_norm", |stage| {
                let (x, mut out) = (stage.buffer_as(dtype, &x), stage.zeros(DType::F64, 2));
                stage.stream.square_norm(out.view_mut(), x.view(), weight);
                [out]
            });
        }
    }

    #[test]
    fn updates(len in 1usize..9000, step in 1u64..100_000, scale in -2.0f32..2.0, decay in 0.0f32..0.3) {
        let settings = AdamW { lr: 3e-3, beta1: 0.9, beta2: 0.95, epsilon: 1e-8, weight_decay: decay };
        let squares: Vec<f32> = normals(len, 3).iter().map(|x| 0.1 * x * x).collect();
        for gradient in TYPES {
            for weights in [None, Some(DType::F32), Some(DType::Bf16)] {
                assert_equal("adamw", |stage| {
                    let [mut master, mut m] = [1, 2].map(|stream| stage.buffer(&normals(len, stream)));
                    let mut v = stage.buffer(&squares);
                    let grad = stage.buffer_as(gradient, &normals_as(gradient, len, 4));
                    let scale = stage.buffer(&[scale]);
                    let mut copy = stage.output_as(weights.unwrap_or(DType::F32), len);
                    let to = weights.map(|_| copy.view_mut());
                    let state = [&mut master, &mut m, &mut v].map(Buffer::view_mut);
                    let [x, y, z] = state;
                    stage.stream.adamw(to, x, y, z, grad.view(), scale.view(), settings, step);
                    if weights.is_none() {
                        stage.stream.zero(copy.view_mut());
                    }
                    [master, m, v, copy]
                });
            }
        }
    }

    #[test]
    fn reductions(
        len in 0usize..9000,
        groups in 1usize..5,
        in_group in 1usize..9,
        seed in 0u64..1000,
        types in 0usize..4,
        accumulate: bool,
        divided: bool,
        scaled: bool,
    ) {
        let (from, to, count) = (TYPES[types / 2], TYPES[types % 2], groups * in_group);
        // A CPU divides what it rounds at once by anything; so does the GPU.
        let (divisor, factor) = (divided.then_some(count), scaled.then_some(0.37));
        let inputs: Vec<Vec<f32>> = (0..count as u64).map(|stream| normals_as(from, len, seed + stream)).collect();
        let before = normals_as(to, len, seed + 100);
        let gpu = cuda();
        let stage = Stage::new(gpu.clone());
        let stream = gpu.reducing_stream();
        let buffers: Vec<Buffer> = inputs.iter().map(|input| stage.buffer_as(from, input)).collect();
        let out = stage.buffer_as(to, &before);
        stream.wait_for(&stage.stream.record());
        let fold = |buffers: &[Buffer], out: &Buffer, run: &dyn Fn(&Fold<'_>)| {
            let inputs: Vec<*const u8> = buffers.iter().map(|x| x.view().raw().pointer.as_ptr().cast_const()).collect();
            let outputs = [out.view().raw().pointer.as_ptr()];
            let sum = Fold { output: to, groups, accumulate, divisor, factor, ..Fold::new(from, Operator::Sum) };
            run(&Fold { inputs: &inputs, outputs: &outputs, count: len, ..sum });
        };
        // SAFETY: all buffers have `len` elements and live until the download has waited.
        fold(&buffers, &out, &|job| unsafe { stream.fold(job) });
        let sums = (&stream as &dyn Stream).download_bytes(out.view()).unwrap();
        let host = Stage::new(Cpu);
        let buffers: Vec<Buffer> = inputs.iter().map(|input| host.buffer_as(from, input)).collect();
        let out = host.buffer_as(to, &before);
        // SAFETY: all buffers have `len` elements, and nobody else uses them.
        fold(&buffers, &out, &|job| unsafe { reduce::fold(job) });
        assert!(sums == host.stream.download_bytes(out.view()).unwrap(), "{count} inputs in {groups} groups");
    }

    #[test]
    fn embeddings(tokens in 1usize..600, vocab in 1usize..70, width in 1usize..70, seed in 0u64..1000) {
        let ids = integers(tokens, vocab, seed);
        for dtype in TYPES {
            assert_equal("embedding", |stage| {
                let (mut out, ids) = (stage.output(tokens * width), stage.buffer(&ids));
                let table = stage.buffer_as(dtype, &normals_as(dtype, vocab * width, 1));
                stage.kernels().embedding(out.view_mut(), table.view(), ids.view());
                let mut grad = stage.buffer(&normals(vocab * width, 2));
                let grad_out = stage.buffer(&normals(tokens * width, 3));
                stage.kernels().embedding_backward(grad.view_mut(), grad_out.view(), ids.view());
                [out, grad]
            });
        }
    }
}
