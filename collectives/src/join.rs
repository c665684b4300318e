//! How the ranks of a communicator come together: who is on which host, and what connects them.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;

use crate::hosts::Hosts;
use crate::shm::arena::MAPPING;
use crate::shm::rendezvous::{self, Place};
use crate::shm::shared::Shared;
use crate::wire::Wire;
use crate::wire::tcp::{Network, TcpWire};
use crate::wire::threads::ThreadWire;
use crate::{Backend, Error, Launch, Options, WireKind};

/// Who talks: the ranks of a job, or those of a communicator split from another.
#[derive(Clone)]
pub(crate) struct Job {
    /// Of the job, with the rank and the world of this communicator.
    pub(crate) launch: Launch,
    /// Of the communicator; different for each that exists at a time.
    pub(crate) name: String,
    /// By rank of the communicator: the rank in the job.
    pub(crate) ranks: Vec<usize>,
    /// Number of ranks of the job.
    pub(crate) world: usize,
    /// Where hosts are connected over TCP: from the first communicator of the job on.
    pub(crate) network: Option<Arc<Network>>,
}

impl Job {
    /// All ranks of a job, before they have met.
    pub(crate) fn of(launch: &Launch) -> Job {
        let (name, world) = (launch.job.clone(), launch.world);
        Job { launch: launch.clone(), name, ranks: (0..world).collect(), world, network: None }
    }

    /// What tells this communicator from others of the job; the job's own name may be another on
    /// other hosts.
    pub(crate) fn suffix(&self) -> &str {
        &self.name[self.launch.job.len()..]
    }
}

/// What [`join`] returns.
pub(crate) struct Joined {
    /// What the rank's threads share.
    pub(crate) shared: Arc<Shared>,
    /// The wire to other hosts, where there are any.
    pub(crate) wire: Option<Box<dyn Wire>>,
    /// As in [`Job`].
    pub(crate) network: Option<Arc<Network>>,
}

/// Joins the others, on the thread that will drive this rank's operations.
pub(crate) fn join(job: &Job, options: Options) -> Result<Joined, Error> {
    let Launch { rank, world, local_world, .. } = job.launch;
    let mut network = job.network.clone();
    let (hosts, wire) = if options.simulated_hosts > 1 {
        let wire: Box<dyn Wire> = Box::new(ThreadWire::open(&job.name, rank));
        // By the rank in the job, so that a split communicator's ranks stay where they are.
        let on_each = local_world / options.simulated_hosts;
        let identities: Vec<String> = job.ranks.iter().map(|rank| (rank / on_each).to_string()).collect();
        (group(&identities, rank, options.backend), Some(wire))
    } else if local_world != job.world || options.backend.uses_wire() {
        match options.wire.of(&job.launch, options.backend) {
            WireKind::Mpi => over_mpi(job, &options)?,
            _ => over_tcp(job, &options, &mut network)?,
        }
    } else {
        (Hosts::single(world), None)
    };
    let mut wire = wire.filter(|_| hosts.ranks.len() > 1);
    let groups = options.reduce_groups;
    if hosts.local().len() > 1 && wire.is_some() && ![1, hosts.ranks.len()].contains(&groups) {
        let reason = format!(
            "{groups} groups of reduction were asked for, but {0} hosts are groups already: ask for 1 or {0}",
            hosts.ranks.len()
        );
        return Err(Error::Options { reason, said_by_rank_zero: rank > 0 });
    }
    // Launchers of one host may have given the job different names.
    let name = match &network {
        Some(network) => format!("{}{}", network.name(), job.suffix()),
        None => job.name.clone(),
    };
    // Every host has a place of its own, named after its lowest rank.
    let name = if wire.is_some() { format!("{name}@{}", hosts.local()[0]) } else { name };
    let local = hosts.column(rank);
    let place = Place {
        name: &name,
        rank: local,
        world: hosts.local().len(),
        global_rank: job.ranks[rank],
        global_world: job.world,
    };
    let map = rendezvous::join(&place, options.startup_timeout, options.warn_after).inspect_err(|error| {
        // Or the other hosts would take this rank's end for an orderly one.
        wire.iter_mut().for_each(|wire| wire.abort(&error.to_string()));
    })?;
    Ok(Joined { shared: Arc::new(Shared::new(map, local, hosts, options)), wire, network })
}

/// Tells the other ranks of this host that this one cannot join because of `error`, where nothing
/// else tells them. Returns the error to report: another one where rank 0 reports the same.
pub(crate) fn decline(job: &Job, error: Error) -> Error {
    match error {
        Error::Options { reason, said_by_rank_zero: false } => {
            let said_by_rank_zero = decline_for(job, &reason);
            Error::Options { reason, said_by_rank_zero }
        }
        // Rank 0 had given this rank the memory, and all see there that it has failed.
        Error::System { what: MAPPING, .. } if job.launch.rank > 0 => error,
        Error::System { .. } | Error::OutOfMemory { .. } => {
            let reason = error.to_string();
            if decline_for(job, &reason) { Error::Aborted { rank: 0, reason } } else { error }
        }
        error => error,
    }
}

