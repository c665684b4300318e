//! Several hosts without MPI: ranks that count themselves to different hosts (`PILLION_HOST`) meet
//! over the loopback interface, as torchrun's variables tell them, and train what one host trains.

use std::process::Command;

use pillion_collectives::Meeting;
use pillion_tests::hosts::Hosts;
use pillion_tests::program::{Ended, Running, TINY, Workplace};
use rustix::process::Signal;

const PROGRAM: &str = env!("CARGO_BIN_EXE_pillion-under-test");
const FLAGS: &str = "--steps 20 --eta 0.35";

/// A port whose successor, at which ranks meet, is free.
fn free_port() -> u16 {
    Meeting::free_address().unwrap().port() - 1
}

/// Rank `rank` of a job of `ranks` ranks on each of `hosts` hosts, with the variables of torchrun.
fn rank(place: &Workplace, rank: usize, [ranks, hosts]: [usize; 2], port: u16, arguments: &str) -> Command {
    let mut command = place.command(&format!("train {TINY} {arguments}"));
    let numbers = [
        ("RANK", rank),
        ("WORLD_SIZE", ranks * hosts),
        ("LOCAL_RANK", rank % ranks),
        ("LOCAL_WORLD_SIZE", ranks),
        ("MASTER_PORT", port.into()),
    ];
    command.envs(numbers.map(|(name, number)| (name, number.to_string())));
    command.env("MASTER_ADDR", "127.0.0.1").env("PILLION_HOST", format!("host{}", rank / ranks));
    command
}

fn start(place: &Workplace, shape: [usize; 2], arguments: &str) -> Vec<Running> {
    let port = free_port();
    // Rank 0, at which the others meet, comes last.
    let ranks = (0..shape[0] * shape[1]).rev();
    let mut running: Vec<Running> =
        ranks.map(|number| place.spawn(rank(place, number, shape, port, arguments))).collect();
    running.reverse();
    running
}

#[test]
fn hosts_without_mpi_train_the_bits_of_one() {
    let place = Workplace::new(PROGRAM);
    for (shape, flags, between, own) in [
        ([1, 2], "--gather window --max-batch 64", "torchrun, TCP)", "--ranks 2 --max-batch 64"),
        (
            [2, 2],
            "--gather copy --max-batch 64",
            "shared memory on each of 2 hosts, TCP between them",
            "--ranks 4 --reduce-groups 2 --max-batch 64",
        ),
        (
            [1, 3],
            "--mesh replicate=3,shard=1 --round-to 6 --batch 12 --max-batch 60",
            "torchrun, TCP)",
            "--ranks 3 --mesh replicate=3,shard=1 --round-to 6 --batch 12 --max-batch 60",
        ),
        (
            [2, 2],
            "--mesh replicate=2,shard=2 --precision bf16",
            "2 hosts, TCP between them",
            "--ranks 4 --mesh replicate=2,shard=2 --precision bf16",
        ),
    ] {
        let [ranks, hosts] = shape;
        let out = format!("{ranks}x{hosts}{}", flags.replace([' ', ',', '='], ""));
        let ended: Vec<Ended> = start(&place, shape, &format!("{FLAGS} {flags} --out {out}"))
            .into_iter()
            .map(|rank| rank.finish().succeeded())
            .collect();
        assert!(ended[0].stdout.contains(between), "{}", ended[0]);
        assert_eq!(place.steps(&out), place.train(&format!("{out}-own"), &format!("{FLAGS} {own}")), "{flags}");
    }
}

