//! Faults of ranks that are processes: one dies, stops, leaves, panics, gives up or makes a wrong call at each kind of moment, and every
//! other rank says which one it was; nothing hangs, and nothing stays behind.
//!
//! `jobs.rs` starts and watches jobs, `program.rs` is what their ranks do, `calls.rs` and `lots.rs` are two larger programs. No time
//! decides a test but for limits that only catch a hang; what was measured is printed.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;
use std::{fs, thread};

use rustix::process::Signal;

use self::calls::{CASES, ODD, REPORTS};
use self::jobs::{Job, Said, Settings, now};

mod calls;
mod jobs;
mod lots;
mod program;

/// A death is noticed within milliseconds; this only tells it from a deadline that was waited for.
const NOTICED: u64 = 5_000_000_000;

#[test]
#[ignore = "the entry point of the processes that the other tests start"]
fn a_rank() {
    program::run();
}

/// Kills the victim after `delay`, and checks what the others say. Returns how long the last took to notice, in nanoseconds.
fn kill_one(settings: &Settings, delay: Duration) -> u64 {
    let mut job = Job::start(settings);
    job.wait_for_all("ready");
    thread::sleep(delay);
    let killed = job.kill();
    job.end_of(settings.victim);
    job.go();
    let errors = job.errors();
    for error in &errors {
        assert_eq!(
            (error.variant.as_str(), error.named),
            ("PeerLost", Some(settings.victim)),
            "{error:?}\n{}",
            job.transcript()
        );
        assert!(error.text.contains("it died") || error.text.contains("gave up on it"), "{error:?}");
    }
    assert!(errors.iter().any(|error| error.text.contains("it died")), "{errors:?}");
    let took = errors.iter().map(|error| error.at.saturating_sub(killed)).max().unwrap();
    assert!(took < NOTICED, "{took} ns\n{}", job.transcript());
    took
}

/// A dead rank is named by every other, in jobs of two, three and four ranks; another rank dies in each.
fn a_death_is_named(program: &'static str) {
    for (world, victim) in [(2, 1), (3, 0), (4, 2)] {
        let took = kill_one(&Settings::new(program, world, victim), Duration::from_millis(30));
        println!("{program}, {world} ranks: all noticed the death {:.1} ms after the signal", took as f64 / 1e6);
    }
}

#[test]
fn a_death_is_named_by_ranks_that_were_idle() {
    a_death_is_named("idle");
}

#[test]
fn a_death_is_named_by_ranks_that_wait_in_a_barrier() {
    a_death_is_named("awaited");
}

#[test]
fn a_death_among_barriers_is_named() {
    a_death_is_named("barriers");
}

#[test]
fn a_death_inside_a_large_reduce_scatter_from_arenas_is_named() {
    a_death_is_named("reduce");
}

#[test]
fn a_death_inside_staged_operations_is_named() {
    a_death_is_named("staged");
}

#[test]
fn a_death_inside_messages_is_named() {
    a_death_is_named("messages");
}

#[test]
fn a_death_of_a_rank_that_reads_a_window_is_named() {
    a_death_is_named("window");
}

#[test]
fn a_death_in_a_group_is_named_by_its_members() {
    a_death_is_named("group");
}

#[test]
fn a_death_of_a_member_before_it_makes_its_group_is_named() {
    a_death_is_named("making");
}

#[test]
fn a_rank_that_dies_or_never_starts_is_named_at_the_end_of_the_start() {
    for (world, victim, starts) in [(2, 1, true), (3, 1, true), (3, 1, false), (3, 0, true), (4, 0, false)] {
        let settings = Settings { startup: Duration::from_millis(700), ..Settings::new("start-up", world, victim) };
        let name = format!("faults-start-{}-{world}-{victim}-{starts}", std::process::id());
        let mut job = Job::start_none(&settings, &name);
        for rank in (0..world).filter(|&rank| starts || rank != victim) {
            job.start_rank(rank);
        }
        if starts {
            job.wait_for(victim, "ready");
            job.kill();
        }
        let errors = job.errors();
        let expected =
            if victim == 0 { "rank 0 did not come".to_owned() } else { format!("ranks [{victim}] did not come") };
        for error in errors {
            assert!(error.text.contains(&expected), "{error:?}\n{}", job.transcript());
        }
    }
}

