//! A process that is a rank forks a child, as Python's `multiprocessing` does, and both go on.

mod common;

use std::time::{Duration, Instant};

use common::run;
use pillion_collectives::{Error, Launch, Meeting, Options, Reduction, Start, Store, TcpStore};
use pillion_kernels::{Cpu, DType, Device, Event};

/// Runs `program` in a forked child, which ends with what it returns; its exit status, within 20 s.
fn in_child(program: impl FnOnce() -> i32) -> i32 {
    // SAFETY: the child only runs what the test gives it, and ends without unwinding: nothing here
    // relies on threads that it does not have.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let status = std::panic::catch_unwind(std::panic::AssertUnwindSafe(program)).unwrap_or(99);
        // SAFETY: ends the child at once.
        unsafe { libc::_exit(status) };
    }
    assert!(child > 0, "fork failed");
    let (started, mut status) = (Instant::now(), 0);
    // SAFETY: of this process's own child; the status is valid for the write.
    while unsafe { libc::waitpid(child, &mut status, libc::WNOHANG) } == 0 {
        if started.elapsed() > Duration::from_secs(20) {
            // SAFETY: it has not been waited for, so the number is still its.
            unsafe { libc::kill(child, libc::SIGKILL) };
            panic!("the child hangs");
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(libc::WIFEXITED(status), "the child ended by a signal: {status}");
    libc::WEXITSTATUS(status)
}

#[test]
fn a_child_is_told_does_no_harm_and_does_not_hang() {
    run(Launch::threads(2), Options::default(), |_, all| {
        let group = all.group(&[0, 1]).unwrap();
        let buffer = |value: f32| {
            let mut buffer = all.allocate(&Cpu, DType::F32, 1 << 20).unwrap();
            Cpu.stream().upload(buffer.view_mut(), &vec![value; 1 << 20]);
            buffer
        };
        let (kept, lost) = (buffer(1.0), buffer(2.0));
        let window = all.window(&Cpu, DType::F32, 64).unwrap();
        let mut window = all.gather_window(window, Event::PAST).wait().unwrap();
        let late = Cpu.allocate(DType::F32, 3).unwrap();
        let late = (all.rank() == 0).then(|| group.all_reduce(late, Reduction::Sum, Event::PAST));
        if let Some(late) = &late {
            let status = in_child(|| {
                // SAFETY: as below.
                let late = unsafe { std::ptr::read(late) };
                assert!(late.event().wait().unwrap_err().to_string().contains("forked this one"));
                let late = late.wait_timeout(Duration::from_secs(9)).map_err(drop).unwrap();
                assert!(late.unwrap_err().to_string().contains("forked this one"));
                8
            });
            assert_eq!(status, 8);
        }
        // Before this the other rank takes no part, so the operation is in flight.
        all.barrier().unwrap();
        let late = late.unwrap_or_else(|| {
            let own = Cpu.allocate(DType::F32, 3).unwrap();
            group.all_reduce(own, Reduction::Sum, Event::PAST)
        });
        late.wait().unwrap();
        if all.rank() == 0 {
            let status = in_child(|| {
                // SAFETY: the child has copies of its own, which it uses in place of these.
                let (all, group, kept, lost, mut window) = unsafe {
                    use std::ptr::read;
                    (read(&all), read(&group), read(&kept), read(&lost), read(&window))
                };
                let told = |result: Result<(), Error>| {
                    assert!(result.unwrap_err().to_string().contains("forked this one"));
                };
                told(all.barrier());
                told(all.healthy());
                told(group.allocate(&Cpu, DType::F32, 4).map(|_| ()));
                told(all.group(&[0]).map(|_| ()));
                told(all.all_reduce(lost, Reduction::Sum, Event::PAST).wait().map(|_| ()));
                let private = Cpu.allocate(DType::F32, 1).unwrap();
                told(group.all_reduce(private, Reduction::Sum, Start::Here).wait().map(|_| ()));
                all.abort("nobody hears this");
                window.release(&Event::PAST).unwrap();
                drop((window, group, all, kept));
                7
            });
            assert_eq!(status, 7);
        }
        group.barrier().unwrap();
        let sum = all.all_reduce(lost, Reduction::Sum, Event::PAST).wait().unwrap();
        assert_eq!(Cpu.stream().download::<f32>(sum.view()).unwrap(), vec![4.0; 1 << 20]);
        assert_eq!(Cpu.stream().download::<f32>(kept.view()).unwrap(), vec![1.0; 1 << 20]);
        window.release(&Event::PAST).unwrap();
        window.shard_mut(0).unwrap();
        all.barrier().unwrap();
    });
}

#[test]
fn a_child_joins_a_job_of_its_own() {
    run(Launch::threads(2), Options::default(), |_, all| {
        if all.rank() == 0 {
            let status = in_child(|| {
                let ranks = run(Launch::threads(2), Options::default(), |_, own| {
                    own.barrier().unwrap();
                    own.world()
                });
                ranks.iter().sum::<usize>() as i32
            });
            assert_eq!(status, 4);
        }
        all.barrier().unwrap();
    });
}

#[test]
fn a_child_is_told_that_it_serves_no_store_and_visits_none() {
    let address = Meeting::free_address().unwrap().to_string();
    let store = TcpStore::serve(&address, "secret", Duration::from_secs(20)).unwrap();
    store.set("key", b"value").unwrap();
    let visitor = TcpStore::visit(&address, "secret", Duration::from_secs(20)).unwrap();
    assert_eq!(visitor.get("key").unwrap().unwrap(), b"value");
    let status = in_child(|| {
        for error in
            [store.set("key", b"another").unwrap_err(), store.get("key").unwrap_err(), store.add("key", 1).unwrap_err()]
                .into_iter()
                .chain([visitor.get("key").unwrap_err(), visitor.add("key", 1).unwrap_err()])
        {
            assert!(error.to_string().contains("forked this one"), "{error}");
        }
        // As any other process may.
        let visited = TcpStore::visit(&address, "secret", Duration::from_secs(20)).unwrap();
        assert_eq!(visited.get("key").unwrap().unwrap(), b"value");
        8
    });
    assert_eq!(status, 8);
}
