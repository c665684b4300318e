//! What a communicator can be told at its start.

use std::time::Duration;

use crate::shm::control::Channel;

/// What moves the bytes. Displays as its name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Backend {
    /// [`Backend::Shm`] where all ranks are on one host, else [`Backend::Hierarchical`].
    #[default]
    Auto,
    /// Shared memory; all ranks are on one host.
    Shm,
    /// MPI between all ranks, wherever they are. Needs the feature `mpi`.
    Mpi,
    /// Shared memory between the ranks of a host, MPI between hosts, which have as many ranks each. Needs the feature `mpi`.
    Hierarchical,
}

impl std::fmt::Display for Backend {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Backend::Auto => "auto",
            Backend::Shm => "shm",
            Backend::Mpi => "mpi",
            Backend::Hierarchical => "hierarchical",
        })
    }
}

/// Limits of a communicator, and faults that tests inject.
#[derive(Clone, Debug)]
pub struct Options {
    /// An operation that waits longer fails with [`crate::Error::Timeout`]. Default: 300 s.
    pub timeout: Duration,
    /// Ranks that have not joined by then fail the start. Default: 60 s.
    pub startup_timeout: Duration,
    /// An operation that waits longer prints a line that says for whom. Default: 10 s.
    pub warn_after: Duration,
    /// What moves the bytes. Default: [`Backend::Auto`].
    pub backend: Backend,
    /// Number of groups of consecutive ranks in which reductions are computed: partial results of the groups are combined in order.
    /// Divides the number of ranks. With as many groups as a cluster has hosts, one host computes the same bits as the cluster.
    /// Default: 1.
    pub reduce_groups: usize,
    /// For tests, with ranks that are threads of one process: they behave as if they were on this many hosts, consecutive ranks on
    /// each, and pass messages through this process's memory where there would be a network.
    pub simulated_hosts: usize,
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
            backend: Backend::Auto,
            reduce_groups: 1,
            simulated_hosts: 1,
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
