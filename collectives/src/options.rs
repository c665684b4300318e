//! What a communicator can be told at its start.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use crate::launch::Source;
use crate::memory::control::Channel;
use crate::{Error, Launch};

/// What moves the bytes. Displays as its name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "clap", derive(clap::ValueEnum))]
pub enum Backend {
    /// Shared memory on one host, hierarchical on several.
    #[default]
    Auto,
    /// Shared memory: all ranks are on one host.
    Shm,
    /// TCP between all ranks.
    Tcp,
    /// MPI between all ranks, in a build with the feature mpi.
    Mpi,
    /// Shared memory on each host, and TCP or MPI between hosts.
    Hierarchical,
}

impl Backend {
    /// Whether ranks of one host may be connected by a wire, too.
    pub(crate) fn uses_wire(self) -> bool {
        matches!(self, Backend::Tcp | Backend::Mpi | Backend::Hierarchical)
    }
}

/// What moves elements between GPUs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "clap", derive(clap::ValueEnum))]
pub enum GpuTransport {
    /// Peer on one host, NCCL on several.
    #[default]
    Auto,
    /// GPUs of one host read each other's memory. Sums have the bits of shared memory's.
    Peer,
    /// NCCL: each rank needs a GPU of its own. Sums are in NCCL's own order.
    Nccl,
}

/// What connects hosts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "clap", derive(clap::ValueEnum))]
pub enum WireKind {
    /// MPI where this build has it and its launcher or Slurm started the job, else TCP.
    #[default]
    Auto,
    /// TCP, from PILLION_ADDRESS or what torchrun and srun say.
    Tcp,
    /// MPI, in a build with the feature mpi.
    Mpi,
}

impl WireKind {
    /// What it comes to for a job: never [`WireKind::Auto`].
    pub(crate) fn of(self, launch: &Launch, backend: Backend) -> WireKind {
        let is_of_mpi = !matches!(launch.source, Source::Single | Source::Local | Source::Torchrun);
        match (backend, self) {
            (Backend::Tcp, _) | (_, WireKind::Tcp) => WireKind::Tcp,
            (Backend::Mpi, _) | (_, WireKind::Mpi) => WireKind::Mpi,
            _ if cfg!(feature = "mpi") && is_of_mpi => WireKind::Mpi,
            _ => WireKind::Tcp,
        }
    }
}

impl std::fmt::Display for WireKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            WireKind::Auto => "auto",
            WireKind::Tcp => "TCP",
            WireKind::Mpi => "MPI",
        })
    }
}

impl std::fmt::Display for Backend {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Backend::Auto => "auto",
            Backend::Shm => "shm",
            Backend::Tcp => "tcp",
            Backend::Mpi => "mpi",
            Backend::Hierarchical => "hierarchical",
        })
    }
}

/// Limits of a communicator, and faults that tests inject.
#[derive(Clone, Debug)]
pub struct Options {
    /// An operation that waits longer fails with [`crate::Error::Timeout`]. Default: 300 s.
    /// A rank waits half a second longer for ranks of other hosts, because ranks there know better
    /// who is late.
    pub timeout: Duration,
    /// Ranks that have not joined by then fail the start. A rank that waits longer than
    /// `warn_after` says for whom. Default: 60 s.
    pub startup_timeout: Duration,
    /// An operation that waits longer prints a line that says for whom. Default: 10 s.
    pub warn_after: Duration,
    /// What moves the bytes. Default: [`Backend::Auto`].
    pub backend: Backend,
    /// What connects hosts. Default: [`WireKind::Auto`].
    pub wire: WireKind,
    /// Number of groups of consecutive ranks in which reductions are computed: partial results of the groups are combined in order.
    /// Divides the number of ranks. With as many groups as a cluster has hosts, one host computes the same bits as the cluster.
    /// Default: 1.
    pub reduce_groups: usize,
    /// Whether ranks of a host read buffers in private memory where they lie, if the system allows
    /// it to all of them; otherwise buffers pass through shared memory. Default: true.
    pub reads_private: bool,
    /// Ends the wait for other ranks at the start once it is raised, such as the flag of
    /// [`stop::flag`](crate::stop::flag): with [`Error::Interrupted`], within a tenth of a second.
    /// Operations do not look at it. Default: none.
    pub stop: Option<Arc<AtomicBool>>,
    /// What this rank calls its host when it joins through a store
    /// ([`Communicator::connect_through`](crate::Communicator::connect_through)): ranks with
    /// different names share no memory. Default: what `PILLION_HOST` says, or else the system.
    /// Ranks that a launcher started have [`Launch::host`].
    pub host: Option<String>,
    /// The network interface whose address this rank offers to other hosts when it joins through a
    /// store, by its name or an address of it. Default: what `PILLION_INTERFACE` says, or else the
    /// address from which this rank reaches rank 0. Ranks that a launcher started have
    /// [`Launch::interface`].
    pub interface: Option<String>,
    /// For tests, with ranks that are threads of one process: they behave as if they were on this
    /// many hosts, consecutive ranks on each, as evenly as can be, and pass messages through this
    /// process's memory where there would be a network.
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
            wire: WireKind::Auto,
            reduce_groups: 1,
            reads_private: true,
            stop: None,
            host: None,
            interface: None,
            simulated_hosts: 1,
            gather_delay: Duration::ZERO,
            reduce_delay: Duration::ZERO,
        }
    }
}

