//! Streams and events: order, and what shows when an order is missing.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Poll, Wake, Waker};
use std::time::{Duration, Instant};

use pillion_kernels::{DType, Device, Event, LazyCpu, Stream};

use crate::devices::cuda;
use crate::gate::Gate;
use crate::standin;

#[test]
fn a_stream_runs_its_work_in_order_and_waits_for_other_streams() {
    for seed in 0..20 {
        standin::reset(seed);
        let device = cuda();
        let (first, second, third) = (device.stream(), device.stream(), device.stream());
        let [mut x, mut y, mut z] = [0; 3].map(|_| device.allocate(DType::F32, 5000).unwrap());
        first.upload(x.view_mut(), &vec![1.0f32; 5000]);
        first.accumulate(y.view_mut(), x.view());
        second.wait_for(&first.record());
        second.accumulate(y.view_mut(), x.view());
        third.wait_for(&Event::all([first.record(), second.record()]));
        third.copy(z.view_mut(), y.view());
        assert_eq!(third.download::<f32>(z.view()).unwrap(), vec![2.0; 5000], "seed {seed}");
    }
}

#[test]
fn a_missing_wait_shows_as_stale_values() {
    if !standin::is_there() {
        return;
    }
    let stale = (0..20)
        .filter(|&seed| {
            standin::reset(seed);
            let device = cuda();
            let (writer, reader) = (device.stream(), device.stream());
            let mut x = device.allocate(DType::F32, 100).unwrap();
            writer.upload(x.view_mut(), &[1.0f32; 100]);
            reader.download::<f32>(x.view()).unwrap() != [1.0; 100]
        })
        .count();
    assert!(stale > 0, "the stand-in runs work as soon as it is enqueued");
}

#[test]
fn a_stream_waits_for_an_event_of_another_kind_at_a_word() {
    for seed in 0..10 {
        standin::reset(seed);
        let (device, gate) = (cuda(), Gate::new());
        let stream = device.stream();
        let mut x = device.allocate(DType::F32, 10).unwrap();
        stream.wait_for(&Event::new(gate.clone()));
        stream.upload(x.view_mut(), &[1.0f32; 10]);
        let behind = stream.record();
        std::thread::sleep(Duration::from_millis(5));
        assert!(behind.status().is_pending(), "the event has not ended");
        let later = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(5));
            gate.end(Ok(()));
        });
        assert!(behind.wait().is_ok());
        later.join().unwrap();
        assert_eq!(stream.download::<f32>(x.view()).unwrap(), [1.0; 10]);
    }
}

/// On a GPU, and on a device of the host that runs its work later.
#[test]
fn a_place_in_a_stream_has_its_time_once_the_stream_has_come_there() {
    let devices: [Box<dyn Device>; 2] = [Box::new(cuda()), Box::new(LazyCpu::new(1))];
    for device in devices {
        let (stream, gate) = (device.stream(), Gate::new());
        let began = Instant::now();
        let before = stream.stamp();
        stream.record().wait().unwrap();
        stream.wait_for(&Event::new(gate.clone()));
        let after = stream.stamp();
        std::thread::sleep(Duration::from_millis(20));
        assert!(after.time().is_none(), "{}: the event has not ended", device.name());
        gate.end(Ok(()));
        stream.synchronize().unwrap();
        let (from, until, ended) = (before.time().unwrap(), after.time().unwrap(), Instant::now());
        // The driver rounds to 0.5 µs, and the anchor of its times is found by polling.
        let slack = Duration::from_millis(1);
        assert!(began <= from + slack && until <= ended + slack, "{}", device.name());
        assert!(until.duration_since(from) + slack >= Duration::from_millis(20), "{}", device.name());
    }
}

#[test]
fn many_waits_reuse_the_words() {
    let device = cuda();
    let stream = device.stream();
    let mut x = device.allocate(DType::F32, 1).unwrap();
    let one = {
        let mut one = device.allocate(DType::F32, 1).unwrap();
        stream.upload(one.view_mut(), &[1.0f32]);
        one
    };
    for _ in 0..3000 {
        let gate = Gate::new();
        stream.wait_for(&Event::new(gate.clone()));
        stream.accumulate(x.view_mut(), one.view());
        gate.end(Ok(()));
    }
    assert_eq!(stream.download::<f32>(x.view()).unwrap(), [3000.0]);
}

#[test]
fn other_devices_wait_for_a_stream_of_a_gpu() {
    struct Flag(AtomicBool);
    impl Wake for Flag {
        fn wake(self: Arc<Self>) {
            self.0.store(true, Ordering::Release);
        }
    }
    let device = cuda();
    let (stream, lazy) = (device.stream(), LazyCpu::new(1));
    let mut x = device.allocate(DType::F32, 1000).unwrap();
    stream.upload(x.view_mut(), &[1.0f32; 1000]);
    let event = stream.record();
    let flag = Arc::new(Flag(AtomicBool::new(false)));
    event.call_back(&Waker::from(flag.clone()));
    let other = lazy.stream();
    other.wait_for(&event);
    assert!(other.synchronize().is_ok());
    assert!(matches!(event.status(), Poll::Ready(Ok(()))));
    while !flag.0.load(Ordering::Acquire) {
        std::thread::yield_now();
    }
}

#[test]
fn waits_of_the_host_are_counted() {
    let device = cuda();
    let stream = device.stream();
    let mut x = device.allocate(DType::F32, 10).unwrap();
    stream.upload(x.view_mut(), &[1.0f32; 10]);
    stream.zero(x.view_mut());
    assert_eq!(stream.host_waits(), 0);
    stream.synchronize().unwrap();
    stream.download::<f32>(x.view()).unwrap();
    assert_eq!(stream.host_waits(), 2);
}

#[test]
fn a_long_upload_passes_through_the_ring_in_pieces() {
    // Three times as long as the ring.
    let data: Vec<u32> = (0..(24 << 20) / 4).collect();
    let device = cuda();
    let stream: Box<dyn Stream> = device.stream();
    let mut x = device.allocate(DType::U32, data.len()).unwrap();
    stream.upload(x.view_mut(), &data);
    assert!(stream.download::<u32>(x.view()).unwrap() == data);
}
