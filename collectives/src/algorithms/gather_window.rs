//! A gather that moves nothing: every rank has written its part of the window when it takes its step, so after one step all of it
//! may be read. What keeps it unchanged while it is read is `Window::shard_mut`, which waits for every rank's release.

use crate::Error;
use crate::call::{Detail, Kind, call};
use crate::shm::control::Call;
use crate::shm::flight::{Collective, Peers, Progress};
use crate::shm::place::Place;

pub(crate) struct GatherWindow {
    pub(crate) count: usize,
    /// Where the window lies in the heap: the same on every rank for the same window.
    pub(crate) place: u64,
}

impl Collective for GatherWindow {
    fn call(&self) -> Call {
        call(Kind::GatherWindow, None, false, self.count, Detail::Window(self.place))
    }

    fn begin(&mut self, _peers: &mut Peers<'_>) -> Result<(Place, Place), Error> {
        Ok((Place::None, Place::None))
    }

    fn exchange(&mut self, _step: u32, _peers: &mut Peers<'_>) -> Result<Progress, Error> {
        Ok(Progress::Done)
    }

    fn bytes_sent(&self, _world: usize) -> u64 {
        0
    }
}