#[test]
fn our_own_launcher_spans_hosts() {
    let place = Workplace::new(PROGRAM);
    let address = Meeting::free_address().unwrap();
    let hosts = [1, 0].map(|host| {
        let nodes = format!("--ranks 2 --nodes 2 --node-rank {host} --address {address}");
        let mut command = place.command(&format!("train {TINY} {FLAGS} --max-batch 64 --out spanned {nodes}"));
        command.env("PILLION_HOST", format!("host{host}"));
        place.spawn(command)
    });
    let [one, zero] = hosts.map(|host| host.finish().succeeded());
    assert!(zero.stdout.contains("shared memory on each of 2 hosts, TCP between them"), "{zero}");
    assert_eq!(one.stdout, "", "only rank 0 prints");
    let own = place.train("one", &format!("{FLAGS} --max-batch 64 --ranks 4 --reduce-groups 2"));
    assert_eq!(place.steps("spanned"), own);
    // Others are started by somebody else, who says where they meet.
    for flags in ["--nodes 2 --node-rank 0", "--address 127.0.0.1:29400"] {
        let ended = place.spawn(rank(&place, 0, [1, 2], free_port(), &format!("--out out {flags}"))).finish();
        assert!(ended.code() == Some(2) && ended.stderr.contains("leave it out"), "{ended}");
    }
    for (flags, part) in [
        ("--nodes 2", "--node-rank"),
        ("--address 127.0.0.1:29400", "give --nodes and --node-rank as well"),
        ("--nodes 65536 --node-rank 0 --address 127.0.0.1:1 --ranks 17 --oversubscribe", "at most 1048576 make a job"),
        ("--address 127.0.0.1:0", "--address"),
        ("--address http://one:29400", "--address"),
        ("--node-rank 1", "--nodes"),
        ("--nodes 2 --node-rank 2 --address 127.0.0.1:1", "--node-rank 2 is none of --nodes 2"),
        ("--nodes 2 --node-rank 0", "--address HOST:PORT"),
        ("--nodes 2 --node-rank 0 --address 127.0.0.1", "node1:29400"),
        ("--nodes 2 --node-rank 0 --address 127.0.0.1:1 --launch threads", "--launch threads"),
        ("--nodes 2 --node-rank 0 --address 127.0.0.1:1 --backend shm", "only 1 of 2 ranks are on this host"),
    ] {
        let ended =
            place.run(&format!("train {TINY} {flags}{}", if flags.contains("--ranks") { "" } else { " --ranks 1" }));
        assert!(ended.code() == Some(2) && ended.stderr.contains(part), "{flags}: {ended}");
    }
}

#[test]
fn ranks_of_one_host_find_an_address_of_their_own() {
    let place = Workplace::new(PROGRAM);
    let flags = format!("{FLAGS} --max-batch 64");
    let own = place.train("own", &format!("{flags} --ranks 2"));
    for (number, launch) in
        ["--backend tcp", "--backend tcp --launch threads", "--backend hierarchical"].iter().enumerate()
    {
        let out = format!("tcp{number}");
        assert_eq!(place.train(&out, &format!("{flags} --ranks 2 {launch}")), own, "{launch}");
    }
}

#[test]
fn a_killed_rank_is_named_to_the_other_hosts() {
    let place = Workplace::new(PROGRAM);
    for (shape, killed) in [([1, 2], 1), ([2, 2], 3), ([1, 3], 0)] {
        let out = format!("killed{}x{}", shape[0], shape[1]);
        let endless = format!("--steps 100000 --samples 10000000 --round-to 12 --batch 12 --out {out}");
        let mut ranks = start(&place, shape, &endless);
        ranks[0].wait_for_step(&place, &out, 3);
        ranks[killed].signal(Signal::KILL);
        drop(ranks.remove(killed).finish());
        // Far below --timeout, whose 300 s nothing here waits for.
        let ended: Vec<Ended> = ranks.into_iter().map(Running::finish).collect();
        for ended in &ended {
            assert_ne!(ended.code(), Some(0), "{ended}");
            ended.has_no_panic();
        }
        // Whom another rank has told need not say it again.
        let named = ended.iter().filter(|ended| ended.stderr.contains(&format!("lost rank {killed}")));
        assert!(named.count() > 0, "{}", ended[0]);
    }
}

#[test]
fn what_is_missing_between_hosts_is_said_with_the_remedy() {
    let place = Workplace::new(PROGRAM);
    let mut command = rank(&place, 1, [1, 2], 29_500, "--out out --timeout 2");
    command.env("PILLION_ADDRESS", "127.0.0.1");
    let ended = place.spawn(command).finish();
    assert!(ended.code() == Some(2) && ended.stderr.contains("PILLION_ADDRESS"), "{ended}");
    let mut command = rank(&place, 1, [1, 2], free_port(), "--out out --timeout 2");
    command.env("PILLION_ADDRESS", Meeting::free_address().unwrap().to_string());
    let ended = place.spawn(command).finish();
    assert!(ended.stderr.contains("rank 0 cannot be reached at 127.0.0.1:"), "{ended}");
    assert_ne!(ended.code(), Some(0), "{ended}");
    // Another secret is another job.
    let port = free_port();
    let ranks = [1, 0].map(|number| {
        let mut command = rank(&place, number, [1, 2], port, "--out out --timeout 10");
        command.env("PILLION_SECRET", number.to_string());
        place.spawn(command)
    });
    let [one, zero] = ranks.map(Running::finish);
    assert!(one.stderr.contains("another PILLION_SECRET"), "{one}");
    assert!(zero.stderr.contains("rank 1 did not come") && zero.stderr.contains("another PILLION_SECRET"), "{zero}");
}

