//! A gather that moves nothing on a host: every rank has written its part of the window when it takes its step, so after one step all of
//! it may be read. What keeps it unchanged while it is read is `Window::shard_mut`, which waits for every rank's release.
//!
//! Between hosts each rank sends its shard to its partners, straight from one host's window into
//! the other's: (H−1)/H·S/L a rank on the wire, the lower bound, and no copy on the host.

use std::sync::Arc;

use pillion_kernels::Span;

use super::transit::{Greeting, Transit};
use crate::call::{Detail, Kind, call, in_sections};
use crate::engine::flight::{Algorithm, Opening, Peers, Progress};
use crate::memory::control::Call;
use crate::memory::mapping::Mapping;
use crate::memory::place::Place;
use crate::window::chunk;
use crate::{Error, Sections};

pub(crate) struct GatherWindow {
    window: Span,
    /// The same on every rank for the same window.
    number: u64,
    /// This rank, as the communicator counts, and the number of ranks.
    rank: usize,
    world: usize,
    sections: Option<Sections>,
    greeting: Option<Greeting>,
    transit: Option<Transit<(Span, Arc<Mapping>)>>,
}

impl GatherWindow {
    pub(crate) fn new(
        window: Span,
        number: u64,
        rank: usize,
        world: usize,
        sections: Option<Sections>,
    ) -> GatherWindow {
        GatherWindow { window, number, rank, world, sections, greeting: None, transit: None }
    }

    /// Exchanges shards with other hosts; a rank that is waited for, or none once all are there.
    fn pass_wire(&mut self, peers: &mut Peers<'_>) -> Result<Option<usize>, Error> {
        let greeting = self.greeting.get_or_insert_with(|| Greeting::new(peers, false, Vec::new()));
        if self.transit.is_none() {
            if let Some(rank) = greeting.poll(peers)? {
                return Ok(Some(rank));
            }
            let mut transit = Transit::new((self.window.clone(), peers.group.engine.map.clone()));
            let hosts = &peers.group.hosts;
            for section in 0..self.sections.as_ref().map_or(1, Sections::count) {
                let chunk = |rank| {
                    let chunk = chunk(self.sections.as_ref(), self.window.len(), section, self.world, rank);
                    let span = self.window.range(chunk);
                    (span.address().as_ptr(), span.len() * span.dtype().bytes())
                };
                // SAFETY: the transit keeps the window. Nobody on this host reads it now: each has
                // released it and called for this gather, and reads only once it is complete. Each
                // of the other hosts' shards is received by one rank, and nobody writes this rank's
                // own before it has been released again.
                unsafe {
                    for peer in hosts.partnered(self.rank) {
                        let (theirs, bytes) = chunk(peer);
                        transit.receive(peer, theirs, bytes, 0);
                    }
                    for peer in hosts.partners(self.rank) {
                        let (own, bytes) = chunk(self.rank);
                        transit.send(peer, own, bytes, 0);
                    }
                }
            }
            self.transit = Some(transit);
        }
        self.transit.as_mut().expect("made above").poll(peers, 0)
    }
}

impl Algorithm for GatherWindow {
    fn call(&self) -> Call {
        let (len, number) = (self.window.len(), Detail::Window(self.number));
        in_sections(call(Kind::GatherWindow, None, self.window.deferred(), len, number), self.sections.as_ref())
    }

    fn begin(&mut self, _peers: &mut Peers<'_>) -> Result<Opening, Error> {
        Ok(Opening::new(Place::None, Place::None))
    }

    fn exchange(&mut self, step: u32, peers: &mut Peers<'_>) -> Result<Progress, Error> {
        if step == 1 || !peers.group.has_wire() {
            return Ok(Progress::Done);
        }
        Ok(self.pass_wire(peers)?.map_or(Progress::Step, Progress::Waiting))
    }

    fn bytes_sent(&self, _world: usize) -> u64 {
        0
    }
}
