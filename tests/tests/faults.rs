//! Ranks that die, stop, or are asked to end: the others say who it was, and nothing stays behind.

use std::fs;
use std::process::Command;
use std::time::Duration;

use pillion_tests::program::{Running, TINY, Workplace, is_alive, variable};
use rustix::process::{Pid, Signal, kill_process};

const PROGRAM: &str = env!("CARGO_BIN_EXE_pillion-under-test");

/// More steps than a test waits for.
const LONG: &str = "--samples 1000000 --validate-every 0";

/// A run of four ranks that has made a few steps.
fn four_ranks(place: &Workplace, flags: &str) -> (Running, Vec<Pid>, String) {
    let running = place.start(&format!("train {TINY} {LONG} --out out --ranks 4 {flags}"));
    let ranks = running.ranks(4);
    let job = variable(ranks[0], "PILLION_JOB").expect("our launcher names the job");
    running.wait_for_step(place, "out", 3);
    (running, ranks, job)
}

fn nothing_is_left(ranks: &[Pid], job: &str) {
    for &rank in ranks {
        assert!(!is_alive(rank), "process {rank:?}");
    }
    let sockets = fs::read_to_string("/proc/net/unix").unwrap();
    assert!(!sockets.contains(&format!("pillion/{job}")), "the job's socket");
    for entry in fs::read_dir("/dev/shm").into_iter().flatten().flatten() {
        assert!(!entry.file_name().to_string_lossy().contains("pillion"), "{entry:?}");
    }
}

#[test]
fn every_rank_names_one_that_was_killed() {
    for flags in ["", "--gather copy"] {
        let place = Workplace::new(PROGRAM);
        let (running, ranks, job) = four_ranks(&place, flags);
        kill_process(ranks[2], Signal::KILL).unwrap();
        let ended = running.finish();
        for rank in [0, 1, 3] {
            let line = format!("pillion: rank {rank}: lost rank 2 (");
            assert_eq!(ended.stderr.matches(&line).count(), 1, "{line}\n{ended}");
        }
        assert!(ended.stderr.contains("pillion: rank 2 was killed by signal 9 (SIGKILL)\n"), "{ended}");
        assert_eq!(ended.code(), Some(128 + 9), "{ended}");
        ended.has_no_panic();
        nothing_is_left(&ranks, &job);
    }
}

#[test]
fn a_stopped_rank_is_named_and_ended() {
    let place = Workplace::new(PROGRAM);
    let (running, ranks, job) = four_ranks(&place, "--timeout 2");
    kill_process(ranks[2], Signal::STOP).unwrap();
    let ended = running.finish();
    for rank in [0, 1, 3] {
        let lines: Vec<&str> = ended.stderr.lines().filter(|line| line.contains(&format!("rank {rank}: "))).collect();
        // Who notices last may find another gone, and names whom that one named.
        let named = |line: &&str| line.contains("waited 2 s for rank 2") || line.contains("lost rank 2 (");
        assert!(lines.len() == 1 && lines.iter().all(named), "rank {rank}: {lines:?}\n{ended}");
    }
    assert!(ended.stderr.contains("ending with SIGKILL") && ended.stderr.contains(": rank 2\n"), "{ended}");
    assert_eq!(ended.code(), Some(1), "{ended}");
    ended.has_no_panic();
    nothing_is_left(&ranks, &job);
}

#[test]
fn nothing_outlives_a_killed_launcher() {
    let place = Workplace::new(PROGRAM);
    let (running, ranks, job) = four_ranks(&place, "");
    running.signal(Signal::KILL);
    running.wait_for("the ranks' end", || !ranks.iter().any(|&rank| is_alive(rank)));
    // The kernel closes a dead process's sockets a moment after it is seen to be dead.
    running.wait_for("the socket's end", || {
        !fs::read_to_string("/proc/net/unix").unwrap().contains(&format!("pillion/{job}"))
    });
    nothing_is_left(&ranks, &job);
}

