//! How the ranks of a communicator come together: who is on which host, and what connects them.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::atomic::Ordering;
use std::sync::{Arc, mpsc};

use crate::engine::Engine;
use crate::engine::group::Group;
use crate::hosts::Hosts;
use crate::limits::explain_thread;
use crate::memory::mapping::MAPPING;
use crate::rendezvous::{self, Participant};
use crate::terms::Terms;
use crate::wire::tcp::{Attempt, Lookout, Network, TcpWire, lost};
use crate::wire::threads::ThreadWire;
use crate::wire::{self, Wire};
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
    /// With which the ranks meet, where they do through a store. None once they have.
    pub(crate) attempt: Option<Arc<Attempt>>,
    /// Tells the communicator from others of the job: 0 for that of all ranks.
    pub(crate) key: u64,
}

impl Job {
    /// All ranks of a job, before they have met.
    pub(crate) fn of(launch: &Launch) -> Job {
        let (name, world) = (launch.job.clone(), launch.world);
        Job { launch: launch.clone(), name, ranks: (0..world).collect(), world, network: None, attempt: None, key: 0 }
    }

    pub(crate) fn fail(&self, reason: String) -> Error {
        let Launch { rank, world, .. } = self.launch;
        Error::Rendezvous { rank, world, job: self.name.clone(), reason }
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
    pub(crate) group: Arc<Group>,
    /// The wire to other hosts, where there are any.
    pub(crate) wire: Option<Box<dyn Wire>>,
    /// As in [`Job`].
    pub(crate) network: Option<Arc<Network>>,
}

/// Joins the others, on the thread that will drive this rank's operations.
pub(crate) fn join(job: &Job, options: Options) -> Result<Joined, Error> {
    let Launch { rank, world, local_world, .. } = job.launch;
    let mut network = None;
    let (homes, wire): (Vec<usize>, Option<Box<dyn Wire>>) = if options.simulated_hosts > 1 {
        let homes = (0..world).map(|rank| rank * options.simulated_hosts / world).collect();
        (homes, Some(Box::new(ThreadWire::open(&job.name, rank))))
    } else if let Some(attempt) = &job.attempt {
        let network = network.insert(Network::meet_through(attempt, &job.launch, &options)?);
        (numbered(&(0..world).map(|rank| network.host(rank).to_owned()).collect::<Vec<_>>()), None)
    } else if local_world != job.world || options.backend.uses_wire() {
        match options.wire.of(&job.launch, options.backend) {
            WireKind::Mpi => {
                let (identities, wire) = identities_over_mpi(job, &options)?;
                (numbered(&identities), Some(wire))
            }
            _ => {
                let network = network.insert(Network::meet(&job.launch, &options)?);
                (numbered(&(0..world).map(|rank| network.host(rank).to_owned()).collect::<Vec<_>>()), None)
            }
        }
    } else {
        (vec![0; world], None)
    };
    let hosts = match options.backend {
        Backend::Mpi | Backend::Tcp => Hosts::alone(world, rank),
        _ => Hosts::of(&homes, rank),
    };
    let is_single = hosts.ranks.len() == 1;
    if !is_single && options.backend == Backend::Shm {
        let reason = format!("the ranks are on {} hosts: choose another backend than shm", hosts.ranks.len());
        return Err(Error::Options { reason, said_by_rank_zero: rank > 0 });
    }
    let groups = options.reduce_groups;
    if !hosts.are_single() && !is_single && ![1, hosts.ranks.len()].contains(&groups) {
        let reason = format!(
            "{groups} groups of reduction were asked for, but {0} hosts are groups already: ask for 1 or {0}",
            hosts.ranks.len()
        );
        return Err(Error::Options { reason, said_by_rank_zero: rank > 0 });
    }
    let mut wire = match (&network, wire) {
        _ if is_single => None,
        (_, Some(wire)) => Some(wire),
        (network, None) => open_wire(&Job { network: network.clone(), ..job.clone() }, &hosts, &options)?,
    };
    // Launchers of one host may have given the job different names.
    // Every host has a place of its own, named after its lowest rank.
    let first = hosts.local()[0];
    let name = match &network {
        Some(network) => network.name(first, is_single),
        None if is_single => job.name.clone(),
        None => format!("{}@{first}", job.name),
    };
    let local = hosts.place(rank);
    let place = Participant {
        name: &name,
        rank: local,
        world: hosts.local().len(),
        global_rank: job.ranks[rank],
        global_world: job.world,
        terms: Terms::of(&job.launch, &options),
    };
    let mut lookout = network.as_deref().map(Lookout::new);
    let mut go_on = |missing: &[usize]| {
        if options.stop.as_ref().is_some_and(|stop| stop.load(Ordering::Relaxed)) {
            return Err(Error::Interrupted);
        }
        // A rank of this host that has ended since the hosts met will not come.
        let missing: Vec<usize> = missing.iter().map(|&place| hosts.local()[place]).collect();
        let (Some(lookout), Some(network)) = (&mut lookout, &network) else { return Ok(()) };
        let gone = lookout.gone(&missing);
        if gone.is_empty() { Ok(()) } else { Err(lost(network, &gone)) }
    };
    let joined = rendezvous::join(&place, options.startup_timeout, options.warn_after, &mut go_on);
    let map = joined.inspect_err(|error| {
        // Or the other hosts would take this rank's end for an orderly one.
        wire.iter_mut().for_each(|wire| wire.abort(&error.to_string()));
    })?;
    let (words, members) = (map.shape().all(), (0..place.world).collect());
    let engine = Arc::new(Engine::new(map, local));
    Ok(Joined { group: Arc::new(Group::new(engine, words, members, local, hosts, options)), wire, network })
}

/// Opens the wire to the other hosts of a communicator, if it has any. Only its members call this.
pub(crate) fn open_wire(job: &Job, hosts: &Hosts, options: &Options) -> Result<Option<Box<dyn Wire>>, Error> {
    if hosts.ranks.len() == 1 {
        return Ok(None);
    }
    if options.simulated_hosts > 1 {
        return Ok(Some(Box::new(ThreadWire::open(&job.name, job.launch.rank))));
    }
    match &job.network {
        Some(network) => {
            let (own, limit) = (job.launch.rank, options.startup_timeout);
            let wire = TcpWire::open(network.clone(), &job.ranks, own, hosts, job.suffix(), limit)?;
            Ok(Some(Box::new(wire)))
        }
        None => {
            // MPI waits for the other members without limit, on a thread that is left behind then.
            let (sender, receiver) = mpsc::channel();
            let for_thread = job.clone();
            let opening = std::thread::Builder::new().name("pillion-opening".into());
            let opening = opening.spawn(move || sender.send(over_mpi(&for_thread)));
            opening.map_err(|error| Error::System { what: "starting a thread", reason: explain_thread(&error) })?;
            let opened = receiver.recv_timeout(options.startup_timeout);
            opened.unwrap_or_else(|_| Err(job.fail("members on other hosts did not come".to_owned()))).map(Some)
        }
    }
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
    if let Some(attempt) = &job.attempt {
        return !attempt.has_met() && wire::tcp::decline_through(attempt, &job.launch, reason);
    }
    if local_world != job.world && job.launch.meeting.is_some() {
        return wire::tcp::decline(&job.launch, hasher.finish());
    }
    // On several hosts those of this host would meet under a name that depends on the others.
    let name = format!("{}!", job.name);
    // Ranks that decline compare reasons alone.
    let terms = Terms::default();
    let place = match local_world == job.world {
        true => Participant { name: &job.name, rank, world, global_rank, global_world, terms },
        false => Participant { name: &name, rank: local_rank, world: local_world, global_rank, global_world, terms },
    };
    rendezvous::decline(&place, hasher.finish())
}

/// The numbers of hosts with these names, in the order in which they first come.
fn numbered(identities: &[String]) -> Vec<usize> {
    let mut names: Vec<&String> = Vec::new();
    let number = |identity| {
        names.iter().position(|&name| name == identity).unwrap_or_else(|| {
            names.push(identity);
            names.len() - 1
        })
    };
    identities.iter().map(number).collect()
}

/// Opens the wire between all ranks and finds out which are on which host.
#[cfg(feature = "mpi")]
fn identities_over_mpi(job: &Job, options: &Options) -> Result<(Vec<String>, Box<dyn Wire>), Error> {
    use crate::wire::mpi::identities;
    let mut wire = over_mpi(job)?;
    let Launch { rank, world, .. } = job.launch;
    let own = crate::hosts::identity(&job.launch);
    let identities = identities::exchange(&mut *wire, rank, world, &own, options.startup_timeout)?;
    Ok((identities, wire))
}

#[cfg(feature = "mpi")]
fn over_mpi(job: &Job) -> Result<Box<dyn Wire>, Error> {
    let mut hasher = DefaultHasher::new();
    job.name.hash(&mut hasher);
    // MPI guarantees tags up to 32767. The members of a communicator make one at a time, so this need not tell all apart.
    let number = (hasher.finish() % 32_000) as u32;
    let launch = Launch { rank: job.ranks[job.launch.rank], world: job.world, ..job.launch.clone() };
    Ok(Box::new(crate::wire::mpi::MpiWire::open(&launch, &job.ranks, number)?))
}

/// This build has no MPI; [`crate::Communicator::connect`] has said so by now.
#[cfg(not(feature = "mpi"))]
fn identities_over_mpi(job: &Job, _options: &Options) -> Result<(Vec<String>, Box<dyn Wire>), Error> {
    over_mpi(job).map(|wire| (Vec::new(), wire))
}

#[cfg(not(feature = "mpi"))]
fn over_mpi(job: &Job) -> Result<Box<dyn Wire>, Error> {
    Err(job.fail("its ranks are on several hosts: build with `--features mpi`".to_owned()))
}