#[test]
fn a_stopped_rank_is_warned_of_and_named_at_the_deadline() {
    let settings = Settings {
        timeout: Duration::from_millis(1000),
        warn_after: Duration::from_millis(200),
        ..Settings::new("beat", 3, 1)
    };
    let mut job = Job::start(&settings);
    job.wait_for_all("ready");
    job.signal(1, Signal::STOP);
    for rank in [0, 2] {
        job.end_of(rank);
        let warning = format!("pillion: rank {rank} has waited 0 s for rank 1 in scalar exchange #");
        assert_eq!(job.stderr(rank).matches(&warning).count(), 1, "{}", job.transcript());
    }
    let errors = [0, 2].map(|rank| job.error_of(rank));
    assert!(errors.iter().any(|error| error.variant == "Timeout"), "{errors:?}");
    for error in errors {
        // Who notices last may find the other gone, which has named the rank.
        assert!(["Timeout", "PeerLost"].contains(&error.variant.as_str()), "{error:?}");
        assert_eq!(error.named, Some(1), "{error:?}");
        assert!(
            error.text.contains("in scalar exchange #") || error.text.contains("during scalar exchange #"),
            "{error:?}"
        );
    }
    // Going on, it learns that the others have given up on it.
    job.signal(1, Signal::CONT);
    job.end_of(1);
    let error = job.error_of(1);
    assert!(error.variant == "PeerLost" && error.text.contains("it gave up on this rank"), "{error:?}");
    job.nothing_is_left();
}

#[test]
fn a_rank_that_goes_on_before_the_deadline_has_done_no_harm() {
    let settings = Settings { warn_after: Duration::from_millis(100), ..Settings::new("beat", 3, 2) };
    let mut job = Job::start(&settings);
    job.wait_for_all("ready");
    job.signal(2, Signal::STOP);
    for rank in [0, 1] {
        job.wait("a warning", || job.stderr(rank).contains("for rank 2 in scalar exchange #"));
    }
    job.signal(2, Signal::CONT);
    thread::sleep(Duration::from_millis(50));
    job.go();
    job.succeed();
}

#[test]
fn a_job_that_is_stopped_as_a_whole_for_longer_than_the_deadline_goes_on() {
    let settings = Settings { timeout: Duration::from_millis(1000), ..Settings::new("beat", 3, 0) };
    let mut job = Job::start(&settings);
    job.wait_for_all("ready");
    for _ in 0..2 {
        (0..3).for_each(|rank| job.signal(rank, Signal::STOP));
        thread::sleep(Duration::from_millis(1200));
        (0..3).for_each(|rank| job.signal(rank, Signal::CONT));
        thread::sleep(Duration::from_millis(20));
    }
    job.go();
    job.succeed();
}