#[test]
fn a_signal_to_the_launcher_or_to_one_rank_saves_and_the_run_goes_on() {
    for (signal, to_launcher, launch) in [
        (Signal::TERM, true, "processes"),
        (Signal::INT, true, "processes"),
        (Signal::USR1, true, "processes"),
        (Signal::USR1, false, "processes"),
        (Signal::HUP, true, "processes"),
        (Signal::USR2, true, "threads"),
        (Signal::XCPU, true, "processes"),
        (Signal::TERM, false, "processes"),
        (Signal::INT, true, "threads"),
    ] {
        let place = Workplace::new(PROGRAM);
        let flags = format!("train {TINY} {LONG} --out out --ranks 2 --launch {launch}");
        let running = place.start(&flags);
        running.wait_for_step(&place, "out", 3);
        match to_launcher {
            true => running.signal(signal),
            // As a job scheduler may do it.
            false => kill_process(running.ranks(2)[1], signal).unwrap(),
        }
        let ended = running.finish();
        assert_eq!((ended.code(), ended.stderr.as_str()), (Some(75), ""), "{ended}");
        let steps = place.steps("out");
        let last = steps.last().unwrap().step;
        let said =
            format!("interrupted: saved out/checkpoints/step-{last:08} after step {last}; go on with --resume auto\n");
        assert!(ended.stdout.ends_with(&said), "{said}{ended}");
        assert_eq!(place.checkpoints("out"), [format!("step-{last:08}")]);

        let more = last + 2;
        let resumed = place.run(&format!("{flags} --resume auto --steps {more}")).succeeded();
        assert!(resumed.stdout.contains(&format!("after step {last}: ")), "{resumed}");
        assert_eq!(place.steps("out").len() as u64, more);
        assert_eq!(place.steps("out")[..last as usize], steps);
    }
}

#[test]
fn a_hangup_that_is_ignored_from_the_start_stays_ignored() {
    let place = Workplace::new(PROGRAM);
    // As nohup does it.
    let mut command = Command::new("sh");
    command.args(["-c", "trap '' HUP; exec \"$@\"", "sh"]).arg(place.program());
    command.args(format!("train {TINY} {LONG} --out out --ranks 2").split_whitespace());
    place.prepare(&mut command);
    let running = place.spawn(command);
    let ranks = running.ranks(2);
    running.wait_for_step(&place, "out", 3);
    running.signal(Signal::HUP);
    kill_process(ranks[1], Signal::HUP).unwrap();
    running.wait_for_step(&place, "out", place.steps("out").len() + 5);
    running.signal(Signal::TERM);
    let ended = running.finish();
    assert_eq!((ended.code(), ended.stderr.as_str()), (Some(75), ""), "{ended}");
}

#[test]
fn a_processor_time_that_is_used_up_ends_the_run_however_often_the_kernel_says_so() {
    let place = Workplace::new(PROGRAM);
    let running = place.start(&format!("train {TINY} {LONG} --out out --ranks 2"));
    let ranks = running.ranks(2);
    running.wait_for_step(&place, "out", 3);
    // Some at one rank, which asks the others.
    for _ in 0..3 {
        let _ = kill_process(ranks[0], Signal::XCPU);
        std::thread::sleep(Duration::from_millis(5));
    }
    let ended = running.finish();
    assert_eq!((ended.code(), ended.stderr.as_str()), (Some(75), ""), "{ended}");
}

#[test]
fn ranks_whose_torchrun_is_killed_save_and_end() {
    let place = Workplace::new(PROGRAM);
    // An agent as torchrun is one: it has no variables of a rank, and dies of a signal that it does
    // not know.
    let mut command = Command::new("env");
    let start = "export WORLD_SIZE=2 LOCAL_WORLD_SIZE=2 MASTER_ADDR=localhost MASTER_PORT=29500 TORCHELASTIC_RUN_ID=none; \
                 for rank in 0 1; do RANK=$rank LOCAL_RANK=$rank \"$@\" & echo $! >> pids; done; wait";
    command.args(["--default-signal", "sh", "-c", start, "sh"]).arg(place.program());
    command.args(format!("train {TINY} {LONG} --out out").split_whitespace());
    place.prepare(&mut command);
    let running = place.spawn(command);
    running.wait_for_step(&place, "out", 3);
    let pids = fs::read_to_string(place.path("pids")).unwrap();
    let ranks: Vec<Pid> = pids.lines().map(|pid| Pid::from_raw(pid.parse().unwrap()).unwrap()).collect();
    assert!(ranks.len() == 2 && ranks.iter().all(|&rank| is_alive(rank)));
    running.signal(Signal::USR1);
    running.wait_for("the ranks' end", || !ranks.iter().any(|&rank| is_alive(rank)));
    let ended = running.finish();
    let said = "pillion: the torchrun process that started these ranks is gone: ending early\n";
    assert_eq!(ended.stderr.matches(said).count(), 1, "{ended}");
    assert!(ended.stdout.contains("interrupted: saved out/checkpoints/step-"), "{ended}");
    assert_eq!(place.checkpoints("out").len(), 1, "{ended}");
}

