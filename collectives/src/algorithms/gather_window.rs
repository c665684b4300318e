//! A gather that moves nothing: every rank has written its part of the window when it takes its step, so after one step all of it
//! may be read. What keeps it unchanged while it is read is `Window::shard_mut`, which waits for every rank's release.

use crate::Error;
use crate::shm::control::PAYLOAD;
use crate::shm::flight::{Collective, Kind, Peers};

pub(crate) struct GatherWindow {
    pub(crate) count: usize,
    /// Where the window lies in the heap: the same on every rank for the same window.
    pub(crate) place: u64,
}

impl Collective for GatherWindow {
    fn kind(&self) -> Kind {
        Kind::GatherWindow
    }

    fn count(&self) -> usize {
        self.count
    }

    fn payload(&mut self, words: &mut [u64; PAYLOAD]) -> usize {
        words[0] = self.place;
        1
    }

    fn exchanges(&self) -> u32 {
        1
    }

    fn is_read_by_peers(&self) -> bool {
        false
    }

    /// Moves nothing; checks that every rank means the same window.
    fn exchange(&mut self, _step: u32, peers: &Peers<'_>) -> Result<(), Error> {
        let call = |place| format!("gather of the window at {place}");
        match (0..peers.world()).find(|&rank| peers.payload(rank, 0) != self.place) {
            None => Ok(()),
            Some(peer) => Err(Error::Mismatch { ours: call(self.place), theirs: call(peers.payload(peer, 0)), peer }),
        }
    }

    fn bytes_sent(&self, _world: usize) -> u64 {
        0
    }
}
