//! Messages with tags, from any rank, and looked at before they are received.

mod common;

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use common::{launches, run};
use pillion_collectives::{Communicator, Envelope, Error, Launch, Options, Pending, Start};
use pillion_kernels::{Buffer, Cpu, DType, Device, Event};

/// Ranks and simulated hosts.
const WORLDS: [(usize, usize); 5] = [(1, 1), (2, 1), (3, 1), (4, 2), (3, 3)];
/// Lengths in f32: nothing, short, of a few staged pieces, and long enough to be read in place.
const LENGTHS: [usize; 6] = [0, 1, 1000, 20_000, 200_000, 300_000];

fn options(hosts: usize) -> Options {
    Options { simulated_hosts: hosts, ..Options::default() }
}

fn buffer(values: &[f32]) -> Buffer {
    let mut buffer = Cpu.allocate(DType::F32, values.len()).unwrap();
    Cpu.stream().upload(buffer.view_mut(), values);
    buffer
}

fn values(buffer: &Buffer) -> Vec<f32> {
    Cpu.stream().download(buffer.view()).unwrap()
}

fn kind(error: &Error) -> &'static str {
    match error {
        Error::Timeout { .. } => "timeout",
        Error::PeerLost { .. } => "peer lost",
        _ => "another",
    }
}

fn empty(len: usize) -> Buffer {
    buffer(&vec![-1.0; len])
}

/// Numbers that look random.
struct Lot(u64);

impl Lot {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        (self.0 >> 33) as usize % bound
    }

    fn start(&mut self) -> Start {
        if self.below(2) == 0 { Start::Here } else { Start::After(Event::PAST) }
    }
}

/// One message of a program that every rank knows.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Letter {
    from: usize,
    to: usize,
    tag: u32,
    len: usize,
    number: usize,
}

impl Letter {
    fn values(self) -> Vec<f32> {
        (0..self.len).map(|index| (self.number * 1000 + index % 1000) as f32).collect()
    }
}

/// Each rank sends its messages in their order, and receives those for it in an order of its own,
/// of which every fourth is from whoever sends one with the tag. The messages of one rank with one
/// tag come in the order in which they were sent.
fn messages_by_lot(all: &Communicator, seed: u64) {
    const TAGS: usize = 3;
    let (rank, world) = (all.rank(), all.world());
    let mut common = Lot(seed);
    let letters: Vec<Letter> = (0..12 * world)
        .map(|number| {
            let (from, to, tag) = (common.below(world), common.below(world), common.below(TAGS) as u32);
            Letter { from, to, tag, len: LENGTHS[common.below(LENGTHS.len())], number }
        })
        .collect();
    // What is taken from any rank has one length, since nobody knows which it is.
    let letters: Vec<Letter> = letters
        .into_iter()
        .map(|letter| if letter.tag == 0 { Letter { len: 777, ..letter } } else { letter })
        .collect();
    let mut own = Lot(seed ^ (rank as u64 + 1) << 40);
    let sent: Vec<Pending<Buffer>> = letters
        .iter()
        .filter(|letter| letter.from == rank)
        // Not with `Here`: the receiver may want another first.
        .map(|letter| all.send_tagged(buffer(&letter.values()), letter.to, letter.tag, Event::PAST))
        .collect();
    let mut lines: Vec<VecDeque<Letter>> = (0..world * TAGS).map(|_| VecDeque::new()).collect();
    for letter in letters.iter().filter(|letter| letter.to == rank) {
        lines[letter.from * TAGS + letter.tag as usize].push_back(*letter);
    }
    let mut flying: Vec<(Pending<Buffer>, Letter)> = Vec::new();
    while lines.iter().any(|line| !line.is_empty()) {
        let open: Vec<usize> = (0..lines.len()).filter(|&line| !lines[line].is_empty()).collect();
        let line = open[own.below(open.len())];
        let (from, tag) = (line / TAGS, (line % TAGS) as u32);
        // From any rank, once no other receive of this tag is under way: which it takes is then
        // known.
        let is_free = flying.iter().all(|(_, letter)| letter.tag != 0);
        if tag == 0 && is_free && own.below(2) == 0 {
            let (received, from) = all.receive_any(empty(777), 0, own.start()).wait().unwrap();
            let letter = lines[from * TAGS].pop_front().expect("a message that was sent");
            assert_eq!(values(&received), letter.values(), "{letter:?}");
            continue;
        }
        let letter = lines[line].pop_front().unwrap();
        let start = own.start();
        let received = all.receive_tagged(empty(letter.len), from, tag, start);
        flying.push((received, letter));
        if own.below(3) == 0 {
            for (received, letter) in flying.drain(..) {
                assert_eq!(values(&received.wait().unwrap()), letter.values(), "{letter:?}");
            }
        }
    }
    for (received, letter) in flying {
        assert_eq!(values(&received.wait().unwrap()), letter.values(), "{letter:?}");
    }
    for sent in sent {
        sent.wait().unwrap();
    }
    all.barrier().unwrap();
    assert_eq!([0, 1, 2].map(|tag| all.probe(None, tag).unwrap()), [None; 3]);
    all.barrier().unwrap();
}

