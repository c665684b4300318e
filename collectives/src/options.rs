//! What a communicator can be told at its start.

use std::time::Duration;

use crate::shm::control::Channel;

/// Limits of a communicator, and faults that tests inject.
#[derive(Clone, Debug)]
pub struct Options {
    /// An operation that waits longer fails with [`crate::Error::Timeout`]. Default: 300 s.
    pub timeout: Duration,
    /// Ranks that have not joined by then fail the start. Default: 60 s.
    pub startup_timeout: Duration,
    /// An operation that waits longer prints a line that says for whom. Default: 10 s.
    pub warn_after: Duration,
    /// For tests: every operation on the gather channel starts this much late.
    pub gather_delay: Duration,
    /// For tests: every operation on the reduce channel starts this much late.
    pub reduce_delay: Duration,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            timeout: Duration::from_secs(300),
            startup_timeout: Duration::from_secs(60),
            warn_after: Duration::from_secs(10),
            gather_delay: Duration::ZERO,
            reduce_delay: Duration::ZERO,
        }
    }
}

impl Options {
    pub(crate) fn delay_of(&self, channel: Channel) -> Duration {
        match channel {
            Channel::Gather => self.gather_delay,
            Channel::Reduce => self.reduce_delay,
            Channel::Control => Duration::ZERO,
        }
    }
}
