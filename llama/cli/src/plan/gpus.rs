//! GPUs that `pillion plan` knows by name, with the figures that their maker publishes.

use clap::ValueEnum;
use pillion_kernels::DType;

/// A GPU, as eight of them share a host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Gpu {
    /// A100 SXM with 80 GB.
    A100,
    /// H100 SXM.
    H100,
    /// H200 SXM.
    H200,
    /// B200 of an HGX with 1000 W.
    B200,
}

/// What a GPU could reach, by its data sheet.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Peaks {
    /// Floating-point operations a second of dense matrix products of bf16, summed in f32.
    bf16: f64,
    /// The same of f32, without TF32.
    f32: f64,
    /// Bytes a second of its memory.
    pub(super) memory: f64,
    /// Bytes a second to the other GPUs of the host, each way.
    pub(super) link: f64,
    /// Bytes of its memory.
    pub(super) room: u64,
}

/// GPUs of a host.
pub(super) const ON_A_HOST: usize = 8;

/// The share of its peak that a GPU sustains in the kernels of a model, where nothing is said of
/// it. A published speed of Llama 3.1 8B with FSDP2 on 8 H100, 5,762 tokens/s a GPU, comes to 300
/// TFLOP/s by `pillion plan --calibrate`.
pub(super) const SHARE: f64 = 0.3;

impl Gpu {
    /// Dense figures; data sheets print twice as much for sparse products, and both directions of
    /// NVLink together.
    ///
    /// Sources: NVIDIA A100 data sheet (2021); NVIDIA H100 data sheet (2023); NVIDIA H200 data
    /// sheet (2024); NVIDIA Blackwell architecture technical brief (2024), HGX B200.
    pub(super) fn peaks(self) -> Peaks {
        match self {
            Gpu::A100 => Peaks { bf16: 312e12, f32: 19.5e12, memory: 2.039e12, link: 300e9, room: 80_000_000_000 },
            Gpu::H100 => Peaks { bf16: 989.4e12, f32: 66.9e12, memory: 3.35e12, link: 450e9, room: 80_000_000_000 },
            Gpu::H200 => Peaks { bf16: 989.4e12, f32: 66.9e12, memory: 4.8e12, link: 450e9, room: 141_000_000_000 },
            Gpu::B200 => Peaks { bf16: 2250e12, f32: 80e12, memory: 8e12, link: 900e9, room: 180_000_000_000 },
        }
    }
}

impl Peaks {
    /// Floating-point operations a second in products of this type.
    pub(super) fn flops(&self, dtype: DType) -> f64 {
        if dtype == DType::Bf16 { self.bf16 } else { self.f32 }
    }
}
