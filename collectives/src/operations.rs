//! What the ranks can say to each other.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use pillion_kernels::{Buffer, Completion, DType, Event};

use crate::algorithms::{self, AnyCollective, GatherWindow, Operands, Operation, Scalars};
use crate::call::Purpose;
use crate::checks::{checked, expect, on_host};
use crate::engine::flight::{Collective, Course, Flight};
use crate::engine::mail::{Direction, MailFlight};
use crate::engine::watch::Limit;
use crate::memory::control::{Channel, PAYLOAD};
use crate::pending::{Outcome, Pending};
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
        let operation = self.gather_operation(operands(Some(&shard), Some(&output)), shard.len(), None, false);
        self.run(operation, Channel::Gather, start.into(), (shard, output))
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
        let fits = shard.len() == len && output.len() >= self.world() * len;
        checked!(self.check("all-gather", &shard, &output, fits), (shard, output));
        let operands = operands(Some(&shard), Some(&output));
        let operation = self.gather_operation(operands, len, Some(sections.clone()), false);
        self.run(operation, Channel::Gather, start.into(), (shard, output))
    }

    fn gather_operation(
        &self,
        operands: Operands,
        chunk: usize,
        sections: Option<Sections>,
        in_place: bool,
    ) -> Operation {
        algorithms::all_gather(&self.group.hosts, self.rank(), operands, chunk, sections, in_place)
    }

    /// buffer\[p·n..\] = that part of rank p's buffer. `buffer: [world · n]`.
    pub fn all_gather_in_place(&self, buffer: Buffer, start: impl Into<Start>) -> Pending<Buffer> {
        let chunk = checked!(self.chunk_of(&buffer), buffer);
        let mut operands = operands(None, Some(&buffer));
        operands.input = Some(buffer.span().range(self.rank() * chunk..(self.rank() + 1) * chunk));
        let operation = self.gather_operation(operands, chunk, None, false);
        self.run(operation, Channel::Gather, start.into(), buffer)
    }

    /// As [`Communicator::all_gather_in_place`], of a buffer that is cut into sections.
    pub fn all_gather_sections_in_place(
        &self,
        sections: &Sections,
        buffer: Buffer,
        start: impl Into<Start>,
    ) -> Pending<Buffer> {
        let len = sections.shard_len();
        checked!(self.check("all-gather", &buffer, &buffer, buffer.len() == self.world() * len), buffer);
        let operation =
            self.gather_operation(operands(Some(&buffer), Some(&buffer)), len, Some(sections.clone()), true);
        self.run(operation, Channel::Gather, start.into(), buffer)
    }

    /// Makes all of a window readable, with what each rank wrote to its shard before `start`. Moves nothing on a host.
    /// A window that is gathered already, or of another communicator, is misuse.
    pub fn gather_window(&self, mut window: Window, start: impl Into<Start>) -> Pending<Window> {
        checked!(window.begin_gather(&self.group), window);
        let sections = window.sections();
        let collective = GatherWindow::new(window.span(), window.number(), self.rank(), self.world(), sections);
        self.run(collective, Channel::Gather, start.into(), window)
    }

    /// buffer = that of rank `root`. `buffer: [n]`.
    pub fn broadcast(&self, buffer: Buffer, root: usize, start: impl Into<Start>) -> Pending<Buffer> {
        checked!(self.check_rank("a broadcast from", root).and_then(|()| on_host(&buffer)), buffer);
        let operands = if self.rank() == root { operands(Some(&buffer), None) } else { operands(None, Some(&buffer)) };
        let operation = algorithms::broadcast(&self.group.hosts, self.rank(), operands, buffer.len(), root);
        self.run(operation, Channel::Gather, start.into(), buffer)
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
        let operands = operands(Some(&shard), output.as_ref());
        let operation = algorithms::gather(&self.group.hosts, self.rank(), operands, shard.len(), root);
        self.run(operation, Channel::Gather, start.into(), (shard, output))
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
        let operands = operands(input.as_ref(), Some(&output));
        let operation = algorithms::scatter(&self.group.hosts, self.rank(), operands, output.len(), root);
        self.run(operation, Channel::Gather, start.into(), (input, output))
    }

    /// output\[p·n..\] = part r of the input of rank p, on rank r. `input, output: [world · n]`.
    pub fn all_to_all(&self, input: Buffer, output: Buffer, start: impl Into<Start>) -> Pending<(Buffer, Buffer)> {
        checked!(self.check("all-to-all", &input, &output, output.len() == input.len()), (input, output));
        let chunk = checked!(self.chunk_of(&input), (input, output));
        let operands = operands(Some(&input), Some(&output));
        let operation = algorithms::all_to_all(&self.group.hosts, self.rank(), operands, chunk);
        self.run(operation, Channel::Gather, start.into(), (input, output))
    }

    /// Sends `buffer` to rank `to`, which receives as many elements of the same type. Messages between two ranks arrive in order;
    /// complete once `buffer` is no longer needed, which may be before it has been received: that it is refused, or never received, a
    /// later call says. How much is held for a receiver that does not come is not for programs to rely on. Only these two ranks call.
    pub fn send(&self, buffer: Buffer, to: usize, start: impl Into<Start>) -> Pending<Buffer> {
        self.message(Direction::Send, buffer, to, start.into())
    }

    /// buffer = what rank `from` sends. Only these two ranks call.
    pub fn receive(&self, buffer: Buffer, from: usize, start: impl Into<Start>) -> Pending<Buffer> {
        self.message(Direction::Receive, buffer, from, start.into())
    }

    fn message(&self, direction: Direction, buffer: Buffer, peer: usize, start: Start) -> Pending<Buffer> {
        checked!(self.check_rank("a message to or from", peer).and_then(|()| on_host(&buffer)), buffer);
        let (outcome, deferred) = (Arc::new(Outcome::default()), buffer.span().deferred());
        let limit = self.limit_of(&start);
        let flight =
            |after| MailFlight::new(&self.group, direction, peer, buffer.span(), after, limit, outcome.clone());
        match start {
            Start::After(event) | Start::Within { event, .. } => self.group.start_mail(flight(event)),
            Start::Here => {
                self.group.run_mail_here(flight(Event::PAST));
                return Pending::ended(outcome.wait().map_err(Error::from), buffer);
            }
        }
        Pending::new(outcome, buffer, deferred)
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
            let all =
                self.exchange(chunk.iter().map(|value| value.to_bits()), Purpose::Reduce(reduction), self.limit())?;
            for (index, value) in chunk.iter_mut().enumerate() {
                let all = all.iter().skip(index).step_by(count).map(|&bits| f64::from_bits(bits));
                *value = reduction.of_numbers(all);
            }
            self.group.scalars.put_back(all);
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
        let gathered = self.exchange(values.iter().copied(), purpose, limit)?;
        // Of no values there is nothing to cut.
        let all = gathered.chunks_exact(values.len().max(1)).map(<[u64]>::to_vec).collect();
        self.group.scalars.put_back(gathered);
        Ok(all)
    }

    /// All ranks' values, one rank after the other, in memory for `Words::put_back`.
    fn exchange(
        &self,
        values: impl ExactSizeIterator<Item = u64>,
        purpose: Purpose,
        limit: Limit,
    ) -> Result<Vec<u64>, Error> {
        let count = values.len();
        expect(count <= PAYLOAD, || format!("{count} scalars at a time: at most {PAYLOAD}"))?;
        let mut scalars = Scalars::new(values, purpose, self.group.scalars.take());
        match self.group.run_here(Channel::Control, &mut scalars, limit) {
            Some(result) => {
                result?;
                Ok(scalars.into_gathered())
            }
            None => {
                let gathered = Arc::new(Mutex::new(Vec::new()));
                let course = Course::new(&scalars, Channel::Control, limit);
                self.submit(scalars.deliver_to(gathered.clone()).into(), course, Event::PAST).wait()?;
                Ok(std::mem::take(&mut *gathered.lock()))
            }
        }
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
        self.exchange_scalars(&[], Purpose::Barrier, self.limit()).map(|_| ())
    }

    /// As [`Communicator::barrier`], with a limit of this rank's own.
    ///
    /// # Errors
    /// The communicator's first error: at the limit one that names every rank that has not called,
    /// as far as this rank sees.
    pub fn barrier_within(&self, limit: Duration) -> Result<(), Error> {
        self.exchange_scalars(&[], Purpose::Barrier, Limit::within(limit)).map(|_| ())
    }

    /// Blocks until every rank has called, however long that takes, as long as the ranks waited for are running: for phases in
    /// which one rank works and the others wait.
    ///
    /// # Errors
    /// The communicator's first error.
    pub fn patient_barrier(&self) -> Result<(), Error> {
        let limit = Limit::patiently(self.group.options.timeout);
        self.exchange_scalars(&[], Purpose::PatientBarrier, limit).map(|_| ())
    }

    pub(crate) fn run<T>(
        &self,
        mut collective: impl Collective + Into<AnyCollective>,
        channel: Channel,
        start: Start,
        value: T,
    ) -> Pending<T> {
        let limit = self.limit_of(&start);
        let after = match start {
            Start::After(event) | Start::Within { event, .. } => event,
            Start::Here => {
                if let Some(result) = self.group.run_here(channel, &mut collective, limit) {
                    return Pending::ended(result, value);
                }
                let course = Course::new(&collective, channel, limit);
                let outcome = self.submit(collective.into(), course, Event::PAST);
                return Pending::ended(outcome.wait().map_err(Error::from), value);
            }
        };
        let course = Course::new(&collective, channel, limit);
        let deferred = course.is_deferred();
        Pending::new(self.submit(collective.into(), course, after), value, deferred)
    }

    /// How long operations wait that say nothing of it.
    pub(crate) fn limit(&self) -> Limit {
        Limit::within(self.group.options.timeout)
    }

    fn limit_of(&self, start: &Start) -> Limit {
        match start {
            Start::Within { limit, .. } => Limit::within(*limit),
            Start::After(_) | Start::Here => self.limit(),
        }
    }

    fn submit(&self, collective: AnyCollective, course: Course, after: Event) -> Arc<Outcome> {
        let outcome = self.group.outcomes.get();
        self.group.submit(Flight::new(collective, course, after, outcome.clone()));
        outcome
    }
}

/// Of buffers that have been checked.
pub(crate) fn operands(input: Option<&Buffer>, output: Option<&Buffer>) -> Operands {
    let dtype = input.or(output).expect("an operation has a buffer").dtype();
    let to = output.map_or(dtype, Buffer::dtype);
    Operands { input: input.map(Buffer::span), output: output.map(Buffer::span), dtype, to }
}

// An operation is handed to the progress thread.
const _: fn() = || {
    fn is_send<T: Send>() {}
    is_send::<Operation>();
};
