//! Messages between two ranks: a mailbox for each ordered pair. A long message passes in one piece
//! where the receiver can read it in place, in the sender's arena or, if the system allows it, in
//! its private memory. Any other passes in pieces through a stage of the sender, who then need not
//! wait for the receiver.
//!
//! ```text
//! sender      while fewer than two pieces are out: describe the next, sent += 1
//!             done once all is staged, or taken = sent
//! receiver    a receive takes the message at the front of the mailbox (`matching`)
//!             while taken < sent: copy, taken += 1
//!             done once all elements are there
//!             where it expects another message: say so, and both ranks fail
//! ```
//!
//! Bytes: the receiver reads S and writes S, the lower bound for a copy; through a stage the sender
//! reads and writes S more, which stays in the cache. A message that comes before its receive, and
//! in front of one that is wanted, is copied once more. To another host: S on the wire, after a
//! header of three words.

mod matching;
mod receive;
mod send;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::Waker;

use parking_lot::Mutex;
use pillion_kernels::{Completion, DType, Event, Range, Span};

use self::matching::{Matching, Wanted};
use self::receive::ReceiveFlight;
use self::send::SendFlight;
use super::group::Group;
use super::inbox::Inbox;
use super::start::StartEvent;
use super::watch::Watch;
use crate::Error;
use crate::call::{Detail, Kind, call, describe};
use crate::memory::control::Call;
use crate::outcome::{Ending, Outcome};
use crate::request::{Direction, Envelope, Message};
use crate::transport::Limit;
use crate::wire::Wire;

/// Bytes of a staged piece at most; a stage holds two.
const PIECE: usize = 256 << 10;
/// And at least: a page.
const SMALLEST_PIECE: usize = 4096;
/// Messages up to this many bytes are staged even where the receiver could read them in place: the
/// sender need not wait for it then.
const SHORT: usize = 64 << 10;
/// Messages from this many bytes on are read in place also in private memory. Shorter ones pass
/// through a stage sooner, since both ranks copy at the same time.
const FAR: usize = 1 << 20;
/// The tag of messages on the wire.
const ON_WIRE: u8 = 16;

/// Bytes of private memory that are read at a time: limits are for silence, not for long messages.
const FAR_PIECE: usize = 64 << 20;

/// Where elements of a type may lie in a piece: pieces hold whole elements.
const _: () = assert!(PIECE.is_multiple_of(DType::F64.bytes()) && FAR_PIECE.is_multiple_of(DType::F64.bytes()));

/// This rank's messages.
pub(crate) struct Mailroom {
    pub(crate) inbox: Inbox<MailFlight>,
    /// For each rank: messages to it that have been submitted, and that are complete. A message's
    /// turn comes once those before it are complete.
    lines: Vec<(AtomicU64, AtomicU64)>,
    matching: Mutex<Matching>,
    /// For each rank: how often something of a message from it has come.
    news: Vec<AtomicU64>,
    /// Where pieces for each rank of this host are staged, by the rank and the bytes of a piece:
    /// messages of a few bytes take little memory.
    stages: Mutex<HashMap<(usize, usize), Range>>,
}

impl Mailroom {
    /// For a communicator of `world` ranks.
    pub(crate) fn new(world: usize) -> Mailroom {
        Mailroom {
            inbox: Inbox::default(),
            lines: (0..world).map(|_| Default::default()).collect(),
            matching: Mutex::new(Matching::new(world)),
            news: (0..world).map(|_| AtomicU64::new(0)).collect(),
            stages: Mutex::default(),
        }
    }

    /// Something of a message from a rank has come.
    fn note(&self, from: usize) {
        self.news[from].fetch_add(1, Ordering::Relaxed);
    }

    /// How often something has come that may bring a message nearer.
    fn news(&self, wanted: Wanted) -> u64 {
        let all = wanted.from.map_or(&self.news[..], |from| &self.news[from..=from]);
        all.iter().map(|count| count.load(Ordering::Relaxed)).fold(0, u64::wrapping_add)
    }

