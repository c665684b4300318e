//! A gather that moves nothing: every rank has written its part of the window when it takes its step, so after one step all of it
//! may be read. What keeps it unchanged while it is read is `Window::shard_mut`, which waits for every rank's release.

use crate::Error;
use crate::shm::flight::{Collective, Kind, Peers};

pub(crate) struct GatherWindow {
    pub(crate) count: usize,
}

impl Collective for GatherWindow {
    fn kind(&self) -> Kind {
        Kind::GatherWindow
    }

    fn count(&self) -> usize {
        self.count
    }

    fn exchanges(&self) -> u32 {
        0
    }

    fn is_read_by_peers(&self) -> bool {
        false
    }

    fn exchange(&mut self, _step: u32, _peers: &Peers<'_>) -> Result<(), Error> {
        Ok(())
    }

    fn bytes_sent(&self, _world: usize) -> u64 {
        0
    }
}
