//! What the ranks can say to each other.

use std::time::Duration;

use pillion_kernels::{Buffer, DType, Event};

use crate::call::Purpose;
use crate::checks::{checked, expect};
use crate::memory::control::PAYLOAD;
use crate::pending::Pending;
use crate::request::{Collective, Operands, Request};
use crate::transport::Limit;
use crate::{Communicator, Error, Reduction, Sections, Window};

/// When an operation starts, and which thread runs it.
#[derive(Clone)]
pub enum Start {
    /// After this event, on the progress thread, while the caller goes on.
    After(Event),
    /// As [`Start::After`], with a limit of its own instead of
    /// [`Options::timeout`](crate::Options::timeout) for how long the operation waits for the
    /// event, unless that is another operation's, and then at each step for other ranks. Ranks may
    /// have different limits. At the first limit the communicator fails, as ever.
    Within {
        /// After this event.
        event: Event,
        /// The limit.
        limit: Duration,
    },
    /// Now: complete when the call returns. On the calling thread where that can be, on one host with nothing else in flight, which saves
    /// handing it over to another thread and back.
    Here,
}

impl From<Event> for Start {
    fn from(event: Event) -> Start {
        Start::After(event)
    }
}

/// Reductions run in order of rank; on several hosts in order of rank on each, and then in order of
/// hosts. Buffers come from [`Communicator::allocate`], where peers use them in place, or from
/// anywhere, and are then copied through a stage. Every operation takes the same arguments on every
/// rank unless it says otherwise. One whose shapes or types cannot be ends with [`Error::Misuse`],
/// and drops its buffers, before other ranks hear of it.
impl Communicator {
    /// output\[p·n..\] = the shard of rank p. `shard: [n]`, unchanged; `output: [≥ world · n]`, same type, unchanged beyond.
    pub fn all_gather(&self, shard: Buffer, output: Buffer, start: impl Into<Start>) -> Pending<(Buffer, Buffer)> {
        let fits = self.world().checked_mul(shard.len()).is_some_and(|len| output.len() >= len);
        checked!(self.check("all-gather", &shard, &output, fits), (shard, output));
        let (operands, chunk) = (Operands::of(Some(&shard), Some(&output)), shard.len());
        let collective = Collective::AllGather { operands, chunk, sections: None, in_place: false };
        self.run(Request::Collective(collective), start.into(), (shard, output))
    }

    /// As [`Communicator::all_gather`], into an output that is cut into sections.
    pub fn all_gather_sections(
        &self,
        sections: &Sections,
        shard: Buffer,
        output: Buffer,
        start: impl Into<Start>,
    ) -> Pending<(Buffer, Buffer)> {
        let len = sections.shard_len();
        let fits = shard.len() == len && self.world().checked_mul(len).is_some_and(|len| output.len() >= len);
        checked!(self.check("all-gather", &shard, &output, fits), (shard, output));
        let operands = Operands::of(Some(&shard), Some(&output));
        let collective =
            Collective::AllGather { operands, chunk: len, sections: Some(sections.clone()), in_place: false };
        self.run(Request::Collective(collective), start.into(), (shard, output))
    }

    /// buffer\[p·n..\] = that part of rank p's buffer. `buffer: [world · n]`.
    pub fn all_gather_in_place(&self, buffer: Buffer, start: impl Into<Start>) -> Pending<Buffer> {
        let chunk = checked!(self.chunk_of(&buffer), buffer);
        let mut operands = Operands::of(None, Some(&buffer));
        operands.input = Some(buffer.span().range(self.rank() * chunk..(self.rank() + 1) * chunk));
        self.run(
            Request::Collective(Collective::AllGather { operands, chunk, sections: None, in_place: false }),
            start.into(),
            buffer,
        )
    }

    /// As [`Communicator::all_gather_in_place`], of a buffer that is cut into sections.
    pub fn all_gather_sections_in_place(
        &self,
        sections: &Sections,
        buffer: Buffer,
        start: impl Into<Start>,
    ) -> Pending<Buffer> {
        let len = sections.shard_len();
        let fits = self.world().checked_mul(len) == Some(buffer.len());
        checked!(self.check("all-gather", &buffer, &buffer, fits), buffer);
        let operands = Operands::of(Some(&buffer), Some(&buffer));
        let collective =
            Collective::AllGather { operands, chunk: len, sections: Some(sections.clone()), in_place: true };
        self.run(Request::Collective(collective), start.into(), buffer)
    }

