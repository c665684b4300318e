//! Whether ranks that have met end before they are connected. A rank listens for as long as it is
//! one, so a rank whose listener refuses a connection is gone.

use std::io::ErrorKind;
use std::net::TcpStream;
use std::time::{Duration, Instant};

use super::network::Network;
use crate::Error;
use crate::error::ranks;

/// Time before the first look. Ranks that are well come sooner, and are not asked.
const FIRST: Duration = Duration::from_millis(100);
/// Longest time between two looks: each is twice as long as the one before.
const LONGEST: Duration = Duration::from_secs(2);
/// Most ranks that one look asks.
const AT_ONCE: usize = 16;
/// Most ranks that are asked when one is gone.
const MOST_ASKED: usize = 256;
/// How long an answer may take. A host that does not answer at all says nothing of its ranks.
const ANSWER: Duration = Duration::from_millis(200);

/// Looks after the ranks for which one rank waits.
pub(crate) struct Lookout<'a> {
    network: &'a Network,
    next: Instant,
    pause: Duration,
    /// Counts the ranks asked, so that all have their turn.
    asked: usize,
}

impl<'a> Lookout<'a> {
    pub(crate) fn new(network: &'a Network) -> Lookout<'a> {
        Lookout { network, next: Instant::now() + FIRST, pause: FIRST, asked: 0 }
    }

    /// Which of these ranks of the job have ended, if it is time to look.
    pub(crate) fn gone(&mut self, missing: &[usize]) -> Vec<usize> {
        if Instant::now() < self.next {
            return Vec::new();
        }
        let first = self.asked;
        self.asked += missing.len().min(AT_ONCE);
        let turn = (first..self.asked).map(|number| missing[number % missing.len()]);
        let gone = turn.filter(|&rank| has_ended(self.network, rank)).collect();
        self.pause = (2 * self.pause).min(LONGEST);
        self.next = Instant::now() + self.pause;
        gone
    }
}

/// The error for ranks, at least one, that are gone. A rank that ends because of another may be
/// seen first, so this asks the others of the job as well, for a moment.
pub(crate) fn lost(network: &Network, gone: &[usize]) -> Error {
    let started = Instant::now();
    let others = network.others().filter(|rank| !gone.contains(rank)).take(MOST_ASKED);
    let more = others.take_while(|_| started.elapsed() < LONGEST / 2).filter(|&rank| has_ended(network, rank));
    let mut all: Vec<usize> = gone.iter().copied().chain(more).collect();
    all.sort_unstable();
    let op = match all[..] {
        [_] => "the start".to_owned(),
        _ => format!("the start, in which {} have ended", ranks(&all)),
    };
    Error::PeerLost { rank: all[0], op, how: "it has ended since the ranks met" }
}

fn has_ended(network: &Network, rank: usize) -> bool {
    let refused = TcpStream::connect_timeout(&network.address_of(rank), ANSWER).err();
    refused.is_some_and(|error| error.kind() == ErrorKind::ConnectionRefused)
}