#[test]
fn every_wrong_call_is_a_mismatch_on_every_rank_and_writes_nothing() {
    let mut job = Job::start(&Settings::new("calls", calls::WORLD, ODD));
    job.succeed();
    let said: Vec<Vec<String>> = (0..calls::WORLD).map(|rank| job.said(rank)).collect();
    for (rank, lines) in said.iter().enumerate() {
        assert_eq!(lines.len(), REPORTS, "{}", job.transcript());
        for (number, line) in lines.iter().enumerate() {
            let fields: Vec<&str> = line.split('\t').collect();
            let (variant, named, text) = (fields[2], fields[3], fields[4]);
            let wrong = |named: &str| if rank == ODD { named != "1" } else { named == "1" };
            let Some(((right_call, _), (wrong_call, _))) = CASES.get(number % (REPORTS / 2)) else {
                // A message of rank 0 to rank 1; rank 2 loses one of the two.
                let expected = [("Mismatch", "1"), ("Mismatch", "0"), ("PeerLost", named)][rank];
                assert_eq!((variant, named), expected, "case {number}, rank {rank}: {text}");
                let parts = [
                    ["called message #1", "to rank 1"],
                    ["called message #1", "to rank 1"],
                    ["gave up on it", "lost rank"],
                ][rank];
                assert!(parts.iter().all(|part| text.contains(part)), "case {number}, rank {rank}: {text}");
                continue;
            };
            let (ours, theirs) = if rank == ODD { (wrong_call, right_call) } else { (right_call, wrong_call) };
            assert!(variant == "Mismatch" && wrong(named), "case {number}, rank {rank}: {text}");
            let (before, after) = text.split_once(" where this rank called ").expect("both calls");
            assert!(before.contains(theirs) && after.contains(ours), "case {number}, rank {rank}: {text}");
        }
    }
}

#[test]
fn a_call_on_another_channel_is_named_at_the_deadline() {
    let mut job = Job::start(&Settings { timeout: Duration::from_millis(500), ..Settings::new("channels", 3, 2) });
    let at_the_victim = {
        job.end_of(2);
        job.error_of(2)
    };
    for error in [0, 1].map(|rank| (job.end_of(rank), job.error_of(rank)).1) {
        assert!(error.named == Some(2) && ["Timeout", "PeerLost"].contains(&error.variant.as_str()), "{error:?}");
        assert!(error.text.contains("reduce-scatter #1 of 3000 × f32"), "{error:?}");
    }
    assert!(matches!(at_the_victim.named, Some(0 | 1)), "{at_the_victim:?}");
    assert!(at_the_victim.text.contains("all-gather #1 of 3000 × f32"), "{at_the_victim:?}");
    job.nothing_is_left();
}

/// One of four ranks ends in some way while the others wait in different operations.
fn ending(program: &'static str) -> Vec<Said> {
    let mut job = Job::start(&Settings::new(program, 4, 1));
    job.wait_for_all("ready");
    thread::sleep(Duration::from_millis(30));
    job.go();
    job.end_of(1);
    let errors = job.errors();
    for (rank, error) in [0, 2, 3].into_iter().zip(&errors) {
        assert_eq!(error.named, Some(1), "rank {rank}: {error:?}");
    }
    errors
}

#[test]
fn a_rank_that_leaves_early_is_named() {
    let errors = ending("leave");
    assert!(errors.iter().all(|error| error.variant == "PeerLost"), "{errors:?}");
    assert!(errors.iter().any(|error| error.text.contains("it left early")), "{errors:?}");
}

#[test]
fn a_rank_that_exits_without_leaving_is_named() {
    let errors = ending("exit");
    assert!(errors.iter().all(|error| error.variant == "PeerLost"), "{errors:?}");
    assert!(errors.iter().any(|error| error.text.contains("it died")), "{errors:?}");
}

#[test]
fn the_first_death_is_named_where_another_followed() {
    for program in ["chain", "chain-in-groups"] {
        let mut job = Job::start(&Settings::new(program, 4, 2));
        job.wait_for_all("ready");
        job.kill();
        job.end_of(2);
        job.end_of(0);
        job.go();
        for rank in [0, 1, 3] {
            if rank > 0 {
                job.end_of(rank);
            }
            let error = job.error_of(rank);
            assert_eq!((error.variant.as_str(), error.named), ("PeerLost", Some(2)), "{program}: {error:?}");
        }
    }
}

#[test]
fn a_rank_that_panics_is_named() {
    for error in ending("panic") {
        assert_eq!((error.variant.as_str(), error.text.as_str()), ("Aborted", "rank 1 aborted: it panicked"));
    }
}

