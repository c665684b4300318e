//! Memory of another program: [`Cpu`]'s streams over a plain `Vec`, at addresses that are multiples
//! of the element size and of nothing more.

use std::ptr::NonNull;
use std::sync::atomic::{AtomicUsize, Ordering};

use pillion_kernels::{Buffer, Cpu, DType, Device, Error, LazyCpu, Region, Space, Stream};

/// A device whose memory belongs to somebody else.
#[derive(Default)]
pub(crate) struct Foreign {
    allocations: AtomicUsize,
}

/// `len` elements of zeroed memory, `shift` elements behind a multiple of 4096.
pub(crate) fn foreign(dtype: DType, len: usize, shift: usize) -> Buffer {
    const PAGE: usize = 4096;
    let mut owner = vec![0u8; PAGE + (shift + len) * dtype.bytes()];
    let first = owner.as_ptr().align_offset(PAGE) + shift * dtype.bytes();
    let pointer = NonNull::new(owner[first..].as_mut_ptr()).unwrap();
    // SAFETY: the vector has at least that many bytes from there, is never resized, and lives in
    // the buffer; nobody else uses it.
    unsafe { Buffer::foreign(pointer, len, dtype, Space::Host, Box::new(owner)) }.unwrap()
}

// SAFETY: its streams are those of `Cpu`, and the region comes back as it was.
unsafe impl Device for Foreign {
    fn name(&self) -> &'static str {
        "foreign"
    }

    fn allocate(&self, dtype: DType, len: usize) -> Result<Buffer, Error> {
        Ok(foreign(dtype, len, 1 + self.allocations.fetch_add(1, Ordering::Relaxed) % 5))
    }

    fn stream(&self) -> Box<dyn Stream> {
        Cpu.stream()
    }

    fn take_in(&self, region: Region) -> Result<Region, Error> {
        Ok(region)
    }
}

#[test]
fn memory_that_does_not_suit_its_elements_is_refused() {
    let mut owner = [0u8; 64];
    let odd = owner.as_ptr().align_offset(8) + 1;
    let pointer = NonNull::new(owner[odd..].as_mut_ptr()).unwrap();
    for dtype in [DType::Bf16, DType::F32, DType::F64, DType::I64, DType::U32] {
        // SAFETY: 8 elements of at most 8 bytes would not fit, but nothing is read: the address is
        // refused.
        let refused = unsafe { Buffer::foreign(pointer, 1, dtype, Space::Host, Box::new(())) };
        let text = refused.unwrap_err().to_string();
        assert!(text.contains(dtype.name()) && text.contains("multiples"), "{text}");
    }
    // SAFETY: no memory has so many bytes, so none is described.
    let refused = unsafe {
        Buffer::foreign(NonNull::<f64>::dangling().cast(), usize::MAX, DType::F64, Space::Host, Box::new(()))
    };
    assert!(matches!(refused, Err(Error::OutOfMemory { .. })));
}

#[test]
fn slices_are_lent_where_a_processor_may_access_the_memory_at_once() {
    let mut buffer = foreign(DType::F32, 4, 3);
    Cpu.stream().upload(buffer.view_mut(), &[1.0f32, 2.0, 3.0, 4.0]);
    buffer.slice_mut(1..3).into_slice::<f32>().unwrap()[0] = 7.0;
    assert_eq!(buffer.slice(1..4).as_slice::<f32>().unwrap(), [7.0, 3.0, 4.0]);
    assert!(buffer.view().as_slice::<u32>().is_none(), "another type");
    let raw = buffer.slice(1..3).raw();
    assert_eq!((raw.len, raw.dtype, raw.space), (2, DType::F32, Space::Host));
    assert_eq!(raw.pointer.as_ptr().addr(), buffer.view().raw().pointer.as_ptr().addr() + 4);

    let deferred = LazyCpu::new(1).allocate(DType::F32, 4).unwrap();
    assert!(deferred.view().as_slice::<f32>().is_none(), "work on it may run later");
    // SAFETY: nothing accesses the address, which is said to be a device's.
    let far =
        unsafe { Buffer::foreign(NonNull::<f32>::dangling().cast(), 4, DType::F32, Space::Device(3), Box::new(())) }
            .unwrap();
    assert!(far.view().as_slice::<f32>().is_none(), "a processor cannot read it");
    assert_eq!(far.view().raw().space.to_string(), "memory of device 3");
}

#[test]
#[should_panic(expected = "a processor cannot access memory of device 1")]
fn a_queue_of_the_host_does_not_touch_memory_of_a_device() {
    // SAFETY: nothing accesses the address, which is said to be a device's.
    let far =
        unsafe { Buffer::foreign(NonNull::<f32>::dangling().cast(), 4, DType::F32, Space::Device(1), Box::new(())) };
    Cpu.stream().zero(far.unwrap().view_mut());
}
