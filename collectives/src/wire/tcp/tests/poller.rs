//! Rings of the poller. A ring that must come is waited for; that none comes is seen by the one
//! that must come next.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::task::{Wake, Waker};
use std::time::Duration;

use super::*;
use crate::wire::poller::Poller;

const TAG: u8 = 16;
/// For a ring that must come.
const PATIENCE: Duration = Duration::from_secs(30);
/// Long enough for most rings that must not come.
const SHORT: Duration = Duration::from_millis(50);

struct Bell(Sender<()>);

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        let _ = self.0.send(());
    }
}

fn poller() -> (Poller, Receiver<()>) {
    let (sender, rings) = channel();
    (Poller::start(Waker::from(Arc::new(Bell(sender)))).unwrap(), rings)
}

/// Runs one program on rank 0 and another on rank 1. Each gets its wire and what says that the
/// other has got so far.
fn two(zero: impl Fn(TcpWire, &dyn Fn()) + Sync, one: impl Fn(TcpWire, &dyn Fn()) + Sync) {
    let meet = std::sync::Barrier::new(2);
    ranks(2, |launch, wire| {
        let wait = || {
            meet.wait();
        };
        if launch.rank == 0 { zero(wire, &wait) } else { one(wire, &wait) }
    });
}

#[test]
fn a_poller_rings_once_for_bytes_and_again_only_when_the_message_has_moved() {
    two(
        |mut wire, meet| {
            let (poller, rings) = poller();
            let (first, _) = receive(&mut wire, 1, TAG, 3);
            let (second, _) = receive(&mut wire, 1, TAG, 3);
            assert!(!wire.test(&first).unwrap() && wire.arm(&poller));
            assert!(rings.recv_timeout(SHORT).is_err(), "nothing has been sent");
            meet();
            rings.recv_timeout(PATIENCE).expect("the first message rings");
            // As a progress thread that waits for something else would.
            for _ in 0..100 {
                assert!(wire.arm(&poller));
            }
            assert!(rings.recv_timeout(SHORT).is_err(), "nothing has moved since the ring");
            wait(&mut wire, &first).unwrap();
            assert!(wire.arm(&poller));
            meet();
            rings.recv_timeout(PATIENCE).expect("the second message rings");
            wait(&mut wire, &second).unwrap();
        },
        |mut wire, meet| {
            for _ in 0..2 {
                meet();
                let sent = send(&mut wire, 0, TAG, vec![7; 3]);
                wait(&mut wire, &sent).unwrap();
            }
        },
    );
}

#[test]
fn a_poller_rings_where_a_message_can_be_sent_again_and_once_it_has_come_whole() {
    // More than the kernel's buffers hold.
    const LEN: usize = 64 << 20;
    two(
        |mut wire, meet| {
            let (poller, rings) = poller();
            let sent = send(&mut wire, 1, TAG, vec![7; LEN]);
            let mut rung = 0;
            while !wire.test(&sent).unwrap() {
                assert!(wire.arm(&poller));
                if rung == 0 {
                    meet();
                }
                rings.recv_timeout(PATIENCE).expect("a ring when there is room again");
                rung += 1;
            }
            assert!(rung > 0);
        },
        |mut wire, meet| {
            let (poller, rings) = poller();
            meet();
            let (request, _) = receive(&mut wire, 0, TAG, LEN);
            while !wire.test(&request).unwrap() {
                assert!(wire.arm(&poller));
                rings.recv_timeout(PATIENCE).expect("a ring for each part, and for the last one");
            }
        },
    );
}

#[test]
fn bytes_that_nobody_takes_do_not_hide_room_to_write() {
    const LEN: usize = 64 << 20;
    two(
        |mut wire, meet| {
            let (poller, rings) = poller();
            let (early, _) = receive(&mut wire, 1, TAG, 3);
            assert!(!wire.test(&early).unwrap());
            let sent = send(&mut wire, 1, TAG, vec![7; LEN]);
            while wire.test(&sent).is_ok_and(|is_sent| !is_sent) {
                assert!(wire.arm(&poller));
                // Until the buffers are full, and the early message has rung.
                if rings.recv_timeout(SHORT).is_err() {
                    break;
                }
            }
            meet();
            // The early message is here from now on, and nobody takes it.
            meet();
            let mut is_sent = false;
            while !is_sent {
                is_sent = wire.test(&sent).unwrap();
                assert!(wire.arm(&poller));
                if !is_sent {
                    rings.recv_timeout(PATIENCE).expect("a ring when there is room again");
                }
            }
            wait(&mut wire, &early).unwrap();
        },
        |mut wire, meet| {
            meet();
            let early = send(&mut wire, 0, TAG, vec![7; 3]);
            wait(&mut wire, &early).unwrap();
            meet();
            let (request, _) = receive(&mut wire, 0, TAG, LEN);
            wait(&mut wire, &request).unwrap();
        },
    );
}

#[test]
fn a_poller_rings_for_a_message_that_nobody_asked_for_and_for_the_end_of_a_connection() {
    two(
        |mut wire, meet| {
            let (poller, rings) = poller();
            assert!(!wire.has_come(1, TAG).unwrap() && wire.arm(&poller));
            meet();
            rings.recv_timeout(PATIENCE).expect("the message rings");
            assert!(wire.has_come(1, TAG).unwrap());
            let (request, _) = receive(&mut wire, 1, TAG, 3);
            wait(&mut wire, &request).unwrap();
            // Less comes than the kernel waits for.
            let (request, _) = receive(&mut wire, 1, TAG, 1 << 20);
            assert!(!wire.test(&request).unwrap() && wire.arm(&poller));
            meet();
            rings.recv_timeout(PATIENCE).expect("the end rings");
            assert!(matches!(wait(&mut wire, &request), Err(Error::PeerLost { rank: 1, .. })));
        },
        |mut wire, meet| {
            meet();
            let sent = send(&mut wire, 0, TAG, vec![7; 3]);
            wait(&mut wire, &sent).unwrap();
            meet();
            wire.peers.iter_mut().flatten().for_each(|peer| peer.control.vanish());
        },
    );
}

#[test]
fn a_poller_has_nothing_to_ring_for_where_nothing_is_in_flight_and_ends_when_it_is_dropped() {
    two(
        |mut wire, _| {
            let (poller, rings) = poller();
            assert!(wire.arm(&poller));
            drop(poller);
            // Nothing has been sent, and the thread has let go of the bell.
            assert!(rings.recv().is_err());
        },
        |wire, _| drop(wire),
    );
}
