//! A rank's memory: one allocation, and what goes back to it.

use pillion_kernels::{Cuda, CudaError, DType, Device, Error, Space};

use crate::devices::cuda;
use crate::standin;

#[test]
fn memory_is_zeroed_disjoint_and_returns() {
    let device = Cuda::new(0, 8 << 20).unwrap();
    let stream = device.stream();
    let before = device.memory().0;
    for round in 0..20 {
        standin::reset(round);
        // Together more than half of the memory: the next round needs what this one gives back.
        let mut buffers: Vec<_> = (0..5).map(|_| device.allocate(DType::F32, 250_000).unwrap()).collect();
        for buffer in &buffers {
            assert_eq!(buffer.space(), Space::Device(0));
            assert!(stream.download::<f32>(buffer.view()).unwrap().iter().all(|&x| x == 0.0), "round {round}");
        }
        for (index, buffer) in buffers.iter_mut().enumerate() {
            stream.upload(buffer.view_mut(), &vec![index as f32 + 1.0; 250_000]);
        }
        for (index, buffer) in buffers.iter().enumerate() {
            let values = stream.download::<f32>(buffer.view()).unwrap();
            assert!(values.iter().all(|&x| x == index as f32 + 1.0));
        }
        // Work that is still enqueued writes to the last buffer after it is dropped.
        stream.upload(buffers[4].view_mut(), &vec![7.0f32; 250_000]);
    }
    assert_eq!(device.memory().0, before);
}

#[test]
fn an_allocation_that_does_not_fit_is_an_error_that_says_how_much_there_is() {
    let device = Cuda::new(0, 4 << 20).unwrap();
    let held = device.allocate(DType::F32, 1 << 19).unwrap();
    for len in [1 << 20, 1 << 40] {
        match device.allocate(DType::F32, len) {
            Err(Error::Cuda(CudaError::NoRoom { bytes, used, slab, .. })) => {
                assert_eq!(bytes, 4 * len as u64);
                assert!(used >= held.bytes() as u64 && slab >= 4 << 20);
            }
            other => panic!("{other:?}"),
        }
    }
    assert!(matches!(device.allocate(DType::F64, usize::MAX), Err(Error::OutOfMemory { .. })));
    // More than any GPU has.
    assert!(matches!(Cuda::new(0, 1 << 50), Err(Error::Cuda(_))));
    assert!(matches!(Cuda::new(0, u64::MAX), Err(Error::Cuda(_))));
}

#[test]
fn there_is_no_gpu_behind_the_last() {
    let count = Cuda::count().unwrap();
    match Cuda::new(count, 1 << 20) {
        Err(Error::Cuda(error @ CudaError::NoDevice { wanted, seen, .. })) => {
            assert_eq!((wanted, seen), (count, count));
            assert!(error.to_string().contains("CUDA_VISIBLE_DEVICES"));
        }
        other => panic!("{:?}", other.map(drop)),
    }
    let info = Cuda::info(0).unwrap();
    assert!(info.free <= info.total && info.total > 0 && info.uuid != [0; 16]);
}

#[test]
fn memory_of_other_spaces_is_not_taken_in() {
    let device = cuda();
    let owner = vec![0u8; 64];
    let start = std::ptr::NonNull::new(owner.as_ptr().cast_mut()).unwrap();
    // SAFETY: the vector's memory, which lives as long as the region; nobody accesses it.
    let region = unsafe { pillion_kernels::Region::from_raw(start, 64, Space::Host, Box::new(owner)) };
    let refused = device.take_in(region).err().unwrap().to_string();
    assert!(refused.contains("does not reach host memory"), "{refused}");
}
