//! Children that a process forks and that go on in the same program, as Python's `multiprocessing`
//! makes them. Such a child has the parent's memory, shared memory and descriptors, but none of its
//! threads. What it must not do: wait for the progress thread, give back memory that its parent
//! uses, or keep connections open, whose end tells other hosts that a rank has died.

use std::ops::{Deref, DerefMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicI32, AtomicU32, Ordering};

use crate::Error;

/// How many forks lie between the first process and this one.
static FORKS: AtomicU32 = AtomicU32::new(0);

/// What stands in a child for a descriptor that its parent keeps.
static NOTHING: OnceLock<Option<OwnedFd>> = OnceLock::new();

/// Descriptors that a child must not keep open, plus one; 0 in places that are free. A child reads
/// it before anything else runs in it, so it is made of atomics and never grows.
static KEPT: [AtomicI32; 8192] = [const { AtomicI32::new(0) }; 8192];

/// The process that made something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Maker(u32);

impl Default for Maker {
    fn default() -> Maker {
        Maker::this()
    }
}

impl Maker {
    /// This process.
    pub(crate) fn this() -> Maker {
        static WATCH: OnceLock<()> = OnceLock::new();
        WATCH.get_or_init(|| {
            // SAFETY: the function only uses atomics and system calls, as is allowed in a child
            // of a process with threads, and never unwinds. Where it cannot be registered, there
            // is no memory, and children are as before.
            unsafe { libc::pthread_atfork(None, None, Some(in_child)) };
        });
        Maker(FORKS.load(Ordering::Relaxed))
    }

    /// Whether that is not this process but one that it was forked from.
    pub(crate) fn is_another(self) -> bool {
        self.0 != FORKS.load(Ordering::Relaxed)
    }

    /// # Errors
    /// Where that is not this process.
    pub(crate) fn check(self) -> Result<(), Error> {
        if self.is_another() {
            let reason = "the process that joined the job forked this one, in which it does not run: \
                          join a job of its own, or start other programs with exec";
            return Err(Error::System { what: "using a communicator", reason: reason.to_owned() });
        }
        Ok(())
    }
}

/// For tests: a forked child of this process, which only sleeps, until this is dropped.
#[cfg(test)]
pub(crate) struct Child(libc::pid_t);

#[cfg(test)]
impl Child {
    pub(crate) fn fork() -> Child {
        // SAFETY: the child only sleeps and ends.
        let child = unsafe { libc::fork() };
        if child == 0 {
            std::thread::sleep(std::time::Duration::from_secs(120));
            // SAFETY: ends the child at once.
            unsafe { libc::_exit(0) };
        }
        assert!(child > 0, "fork failed");
        Child(child)
    }

    /// Its number.
    pub(crate) fn id(&self) -> libc::pid_t {
        self.0
    }
}

#[cfg(test)]
impl Drop for Child {
    fn drop(&mut self) {
        // SAFETY: it has not been waited for, so the number is still its; nothing is written.
        unsafe {
            libc::kill(self.0, libc::SIGKILL);
            libc::waitpid(self.0, std::ptr::null_mut(), 0);
        }
    }
}

extern "C" fn in_child() {
    FORKS.fetch_add(1, Ordering::Relaxed);
    // Takes no lock, which a thread of the parent might hold.
    let Some(nothing) = NOTHING.get().and_then(Option::as_ref) else { return };
    for kept in &KEPT {
        // A child of this child may have other files under these numbers.
        let fd = kept.swap(0, Ordering::Relaxed) - 1;
        if fd >= 0 {
            // SAFETY: both are open. The number stays taken, so whoever closes it in this child
            // closes nothing else; the parent's own descriptor is not touched.
            unsafe { libc::dup3(nothing.as_raw_fd(), fd, libc::O_CLOEXEC) };
        }
    }
}

/// A descriptor that forked children do not keep open. A child that is forked in the moment between
/// the making of the descriptor and the making of this keeps it all the same.
pub(crate) struct Guarded<T> {
    // Goes first.
    _kept: Kept,
    inner: T,
}

impl<T: AsRawFd> Guarded<T> {
    pub(crate) fn new(inner: T) -> Guarded<T> {
        Guarded { _kept: Kept::new(&inner), inner }
    }
}

impl<T> Deref for Guarded<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.inner
    }
}

impl<T> DerefMut for Guarded<T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.inner
    }
}

impl<T: AsFd> AsFd for Guarded<T> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.inner.as_fd()
    }
}

/// While this lives, forked children have nothing under the number of a descriptor.
struct Kept(Option<(&'static AtomicI32, i32)>);

impl Kept {
    /// Where there are more than there is room for, children keep the others.
    fn new(descriptor: &impl AsRawFd) -> Kept {
        let nothing = NOTHING.get_or_init(|| std::fs::File::open("/dev/null").ok().map(OwnedFd::from));
        Maker::this();
        let fd: RawFd = descriptor.as_raw_fd() + 1;
        let free = |kept: &&AtomicI32| kept.compare_exchange(0, fd, Ordering::Relaxed, Ordering::Relaxed).is_ok();
        Kept(nothing.as_ref().and_then(|_| KEPT.iter().find(free)).map(|kept| (kept, fd)))
    }
}

impl Drop for Kept {
    /// Before the descriptor is closed.
    fn drop(&mut self) {
        if let Some((kept, fd)) = self.0 {
            // In a child the place is free already, or another's.
            let _ = kept.compare_exchange(fd, 0, Ordering::Relaxed, Ordering::Relaxed);
        }
    }
}
