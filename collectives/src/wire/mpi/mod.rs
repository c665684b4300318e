//! The transport between hosts: messages over MPI, as nonblocking point-to-point calls, so that whoever waits can also look at a
//! clock and at the other ranks.
//!
//! Only the raw bindings of the `mpi` crate are used, with every return code checked: its wrappers discard some.
//!
//! **Length.** MPI counts with an int, so a message is sent in pieces of at most 1 GiB. All pieces but the last are full and
//! the last one is not, though it may be empty: wherever sender and receiver differ in the length, they differ in the length of some
//! piece, and MPI tells the receiver.
//!
//! **Memory.** MPI reads and writes the memory of a message until its request is complete. A wire that fails, or is dropped with
//! messages in flight, never waits for them: it leaves its MPI communicator and their requests as they are, and the memory is
//! lent for ever, as [`Wire`] says. The same holds when starting a message fails, since earlier pieces of it may be on their way.

mod calls;
pub(crate) mod identities;
mod process;
#[cfg(test)]
mod tests;

use std::ffi::{c_int, c_void};
use std::mem::MaybeUninit;
use std::thread;

use ::mpi::ffi;

use crate::wire::{Receipt, Wire};
use crate::{Error, Launch};
pub use calls::library;
use process::Session;

/// Messages between some ranks of a job that MPI connects.
pub(crate) struct MpiWire {
    communicator: ffi::MPI_Comm,
    /// Ranks of the job, in the order in which this wire counts them.
    members: Vec<usize>,
    /// This rank, as this wire counts.
    own: usize,
    /// Longest piece of a message, in bytes.
    piece: usize,
    /// A [`Receipt`] is an index into this.
    messages: Vec<Message>,
    /// Those of `messages` that are not in flight.
    free: Vec<usize>,
    /// The first error. Nothing is started or tested any more.
    failed: Option<Error>,
    gave_up: bool,
    hearing: Option<Hearing>,
    heard: Option<(usize, String)>,
    session: Session,
}

impl MpiWire {
    /// Connects the ranks `members` of the job, which `launch` describes. All of them call this, with the same members and number;
    /// the number tells apart what the same ranks open at the same time. The calling thread makes all calls on this wire.
    ///
    /// Waits for the other members without limit, since MPI offers none: whoever needs one waits for this thread, and leaves it
    /// behind. The process can exit then.
    ///
    /// # Errors
    /// MPI is not to be used from here (finalised, or initialised by the program for fewer threads); MPI's rank and number of ranks
    /// are not those of the launch; MPI refuses.
    ///
    /// # Panics
    /// If `members` does not hold this rank, holds one twice, or one that is not in the job.
    pub(crate) fn open(launch: &Launch, members: &[usize], number: u32) -> Result<MpiWire, Error> {
        MpiWire::open_with_piece(launch, members, number, 1 << 30)
    }

    fn open_with_piece(launch: &Launch, members: &[usize], number: u32, piece: usize) -> Result<MpiWire, Error> {
        let own = members.iter().position(|member| *member == launch.rank);
        let own = own.expect("this rank opens a wire that it is no member of");
        for (index, member) in members.iter().enumerate() {
            assert!(*member < launch.world && !members[..index].contains(member), "members {members:?} of {launch:?}");
        }
        let session = Session::begin()?;
        must_agree(launch, session.place()?)?;
        let communicator = connect(&session, members, number)?;
        Ok(MpiWire {
            communicator,
            members: members.to_vec(),
            own,
            piece,
            messages: Vec::new(),
            free: Vec::new(),
            failed: None,
            gave_up: false,
            hearing: None,
            heard: None,
            session,
        })
    }

