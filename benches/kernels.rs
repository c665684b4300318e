//! Kernels of a training step, on one core. Elements a second are floating-point operations for products, bytes for the rest.
#![allow(missing_docs)]

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use pillion_kernels::{AdamW, AttentionShape, Buffer, Cpu, DType, Device, random};

fn filled(len: usize) -> Buffer {
    let mut buffer = Cpu.allocate(DType::F32, len).expect("memory");
    let values: Vec<f32> = (0..len as u64).map(|index| random::normal(1, 1, index) as f32).collect();
    Cpu.queue().upload(buffer.view_mut(), &values);
    buffer
}

fn linear(criterion: &mut Criterion) {
    let queue = Cpu.queue();
    let mut group = criterion.benchmark_group("linear");
    for (rows, inputs, outputs) in [(1024, 512, 512), (1024, 512, 1408), (1024, 1408, 512), (1024, 512, 4096)] {
        let (x, w, grad_y) = (filled(rows * inputs), filled(inputs * outputs), filled(rows * outputs));
        let (mut y, mut grad_x, mut grad_w) = (filled(rows * outputs), filled(rows * inputs), filled(inputs * outputs));
        group.throughput(Throughput::Elements((2 * rows * inputs * outputs) as u64));
        let name = |pass: &str| format!("{pass} {rows}x{inputs}x{outputs}");
        group.bench_function(name("forward"), |bench| {
            bench.iter(|| queue.linear(y.view_mut(), x.view(), w.view(), None, rows));
        });
        group.bench_function(name("input gradient"), |bench| {
            bench.iter(|| queue.linear_backward_input(grad_x.view_mut(), grad_y.view(), w.view(), rows, false));
        });
        group.bench_function(name("weight gradient"), |bench| {
            bench.iter(|| queue.linear_backward_weight(grad_w.view_mut(), grad_y.view(), x.view(), rows));
        });
    }
}

fn attention(criterion: &mut Criterion) {
    let queue = Cpu.queue();
    let mut group = criterion.benchmark_group("attention");
    for seq in [128, 1024] {
        let shape = AttentionShape { batch: 1, seq, heads: 4, kv_heads: 4, head_dim: 64 };
        let len = seq * 256;
        let (q, k, v, mut out) = (filled(len), filled(len), filled(len), filled(len));
        let mut log_sum = filled(4 * seq);
        // Two products over half the scores.
        group.throughput(Throughput::Elements((2 * 2 * seq * seq * 256 / 2) as u64));
        group.bench_function(format!("forward, {seq} tokens"), |bench| {
            bench.iter(|| queue.attention(out.view_mut(), log_sum.view_mut(), q.view(), k.view(), v.view(), shape));
        });
    }
}

fn adamw(criterion: &mut Criterion) {
    const LEN: usize = 16 << 20;
    let queue = Cpu.queue();
    let (mut master, mut m, mut v, grad) = (filled(LEN), filled(LEN), filled(LEN), filled(LEN));
    let settings =
        AdamW { lr: 1e-6, beta1: 0.9, beta2: 0.95, epsilon: 1e-8, weight_decay: 0.1, step: 10, gradient_scale: 1.0 };
    queue.zero(v.view_mut());
    let mut group = criterion.benchmark_group("adamw");
    group.sample_size(10);
    // Gradient, master, m and v read; master, m and v written.
    group.throughput(Throughput::Bytes(28 * LEN as u64));
    group.bench_function("16 M parameters", |bench| {
        bench.iter(|| {
            queue.adamw(None, master.view_mut(), m.view_mut(), v.view_mut(), grad.view(), settings);
        });
    });
}

criterion_group!(benches, linear, attention, adamw);
criterion_main!(benches);
