//! Ranks that are threads, each a host of its own, over the loopback interface.

mod meeting;
mod poller;

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use super::{Network, TcpWire};
use crate::hosts::Hosts;
use crate::memory::fork::Child;
use crate::wire::{Receipt, Wire};
use crate::{Error, Launch, Meeting, Options};

const LENGTHS: [usize; 5] = [0, 1, 7, 4096, 3 << 20];

fn free_port() -> u16 {
    Meeting::free_address().unwrap().port()
}

fn launches(world: usize, port: u16, secret: &str) -> Vec<Launch> {
    // Ranks of all tests are in one process.
    let meeting = Meeting { address: format!("127.0.0.1:{port}"), secret: format!("{secret} {port}") };
    let launch = |rank: usize| Launch {
        rank,
        local_rank: 0,
        local_world: 1,
        host: Some(format!("host{rank}")),
        meeting: Some(meeting.clone()),
        ..Launch::threads(world)[rank].clone()
    };
    (0..world).map(launch).collect()
}

fn patient(seconds: f64) -> Options {
    Options { startup_timeout: Duration::from_secs_f64(seconds), ..Options::default() }
}

fn open(network: Arc<Network>, launch: &Launch, name: &str) -> Result<TcpWire, Error> {
    let hosts = Hosts { ranks: (0..launch.world).map(|rank| vec![rank]).collect(), own: launch.rank };
    let members: Vec<usize> = (0..launch.world).collect();
    TcpWire::open(network, &members, launch.rank, &hosts, name, Duration::from_secs(20))
}

/// Runs `program` on `world` ranks, each with its end of a wire.
fn ranks<R: Send>(world: usize, program: impl Fn(&Launch, TcpWire) -> R + Sync) -> Vec<R> {
    let launches = launches(world, free_port(), "tests");
    thread::scope(|scope| {
        let start = |launch: Launch| {
            let program = &program;
            scope.spawn(move || {
                let network = Network::meet(&launch, &patient(20.0)).unwrap();
                program(&launch, open(network, &launch, "").unwrap())
            })
        };
        let handles: Vec<_> = launches.into_iter().map(start).collect();
        handles.into_iter().map(|handle| handle.join().expect("a rank does not panic")).collect()
    })
}

/// The memory of a message in flight: leaked, as a failed wire may use it for ever.
fn memory(bytes: Vec<u8>) -> &'static mut [u8] {
    Box::leak(bytes.into_boxed_slice())
}

fn send(wire: &mut TcpWire, to: usize, tag: u8, bytes: Vec<u8>) -> Receipt {
    let bytes = memory(bytes);
    // SAFETY: the bytes stay for ever, and nobody changes them.
    unsafe { wire.send(to, tag, bytes.as_ptr(), bytes.len()) }.unwrap()
}

fn receive(wire: &mut TcpWire, from: usize, tag: u8, len: usize) -> (Receipt, *mut [u8]) {
    let bytes: *mut [u8] = memory(vec![0; len]);
    // SAFETY: the bytes stay for ever, and are read once the request is complete.
    (unsafe { wire.receive(from, tag, bytes.cast(), len) }.unwrap(), bytes)
}

fn wait(wire: &mut TcpWire, request: &Receipt) -> Result<(), Error> {
    let started = Instant::now();
    while !wire.test(request)? {
        assert!(started.elapsed() < Duration::from_secs(30), "a message hangs");
        thread::yield_now();
    }
    Ok(())
}

fn content(from: usize, tag: u8, len: usize) -> Vec<u8> {
    (0..len).map(|index| (index * 31 + from * 7 + usize::from(tag)) as u8).collect()
}

#[test]
fn messages_arrive_in_order_and_whole_in_both_directions() {
    ranks(3, |launch, mut wire| {
        let peers = || (0..3).filter(|&peer| peer != launch.rank);
        let mut sent = Vec::new();
        for (peer, tag) in peers().flat_map(|peer| super::TAGS.map(|tag| (peer, tag))) {
            sent.extend(LENGTHS.map(|len| send(&mut wire, peer, tag, content(launch.rank, tag, len))));
        }
        let mut received = Vec::new();
        for (peer, tag) in peers().flat_map(|peer| super::TAGS.map(|tag| (peer, tag))) {
            for len in LENGTHS {
                received.push((peer, tag, len, receive(&mut wire, peer, tag, len)));
            }
        }
        // In turn, since long messages need the other side.
        while !sent.is_empty() || !received.is_empty() {
            sent.retain(|request| !wire.test(request).unwrap());
            received.retain(|(peer, tag, len, (request, bytes))| {
                let complete = wire.test(request).unwrap();
                if complete {
                    // SAFETY: the message is complete.
                    let bytes = unsafe { &**bytes };
                    assert!(bytes == content(*peer, *tag, *len), "from {peer}, tag {tag}, {len}");
                }
                !complete
            });
        }
    });
}