    /// # Safety
    /// As for [`Wire::send`] or [`Wire::receive`].
    unsafe fn start(&mut self, way: Way, peer: usize, tag: u8, data: *mut u8, len: usize) -> Result<Receipt, Error> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        assert!(peer < self.members.len(), "rank {peer} of {}", self.members.len());
        let index = self.free.pop().unwrap_or_else(|| {
            self.messages.push(Message { way, peer, tag, len, pieces: Vec::new(), complete: 0 });
            self.messages.len() - 1
        });
        // A message used before keeps its list of pieces, so that nothing is allocated.
        let message = &mut self.messages[index];
        message.pieces.clear();
        (message.way, message.peer, message.tag, message.len, message.complete) = (way, peer, tag, len, 0);
        for piece in 0..=len / self.piece {
            let offset = piece * self.piece;
            let bytes = self.piece.min(len - offset);
            let (count, peer, tag) = (bytes as c_int, peer as c_int, c_int::from(tag));
            // SAFETY: the session keeps MPI initialised, and the communicator is ours. `offset + bytes <= len`, and the caller
            // promises `len` bytes that stay readable (or writable, by MPI alone) until the request is complete, or for ever. An
            // unsigned byte is what MPI calls MPI_UINT8_T; it is sent as it is. `request` is valid for the write.
            let (code, request) = unsafe {
                let start: *mut c_void = data.add(offset).cast();
                let mut request = ffi::RSMPI_REQUEST_NULL;
                let code = match way {
                    Way::Send => {
                        let start = start.cast_const();
                        ffi::MPI_Isend(start, count, ffi::RSMPI_UINT8_T, peer, tag, self.communicator, &mut request)
                    }
                    Way::Receive => {
                        ffi::MPI_Irecv(start, count, ffi::RSMPI_UINT8_T, peer, tag, self.communicator, &mut request)
                    }
                };
                (code, request)
            };
            if let Err(error) = calls::check(code, way.what(), || message.name(&self.members)) {
                self.failed = Some(error.clone());
                return Err(error);
            }
            message.pieces.push(Piece { request, bytes });
        }
        Ok(Receipt(index as u64))
    }

    /// Receives what a rank that gave up has said, if one has.
    fn hear(&mut self) -> Result<Option<(usize, String)>, Error> {
        let what = "listening for ranks that give up, over MPI";
        let mut there = 0;
        let mut status = MaybeUninit::<ffi::MPI_Status>::uninit();
        let hearing = match &mut self.hearing {
            Some(hearing) => hearing,
            none => {
                // SAFETY: the session keeps MPI initialised, the communicator is ours, both pointers are valid for the write.
                let code = unsafe {
                    ffi::MPI_Iprobe(ffi::RSMPI_ANY_SOURCE, ABORT, self.communicator, &mut there, status.as_mut_ptr())
                };
                calls::check(code, what, String::new)?;
                if there == 0 {
                    return Ok(None);
                }
                // SAFETY: a probe that found a message has filled in the status.
                let from = unsafe { status.assume_init_ref() }.MPI_SOURCE;
                let text = Box::into_raw(Box::new([0; ABORT_LENGTH]));
                // SAFETY: reads a constant that the library's C shim defines.
                let mut request = unsafe { ffi::RSMPI_REQUEST_NULL };
                // SAFETY: as above; `text` points to ABORT_LENGTH bytes which nobody else knows, and which are freed only once the
                // request is complete.
                let code = unsafe {
                    let (count, kind) = (ABORT_LENGTH as c_int, ffi::RSMPI_UINT8_T);
                    ffi::MPI_Irecv(text.cast(), count, kind, from, ABORT, self.communicator, &mut request)
                };
                calls::check(code, what, String::new)?;
                none.insert(Hearing { from: from as usize, text, request })
            }
        };
        // SAFETY: the request is the one that MPI gave us, or the null that MPI replaced it by, which is allowed too.
        let code = unsafe { ffi::MPI_Test(&mut hearing.request, &mut there, status.as_mut_ptr()) };
        calls::check(code, what, || format!("from rank {}", hearing.from))?;
        if there == 0 {
            return Ok(None);
        }
        let mut count = 0;
        // SAFETY: a completed test has filled in the status.
        let code = unsafe { ffi::MPI_Get_count(status.as_ptr(), ffi::RSMPI_UINT8_T, &mut count) };
        calls::check(code, what, || format!("from rank {}", hearing.from))?;
        // SAFETY: from Box::into_raw above, and taken once, since `hearing` is forgotten; MPI is done with it, the request being complete.
        let text = unsafe { Box::from_raw(hearing.text) };
        let from = hearing.from;
        self.hearing = None;
        let text = &text[..(count as usize).min(ABORT_LENGTH)];
        Ok(Some((from, String::from_utf8_lossy(text).into_owned())))
    }
}

// SAFETY: the pointers are to memory that callers lend to whoever drives the wire, and to a box
// that it owns. MPI's handles may be used by any thread, one after the other: a session has
// MPI_THREAD_MULTIPLE, or makes its calls one at a time.
unsafe impl Send for MpiWire {}

impl Wire for MpiWire {
    unsafe fn send(&mut self, to: usize, tag: u8, data: *const u8, len: usize) -> Result<Receipt, Error> {
        // SAFETY: the caller's promise is the same. Sending only reads.
        unsafe { self.start(Way::Send, to, tag, data.cast_mut(), len) }
    }

    unsafe fn receive(&mut self, from: usize, tag: u8, data: *mut u8, len: usize) -> Result<Receipt, Error> {
        // SAFETY: the caller's promise is the same.
        unsafe { self.start(Way::Receive, from, tag, data, len) }
    }

