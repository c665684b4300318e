//! Running a kernel on the devices of the test program (`devices.rs`), and comparing what it
//! computed.

use half::bf16;
use pillion_kernels::{Buffer, DType, Device, Element, Kernels, Stream, random};

use crate::bounded::{Bounded, sum};
use crate::devices;

/// The types in which activations and weights come.
pub(crate) const TYPES: [DType; 2] = [DType::F32, DType::Bf16];

/// A device with one stream for the kernel under test and another for its inputs.
pub(crate) struct Stage {
    device: Box<dyn Device>,
    transfers: Box<dyn Stream>,
    pub(crate) stream: Box<dyn Stream>,
}

impl Stage {
    pub(crate) fn new(device: impl Device + 'static) -> Stage {
        Stage { transfers: device.stream(), stream: device.stream(), device: Box::new(device) }
    }

    pub(crate) fn kernels(&self) -> &dyn Kernels {
        self.stream.kernels().expect("devices of the host have kernels")
    }

    /// A buffer with these elements, which the kernels' stream may use from now on.
    pub(crate) fn buffer<T: Element>(&self, data: &[T]) -> Buffer {
        let mut buffer = self.device.allocate(T::DTYPE, data.len()).unwrap();
        self.transfers.upload(buffer.view_mut(), data);
        self.stream.wait_for(&self.transfers.record());
        buffer
    }

    /// A buffer with these numbers as a type of activations or weights, which holds them exactly.
    pub(crate) fn buffer_as(&self, dtype: DType, data: &[f32]) -> Buffer {
        match dtype {
            DType::Bf16 => self.buffer(&data.iter().map(|&x| bf16::from_f32(x)).collect::<Vec<_>>()),
            _ => self.buffer(data),
        }
    }

    /// New memory.
    pub(crate) fn zeros(&self, dtype: DType, len: usize) -> Buffer {
        self.device.allocate(dtype, len).unwrap()
    }

    /// A buffer that a kernel overwrites.
    pub(crate) fn output(&self, len: usize) -> Buffer {
        self.output_as(DType::F32, len)
    }

    /// The same of this type.
    pub(crate) fn output_as(&self, dtype: DType, len: usize) -> Buffer {
        self.buffer_as(dtype, &vec![f32::NAN; len])
    }
}

/// How a device computes the softmax of attention.
#[derive(Clone, Copy)]
pub(crate) struct Softmax {
    /// Keys that it meets at a time. Exponentials are relative to the largest score so far, and are
    /// rounded as such.
    pub(crate) keys: usize,
    /// Exponentials are powers of 2 of scores times log₂ e, a factor that is applied to whole
    /// scores together with 1/√D.
    pub(crate) base_2: bool,
}

/// What a kernel wrote.
pub(crate) struct Values {
    bytes: Vec<u8>,
    dtype: DType,
}

impl Values {
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    pub(crate) fn of<T: Element>(&self) -> Vec<T> {
        assert_eq!(self.dtype, T::DTYPE);
        let mut values = vec![T::zeroed(); self.bytes.len() / T::DTYPE.bytes()];
        bytemuck::cast_slice_mut(&mut values).copy_from_slice(&self.bytes);
        values
    }

    /// Numbers of a type of activations or weights.
    pub(crate) fn wide(&self) -> Vec<f32> {
        match self.dtype {
            DType::Bf16 => self.of::<bf16>().iter().map(|x| x.to_f32()).collect(),
            _ => self.of(),
        }
    }
}

/// Runs a kernel on the reference device and on the others, asserts that all bits agree, and
/// returns what it wrote.
pub(crate) fn run<const N: usize>(kernel: impl Fn(&Stage) -> [Buffer; N]) -> [Values; N] {
    let expected = values(&devices::reference(), &kernel);
    for (name, stage) in devices::others() {
        for (index, (other, expected)) in values(&stage, &kernel).iter().zip(&expected).enumerate() {
            assert!(other.bytes == expected.bytes, "output {index} differs on {name}");
        }
    }
    expected
}

/// What a kernel wrote on one device.
pub(crate) fn values<const N: usize>(stage: &Stage, kernel: impl Fn(&Stage) -> [Buffer; N]) -> [Values; N] {
    kernel(stage)
        .map(|buffer| Values { bytes: stage.stream.download_bytes(buffer.view()).unwrap(), dtype: buffer.dtype() })
}