#[test]
fn a_signal_before_the_first_step_ends_the_run_and_says_that_nothing_was_saved() {
    let place = Workplace::new(PROGRAM);
    // Enough validation before the first step for a signal to come in time.
    place.write_text("long", 400);
    let tiny = TINY.replace("--data text", "--data long");
    let flags = format!("train {tiny} {LONG} --validation-samples 6000 --out out --ranks 2");
    for signal in [Signal::INT, Signal::TERM] {
        let running = place.start(&flags);
        running.wait_for_stdout("tokens:");
        running.signal(signal);
        let ended = running.finish();
        assert_eq!((ended.code(), ended.stderr.as_str()), (Some(75), ""), "{ended}");
        assert!(ended.stdout.ends_with("interrupted before the first step: nothing was saved\n"), "{ended}");
        assert!(place.steps("out").is_empty());
        assert!(place.checkpoints("out").is_empty());
    }
}

#[test]
fn a_signal_that_is_sent_twice_counts_once() {
    let place = Workplace::new(PROGRAM);
    for launch in ["processes", "threads"] {
        let running = place.start(&format!("train {TINY} {LONG} --out {launch} --ranks 2 --launch {launch}"));
        running.wait_for_step(&place, launch, 3);
        // As `timeout` does it, to the process and to its group; a moment apart, or the system delivers one.
        running.signal(Signal::TERM);
        std::thread::sleep(Duration::from_millis(2));
        if place.checkpoints(launch).is_empty() {
            running.signal(Signal::TERM);
        }
        let ended = running.finish();
        assert_eq!((ended.code(), ended.stderr.as_str()), (Some(75), ""), "{ended}");
        assert_eq!(place.checkpoints(launch).len(), 1, "{ended}");
    }
}

#[test]
fn two_kinds_of_signals_at_once_end_a_run_saved() {
    // Service managers send HUP beside TERM, schedulers USR1 before it.
    for (first, second) in [(Signal::TERM, Signal::HUP), (Signal::USR1, Signal::TERM), (Signal::INT, Signal::TERM)] {
        let place = Workplace::new(PROGRAM);
        let running = place.start(&format!("train {TINY} {LONG} --out out --launch threads"));
        running.wait_for_step(&place, "out", 3);
        running.signal(first);
        // A run that is quick enough has ended by now.
        let _ = kill_process(running.pid(), second);
        let ended = running.finish();
        assert_eq!(ended.code(), Some(75), "{first:?} {second:?}: {ended}");
        assert_eq!(place.checkpoints("out").len(), 1, "{ended}");
    }
}

#[test]
fn a_second_signal_ends_the_run_at_once() {
    let place = Workplace::new(PROGRAM);
    place.write_text("long", 400);
    let tiny = TINY.replace("--data text", "--data long");
    let running =
        // It validates for many seconds before its first step.
        place.start(&format!("train {tiny} {LONG} --model small --validation-samples 6000 --out out --ranks 2"));
    running.wait_for_stdout("tokens:");
    let ranks = running.ranks(2);
    // One rank alone, twice. Signals of one kind within a second count once.
    kill_process(ranks[1], Signal::TERM).unwrap();
    std::thread::sleep(Duration::from_millis(1200));
    kill_process(ranks[1], Signal::TERM).unwrap();
    let ended = running.finish();
    assert_eq!(ended.code(), Some(128 + 15), "{ended}");
    assert!(ended.stderr.contains("pillion: rank 1 exited with code 143"), "{ended}");
}
