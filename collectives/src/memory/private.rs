//! Reading the private memory of other processes of the host, where the system allows it.
//!
//! Whether it does depends on who runs the processes, on security modules and on containers. So
//! each rank shows a word of its private memory, reads those of the others once at the start, and
//! says whether all were there. Nobody ever writes to the private memory of another process.

use std::hash::{BuildHasher, RandomState};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use rustix::io::Errno;

/// What a rank shows of its process.
#[repr(C)]
pub(crate) struct ProcessControl {
    /// Its number, as it is known where the rank runs.
    process: AtomicU32,
    /// Whether this rank reads the private memory of all others, as a number; 0 until it knows.
    verdict: AtomicU32,
    /// Where a word of private memory lies, and what is there.
    probe: [AtomicU64; 2],
}

const READS: u32 = 1;
const DOES_NOT: u32 = 2;

/// A word that no other process has.
static PROBE: OnceLock<u64> = OnceLock::new();

impl ProcessControl {
    /// Shows this process; once, before the rank says that it has joined.
    pub(crate) fn show(&self) {
        let probe = PROBE.get_or_init(|| RandomState::new().hash_one("probe"));
        self.process.store(std::process::id(), Ordering::Relaxed);
        self.probe[0].store(std::ptr::from_ref(probe).addr() as u64, Ordering::Relaxed);
        self.probe[1].store(*probe, Ordering::Relaxed);
    }

    /// Whether this process reads the private memory of the process shown here.
    pub(crate) fn can_be_read(&self) -> bool {
        let [address, probe] = self.probe.each_ref().map(|word| word.load(Ordering::Relaxed));
        let mut found = !probe;
        // SAFETY: `found` is eight bytes that nobody else uses.
        let result = unsafe { self.read(address, (&raw mut found).cast(), size_of::<u64>()) };
        result.is_ok() && found == probe
    }

    /// Copies bytes from address `from` of the process shown here.
    ///
    /// # Errors
    /// When the system refuses, the process has ended, or it has nothing at the address.
    ///
    /// # Safety
    /// `to` is writable for `bytes`, and nobody else uses these bytes meanwhile.
    pub(crate) unsafe fn read(&self, from: u64, to: *mut u8, bytes: usize) -> Result<(), Errno> {
        let process = self.process.load(Ordering::Relaxed) as libc::pid_t;
        let mut done = 0;
        while done < bytes {
            let iov_len = bytes - done;
            let local = libc::iovec { iov_base: to.wrapping_add(done).cast(), iov_len };
            let theirs = std::ptr::without_provenance_mut((from + done as u64) as usize);
            let remote = libc::iovec { iov_base: theirs, iov_len };
            // SAFETY: the kernel writes to `local` alone, which the caller promises is writable; it
            // looks itself whether the other process has the remote range.
            match unsafe { libc::process_vm_readv(process, &local, 1, &remote, 1, 0) } {
                0 => return Err(Errno::FAULT),
                count if count > 0 => done += count as usize,
                _ => {
                    let error = std::io::Error::last_os_error();
                    return Err(Errno::from_io_error(&error).unwrap_or(Errno::IO));
                }
            }
        }
        Ok(())
    }

    /// Says whether this rank reads the private memory of all others.
    pub(crate) fn judge(&self, reads: bool) {
        self.verdict.store(if reads { READS } else { DOES_NOT }, Ordering::Release);
    }

    /// What the rank has said; none before.
    pub(crate) fn verdict(&self) -> Option<bool> {
        match self.verdict.load(Ordering::Acquire) {
            0 => None,
            verdict => Some(verdict == READS),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_there_is_read_and_what_is_not_is_an_error() {
        let mine = ProcessControl {
            process: AtomicU32::new(0),
            verdict: AtomicU32::new(0),
            probe: [AtomicU64::new(0), AtomicU64::new(0)],
        };
        mine.show();
        let source: Vec<u8> = (0..100_000).map(|byte| byte as u8).collect();
        let mut target = vec![0; source.len()];
        let read = |from: u64, to: &mut [u8]| {
            // SAFETY: a slice.
            unsafe { mine.read(from, to.as_mut_ptr(), to.len()) }
        };
        if !mine.can_be_read() {
            // Not every container allows it.
            assert!(read(source.as_ptr().addr() as u64, &mut target).is_err());
            return;
        }
        read(source.as_ptr().addr() as u64, &mut target).unwrap();
        assert_eq!(source, target);
        assert_eq!(read(8, &mut target), Err(Errno::FAULT));
        mine.probe[1].fetch_add(1, Ordering::Relaxed);
        assert!(!mine.can_be_read(), "another word than the process has shown");
        mine.process.store(i32::MAX as u32, Ordering::Relaxed);
        assert_eq!(read(source.as_ptr().addr() as u64, &mut target), Err(Errno::SRCH));
    }
}
