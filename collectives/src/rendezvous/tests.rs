//! Peers made by hand, who do what no rank does, on both sides of the rendezvous. The bytes are written out here, not taken from the
//! code under test.

use std::io::{ErrorKind, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
};
use rustix::thread::set_thread_res_uid;

use super::{Participant, decline, join};
use crate::memory::fork::Child;
use crate::memory::mapping::Mapping;
use crate::terms::Terms;
use crate::{Error, Launch};

/// Only turns a hang into a failure.
const PATIENCE: Duration = Duration::from_secs(120);
/// For tests that see the deadline pass.
const SHORT: Duration = Duration::from_millis(300);

/// Settings that ranks share.
const TERMS: Terms = Terms([3, 0, 0, 1]);
/// Bytes of a greeting.
const LEN: usize = 56;

type Joined = JoinHandle<Result<Arc<Mapping>, String>>;

fn fresh() -> String {
    Launch::single().job
}

fn start(name: &str, rank: usize, world: usize, limit: Duration) -> Joined {
    let name = name.to_owned();
    thread::spawn(move || {
        let place = Participant { name: &name, rank, world, global_rank: rank, global_world: world, terms: TERMS };
        join(&place, limit, PATIENCE, &mut |_| Ok(())).map_err(|error| error.to_string())
    })
}

fn failure(joined: Joined) -> String {
    joined.join().unwrap().err().expect("it cannot join")
}

fn address(name: &str) -> SocketAddr {
    SocketAddr::from_abstract_name(format!("pillion/{name}")).unwrap()
}

/// Connects to a rank 0 that is about to listen.
fn dial(name: &str) -> UnixStream {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match UnixStream::connect_addr(&address(name)) {
            Ok(stream) => break stream,
            Err(error) => assert!(Instant::now() < deadline, "{error}"),
        }
        thread::sleep(Duration::from_millis(1));
    }
}

fn message(words: &[u64]) -> Vec<u8> {
    let words = words.iter().flat_map(|word| word.to_le_bytes());
    b"pillion4".iter().copied().chain(words).collect()
}

/// A whole greeting, or an answer, of a rank with the settings of these tests.
fn greeting(words: &[u64; 2]) -> Vec<u8> {
    message(&[words, &TERMS.0[..]].concat())
}

/// Says this and returns the answer up to the hang-up, with the file that came along.
fn ask(stream: &UnixStream, pieces: &[&[u8]]) -> (Vec<u8>, Option<OwnedFd>) {
    for piece in pieces {
        if (&*stream).write_all(piece).is_err() {
            // Turned away; the answer is there.
            break;
        }
        // So that they may be read one at a time.
        thread::sleep(Duration::from_millis(1));
    }
    let mut answer = [0; 128];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut into = [IoSliceMut::new(&mut answer)];
    let got = rustix::net::recvmsg(stream, &mut into, &mut control, RecvFlags::CMSG_CLOEXEC).map_or(0, |got| got.bytes);
    let file = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut files) => files.next(),
        _ => None,
    });
    (answer[..got].to_vec(), file)
}

/// Any user but this one.
fn stranger() -> u32 {
    rustix::process::geteuid().as_raw() + 1
}

/// Does something as another user; `None`, and a line that says so, where this user may not.
fn as_stranger<R: Send>(action: impl FnOnce() -> R + Send) -> Option<R> {
    let user = rustix::process::Uid::from_raw(stranger());
    let result = thread::scope(|scope| {
        let thread = scope.spawn(|| set_thread_res_uid(user, user, user).ok().map(|()| action()));
        thread.join().unwrap()
    });
    if result.is_none() {
        // Not by `eprintln`, which the test harness hides.
        let _ = writeln!(std::io::stderr(), "SKIPPED: what another user does to the rendezvous: only root can test it");
    }
    result
}

#[test]
fn a_greeting_in_small_pieces_is_answered_with_memory_that_nobody_can_resize() {
    let job = fresh();
    let zero = start(&job, 0, 2, PATIENCE);
    let whole = greeting(&[1, 2]);
    let (answer, file) = ask(&dial(&job), &whole.chunks(1).collect::<Vec<_>>());
    assert_eq!((answer.len(), &answer[..16]), (LEN, &message(&[0])[..]));
    let (file, mapping) = (file.unwrap(), zero.join().unwrap().unwrap());
    let shape = mapping.shape();
    assert_eq!(answer[16..], [&shape.reserve.to_le_bytes()[..], &TERMS.bytes()].concat());
    let size = rustix::fs::fstat(&file).unwrap().st_size as u64;
    for size in [0, size - 1, size + 1] {
        assert_eq!(rustix::fs::ftruncate(&file, size), Err(Errno::PERM));
    }
}