#[test]
fn a_setting_that_differs_is_named_with_both_values() {
    let place = Workplace::new(PROGRAM);
    for shape in [[2, 1], [1, 2]] {
        let port = free_port();
        let start = |number: usize, flags: &str| {
            place.spawn(rank(&place, number, shape, port, &format!("--out out --timeout 100 {flags}")))
        };
        // What decides how bytes move is compared where ranks meet, and rank 0 waits on.
        let zero = start(0, "--reduce-groups 1");
        let refused = start(1, "--reduce-groups 2").finish();
        assert_eq!(refused.code(), Some(1), "{refused}");
        let differs = "`reduce_groups` (--reduce-groups) is 2 on this rank and 1 on rank 0";
        assert!(refused.stderr.contains(differs), "{refused}");
        // All else when they have met.
        let one = start(1, "--reduce-groups 1 --steps 5").finish();
        let zero = zero.finish();
        for ended in [&zero, &one] {
            assert_eq!(ended.code(), Some(2), "{ended}");
            assert!(ended.stderr.contains("--steps is 5 on rank 1 and not given on rank 0"), "{ended}");
        }
        assert!(zero.stderr.contains("turned a rank away: `reduce_groups` (--reduce-groups) is 2 on rank 1"), "{zero}");
    }
}

#[test]
fn a_rank_that_cannot_join_ends_the_wait_of_other_hosts() {
    let place = Workplace::new(PROGRAM);
    for quitter in [0, 1] {
        let port = free_port();
        let ranks = [0, 1].map(|number| {
            let groups = if number == quitter { 3 } else { 1 };
            place.spawn(rank(&place, number, [1, 2], port, &format!("--out out --reduce-groups {groups}")))
        });
        for (number, ended) in ranks.map(Running::finish).iter().enumerate() {
            // Far below --timeout, whose 300 s nothing here waits for.
            let says = ended.stderr.contains("3 groups of reduction do not divide 2 ranks");
            assert_eq!(
                (ended.code(), says),
                (Some(if number == quitter { 2 } else { 69 }), number == quitter),
                "{ended}"
            );
        }
    }
}

#[test]
fn a_signal_ends_the_wait_for_other_ranks() {
    let place = Workplace::new(PROGRAM);
    for (shape, number, signal) in
        [([2, 1], 0, Signal::INT), ([2, 1], 1, Signal::TERM), ([1, 2], 0, Signal::TERM), ([1, 2], 1, Signal::INT)]
    {
        let running = place.spawn(rank(&place, number, shape, free_port(), "--out out"));
        let status = format!("/proc/{}/status", running.pid().as_raw_nonzero());
        running.wait_for("the handler of signals", || {
            let status = std::fs::read_to_string(&status).unwrap_or_default();
            let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:"));
            let caught = caught.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
            caught.is_some_and(|mask| mask >> (signal.as_raw() - 1) & 1 == 1)
        });
        running.signal(signal);
        let ended = running.finish();
        assert_eq!(ended.code(), Some(75), "{ended}");
        assert!(ended.stderr.contains("told to end while it waited for the other ranks at the start"), "{ended}");
    }
}

/// One rank on each of two hosts, as torchrun starts them.
fn on_hosts(hosts: &Hosts, place: &Workplace, arguments: &str) -> [Running; 2] {
    let program = place.program().display();
    [0, 1].map(|rank| {
        let line = format!("{program} train {TINY} {arguments}");
        let mut command = hosts.command(place, rank + 1, &line);
        for (name, value) in [("RANK", rank), ("WORLD_SIZE", 2), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)] {
            command.env(name, value.to_string());
        }
        command.env("MASTER_ADDR", "10.77.0.1").env("MASTER_PORT", "29500");
        place.spawn(command)
    })
}

#[test]
fn two_hosts_over_a_link_train_the_bits_of_one_and_know_when_it_goes_down() {
    let Some(hosts) = Hosts::new("pltcp", &[]) else { return };
    let place = Workplace::new(PROGRAM);
    let ended = on_hosts(&hosts, &place, &format!("{FLAGS} --max-batch 64 --out two")).map(Running::finish);
    let [zero, _] = ended.map(Ended::succeeded);
    assert!(zero.stdout.contains("torchrun, TCP)"), "{zero}");
    assert_eq!(place.steps("two"), place.train("one", &format!("{FLAGS} --max-batch 64 --ranks 2")));

    let endless = "--steps 100000 --samples 10000000 --timeout 3 --out down";
    let ranks = on_hosts(&hosts, &place, endless);
    ranks[0].wait_for_step(&place, "down", 3);
    let down = hosts.command(&place, 2, "ip link set eth0 down").status().expect("ip runs");
    assert!(down.success());
    let ended = ranks.map(Running::finish);
    for (rank, ended) in ended.iter().enumerate() {
        let other = 1 - rank;
        assert_ne!(ended.code(), Some(0), "{ended}");
        let names = [format!("for rank {other}"), format!("lost rank {other}")];
        assert!(names.iter().any(|name| ended.stderr.contains(name)), "{ended}");
    }
}
