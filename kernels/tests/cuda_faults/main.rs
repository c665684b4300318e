//! What a GPU's device does when something is missing or fails: each order that it asks the driver
//! for is dropped in turn, and each call and each kind of work fails in turn. Only over the
//! stand-ins of `tests/standins`, because a GPU does none of that on request.
//!
//! A fault is the whole process's, and an error of a context stays, so each test runs in a process
//! of its own.

#[path = "../cuda/gate.rs"]
mod gate;
#[path = "../cuda/standin.rs"]
mod standin;

use std::path::{Path, PathBuf};
use std::process::Command;

use gate::Gate;
use pillion_kernels::{Cuda, CudaError, DType, Device, Error, Event, Failure};

const BYTES: u64 = 48 << 20;

/// Runs a test in a process of its own.
fn alone(name: &str, test: impl FnOnce()) {
    alone_with(name, None, test);
}

/// The same, where the process finds the libraries of this folder alone.
fn alone_with(name: &str, libraries: Option<&Path>, test: impl FnOnce()) {
    const ALONE: &str = "PILLION_TEST_ALONE";
    if std::env::var_os(ALONE).is_some() {
        return test();
    }
    if !standin::is_there() {
        println!("SKIPPED: no stand-ins");
        return;
    }
    let program = std::env::current_exe().unwrap();
    let mut run = Command::new(program);
    run.args([name, "--exact", "--nocapture"]).env(ALONE, "1");
    if let Some(libraries) = libraries {
        run.env("LD_LIBRARY_PATH", libraries);
    }
    let run = run.output().unwrap();
    let text = String::from_utf8_lossy(&run.stdout).into_owned() + &String::from_utf8_lossy(&run.stderr);
    assert!(run.status.success() && text.contains("1 passed"), "{text}");
}

fn cuda_error(failure: &Failure) -> CudaError {
    match failure.cause::<Error>() {
        Some(Error::Cuda(error)) => error.clone(),
        other => panic!("{other:?} is no error of a GPU"),
    }
}

/// Work on three streams, and whether its result is right.
fn work(device: &Cuda) -> Result<bool, Failure> {
    let (first, second, third) = (device.stream(), device.stream(), device.stream());
    let [mut x, mut y, mut z] = [0; 3].map(|_| device.allocate(DType::F32, 5000).unwrap());
    first.upload(x.view_mut(), &vec![1.0f32; 5000]);
    second.wait_for(&first.record());
    second.accumulate(y.view_mut(), x.view());
    second.accumulate(y.view_mut(), x.view());
    third.upload(z.view_mut(), &vec![5.0f32; 5000]);
    first.wait_for(&second.record());
    first.zero(x.view_mut());
    third.wait_for(&second.record());
    third.accumulate(z.view_mut(), y.view());
    let (z, x, y) =
        (third.download::<f32>(z.view())?, first.download::<f32>(x.view())?, second.download::<f32>(y.view())?);
    Ok(z == vec![7.0; 5000] && x == vec![0.0; 5000] && y == vec![2.0; 5000])
}

#[test]
fn each_wait_between_streams_is_needed() {
    alone("each_wait_between_streams_is_needed", || {
        let device = Cuda::new(0, BYTES).unwrap();
        standin::reset(0);
        standin::skip("event wait", -1);
        assert!(work(&device).unwrap());
        let waits = standin::skip("event wait", -1);
        assert_eq!(waits, 3, "one for each wait of a stream for another");
        for wait in 0..waits {
            let wrong = (0..20).filter(|&seed| {
                standin::reset(seed);
                standin::skip("event wait", wait as i64);
                !work(&device).unwrap()
            });
            assert!(wrong.count() > 0, "nothing shows that wait {wait} is missing");
        }
        for seed in 0..20 {
            standin::reset(seed);
            assert!(work(&device).unwrap(), "nothing is missing, seed {seed}");
        }
    });
}

#[test]
fn a_wait_at_a_word_is_needed() {
    alone("a_wait_at_a_word_is_needed", || {
        let wrong = (0..20).filter(|&seed| {
            standin::reset(seed);
            let device = Cuda::new(0, BYTES).unwrap();
            let (stream, gate) = (device.stream(), Gate::new());
            let mut x = device.allocate(DType::F32, 100).unwrap();
            standin::skip("value wait", 0);
            stream.wait_for(&Event::new(gate.clone()));
            stream.upload(x.view_mut(), &[1.0f32; 100]);
            // With the wait, this would not return before the gate opens.
            let early = stream.download::<f32>(x.view()).is_ok();
            assert_eq!(standin::skip("value wait", -1), 1);
            gate.end(Ok(()));
            early
        });
        assert!(wrong.count() > 0);
    });
}

/// Some work of a kind fails; every event behind it does, too.
fn work_fails(what: &str) {
    let device = Cuda::new(0, BYTES).unwrap();
    let (stream, other) = (device.stream(), device.stream());
    let [mut x, y, w] = [64; 3].map(|len| device.allocate(DType::F32, len).unwrap());
    const ILLEGAL_ADDRESS: i32 = 700;
    standin::fail(what, 0, ILLEGAL_ADDRESS);
    stream.kernels().unwrap().linear(x.view_mut(), y.view(), w.view(), None, 8);
    stream.accumulate(x.view_mut(), y.view());
    stream.upload(x.view_mut(), &[1.0f32; 64]);
    let behind = stream.record();
    other.wait_for(&behind);
    other.zero(x.view_mut());
    for failure in [behind.wait(), other.synchronize(), stream.synchronize()] {
        let error = cuda_error(&failure.unwrap_err());
        let CudaError::Call { call, code, .. } = &error else { panic!("{error}") };
        assert!(call.starts_with("cu") && code.contains("ILLEGAL_ADDRESS"), "{what}: {error}");
    }
    assert!(stream.download::<f32>(x.view()).is_err());
}