    fn has_come(&mut self, from: usize, tag: u8) -> Result<bool, Error> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        let (mut there, mut status) = (0, MaybeUninit::<ffi::MPI_Status>::uninit());
        let (source, tag) = (from as c_int, c_int::from(tag));
        // SAFETY: the session keeps MPI initialised, the communicator is ours, both pointers are
        // valid for the write.
        let code = unsafe { ffi::MPI_Iprobe(source, tag, self.communicator, &mut there, status.as_mut_ptr()) };
        match calls::check(code, "looking for messages over MPI", || format!("from rank {}", self.members[from])) {
            Ok(()) => Ok(there != 0),
            Err(error) => Err(self.failed.insert(error).clone()),
        }
    }

    fn test(&mut self, request: &Receipt) -> Result<bool, Error> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        let index = request.0 as usize;
        let message = &mut self.messages[index];
        assert!(message.complete < message.pieces.len(), "a message is tested again after its completion");
        match message.test(&self.members) {
            Ok(true) => self.free.push(index),
            Ok(false) => return Ok(false),
            Err(error) => {
                self.failed = Some(error.clone());
                return Err(error);
            }
        }
        Ok(true)
    }

    fn abort(&mut self, reason: &str) {
        if std::mem::replace(&mut self.gave_up, true) {
            return;
        }
        let text = &reason[..reason.floor_char_boundary(ABORT_LENGTH)];
        // Nobody waits until it has been sent, so nobody could free it.
        let text: &'static [u8] = Box::leak(text.as_bytes().into());
        for peer in (0..self.members.len()).filter(|peer| *peer != self.own) {
            // An error is not reported: this rank has one already.
            // SAFETY: the session keeps MPI initialised, and the communicator is ours. The text stays for ever, and so does
            // the request, which nobody completes or frees.
            unsafe {
                let mut request = ffi::RSMPI_REQUEST_NULL;
                let (start, count, kind) = (text.as_ptr().cast(), text.len() as c_int, ffi::RSMPI_UINT8_T);
                ffi::MPI_Isend(start, count, kind, peer as c_int, ABORT, self.communicator, &mut request);
            }
        }
    }

    fn failure(&mut self) -> Option<Error> {
        if self.heard.is_none() {
            match self.hear() {
                Ok(heard) => self.heard = heard,
                Err(error) => {
                    self.failed.get_or_insert(error);
                }
            }
        }
        let (rank, reason) = self.heard.clone()?;
        Some(Error::Aborted { rank, reason })
    }
}

impl Drop for MpiWire {
    fn drop(&mut self) {
        let in_flight = self.free.len() < self.messages.len();
        let quiet = !self.gave_up && self.heard.is_none() && self.hearing.is_none();
        // A program that owns MPI may have finalised it, and the communicator with it.
        if self.failed.is_some() || in_flight || !quiet || thread::panicking() || calls::is_finalised() {
            return;
        }
        // SAFETY: the session keeps MPI initialised unless the program has finalised it, which was just excluded. The communicator is ours,
        // has no request in flight, and is used no more. Freeing is a local act in Open MPI and MPICH.
        let code = unsafe { ffi::MPI_Comm_free(&mut self.communicator) };
        if code == ffi::MPI_SUCCESS as c_int {
            self.session.end_in_order();
        }
    }
}

/// The tag of what a rank says when it gives up: the first above those of messages. MPI allows 32767 at least.
const ABORT: c_int = u8::MAX as c_int + 1;
/// Most bytes that a rank can say when it gives up: few enough for MPI to send them without asking the receiver first.
const ABORT_LENGTH: usize = 512;

#[derive(Clone, Copy, PartialEq)]
enum Way {
    Send,
    Receive,
}

impl Way {
    fn what(self) -> &'static str {
        match self {
            Way::Send => "sending over MPI",
            Way::Receive => "receiving over MPI",
        }
    }
}

/// A message in flight, or the place of one that was.
struct Message {
    way: Way,
    peer: usize,
    tag: u8,
    len: usize,
    pieces: Vec<Piece>,
    /// How many of its pieces, counted from the first, are complete.
    complete: usize,
}

struct Piece {
    request: ffi::MPI_Request,
    bytes: usize,
}

/// What a rank says that gives up, while it is being received.
struct Hearing {
    from: usize,
    /// From [`Box::into_raw`]; MPI writes to it.
    text: *mut [u8; ABORT_LENGTH],
    request: ffi::MPI_Request,
}

