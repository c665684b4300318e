//! Ranks that are processes, copies of this test program: they order their streams by words, and a
//! rank that dies leaves no other waiting.

use std::fs::File;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use pillion_collectives::launch::Source;
use pillion_collectives::{Communicator, Error, GpuTransport, Launch, Options, Pending, Reduction};
use pillion_kernels::{Buffer, DType, Device, Event, Failure, Stream};
use rustix::process::Signal;

use crate::gate::Gate;
use crate::waits::{Delays, TURNS, take_turns};
use crate::{Rank, nccl, numbers, same_bits, standin};

/// The entry point of a rank in this program.
const ENTRY: [&str; 5] = ["--exact", "processes::a_rank", "--ignored", "--nocapture", "--test-threads=1"];
/// Only turns a hang into a failure.
const PATIENCE: Duration = Duration::from_secs(120);
/// Elements of what the programs reduce.
const LEN: usize = 900;

/// What a rank does, in a world of so many, with a number that the test chose.
type Program = fn(&Rank, usize, u64);

/// Programs by name.
const PROGRAMS: [(&str, Program); 13] = [
    ("same bits", same_bits),
    ("dies", dies),
    ("fails", fails),
    ("gives up", gives_up),
    ("another call", another_call),
    ("does not come", does_not_come),
    ("is late", is_late),
    ("leaves out", leaves_out),
    ("has failed", has_failed),
    ("gathers words", gathers_words),
    ("forks", forks),
    ("near", nccl::near),
    ("loses NCCL", nccl::loses_nccl),
];

#[test]
#[ignore = "the entry point of the processes that the other tests start"]
fn a_rank() {
    let Ok(job) = std::env::var("GPUS_JOB") else { return };
    // The kernel ties this wish to the thread that started this process, which is the test's.
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL)).unwrap();
    let variable = |name: &str| std::env::var(format!("GPUS_{name}")).unwrap();
    let number = |name: &str| variable(name).parse::<u64>().unwrap();
    let (rank, world) = (number("RANK") as usize, number("WORLD") as usize);
    let launch =
        Launch { rank, world, local_rank: rank, local_world: world, job, source: Source::Local, ..Launch::single() };
    standin::reset(number("SEED") + 100 * rank as u64);
    let options = match variable("PROGRAM").as_str() {
        "does not come" | "is late" => Options { timeout: Duration::from_secs(1), ..Options::default() },
        // A mark that never comes is found sooner so.
        "leaves out" => Options { timeout: Duration::from_secs(5), ..Options::default() },
        _ => Options::default(),
    };
    let by = if variable("BY") == "nccl" { GpuTransport::Nccl } else { GpuTransport::Auto };
    let host = Communicator::connect(&launch, options).unwrap();
    let rank = match Rank::new(rank, host, by) {
        Err(error) if variable("PROGRAM") == "is refused" => return println!("refused: {error}"),
        rank => rank.unwrap(),
    };
    let program = PROGRAMS.iter().find(|(name, _)| *name == variable("PROGRAM")).expect("a program of this name").1;
    program(&rank, world, number("NUMBER"));
}

/// How the ranks of a job ended, and what each printed.
pub(crate) struct Ended(pub(crate) Vec<(ExitStatus, String)>);

impl Ended {
    #[track_caller]
    pub(crate) fn well(self) {
        for (rank, (status, said)) in self.0.iter().enumerate() {
            assert!(status.success(), "rank {rank}: {status}\n{said}");
        }
    }
}

/// Runs a job whose ranks are processes.
fn run(program: &str, world: usize, seed: u64, number: u64) -> Ended {
    run_with(program, world, seed, number, &[("GPUS_BY", "peer")])
}

