//! `pillion doctor`: what it says of a machine, a job, and of what is missing.

use pillion_collectives::Meeting;
use pillion_tests::program::{Ended, Running, Workplace};

const PROGRAM: &str = env!("CARGO_BIN_EXE_pillion-under-test");

/// What rank 0 and rank 1 of a job of torchrun's say, on hosts of these names.
fn job<const N: usize>(place: &Workplace, hosts: [&str; 2], ranks: [usize; N], flags: &str) -> [Ended; N] {
    let port = Meeting::free_address().unwrap().port() - 1;
    let local_world = if hosts[0] == hosts[1] { 2 } else { 1 };
    let start = |rank: usize| {
        let mut command = place.command(&format!("doctor {flags}"));
        let local_rank = if local_world == 2 { rank } else { 0 };
        let numbers = [
            ("RANK", rank),
            ("WORLD_SIZE", 2),
            ("LOCAL_RANK", local_rank),
            ("LOCAL_WORLD_SIZE", local_world),
            ("MASTER_PORT", port.into()),
        ];
        command.envs(numbers.map(|(name, number)| (name, number.to_string())));
        command.env("MASTER_ADDR", "127.0.0.1").env("PILLION_HOST", hosts[rank]).env("PILLION_SECRET", "hush-hush");
        place.spawn(command)
    };
    ranks.map(start).map(Running::finish)
}

#[test]
fn a_machine_without_a_job_is_described() {
    let place = Workplace::new(PROGRAM);
    let ended = place.run("doctor").succeeded();
    for subject in ["started by", "memory", "ulimit -n", "huge pages", "processors here", "instructions", "networks"] {
        assert!(ended.stdout.contains(subject), "{subject}: {ended}");
    }
    assert!(ended.stdout.contains("lo: ") && ended.stdout.contains("pillion train --ranks N"), "{ended}");
    let mut command = place.command("doctor");
    command.env("PILLION_ISA", "portable").env("SLURM_JWT", "hush-hush");
    let ended = place.spawn(command).finish().succeeded();
    assert!(ended.stdout.contains("PILLION_ISA=portable") && !ended.stdout.contains("hush-hush"), "{ended}");
}

#[test]
fn a_job_says_what_connects_its_ranks_and_why() {
    let place = Workplace::new(PROGRAM);
    let [zero, one] = job(&place, ["a", "a"], [0, 1], "");
    let (zero, one) = (zero.succeeded(), one.succeeded());
    assert!(zero.stdout.contains("shared memory") && zero.stdout.contains("all ranks are on one host"), "{zero}");
    assert!(zero.stdout.contains("0 of 2; 0 of 2 on this host") && zero.stdout.contains("WORLD_SIZE=2"), "{zero}");
    assert!(!zero.stdout.contains("hush-hush"), "{zero}");
    assert_eq!(one.stdout, "", "only rank 0 prints");
    let [zero, _] = job(&place, ["a", "b"], [0, 1], "");
    let zero = zero.succeeded();
    assert!(zero.stdout.contains("TCP between all ranks") && zero.stdout.contains("no MPI is needed"), "{zero}");
    assert!(zero.stdout.contains("reached from 127.0.0.1") && zero.stdout.contains("keeps strangers out"), "{zero}");
}

#[test]
fn the_interface_that_a_rank_offers_is_said_and_one_that_there_is_not_is_refused() {
    let place = Workplace::new(PROGRAM);
    let say = |interface: &str| {
        let mut command = place.command("doctor --timeout 20");
        let port = Meeting::free_address().unwrap().port();
        for (name, value) in [("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "1")] {
            command.env(name, value);
        }
        command.env("PILLION_ADDRESS", format!("127.0.0.1:{port}")).env("MASTER_ADDR", "127.0.0.1");
        command.env("MASTER_PORT", "1").env("PILLION_INTERFACE", interface);
        place.spawn(command)
    };
    let refused = say("eth99").finish();
    assert_eq!(refused.code(), Some(1), "{refused}");
    for text in [&refused.stdout, &refused.stderr] {
        assert!(text.contains("eth99") && text.contains("lo (127.0.0.1"), "{refused}");
    }
    // No launcher's variables are there to join a job with.
    let mut command = place.command("doctor");
    command.env("PILLION_INTERFACE", "eth99");
    let alone = place.spawn(command).finish().succeeded();
    assert!(alone.stdout.contains("eth99") && alone.stdout.contains("choose one of"), "{alone}");
    let place = Workplace::new(PROGRAM);
    let mut command = place.command("doctor");
    command.env("PILLION_ADDRESS", "127.0.0.1:29400").env("PILLION_INTERFACE", "lo");
    let ended = place.spawn(command).finish().succeeded();
    assert!(ended.stdout.contains("offers 127.0.0.1 to ranks of other hosts"), "{ended}");
}

#[test]
fn what_a_job_lacks_is_said_with_the_remedy() {
    let place = Workplace::new(PROGRAM);
    let [zero] = job(&place, ["a", "a"], [0], "--timeout 1");
    assert!(zero.code() != Some(0) && zero.stderr.contains("ranks [1] did not come"), "{zero}");
    let mut command = place.command("doctor");
    command.env("RANK", "0");
    let ended = place.spawn(command).finish();
    assert!(ended.code() != Some(0) && ended.stderr.contains("WORLD_SIZE"), "{ended}");
    assert!(ended.stdout.contains("RANK=0") && ended.stdout.contains("instructions"), "{ended}");
    let ended = place.run("doctor --backend nonsense");
    assert_eq!(ended.code(), Some(2), "{ended}");
}
