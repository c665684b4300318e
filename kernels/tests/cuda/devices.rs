//! GPUs, or their stand-ins.

use std::rc::Rc;

use pillion_kernels::{Buffer, Cuda, DType, Device, Error, Region, Stream};

use crate::common::{Softmax, Stage};
use crate::standin;

/// Bytes of a rank's memory, enough for each test.
const BYTES: u64 = 96 << 20;

/// What an addition of a matrix product may lose, in units of half the distance between neighbours:
/// tensor cores cut sums off instead of rounding them (Fasi, Higham, Mikaitis and Pranesh 2021,
/// "Numerical behavior of NVIDIA tensor cores").
pub(crate) const UNITS_OF_PRODUCTS: f64 = 2.0;

/// How the attention of this type and head size works.
pub(crate) fn attention(dtype: DType, head_dim: usize) -> Softmax {
    let by_products = std::env::var("PILLION_ATTENTION").is_ok_and(|way| way == "products");
    match (dtype, head_dim) {
        _ if by_products => Softmax { keys: 1 << 20, base_2: false },
        (DType::Bf16, 64) => Softmax { keys: 64, base_2: true },
        (DType::Bf16, 128) => Softmax { keys: 32, base_2: true },
        // More keys than any test has.
        _ => Softmax { keys: 1 << 20, base_2: false },
    }
}

/// A rank's share of GPU 0.
pub(crate) fn cuda() -> Cuda {
    Cuda::new(0, BYTES).unwrap_or_else(|error| panic!("{error} (ci/cuda runs these tests over stand-ins)"))
}

thread_local! {
    /// Each test has a device of its own, which all its kernels share: setting memory aside takes
    /// longer than a kernel.
    static STAGES: [Rc<Stage>; 2] = [Rc::new(Stage::new(cuda())), Rc::new(Stage::new(Odd { device: cuda() }))];
}

/// With whose results the others' are compared.
pub(crate) fn reference() -> Rc<Stage> {
    STAGES.with(|[stage, _]| stage.clone())
}

/// The same GPU again, whose threads and streams run in another order; memory at addresses that are
/// multiples of the element size and of nothing more.
pub(crate) fn others() -> impl Iterator<Item = (String, Rc<Stage>)> {
    let again = (1..3).map(|seed| {
        standin::reset(seed);
        (format!("cuda again, seed {seed}"), reference())
    });
    again.chain([("cuda at odd addresses".to_owned(), STAGES.with(|[_, odd]| odd.clone()))])
}

/// A device that runs work after the call that enqueues it.
pub(crate) fn deferred(_: u64) -> Rc<Stage> {
    reference()
}

/// A GPU whose buffers start some elements behind the start of an allocation.
struct Odd {
    device: Cuda,
}

// SAFETY: memory and streams are those of the GPU.
unsafe impl Device for Odd {
    fn name(&self) -> &'static str {
        "cuda at odd addresses"
    }

    fn allocate(&self, dtype: DType, len: usize) -> Result<Buffer, Error> {
        let whole = self.device.allocate(dtype, len + 3)?;
        let raw = whole.slice(3..3 + len).raw();
        // SAFETY: elements of `whole`, which lives in the buffer and which nobody else uses.
        unsafe { Buffer::foreign(raw.pointer, len, dtype, raw.space, Box::new(whole)) }
    }

    fn stream(&self) -> Box<dyn Stream> {
        self.device.stream()
    }

    fn take_in(&self, region: Region) -> Result<Region, Error> {
        self.device.take_in(region)
    }
}
