//! What operations on buffers do between hosts.
//!
//! ```text
//! greet           partners tell each other what they called
//! for each piece: messages, and the folds that wait for them | spread: ranks of a host copy from each other what came
//! ```

use std::sync::Arc;

use pillion_kernels::Span;

use super::lists::Lists;
use super::moves::{self, Moves};
use super::operation::{Operation, Work};
use super::sides::Piece;
use super::transit::{Greeting, Transit};
use super::wire_fold::WireFold;
use crate::Error;
use crate::engine::flight::{Peers, Progress};
use crate::memory::mapping::Mapping;
use crate::request::Sidebands;

/// What an operation has under way between hosts.
pub(super) enum OnWire {
    /// Its partners learn what it is.
    Greeting(Greeting),
    /// Nothing at the moment: all agree.
    Agreed,
    /// The messages of a piece.
    Passing(Passing),
}

/// A piece between hosts.
pub(super) struct Passing {
    transit: Transit<Held>,
    fold: Option<WireFold>,
    /// Whether the messages of the moves, which may follow a fold, have been started.
    started: bool,
    /// And those that pass on what these have brought.
    forwarded: bool,
}

/// Memory that messages use: the operands, the mapping that holds the stage, and what partial results are made in.
pub(super) struct Held {
    pub(super) work: Vec<u64>,
    _operands: Vec<Span>,
    _map: Arc<Mapping>,
}

impl Operation {
    /// One exchange; a step may take several calls.
    pub(super) fn exchange_between_hosts(&mut self, step: usize, peers: &mut Peers<'_>) -> Result<Progress, Error> {
        let mut wire = self
            .wire
            .take()
            .map_or_else(|| self.greeting(peers).map(|greeting| Box::new(OnWire::Greeting(greeting))), Ok)?;
        let progress = self.go_on(&mut wire, step, peers)?;
        self.wire = Some(wire);
        Ok(progress)
    }

    fn go_on(&mut self, wire: &mut OnWire, step: usize, peers: &mut Peers<'_>) -> Result<Progress, Error> {
        if let OnWire::Greeting(greeting) = wire {
            if let Some(rank) = greeting.poll(peers)? {
                return Ok(Progress::Waiting(rank));
            }
            self.agree(greeting, peers)?;
            *wire = OnWire::Agreed;
        }
        let spreads = self.moves().is_some_and(|moves| !moves.spread.is_empty()) && peers.world() > 1;
        let halves = if spreads { 2 } else { 1 };
        let (index, second) = (step / halves, step % halves == 1);
        let piece = self.sides.piece(index);
        if second {
            self.copy_out(peers, &piece)?;
            let streams = self.streams(peers);
            self.moves().expect("halved above").spread(&self.sides, peers, &piece, streams)?;
            return Ok(Progress::Step);
        }
        if let OnWire::Agreed = wire {
            // Where pieces spread, that has copied the one before out.
            if !self.pass_stage(peers, index, !spreads)? {
                return Ok(Progress::Done);
            }
            *wire = OnWire::Passing(self.open(peers));
        }
        if let OnWire::Passing(passing) = wire {
            if let Some(rank) = self.pass(passing, peers, &piece)? {
                return Ok(Progress::Waiting(rank));
            }
            *peers.group.work[peers.channel as usize].lock() = std::mem::take(&mut passing.transit.memory.work);
            *wire = OnWire::Agreed;
        }
        Ok(Progress::Step)
    }

    /// What is copied and sent, after the fold if there is one; last, ranks of a host copy from each other what came over the wire.
    /// (Broadcasts spread on some hosts only, but all ranks of a host do the same.)
    fn moves(&self) -> Option<&Moves> {
        match &self.work {
            Work::Moves(moves) => Some(moves),
            Work::Fold(_) => self.then.as_deref(),
        }
    }

    fn sideband_words(&self) -> usize {
        self.sidebands.as_ref().map_or(0, |Sidebands { own, .. }| own.len())
    }

    /// What this rank called, and what its host says besides: the numbers that ride along, or the
    /// lengths of chunks.
    fn greeting(&self, peers: &Peers<'_>) -> Result<Greeting, Error> {
        let body = if self.sides.lists.is_some() {
            Lists::lengths(peers)?
        } else {
            let own = (0..peers.world()).flat_map(|rank| (0..self.sideband_words()).map(move |index| (rank, index)));
            own.map(|(rank, index)| peers.payload(rank, index)).collect()
        };
        Ok(Greeting::new(peers, self.somebody_stages(peers), body))
    }

    /// Takes from the greetings what rode along, and whether somebody stages.
    fn agree(&mut self, greeting: &Greeting, peers: &Peers<'_>) -> Result<(), Error> {
        let hosts = &peers.group.hosts;
        let word = |rank: usize, index: usize| greeting.words(hosts, rank)[index];
        if let Some(lists) = &self.sides.lists {
            self.sides.chunk = lists.compare(hosts, peers, self.dtype, word)?;
        } else {
            self.add_sidebands(hosts.world(), word);
        }
        self.decide(greeting.staged());
        Ok(())
    }

    fn open(&self, peers: &Peers<'_>) -> Passing {
        let mut work = std::mem::take(&mut *peers.group.work[peers.channel as usize].lock());
        let fold = match &self.work {
            Work::Moves(_) => None,
            Work::Fold(fold) => {
                let fold = WireFold::new(fold, peers);
                let words = fold.work_bytes().div_ceil(8);
                if work.len() < words {
                    work.resize(words, 0);
                }
                Some(fold)
            }
        };
        let operands = self.buffers().cloned().collect();
        let transit = Transit::new(Held { work, _operands: operands, _map: peers.group.engine.map.clone() });
        Passing { transit, fold, started: false, forwarded: false }
    }

    /// Moves a piece between hosts; a rank that is waited for, or none once it is done.
    fn pass(&self, passing: &mut Passing, peers: &mut Peers<'_>, piece: &Piece) -> Result<Option<usize>, Error> {
        let (streams, transit) = (self.streams(peers), &mut passing.transit);
        if let (Work::Fold(fold), Some(on_wire)) = (&self.work, &mut passing.fold)
            && let Some(rank) = on_wire.poll(fold, &self.sides, peers, piece, transit, streams)?
        {
            return Ok(Some(rank));
        }
        let Some(moves) = self.moves() else { return Ok(None) };
        if !passing.started {
            passing.started = true;
            moves.start(&self.sides, peers, piece, transit)?;
            // Messages travel while this rank copies.
            transit.poll(peers, moves::GROUP)?;
            moves.pull(&self.sides, peers, piece, streams)?;
        }
        if let Some(rank) = transit.poll(peers, moves::GROUP)? {
            return Ok(Some(rank));
        }
        if !passing.forwarded {
            passing.forwarded = true;
            moves.forward(&self.sides, peers, piece, transit)?;
        }
        transit.poll(peers, moves::FORWARDS)
    }
}