#[test]
fn messages_go_to_the_first_receive_that_wants_them_whatever_comes_before() {
    let by_lot = |launches: Vec<Launch>, options: Options| {
        run(launches, options, |_, all| (0..12).for_each(|seed| messages_by_lot(&all, seed)));
    };
    for (world, hosts) in WORLDS {
        by_lot(Launch::threads(world), options(hosts));
    }
    by_lot(Launch::threads(3), Options { reads_private: false, ..options(1) });
    for hosts in [&[1, 1][..], &[2, 2]] {
        by_lot(launches(hosts, true), options(1));
    }
}

/// Asks until there is something.
fn wait_for(all: &Communicator, from: Option<usize>, tag: u32) -> Envelope {
    let started = Instant::now();
    loop {
        if let Some(found) = all.probe(from, tag).unwrap() {
            return found;
        }
        assert!(started.elapsed() < Duration::from_secs(60), "no message with tag {tag} came");
        std::thread::yield_now();
    }
}

#[test]
fn a_probe_tells_of_the_next_message_and_takes_none() {
    let jobs =
        [(Launch::threads(2), 1), (Launch::threads(2), 2), (Launch::threads(4), 2), (launches(&[1, 1], true), 1)];
    for (launches, hosts) in jobs {
        run(launches, options(hosts), |_, all| {
            let last = all.world() - 1;
            assert_eq!(all.probe(Some(last), 5).unwrap(), None);
            all.barrier().unwrap();
            if all.rank() == last {
                // A message in front that nobody wants yet, longer than what stays in a mailbox.
                let long: Vec<f32> = (0..300_000).map(|index| index as f32).collect();
                let sent = [(&long[..], 4), (&[1.0, 2.0], 5), (&[], 6)]
                    .map(|(values, tag)| all.send_tagged(buffer(values), 0, tag, Event::PAST));
                sent.into_iter().for_each(|sent| drop(sent.wait().unwrap()));
            }
            if all.rank() == 0 {
                let expected = |tag, len| Envelope { from: last, tag, dtype: DType::F32, len };
                assert_eq!(wait_for(&all, None, 5), expected(5, 2));
                assert_eq!(wait_for(&all, Some(last), 6), expected(6, 0));
                assert_eq!(wait_for(&all, Some(last), 5), expected(5, 2));
                let long = wait_for(&all, None, 4);
                assert_eq!(long, expected(4, 300_000));
                assert_eq!(all.probe(Some(0), 4).unwrap(), None);
                let received = all.receive_tagged(empty(long.len), long.from, 4, Start::Here).wait().unwrap();
                assert_eq!(values(&received)[299_999], 299_999.0);
                let (received, from) = all.receive_any(empty(2), 5, Event::PAST).wait().unwrap();
                assert_eq!((values(&received), from), (vec![1.0, 2.0], last));
                all.receive_tagged(empty(0), last, 6, Event::PAST).wait().unwrap();
                assert_eq!([4, 5, 6].map(|tag| all.probe(None, tag).unwrap()), [None; 3]);
                // A receive that waits for a message has it before any probe.
                let received = all.receive_tagged(empty(1), last, 7, Event::PAST);
                all.barrier().unwrap();
                received.wait().unwrap();
                assert_eq!(all.probe(None, 7).unwrap(), None);
            } else {
                all.barrier().unwrap();
                if all.rank() == last {
                    all.send_tagged(buffer(&[3.0]), 0, 7, Event::PAST).wait().unwrap();
                }
            }
            assert!(matches!(all.probe(Some(9), 0), Err(Error::Misuse { .. })));
            all.barrier().unwrap();
        });
    }
}

