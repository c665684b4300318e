//! Other launchers start the same run: Open MPI's `mpirun`, and torchrun's variables set by hand.

use std::process::Command;

use pillion_tests::program::{TINY, Workplace};

const PROGRAM: &str = env!("CARGO_BIN_EXE_pillion-under-test");
const FLAGS: &str = "--steps 20 --eta 0.35 --max-batch 64";

#[test]
fn mpirun_gives_the_bits_of_our_own_launcher() {
    let place = Workplace::new(PROGRAM);
    let Some(command) = place.mpirun(&format!("train {TINY} {FLAGS} --out mpi")) else { return };
    let ended = place.spawn(command).finish().succeeded();
    assert!(ended.stdout.contains("Open MPI, shared memory"), "{ended}");
    assert_eq!(place.steps("mpi"), place.train("own", &format!("{FLAGS} --ranks 2")));
}

#[test]
fn under_mpirun_a_refusal_is_said_once() {
    let place = Workplace::new(PROGRAM);
    for (flags, part) in [("--data nowhere", "nowhere: no such file"), ("--lr nan", "--lr NaN is out of range")] {
        let Some(command) = place.mpirun(&format!("train {TINY} --out out {flags}")) else { return };
        let ended = place.spawn(command).finish();
        assert_eq!(ended.stderr.matches(part).count(), 1, "{ended}");
        assert_ne!(ended.code(), Some(0), "{ended}");
        ended.has_no_panic();
    }
}

/// The variables that torchrun sets, for one of two ranks.
fn by_hand(place: &Workplace, rank: usize, arguments: &str) -> Command {
    let mut command = place.command(arguments);
    for (name, value) in [("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", 2), ("LOCAL_WORLD_SIZE", 2)] {
        command.env(name, value.to_string());
    }
    // Names this job; nobody listens there. The process id keeps apart tests that run at once.
    command.env("MASTER_ADDR", "localhost").env("MASTER_PORT", std::process::id().to_string());
    command
}

#[test]
fn variables_set_by_hand_give_the_bits_of_our_own_launcher() {
    let place = Workplace::new(PROGRAM);
    let arguments = format!("train {TINY} {FLAGS} --out hand");
    let ranks = [1, 0].map(|rank| place.spawn(by_hand(&place, rank, &arguments)));
    let [one, zero] = ranks.map(|rank| rank.finish().succeeded());
    assert!(zero.stdout.contains("torchrun, shared memory"), "{zero}");
    assert_eq!(one.stdout, "", "only rank 0 prints");
    assert_eq!(place.steps("hand"), place.train("own", &format!("{FLAGS} --ranks 2")));
}

#[test]
fn half_set_variables_are_named() {
    let place = Workplace::new(PROGRAM);
    let mut command = place.command(&format!("train {TINY} --out out"));
    command.env("RANK", "0").env("WORLD_SIZE", "2");
    place.spawn(command).finish().refused(1, &["RANK is set", "LOCAL_RANK is not", "torchrun"]);
}