#[test]
fn a_message_that_nobody_asks_for_holds_up_no_other_tag() {
    ranks(2, |launch, mut wire| {
        if launch.rank == 0 {
            // More than the kernel's buffers hold.
            let first = send(&mut wire, 1, 0, vec![1; 64 << 20]);
            let second = send(&mut wire, 1, 1, vec![2; 5]);
            wait(&mut wire, &second).unwrap();
            let (answer, _) = receive(&mut wire, 1, 1, 1);
            while !wire.test(&answer).unwrap() {
                let _ = wire.test(&first).unwrap();
            }
            wait(&mut wire, &first).unwrap();
        } else {
            let (second, bytes) = receive(&mut wire, 0, 1, 5);
            wait(&mut wire, &second).unwrap();
            // SAFETY: the message is complete.
            assert_eq!(unsafe { &*bytes }, [2; 5]);
            let answer = send(&mut wire, 0, 1, vec![3]);
            wait(&mut wire, &answer).unwrap();
            let (first, _) = receive(&mut wire, 0, 0, 64 << 20);
            wait(&mut wire, &first).unwrap();
        }
    });
}

#[test]
fn a_message_of_another_length_is_an_error_that_stays() {
    for (sent, expected) in [(0, 1), (1, 0), (10, 5), (5, 10), (1 << 20, 100)] {
        ranks(2, |launch, mut wire| {
            if launch.rank == 0 {
                let request = send(&mut wire, 1, 2, vec![1; sent]);
                // The other rank may have hung up by the end of a long one.
                let _ = wait(&mut wire, &request);
                return;
            }
            let (request, _) = receive(&mut wire, 0, 2, expected);
            let error = wait(&mut wire, &request).unwrap_err().to_string();
            assert!(error.contains(&format!("rank 0 sent {sent} bytes where {expected} were expected")), "{error}");
            assert_eq!(wire.test(&request).unwrap_err().to_string(), error);
        });
    }
}

#[test]
fn a_rank_that_gives_up_leaves_or_is_lost_is_told_apart() {
    let heard = |wire: &mut TcpWire| {
        let started = Instant::now();
        loop {
            match wire.failure() {
                Some(error) => return error,
                None => assert!(started.elapsed() < Duration::from_secs(30), "nothing is heard"),
            }
            thread::yield_now();
        }
    };
    for reason in ["disk full".to_owned(), String::new(), "é".repeat(400)] {
        ranks(3, |launch, mut wire| {
            if launch.rank == 2 {
                wire.abort(&reason);
                return wire.abort("only the first reason counts");
            }
            match heard(&mut wire) {
                Error::Aborted { rank: 2, reason: said } => {
                    assert_eq!(said, reason.chars().take(256).collect::<String>())
                }
                other => panic!("{other}"),
            }
        });
    }
    ranks(2, |launch, mut wire| {
        if launch.rank == 0 {
            // As at the end of a process: nothing is said.
            wire.peers[1].as_mut().unwrap().control.vanish();
            return;
        }
        assert!(matches!(heard(&mut wire), Error::PeerLost { rank: 0, .. }));
    });
    ranks(2, |launch, mut wire| {
        if launch.rank == 0 {
            return drop(wire);
        }
        // In order: nobody minds, unless something was still to come.
        let (request, _) = receive(&mut wire, 0, 0, 1);
        let error = wait(&mut wire, &request).unwrap_err();
        assert!(matches!(error, Error::PeerLost { rank: 0, .. }), "{error}");
        assert!(wire.failure().is_none());
    });
}

#[test]
fn a_rank_is_lost_though_a_child_that_it_forked_lives_on() {
    ranks(2, |launch, mut wire| {
        if launch.rank == 0 {
            let child = Child::fork();
            // As at the end of a process: nothing is said.
            wire.peers[1].as_mut().unwrap().control.vanish();
            drop(wire);
            return Some(child);
        }
        let started = Instant::now();
        let error = loop {
            if let Some(error) = wire.failure() {
                break error;
            }
            assert!(started.elapsed() < Duration::from_secs(30), "nothing is heard");
            thread::yield_now();
        };
        assert!(matches!(error, Error::PeerLost { rank: 0, .. }), "{error}");
        None
    });
}

#[test]
fn one_port_serves_twenty_restarts_and_two_communicators_share_a_network() {
    let port = free_port();
    for restart in 0..20 {
        let jobs = launches(2, port, &format!("restart {restart}"));
        thread::scope(|scope| {
            for launch in &jobs {
                scope.spawn(move || {
                    let options = patient(20.0);
                    let network = Network::meet(launch, &options).unwrap();
                    let mut wires = ["", "+0.0"].map(|name| open(network.clone(), launch, name).unwrap());
                    // What an open has not taken is nobody's.
                    assert!(network.nobody_has_arrived());
                    for (number, wire) in wires.iter_mut().enumerate() {
                        let peer = 1 - launch.rank;
                        let sent = send(wire, peer, 0, vec![number as u8]);
                        let (received, bytes) = receive(wire, peer, 0, 1);
                        wait(wire, &sent).unwrap();
                        wait(wire, &received).unwrap();
                        // SAFETY: the message is complete.
                        assert_eq!(unsafe { &*bytes }, [number as u8]);
                    }
                });
            }
        });
    }
}