#[test]
fn a_kernel_that_fails_ends_every_wait_with_its_error() {
    alone("a_kernel_that_fails_ends_every_wait_with_its_error", || work_fails("kernel"));
}

#[test]
fn a_copy_that_fails_ends_every_wait_with_its_error() {
    alone("a_copy_that_fails_ends_every_wait_with_its_error", || work_fails("copy"));
}

#[test]
fn a_product_that_fails_ends_every_wait_with_its_error() {
    alone("a_product_that_fails_ends_every_wait_with_its_error", || work_fails("product"));
}

#[test]
fn calls_that_fail_are_errors_that_name_them() {
    alone("calls_that_fail_are_errors_that_name_them", || {
        const UNKNOWN: i32 = 999;
        // While a rank's memory is set aside.
        for call in
            ["cuMemGetAllocationGranularity", "cuMemCreate", "cuMemAddressReserve", "cuMemMap", "cuMemSetAccess"]
        {
            standin::fail(call, 0, UNKNOWN);
            let Err(Error::Cuda(error @ CudaError::Call { .. })) = Cuda::new(0, BYTES) else { panic!("{call}") };
            assert!(error.to_string().contains(call), "{error}");
        }
        const OUT_OF_MEMORY: i32 = 2;
        standin::fail("cuMemCreate", 0, OUT_OF_MEMORY);
        assert!(matches!(Cuda::new(0, BYTES), Err(Error::Cuda(CudaError::Full { .. }))));
        // While a stream is made or used: its events fail.
        for call in [
            "cuStreamCreateWithPriority",
            "cuMemHostAlloc",
            "cuEventCreate",
            "cuEventRecord",
            "cuLaunchKernel",
            "cuMemcpyHtoDAsync_v2",
            "cuStreamWaitEvent",
            "cuStreamWaitValue32_v2",
            "cublasLtMatmul",
            "cublasLtMatmulAlgoGetHeuristic",
        ] {
            let device = Cuda::new(0, BYTES).unwrap();
            let [mut x, y] = [64; 2].map(|len| device.allocate(DType::F32, len).unwrap());
            let gate = Gate::new();
            let code = if call.starts_with("cublas") { 13 } else { UNKNOWN };
            standin::fail(call, 0, code);
            let (stream, other) = (device.stream(), device.stream());
            stream.upload(x.view_mut(), &[1.0f32; 64]);
            other.wait_for(&stream.record());
            stream.wait_for(&Event::new(gate.clone()));
            let kernels = stream.kernels().unwrap();
            kernels.linear(x.view_mut(), y.view(), y.view(), None, 8);
            stream.accumulate(x.view_mut(), y.view());
            gate.end(Ok(()));
            let failed = [stream.synchronize(), other.synchronize()].into_iter().find_map(Result::err);
            let error = cuda_error(&failed.unwrap_or_else(|| panic!("nobody noticed that {call} failed")));
            assert!(error.to_string().contains(call), "{call}: {error}");
            standin::fail(call, -1, 0);
        }
        // Nothing of that is left behind.
        assert!(work(&Cuda::new(0, BYTES).unwrap()).unwrap());
    });
}

/// A folder that has some of the libraries that this process finds.
fn folder_with(stems: &[&str]) -> PathBuf {
    let folder = std::env::temp_dir().join(format!("pillion-libraries-{}-{}", std::process::id(), stems.join("-")));
    std::fs::create_dir_all(&folder).unwrap();
    let path = std::env::var("LD_LIBRARY_PATH").unwrap_or_default();
    for entry in path.split(':').filter_map(|folder| std::fs::read_dir(folder).ok()).flatten().flatten() {
        let name = entry.file_name().into_string().unwrap();
        if stems.iter().any(|stem| name.starts_with(stem)) {
            let _ = std::os::unix::fs::symlink(entry.path(), folder.join(name));
        }
    }
    folder
}

/// Without one of the libraries, the error names it and the remedy.
fn is_missed(name: &str, present: &[&str], missing: &str) {
    let folder = folder_with(present);
    alone_with(name, Some(&folder), || {
        let Err(Error::Cuda(error @ CudaError::NoLibrary { .. })) = Cuda::new(0, BYTES) else { panic!("{missing}") };
        let text = error.to_string();
        assert!(text.contains(missing) && text.contains("install"), "{text}");
    });
    let _ = std::fs::remove_dir_all(folder);
}

#[test]
fn a_missing_driver_is_an_error() {
    is_missed("a_missing_driver_is_an_error", &["libnvrtc", "libcublasLt"], "libcuda.so.1");
}

#[test]
fn a_missing_compiler_is_an_error() {
    is_missed("a_missing_compiler_is_an_error", &["libcuda.so", "libcublasLt"], "libnvrtc.so");
}

#[test]
fn a_missing_library_of_products_is_an_error() {
    is_missed("a_missing_library_of_products_is_an_error", &["libcuda.so", "libnvrtc"], "libcublasLt.so");
}