#[test]
fn a_reason_to_abort_reaches_every_rank() {
    for error in ending("abort") {
        assert_eq!((error.variant.as_str(), error.text.as_str()), ("Aborted", "rank 1 aborted: the disk is full"));
    }
}

/// Two ranks ask for more than a limit of [`GROUP_LIMIT`] allows, started by `script` (see [`Job::start_rank_through`]).
fn a_limit_is_named(script: &str, path: &Path) {
    let name = format!("faults-memory-{}-{}", std::process::id(), script.len());
    let mut job = Job::start_none(&Settings::new("memory", 2, 0), &name);
    (0..2).for_each(|rank| job.start_rank_through(rank, script, path));
    job.succeed();
    for rank in 0..2 {
        let said = job.said(rank);
        assert_eq!(said.len(), 2, "{said:?}");
        for line in said {
            assert!(line.contains("\tOutOfMemory\t"), "{line}");
            assert!(line.contains("this control group's memory limit allows"), "{line}");
        }
    }
}

const GROUP_LIMIT: u64 = 128 << 20;

#[test]
fn an_arena_beyond_the_control_group_is_refused_on_every_rank() {
    match Group::new() {
        Ok(group) => a_limit_is_named("echo $$ >\"$0\"/cgroup.procs && exec \"$@\"", &group.0),
        Err(reason) => eprintln!("SKIPPED: an_arena_beyond_the_control_group_is_refused_on_every_rank: {reason}"),
    }
}

/// As above, where no group can be made: the files of a group, which limit nothing, in the place of the real ones.
#[test]
fn an_arena_beyond_what_files_say_of_the_control_group_is_refused_on_every_rank() {
    let own_mounts = Command::new("unshare").args(["--mount", "true"]).output();
    if !own_mounts.is_ok_and(|output| output.status.success()) {
        eprintln!(
            "SKIPPED: an_arena_beyond_what_files_say_of_the_control_group_is_refused_on_every_rank: `unshare --mount` is not allowed here"
        );
        return;
    }
    let group = tempfile::tempdir().unwrap();
    // 48 MiB are in use, of which the kernel would give up 16 at once.
    let numbers = [("max", GROUP_LIMIT.to_string()), ("current", (48 << 20).to_string())];
    let statistics =
        ("stat", "anon 33554432\ninactive_file 12582912\nactive_file 4194304\nslab_reclaimable 0\n".to_owned());
    for (file, content) in numbers.into_iter().chain([statistics]) {
        fs::write(group.path().join(format!("memory.{file}")), content).unwrap();
    }
    let script = "exec unshare --mount sh -c 'mount --bind \"$0\" /sys/fs/cgroup && exec \"$@\"' \"$0\" \"$@\"";
    a_limit_is_named(script, group.path());
}

/// A control group (version 2) with a memory limit, made below this process's own or one above it.
struct Group(PathBuf);

impl Group {
    fn new() -> Result<Group, String> {
        let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        let own = own.lines().find_map(|line| line.strip_prefix("0::/"));
        let own = Path::new("/sys/fs/cgroup").join(own.ok_or("this process is in no control group of version 2")?);
        // A group that holds processes cannot hand its controllers down, so one above may have to.
        for parent in own.ancestors().filter(|path| path.join("cgroup.controllers").exists()) {
            let path = parent.join(format!("pillion-faults-{}", std::process::id()));
            if fs::create_dir(&path).is_err() {
                continue;
            }
            let group = Group(path);
            if fs::write(group.0.join("memory.max"), GROUP_LIMIT.to_string()).is_ok() {
                return Ok(group);
            }
        }
        Err("no group with a memory limit can be made (it takes root and a writable /sys/fs/cgroup of version 2)"
            .to_owned())
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.0);
    }
}