/// The same with variables.
pub(crate) fn run_with(program: &str, world: usize, seed: u64, number: u64, variables: &[(&str, &str)]) -> Ended {
    static NUMBER: AtomicUsize = AtomicUsize::new(0);
    let job = format!("gpus-{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
    let folder = tempfile::tempdir().unwrap();
    let start = |rank: usize| {
        let output = File::create(folder.path().join(rank.to_string())).unwrap();
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(ENTRY).env("GPUS_JOB", &job).env("GPUS_PROGRAM", program);
        for (name, value) in [("RANK", rank as u64), ("WORLD", world as u64), ("SEED", seed), ("NUMBER", number)] {
            command.env(format!("GPUS_{name}"), value.to_string());
        }
        // What stands for NCCL leaves its files there.
        command.env("TMPDIR", folder.path()).envs(variables.iter().copied());
        let errors = output.try_clone().unwrap();
        command.stdin(Stdio::null()).stdout(output).stderr(errors).spawn().unwrap()
    };
    let mut ranks: Vec<Child> = (0..world).map(start).collect();
    let began = Instant::now();
    let mut hung = false;
    while ranks.iter_mut().any(|rank| rank.try_wait().unwrap().is_none()) {
        if began.elapsed() > PATIENCE {
            hung = true;
            ranks.iter_mut().for_each(|rank| drop(rank.kill()));
        }
        thread::sleep(Duration::from_millis(2));
    }
    let said = |folder: &Path, rank: usize| std::fs::read_to_string(folder.join(rank.to_string())).unwrap();
    let ended = ranks.iter_mut().enumerate().map(|(rank, child)| (child.wait().unwrap(), said(folder.path(), rank)));
    let ended = Ended(ended.collect());
    let all: String = ended.0.iter().map(|(status, said)| format!("{status}\n{said}\n")).collect();
    assert!(!hung, "{program}: the ranks hang\n{all}");
    ended
}

/// A sum of all ranks' numbers, which starts behind `gate`.
pub(crate) fn held(rank: &Rank, stream: &dyn Stream, gate: Option<&Arc<Gate>>) -> Pending<Buffer> {
    let buffer = numbers(stream, &rank.gpu, DType::F32, LEN, rank.number as u64);
    if let Some(gate) = gate {
        stream.wait_for(&Event::new(gate.clone()));
    }
    rank.gpus.all_reduce(buffer, Reduction::Sum, stream.record())
}

/// Rank 1 opens its gate once it has heard that the job has failed.
pub(crate) fn open_after_failure(rank: &Rank, gate: &Gate) {
    if rank.number == 1 {
        while rank.gpus.healthy().is_ok() {
            thread::sleep(Duration::from_millis(1));
        }
        gate.end(Ok(()));
    }
}

/// Nothing of this rank's work runs any more, and its memory is not handed out twice.
pub(crate) fn nothing_runs(rank: &Rank) {
    assert!(rank.gpus.healthy().is_err());
    let stream = rank.gpu.stream();
    stream.wait_for(&rank.gpu.stream().record());
    assert!(stream.synchronize().is_err(), "nothing runs on this rank any more");
}

fn same_bits(rank: &Rank, world: usize, _: u64) {
    same_bits::gathers(&mut |what, operation| same_bits::check(rank, world, what, operation));
    same_bits::sums(&mut |what, operation| same_bits::check(rank, world, what, operation));
    same_bits::in_order(rank, world);
    if world == 4 {
        same_bits::grid(&mut |what, operation| same_bits::check(rank, world, what, operation));
    }
}

#[test]
fn processes_have_the_same_bits_too() {
    for (seed, world) in [2, 3, 4, 2, 3, 4].into_iter().enumerate() {
        run("same bits", world, seed as u64, 0).well();
    }
}

/// Rank `victim` dies while the streams of the others wait for its own.
fn dies(rank: &Rank, _: usize, victim: u64) {
    let gate = Gate::new();
    let is_victim = rank.number as u64 == victim;
    // All ranks have enqueued all of it when this returns.
    let stream = rank.gpu.stream();
    let pending = held(rank, &*stream, is_victim.then_some(&gate));
    if is_victim {
        rustix::process::kill_process(rustix::process::getpid(), Signal::KILL).unwrap();
    }
    match pending.wait().unwrap_err() {
        Error::PeerLost { rank, how, .. } => {
            assert!(rank as u64 == victim && (how == "it died" || how.contains("gave up on it")), "{rank}: {how}")
        }
        other => panic!("{other}"),
    }
    nothing_runs(rank);
}

#[test]
fn a_rank_that_dies_is_named_by_streams_that_wait_for_it() {
    for (seed, (world, victim)) in [(2, 1), (3, 0), (4, 2)].into_iter().enumerate() {
        for (rank, (status, said)) in run("dies", world, seed as u64, victim).0.iter().enumerate() {
            assert_eq!(status.success(), rank as u64 != victim, "rank {rank} of {world}: {status}\n{said}");
        }
    }
}

/// The work before rank 1's operation fails.
fn fails(rank: &Rank, _: usize, _: u64) {
    let gate = Gate::new();
    let stream = rank.gpu.stream();
    let pending = held(rank, &*stream, (rank.number == 1).then_some(&gate));
    gate.end(Err(Failure::new(std::io::Error::other("no memory for the next micro-batch"))));
    let error = pending.wait().unwrap_err().to_string();
    match rank.number {
        1 => assert!(error.contains("no memory for the next micro-batch"), "{error}"),
        _ => assert!(error.contains("another rank") || error.contains("rank 1"), "{error}"),
    }
    nothing_runs(rank);
}

#[test]
fn a_rank_whose_work_fails_stops_the_others() {
    for seed in 0..3 {
        run("fails", 3, seed, 0).well();
    }
}

/// Rank 2 gives up while all wait for rank 1, whose stream writes its mark after that.
fn gives_up(rank: &Rank, _: usize, _: u64) {
    let gate = Gate::new();
    let stream = rank.gpu.stream();
    let pending = held(rank, &*stream, (rank.number == 1).then_some(&gate));
    if rank.number == 2 {
        rank.gpus.abort("it has had enough");
    }
    open_after_failure(rank, &gate);
    match pending.wait().unwrap_err() {
        Error::Aborted { rank: 2, reason } => assert_eq!(reason, "it has had enough"),
        other => panic!("{other}"),
    }
    nothing_runs(rank);
}

#[test]
fn a_rank_that_gives_up_stops_the_others_also_where_another_is_late() {
    for seed in 0..3 {
        run("gives up", 3, seed, 0).well();
    }
}

fn another_call(rank: &Rank, _: usize, _: u64) {
    let stream = rank.gpu.stream();
    let len = if rank.number == 1 { 5 } else { 6 };
    let buffer = numbers(&*stream, &rank.gpu, DType::F32, len, 1);
    match rank.gpus.all_reduce(buffer, Reduction::Sum, stream.record()).wait().unwrap_err() {
        Error::Mismatch { ours, theirs, peer } => {
            assert!(ours != theirs && (peer == 1 || rank.number == 1), "{ours}, {theirs}, {peer}");
            assert!(ours.contains("all-reduce") && theirs.contains("all-reduce"), "{ours}, {theirs}");
        }
        Error::Aborted { .. } | Error::PeerLost { .. } => {}
        other => panic!("{other}"),
    }
    assert!(rank.gpus.barrier().is_err() && rank.host.barrier().is_ok());
}

#[test]
fn a_rank_that_calls_something_else_is_named() {
    run("another call", 3, 0, 0).well();
}

fn does_not_come(rank: &Rank, _: usize, _: u64) {
    if rank.number < 2 {
        match held(rank, &*rank.gpu.stream(), None).wait().unwrap_err() {
            Error::Timeout { waiting_on, op, .. } => {
                assert!(waiting_on == [2] && op.contains("all-reduce"), "{op}: {waiting_on:?}")
            }
            Error::PeerLost { rank: 2, .. } => {}
            Error::Aborted { reason, .. } => assert!(reason.contains("rank 2"), "{reason}"),
            other => panic!("{other}"),
        }
    }
    let patient = Options::default().timeout;
    rank.host.barrier_within(patient).unwrap();
}

#[test]
fn a_rank_that_does_not_come_is_named() {
    run("does not come", 3, 0, 0).well();
}

/// All ranks have enqueued a sum, and the stream of rank 1 does not come to it.
fn is_late(rank: &Rank, _: usize, _: u64) {
    let (gate, stream) = (Gate::new(), rank.gpu.stream());
    let pending = held(rank, &*stream, (rank.number == 1).then_some(&gate));
    open_after_failure(rank, &gate);
    match pending.wait().unwrap_err() {
        // NCCL does not say which of the others it is.
        Error::Timeout { op, waiting_on, how, .. } if rank.number != 1 => {
            let is_named = waiting_on == [1] || !rank.gpus.capabilities().rank_order && waiting_on.contains(&1);
            assert!(is_named && op.contains("all-reduce") && how.contains("GPU"), "{op}: {how}")
        }
        Error::Aborted { reason, .. } => assert!(reason.contains("1") && reason.contains("GPU"), "{reason}"),
        other => panic!("{other}"),
    }
    nothing_runs(rank);
}

#[test]
fn a_rank_whose_stream_does_not_come_is_named() {
    for seed in 0..3 {
        run("is late", 3, seed, 0).well();
    }
}

/// One rank, which the number's lowest bit chooses, leaves one wait or mark out; whether somebody
/// notices is how the job ends.
fn leaves_out(rank: &Rank, world: usize, number: u64) {
    let (victim, number) = (number % 2, number / 2);
    let (kind, number) = if number < WAITS { ("value wait", number) } else { ("value write", number - WAITS) };
    if rank.number as u64 == victim {
        standin::skip(kind, number as i64);
    }
    if let Err(turn) = take_turns(rank, world, Delays::none()) {
        panic!("other numbers in turn {turn}");
    }
}

/// Waits on a rank of two: a broadcast has two steps, an all-reduce three.
const WAITS: u64 = TURNS as u64 * (2 + 3);

#[test]
fn every_wait_and_the_last_mark_that_is_left_out_is_noticed() {
    if !standin::is_there() {
        return;
    }
    // A mark before the last one is made up for by the next.
    for number in (0..WAITS).chain([2 * WAITS - 1]) {
        let is_noticed = |seed: u64| {
            // What a wait protects, it may protect on one of the two ranks alone.
            let Ended(ranks) = run("leaves out", 2, seed, 2 * number + seed % 2);
            // Other numbers; a word that is behind; or a stream that waits for ever.
            let says = ["other numbers", "another rank on its GPU failed", "has not come so far"];
            ranks.iter().any(|(status, said)| !status.success() && says.iter().any(|text| said.contains(text)))
        };
        assert!((0..60).any(is_noticed), "nobody notices that number {number} is left out");
    }
    run("leaves out", 2, 1, 4 * WAITS).well();
}

/// Rank 1's operation follows an event that has failed already, behind an operation that waits for
/// rank 0; then rank 1 leaves at once.
fn has_failed(rank: &Rank, _: usize, number: u64) {
    let stream = rank.gpu.stream();
    let gate = Gate::new();
    let first = (number == 1).then(|| held(rank, &*stream, (rank.number == 0).then_some(&gate)));
    let buffer = numbers(&*rank.gpu.stream(), &rank.gpu, DType::F32, LEN, 1);
    let failed = || Event::failed(Failure::new(std::io::Error::other("the data set is gone")));
    let after = if rank.number == 1 { failed() } else { Event::PAST };
    let error = rank.gpus.all_reduce(buffer, Reduction::Sum, after).wait().unwrap_err().to_string();
    assert!(error.contains("the data set is gone") || error.contains("another rank"), "{error}");
    gate.end(Ok(()));
    drop(first);
}

#[test]
fn a_failure_from_before_is_told_to_the_others_also_by_a_rank_that_leaves_at_once() {
    for seed in 0..4 {
        run("has failed", 3, seed, seed % 2).well();
        run_with("has failed", 3, seed, seed % 2, &[("GPUS_BY", "nccl"), ("PILLION_STANDIN_DEVICES", "4")]).well();
    }
}

/// Rank 1 gathers as many words as the others exchange for an operation.
fn gathers_words(rank: &Rank, _: usize, _: u64) {
    let error = match rank.number {
        1 => rank.gpus.all_gather_scalars(&[7; 10]).unwrap_err(),
        _ => held(rank, &*rank.gpu.stream(), None).wait().unwrap_err(),
    };
    let is_named = match &error {
        Error::Mismatch { ours, theirs, .. } => ours.contains("all-reduce") != theirs.contains("all-reduce"),
        Error::Aborted { .. } | Error::PeerLost { .. } => true,
        _ => false,
    };
    assert!(is_named, "{error}");
}

#[test]
fn words_of_a_caller_are_not_taken_for_those_of_an_operation() {
    run("gathers words", 3, 0, 0).well();
}

/// A forked child drops what its parent has.
fn forks(rank: &Rank, world: usize, _: u64) {
    let status = in_child(|| {
        // SAFETY: the child drops its copies, and ends without dropping the parent's.
        let gpus = unsafe { std::ptr::read(&rank.gpus) };
        // SAFETY: as above.
        let gpu = unsafe { std::ptr::read(&rank.gpu) };
        assert!(gpu.allocate(DType::F32, 3).unwrap_err().to_string().contains("forked child"));
        drop((gpus, gpu));
        7
    });
    assert_eq!(status, 7);
    same_bits::in_order(rank, world);
}

/// Runs `program` in a forked child, and returns its exit status, 99 for a panic.
fn in_child(program: impl FnOnce() -> i32) -> i32 {
    // SAFETY: the child runs what the test gives it, and ends without unwinding.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let status = std::panic::catch_unwind(std::panic::AssertUnwindSafe(program)).unwrap_or(99);
        // SAFETY: ends the child at once.
        unsafe { libc::_exit(status) };
    }
    let mut status = 0;
    // SAFETY: of this process's own child; the status is valid for the write.
    assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
    libc::WEXITSTATUS(status)
}

#[test]
fn a_forked_child_does_no_harm() {
    run("forks", 2, 0, 0).well();
    run_with("forks", 2, 0, 0, &[("GPUS_BY", "nccl"), ("PILLION_STANDIN_DEVICES", "4")]).well();
}
