//! Each test runs itself again under `mpirun`, as the ranks. A rank that has seen what it should leaves a file; Open MPI's `mpirun`
//! succeeds only if every rank finalised MPI. Nothing hangs: an alarm ends a rank, and `mpirun` is ended too.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{self, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};
use std::{env, ptr, slice, thread};

use ::mpi::ffi;

use super::MpiWire;
use crate::wire::{Receipt, Wire};
use crate::{Error, Launch};

/// Tells a process that it is a rank, and where to leave its file.
const FOLDER: &str = "MPI_WIRE_TEST_FOLDER";
/// Bounds a broken wire; far above what a loaded machine needs.
const RANK_SECONDS: u32 = 60;
const LAUNCHER_PATIENCE: Duration = Duration::from_secs(90);

#[test]
fn messages_arrive_in_order_and_whole_in_both_directions() {
    let Some(job) = job("messages_arrive_in_order_and_whole_in_both_directions", 3, |launch| {
        let mut wire = MpiWire::open_with_piece(launch, &[0, 1, 2], 0, 1 << 20).unwrap();
        ring(&mut wire);
        // The places of complete messages are used again.
        ring(&mut wire);
        assert_eq!(wire.messages.len(), wire.free.len());
        assert_eq!(wire.messages.len(), 4 * LENGTHS.len(), "two sent and two received of each length");
    }) else {
        return;
    };
    job.all_well();
}

#[test]
fn a_message_of_another_length_is_an_error_wherever_its_pieces_end() {
    let Some(job) = job("a_message_of_another_length_is_an_error_wherever_its_pieces_end", 2, |launch| {
        let mut good = MpiWire::open(launch, &[0, 1], 0).unwrap();
        // Sent and expected, in pieces of 1000 bytes at most, so that the receiver finds the difference in the first piece or the
        // second, and where one has a piece that the other has not.
        let lengths =
            [(0, 1), (1, 0), (10, 5), (5, 10), (1000, 999), (999, 1000), (1000, 2000), (2000, 1000), (1500, 1000)];
        for (number, (sent, expected)) in (1..).zip(lengths) {
            let mut wire = MpiWire::open_with_piece(launch, &[0, 1], number, 1000).unwrap();
            if launch.rank == 0 {
                let request = send(&mut wire, 1, 7, vec![1; sent]);
                wait(&mut wire, &request).unwrap();
            } else {
                let (request, _) = receive(&mut wire, 0, 7, expected);
                let error = wait(&mut wire, &request).unwrap_err().to_string();
                let how = if sent > expected { "longer" } else { "shorter" };
                let part = format!("receiving over MPI: {expected} bytes from rank 0, tag 7: the message is {how}");
                assert!(error.contains(&part), "{sent} bytes sent, {expected} expected: {error}");
                // SAFETY: no bytes.
                let again = unsafe { wire.send(0, 7, ptr::dangling(), 0) }.unwrap_err();
                assert_eq!(again.to_string(), error, "the first error comes again");
            }
            barrier(&mut good);
        }
    }) else {
        return;
    };
    job.all_seen_but_not_finalised();
}

#[test]
fn a_rank_that_gives_up_is_heard_by_all_others_with_its_reason() {
    let Some(job) = job("a_rank_that_gives_up_is_heard_by_all_others_with_its_reason", 3, |launch| {
        let mut good = MpiWire::open(launch, &[0, 1, 2], 0).unwrap();
        // Two bytes each letter: 512 bytes hold 256 of them; with one byte before them, 255.
        for (number, (reason, heard)) in (1..).zip([
            ("disk full".to_string(), "disk full".to_string()),
            (String::new(), String::new()),
            ("é".repeat(400), "é".repeat(256)),
            (format!("a{}", "é".repeat(400)), format!("a{}", "é".repeat(255))),
        ]) {
            // Counted backwards: rank 2 of the job is rank 0 of the wire.
            let mut wire = MpiWire::open(launch, &[2, 1, 0], number).unwrap();
            let said = |wire: &mut MpiWire| match wire.failure() {
                Some(Error::Aborted { rank, reason }) => Some((rank, reason)),
                Some(other) => panic!("{other}"),
                None => None,
            };
            assert_eq!(said(&mut wire), None);
            barrier(&mut good);
            if launch.rank == 2 {
                wire.abort(&reason);
                wire.abort("only the first reason counts");
            } else {
                let found = loop {
                    match said(&mut wire) {
                        Some(found) => break found,
                        None => thread::yield_now(),
                    }
                };
                assert_eq!(found, (0, heard.clone()));
                assert_eq!(said(&mut wire), Some((0, heard)), "it stays so");
            }
            barrier(&mut good);
        }
    }) else {
        return;
    };
    job.all_seen_but_not_finalised();
}

