//! Reading the private memory of ranks of this host.

use std::time::{Duration, Instant};

use super::group::Group;
use super::watch::Watch;
use crate::Error;
use crate::transport::Limit;

/// How long after a rank's memory has gone others look for the reason.
const LOOKS_FOR: Duration = Duration::from_secs(1);

impl Group {
    /// Copies bytes from an address of rank `rank`'s process, for operation `op`.
    ///
    /// # Errors
    /// Why the rank has gone, where its memory has; [`Error::System`] where the system refuses.
    ///
    /// # Safety
    /// `to` is writable for `bytes`, and nobody else uses these bytes meanwhile.
    pub(crate) unsafe fn read_private(
        &self,
        rank: usize,
        from: u64,
        to: *mut u8,
        bytes: usize,
        op: &dyn Fn() -> String,
    ) -> Result<(), Error> {
        // SAFETY: the caller's promise.
        let read = unsafe { self.rank_control(rank).process.read(from, to, bytes) };
        let Err(refusal) = read else { return Ok(()) };
        // A rank that dies, or drops the buffers of an operation that failed, takes them away
        // before all see why.
        let (watch, since) = (Watch::new(Limit::NONE), Instant::now());
        while since.elapsed() < LOOKS_FOR {
            self.healthy()?;
            watch.look_around(self, &|late| late == rank, op)?;
            std::thread::sleep(Duration::from_millis(1));
        }
        let reason = format!(
            "rank {}: {refusal}; where the system cannot read that memory, set the option `reads_private` to false",
            self.name(rank)
        );
        Err(Error::System { what: "reading a peer's private memory", reason })
    }
}
