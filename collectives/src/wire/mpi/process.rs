//! Who owns MPI in this process. MPI is initialised once and finalised once in the life of a process, by the same thread.
//!
//! If the program has initialised MPI before the first wire opens, it is the program's: it is used if it was initialised for
//! calls from many threads, and never finalised here; its error handler for MPI_COMM_WORLD stays as well. To finalise it while a
//! wire is open is against MPI's own rules, and MPI ends the program that does. Otherwise a thread of our own initialises it, stays, and finalises it when
//! the process exits.
//!
//! MPI_Finalize waits until every rank of the job calls it. After a failure some never will; then the process exits without it,
//! which `mpirun` takes for what it is, and ends the other ranks. A [`Session`] that is not ended in order counts as a failure.

use std::io::Write;
use std::ptr;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use ::mpi::ffi;

use super::calls;
use crate::Error;

/// The right to call MPI, held by one open wire: while it exists, MPI is initialised and nobody here finalises it.
pub(super) struct Session {
    ended_in_order: bool,
}

impl Session {
    /// Initialises MPI if nobody has.
    ///
    /// # Errors
    /// MPI was finalised, does not allow calls from the thread of a wire, or has no room for another one.
    pub(super) fn begin() -> Result<Session, Error> {
        let mut state = lock();
        let allowed = begin(&mut state);
        match allowed {
            Ok(()) => state.open += 1,
            // The other ranks may now wait for this one.
            Err(_) => state.failed = true,
        }
        allowed.map(|()| Session { ended_in_order: false })
    }

    /// This rank and the number of ranks, as MPI counts them.
    pub(super) fn place(&self) -> Result<(usize, usize), Error> {
        let what = "asking MPI for this rank";
        let (mut rank, mut size) = (0, 0);
        // SAFETY: MPI is initialised while this session exists; both pointers are valid for the write.
        unsafe {
            calls::check(ffi::MPI_Comm_rank(ffi::RSMPI_COMM_WORLD, &mut rank), what, String::new)?;
            calls::check(ffi::MPI_Comm_size(ffi::RSMPI_COMM_WORLD, &mut size), what, String::new)?;
        }
        Ok((rank as usize, size as usize))
    }

    /// The session's wire has no message in flight, and saw no failure.
    pub(super) fn end_in_order(&mut self) {
        self.ended_in_order = true;
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let mut state = lock();
        state.open -= 1;
        state.failed |= !self.ended_in_order;
    }
}

/// How long a process that exits waits for the other ranks to do the same: as long as an operation waits for one by default.
const FINALISE_WITHIN: Duration = Duration::from_secs(300);

static STATE: Mutex<State> = Mutex::new(State { owner: Owner::Nobody, open: 0, failed: false, end: End::NotYet });
/// Wakes those who wait for [`State::end`].
static END: Condvar = Condvar::new();

struct State {
    owner: Owner,
    /// Sessions that exist.
    open: usize,
    /// A session ended other than in order, or did not begin.
    failed: bool,
    end: End,
}

/// Who initialised MPI.
enum Owner {
    Nobody,
    /// Our own thread, in the process with this id.
    Us(u32),
    Program,
    /// Nobody: it failed.
    Failed(Error),
}

#[derive(Clone, Copy, PartialEq)]
enum End {
    NotYet,
    /// The process exits. MPI is finalised if our own thread finds this.
    Wanted,
    Done,
}

/// From how many threads MPI may be called.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Level {
    Single,
    Funneled,
    Serialized,
    Multiple,
}

impl Level {
    fn granted() -> Result<Level, Error> {
        let mut level = 0;
        // SAFETY: MPI is initialised and not finalised, which the caller has checked; the pointer is valid for the write.
        let code = unsafe { ffi::MPI_Query_thread(&mut level) };
        calls::check(code, "asking MPI for its thread level", String::new)?;
        // SAFETY: reads constants that the library's C shim defines.
        let [funneled, serialized, multiple] =
            unsafe { [ffi::RSMPI_THREAD_FUNNELED, ffi::RSMPI_THREAD_SERIALIZED, ffi::RSMPI_THREAD_MULTIPLE] };
        Ok(match level {
            level if level == multiple => Level::Multiple,
            level if level == serialized => Level::Serialized,
            level if level == funneled => Level::Funneled,
            _ => Level::Single,
        })
    }

    fn name(self) -> &'static str {
        match self {
            Level::Single => "MPI_THREAD_SINGLE",
            Level::Funneled => "MPI_THREAD_FUNNELED",
            Level::Serialized => "MPI_THREAD_SERIALIZED",
            Level::Multiple => "MPI_THREAD_MULTIPLE",
        }
    }
}

fn lock() -> MutexGuard<'static, State> {
    STATE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn refusal(reason: String) -> Error {
    Error::System { what: "using MPI", reason }
}

fn begin(state: &mut State) -> Result<(), Error> {
    if state.end != End::NotYet || calls::is_finalised() {
        let reason = "MPI has been finalised in this process, and cannot be initialised again: join before that";
        return Err(refusal(reason.into()));
    }
    if let Owner::Nobody = state.owner {
        if calls::is_initialised() {
            state.owner = Owner::Program;
        } else {
            state.owner = match initialise() {
                Ok(()) => Owner::Us(std::process::id()),
                Err(error) => Owner::Failed(error),
            };
        }
    }
    let of_program = match &state.owner {
        Owner::Failed(error) => return Err(error.clone()),
        owner => matches!(owner, Owner::Program),
    };
    may_open(of_program, Level::granted()?, state.open)
}

