//! Ranks that meet: with strangers, with other settings, with ranks that end, and with children.

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv6Addr, TcpStream};
use std::process::Command;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use rustix::thread::UnshareFlags;

use super::{free_port, launches, open, patient};
use crate::memory::fork::Child;
use crate::terms::Terms;
use crate::wire::tcp::greeting::{Greeting, MEETING, Refusal};
use crate::wire::tcp::meeting::{Member, entry, members};
use crate::wire::tcp::network::digest;
use crate::wire::tcp::{Network, decline};
use crate::{Communicator, Error, Launch, Options};

/// What rank 1 says to rank 0.
fn visitor(token: u64, world: usize) -> Greeting {
    let (terms, address) = (Terms::of(&Launch::threads(world)[0], &patient(1.0)), Ipv6Addr::UNSPECIFIED.into());
    Greeting { token, purpose: MEETING, rank: 1, number: world as u64, terms, port: 9, address, host: "x".into() }
}

/// Connects to a rank 0 that is about to listen.
fn dial(port: u16) -> TcpStream {
    loop {
        match TcpStream::connect(("127.0.0.1", port)) {
            Ok(socket) => return socket,
            Err(_) => thread::yield_now(),
        }
    }
}

#[test]
fn strangers_are_turned_away_and_counted_and_ranks_meet_all_the_same() {
    let port = free_port();
    let jobs = launches(2, port, "right");
    let zero = jobs[0].clone();
    let serving = thread::spawn(move || Network::meet(&zero, &patient(20.0)));
    let greeting = |token, rank, world| Greeting { rank, ..visitor(token, world) }.bytes();
    let right = digest(&format!("right {port}"));
    let silent = dial(port);
    for (bytes, answer) in [
        (b"GET / HTTP/1.1\r\n\r\n".to_vec(), 4),
        (b"pilltcp9........".to_vec(), 5),
        (greeting(1, 1, 2).to_vec(), 6),
        (greeting(right, 1, 3).to_vec(), 7),
        (greeting(right, 2, 2).to_vec(), 8),
        (greeting(right, 0, 2).to_vec(), 8),
    ] {
        let mut socket = dial(port);
        socket.write_all(&bytes).unwrap();
        let mut word = [0; 8];
        // What follows the refused part may reset the connection before the answer is read.
        if socket.read_exact(&mut word).is_ok() {
            assert_eq!(u64::from_le_bytes(word), answer, "{}", String::from_utf8_lossy(&bytes));
        }
    }
    let one = Network::meet(&jobs[1], &patient(20.0)).unwrap();
    let zero = serving.join().unwrap().unwrap();
    assert_eq!((zero.host(1), one.host(0)), ("named host1", "named host0"));
    drop(silent);
}

#[test]
fn ranks_of_other_jobs_and_ranks_that_do_not_come_are_named() {
    let port = free_port();
    let zero = launches(3, port, "missing").remove(0);
    let serving = thread::spawn(move || Network::meet(&zero, &patient(3.0)).err().unwrap().to_string());
    // From the job's other ranks one has come, and waits; a rank of another job is refused
    // meanwhile.
    let mut other = launches(3, port, "other").remove(2);
    other.meeting.as_mut().unwrap().address = format!("localhost:{port}");
    let refused = Network::meet(&other, &patient(1.0)).err().unwrap().to_string();
    let error = serving.join().unwrap();
    assert!(error.contains("ranks 1 and 2 did not come"), "{error}");
    // Where this machine had no time for rank 0 within a second, nobody was refused.
    if !refused.contains("cannot be reached") {
        assert!(refused.contains("refused this rank") && refused.contains("PILLION_SECRET"), "{refused}");
        assert!(error.contains("of another job"), "{error}");
    }
    let nobody = launches(2, free_port(), "nobody").remove(1);
    let error = Network::meet(&nobody, &patient(0.3)).err().unwrap().to_string();
    assert!(error.contains("rank 0 cannot be reached at 127.0.0.1:"), "{error}");
    let nowhere = Launch { meeting: None, ..nobody };
    let error = Network::meet(&nowhere, &patient(0.3)).err().unwrap().to_string();
    assert!(error.contains("PILLION_ADDRESS=host:port"), "{error}");
}

#[test]
fn a_rank_with_another_setting_is_told_which_and_both_values_at_once() {
    let port = free_port();
    let jobs = launches(2, port, "terms");
    let (zero, options) = (jobs[0].clone(), patient(60.0));
    let serving = thread::spawn(move || Network::meet(&zero, &options));
    let more = Launch { world: 3, ..jobs[1].clone() };
    for (launch, options, named) in [
        (&more, patient(60.0), "the number of ranks is 3 on this rank and 2 on rank 0"),
        (
            &jobs[1],
            Options { reduce_groups: 2, ..patient(60.0) },
            "`reduce_groups` (--reduce-groups) is 2 on this rank and 1 on rank 0",
        ),
    ] {
        let error = Network::meet(launch, &options).err().unwrap().to_string();
        assert!(error.contains(named), "{error}");
        assert!(!serving.is_finished(), "rank 0 has not been waiting for this one");
    }
    Network::meet(&jobs[1], &patient(60.0)).unwrap();
    serving.join().unwrap().unwrap();
}

