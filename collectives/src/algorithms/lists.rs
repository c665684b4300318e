//! Operands whose chunks have lengths, and places, of their own: a list of buffers, or a buffer
//! that is cut unevenly.
//!
//! Each rank shows a *table* of its chunks in its arena: where each lies, and how long it is. A
//! rank compares what it expects with what the others show before it moves anything. Ranks of other
//! hosts see the lengths in the greeting.

use pillion_kernels::{DType, Span};

use super::sides::End;
use crate::Error;
use crate::call::describe;
use crate::engine::flight::Peers;
use crate::hosts::Hosts;
use crate::memory::control::Call;
use crate::memory::place::Place;
use crate::request::PartedForm;

/// The chunks of this rank's operands.
pub(super) struct Lists {
    pub(super) input: Box<[Span]>,
    pub(super) output: Box<[Span]>,
    pub(super) form: PartedForm,
}

/// Words of a chunk in a table: its byte in the arena, or its address, and its elements.
const WORDS: usize = 2;

impl Lists {
    pub(super) fn of(&self, end: End) -> &[Span] {
        match end {
            End::Input => &self.input,
            End::Output => &self.output,
        }
    }

    pub(super) fn deferred(&self) -> bool {
        self.input.iter().chain(&self.output).next().is_some_and(Span::deferred)
    }

    pub(super) fn bytes(&self) -> usize {
        self.input.iter().chain(&self.output).map(|span| span.len() * span.dtype().bytes()).sum()
    }

    /// Whether all chunks lie in this rank's arena.
    pub(super) fn lie_in_arena(&self, end: End, peers: &Peers<'_>) -> bool {
        self.of(end).iter().all(|span| span.is_empty() || peers.group.offset_of(span.address()).is_some())
    }

    /// Shows this rank's table, before its first step. The operands lie at `places`.
    pub(super) fn show(&self, peers: &Peers<'_>, places: [Place; 2]) -> Result<(), Error> {
        let world = peers.group.hosts.world();
        let offset = peers.group.table(peers.channel, Table::bytes(world))?;
        peers.set_payload(0, offset);
        let table = Table::of(peers, peers.rank())?;
        let ends = [(End::Input, &self.input), (End::Output, &self.output)];
        for ((end, spans), place) in ends.into_iter().zip(places) {
            for chunk in 0..world {
                let words = spans.get(chunk).map_or([0, 0], |span| {
                    let at = match place {
                        Place::Private(_) => span.address().addr().get() as u64,
                        _ if span.is_empty() => 0,
                        _ => peers.group.offset_of(span.address()).unwrap_or(0),
                    };
                    [at, span.len() as u64]
                });
                // SAFETY: this rank's own table, which nobody reads before its next step: whoever
                // read what an earlier operation showed there has taken its last step since.
                unsafe { table.place(end, chunk).cast_mut().cast::<[u64; WORDS]>().write(words) };
            }
        }
        Ok(())
    }

    /// The lengths of all input chunks of this host's ranks, one rank after the other.
    pub(super) fn lengths(peers: &Peers<'_>) -> Result<Vec<u64>, Error> {
        let world = peers.group.hosts.world();
        let mut lengths = Vec::with_capacity(peers.world() * world);
        for rank in 0..peers.world() {
            let table = Table::of(peers, rank)?;
            lengths.extend((0..world).map(|chunk| table.chunk(End::Input, chunk)[1]));
        }
        Ok(lengths)
    }

    /// The error where a chunk of another rank, for rank `whose`, has another length than it has
    /// here. The other ranks may have found all as they expect it, and would wait for this one, so
    /// they are told.
    fn mismatch(&self, peers: &Peers<'_>, dtype: DType, [ours, theirs]: [u64; 2], rank: usize, whose: usize) -> Error {
        let call = |count: u64| describe(Call { count, dtype: 1 + dtype as u64, ..peers.call });
        let error = Error::Mismatch {
            ours: format!("{} from rank {rank}", call(ours)),
            theirs: format!("{} for rank {whose}", call(theirs)),
            peer: rank,
        };
        peers.group.say_aborted(&error.to_string());
        error
    }

    /// As [`Lists::compare`], on one host.
    pub(super) fn compare_on_host(&self, peers: &Peers<'_>, dtype: DType) -> Result<usize, Error> {
        let (lengths, hosts) = (Lists::lengths(peers)?, &peers.group.hosts);
        let world = hosts.world();
        self.compare(hosts, peers, dtype, |rank, chunk| lengths[hosts.place(rank) * world + chunk])
    }

    /// Compares what this rank expects with what the others have, `of(rank, chunk)` elements; the
    /// length of the longest chunk.
    pub(super) fn compare(
        &self,
        hosts: &Hosts,
        peers: &Peers<'_>,
        dtype: DType,
        of: impl Fn(usize, usize) -> u64,
    ) -> Result<usize, Error> {
        let (own, world) = (hosts.local()[peers.rank()], hosts.world());
        for (to, span) in self.output.iter().enumerate() {
            let (rank, chunk) = match self.form {
                PartedForm::AllGather | PartedForm::Gather { .. } => (to, 0),
                PartedForm::Scatter { root } => (root, own),
                PartedForm::AllToAll => (to, own),
                // Every chunk of every rank is compared below.
                PartedForm::ReduceScatter { .. } => break,
            };
            let theirs = of(rank, chunk);
            if theirs != span.len() as u64 {
                return Err(self.mismatch(peers, dtype, [span.len() as u64, theirs], rank, own));
            }
        }
        let all = || (0..world).flat_map(|rank| (0..world).map(move |chunk| (rank, chunk)));
        let differs = |&(rank, chunk): &(usize, usize)| of(rank, chunk) != self.input[chunk].len() as u64;
        if matches!(self.form, PartedForm::ReduceScatter { .. })
            && let Some((rank, chunk)) = all().find(differs)
        {
            return Err(self.mismatch(peers, dtype, [self.input[chunk].len() as u64, of(rank, chunk)], rank, chunk));
        }
        Ok(all().map(|(rank, chunk)| of(rank, chunk)).max().unwrap_or(0) as usize)
    }
}

/// What a rank of this host shows: where it starts, and the number of ranks.
pub(super) struct Table(*const u64, usize);

impl Table {
    pub(super) fn bytes(world: usize) -> u64 {
        (2 * WORDS * 8 * world) as u64
    }

    pub(super) fn of(peers: &Peers<'_>, rank: usize) -> Result<Table, Error> {
        let world = peers.group.hosts.world();
        let address = peers.address(rank, peers.payload(rank, 0), Table::bytes(world), 8)?;
        Ok(Table(address.as_ptr().cast_const().cast(), world))
    }

    fn place(&self, end: End, chunk: usize) -> *const u64 {
        assert!(chunk < self.1);
        let row = match end {
            End::Input => 0,
            End::Output => self.1,
        };
        // SAFETY: inside the table, by the assertion.
        unsafe { self.0.add(WORDS * (row + chunk)) }
    }

    /// Where a chunk lies, in the rank's arena or in its process, and how long it is.
    pub(super) fn chunk(&self, end: End, chunk: usize) -> [u64; WORDS] {
        // SAFETY: inside the rank's arena (`of`), aligned to 8. The rank wrote it before its first
        // step of the operation, and leaves it until all have taken their last.
        unsafe { self.place(end, chunk).cast::<[u64; WORDS]>().read() }
    }
}