/// The same for a reason in words; returns whether rank 0 reports the same.
pub(crate) fn decline_for(job: &Job, reason: &str) -> bool {
    let mut hasher = DefaultHasher::new();
    reason.hash(&mut hasher);
    let Launch { rank, world, local_rank, local_world, .. } = job.launch;
    let (global_rank, global_world) = (job.ranks[rank], job.world);
    // On several hosts those of this host would meet under a name that depends on the others.
    let name = format!("{}!", job.name);
    let place = match local_world == job.world {
        true => Place { name: &job.name, rank, world, global_rank, global_world },
        false => Place { name: &name, rank: local_rank, world: local_world, global_rank, global_world },
    };
    rendezvous::decline(&place, hasher.finish())
}

/// Puts ranks with equal identities on one host each, if there are as many on every host; every rank on its own otherwise, and where
/// the backend asks for that.
fn group(identities: &[String], rank: usize, backend: Backend) -> Hosts {
    let mut ranks: Vec<Vec<usize>> = Vec::new();
    for (rank, identity) in identities.iter().enumerate() {
        match ranks.iter_mut().find(|host| identities[host[0]] == *identity) {
            Some(host) => host.push(rank),
            None => ranks.push(vec![rank]),
        }
    }
    let even = ranks.iter().all(|host| host.len() == ranks[0].len());
    if matches!(backend, Backend::Mpi | Backend::Tcp) || !even {
        if !even && rank == 0 {
            crate::launcher::say(
                "hosts have different numbers of ranks, so every rank talks to every other over the network",
            );
        }
        ranks = (0..identities.len()).map(|rank| vec![rank]).collect();
    }
    let consecutive = |host: &Vec<usize>| host.windows(2).all(|pair| pair[0] + 1 == pair[1]);
    if !ranks.iter().all(consecutive) && rank == 0 {
        crate::launcher::say(
            "the ranks of a host are not consecutive, so sums run in an order that one host cannot reproduce; \
             place ranks in blocks (mpirun --map-by slot) where that matters",
        );
    }
    let own = ranks.iter().position(|host| host.contains(&rank)).expect("every rank has an identity");
    Hosts { ranks, own }
}

/// Meets the ranks of other hosts, and connects to those of this rank's column.
fn over_tcp(
    job: &Job,
    options: &Options,
    known: &mut Option<Arc<Network>>,
) -> Result<(Hosts, Option<Box<dyn Wire>>), Error> {
    let network = match known {
        Some(network) => network.clone(),
        // The job's first communicator, of all ranks.
        none => none.insert(Network::meet(&job.launch, options)?).clone(),
    };
    let identities: Vec<String> = job.ranks.iter().map(|&rank| network.host(rank).to_owned()).collect();
    let own = job.launch.rank;
    let hosts = group(&identities, own, options.backend);
    if hosts.ranks.len() == 1 {
        return Ok((hosts, None));
    }
    let wire = TcpWire::open(network, &job.ranks, own, &hosts, job.suffix(), options.startup_timeout)?;
    Ok((hosts, Some(Box::new(wire))))
}

/// Opens the wire between hosts and finds out which ranks are on which.
#[cfg(feature = "mpi")]
fn over_mpi(job: &Job, options: &Options) -> Result<(Hosts, Option<Box<dyn Wire>>), Error> {
    use crate::mpi::identities;
    let mut hasher = DefaultHasher::new();
    job.name.hash(&mut hasher);
    // MPI guarantees tags up to 32767. The members of a communicator make one at a time, so this need not tell all apart.
    let number = (hasher.finish() % 32_000) as u32;
    let launch = Launch { rank: job.ranks[job.launch.rank], world: job.world, ..job.launch.clone() };
    let mut wire: Box<dyn Wire> = Box::new(crate::mpi::MpiWire::open(&launch, &job.ranks, number)?);
    let (rank, world) = (job.launch.rank, job.launch.world);
    let own = crate::hosts::identity(&launch);
    let identities = identities::exchange(&mut *wire, rank, world, &own, options.startup_timeout)?;
    Ok((group(&identities, rank, options.backend), Some(wire)))
}

/// This build has no MPI; [`crate::Communicator::connect`] has said so by now.
#[cfg(not(feature = "mpi"))]
fn over_mpi(job: &Job, _options: &Options) -> Result<(Hosts, Option<Box<dyn Wire>>), Error> {
    let reason = "its ranks are on several hosts: build with `--features mpi`".to_owned();
    Err(Error::Rendezvous { rank: job.launch.rank, world: job.launch.world, job: job.name.clone(), reason })
}
