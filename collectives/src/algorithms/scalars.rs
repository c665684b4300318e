//! Scalars: each rank's values travel in its header, so one step shows all of them to everybody. Barriers and agreements are
//! this with few values or none.

use std::sync::Arc;

use parking_lot::Mutex;

use crate::Error;
use crate::call::{Detail, Kind, call};
use crate::shm::control::Call;
use crate::shm::flight::{Collective, Peers, Progress};
use crate::shm::place::Place;

pub(crate) struct Scalars {
    /// At most as many values of this rank as a header holds.
    pub(crate) values: Vec<u64>,
    /// All ranks' values, in order of rank, once complete.
    pub(crate) gathered: Arc<Mutex<Vec<u64>>>,
}

impl Collective for Scalars {
    fn call(&self) -> Call {
        call(Kind::Scalars, None, false, self.values.len(), Detail::None)
    }

    fn begin(&mut self, peers: &mut Peers<'_>) -> Result<(Place, Place), Error> {
        self.values.iter().enumerate().for_each(|(index, &value)| peers.set_payload(index, value));
        Ok((Place::Header, Place::None))
    }

    fn exchange(&mut self, _step: u32, peers: &mut Peers<'_>) -> Result<Progress, Error> {
        let values = (0..peers.world()).flat_map(|rank| (0..self.values.len()).map(move |index| (rank, index)));
        *self.gathered.lock() = values.map(|(rank, index)| peers.payload(rank, index)).collect();
        Ok(Progress::Done)
    }

    fn bytes_sent(&self, world: usize) -> u64 {
        ((world - 1) * self.values.len() * 8) as u64
    }
}