#[test]
fn ranks_offer_the_address_of_the_interface_that_they_are_told() {
    let port = free_port();
    let mut jobs = launches(3, port, "interfaces");
    // Every address of 127.0.0.0/8 reaches this host, but only a rank that offers it is there.
    jobs[0].interface = Some("127.0.0.1".to_owned());
    jobs[2].interface = Some("lo".to_owned());
    let networks: Vec<Arc<Network>> = thread::scope(|scope| {
        let start = |launch| scope.spawn(move || Network::meet(launch, &patient(20.0)).unwrap());
        let ranks: Vec<_> = jobs.iter().map(start).collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    });
    for network in networks {
        let offered = [0, 1, 2].map(|rank| network.address(rank).to_string());
        assert_eq!(offered, ["127.0.0.1", "::", "127.0.0.1"]);
    }
    let nowhere = Launch { interface: Some("docker9".to_owned()), ..jobs[1].clone() };
    for launch in [&nowhere, &Launch { rank: 0, ..nowhere.clone() }] {
        let error = Network::meet(launch, &patient(20.0)).err().unwrap().to_string();
        assert!(error.contains("PILLION_INTERFACE is \"docker9\"") && error.contains("lo (127.0.0.1"), "{error}");
    }
}

/// Runs `action` on a thread with networks of its own, where only root may: their loopback
/// interface is up, and listeners of IPv6 take no IPv4 unless they ask for it.
fn with_ipv6_apart<R: Send>(action: impl FnOnce() -> R + Send) -> Option<R> {
    let prepare = || -> Option<()> {
        // SAFETY: networks belong to the thread, which opens all its sockets afterwards.
        unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) }.ok()?;
        std::fs::write("/proc/sys/net/ipv6/bindv6only", "1").ok()?;
        Command::new("ip").args(["link", "set", "lo", "up"]).status().ok()?.success().then_some(())
    };
    let result = thread::scope(|scope| scope.spawn(|| prepare().map(|()| action())).join().unwrap());
    if result.is_none() {
        // Not by `eprintln`, which the test harness hides.
        let _ = writeln!(std::io::stderr(), "SKIPPED: net.ipv6.bindv6only: only root can set it, with iproute2");
    }
    result
}

#[test]
fn a_listener_takes_both_families_where_the_system_keeps_them_apart() {
    with_ipv6_apart(|| {
        let port = free_port();
        for address in ["127.0.0.1", "[::1]", "localhost"] {
            let mut jobs = launches(2, port, address);
            for launch in &mut jobs {
                launch.meeting.as_mut().unwrap().address = format!("{address}:{port}");
            }
            let [zero, one] = [0, 1].map(|rank| {
                let (launch, options) = (jobs[rank].clone(), patient(20.0));
                // A thread has the networks of the one that started it.
                thread::spawn(move || open(Network::meet(&launch, &options)?, &launch, "").map(drop))
            });
            zero.join().unwrap().unwrap();
            one.join().unwrap().unwrap();
        }
    });
}

#[test]
fn a_rank_that_dies_at_the_meeting_may_come_again() {
    let port = free_port();
    let jobs = launches(3, port, "again");
    let (zero, one) = (jobs[0].clone(), jobs[1].clone());
    let serving = thread::spawn(move || Network::meet(&zero, &patient(30.0)));
    // The first self of rank 1 greets, and is gone.
    let token = digest(&format!("again {port}"));
    let greeting = visitor(token, 3);
    let mut first = dial(port);
    first.write_all(&greeting.bytes()).unwrap();
    drop(first);
    let visiting = thread::spawn(move || Network::meet(&one, &patient(30.0)).unwrap());
    let two = Network::meet(&jobs[2], &patient(30.0)).unwrap();
    visiting.join().unwrap();
    serving.join().unwrap().unwrap();
    assert_eq!(two.host(1), "named host1");
}