    fn probe(
        &self,
        group: &Group,
        wanted: Wanted,
        wire: Option<&mut (dyn Wire + 'static)>,
    ) -> Result<Option<Envelope>, Error> {
        let found = self.matching.lock().probe(group, wanted, wire)?;
        Ok(found.and_then(|(from, head)| {
            let (dtype, len) = (head.dtype()?, head.len as usize);
            Some(Envelope { from, tag: head.tag, dtype, len })
        }))
    }

    /// The memory of its stages, which it does not use any more.
    pub(crate) fn take_stages(&mut self) -> Vec<Range> {
        self.stages.get_mut().drain().map(|(_, range)| range).collect()
    }
}

/// What a message says in front of its elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Head {
    /// Number of elements.
    len: u64,
    /// Their type, as a call has it.
    dtype: u64,
    tag: u32,
}

impl Head {
    fn of(span: &Span, tag: u32) -> Head {
        Head { len: span.len() as u64, dtype: 1 + span.dtype() as u64, tag }
    }

    fn words(self) -> [u64; 3] {
        [self.len, self.dtype, self.tag.into()]
    }

    fn from_words([len, dtype, tag]: [u64; 3]) -> Head {
        Head { len, dtype, tag: tag as u32 }
    }

    /// The type of the elements.
    fn dtype(self) -> Option<DType> {
        DType::ALL.into_iter().find(|&dtype| 1 + dtype as u64 == self.dtype)
    }
}

/// Which way a message passes, seen from the rank that says so.
#[derive(Clone, Copy, Debug)]
enum Way {
    To,
    From,
}

/// Between which ranks a message passes, and which of theirs it is.
#[derive(Clone, Copy, Debug)]
struct Address {
    way: Way,
    /// The other rank, if it is one in particular.
    peer: Option<usize>,
    /// Its number, from 0, among those of this way and peer.
    number: u64,
}

impl Address {
    /// A message in words.
    fn describe(self, head: Head, deferred: bool) -> String {
        let Head { len, dtype, tag } = head;
        let mut call = call(Kind::Message, None, deferred, 0, Detail::None);
        call = Call { count: len, dtype, sequence: self.number + 1, ..call };
        let peer = self.peer.map_or_else(|| "any rank".to_owned(), |peer| format!("rank {peer}"));
        let tag = if tag == 0 { String::new() } else { format!(" with tag {tag}") };
        let way = match self.way {
            Way::To => "to",
            Way::From => "from",
        };
        format!("{}{tag} {way} {peer}", describe(call))
    }

    /// The error when the other rank means another message. `theirs` is what it says of it.
    fn disagreement(self, group: &Group, ours: Head, theirs: Head, deferred: bool) -> Error {
        let way = match self.way {
            Way::To => Way::From,
            Way::From => Way::To,
        };
        let back = Address { way, peer: Some(group.name(group.rank)), ..self };
        let (ours, theirs) = (self.describe(ours, deferred), back.describe(theirs, deferred));
        Error::Mismatch { ours, theirs, peer: self.peer.expect("a message that has come is from somebody") }
    }
}

/// A message on its way.
pub(crate) enum MailFlight {
    Send(SendFlight),
    Receive(ReceiveFlight),
    Probe(ProbeFlight),
}

/// A question that only the thread which has the wire can answer.
pub(crate) struct ProbeFlight {
    wanted: Wanted,
    found: Arc<Mutex<Option<Envelope>>>,
    ending: Ending,
}