#[test]
fn wires_open_one_after_another_and_at_once_and_between_some_ranks() {
    let Some(job) = job("wires_open_one_after_another_and_at_once_and_between_some_ranks", 3, |launch| {
        for number in 0..3 {
            ring(&mut MpiWire::open(launch, &[0, 1, 2], number).unwrap());
        }
        if launch.rank != 1 {
            ring(&mut MpiWire::open(launch, &[2, 0], 3).unwrap());
        }
        for round in 0..5 {
            thread::scope(|scope| {
                let open = |number: u32| {
                    scope.spawn(move || ring(&mut MpiWire::open(launch, &[0, 1, 2], number).unwrap()));
                };
                // The ranks need not agree on which comes first.
                let numbers = [10 + 2 * round, 11 + 2 * round];
                open(numbers[launch.rank % 2]);
                open(numbers[1 - launch.rank % 2]);
            });
        }
    }) else {
        return;
    };
    job.all_well();
}

#[test]
fn mpi_of_a_program_that_reserved_it_for_one_thread_is_refused() {
    let Some(job) = job("mpi_of_a_program_that_reserved_it_for_one_thread_is_refused", 2, |launch| {
        // SAFETY: reads a constant of the library's C shim.
        initialise(unsafe { ffi::RSMPI_THREAD_FUNNELED });
        let error = refused(MpiWire::open(launch, &[0, 1], 0));
        assert!(error.contains("this program initialised MPI with MPI_THREAD_FUNNELED"), "{error}");
        assert!(error.contains("MPI_Init_thread(…, MPI_THREAD_MULTIPLE, …)"), "{error}");
        finalise();
    }) else {
        return;
    };
    job.all_well();
}

#[test]
fn mpi_of_a_program_that_shares_it_is_used_until_the_program_finalises_it() {
    let Some(job) = job("mpi_of_a_program_that_shares_it_is_used_until_the_program_finalises_it", 2, |launch| {
        // SAFETY: reads a constant of the library's C shim.
        initialise(unsafe { ffi::RSMPI_THREAD_MULTIPLE });
        ring(&mut MpiWire::open(launch, &[0, 1], 0).unwrap());
        let left_open = MpiWire::open(launch, &[1, 0], 1).unwrap();

        let other = Launch { rank: 1 - launch.rank, ..launch.clone() };
        let error = refused(MpiWire::open(&other, &[0, 1], 0));
        let place = format!("({}) says rank {} of 2, ", launch.source, other.rank);
        assert!(error.contains(&place), "{error}");
        assert!(error.contains(&format!("says rank {} of 2: two launchers disagree", launch.rank)), "{error}");

        finalise();
        drop(left_open);
        let error = refused(MpiWire::open(launch, &[0, 1], 0));
        assert!(error.contains("MPI has been finalised in this process"), "{error}");
    }) else {
        return;
    };
    job.all_well();
}

#[test]
fn a_program_that_mpirun_did_not_start_is_told_so() {
    let Some(job) = job("a_program_that_mpirun_did_not_start_is_told_so", 0, |launch| {
        let launch = Launch { world: 2, ..launch.clone() };
        let error = refused(MpiWire::open(&launch, &[0, 1], 0));
        assert!(error.contains("rank 0 of 2"), "{error}");
        assert!(error.contains("rank 0 of 1: MPI sees a process on its own"), "{error}");
        assert!(error.contains("start the ranks with the mpirun of "), "{error}");
    }) else {
        return;
    };
    job.all_well();
}

