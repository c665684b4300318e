//! Scalars: each rank's values travel in its header, so one step shows all of them to everybody on a host; the greeting carries them to the
//! other hosts. Barriers and agreements are this with few values or none.

use std::borrow::Cow;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use parking_lot::Mutex;

use super::transit::Greeting;
use crate::Error;
use crate::call::{Detail, Kind, Purpose, call};
use crate::engine::flight::{Algorithm, Opening, Peers, Progress};
use crate::memory::control::{BRIEF, Call};
use crate::memory::place::Place;

pub(crate) struct Scalars<'a> {
    /// At most as many values of this rank as a header holds. Borrowed where the caller waits,
    /// because copying them about would take a tenth of a barrier's time.
    values: Cow<'a, [u64]>,
    purpose: Purpose,
    /// All ranks' values, in order of rank, once complete.
    gathered: Vec<u64>,
    /// Where they go besides.
    deliver_to: Option<Arc<Mutex<Vec<u64>>>>,
    greeting: Option<Greeting>,
}

impl<'a> Scalars<'a> {
    /// `memory` is for all ranks' values.
    pub(crate) fn new(own: &'a [u64], purpose: Purpose, mut memory: Vec<u64>) -> Scalars<'a> {
        memory.clear();
        Scalars { values: Cow::Borrowed(own), purpose, gathered: memory, deliver_to: None, greeting: None }
    }

    /// The same, for another thread to complete.
    pub(crate) fn deliver_to(self, place: Arc<Mutex<Vec<u64>>>) -> Scalars<'static> {
        let Scalars { values, purpose, gathered, greeting, .. } = self;
        Scalars { values: Cow::Owned(values.into_owned()), purpose, gathered, deliver_to: Some(place), greeting }
    }

    /// All ranks' values, in order of rank.
    pub(crate) fn into_gathered(self) -> Vec<u64> {
        self.gathered
    }

    /// Values of this host's ranks.
    fn on_host<'p>(&self, peers: &'p Peers<'_>) -> impl Iterator<Item = u64> + use<'p> {
        let count = self.values.len();
        let words = move |rank| if count <= BRIEF { peers.brief(rank) } else { &peers.header(rank).payload[..] };
        (0..peers.world()).flat_map(move |rank| words(rank)[..count].iter().map(|word| word.load(Ordering::Relaxed)))
    }
}

impl Algorithm for Scalars<'_> {
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
        if !peers.group.has_wire() {
            let values = self.on_host(peers);
            self.gathered.extend(values);
        } else {
            if self.greeting.is_none() {
                self.greeting = Some(Greeting::new(peers, false, self.on_host(peers).collect()));
            }
            let greeting = self.greeting.as_mut().expect("made above");
            if let Some(rank) = greeting.poll(peers)? {
                return Ok(Progress::Waiting(rank));
            }
            let hosts = &peers.group.hosts;
            self.gathered = (0..hosts.world()).flat_map(|rank| greeting.words(hosts, rank)).copied().collect();
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
