//! Scalars: each rank's values travel in its header, so one step shows all of them to everybody on a host; the greeting carries them to the
//! other hosts. Barriers and agreements are this with few values or none.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;

use super::transit::Greeting;
use crate::Error;
use crate::call::{Detail, Kind, Purpose, call};
use crate::shm::control::{BRIEF, Call};
use crate::shm::flight::{Collective, Opening, Peers, Progress};
use crate::shm::place::Place;

pub(crate) struct Scalars {
    /// At most as many values of this rank as a header holds.
    values: Vec<u64>,
    purpose: Purpose,
    /// All ranks' values, in order of rank, once complete.
    gathered: Vec<u64>,
    /// Where they go besides.
    deliver_to: Option<Arc<Mutex<Vec<u64>>>>,
    greeting: Option<Greeting>,
}

impl Scalars {
    pub(crate) fn new(values: &[u64], purpose: Purpose) -> Scalars {
        Scalars { values: values.to_vec(), purpose, gathered: Vec::new(), deliver_to: None, greeting: None }
    }

    /// The same, for another thread to complete.
    pub(crate) fn deliver_to(self, place: Arc<Mutex<Vec<u64>>>) -> Scalars {
        Scalars { deliver_to: Some(place), ..self }
    }

    /// All ranks' values, in order of rank.
    pub(crate) fn into_gathered(self) -> Vec<u64> {
        self.gathered
    }

    /// Where a rank's values stand.
    fn words<'a>(&self, peers: &'a Peers<'_>, rank: usize) -> &'a [AtomicU64] {
        if self.values.len() <= BRIEF { peers.brief(rank) } else { &peers.header(rank).payload[..] }
    }

    fn on_host(&self, peers: &Peers<'_>) -> Vec<u64> {
        let of = |rank| self.words(peers, rank)[..self.values.len()].iter().map(|word| word.load(Ordering::Relaxed));
        (0..peers.world()).flat_map(of).collect()
    }
}

impl Collective for Scalars {
    fn call(&self) -> Call {
        call(Kind::Scalars, None, false, self.values.len(), Detail::Purpose(self.purpose))
    }

    fn begin(&mut self, peers: &mut Peers<'_>) -> Result<Opening, Error> {
        let mut opening = Opening::new(Place::Header, Place::None);
        if let Some(brief) = opening.brief.get_mut(..self.values.len()) {
            brief.copy_from_slice(&self.values);
        } else {
            self.values.iter().enumerate().for_each(|(index, &value)| peers.set_payload(index, value));
        }
        Ok(opening)
    }

    fn exchange(&mut self, _step: u32, peers: &mut Peers<'_>) -> Result<Progress, Error> {
        if !peers.shared.has_wire() {
            if !self.values.is_empty() {
                self.gathered = self.on_host(peers);
            }
        } else {
            if self.greeting.is_none() {
                self.greeting = Some(Greeting::new(peers.call, false, self.on_host(peers)));
            }
            let greeting = self.greeting.as_mut().expect("made above");
            if let Some(rank) = greeting.poll(peers)? {
                return Ok(Progress::Waiting(rank));
            }
            let (hosts, count) = (&peers.shared.hosts, self.values.len());
            let of = |rank| &greeting.body(hosts.host(rank))[hosts.column(rank) * count..][..count];
            self.gathered = (0..hosts.world()).flat_map(of).copied().collect();
        }
        if let Some(place) = &self.deliver_to {
            *place.lock() = std::mem::take(&mut self.gathered);
        }
        Ok(Progress::Done)
    }

    fn bytes_sent(&self, world: usize) -> u64 {
        ((world - 1) * self.values.len() * 8) as u64
    }
}
