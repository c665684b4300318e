//! Visitors made by hand, who do what no rank does, and servers that do what rank 0 does not.

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv6Addr, TcpListener, TcpStream};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use super::message::{self, GET, SET};
use super::{Side, Store, TcpStore};
use crate::Meeting;
use crate::memory::fork::Child;
use crate::terms::Terms;
use crate::wire::tcp::greeting::{Greeting, MEETING, STORE};
use crate::wire::tcp::network::digest;

/// Only turns a hang into a failure.
const PATIENCE: Duration = Duration::from_secs(60);

fn free_address() -> String {
    Meeting::free_address().unwrap().to_string()
}

fn dial(address: &str) -> TcpStream {
    let socket = TcpStream::connect(address).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket
}

fn greeting(secret: &str, purpose: u64) -> Vec<u8> {
    let (token, terms, address) = (digest(secret), Terms::default(), Ipv6Addr::UNSPECIFIED.into());
    Greeting { token, purpose, rank: 0, number: 0, terms, port: 0, address, host: String::new() }.bytes().to_vec()
}

/// A connection that has greeted as a rank does, and is welcome.
fn welcome(address: &str) -> TcpStream {
    let mut socket = dial(address);
    socket.write_all(&greeting("right", STORE)).unwrap();
    let mut word = [1; 8];
    socket.read_exact(&mut word).unwrap();
    assert_eq!(word, [0; 8]);
    socket
}

fn has_ended(mut socket: TcpStream) -> bool {
    let ended = socket.read_to_end(&mut Vec::new());
    // What the server has not read resets the connection.
    ended.is_ok() || ended.is_err_and(|error| error.kind() == ErrorKind::ConnectionReset)
}

#[test]
fn strangers_garbage_and_silence_are_refused_and_counted_and_harm_nobody() {
    let address = free_address();
    let zero = TcpStore::serve(&address, "right", PATIENCE).unwrap();
    let one = TcpStore::visit(&address, "right", PATIENCE).unwrap();
    one.set("before", b"1").unwrap();
    let silent: Vec<TcpStream> = (0..300).map(|_| dial(&address)).collect();
    let mut half = dial(&address);
    half.write_all(&greeting("right", STORE)[..100]).unwrap();
    for (bytes, answer) in [
        (b"GET / HTTP/1.1\r\n\r\n".to_vec(), 4),
        (b"pilltcp9........".to_vec(), 5),
        (greeting("wrong", STORE), 11),
        (greeting("right", MEETING), 8),
    ] {
        let mut socket = dial(&address);
        socket.write_all(&bytes).unwrap();
        let mut word = [0; 8];
        // What follows the refused part may reset the connection before the answer is read.
        if socket.read_exact(&mut word).is_ok() {
            assert_eq!(u64::from_le_bytes(word), answer, "{}", String::from_utf8_lossy(&bytes));
        }
    }
    let head = |words: [u64; 3]| words.map(u64::to_le_bytes).concat();
    for request in [
        head([SET, 1, u64::MAX]),
        head([SET, u64::MAX, 1]),
        head([SET, 1, (16 << 20) + 1]),
        head([GET, 1025, 0]),
        head([GET, 1, 1]),
        head([9, 1, 0]),
        [head([GET, 1, 0]), vec![0xff]].concat(),
        [head([3, 1, 3]), b"xabc".to_vec()].concat(),
    ] {
        let mut socket = welcome(&address);
        socket.write_all(&request).unwrap();
        assert!(has_ended(socket), "{request:?}");
    }
    // A visitor that stops in the middle of a request, and one that reads no answer.
    let mut unfinished = welcome(&address);
    unfinished.write_all(&head([SET, 3, 1 << 20])).unwrap();
    zero.set("long", &vec![1; 16 << 20]).unwrap();
    let mut deaf = welcome(&address);
    deaf.write_all(&message::bytes(GET, b"long", b"")).unwrap();
    assert_eq!(one.get("before").unwrap().unwrap(), b"1");
    let two = TcpStore::visit(&address, "right", PATIENCE).unwrap();
    assert_eq!(two.add("count", 1).unwrap(), 1);
    let remark = zero.remark().unwrap();
    for count in ["did not greet as a rank does", "1 by another version", "1 with another secret", "1 with a rank"] {
        assert!(remark.contains(count), "{remark}");
    }
    let error = zero.wait("never", Duration::ZERO).unwrap_err().to_string();
    assert!(error.contains("connections were refused: "), "{error}");
    drop((silent, half));
}

#[test]
fn nothing_is_left_of_a_store_that_is_dropped() {
    let address = free_address();
    let zero = TcpStore::serve(&address, "right", PATIENCE).unwrap();
    let socket = welcome(&address);
    // A child keeps neither the listener nor the connections.
    let child = Child::fork();
    let Side::Server(server) = &zero.0 else { unreachable!() };
    let values = Arc::downgrade(server.values());
    drop(zero);
    assert!(values.upgrade().is_none(), "the thread still serves");
    assert!(has_ended(socket));
    assert_eq!(TcpStream::connect(&address).unwrap_err().kind(), ErrorKind::ConnectionRefused);
    drop(child);
    // The port is free at once, and a visitor comes to the new store.
    let one = TcpStore::visit(&address, "right", PATIENCE).unwrap();
    for value in [b"1", b"2"] {
        let zero = TcpStore::serve(&address, "right", PATIENCE).unwrap();
        zero.set("key", value).unwrap();
        assert_eq!(one.get("key").unwrap().unwrap(), value);
    }
}