/// Standard normal numbers, other ones for each stream.
pub(crate) fn normals(len: usize, stream: u64) -> Vec<f32> {
    (0..len as u64).map(|index| random::normal(1, stream, index) as f32).collect()
}

/// Standard normal numbers that a type of activations or weights holds exactly.
pub(crate) fn normals_as(dtype: DType, len: usize, stream: u64) -> Vec<f32> {
    rounded_as(dtype, &normals(len, stream))
}

/// The nearest numbers that this type holds.
pub(crate) fn rounded_as(dtype: DType, numbers: &[f32]) -> Vec<f32> {
    let round = |&x: &f32| if dtype == DType::Bf16 { bf16::from_f32(x).to_f32() } else { x };
    numbers.iter().map(round).collect()
}

/// Integers below `bound`.
pub(crate) fn integers(len: usize, bound: usize, stream: u64) -> Vec<u32> {
    (0..len as u64).map(|index| (random::bits(1, stream, index) % bound as u64) as u32).collect()
}

/// Asserts that each number lies as near to the exact one as its bound says.
pub(crate) fn assert_within(what: &str, got: &[f32], expected: &[Bounded]) {
    assert_eq!(got.len(), expected.len(), "{what}");
    for (index, (&got, expected)) in got.iter().zip(expected).enumerate() {
        assert!(expected.error.is_finite(), "{what}[{index}] has no bound");
        let error = (f64::from(got) - expected.value).abs();
        assert!(error <= expected.error, "{what}[{index}] = {got:e} is {error:e} away from {expected:?}");
    }
}

/// Asserts that a tenth of these roundings to bf16 or more are certain: were none, a rounding too many would go unseen.
pub(crate) fn assert_certain(what: &str, expected: &[Bounded]) {
    let certain = expected.iter().filter(|x| x.error == 0.0).count();
    assert!(10 * certain >= expected.len(), "{what}: of {} results, {certain} are certain", expected.len());
}

/// `before` with one more number added to each.
pub(crate) fn added(before: &[f32], more: &[Bounded]) -> Vec<Bounded> {
    before.iter().zip(more).map(|(&before, &more)| Bounded::exact(before) + more).collect()
}

/// Asserts that `gradients` are those of `loss` at `inputs`, by a central difference D(h) along a random direction.
///
/// D(h) = L′ + h²/6·L‴ + O(h⁴), so D(2h) − D(h) is three times the truncation of D(h), up to O(h⁴): used as its bound. The loss is
/// computed in f64 with an error 2⁻²⁹ of its f32 bound; the difference quotient divides two of those by 2h.
pub(crate) fn assert_gradient(inputs: &[&[f32]], gradients: &[&[Bounded]], loss: impl Fn(&[Vec<Bounded>]) -> Bounded) {
    const STEP: f64 = 1.0 / 16384.0;
    let directions: Vec<Vec<f32>> =
        inputs.iter().enumerate().map(|(index, input)| normals(input.len(), 900 + index as u64)).collect();
    let at = |step: f64| {
        let moved = |(input, direction): (&&[f32], &Vec<f32>)| {
            let along = input.iter().zip(direction);
            along.map(|(&x, &d)| Bounded::rounded(f64::from(x) + step * f64::from(d))).collect()
        };
        loss(&inputs.iter().zip(&directions).map(moved).collect::<Vec<_>>())
    };
    let quotient = |step: f64| {
        let (ahead, behind) = (at(step), at(-step));
        let rounding = (ahead.error + behind.error) * 2f64.powi(-29) / (2.0 * step);
        ((ahead.value - behind.value) / (2.0 * step), rounding)
    };
    let ((difference, rounding), (coarse, coarse_rounding)) = (quotient(STEP), quotient(2.0 * STEP));
    let tolerance = (coarse - difference).abs() + rounding + coarse_rounding;

    let terms = || {
        let pairs = gradients.iter().copied().flatten().zip(directions.iter().flatten());
        pairs.map(|(gradient, &direction)| gradient.value * f64::from(direction))
    };
    let slope = sum(terms().map(Bounded::exact)).value;
    let magnitude: f64 = terms().map(f64::abs).sum();
    assert!(tolerance <= 1e-6 * (1.0 + magnitude), "a tolerance of {tolerance:e} at {magnitude:e} tests nothing");
    assert!(
        (difference - slope).abs() <= tolerance,
        "the slope is {difference:e} by differences, {slope:e} by the gradient, tolerance {tolerance:e}"
    );
}