impl Message {
    /// Whether all pieces are complete.
    fn test(&mut self, members: &[usize]) -> Result<bool, Error> {
        let what = self.way.what();
        while let Some(piece) = self.pieces.get_mut(self.complete) {
            let mut complete = 0;
            let mut status = MaybeUninit::<ffi::MPI_Status>::uninit();
            // SAFETY: MPI is initialised while the wire's session exists; the request came from MPI and is not complete yet, since
            // nothing is tested again after completion or an error; both pointers are valid for the write.
            let code = unsafe { ffi::MPI_Test(&mut piece.request, &mut complete, status.as_mut_ptr()) };
            let bytes = piece.bytes;
            calls::check(code, what, || match self.way {
                Way::Receive if calls::is_truncation(code) => self.unexpected("longer", members),
                _ => self.name(members),
            })?;
            if complete == 0 {
                return Ok(false);
            }
            if self.way == Way::Receive {
                let mut count = 0;
                // SAFETY: a completed test has filled in the status; `count` is valid for the write.
                let code = unsafe { ffi::MPI_Get_count(status.as_ptr(), ffi::RSMPI_UINT8_T, &mut count) };
                calls::check(code, what, || self.name(members))?;
                if count as usize != bytes {
                    return Err(Error::System { what, reason: self.unexpected("shorter", members) });
                }
            }
            self.complete += 1;
        }
        Ok(true)
    }

    fn name(&self, members: &[usize]) -> String {
        let direction = if self.way == Way::Send { "to" } else { "from" };
        let Message { peer, tag, len, .. } = self;
        let job_rank = members[*peer];
        let also = if job_rank == *peer { String::new() } else { format!(" (rank {job_rank} of the job)") };
        format!("{len} bytes {direction} rank {peer}{also}, tag {tag}")
    }

    fn unexpected(&self, how: &str, members: &[usize]) -> String {
        let name = self.name(members);
        format!(
            "{name}: the message is {how}; do all ranks run the same version of this program, with the same settings?"
        )
    }
}

/// MPI's rank and number of ranks must be those that the launcher's variables gave.
fn must_agree(launch: &Launch, (rank, size): (usize, usize)) -> Result<(), Error> {
    if (rank, size) == (launch.rank, launch.world) {
        return Ok(());
    }
    let library = calls::library();
    let remedy = if size == 1 {
        format!(
            "MPI sees a process on its own; start the ranks with the mpirun of {library}, which this program is linked with"
        )
    } else {
        "two launchers disagree; start the ranks with mpirun alone, and unset the variables of the other launcher"
            .into()
    };
    Err(Error::Rendezvous {
        rank: launch.rank,
        world: launch.world,
        job: launch.job.clone(),
        reason: format!(
            "the launcher ({}) says rank {} of {}, {library} says rank {rank} of {size}: {remedy}",
            launch.source, launch.rank, launch.world
        ),
    })
}

/// A communicator of MPI for these ranks of the job, which returns its errors.
fn connect(_session: &Session, members: &[usize], number: u32) -> Result<ffi::MPI_Comm, Error> {
    let what = "connecting ranks over MPI";
    let detail = || format!("ranks {members:?} of the job, number {number}");
    let ranks: Vec<c_int> = members.iter().map(|rank| *rank as c_int).collect();
    let tag = c_int::try_from(number);
    let tag = tag.map_err(|_| Error::System { what, reason: format!("{}: too many communicators", detail()) })?;
    // SAFETY: the session keeps MPI initialised. `ranks` holds as many different ranks of MPI's world as its length says, by the
    // assertions in `open` and by `must_agree`; handles are written to memory of ours before they are used, since every code is checked.
    // A failure leaves groups behind, a few bytes in a process that is about to end.
    unsafe {
        let (mut world, mut group) = (ffi::RSMPI_GROUP_NULL, ffi::RSMPI_GROUP_NULL);
        let mut communicator = ffi::RSMPI_COMM_NULL;
        calls::check(ffi::MPI_Comm_group(ffi::RSMPI_COMM_WORLD, &mut world), what, detail)?;
        calls::check(ffi::MPI_Group_incl(world, ranks.len() as c_int, ranks.as_ptr(), &mut group), what, detail)?;
        calls::check(ffi::MPI_Comm_create_group(ffi::RSMPI_COMM_WORLD, group, tag, &mut communicator), what, detail)?;
        calls::check(ffi::MPI_Comm_set_errhandler(communicator, ffi::RSMPI_ERRORS_RETURN), what, detail)?;
        calls::check(ffi::MPI_Group_free(&mut group), what, detail)?;
        calls::check(ffi::MPI_Group_free(&mut world), what, detail)?;
        Ok(communicator)
    }
}