#[test]
fn a_receive_from_any_rank_names_them_when_none_is_left() {
    let jobs = [(Launch::threads(3), 1, 60_000), (Launch::threads(3), 3, 300), (launches(&[1, 1, 1], true), 1, 60_000)];
    for (launches, hosts, limit) in jobs {
        let errors = run(launches, options(hosts), |_, all| {
            all.barrier().unwrap();
            if all.rank() > 0 {
                all.send_tagged(buffer(&[all.rank() as f32]), 0, 1, Event::PAST).wait().unwrap();
                return None;
            }
            // What was sent before a rank left is still there.
            let mut from: Vec<usize> =
                (0..2).map(|_| all.receive_any(empty(1), 1, Start::Here).wait().unwrap().1).collect();
            from.sort_unstable();
            assert_eq!(from, [1, 2]);
            let start = Start::Within { event: Event::PAST, limit: Duration::from_millis(limit) };
            Some(all.receive_any(empty(1), 1, start).wait().unwrap_err())
        });
        let error = errors[0].as_ref().unwrap();
        // Between threads that stand for hosts nobody is told of an orderly end.
        let expected = if hosts == 1 { "peer lost" } else { "timeout" };
        assert_eq!(kind(error), expected, "{error}");
    }
}

#[test]
fn a_message_of_another_length_is_named_with_its_tag_even_if_it_came_early() {
    let jobs = || [(Launch::threads(2), 1), (Launch::threads(2), 2), (launches(&[1, 1], true), 1)];
    let cases =
        [true, false].into_iter().flat_map(|is_early| jobs().map(|(launches, hosts)| (is_early, launches, hosts)));
    for (is_early, launches, hosts) in cases {
        let errors = run(launches, options(hosts), |_, all| {
            if all.rank() == 1 {
                let sent = all.send_tagged(buffer(&[0.0; 4]), 0, 8, Event::PAST).wait().map(drop);
                let sent = sent.and_then(|()| all.send_tagged(buffer(&[0.0; 2]), 0, 9, Event::PAST).wait().map(drop));
                return sent.and_then(|()| all.barrier()).unwrap_err();
            }
            if is_early {
                all.receive_tagged(empty(2), 1, 9, Event::PAST).wait().unwrap();
            }
            let error = all.receive_tagged(empty(3), 1, 8, Event::PAST).wait().unwrap_err();
            assert!(matches!(error, Error::Mismatch { peer: 1, .. }), "{error}");
            for part in ["3 × f32 with tag 8 from rank 1", "4 × f32 with tag 8 to rank 0"] {
                assert!(error.to_string().contains(part), "{error}");
            }
            assert!(all.barrier().is_err());
            error
        });
        assert_ne!(kind(&errors[1]), "timeout", "{}", errors[1]);
    }
}

