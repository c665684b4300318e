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
        // Data that is given twice is a mixture.
        let tiny = if flags.contains("--data") { TINY.replace("--data text", "") } else { TINY.to_owned() };
        let Some(command) = place.mpirun(&format!("train {tiny} --out out {flags}")) else { return };
        let ended = place.spawn(command).finish();
        assert_eq!(ended.stderr.matches(part).count(), 1, "{ended}");
        assert_ne!(ended.code(), Some(0), "{ended}");
        ended.has_no_panic();
    }
}

/// The variables that torchrun sets, for one of two ranks of a job.
fn by_hand(place: &Workplace, job: &str, rank: usize, arguments: &str) -> Command {
    let mut command = place.command(arguments);
    for (name, value) in [("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", 2), ("LOCAL_WORLD_SIZE", 2)] {
        command.env(name, value.to_string());
    }
    // Names this job; nobody listens there. The process id keeps apart runs of these tests.
    command.env("MASTER_ADDR", job).env("MASTER_PORT", std::process::id().to_string());
    command
}

#[test]
fn variables_set_by_hand_give_the_bits_of_our_own_launcher() {
    let place = Workplace::new(PROGRAM);
    let arguments = format!("train {TINY} {FLAGS} --out hand");
    let ranks = [1, 0].map(|rank| place.spawn(by_hand(&place, "plain", rank, &arguments)));
    let [one, zero] = ranks.map(|rank| rank.finish().succeeded());
    assert!(zero.stdout.contains("torchrun, shared memory"), "{zero}");
    assert_eq!(one.stdout, "", "only rank 0 prints");
    assert_eq!(place.steps("hand"), place.train("own", &format!("{FLAGS} --ranks 2")));
}

/// Other instructions round differently, so each rank's gradients are its own; what decides was summed by all. Ranks that decide differently would end the run: with other rounds by
/// calling other collectives, and in any case by the batch that goes into each step's sums. The device runs work late, on each rank as it likes.
#[test]
fn ranks_with_other_instructions_decide_alike() {
    for (job, slower) in [("first", 0), ("second", 1)] {
        let place = Workplace::new(PROGRAM);
        let arguments = format!("train {TINY} {FLAGS} --device lazy-cpu --out out");
        let ranks = [1, 0].map(|rank| {
            let mut command = by_hand(&place, job, rank, &arguments);
            if rank == slower {
                command.env("PILLION_ISA", "portable");
            }
            place.spawn(command)
        });
        ranks.into_iter().for_each(|rank| drop(rank.finish().succeeded()));
        let batches: Vec<u64> = place.steps("out").iter().map(|step| step.batch_samples).collect();
        assert!(batches.len() == 20 && batches[19] > batches[0], "{batches:?}");
    }
}

#[test]
fn half_set_variables_are_named() {
    let place = Workplace::new(PROGRAM);
    let mut command = place.command(&format!("train {TINY} --out out"));
    command.env("RANK", "0").env("WORLD_SIZE", "2");
    place.spawn(command).finish().refused(1, &["RANK is set", "LOCAL_RANK is not", "torchrun"]);
}