#[test]
fn whoever_is_turned_away_is_counted_in_the_error_at_the_deadline() {
    let job = fresh();
    let zero = start(&job, 0, 3, Duration::from_secs(5));
    let first = dial(&job);
    assert_eq!(ask(&first, &[&greeting(&[1, 3])]).0[..16], message(&[0]));
    let refused = |pieces: &[&[u8]]| {
        let (answer, file) = ask(&dial(&job), pieces);
        assert!(file.is_none(), "no memory for {pieces:?}");
        assert_eq!(answer[..8], *b"pillion4");
        answer[8..].to_vec()
    };
    let newer = refused(&[b"pillion5", &[0; 16]]);
    let garbage = refused(&[b"GET / HTTP/1.1\r\n\r\n"]);
    let world = refused(&[&greeting(&[2, 4])]);
    assert_eq!(world[8..16], 3u64.to_le_bytes(), "the answer says how many were expected");
    let terms = refused(&[&message(&[2, 3, 3, 0, 0, 2])]);
    assert_eq!(terms[16..], TERMS.bytes(), "the answer says what rank 0 was given");
    let taken = refused(&[&greeting(&[1, 3])]);
    let beyond = [0, 3, u64::MAX].map(|rank| refused(&[&greeting(&[rank, 3])]));
    assert!(beyond.iter().all(|answer| *answer == beyond[0]), "{beyond:?}");
    let mut reasons = [newer, garbage, world, terms, taken, beyond[0].clone()].map(|answer| answer[..8].to_vec());
    reasons.sort();
    assert!(reasons.windows(2).all(|pair| pair[0] != pair[1]), "each refusal has its own number");
    drop(dial(&job));
    (&dial(&job)).write_all(b"pill").unwrap();
    let silent = [dial(&job), dial(&job)];
    let unfinished = dial(&job);
    (&unfinished).write_all(&message(&[2])).unwrap();
    let answered = as_stranger(|| ask(&dial(&job), &[&greeting(&[2, 3])]));
    let strangers = answered.is_some();
    assert!(answered.is_none_or(|(answer, file)| answer.is_empty() && file.is_none()), "memory for a stranger");
    let error = failure(zero);
    let expected = format!(
        "ranks [2] did not come: were they started on this host, with the same job id?; {} connections were refused: {}2 \
         that said nothing, 1 that stopped in the middle of its greeting, 2 that hung up early, 1 that did not greet as a \
         rank does, 1 by another version of this program, 1 that expected another number of ranks, 1 with other settings, of \
         which it was told, 3 with a rank that cannot be, 1 as a rank that had come already",
        13 + usize::from(strangers),
        if strangers { "1 by another user, " } else { "" }
    );
    assert!(error.ends_with(&expected), "{error}\nexpected …{expected}");
    drop((silent, unfinished));
}

#[test]
fn connections_that_say_nothing_do_not_keep_a_rank_out() {
    let job = fresh();
    let zero = start(&job, 0, 2, PATIENCE);
    // More than may wait at a time; half a second for each would be more than the limit.
    let silent: Vec<UnixStream> = (0..300).map(|_| dial(&job)).collect();
    let one = start(&job, 1, 2, PATIENCE);
    assert_eq!(zero.join().unwrap().unwrap().shape(), one.join().unwrap().unwrap().shape());
    drop(silent);
}

#[test]
fn children_that_are_forked_while_ranks_meet_keep_no_connection_and_no_name() {
    let job = fresh();
    let zero = start(&job, 0, 2, PATIENCE);
    let silent = dial(&job);
    // One that came later has its answer, so rank 0 has taken both in.
    assert_eq!(ask(&dial(&job), &[b"pillion5", &[0; 16]]).0[..8], *b"pillion4");
    let child = Child::fork();
    start(&job, 1, 2, PATIENCE).join().unwrap().unwrap();
    zero.join().unwrap().unwrap();
    // Less than the child lives.
    silent.set_read_timeout(Some(PATIENCE / 4)).unwrap();
    let ended = (&silent).read(&mut [0]);
    assert!(matches!(&ended, Ok(0)) || ended.is_err_and(|error| error.kind() == ErrorKind::ConnectionReset), "kept");
    UnixListener::bind_addr(&address(&job)).expect("the name is free");
    drop(child);
}