impl Group {
    /// The first message that a receive would take which is called now: from a rank, or from any.
    pub(super) fn find_message(&self, from: Option<usize>, tag: u32) -> Result<Option<Envelope>, Error> {
        self.healthy()?;
        let wanted = Wanted { from, tag };
        if !self.has_wire() {
            let found = self.mail.probe(self, wanted, None).map_err(|error| self.fail(error))?;
            if found.is_none() {
                // Who asks again and again learns that nobody is there to send.
                let op = || format!("a probe for a message with tag {tag}");
                let looked = Watch::new(Limit::NONE).look_around(self, &|_| false, &op);
                looked.map_err(|error| self.fail(error))?;
            }
            return Ok(found);
        }
        let (outcome, found) = (Arc::new(Outcome::default()), Arc::default());
        let ending = Ending::new(outcome.clone(), "a probe");
        self.submit_mail(MailFlight::Probe(ProbeFlight { wanted, found: Arc::clone(&found), ending }));
        outcome.wait().map_err(Error::from)?;
        let found = found.lock().take();
        Ok(found)
    }
}

impl MailFlight {
    pub(crate) fn new(
        group: &Group,
        message: Message,
        after: Event,
        limit: Limit,
        outcome: Arc<Outcome>,
    ) -> MailFlight {
        let Message { direction, buffer, tag } = message;
        let ending = Ending::new(outcome, "a message");
        let (after, watch) = (StartEvent::new(after, limit), Watch::new(limit));
        let common = Common { buffer, tag, after, watch, limit, ending };
        match direction {
            Direction::Send { to } => MailFlight::Send(SendFlight::new(group, common, to)),
            Direction::Receive { from, sender } => MailFlight::Receive(ReceiveFlight::new(group, common, from, sender)),
        }
    }

    /// Whether it fits into one piece and takes no time to copy.
    pub(crate) fn is_short(&self) -> bool {
        match self {
            MailFlight::Send(flight) => flight.common.is_short(),
            MailFlight::Receive(flight) => flight.common.is_short(),
            MailFlight::Probe(_) => false,
        }
    }

    pub(crate) fn finish(mut self, result: Result<(), Error>) {
        match &mut self {
            MailFlight::Send(flight) => flight.common.ending.set(result),
            MailFlight::Receive(flight) => flight.common.ending.set(result),
            MailFlight::Probe(flight) => flight.ending.set(result),
        }
    }

    /// Goes as far as the other rank allows; true once complete.
    pub(crate) fn poll(
        &mut self,
        group: &Group,
        wire: Option<&mut (dyn Wire + 'static)>,
        waker: Option<&Waker>,
    ) -> Result<bool, Error> {
        match self {
            MailFlight::Send(flight) => flight.poll(group, wire, waker),
            MailFlight::Receive(flight) => flight.poll(group, wire, waker),
            MailFlight::Probe(flight) => {
                let wire = wire.expect("a probe that need not ask a wire is no flight");
                let found = group.mail.probe(group, flight.wanted, Some(&mut *wire))?;
                if let (None, Some(error)) = (&found, wire.failure()) {
                    return Err(error);
                }
                *flight.found.lock() = found;
                Ok(true)
            }
        }
    }
}

/// What a message has in either direction.
struct Common {
    buffer: Span,
    tag: u32,
    after: StartEvent,
    watch: Watch,
    limit: Limit,
    /// Dropped last.
    ending: Ending,
}

impl Common {
    fn bytes(&self) -> usize {
        self.buffer.len() * self.buffer.dtype().bytes()
    }

    fn is_short(&self) -> bool {
        self.bytes() <= SHORT
    }

    /// What this rank says of the message.
    fn head(&self) -> Head {
        Head::of(&self.buffer, self.tag)
    }

    /// This message in words, once somebody wants them: looks at the clock are far more frequent.
    fn describe(&self, address: Address) -> impl Fn() -> String + use<> {
        let (head, deferred) = (self.head(), self.buffer.deferred());
        move || address.describe(head, deferred)
    }

    fn disagreement(&self, group: &Group, address: Address, theirs: Head) -> Error {
        address.disagreement(group, self.head(), theirs, self.buffer.deferred())
    }

    /// Something has moved.
    fn moved(&mut self) {
        self.watch = Watch::new(self.limit);
    }
}
