//! Knowing at once that a process has died: a robust mutex that its progress thread holds.
//!
//! When a thread ends, however it ends, the kernel walks its list of robust mutexes and marks them before it tears the memory
//! down, so the news does not wait for gigabytes of arena to be freed (a socket's hang-up does).

use std::cell::UnsafeCell;
use std::mem::MaybeUninit;

use crate::Error;

/// A robust mutex shared between processes, held by one thread for as long as it lives.
#[repr(C, align(64))]
pub(crate) struct Life(UnsafeCell<MaybeUninit<libc::pthread_mutex_t>>);

// SAFETY: after `begin`, the mutex is only touched by pthread functions, which are made for sharing.
unsafe impl Sync for Life {}

impl Life {
    /// Initialises and takes the mutex on the calling thread.
    ///
    /// # Safety
    /// Called once on zeroed shared memory, before the rank declares itself joined; nobody probes before that. The
    /// memory stays mapped, at this address, until the thread has called [`Life::end`] or has ended.
    pub(crate) unsafe fn begin(&self) -> Result<(), Error> {
        let mut attributes = MaybeUninit::uninit();
        let check = |code: i32| match code {
            0 => Ok(()),
            code => Err(Error::system("making a robust mutex")(rustix::io::Errno::from_raw_os_error(code))),
        };
        // SAFETY: `attributes` is initialised by the first call before the others use it; the mutex is ours alone until the
        // rank has joined, by the caller's promise.
        unsafe {
            check(libc::pthread_mutexattr_init(attributes.as_mut_ptr()))?;
            check(libc::pthread_mutexattr_setpshared(attributes.as_mut_ptr(), libc::PTHREAD_PROCESS_SHARED))?;
            check(libc::pthread_mutexattr_setrobust(attributes.as_mut_ptr(), libc::PTHREAD_MUTEX_ROBUST))?;
            check(libc::pthread_mutex_init(self.0.get().cast(), attributes.as_ptr()))?;
            check(libc::pthread_mutex_lock(self.0.get().cast()))
        }
    }

    /// Gives the mutex back: an orderly end.
    ///
    /// # Safety
    /// On the thread that called [`Life::begin`].
    pub(crate) unsafe fn end(&self) {
        // SAFETY: initialised, and held by this thread.
        unsafe { libc::pthread_mutex_unlock(self.0.get().cast()) };
    }

    /// Whether the thread that held it ended without giving it back. Only the first two to ask learn it this way, and must
    /// tell the others.
    ///
    /// # Safety
    /// The owner has joined: its [`Life::begin`] happened before.
    pub(crate) unsafe fn has_ended(&self) -> bool {
        // SAFETY: initialised, by the caller's promise.
        match unsafe { libc::pthread_mutex_trylock(self.0.get().cast()) } {
            libc::EOWNERDEAD => {
                // Unlocking without repair makes the mutex answer ENOTRECOVERABLE to who asks next.
                // SAFETY: this thread is the owner now.
                unsafe { libc::pthread_mutex_unlock(self.0.get().cast()) };
                true
            }
            // Not ours to unlock: glibc leaves the lock taken in our name all the same, and unlocking it would crash.
            libc::ENOTRECOVERABLE => true,
            0 => {
                // Given back in order; the rank's state says that it has left.
                // SAFETY: this thread has just locked it.
                unsafe { libc::pthread_mutex_unlock(self.0.get().cast()) };
                false
            }
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Threads stand for processes: the kernel treats what they hold alike.
    #[test]
    fn an_end_without_giving_back_is_told_from_an_orderly_one_however_often_it_is_asked_for() {
        for (orderly, ended) in [(true, false), (false, true)] {
            let life = Life(UnsafeCell::new(MaybeUninit::zeroed()));
            std::thread::scope(|scope| {
                let owner = scope.spawn(|| {
                    // SAFETY: once, before anybody asks; ended, if at all, by the same thread; `life` outlives the thread.
                    unsafe {
                        life.begin().unwrap();
                        if orderly {
                            life.end();
                        }
                    }
                });
                // The scope alone would not wait for the thread's end.
                owner.join().unwrap();
            });
            // SAFETY: the owner began its life before it ended.
            let asked = std::array::from_fn(|_| unsafe { life.has_ended() });
            // Two that ask at the same time both learn it; whoever comes later is told by them.
            let [first, second, _third] = asked;
            assert_eq!([first, second], [ended, ended], "orderly: {orderly}");
        }
    }
}
