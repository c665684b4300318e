//! What operations on buffers have in common.
//!
//! ```text
//! in the header   small operands travel in the payload: one step, no memory is shared
//! in place        one piece, the whole:   begin | exchange 0: work | exchange 1: done
//! pulled          the same, in three:     begin | exchange 0: fold into the own output
//!                                         exchange 1: copy the other ranks' results | exchange 2: done
//! staged          several pieces:         begin: copy piece 0 in
//!                                         exchange k: copy what peers made of piece k-1 out, copy piece k+1 in, work on piece k
//!                                         last: copy the last out, done
//! ```
//!
//! Each step is a point at which every rank of the host has finished the exchange before. So in exchange k nobody works on piece k-1
//! any more, and its half of the stages is free for piece k+1; after the last exchange nobody touches anybody's memory.
//! With other hosts an exchange has a second half, in which ranks copy from each other what came over the wire.

use pillion_kernels::cpu::non_temporal;
use pillion_kernels::{Cpu, DType, Device, Span, exclusive};
use smallvec::SmallVec;

use super::between_hosts::OnWire;
use super::folds::{Fold, Target};
use super::moves::{Moves, Pull};
use super::sides::{End, FAR, FAR_RESULT, Piece, STAGE, Side, Sides};
use crate::call::{Detail, Kind, call, in_sections};
use crate::engine::flight::{Algorithm, Opening, Peers, Progress};
use crate::memory::control::{Call, PAYLOAD};
use crate::memory::lent::Lent;
use crate::memory::place::Place;
use crate::request::{Operands, Sidebands};
use crate::{Error, Sections};

/// What is done with the operands.
// A box would be an allocation for each operation.
#[allow(clippy::large_enum_variant)]
pub(super) enum Work {
    Moves(Moves),
    Fold(Fold),
}

/// An operation on buffers.
pub(crate) struct Operation {
    pub(super) kind: Kind,
    pub(super) dtype: DType,
    pub(super) detail: Detail,
    pub(super) sides: Sides,
    pub(super) work: Work,
    pub(super) sidebands: Option<Sidebands>,
    /// Bytes that other ranks take from this one.
    pub(super) sent: u64,
    pub(super) mode: Mode,
    /// Buffers in private memory, while other ranks may read them. After a failure they may at any
    /// time.
    pub(super) shown: Option<Lent<SmallVec<[Span; 2]>>>,
    /// What follows a fold between hosts.
    pub(super) then: Option<Box<Moves>>,
    /// What is under way between hosts; on one host there is nothing, and operations are moved about.
    pub(super) wire: Option<Box<OnWire>>,
}

/// How the operands pass, the same on every rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    /// In the payload of the header.
    Header,
    /// Where they lie.
    InPlace,
    /// In place, but every rank takes the others' results itself: outputs are in private memory,
    /// to which nobody else writes.
    Pulled,
    /// In pieces.
    Staged,
}

impl Operation {
    pub(super) fn new(kind: Kind, detail: Detail, operands: Operands, work: Work) -> Operation {
        let Operands { input, output, dtype, to } = operands;
        let pushed = match &work {
            Work::Moves(moves) => !moves.spread.is_empty(),
            Work::Fold(fold) => fold.target != Target::Own,
        };
        let input = Side { span: input, chunks: 1, first: 0, width: dtype.bytes(), shared: true };
        let output = Side { span: output, chunks: 1, first: 0, width: to.bytes(), shared: pushed };
        let sides = Sides { input, output, chunk: 0, len: 0, piece: 0, sections: None, head: 0, lists: None };
        Operation {
            kind,
            dtype,
            detail,
            sides,
            work,
            sidebands: None,
            sent: 0,
            mode: Mode::InPlace,
            shown: None,
            then: None,
            wire: None,
        }
    }

    /// `len` elements in chunks of `chunk`, so many of them on each side.
    pub(super) fn cut_into(mut self, chunk: usize, len: usize, inputs: usize, outputs: usize) -> Operation {
        (self.sides.chunk, self.sides.len) = (chunk, len);
        (self.sides.input.chunks, self.sides.output.chunks) = (inputs, outputs);
        self
    }

    /// Cuts full operands into sections.
    pub(super) fn in_sections(mut self, sections: Option<Sections>) -> Operation {
        self.sides.sections = sections;
        self
    }

    /// Counts what other ranks take from this one, in bytes.
    pub(super) fn sending(mut self, bytes: usize) -> Operation {
        self.sent = bytes as u64;
        self
    }

