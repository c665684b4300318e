//! Two hosts, made of network namespaces with a link of 1 Gbit/s between them, train what one host trains. Needs the feature `mpi`, Open MPI, and
//! root; says so where something is missing.

#![cfg(feature = "mpi")]

use std::process::Command;

use pillion_tests::hosts::Hosts;
use pillion_tests::program::{TINY, Workplace};

const PROGRAM: &str = env!("CARGO_BIN_EXE_pillion-under-test");
const FLAGS: &str = "--steps 20 --eta 0.35 --max-batch 64";

/// The program with `ranks` ranks on each host.
fn train(hosts: &Hosts, place: &Workplace, ranks: usize, arguments: &str) -> Command {
    let mut command = Command::new(Hosts::path("mpirun"));
    place.prepare(&mut command);
    command.args([hosts.name(), &ranks.to_string()]).arg(place.program());
    command.args(format!("train {TINY} {FLAGS} {arguments}").split_whitespace());
    command
}

#[test]
fn two_hosts_train_the_bits_of_one() {
    let Some(hosts) = Hosts::new("pltest", &["mpirun"]) else { return };
    let place = Workplace::new(PROGRAM);
    for gather in ["window", "copy"] {
        let out = format!("flat-{gather}");
        let arguments = format!("--gather {gather} --out {out}");
        let ended = place.spawn(train(&hosts, &place, 1, &arguments)).finish().succeeded();
        assert!(ended.stdout.contains("Open MPI, MPI)"), "{ended}");
        assert_eq!(place.steps(&out), place.train(&format!("own-{gather}"), &format!("{FLAGS} --ranks 2")));

        let out = format!("hierarchical-{gather}");
        let arguments = format!("--gather {gather} --out {out}");
        let ended = place.spawn(train(&hosts, &place, 2, &arguments)).finish().succeeded();
        assert!(ended.stdout.contains("shared memory on each of 2 hosts, MPI between them"), "{ended}");
        let one_host = place.train(&format!("groups-{gather}"), &format!("{FLAGS} --ranks 4 --reduce-groups 2"));
        assert_eq!(place.steps(&out), one_host);
    }
}

#[test]
fn a_rank_killed_on_one_host_ends_the_other() {
    let Some(hosts) = Hosts::new("plkill", &["mpirun"]) else { return };
    let place = Workplace::new(PROGRAM);
    let mut command = train(&hosts, &place, 1, "--out killed");
    command.args(["--steps", "100000", "--samples", "10000000", "--timeout", "20"]);
    let job = place.spawn(command);
    job.wait_for_step(&place, "killed", 3);
    let listing = Command::new("ip").args(["netns", "pids", "plkill2"]).output().expect("ip runs");
    let pids = String::from_utf8_lossy(&listing.stdout);
    let is_rank = |pid: &&str| {
        let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        name.trim() == "pillion-under-t"
    };
    let pid = pids.lines().find(is_rank).expect("a rank runs on the second host");
    let pid = rustix::process::Pid::from_raw(pid.parse().expect("a number")).expect("not 0");
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).expect("it can be killed");
    let ended = job.finish();
    assert_ne!(ended.code(), Some(0), "{ended}");
}