#[test]
fn a_rank_that_ends_after_a_failure_takes_the_others_with_it() {
    let Some(job) = job("a_rank_that_ends_after_a_failure_takes_the_others_with_it", 2, |launch| {
        let mut wire = MpiWire::open(launch, &[0, 1], 0).unwrap();
        let (request, _) = receive(&mut wire, 1 - launch.rank, 0, 1);
        if launch.rank == 1 {
            let never = wait(&mut wire, &request);
            panic!("rank 0 sends nothing: {never:?}");
        }
        // With a message in flight.
        drop(wire);
        eprintln!("rank 0 leaves with code 0");
        process::exit(0);
    }) else {
        return;
    };
    assert!(job.output.contains("rank 0 leaves with code 0"), "{job}");
    job.not_finalised();
    assert!(!job.output.contains("Alarm clock"), "{job}");
}

/// With a piece of 1 MiB: none, one and several pieces, and those whose last piece is empty.
const LENGTHS: [usize; 7] = [0, 1, 1000, 3 << 20, (1 << 20) - 1, 1 << 20, (1 << 20) + 1];

/// Sends messages of all lengths to both neighbours at once, on a tag for each direction, and checks what comes.
fn ring(wire: &mut MpiWire) {
    let (own, world) = (wire.own, wire.members.len());
    let content = |from: usize, tag: u8, len: usize| -> Vec<u8> {
        (0..len).map(|index| (index * 31 + index / 251 + from * 7 + usize::from(tag) + len) as u8).collect()
    };
    let (next, previous) = ((own + 1) % world, (own + world - 1) % world);
    let mut sent = Vec::new();
    let mut received = Vec::new();
    for (to, from, tag) in [(next, previous, 0), (previous, next, 255)] {
        for len in LENGTHS {
            sent.push(send(wire, to, tag, content(own, tag, len)));
            let (request, data) = receive(wire, from, tag, len);
            received.push((request, data, from, tag, len));
        }
    }
    for (request, data, from, tag, len) in received {
        wait(wire, &request).unwrap();
        // SAFETY: `len` bytes that live for ever, and that MPI is done with.
        let found = unsafe { slice::from_raw_parts(data, len) };
        assert!(found == content(from, tag, len), "{len} bytes from rank {from}, tag {tag}");
    }
    for request in sent {
        wait(wire, &request).unwrap();
    }
}

/// Returns once all ranks have called it.
fn barrier(wire: &mut MpiWire) {
    let others: Vec<usize> = (0..wire.members.len()).filter(|rank| *rank != wire.own).collect();
    let sent: Vec<Receipt> = others.iter().map(|rank| send(wire, *rank, 9, Vec::new())).collect();
    let received: Vec<Receipt> = others.iter().map(|rank| receive(wire, *rank, 9, 0).0).collect();
    for request in sent.iter().chain(&received) {
        wait(wire, request).unwrap();
    }
}

fn send(wire: &mut MpiWire, to: usize, tag: u8, data: Vec<u8>) -> Receipt {
    let data: &'static [u8] = data.leak();
    // SAFETY: it lives for ever, and nobody changes it.
    unsafe { wire.send(to, tag, data.as_ptr(), data.len()) }.unwrap()
}

fn receive(wire: &mut MpiWire, from: usize, tag: u8, len: usize) -> (Receipt, *const u8) {
    let data = vec![0xee; len].leak().as_mut_ptr();
    // SAFETY: it lives for ever, and nobody looks at it before the request is complete.
    (unsafe { wire.receive(from, tag, data, len) }.unwrap(), data)
}

fn wait(wire: &mut MpiWire, request: &Receipt) -> Result<(), Error> {
    while !wire.test(request)? {
        thread::yield_now();
    }
    Ok(())
}

fn refused(opened: Result<MpiWire, Error>) -> String {
    opened.err().expect("a refusal").to_string()
}

fn initialise(level: i32) {
    let mut granted = 0;
    // SAFETY: nobody has initialised MPI in this process, which runs one test; the pointer is valid for the write.
    unsafe { ffi::MPI_Init_thread(ptr::null_mut(), ptr::null_mut(), level, &mut granted) };
    assert_eq!(granted, level, "the MPI library grants another thread level");
}

fn finalise() {
    // SAFETY: this thread has initialised MPI, and nobody uses it any more.
    unsafe { ffi::MPI_Finalize() };
}