#[test]
fn a_job_may_take_the_name_of_one_that_was_killed_and_two_run_side_by_side() {
    let settings = Settings::new("stale", 2, 0);
    let names = ["a", "b"].map(|end| format!("faults-stale-{}-{end}", std::process::id()));
    let listens = |name: &str| fs::read_to_string("/proc/net/unix").unwrap().contains(&format!("@pillion/{name}"));
    let mut old = Job::start_none(&settings, &names[0]);
    old.start_rank(0);
    old.wait("rank 0 to listen", || listens(&names[0]));
    old.kill();
    old.end_of(0);
    // Another rank of the old attempt, which is still looking for its rank 0, would meet the new one; the launcher ends such.
    let mut jobs = names.each_ref().map(|name| Job::start_none(&settings, name));
    for rank in [0, 1] {
        jobs.iter_mut().for_each(|job| job.start_rank(rank));
    }
    jobs.iter_mut().for_each(Job::succeed);
}

#[test]
fn fifty_communicators_leave_no_file_thread_or_mapping_behind() {
    let mut job = Job::start(&Settings::new("leaks", 2, 1));
    job.succeed();
    for rank in 0..2 {
        let said = job.said(rank);
        let held: Vec<&String> = said.iter().filter(|line| line.starts_with("held")).collect();
        assert!(held.len() == 2 && held[0] == held[1], "{held:?}\n{}", job.transcript());
        assert!(held[0].ends_with("false)"), "no communicator's memory is mapped: {held:?}");
        let failed = |variant: &str, end: usize| {
            let start = format!("{variant} {end} ");
            said.iter().filter(|line| line.starts_with(&start)).count()
        };
        let expected = if rank == 1 { [0, 0, 13, 13] } else { [13, 13, 13, 13] };
        let found = [("PeerLost", 1), ("Aborted", 2), ("Mismatch", 3), ("Rendezvous", 4)]
            .map(|(variant, end)| failed(variant, end));
        assert_eq!(found, expected, "{}", job.transcript());
    }
}

/// For `ci/long`: `FAULTS_KILLS` says how many.
#[test]
#[ignore = "takes minutes; run by ci/long"]
fn random_kills_among_random_operations_are_named() {
    let kills: u64 = std::env::var("FAULTS_KILLS").map_or(200, |kills| kills.parse().expect("a number"));
    let seed = now();
    let (mut noticed, mut ended) = (Vec::new(), Vec::new());
    for number in 0..kills {
        let draw = |stream, bound: u64| pillion_kernels::random::bits(seed, stream, number) % bound;
        let settings = Settings { seed: seed + number, ..Settings::new("lots", 4, draw(0, 4) as usize) };
        let mut job = Job::start(&settings);
        job.wait_for_all("ready");
        thread::sleep(Duration::from_micros(draw(1, 60_000)));
        let killed = job.kill();
        job.end_of(settings.victim);
        let errors = job.errors();
        ended.push(now() - killed);
        for error in &errors {
            let named = error.variant == "PeerLost" && error.named == Some(settings.victim);
            assert!(named, "kill {number} (seed {seed}): {error:?}\n{}", job.transcript());
        }
        noticed.push(errors.iter().map(|error| error.at.saturating_sub(killed)).max().unwrap());
    }
    let milliseconds = |times: &mut Vec<u64>| {
        times.sort_unstable();
        (times[times.len() / 2] as f64 / 1e6, times[times.len() - 1] as f64 / 1e6)
    };
    let ((typical, slowest), (typical_end, slowest_end)) = (milliseconds(&mut noticed), milliseconds(&mut ended));
    println!(
        "{kills} kills of one of 4 ranks among random operations (seed {seed}): every other rank named it, nothing is left. The last rank \
         noticed after {typical:.1} ms (median), {slowest:.1} ms (slowest); all had ended after {typical_end:.1} ms, {slowest_end:.1} ms"
    );
    assert!(slowest_end < 1_000.0, "a rank took longer than a second to end");
}
