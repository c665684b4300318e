//! Transfers, zero, add and cast: exact, so compared bit by bit.

use half::bf16;
use pillion_kernels::{DType, Element};

use crate::common::{integers, normals, run};
use crate::devices;

/// The last is one that three threads share.
const LENGTHS: [usize; 9] = [0, 1, 3, 15, 33, 7 * 15, 257, 4097, (3 << 16) + 5];

#[test]
fn what_was_uploaded_is_downloaded() {
    fn check<T: Element + PartialEq + std::fmt::Debug>(data: &[T]) {
        for stage in [devices::reference(), devices::deferred(1)] {
            let buffer = stage.buffer(data);
            assert_eq!((buffer.len(), buffer.dtype()), (data.len(), T::DTYPE));
            assert_eq!(stage.stream.download::<T>(buffer.view()).unwrap(), data);
        }
    }
    for len in LENGTHS {
        let x = normals(len, 1);
        check(&x);
        check(&x.iter().map(|&x| f64::from(x) / 3.0).collect::<Vec<_>>());
        check(&x.iter().map(|&x| bf16::from_f32(x)).collect::<Vec<_>>());
        check(&integers(len, 1 << 32, 2));
    }
}

#[test]
fn slices_are_moved_alone() {
    let [buffer] = run(|stage| {
        let mut buffer = stage.buffer(&[0u32, 1, 2, 3, 4, 5, 6]);
        stage.stream.upload(buffer.slice_mut(2..4), &[20u32, 30]);
        stage.stream.zero(buffer.slice_mut(5..6));
        assert_eq!(stage.stream.download::<u32>(buffer.slice(1..4)).unwrap(), [1, 20, 30]);
        [buffer]
    });
    assert_eq!(buffer.of::<u32>(), [0, 1, 20, 30, 4, 0, 6]);
}

#[test]
fn new_memory_is_zero_and_zero_makes_it_so_again() {
    for dtype in [DType::F32, DType::Bf16, DType::F64, DType::U32] {
        let stage = devices::deferred(2);
        let (stream, mut buffer) = (&stage.stream, stage.zeros(dtype, 33));
        let zeros = vec![0; buffer.bytes()];
        assert_eq!(stream.download_bytes(buffer.view()).unwrap(), zeros);
        stream.upload_bytes(buffer.view_mut(), &vec![0xa5; zeros.len()]);
        stream.zero(buffer.view_mut());
        assert_eq!(stream.download_bytes(buffer.view()).unwrap(), zeros);
    }
}

#[test]
fn threads_leave_nothing_that_is_not_zero() {
    for len in LENGTHS {
        let [buffer] = run(|stage| {
            let mut buffer = stage.buffer(&integers(len + 2, 1 << 32, 1));
            stage.stream.zero(buffer.slice_mut(1..len + 1));
            [buffer]
        });
        let mut expected = integers(len + 2, 1 << 32, 1);
        expected[1..=len].fill(0);
        assert_eq!(buffer.of::<u32>(), expected);
    }
}

#[test]
fn casts_round_to_the_nearest_even_and_widen_exactly() {
    for len in LENGTHS {
        let mut x = normals(len, 1);
        // Halfway between 1 and its successor 1 + 2⁻⁷, and between that and the next: to the even one, down and up.
        for (x, special) in
            x.iter_mut().zip([1.0 + 2f32.powi(-8), 1.0 + 3.0 * 2f32.powi(-8), f32::INFINITY, f32::MAX, -0.0])
        {
            *x = special;
        }
        let [narrow, wide, copied] = run(|stage| {
            let x = stage.buffer(&x);
            let mut narrow = stage.buffer(&vec![bf16::NAN; len]);
            let (mut wide, mut copied) = (stage.output(len), stage.output(len));
            stage.stream.cast(narrow.view_mut(), x.view());
            stage.stream.cast(wide.view_mut(), narrow.view());
            stage.stream.cast(copied.view_mut(), x.view());
            [narrow, wide, copied]
        });
        let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        let expected: Vec<bf16> = x.iter().map(|&x| bf16::from_f32(x)).collect();
        assert_eq!(narrow.of::<bf16>(), expected);
        assert_eq!(bits(&wide.of::<f32>()), bits(&expected.iter().map(|x| x.to_f32()).collect::<Vec<_>>()));
        assert_eq!(bits(&copied.of::<f32>()), bits(&x));
        if len > 5 {
            assert_eq!(wide.of::<f32>()[..4], [1.0, 1.0 + 2f32.powi(-6), f32::INFINITY, f32::INFINITY]);
        }
    }
}

#[test]
fn sums_accumulate_element_by_element() {
    for len in LENGTHS {
        let (before, more) = (normals(len, 1), normals(len, 2));
        let [sum] = run(|stage| {
            let (mut sum, more) = (stage.buffer(&before), stage.buffer(&more));
            stage.stream.accumulate(sum.view_mut(), more.view());
            [sum]
        });
        let expected: Vec<f32> = before.iter().zip(&more).map(|(before, more)| before + more).collect();
        assert_eq!(sum.of::<f32>(), expected);
    }
}

#[test]
fn a_copy_has_every_bit_of_any_type() {
    for len in LENGTHS {
        let bits = integers(2 * len, 1 << 32, 1);
        for dtype in [DType::F32, DType::Bf16, DType::F64, DType::U32, DType::I64] {
            let bytes = &bytemuck::cast_slice(&bits)[..len * dtype.bytes()];
            let [copy] = run(|stage| {
                let (mut from, mut to) = (stage.zeros(dtype, len), stage.zeros(dtype, len));
                stage.stream.upload_bytes(from.view_mut(), bytes);
                stage.stream.copy(to.view_mut(), from.view());
                [to]
            });
            assert_eq!(copy.bytes(), bytes);
        }
    }
}
