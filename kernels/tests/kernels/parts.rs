//! Several buffers in one allocation: disjoint, aligned, zeroed, and alive as long as any of them.

use std::ptr::NonNull;
use std::sync::Arc;

use proptest::prelude::*;

use crate::foreign::{Foreign, foreign};
use pillion_kernels::{Buffer, Cores, Cpu, DType, Device, Error, LazyCpu, Part, Space};

const TYPES: [DType; 5] = [DType::F32, DType::Bf16, DType::F64, DType::U32, DType::I64];

/// Bytes of a stream's memory that differ from one part to the next.
fn pattern(buffer: &Buffer, index: usize) -> Vec<u8> {
    (0..buffer.bytes()).map(|byte| (17 * index + byte) as u8 | 1).collect()
}

fn check(device: &dyn Device, parts: &[Part], alignment: usize) {
    let mut buffers = device.allocate_parts(parts).unwrap();
    let stream = device.stream();
    let first = buffers.first().map(|buffer| buffer.view().raw().pointer.as_ptr().addr());
    let mut offset = 0;
    for (buffer, part) in buffers.iter().zip(parts) {
        assert_eq!((buffer.len(), buffer.dtype()), (part.len, part.dtype));
        let address = buffer.view().raw().pointer.as_ptr().addr();
        assert_eq!(address, first.unwrap() + offset);
        assert!(address.is_multiple_of(alignment));
        offset += part.bytes().unwrap();
        assert!(stream.download_bytes(buffer.view()).unwrap().iter().all(|&byte| byte == 0));
    }
    assert_eq!(buffers.len(), parts.len());
    // All are written before one is read: bytes of one that lay in another would be lost.
    for (index, buffer) in buffers.iter_mut().enumerate() {
        let bytes = pattern(buffer, index);
        stream.upload_bytes(buffer.view_mut(), &bytes);
    }
    for (index, buffer) in buffers.iter().enumerate() {
        assert_eq!(stream.download_bytes(buffer.view()).unwrap(), pattern(buffer, index), "part {index}");
    }
}

proptest! {
    #[test]
    fn parts_are_disjoint_aligned_and_zeroed_on_every_device(
        parts in prop::collection::vec((0..TYPES.len(), 0usize..200), 0..12)
    ) {
        let parts: Vec<Part> = parts.into_iter().map(|(of, len)| Part { dtype: TYPES[of], len }).collect();
        check(&Cpu, &parts, 64);
        check(&Cores::new(2).unwrap(), &parts, 64);
        check(&LazyCpu::new(7), &parts, 64);
        // Its memory suits elements and nothing more.
        check(&Foreign::default(), &parts, 8);
    }
}

#[test]
fn a_part_takes_its_bytes_up_to_a_cache_line() {
    let bytes = |dtype, len| Part { dtype, len }.bytes();
    assert_eq!(bytes(DType::F64, 0), Some(0));
    assert_eq!(bytes(DType::Bf16, 1), Some(64));
    assert_eq!(bytes(DType::Bf16, 32), Some(64));
    assert_eq!(bytes(DType::F32, 17), Some(128));
    assert_eq!(bytes(DType::F32, usize::MAX), None);
    let most = Part { dtype: DType::Bf16, len: usize::MAX / 4 };
    for parts in [vec![Part { dtype: DType::F32, len: usize::MAX }], vec![most; 3]] {
        let refused = (&Cpu as &dyn Device).allocate_parts(&parts);
        assert!(matches!(refused, Err(Error::OutOfMemory { device: "cpu", .. })), "{refused:?}");
    }
}

#[test]
fn the_memory_lives_as_long_as_any_part() {
    let owner = Arc::new(vec![0.0f64; 32]);
    let pointer = NonNull::from(&owner[0]).cast();
    // SAFETY: the vector has 32 elements, and the buffer keeps it; nobody else uses it. Nothing
    // is written, so a pointer from a shared borrow will do.
    let whole = unsafe { Buffer::foreign(pointer, 32, DType::F64, Space::Pinned, Box::new(owner.clone())) }.unwrap();
    let mut parts = whole.divide(&[Part { dtype: DType::U32, len: 9 }; 2]).unwrap();
    let last = parts.pop().unwrap();
    assert_eq!(last.view().raw().space, Space::Pinned);
    let kept = last.span();
    drop(parts);
    drop(last);
    assert_eq!(Arc::strong_count(&owner), 2, "an operation may still read it");
    drop(kept);
    assert_eq!(Arc::strong_count(&owner), 1);
}

#[test]
fn parts_of_parts_stay_where_they_belong() {
    let part = |len| Part { dtype: DType::F32, len };
    let mut halves = (&Cpu as &dyn Device).allocate_parts(&[part(16), part(48)]).unwrap();
    let second = halves.pop().unwrap();
    let start = second.view().raw().pointer.as_ptr().addr();
    let of_second = second.divide(&[part(16), part(32)]).unwrap();
    assert_eq!(of_second[0].view().raw().pointer.as_ptr().addr(), start);
    assert_eq!(of_second[1].view().raw().pointer.as_ptr().addr(), start + 64);
}

#[test]
fn parts_of_a_deferring_device_yield_no_slices() {
    let part = Part { dtype: DType::F32, len: 4 };
    let parts = (&LazyCpu::new(1) as &dyn Device).allocate_parts(&[part; 2]).unwrap();
    assert!(parts.iter().all(|part| part.view().as_slice::<f32>().is_none() && part.span().deferred()));
    let parts = (&Cpu as &dyn Device).allocate_parts(&[part; 2]).unwrap();
    assert!(parts.iter().all(|part| part.view().as_slice::<f32>() == Some(&[0.0; 4])));
}

#[test]
fn memory_that_does_not_suit_a_part_is_refused() {
    let narrow = foreign(DType::F32, 64, 1);
    let refused = narrow.divide(&[Part { dtype: DType::F64, len: 1 }]);
    assert!(matches!(refused, Err(Error::Misaligned { dtype: DType::F64, .. })), "{refused:?}");
}

#[test]
#[should_panic(expected = "bytes 64..128 of a buffer of 64")]
fn parts_beyond_the_memory_are_a_programmers_error() {
    let _ =
        foreign(DType::F32, 16, 0).divide(&[Part { dtype: DType::F32, len: 16 }, Part { dtype: DType::F32, len: 1 }]);
}