/// Whether another wire may open beside `open` others. Each makes its calls on a thread of its own.
fn may_open(of_program: bool, level: Level, open: usize) -> Result<(), Error> {
    let name = level.name();
    if of_program {
        // With less, the program's own calls and ours could meet.
        return if level == Level::Multiple {
            Ok(())
        } else {
            Err(refusal(format!(
                "this program initialised MPI with {name}, and a thread of its own must call MPI too: initialise with \
                 MPI_Init_thread(…, MPI_THREAD_MULTIPLE, …), or leave it to this library"
            )))
        };
    }
    match level {
        Level::Multiple => Ok(()),
        Level::Serialized if open == 0 => Ok(()),
        Level::Serialized => Err(refusal(format!(
            "{} grants only {name}, which allows one communicator over MPI at a time, and one is open: drop it first, or use an \
             MPI library built for MPI_THREAD_MULTIPLE",
            calls::library()
        ))),
        Level::Single | Level::Funneled => Err(refusal(format!(
            "{} grants only {name}: use an MPI library built for MPI_THREAD_MULTIPLE",
            calls::library()
        ))),
    }
}

/// Starts the thread that owns MPI, and waits until it has initialised it.
fn initialise() -> Result<(), Error> {
    let (tell, told) = mpsc::channel();
    let started = thread::Builder::new().name("pillion-mpi".into()).spawn(move || own(&tell));
    started.map_err(|error| Error::System {
        what: "starting the thread that owns MPI",
        reason: crate::limits::explain_thread(&error),
    })?;
    let lost = || Err(Error::System { what: "initialising MPI", reason: "its thread ended".into() });
    told.recv().unwrap_or_else(|_| lost())?;
    // SAFETY: `at_exit` is a function that never unwinds, with the type that C expects.
    match unsafe { libc::atexit(at_exit) } {
        0 => Ok(()),
        _ => Err(Error::System { what: "asking to be called when the process exits", reason: "atexit refused".into() }),
    }
}

/// The life of the thread that owns MPI.
fn own(tell: &mpsc::Sender<Result<(), Error>>) {
    let mut granted = 0;
    // SAFETY: nobody has initialised MPI, by the caller's check. Null for argc and argv is allowed since MPI 2; the level granted is
    // written to memory that is ours.
    let code =
        unsafe { ffi::MPI_Init_thread(ptr::null_mut(), ptr::null_mut(), ffi::RSMPI_THREAD_MULTIPLE, &mut granted) };
    // The errors of functions that belong to no communicator of ours would otherwise end the process.
    // SAFETY: MPI is initialised if the first call succeeded, and the second is made only then.
    let result = calls::check(code, "initialising MPI", String::new).and_then(|()| unsafe {
        let code = ffi::MPI_Comm_set_errhandler(ffi::RSMPI_COMM_WORLD, ffi::RSMPI_ERRORS_RETURN);
        calls::check(code, "having MPI return its errors", String::new)
    });
    let failed = result.is_err();
    // Whoever started this thread waits for the answer.
    let _ = tell.send(result);
    if failed {
        return;
    }
    let mut state = lock();
    while state.end == End::NotYet {
        state = END.wait(state).unwrap_or_else(PoisonError::into_inner);
    }
    // Waiting for other ranks with the lock held would stop `at_exit` from giving up.
    drop(state);
    // SAFETY: this thread has initialised MPI. `at_exit` has seen that no session is open, and none begins any more, so that
    // nobody in this process calls MPI at the same time or later.
    unsafe { ffi::MPI_Finalize() };
    lock().end = End::Done;
    END.notify_all();
}

/// Runs when the process exits: has MPI finalised if nothing failed. Never panics; waits [`FINALISE_WITHIN`] at most.
extern "C" fn at_exit() {
    let mut state = lock();
    // A forked child inherits this function, but not the thread.
    let ours = matches!(state.owner, Owner::Us(process) if process == std::process::id());
    if !ours || state.failed || state.open > 0 || state.end != End::NotYet || calls::is_finalised() {
        return;
    }
    state.end = End::Wanted;
    END.notify_all();
    let deadline = Instant::now() + FINALISE_WITHIN;
    while state.end != End::Done {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            let seconds = FINALISE_WITHIN.as_secs();
            let _ = writeln!(
                std::io::stderr(),
                "pillion: the other ranks did not end within {seconds} s (MPI_Finalize waits for them): exiting without them"
            );
            // SAFETY: ends the process at once. Returning would unload MPI beneath the thread that is inside it.
            unsafe { libc::_exit(1) };
        }
        (state, _) = END.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_may_open_follows_from_the_thread_level() {
        use Level::{Funneled, Multiple, Serialized, Single};
        // (the program's own, level, wires open already) and what the refusal names.
        let cases = [
            ((false, Multiple, 5), None),
            ((false, Serialized, 0), None),
            ((false, Serialized, 1), Some("one is open: drop it first")),
            ((false, Funneled, 0), Some("grants only MPI_THREAD_FUNNELED")),
            ((false, Single, 0), Some("grants only MPI_THREAD_SINGLE")),
            ((true, Multiple, 5), None),
            ((true, Serialized, 0), Some("this program initialised MPI with MPI_THREAD_SERIALIZED")),
            ((true, Single, 0), Some("MPI_Init_thread(…, MPI_THREAD_MULTIPLE, …)")),
        ];
        for ((of_program, level, open), expected) in cases {
            let found = may_open(of_program, level, open).map_err(|error| error.to_string());
            match expected {
                None => assert_eq!(found, Ok(())),
                Some(part) => assert!(found.as_ref().is_err_and(|error| error.contains(part)), "{found:?}"),
            }
        }
    }
}