/// A job that has ended.
struct Job {
    open_mpi: bool,
    status: ExitStatus,
    output: String,
    /// By rank, whether it came to its end.
    seen: Vec<bool>,
}

impl std::fmt::Display for Job {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}\n{}", self.status, self.output)
    }
}

impl Job {
    fn all_well(&self) {
        assert!(self.seen.iter().all(|seen| *seen) && self.status.success(), "{self}");
    }

    fn all_seen_but_not_finalised(&self) {
        assert!(self.seen.iter().all(|seen| *seen), "{self}");
        self.not_finalised();
    }

    /// MPICH's launcher ends the other ranks too when one leaves without MPI_Finalize, but does not tell.
    fn not_finalised(&self) {
        assert!(!self.open_mpi || !self.status.success(), "MPI was finalised after a failure: {self}");
    }
}

/// In a rank: runs `body`, and leaves a file if it returns. Otherwise: runs this test as `ranks` ranks under `mpirun`, or as one
/// process without it if `ranks` is 0; nothing where there is no `mpirun`.
fn job(test: &str, ranks: usize, body: impl FnOnce(&Launch)) -> Option<Job> {
    if let Some(folder) = env::var_os(FOLDER) {
        // SAFETY: ends this process, a rank, when the time is up; nobody here handles the signal.
        unsafe { libc::alarm(RANK_SECONDS) };
        let launch = Launch::detect().unwrap();
        body(&launch);
        let file = |rank| file(Path::new(&folder), rank);
        File::create(file(launch.rank)).unwrap();
        // A rank that ends without MPI_Finalize would take one with it that has not come this far.
        while !(0..launch.world).all(|rank| file(rank).exists()) {
            thread::sleep(Duration::from_millis(5));
        }
        return None;
    }
    let version = Command::new("mpirun").arg("--version").output();
    let Ok(version) = version else {
        eprintln!("SKIPPED: there is no mpirun on the PATH (Debian: openmpi-bin)");
        return None;
    };
    let open_mpi = String::from_utf8_lossy(&version.stdout).contains("Open MPI");
    let folder = tempfile::tempdir().unwrap();
    let own = env::current_exe().unwrap();
    let mut command = Command::new(if ranks == 0 { own.as_os_str() } else { "mpirun".as_ref() });
    for (name, _) in env::vars_os() {
        let launchers = ["OMPI_", "PMIX_", "PMI_", "MPI_", "SLURM_", "PILLION_", "TORCHELASTIC_", "RANK", "WORLD_SIZE"];
        if launchers.iter().any(|prefix| name.to_string_lossy().starts_with(prefix)) {
            command.env_remove(name);
        }
    }
    if ranks > 0 {
        command.args(["-n", &ranks.to_string()]);
        if open_mpi {
            // Containers often forbid reading another process's memory, which Open MPI 4 finds out too late.
            command.env("OMPI_MCA_btl_vader_single_copy_mechanism", "none");
            // Several at once would race to make the folder that they share by default.
            command.env("OMPI_MCA_orte_tmpdir_base", folder.path());
            command.args(["--oversubscribe", "--bind-to", "none"]);
            if rustix::process::getuid().is_root() {
                command.arg("--allow-run-as-root");
            }
        }
        command.arg(own);
    }
    let path = format!("{}::{test}", module_path!().split_once("::").unwrap().1);
    command.args(["--exact", &path, "--nocapture", "--test-threads=1"]).env(FOLDER, folder.path());
    let output = folder.path().join("output");
    let writer = File::create(&output).unwrap();
    command.stdin(Stdio::null()).stdout(writer.try_clone().unwrap()).stderr(writer);
    let mut child = command.spawn().unwrap();
    let deadline = Instant::now() + LAUNCHER_PATIENCE;
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if Instant::now() > deadline {
            child.kill().unwrap();
        }
        thread::sleep(Duration::from_millis(5));
    };
    let seen = (0..ranks.max(1)).map(|rank| file(folder.path(), rank).exists()).collect();
    Some(Job { open_mpi, status, output: fs::read_to_string(output).unwrap(), seen })
}

fn file(folder: &Path, rank: usize) -> PathBuf {
    folder.join(format!("rank-{rank}"))
}
