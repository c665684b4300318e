//! Running a kernel on every device, and comparing what it computed.

use half::bf16;
use pillion_kernels::{Buffer, Cpu, DType, Device, Element, LazyCpu, Queue, random};

use crate::bounded::{Bounded, sum};

/// The types in which weights come.
pub(crate) const WEIGHT_TYPES: [DType; 2] = [DType::F32, DType::Bf16];

/// A device with one queue for the kernel under test and another for its inputs.
pub(crate) struct Stage {
    device: Box<dyn Device>,
    transfers: Box<dyn Queue>,
    pub(crate) queue: Box<dyn Queue>,
}

impl Stage {
    pub(crate) fn new(device: impl Device + 'static) -> Stage {
        Stage { transfers: device.queue(), queue: device.queue(), device: Box::new(device) }
    }

    /// A buffer with these elements, which the kernels' queue may use from now on.
    pub(crate) fn buffer<T: Element>(&self, data: &[T]) -> Buffer {
        let mut buffer = self.device.allocate(T::DTYPE, data.len()).unwrap();
        self.transfers.upload(buffer.view_mut(), data);
        self.queue.wait_for(&self.transfers.record());
        buffer
    }

    /// A buffer that a kernel overwrites.
    pub(crate) fn output(&self, len: usize) -> Buffer {
        self.buffer(&vec![f32::NAN; len])
    }

    /// A buffer with weights, which [`weights`] has rounded to their type.
    pub(crate) fn weights(&self, dtype: DType, data: &[f32]) -> Buffer {
        match dtype {
            DType::Bf16 => self.buffer(&data.iter().map(|&x| bf16::from_f32(x)).collect::<Vec<_>>()),
            _ => self.buffer(data),
        }
    }
}

/// What a kernel wrote.
pub(crate) struct Values(Vec<u8>);

impl Values {
    pub(crate) fn of<T: Element>(&self) -> Vec<T> {
        let mut values = vec![T::zeroed(); self.0.len() / T::DTYPE.bytes()];
        bytemuck::cast_slice_mut(&mut values).copy_from_slice(&self.0);
        values
    }
}

/// Runs a kernel on `Cpu` and on `LazyCpu` in several orders, asserts that all bits agree, and returns what it wrote.
pub(crate) fn run<const N: usize>(kernel: impl Fn(&Stage) -> [Buffer; N]) -> [Values; N] {
    let on = |stage: Stage| kernel(&stage).map(|buffer| Values(stage.queue.download_bytes(buffer.view())));
    let expected = on(Stage::new(Cpu));
    for seed in 0..3 {
        for (index, (lazy, cpu)) in on(Stage::new(LazyCpu::new(seed))).iter().zip(&expected).enumerate() {
            assert!(lazy.0 == cpu.0, "output {index} differs on LazyCpu::new({seed})");
        }
    }
    expected
}

/// Standard normal numbers, other ones for each stream.
pub(crate) fn normals(len: usize, stream: u64) -> Vec<f32> {
    (0..len as u64).map(|index| random::normal(1, stream, index) as f32).collect()
}

/// Standard normal numbers that a type of weights holds exactly.
pub(crate) fn weights(dtype: DType, len: usize, stream: u64) -> Vec<f32> {
    let round = |x| if dtype == DType::Bf16 { bf16::from_f32(x).to_f32() } else { x };
    normals(len, stream).into_iter().map(round).collect()
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