    /// Whether all inputs are so small that they travel in headers: the same on every rank, since it follows from the call.
    fn fits_header(&self, peers: &Peers<'_>) -> bool {
        self.sides.sections.is_none()
            && self.sides.lists.is_none()
            && self.input_bytes() <= (PAYLOAD - self.sides.head) * 8
            && !peers.group.has_wire()
    }

    fn input_bytes(&self) -> usize {
        self.sides.input.chunks * self.sides.chunk * self.sides.input.width
    }

    fn deferred(&self) -> bool {
        if let Some(lists) = &self.sides.lists {
            return lists.deferred();
        }
        let span = self.sides.input.span.as_ref().or(self.sides.output.span.as_ref());
        span.is_some_and(Span::deferred)
    }

    /// Where peers find an operand.
    fn place(&self, end: End, peers: &Peers<'_>) -> Result<Place, Error> {
        if let Some(lists) = &self.sides.lists {
            let is_shared = self.sides.side(end).shared && peers.world() > 1 && !lists.of(end).is_empty();
            return match is_shared {
                false => Ok(Place::None),
                true if lists.lie_in_arena(end, peers) => Ok(Place::Arena(0)),
                true if self.is_read_far(end, peers) => Ok(Place::Private(0)),
                true => Ok(Place::Stage(peers.group.stage(peers.channel, STAGE)?)),
            };
        }
        let Side { span: Some(span), shared: true, .. } = self.sides.side(end) else { return Ok(Place::None) };
        if peers.world() == 1 {
            return Ok(Place::None);
        }
        if span.is_empty() {
            return Ok(Place::Arena(0));
        }
        if let Some(offset) = peers.group.offset_of(span.address()) {
            return Ok(Place::Arena(offset));
        }
        if self.is_read_far(end, peers) {
            return Ok(Place::Private(span.address().addr().get() as u64));
        }
        Ok(Place::Stage(peers.group.stage(peers.channel, STAGE)?))
    }

    /// This rank's operands.
    pub(super) fn buffers(&self) -> impl Iterator<Item = &Span> {
        let lists = self.sides.lists.iter().flat_map(|lists| lists.input.iter().chain(&lists.output));
        [&self.sides.input.span, &self.sides.output.span].into_iter().flatten().chain(lists)
    }

    /// Whether peers read an operand in private memory where it lies: the same on every rank for an
    /// output that all of them want.
    fn is_read_far(&self, end: End, peers: &Peers<'_>) -> bool {
        let bytes = match &self.sides.lists {
            Some(lists) => lists.bytes(),
            None => self.sides.chunk * self.sides.input.width.max(self.sides.output.width),
        };
        let target = match &self.work {
            Work::Moves(_) => Target::Own,
            Work::Fold(fold) => fold.target,
        };
        // The others write to the root of a reduction.
        let is_written = end == End::Output && matches!(target, Target::Root(_));
        let least = if target == Target::All { FAR_RESULT } else { FAR };
        bytes >= least && !is_written && peers.group.reads_private()
    }

    /// Memory for the chunk that a rank of another host than the root's combines.
    fn make_room(&mut self, peers: &Peers<'_>) -> Result<(), Error> {
        let Work::Fold(Fold { target: Target::Collected(root), combination, .. }) = &self.work else { return Ok(()) };
        let hosts = &peers.group.hosts;
        if hosts.host(*root) != hosts.own {
            let room = Cpu.allocate(combination.output, self.sides.chunk);
            let room = room.map_err(|error| Error::System { what: "a reduction", reason: error.to_string() })?;
            let output = &mut self.sides.output;
            (output.span, output.chunks, output.shared) = (Some(room.span()), 1, false);
            output.first = peers.group.name(peers.rank());
        }
        Ok(())
    }

    /// Copies this rank's part of a piece into its stage: the chunks that others read.
    fn copy_in(&self, peers: &Peers<'_>, piece: &Piece) -> Result<(), Error> {
        if !matches!(peers.header(peers.rank()).input(), Place::Stage(_)) {
            return Ok(());
        }
        let chunks = self.sides.lists.as_ref().map_or(self.sides.input.chunks, |lists| lists.input.len());
        for chunk in 0..chunks {
            if self.reader(peers, chunk) == Some(peers.rank()) {
                continue;
            }
            for part in self.sides.parts(self.sides.range(End::Input, chunk, piece)) {
                let bytes = part.len() * self.sides.input.width;
                let from = self.sides.own(End::Input, chunk, part.start, part.len());
                let to = self.sides.published(peers, peers.rank(), End::Input, chunk, part, piece)?;
                // SAFETY: this operation owns its buffer, nobody writes to its inputs, and this
                // half of the stage is free (see above).
                unsafe { non_temporal::copy(from, to, bytes, false) };
            }
        }
        Ok(())
    }