    /// Makes all of a window readable, with what each rank wrote to its shard before `start`. Moves nothing on a host.
    /// A window that is gathered already, or of another communicator, is misuse.
    pub fn gather_window(&self, mut window: Window, start: impl Into<Start>) -> Pending<Window> {
        checked!(window.begin_gather(&self.transport), window);
        let collective =
            Collective::GatherWindow { window: window.span(), number: window.number(), sections: window.sections() };
        self.run(Request::Collective(collective), start.into(), window)
    }

    /// buffer = that of rank `root`. `buffer: [n]`.
    pub fn broadcast(&self, buffer: Buffer, root: usize, start: impl Into<Start>) -> Pending<Buffer> {
        checked!(self.check_rank("a broadcast from", root).and_then(|()| self.check_space(&buffer)), buffer);
        let (input, output) = if self.rank() == root { (Some(&buffer), None) } else { (None, Some(&buffer)) };
        let (operands, len) = (Operands::of(input, output), buffer.len());
        self.run(Request::Collective(Collective::Broadcast { operands, len, root }), start.into(), buffer)
    }

    /// The root's output\[p·n..\] = the shard of rank p. `shard: [n]`, unchanged; `output: [world · n]` on the root, nothing elsewhere.
    pub fn gather(
        &self,
        shard: Buffer,
        output: Option<Buffer>,
        root: usize,
        start: impl Into<Start>,
    ) -> Pending<(Buffer, Option<Buffer>)> {
        let len = self.world().saturating_mul(shard.len());
        checked!(self.check_root("gather", root, &shard, output.as_ref(), len), (shard, output));
        let (operands, chunk) = (Operands::of(Some(&shard), output.as_ref()), shard.len());
        self.run(Request::Collective(Collective::Gather { operands, chunk, root }), start.into(), (shard, output))
    }

    /// output = part r of the root's input, on rank r. `input: [world · n]` on the root, unchanged, nothing elsewhere; `output: [n]`.
    pub fn scatter(
        &self,
        input: Option<Buffer>,
        output: Buffer,
        root: usize,
        start: impl Into<Start>,
    ) -> Pending<(Option<Buffer>, Buffer)> {
        let len = self.world().saturating_mul(output.len());
        checked!(self.check_root("scatter", root, &output, input.as_ref(), len), (input, output));
        let (operands, chunk) = (Operands::of(input.as_ref(), Some(&output)), output.len());
        self.run(Request::Collective(Collective::Scatter { operands, chunk, root }), start.into(), (input, output))
    }

    /// output\[p·n..\] = part r of the input of rank p, on rank r. `input, output: [world · n]`.
    pub fn all_to_all(&self, input: Buffer, output: Buffer, start: impl Into<Start>) -> Pending<(Buffer, Buffer)> {
        checked!(self.check("all-to-all", &input, &output, output.len() == input.len()), (input, output));
        let chunk = checked!(self.chunk_of(&input), (input, output));
        let operands = Operands::of(Some(&input), Some(&output));
        self.run(Request::Collective(Collective::AllToAll { operands, chunk }), start.into(), (input, output))
    }

    /// Combines each of `values` over all ranks, in order of rank; blocks until it is done. No rank returns before every
    /// rank has called.
    ///
    /// # Errors
    /// The communicator's first error; [`Error::Misuse`] for reductions of bits.
    pub fn all_reduce_scalars(&self, values: &mut [f64], reduction: Reduction) -> Result<(), Error> {
        expect(reduction.supports(DType::F64, DType::F64), || format!("there is no {} of f64", reduction.name()))?;
        for chunk in values.chunks_mut(PAYLOAD) {
            let count = chunk.len();
            let all = self.transport.exchange(bytemuck::cast_slice(chunk), Purpose::Reduce(reduction), self.limit())?;
            for (index, value) in chunk.iter_mut().enumerate() {
                let all = all.iter().skip(index).step_by(count).map(|&bits| f64::from_bits(bits));
                *value = reduction.of_numbers(all);
            }
            self.transport.put_back(all);
        }
        Ok(())
    }