/// What a rank has shown of its private memory stays as it is after its operation has failed: others
/// may still read it, and must not take what comes after for the message.
#[test]
fn a_message_that_its_sender_has_given_up_is_received_whole_or_not_at_all() {
    const LEN: usize = 1 << 20;
    let gave_up = std::sync::Barrier::new(2);
    let received = run(Launch::threads(2), options(1), |_, all| {
        if all.rank() == 0 {
            let start = Start::Within { event: Event::PAST, limit: Duration::from_millis(50) };
            let error = all.send_tagged(buffer(&vec![1.0; LEN]), 1, 0, start).wait().unwrap_err();
            assert_eq!(kind(&error), "timeout");
            // The same memory, if it has been given back.
            let again: Vec<Buffer> = (0..4).map(|_| buffer(&vec![2.0; LEN])).collect();
            gave_up.wait();
            gave_up.wait();
            drop(again);
            return None;
        }
        gave_up.wait();
        let received = all.receive(empty(LEN), 0, Event::PAST).wait();
        gave_up.wait();
        received.ok()
    });
    for received in received.into_iter().flatten() {
        assert!(values(&received).iter().all(|&value| value == 1.0), "memory that was another's by then");
    }
}

/// A limit counts silence: receives that are called long before their turn do not run out of time
/// while others bring theirs nearer.
#[test]
fn a_receive_whose_turn_comes_late_is_not_late() {
    for hosts in [1, 2] {
        run(Launch::threads(2), options(hosts), |_, all| {
            let within = || Start::Within { event: Event::PAST, limit: Duration::from_millis(4000) };
            if all.rank() == 0 {
                let receives: Vec<_> = (0..15).map(|_| all.receive(empty(5), 1, within())).collect();
                receives.into_iter().for_each(|received| drop(received.wait().unwrap()));
            } else {
                for number in 0..15 {
                    std::thread::sleep(Duration::from_millis(400));
                    all.send(buffer(&[number as f32; 5]), 0, Event::PAST).wait().unwrap();
                }
            }
            all.barrier().unwrap();
        });
    }
}

/// What came early, and waits for its receive's start, is not lost with its sender.
#[test]
fn a_message_that_came_early_outlives_its_sender() {
    let (left, told) = std::sync::mpsc::channel();
    let (left, told) = (parking_lot::Mutex::new(left), parking_lot::Mutex::new(told));
    run(Launch::threads(3), options(1), |_, all| match all.rank() {
        0 => {
            all.receive_tagged(empty(1), 1, 2, Start::Here).wait().unwrap();
            told.lock().recv_timeout(Duration::from_secs(60)).unwrap();
            // An event of the other rank's making, long enough for many looks at the one that left.
            let event = all.receive_tagged(empty(1), 2, 3, Event::PAST);
            let early = all.receive_tagged(empty(3), 1, 1, event.event());
            let any = all.receive_any(empty(4), 4, event.event());
            assert_eq!(values(&early.wait().unwrap()), [1.0, 2.0, 3.0]);
            assert_eq!(any.wait().unwrap().1, 1);
            event.wait().unwrap();
        }
        1 => {
            all.send_tagged(buffer(&[1.0, 2.0, 3.0]), 0, 1, Event::PAST).wait().unwrap();
            all.send_tagged(buffer(&[0.0; 4]), 0, 4, Event::PAST).wait().unwrap();
            all.send_tagged(buffer(&[5.0]), 0, 2, Event::PAST).wait().unwrap();
            drop(all);
            left.lock().send(()).unwrap();
        }
        _ => {
            std::thread::sleep(Duration::from_millis(100));
            all.send_tagged(buffer(&[6.0]), 0, 3, Event::PAST).wait().unwrap();
        }
    });
}

#[test]
fn whoever_probes_again_and_again_learns_that_another_rank_has_given_up() {
    for (launches, hosts) in [(Launch::threads(2), 1), (Launch::threads(2), 2), (launches(&[1, 1], true), 1)] {
        run(launches, options(hosts), |_, all| {
            all.barrier().unwrap();
            if all.rank() == 1 {
                return all.abort("it has had enough");
            }
            let started = Instant::now();
            let error = loop {
                match all.probe(Some(1), 0) {
                    Ok(found) => assert_eq!(found, None),
                    Err(error) => break error,
                }
                assert!(started.elapsed() < Duration::from_secs(60), "it never learns of it over {}", all.backend());
            };
            assert!(error.to_string().contains("it has had enough"), "{error}");
        });
    }
}