impl Options {
    /// Whether ranks of `launch` meet over TCP, and need to know where ([`Launch::meeting`]).
    pub fn needs_meeting(&self, launch: &Launch) -> bool {
        self.wire_for(launch) == Some(WireKind::Tcp)
    }

    /// What connects ranks of `launch`, where they are not all in the shared memory of one host.
    fn wire_for(&self, launch: &Launch) -> Option<WireKind> {
        let several = launch.local_world != launch.world && self.backend != Backend::Shm;
        let real = self.simulated_hosts == 1;
        (real && (several || self.backend.uses_wire())).then(|| self.wire.of(launch, self.backend))
    }

    /// Whether a rank of `launch` can join with these options; [`crate::Communicator::connect`]
    /// asks, too. A program that starts ranks itself asks before.
    ///
    /// # Errors
    /// [`Error::Options`].
    pub fn check(&self, launch: &Launch) -> Result<(), Error> {
        let &Launch { world, local_world, .. } = launch;
        let (backend, hosts) = (self.backend, self.simulated_hosts);
        let reason = if let Some(reason) = self.groups_do_not_divide(world) {
            reason
        } else if matches!((backend, self.wire), (Backend::Mpi, WireKind::Tcp) | (Backend::Tcp, WireKind::Mpi)) {
            format!("the backend {backend} sends over another wire than {}: leave one of them out", self.wire)
        } else if self.wire_for(launch) == Some(WireKind::Mpi) && !cfg!(feature = "mpi") {
            "this build has no MPI: build with `--features mpi`, or choose another backend and wire".to_owned()
        } else if self.needs_meeting(launch) && launch.meeting.is_none() {
            format!(
                "{local_world} of {world} ranks are on this host, and nothing says where they meet: set \
                 PILLION_ADDRESS=host:port, of rank 0's host, on every rank, or start with torchrun or srun, or {}",
                if cfg!(feature = "mpi") { "with mpirun" } else { "build with `--features mpi` and start with mpirun" }
            )
        } else if local_world != world && backend == Backend::Shm {
            format!("only {local_world} of {world} ranks are on this host: choose another backend than shm")
        } else if hosts == 0 || hosts > local_world {
            format!("{world} ranks cannot be on {hosts} simulated hosts")
        } else {
            return Ok(());
        };
        Err(Error::Options { reason, said_by_rank_zero: false })
    }

    /// Whether `world` ranks can join through a store with these options.
    pub(crate) fn check_through(&self, world: usize) -> Result<(), Error> {
        let reason = if let Some(reason) = self.groups_do_not_divide(world) {
            reason
        } else if self.backend == Backend::Mpi || self.wire == WireKind::Mpi {
            "ranks that meet through a store are connected over TCP: choose another backend and wire than MPI"
                .to_owned()
        } else if self.simulated_hosts != 1 {
            "ranks that meet through a store simulate no hosts: give them names of hosts (`Options::host`)".to_owned()
        } else {
            return Ok(());
        };
        Err(Error::Options { reason, said_by_rank_zero: false })
    }

    fn groups_do_not_divide(&self, world: usize) -> Option<String> {
        let groups = self.reduce_groups;
        let divides = groups != 0 && world.is_multiple_of(groups);
        (!divides).then(|| format!("{groups} groups of reduction do not divide {world} ranks: choose a divisor"))
    }

    pub(crate) fn delay_of(&self, channel: Channel) -> Duration {
        match channel {
            Channel::Gather => self.gather_delay,
            Channel::Reduce => self.reduce_delay,
            Channel::Control => Duration::ZERO,
        }
    }
}