    /// Copies what other ranks have put into this rank's stage to where it belongs.
    pub(super) fn copy_out(&self, peers: &Peers<'_>, piece: &Piece) -> Result<(), Error> {
        let Work::Fold(fold) = &self.work else { return Ok(()) };
        if !matches!(peers.header(peers.rank()).output(), Place::Stage(_)) {
            return Ok(());
        }
        for chunk in fold.pushed_by_others(peers) {
            for part in self.sides.parts(self.sides.range(End::Output, chunk, piece)) {
                let bytes = part.len() * self.sides.output.width;
                let to = self.sides.own(End::Output, chunk, part.start, part.len());
                let from = self.sides.published(peers, peers.rank(), End::Output, chunk, part, piece)?;
                // SAFETY: this operation owns its buffer; the peers that wrote this half of the
                // stage have taken a step since, and write the other half now.
                unsafe { non_temporal::copy(from, to, bytes, self.streams(peers)) };
            }
        }
        Ok(())
    }

    /// The only rank of this host that may read a chunk of this rank's input, if there is only one.
    fn reader(&self, peers: &Peers<'_>, chunk: usize) -> Option<usize> {
        let hosts = &peers.group.hosts;
        match self.kind {
            // In place, the chunks of the other ranks are not this rank's to give.
            Kind::AllGather if self.sides.input.chunks > 1 && chunk != hosts.local()[peers.rank()] => {
                Some(peers.rank())
            }
            Kind::AllGather | Kind::AllGatherV | Kind::Broadcast | Kind::Gather | Kind::GatherV => None,
            Kind::Reduce if hosts.ranks.len() == 1 => Some(chunk),
            // What goes to another host is sent from where it lies.
            Kind::Scatter | Kind::ScatterV | Kind::AllToAll | Kind::AllToAllV if hosts.host(chunk) != hosts.own => {
                Some(peers.rank())
            }
            _ => Some(hosts.partner_here(chunk)),
        }
    }

    /// Whether results should be stored past the caches: what all ranks of this host read and write does not fit there.
    pub(super) fn streams(&self, peers: &Peers<'_>) -> bool {
        if let Some(lists) = &self.sides.lists {
            return non_temporal::pays(lists.bytes() * peers.world());
        }
        let side = |side: &Side| side.chunks * side.width;
        let bytes = (side(&self.sides.input) + side(&self.sides.output)) * self.sides.chunk * peers.world();
        non_temporal::pays(bytes)
    }

    /// Sums the sidebands of all ranks, in order of rank. `words` are those of a rank, given by its number.
    pub(super) fn add_sidebands(&self, world: usize, words: impl Fn(usize, usize) -> u64) {
        let Some(Sidebands { totals, accumulate, .. }) = &self.sidebands else { return };
        // SAFETY: this operation owns the totals.
        let totals = unsafe { totals.as_mut_slice::<f64>() };
        for (index, total) in totals.iter_mut().enumerate() {
            let sum: f64 = (0..world).map(|rank| f64::from_bits(words(rank, index))).sum();
            *total = if *accumulate { *total + sum } else { sum };
        }
    }

    /// Whether a rank of this host stages an operand.
    pub(super) fn somebody_stages(&self, peers: &Peers<'_>) -> bool {
        let places = |rank| [peers.header(rank).input(), peers.header(rank).output()];
        (0..peers.world()).flat_map(places).any(|place| matches!(place, Place::Stage(_)))
    }

    /// What ranks of this host do with a piece among themselves.
    fn run(&self, peers: &Peers<'_>, piece: &Piece) -> Result<(), Error> {
        let streams = self.mode != Mode::Header && self.streams(peers);
        match &self.work {
            Work::Moves(moves) => moves.pull(&self.sides, peers, piece, streams),
            Work::Fold(fold) => fold.run(&self.sides, peers, piece, self.mode, streams),
        }
    }