    /// Every rank's `values` (at most 64, as many on each rank), in order of rank.
    ///
    /// # Errors
    /// The communicator's first error; [`Error::Misuse`] with more than 64 values.
    pub fn all_gather_scalars(&self, values: &[u64]) -> Result<Vec<Vec<u64>>, Error> {
        self.exchange_scalars(values, Purpose::Gather, self.limit())
    }

    pub(crate) fn exchange_scalars(
        &self,
        values: &[u64],
        purpose: Purpose,
        limit: Limit,
    ) -> Result<Vec<Vec<u64>>, Error> {
        let count = values.len();
        expect(count <= PAYLOAD, || format!("{count} scalars at a time: at most {PAYLOAD}"))?;
        let gathered = self.transport.exchange(values, purpose, limit)?;
        // Of no values there is nothing to cut.
        let all = gathered.chunks_exact(values.len().max(1)).map(<[u64]>::to_vec).collect();
        self.transport.put_back(gathered);
        Ok(all)
    }

    /// `bytes` of rank `root`, on every rank. For settings and names; large data goes through [`Communicator::broadcast`].
    ///
    /// # Errors
    /// The communicator's first error; [`Error::Misuse`] for a root that is none of the ranks.
    pub fn broadcast_bytes(&self, root: usize, bytes: &[u8]) -> Result<Vec<u8>, Error> {
        const PIECE: usize = PAYLOAD * 8;
        self.check_rank("a broadcast from", root)?;
        let len = self.exchange_scalars(&[bytes.len() as u64], Purpose::Bytes, self.limit())?[root][0] as usize;
        let mut received = Vec::with_capacity(len);
        while received.len() < len {
            let mut piece = [0; PIECE];
            if self.rank() == root {
                let rest = &bytes[received.len()..];
                let count = rest.len().min(PIECE);
                piece[..count].copy_from_slice(&rest[..count]);
            }
            let words: Vec<u64> =
                piece.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().expect("8 bytes"))).collect();
            let words = &self.exchange_scalars(&words, Purpose::Bytes, self.limit())?[root];
            let count = (len - received.len()).min(PIECE);
            received.extend(words.iter().flat_map(|word| word.to_le_bytes()).take(count));
        }
        Ok(received)
    }

    /// Blocks until every rank has called.
    ///
    /// # Errors
    /// The communicator's first error.
    pub fn barrier(&self) -> Result<(), Error> {
        self.meet(Purpose::Barrier, self.limit())
    }

    /// As [`Communicator::barrier`], with a limit of this rank's own.
    ///
    /// # Errors
    /// The communicator's first error: at the limit one that names every rank that has not called,
    /// as far as this rank sees.
    pub fn barrier_within(&self, limit: Duration) -> Result<(), Error> {
        self.meet(Purpose::Barrier, Limit::within(limit))
    }

    /// Blocks until every rank has called, however long that takes, as long as the ranks waited for are running: for phases in
    /// which one rank works and the others wait.
    ///
    /// # Errors
    /// The communicator's first error.
    pub fn patient_barrier(&self) -> Result<(), Error> {
        let limit = Limit::patiently(self.transport.options().timeout);
        self.meet(Purpose::PatientBarrier, limit)
    }

    fn meet(&self, purpose: Purpose, limit: Limit) -> Result<(), Error> {
        self.transport.exchange(&[], purpose, limit).map(|nothing| self.transport.put_back(nothing))
    }

    /// Hands a request to the transport; `value` comes back once it has ended.
    pub(crate) fn run<T>(&self, request: Request, start: Start, value: T) -> Pending<T> {
        let (event, limit) = match start {
            Start::Here => return Pending::ended(self.transport.run(request, self.limit()), value),
            Start::After(event) => (event, self.limit()),
            Start::Within { event, limit } => (event, Limit::within(limit)),
        };
        let deferred = request.is_deferred();
        Pending::new(self.transport.submit(request, event, limit), value, deferred)
    }
}

// An operation is handed to the progress thread.
const _: fn() = || {
    fn is_send<T: Send>() {}
    is_send::<Request>();
};
