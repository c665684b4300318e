//! Scalars: each rank's values travel in its header, so one step shows all of them to everybody on a host; the greeting carries them to the
//! other hosts. Barriers and agreements are this with few values or none.

use std::sync::Arc;

use parking_lot::Mutex;

use super::transit::Greeting;
use crate::Error;
use crate::call::{Detail, Kind, call};
use crate::shm::control::Call;
use crate::shm::flight::{Collective, Peers, Progress};
use crate::shm::place::Place;

pub(crate) struct Scalars {
    /// At most as many values of this rank as a header holds.
    values: Vec<u64>,
    /// All ranks' values, in order of rank, once complete.
    gathered: Arc<Mutex<Vec<u64>>>,
    greeting: Option<Greeting>,
}

impl Scalars {
    pub(crate) fn new(values: &[u64], gathered: Arc<Mutex<Vec<u64>>>) -> Scalars {
        Scalars { values: values.to_vec(), gathered, greeting: None }
    }
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
        let count = self.values.len();
        let on_host = |peers: &Peers<'_>| -> Vec<u64> {
            let values = (0..peers.world()).flat_map(|rank| (0..count).map(move |index| (rank, index)));
            values.map(|(rank, index)| peers.payload(rank, index)).collect()
        };
        if !peers.shared.has_wire() {
            *self.gathered.lock() = on_host(peers);
            return Ok(Progress::Done);
        }
        if self.greeting.is_none() {
            self.greeting = Some(Greeting::new(peers.call, false, on_host(peers)));
        }
        let greeting = self.greeting.as_mut().expect("made above");
        if let Some(rank) = greeting.poll(peers)? {
            return Ok(Progress::Waiting(rank));
        }
        let hosts = &peers.shared.hosts;
        let of = |rank| &greeting.body(hosts.host(rank))[hosts.column(rank) * count..][..count];
        *self.gathered.lock() = (0..hosts.world()).flat_map(of).copied().collect();
        Ok(Progress::Done)
    }

    fn bytes_sent(&self, world: usize) -> u64 {
        ((world - 1) * self.values.len() * 8) as u64
    }
}