    fn exchange_on_host(&mut self, step: usize, peers: &Peers<'_>) -> Result<Progress, Error> {
        if step == 0 {
            self.add_sidebands(peers.world(), |rank, index| peers.payload(rank, index));
            if self.mode == Mode::Header {
                self.sides.cut(false);
                self.run(peers, &self.sides.piece(0))?;
                return Ok(Progress::Done);
            }
            if let Some(lists) = &self.sides.lists {
                self.sides.chunk = lists.compare_on_host(peers, self.dtype)?;
            }
            self.decide(self.somebody_stages(peers));
            let is_private = |rank| matches!(peers.header(rank).output(), Place::Private(_));
            if (0..peers.world()).any(is_private) {
                self.mode = Mode::Pulled;
            }
        }
        if self.mode == Mode::Pulled && step == 1 {
            self.pull_results(peers)?;
            return Ok(Progress::Step);
        }
        if !self.pass_stage(peers, step, true)? {
            return Ok(Progress::Done);
        }
        self.run(peers, &self.sides.piece(step))?;
        Ok(Progress::Step)
    }

    /// Copies the chunks of the result that the other ranks have combined.
    fn pull_results(&self, peers: &Peers<'_>) -> Result<(), Error> {
        let (rank, world) = (peers.rank(), peers.world());
        let others = (1..world).map(|distance| (rank + distance) % world);
        let spread = others.map(|from| Pull { from, chunk: peers.group.name(from), to: peers.group.name(from) });
        let moves = Moves { spread: spread.collect(), ..Moves::default() };
        moves.spread(&self.sides, peers, &self.sides.piece(0), self.streams(peers))
    }

    /// Before work on piece `index`: copies the one before it out, where that is still to be done, and the one after it in. False where there is
    /// no such piece: all are done.
    pub(super) fn pass_stage(&self, peers: &Peers<'_>, index: usize, out: bool) -> Result<bool, Error> {
        if out && index > 0 {
            self.copy_out(peers, &self.sides.piece(index - 1))?;
        }
        if index + 1 < self.sides.pieces() {
            self.copy_in(peers, &self.sides.piece(index + 1))?;
        }
        Ok(index < self.sides.pieces())
    }

    pub(super) fn decide(&mut self, staged: bool) {
        self.mode = if staged { Mode::Staged } else { Mode::InPlace };
        self.sides.cut(staged);
    }
}

impl Algorithm for Operation {
    fn call(&self) -> Call {
        let call = call(self.kind, Some(self.dtype), self.deferred(), self.sides.len, self.detail);
        in_sections(call, self.sides.sections.as_ref())
    }

    fn begin(&mut self, peers: &mut Peers<'_>) -> Result<Opening, Error> {
        let _access = exclusive(self.deferred());
        self.make_room(peers)?;
        if let Work::Moves(moves) = &mut self.work {
            moves.take_turns(peers);
        }
        if let Work::Fold(Fold { observing: Some(observing), .. }) = &self.work {
            observing.clear();
        }
        if let Some(sidebands) = &self.sidebands {
            // SAFETY: this operation owns the sideband, and its event has happened.
            let own = unsafe { sidebands.own.as_slice::<f64>() };
            own.iter().enumerate().for_each(|(index, value)| peers.set_payload(index, value.to_bits()));
        }
        if self.fits_header(peers) {
            self.mode = Mode::Header;
            if let Some(span) = &self.sides.input.span {
                let bytes = span.len().min(self.sides.len) * self.sides.input.width;
                let to = peers.payload_address(peers.rank(), self.sides.head);
                // SAFETY: the operand is this operation's and fits (`fits_header`); nobody reads this header before the next step.
                unsafe { std::ptr::copy_nonoverlapping(span.address().as_ptr(), to, bytes) };
            }
            return Ok(Opening::new(Place::Header, Place::None));
        }
        let (input, output) = (self.place(End::Input, peers)?, self.place(End::Output, peers)?);
        if [input, output].iter().any(|place| matches!(place, Place::Private(_))) {
            self.shown = Some(Lent::new(self.buffers().cloned().collect()));
        }
        if let Some(lists) = &self.sides.lists {
            lists.show(peers, [input, output])?;
        }
        if let Place::Stage(_) = input {
            // The first piece, as long as it will be cut once the others have said that somebody stages: this rank does.
            self.sides.cut(true);
            peers.header(peers.rank()).write(self.call(), input, output);
            self.copy_in(peers, &self.sides.piece(0))?;
        }
        Ok(Opening::new(input, output))
    }

    fn exchange(&mut self, step: u32, peers: &mut Peers<'_>) -> Result<Progress, Error> {
        let _access = exclusive(self.deferred());
        if peers.group.has_wire() {
            return self.exchange_between_hosts(step as usize, peers);
        }
        let progress = self.exchange_on_host(step as usize, peers)?;
        if progress == Progress::Done {
            drop(self.shown.take().map(Lent::back));
        }
        Ok(progress)
    }

    fn bytes_sent(&self, _world: usize) -> u64 {
        self.sent
    }
}
