//! What a model allocates is what was predicted, in one allocation.

use std::sync::Mutex;

use pillion_kernels::{Buffer, Cpu, DType, Device, Error, LazyCpu, Region, Stream};
use pillion_llama::config::Config;
use pillion_llama::model::Model;

/// Notes what is allocated, and has another device do it.
struct Counting<D> {
    inner: D,
    /// Bytes of each allocation.
    allocations: Mutex<Vec<u64>>,
}

// SAFETY: its streams and memory are those of the other device.
unsafe impl<D: Device> Device for Counting<D> {
    fn name(&self) -> &'static str {
        "counting"
    }

    fn allocate(&self, dtype: DType, len: usize) -> Result<Buffer, Error> {
        let buffer = self.inner.allocate(dtype, len)?;
        self.allocations.lock().expect("no allocation panics").push(buffer.bytes() as u64);
        Ok(buffer)
    }

    fn stream(&self) -> Box<dyn Stream> {
        self.inner.stream()
    }

    fn take_in(&self, region: Region) -> Result<Region, Error> {
        self.inner.take_in(region)
    }
}

fn config(vocab: usize, layers: usize) -> Config {
    Config {
        vocab_size: vocab,
        hidden_size: 24,
        intermediate_size: 40,
        num_hidden_layers: layers,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        rms_norm_eps: 1e-5,
        rope_theta: 1e4,
    }
}

fn allocated(inner: impl Device, shape: (&Config, DType, usize, usize)) -> Vec<u64> {
    let (config, dtype, batch, seq) = shape;
    let device = Counting { inner, allocations: Mutex::default() };
    Model::new(&device, config, dtype, batch, seq).unwrap();
    device.allocations.into_inner().unwrap()
}

#[test]
fn a_model_makes_one_allocation_of_the_predicted_bytes() {
    for config in [config(61, 1), config(257, 5)] {
        for dtype in [DType::F32, DType::Bf16] {
            // One token; odd numbers of them; more than have logits at a time.
            for (batch, seq) in [(1, 1), (3, 7), (5, 128)] {
                let shape = (&config, dtype, batch, seq);
                let predicted = Model::activation_bytes(&config, dtype, batch, seq);
                assert_eq!(allocated(Cpu, shape), [predicted], "{dtype}, {batch} × {seq}");
                assert_eq!(allocated(LazyCpu::new(1), shape), [predicted], "{dtype}, {batch} × {seq}");
            }
        }
    }
}
