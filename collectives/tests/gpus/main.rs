//! Collectives between GPUs: the bits of shared memory, for ranks that share a GPU and for ranks
//! that have one each, as threads and as processes; and what happens to the others when one rank
//! fails. Over the stand-ins of `tests/standins` (`ci/cuda`), or on GPUs.

#[path = "../common/mod.rs"]
mod common;
mod failures;
#[path = "../../../kernels/tests/cuda/gate.rs"]
mod gate;
mod nccl;
mod processes;
mod same_bits;
#[path = "../../../kernels/tests/cuda/standin.rs"]
mod standin;
mod waits;

use std::sync::Mutex;

use pillion_collectives::{Communicator, Error, GpuTransport, Launch, Options};
use pillion_kernels::{Buffer, Cpu, Cuda, DType, Device, Stream, random};

/// Ranks of one process.
pub(crate) fn run<R: Send>(world: usize, options: Options, program: impl Fn(&Rank) -> R + Sync) -> Vec<R> {
    // A seed is the whole process's, and many ranks at once take long.
    static ONE: Mutex<()> = Mutex::new(());
    let _one = ONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    common::run(Launch::threads(world), options, |launch, host| {
        program(&Rank::new(launch.rank, host, GpuTransport::Auto).unwrap())
    })
}

pub(crate) struct Rank {
    pub(crate) number: usize,
    pub(crate) host: Communicator,
    pub(crate) gpus: Communicator,
    pub(crate) gpu: Cuda,
}

impl Rank {
    /// With the communicator of the host, one between GPUs, and its GPU.
    fn new(number: usize, host: Communicator, by: GpuTransport) -> Result<Rank, Error> {
        // Three ranks on two GPUs share one.
        let gpus = Cuda::count().unwrap_or_else(|error| panic!("{error} (ci/cuda runs these tests over stand-ins)"));
        let gpu = Cuda::new(number as u32 % gpus, 8 << 20).unwrap();
        let gpus = host.between_gpus(&gpu, by)?;
        Ok(Rank { number, host, gpus, gpu })
    }

    /// Devices with the communicators that move their memory.
    pub(crate) fn both(&self) -> [(&Communicator, &dyn Device); 2] {
        [(&self.host, &Cpu), (&self.gpus, &self.gpu)]
    }
}

/// `len` elements of a device, other ones for each `seed`.
pub(crate) fn numbers(stream: &dyn Stream, device: &dyn Device, dtype: DType, len: usize, seed: u64) -> Buffer {
    let mut buffer = device.allocate(dtype, len).unwrap();
    let normals = (0..len as u64).map(|index| random::normal(7, seed, index));
    let bytes: Vec<u8> = match dtype {
        DType::F32 => normals.flat_map(|x| (x as f32).to_le_bytes()).collect(),
        DType::Bf16 => normals.flat_map(|x| half::bf16::from_f64(x).to_le_bytes()).collect(),
        DType::F64 => normals.flat_map(f64::to_le_bytes).collect(),
        other => panic!("no numbers of {other}"),
    };
    stream.upload_bytes(buffer.view_mut(), &bytes);
    buffer
}
