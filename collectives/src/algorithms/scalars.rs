//! Scalars: each rank's values travel in its header, so one step shows all of them to everybody. Barriers and agreements are
//! this with few values or none.

use std::sync::Arc;

use parking_lot::Mutex;

use crate::Error;
use crate::shm::control::PAYLOAD;
use crate::shm::flight::{Collective, Kind, Peers};

pub(crate) struct Scalars {
    /// At most [`PAYLOAD`] values of this rank.
    pub(crate) values: Vec<u64>,
    /// All ranks' values, in order of rank, once complete.
    pub(crate) gathered: Arc<Mutex<Vec<u64>>>,
}

impl Collective for Scalars {
    fn kind(&self) -> Kind {
        Kind::Scalars
    }

    fn count(&self) -> usize {
        self.values.len()
    }

    fn payload(&mut self, words: &mut [u64; PAYLOAD]) -> usize {
        words[..self.values.len()].copy_from_slice(&self.values);
        self.values.len()
    }

    fn exchanges(&self) -> u32 {
        1
    }

    fn is_read_by_peers(&self) -> bool {
        false
    }

    fn exchange(&mut self, _step: u32, peers: &Peers<'_>) -> Result<(), Error> {
        let values = (0..peers.world()).flat_map(|rank| (0..self.values.len()).map(move |index| (rank, index)));
        *self.gathered.lock() = values.map(|(rank, index)| peers.payload(rank, index)).collect();
        Ok(())
    }

    fn bytes_sent(&self, world: usize) -> u64 {
        ((world - 1) * self.values.len() * 8) as u64
    }
}
