//! What stops the work of a rank, and how the error comes to the host.

use std::time::{Duration, Instant};

use pillion_kernels::{Cuda, CudaError, DType, Device, Error, Event, Failure};

use crate::devices::cuda;
use crate::gate::Gate;
use crate::standin;

/// The CUDA error in a failure.
fn cuda_error(failure: &Failure) -> CudaError {
    match failure.cause::<Error>() {
        Some(Error::Cuda(error)) => error.clone(),
        other => panic!("{other:?} is no error of a GPU"),
    }
}

#[test]
fn nothing_runs_after_an_event_that_fails() {
    for seed in 0..20 {
        standin::reset(seed);
        let (device, gate) = (cuda(), Gate::new());
        let (stream, other, reader) = (device.stream(), device.stream(), device.stream());
        let [mut x, mut y] = [0; 2].map(|_| device.allocate(DType::F32, 3000).unwrap());
        reader.upload(x.view_mut(), &vec![1.0f32; 3000]);
        reader.synchronize().unwrap();
        let before = stream.record();
        stream.wait_for(&Event::new(gate.clone()));
        stream.accumulate(x.view_mut(), y.view());
        stream.zero(x.view_mut());
        other.wait_for(&stream.record());
        other.zero(x.view_mut());
        let behind = other.record();
        assert!(before.wait().is_ok());
        gate.end(Err(Failure::new(std::io::Error::other("a rank is lost"))));
        for event in [behind, stream.record()] {
            assert_eq!(event.wait().unwrap_err().to_string(), "a rank is lost", "seed {seed}");
        }
        assert!(stream.synchronize().is_err());
        assert!(before.wait().is_ok(), "an event never changes after it has ended");
        let mut read = [0.0f32; 3000];
        assert!(reader.read(x.view(), &mut read).is_err(), "what is read after a failure is not believed");
        assert_eq!(read, [0.0; 3000], "and is not written");
        stream.upload(y.view_mut(), &vec![1.0f32; 3000]);
    }
}

/// On a GPU of their own, which keeps its memory.
#[test]
fn a_wait_for_a_gpu_that_hangs_ends_and_one_for_a_slow_gpu_does_not() {
    if Cuda::count().unwrap() < 2 {
        return;
    }
    let device = Cuda::new(1, 8 << 20).unwrap();
    device.be_patient(Duration::from_millis(300));
    let stream = device.stream();
    let mut x = device.allocate(DType::F32, 100).unwrap();
    // 1 s of work, of which a part ends every 100 ms.
    let gates: Vec<_> = (0..10).map(|_| Gate::new()).collect();
    let parts: Vec<_> = gates
        .iter()
        .map(|gate| {
            stream.wait_for(&Event::new(gate.clone()));
            stream.zero(x.view_mut());
            stream.record()
        })
        .collect();
    let opener = std::thread::spawn(move || {
        for gate in gates {
            std::thread::sleep(Duration::from_millis(100));
            gate.end(Ok(()));
        }
    });
    stream.synchronize().unwrap();
    opener.join().unwrap();
    drop(parts);
    // And now nothing ends.
    let gate = Gate::new();
    stream.wait_for(&Event::new(gate.clone()));
    stream.zero(x.view_mut());
    let failure = stream.synchronize().unwrap_err();
    assert!(matches!(cuda_error(&failure), CudaError::Hung { ordinal: 1, .. }), "{failure}");
    let began = Instant::now();
    drop((stream, x, device));
    assert!(began.elapsed() < Duration::from_secs(10), "whatever is dropped does not wait again");
    gate.end(Ok(()));
}

#[test]
fn an_event_that_has_failed_stops_a_stream_at_once() {
    let device = cuda();
    let stream = device.stream();
    stream.wait_for(&Event::failed(Failure::new(std::io::Error::other("lost"))));
    let mut x = device.allocate(DType::F32, 10).unwrap();
    stream.zero(x.view_mut());
    assert_eq!(stream.synchronize().unwrap_err().to_string(), "lost");
}

#[test]
fn ids_beyond_the_vocabulary_are_errors() {
    let device = cuda();
    let stream = device.stream();
    let kernels = stream.kernels().unwrap();
    let [mut out, table] = [6, 6].map(|len| device.allocate(DType::F32, len).unwrap());
    let mut tokens = device.allocate(DType::U32, 3).unwrap();
    stream.upload(tokens.view_mut(), &[0u32, 3, 1]);
    kernels.embedding(out.view_mut(), table.view(), tokens.view());
    assert!(matches!(cuda_error(&stream.synchronize().unwrap_err()), CudaError::Token));

    let device = cuda();
    let stream = device.stream();
    let kernels = stream.kernels().unwrap();
    let [mut table, grad] = [6, 6].map(|len| device.allocate(DType::F32, len).unwrap());
    let mut tokens = device.allocate(DType::U32, 3).unwrap();
    stream.upload(tokens.view_mut(), &[0u32, 1, u32::MAX]);
    kernels.embedding_backward(table.view_mut(), grad.view(), tokens.view());
    assert!(matches!(cuda_error(&stream.record().wait().unwrap_err()), CudaError::Token));

    let device = cuda();
    let stream = device.stream();
    let kernels = stream.kernels().unwrap();
    let (mut logits, mut loss) = (device.allocate(DType::F32, 3).unwrap(), device.allocate(DType::F64, 1).unwrap());
    let mut targets = device.allocate(DType::U32, 1).unwrap();
    stream.upload(targets.view_mut(), &[3u32]);
    kernels.cross_entropy(logits.view_mut(), None, targets.view(), loss.view_mut(), 0.0);
    let failure = stream.download::<f64>(loss.view()).unwrap_err();
    assert!(matches!(cuda_error(&failure), CudaError::Target));
    assert!(failure.to_string().contains("vocabulary"));
}

#[test]
fn a_buffer_of_another_device_is_refused() {
    let other = pillion_kernels::Cpu;
    let (device, mut x) = (cuda(), other.allocate(DType::F32, 3).unwrap());
    let stream = device.stream();
    let refused = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| stream.zero(x.view_mut())));
    let text = *refused.unwrap_err().downcast::<String>().unwrap();
    assert!(text.contains("a stream of GPU 0 was given host memory"), "{text}");
}