fn memory(bytes: u64, seals: SealFlags) -> OwnedFd {
    let file = rustix::fs::memfd_create("test", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    rustix::fs::ftruncate(&file, bytes).unwrap();
    rustix::fs::fcntl_add_seals(&file, seals).unwrap();
    file
}

/// What rank 1 of 2 says when rank 0 gives this answer.
fn failure_of(answer: &[u8], file: Option<&OwnedFd>) -> String {
    let job = fresh();
    let listener = UnixListener::bind_addr(&address(&job)).unwrap();
    let one = start(&job, 1, 2, PATIENCE);
    let (mut stream, _) = listener.accept().unwrap();
    let mut said = [0; LEN];
    stream.read_exact(&mut said).unwrap();
    assert_eq!(said[..], greeting(&[1, 2]));
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let files = file.map(|file| [file.as_fd()]);
    if let Some(files) = &files {
        control.push(SendAncillaryMessage::ScmRights(files));
    }
    rustix::net::sendmsg(&stream, &[IoSlice::new(answer)], &mut control, SendFlags::NOSIGNAL).unwrap();
    drop(stream);
    failure(one)
}

#[test]
fn an_answer_that_no_rank_0_gives_is_an_error_that_says_what_is_wrong() {
    let sealed = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
    let welcome = greeting(&[0, 4096]);
    let foreign = format!(
        "process {} of user {} listens under this job's name, but does not answer as rank 0 does: give the job another id",
        std::process::id(),
        rustix::process::geteuid().as_raw()
    );
    for answer in
        [&b"HTTP/1.1 400 Bad Request\r\n\r\n"[..], b"x", &welcome[..23], b"p", &greeting(&[99, 0]), &greeting(&[9, 0])]
    {
        let error = failure_of(answer, None);
        assert!(error.ends_with(&foreign), "{answer:?}: {error}");
    }
    let error = failure_of(b"pillion1", None);
    assert!(error.contains("another version of this program: start every rank from the same build"), "{error}");
    let error = failure_of(&welcome, None);
    assert!(error.contains("shared memory from rank 0") && error.contains("raise `ulimit -n`"), "{error}");
    let unsealed = [SealFlags::empty(), SealFlags::SHRINK | SealFlags::GROW].map(|seals| memory(1 << 20, seals));
    let file = std::fs::File::open("/dev/null").unwrap();
    for file in unsealed.iter().chain([&file.into()]) {
        let error = failure_of(&welcome, Some(file));
        assert!(error.contains("no memory of sealed size"), "{error}");
    }
    let error = failure_of(&welcome, Some(&memory(1, sealed)));
    assert!(error.contains("it has 1 bytes where"), "{error}");
    for size in [u64::MAX, 1 << 63, 1 << 47, 4095] {
        let error = failure_of(&greeting(&[0, size]), Some(&memory(1, sealed)));
        assert!(error.contains(&format!("arenas of {size} bytes")), "{error}");
    }
}

#[test]
fn a_listener_that_says_nothing_or_accepts_nobody_is_named_at_the_deadline() {
    let job = fresh();
    let listener = UnixListener::bind_addr(&address(&job)).unwrap();
    let one = start(&job, 1, 2, SHORT);
    let accepted = listener.accept().unwrap();
    let error = failure(one);
    let process = std::process::id();
    assert!(error.contains(&format!("rank 0 did not come: process {process} of user ")), "{error}");
    assert!(error.ends_with("but does not answer: is it stopped?"), "{error}");
    drop(accepted);
    // From now on one connection fills the queue.
    rustix::net::listen(&listener, 0).unwrap();
    let queued = dial(&job);
    let error = failure(start(&job, 1, 2, SHORT));
    assert!(error.contains("accepts nobody"), "{error}");
    drop(queued);
}

#[test]
fn another_user_that_holds_the_name_is_named_and_given_time_to_leave() {
    let job = fresh();
    let Some(listener) = as_stranger(|| UnixListener::bind_addr(&address(&job)).unwrap()) else { return };
    let holder = format!("process {} of user {}", std::process::id(), stranger());
    let error = failure(start(&job, 0, 2, SHORT));
    assert!(error.ends_with(&format!("{holder} has taken this job's name: give the job another id")), "{error}");
    let error = failure(start(&job, 1, 2, SHORT));
    let expected = format!("{holder}, another user, listens under this job's name: give the job another id");
    assert!(error.ends_with(&expected), "{error}");
    let ranks = [0, 1].map(|rank| start(&job, rank, 2, PATIENCE));
    for _ in 0..20 {
        let (mut stream, _) = listener.accept().unwrap();
        let said = stream.read(&mut [0; 24]);
        assert!(!said.is_ok_and(|count| count > 0), "a rank greeted a stranger");
    }
    drop(listener);
    for rank in ranks {
        rank.join().unwrap().unwrap();
    }
}

#[test]
fn a_rank_that_meets_the_end_of_an_older_attempt_comes_again() {
    let job = fresh();
    let listener = UnixListener::bind_addr(&address(&job)).unwrap();
    let one = start(&job, 1, 2, PATIENCE);
    for greeted in [true, false] {
        let (mut stream, _) = listener.accept().unwrap();
        if greeted {
            stream.read_exact(&mut [0; LEN]).unwrap();
        }
    }
    let error = failure(start(&job, 1, 2, Duration::ZERO));
    drop(listener);
    assert!(error.contains("rank 0 did not come"), "{error}");
    let zero = start(&job, 0, 2, PATIENCE);
    for rank in [zero, one] {
        rank.join().unwrap().unwrap();
    }
}

#[test]
fn a_second_job_of_the_same_name_is_told_to_take_another_and_the_first_goes_on() {
    let job = fresh();
    let first = start(&job, 0, 2, PATIENCE);
    drop(dial(&job));
    let error = failure(start(&job, 0, 2, PATIENCE));
    let expected = format!("another running job (process {} of user ", std::process::id());
    assert!(error.contains(&expected) && error.ends_with("has the same name: give each job its own id"), "{error}");
    let one = start(&job, 1, 2, PATIENCE);
    for rank in [first, one] {
        rank.join().unwrap().unwrap();
    }
}

#[test]
fn a_part_of_a_job_is_named_with_its_own_count() {
    let name = format!("{}/{}", fresh(), "x".repeat(20));
    let place = Participant { name: &name, rank: 0, world: 2, global_rank: 5, global_world: 8, terms: TERMS };
    let error = join(&place, Duration::ZERO, PATIENCE, &mut |_| Ok(())).err().unwrap().to_string();
    let expected =
        format!("rank 5 of 8 could not join job `{name}`: ranks [1] (counted among the 2 that meet here) did not come");
    assert!(error.starts_with(&expected), "{error}");
    let place = Participant { name: &"x".repeat(100), ..place };
    let error = join(&place, Duration::ZERO, PATIENCE, &mut |_| Ok(())).err().unwrap().to_string();
    assert!(error.contains("108 bytes"), "{error}");
}

#[test]
fn a_rank_that_has_reason_to_does_not_wait_for_others() {
    for rank in [0, 1] {
        let job = fresh();
        let place = Participant { name: &job, rank, world: 3, global_rank: rank, global_world: 3, terms: TERMS };
        let mut asked = 0;
        let joined = join(&place, PATIENCE, PATIENCE, &mut |missing| {
            assert_eq!(missing, if rank == 0 { &[1, 2][..] } else { &[0] });
            asked += 1;
            let lost = Error::PeerLost { rank: 2, op: "the test".to_owned(), how: "gone" };
            if asked == 3 { Err(lost) } else { Ok(()) }
        });
        assert!(matches!(joined, Err(Error::PeerLost { rank: 2, .. })), "rank {rank}");
    }
}

#[test]
fn a_rank_that_cannot_join_is_named_to_those_who_can() {
    let place = |job: &str, rank| (job.to_owned(), rank);
    let give_up = |(job, rank): (String, usize), digest: u64| {
        thread::spawn(move || {
            decline(
                &Participant { name: &job, rank, world: 3, global_rank: rank, global_world: 3, terms: TERMS },
                digest,
            )
        })
    };
    let job = fresh();
    let zero = start(&job, 0, 3, PATIENCE);
    assert!(!give_up(place(&job, 2), 7).join().unwrap(), "rank 0 can join");
    // Rank 0 passes it on to whoever comes later, with the reason.
    assert!(give_up(place(&job, 1), 7).join().unwrap(), "for the same reason");
    assert_eq!(failure(zero), "rank 2 aborted: it cannot join, and has said why");

    let job = fresh();
    let one = start(&job, 1, 3, PATIENCE);
    let zero = give_up(place(&job, 0), 7);
    assert_eq!(failure(one), "rank 0 aborted: it cannot start, and has said why");
    assert!(give_up(place(&job, 2), 7).join().unwrap(), "for the same reason");
    assert!(!zero.join().unwrap());

    let job = fresh();
    let [zero, one, two] = [(0, 7), (1, 7), (2, 8)].map(|(rank, digest)| give_up(place(&job, rank), digest));
    assert!(one.join().unwrap() && !two.join().unwrap(), "rank 2 has a reason of its own");
    assert!(!zero.join().unwrap());
    assert!(!decline(
        &Participant { name: &fresh(), rank: 0, world: 1, global_rank: 0, global_world: 1, terms: TERMS },
        7
    ));
}

#[test]
fn a_limit_beyond_what_the_clock_counts_is_no_limit() {
    let job = fresh();
    let ranks = [0, 1].map(|rank| start(&job, rank, 2, Duration::MAX));
    for rank in ranks {
        rank.join().unwrap().unwrap();
    }
}