#[test]
fn a_copy_of_its_bell_keeps_no_store() {
    let zero = TcpStore::serve(&free_address(), "right", PATIENCE).unwrap();
    let Side::Server(server) = &zero.0 else { unreachable!() };
    // As a child has one that was forked before the bell was guarded.
    let copy = server.bell().try_clone().unwrap();
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        drop(zero);
        sender.send(())
    });
    receiver.recv_timeout(PATIENCE).expect("the store waits for its thread");
    drop(copy);
}

#[test]
fn a_listener_that_sends_one_byte_after_the_other_moves_no_deadline() {
    let address = impostor(|socket| {
        let value = [12_u64, 1 << 20, 0].map(u64::to_le_bytes).concat();
        let _ = socket.write_all(&[&[0; 8][..], &value].concat());
        // Within the limit each, and for longer than this test.
        while socket.write_all(b"x").is_ok() {
            thread::sleep(Duration::from_millis(10));
        }
    });
    let (store, started) = (TcpStore::visit(&address, "right", Duration::from_millis(300)).unwrap(), Instant::now());
    let error = store.get("key").unwrap_err().to_string();
    assert!(error.contains("does not answer"), "{error}");
    assert!(started.elapsed() < PATIENCE, "it waited for the whole value");
}

#[test]
fn a_visitor_waits_for_rank_0_and_for_the_job_before_to_end() {
    let address = free_address();
    thread::scope(|scope| {
        let one = TcpStore::visit(&address, "right", PATIENCE).unwrap();
        let early = scope.spawn(move || one.wait("key", PATIENCE).unwrap());
        thread::sleep(Duration::from_millis(50));
        let before = TcpStore::serve(&address, "of the job before", PATIENCE).unwrap();
        let next = scope.spawn(|| TcpStore::serve(&address, "right", PATIENCE).unwrap());
        thread::sleep(Duration::from_millis(50));
        drop(before);
        let zero = next.join().unwrap();
        zero.set("key", b"value").unwrap();
        assert_eq!(early.join().unwrap(), b"value");
    });
}

#[test]
fn what_keeps_a_visitor_from_the_store_is_named_with_the_remedy() {
    let short = Duration::from_millis(300);
    let address = free_address();
    let error = |store: Result<TcpStore, crate::Error>| {
        store.and_then(|store| store.get("key")).err().map(|error| error.to_string()).unwrap_or_default()
    };
    let nobody = error(TcpStore::visit(&address, "right", short));
    assert!(nobody.contains(&format!("rank 0 does not serve it at {address}")), "{nobody}");
    for open in [TcpStore::visit, TcpStore::serve] {
        for (address, expected) in [
            ("head", "give host:port"),
            (":29400", "give host:port"),
            ("head:0", "is no number from 1 to 65535"),
            ("head:99999", "is no number from 1 to 65535"),
        ] {
            let nowhere = error(open(address, "right", short));
            assert!(nowhere.contains(expected), "{nowhere}");
        }
    }
    let zero = TcpStore::serve(&address, "right", short).unwrap();
    let taken = error(TcpStore::serve(&address, "right", short));
    assert!(taken.contains("cannot listen at port") && taken.contains("choose another port"), "{taken}");
    let stranger = error(TcpStore::visit(&address, "wrong", PATIENCE / 12));
    assert!(stranger.contains("one with another secret") && !stranger.contains("PILLION_SECRET"), "{stranger}");
    let one = TcpStore::visit(&address, "right", PATIENCE / 12).unwrap();
    let long = one.set(&"x".repeat(5000), b"").unwrap_err().to_string();
    assert!(long.contains("5000 bytes, and at most 1024 fit"), "{long}");
    let long = zero.set("x", &vec![0; (16 << 20) + 1]).unwrap_err().to_string();
    assert!(long.contains("at most 16777216 fit"), "{long}");
    one.set("key", b"").unwrap();
    drop(zero);
    let gone = one.get("key").unwrap_err().to_string();
    assert!(gone.contains(&address), "{gone}");
}

/// Listens, reads a greeting from each visitor, and answers it.
fn impostor(answer: impl Fn(&mut TcpStream) + Send + 'static) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    thread::spawn(move || {
        for socket in listener.incoming() {
            let mut socket = socket.unwrap();
            let _ = socket.read_exact(&mut vec![0; greeting("", STORE).len()]);
            answer(&mut socket);
        }
    });
    address
}

/// As [`impostor`], with these bytes for an answer.
fn impostor_that_says(said: &'static [u8]) -> String {
    impostor(move |socket| {
        let _ = socket.write_all(said);
        // Until the visitor has seen it.
        let _ = socket.set_read_timeout(Some(Duration::from_millis(100)));
        let _ = socket.read_to_end(&mut Vec::new());
    })
}

#[test]
fn servers_that_are_no_store_are_named() {
    for (said, expected) in [
        (&b""[..], "hung up"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "does not answer as rank 0 does"),
        (&[5, 0, 0, 0, 0, 0, 0, 0], "another version"),
        // A welcome, and then an answer that is none, or that is too long.
        (&[0; 40], "does not answer as rank 0 does"),
        (
            &[
                0, 0, 0, 0, 0, 0, 0, 0, 12, 0, 0, 0, 0, 0, 0, 0, 255, 255, 255, 255, 255, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
                0,
            ],
            "does not answer as rank 0 does",
        ),
    ] {
        let store = TcpStore::visit(&impostor_that_says(said), "right", Duration::from_secs(2)).unwrap();
        let error = store.get("key").unwrap_err().to_string();
        // Where this machine had no time within the limit, nobody answered.
        assert!(error.contains(expected) || error.contains("does not answer: is it"), "{error}");
    }
    // Whether this one was counted, nobody knows.
    let store = TcpStore::visit(&impostor_that_says(&[0; 8]), "right", PATIENCE).unwrap();
    let error = store.add("key", 1).unwrap_err().to_string();
    assert!(error.contains("nobody knows whether `add` was counted"), "{error}");
}