/// Two ranks on each of two hosts, of which rank `dead` ends when the hosts have met; what the
/// others say.
fn a_death_before_the_wires(dead: usize) -> Vec<Error> {
    let port = free_port();
    let place = |launch: Launch| {
        let (local_rank, host) = (launch.rank % 2, Some(format!("host{}", launch.rank / 2)));
        Launch { local_rank, local_world: 2, host, ..launch }
    };
    let jobs: Vec<Launch> = launches(4, port, "death").into_iter().map(place).collect();
    thread::scope(|scope| {
        // One whose connections were taken by the kernel before the end has them reset.
        let connect = |launch| Communicator::connect(launch, patient(120.0)).and_then(|all| all.barrier());
        let start = |launch| scope.spawn(move || connect(launch).unwrap_err());
        let others: Vec<_> = jobs.iter().filter(|launch| launch.rank != dead).map(start).collect();
        drop(Network::meet(&jobs[dead], &patient(120.0)).unwrap());
        others.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

#[test]
fn a_rank_that_ends_before_it_is_connected_is_named_by_all_long_before_the_deadline() {
    for dead in [0, 1, 2, 3] {
        let started = Instant::now();
        for error in a_death_before_the_wires(dead) {
            // Beside others, where one of these has ended already for the same reason.
            let error = error.to_string();
            let mut numbers = error.split(|c: char| !c.is_ascii_digit());
            assert!(numbers.any(|number| number == dead.to_string()), "rank {dead}: {error}");
        }
        assert!(started.elapsed() < Duration::from_secs(60), "they waited for the deadline");
    }
}

#[test]
fn children_that_are_forked_while_ranks_meet_keep_no_connection_and_no_listener() {
    let port = free_port();
    let jobs = launches(2, port, "fork");
    let zero = jobs[0].clone();
    let serving = thread::spawn(move || Network::meet(&zero, &patient(60.0)));
    let mut silent = dial(port);
    // One that came later has its answer, so rank 0 has taken both in.
    let mut garbage = dial(port);
    garbage.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    // Or has been turned away so fast that it cannot read it.
    let _ = garbage.read_exact(&mut [0; 8]);
    let child = Child::fork();
    Network::meet(&jobs[1], &patient(60.0)).unwrap();
    serving.join().unwrap().unwrap();
    silent.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    let ended = silent.read(&mut [0]);
    assert!(matches!(&ended, Ok(0)) || ended.is_err_and(|error| error.kind() == ErrorKind::ConnectionReset), "kept");
    let refused = TcpStream::connect(("127.0.0.1", port)).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::ConnectionRefused, "{refused}");
    drop(child);
}

#[test]
fn a_rank_that_cannot_join_ends_the_wait_of_all() {
    // Each of three ranks in turn cannot; it is told what rank 0 has been told first.
    for quitter in [0, 1, 2] {
        let jobs = launches(3, free_port(), "decline");
        let started = Instant::now();
        thread::scope(|scope| {
            let meet = |launch| scope.spawn(move || Network::meet(launch, &patient(120.0)).err().unwrap());
            let others: Vec<_> = jobs.iter().filter(|launch| launch.rank != quitter).map(meet).collect();
            assert!(!decline(&jobs[quitter], 7), "rank 0 gives up for another reason");
            for other in others {
                assert!(matches!(other.join().unwrap(), Error::Aborted { .. }));
            }
        });
        assert!(started.elapsed() < Duration::from_secs(60), "they waited for the deadline");
    }
    let jobs = launches(3, free_port(), "all decline");
    let said = thread::scope(|scope| {
        let ranks: Vec<_> =
            jobs.iter().map(|launch| scope.spawn(|| decline(launch, 7 + launch.rank as u64 / 2))).collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect::<Vec<bool>>()
    });
    assert_eq!(said, [false, true, false], "the same reason as rank 0's need not be said again");
}

#[test]
fn connections_that_say_nothing_are_pushed_out() {
    let port = free_port();
    let jobs = launches(2, port, "flood");
    let zero = jobs[0].clone();
    let serving = thread::spawn(move || Network::meet(&zero, &patient(60.0)));
    let mut silent = Vec::new();
    while silent.len() < 400 {
        if let Ok(socket) = TcpStream::connect(("127.0.0.1", port)) {
            silent.push(socket);
        }
    }
    let one = Network::meet(&jobs[1], &patient(60.0)).unwrap();
    serving.join().unwrap().unwrap();
    assert_eq!(one.host(0), "named host0");
}

/// Rank 0 passes names on to ranks that must read the same.
#[test]
fn names_that_are_no_text_and_ports_that_cannot_be_are_refused() {
    let greeting = visitor(1, 2);
    let table = entry(&Member { address: "10.0.0.1:9".parse().unwrap(), host: "x".into() });
    assert_eq!(Greeting::parse(&greeting.bytes()), Ok(Some(greeting.clone())));
    assert_eq!(members(&table).map(|members| members.iter().flat_map(entry).collect()), Some(table.clone()));
    // The third byte of the port, and a byte of the name.
    for (in_greeting, in_table, byte) in [(42, 18, 1), (97, 25, 0xff)] {
        let (mut greeting, mut table) = (greeting.bytes(), table.clone());
        greeting[in_greeting] = byte;
        table[in_table] = byte;
        assert_eq!(Greeting::parse(&greeting), Err(Refusal::Garbage));
        assert_eq!(members(&table), None);
    }
}
