//! How large the operands of kernels are, and where they lie.

use half::bf16;
use pillion_kernels::DType::Bf16;
use pillion_kernels::{AttentionShape, Buffer, DType, Device, Element, Failure, Stream, random};

use crate::Error;

/// How large the operands are.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    /// Elements of a tensor, for everything but products.
    pub elements: usize,
    /// Inputs and outputs of the layers whose products are measured.
    pub layers: &'static [(usize, usize)],
    /// Tokens that go through a layer at a time.
    pub rows: &'static [usize],
    /// Tokens of the sequences whose attention is measured.
    pub tokens: &'static [usize],
    /// Heads, and elements of each.
    pub heads: (usize, usize),
    /// Columns of logits.
    pub vocabulary: usize,
}

impl Sizes {
    /// For a core: the Llama of 30 M parameters, and 64 MiB in f32.
    pub const CORE: Sizes = Sizes {
        elements: 16 << 20,
        layers: &[(512, 512), (512, 1408), (1408, 512), (512, 4096)],
        rows: &[1024, 4096],
        tokens: &[256, 1024, 4096],
        heads: (8, 64),
        vocabulary: 4096,
    };
    /// For a GPU: a Llama of 8 B parameters, and 512 MiB in f32.
    pub const GPU: Sizes = Sizes {
        elements: 128 << 20,
        layers: &[(4096, 4096), (4096, 14_336), (14_336, 4096)],
        rows: &[8192],
        tokens: &[2048, 8192],
        heads: (32, 128),
        vocabulary: 131_072,
    };
    /// To see whether they run.
    pub const SMALL: Sizes = Sizes {
        elements: 64 << 10,
        layers: &[(64, 128)],
        rows: &[32],
        tokens: &[64],
        heads: (1, 64),
        vocabulary: 1024,
    };

    /// Elements of all heads.
    pub fn width(&self) -> usize {
        self.heads.0 * self.heads.1
    }

    /// Bytes that the operands of a case have at most.
    pub fn bytes(&self) -> u64 {
        let largest = |sizes: &[usize]| sizes.iter().copied().max().unwrap_or(0);
        let features = self.layers.iter().map(|&(inputs, outputs)| inputs + outputs).max().unwrap_or(0);
        let weight = self.layers.iter().map(|&(inputs, outputs)| inputs * outputs).max().unwrap_or(0);
        let product = 4 * (largest(self.rows) * features + 2 * weight);
        // Gradients of gate and up, their output, and three inputs, in f32; nine tensors.
        let flat = 24 * self.elements;
        let attention = 9 * 4 * largest(self.tokens) * self.width();
        product.max(flat).max(attention) as u64
    }

    /// The largest shape of attention.
    pub fn attention(&self) -> AttentionShape {
        self.attention_of(self.tokens.iter().copied().max().unwrap_or(0))
    }

    pub(super) fn attention_of(&self, seq: usize) -> AttentionShape {
        let (heads, head_dim) = self.heads;
        AttentionShape { batch: 1, seq, heads, kv_heads: heads, head_dim }
    }
}

/// Where operands lie.
pub struct Place<'a> {
    device: &'a dyn Device,
    pub(super) stream: Box<dyn Stream>,
}

impl<'a> Place<'a> {
    /// In memory of this device, which has kernels.
    pub fn new(device: &'a dyn Device) -> Place<'a> {
        Place { device, stream: device.stream() }
    }

    pub(super) fn allocate(&self, dtype: DType, len: usize) -> Result<Buffer, Error> {
        Ok(self.device.allocate(dtype, len)?)
    }

    pub(super) fn upload<T: Element>(&self, values: &[T]) -> Result<Buffer, Error> {
        let mut buffer = self.allocate(T::DTYPE, values.len())?;
        self.stream.upload(buffer.view_mut(), values);
        self.ready()?;
        Ok(buffer)
    }

    /// Numbers in [−1, 1), others for every `stream`: zeros would be multiplied faster. Long ones
    /// repeat.
    pub(super) fn numbers(&self, stream: u64, dtype: DType, len: usize) -> Result<Buffer, Error> {
        const PERIOD: usize = (1 << 20) + 7;
        let number = |index| 2.0 * random::uniform(1, stream, index) as f32 - 1.0;
        let numbers: Vec<f32> = (0..PERIOD.min(len) as u64).map(number).collect();
        match dtype {
            Bf16 => {
                let numbers: Vec<bf16> = numbers.into_iter().map(bf16::from_f32).collect();
                self.upload(&numbers.into_iter().cycle().take(len).collect::<Vec<bf16>>())
            }
            _ => self.upload(&numbers.into_iter().cycle().take(len).collect::<Vec<f32>>()),
        }
    }

    pub(super) fn ready(&self) -> Result<(), Failure> {
        self.stream.synchronize()
    }
}
