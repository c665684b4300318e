//! What a rank knows of its job once it has met the others: where each listens, and on which host.

use std::collections::{HashMap, VecDeque};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::ErrorKind;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::greeting::{Arriving, Greeting, HOST, MEETING};
use super::interface;
use super::lookout::{Lookout, lost};
use super::meeting::{Failure, Member, accept_some, dial, is_out_of_files, listen, serve, visit};
use crate::limits::explain;
use crate::memory::fork::Guarded;
use crate::patience::Patience;
use crate::terms::Terms;
use crate::{Error, Launch, Options, hosts};

/// How long the listener is left alone while connections are waited for.
const NAP: Duration = Duration::from_millis(1);

/// A rank's end of the job's network.
pub(crate) struct Network {
    rank: usize,
    world: usize,
    job: String,
    token: u64,
    members: Vec<Member>,
    /// What unspecified addresses stand for: that of rank 0, as this rank reached it.
    zero: IpAddr,
    listener: Guarded<TcpListener>,
    /// When to say for whom this rank waits.
    warn_after: Duration,
    arrivals: Mutex<Arrivals>,
    /// Of ranks that met through a store, by rank: the word that each chose.
    words: Vec<u128>,
}

/// Who has connected here.
#[derive(Default)]
struct Arrivals {
    arriving: VecDeque<Arriving>,
    /// By the purpose, the rank, and the number of the connection.
    greeted: HashMap<(u64, u64, u64), Guarded<TcpStream>>,
}

impl Network {
    /// Meets the other ranks of the job. Collective.
    ///
    /// # Errors
    /// [`Error::Rendezvous`].
    pub(crate) fn meet(launch: &Launch, options: &Options) -> Result<Arc<Network>, Error> {
        let Launch { rank, world, .. } = *launch;
        let fail = |reason: String| Error::Rendezvous { rank, world, job: launch.job.clone(), reason };
        let Some(meeting) = &launch.meeting else {
            return Err(fail("nothing says where rank 0 is: set PILLION_ADDRESS=host:port on every rank".to_owned()));
        };
        let token = digest(&meeting.secret);
        let (listener, port) = listen_for_ranks().map_err(fail)?;
        let host = host_name(launch).map_err(fail)?;
        let (rank_number, number) = (rank as u64, world as u64);
        let offered = launch.interface.as_deref().map_or(Ok(Vec::new()), interface::find).map_err(fail)?;
        let (terms, address) = (Terms::of(launch, options), IpAddr::from(Ipv6Addr::UNSPECIFIED));
        let own = Greeting { token, purpose: MEETING, rank: rank_number, number, terms, port, address, host };
        let patience = Patience::new(rank, options.startup_timeout, options.warn_after);
        let mut patience = patience.stopped_by(options.stop.clone());
        let met = match rank {
            0 => {
                let address = offered_by_zero(&offered, &meeting.address).map_err(fail)?.unwrap_or(address);
                let own = Greeting { address, ..own };
                serve(&own, &meeting.address, &mut patience).map(|members| (members, [127, 0, 0, 1].into()))
            }
            _ => visit(&own, &offered, &meeting.address, &mut patience),
        };
        let (members, zero) = met.map_err(|failure| match failure {
            Failure::Reason(reason) => fail(reason),
            Failure::GaveUp(rank) => Error::Aborted { rank, reason: "it cannot start, and has said why".to_owned() },
        })?;
        let network = Network::new(launch, options, token, members, listener);
        Ok(Arc::new(Network { zero, ..network }))
    }

    pub(super) fn new(
        launch: &Launch,
        options: &Options,
        token: u64,
        members: Vec<Member>,
        listener: Guarded<TcpListener>,
    ) -> Network {
        Network {
            rank: launch.rank,
            world: launch.world,
            job: launch.job.clone(),
            token,
            members,
            zero: [127, 0, 0, 1].into(),
            listener,
            warn_after: options.warn_after,
            arrivals: Mutex::default(),
            words: Vec::new(),
        }
    }

    /// Where the ranks of one host meet, of which `first` is the first: the same on all of them.
    /// Launchers may have given the job different names. `is_single` says that there is one host.
    pub(crate) fn name(&self, first: usize, is_single: bool) -> String {
        let user = rustix::process::getuid().as_raw();
        match (self.words.get(first), is_single) {
            // No stranger can take this name before, because the first rank chose it at random.
            (Some(word), _) => format!("{user}-store-{word:032x}"),
            (None, true) => format!("{user}-tcp-{:016x}", self.token),
            (None, false) => format!("{user}-tcp-{:016x}@{first}", self.token),
        }
    }

    /// The same network, of ranks that chose these words.
    pub(super) fn with(self, words: Vec<u128>) -> Network {
        Network { words, ..self }
    }

    /// The host of a rank of the job.
    pub(crate) fn host(&self, rank: usize) -> &str {
        &self.members[rank].host
    }

    /// Connects to these ranks of the job, so many times to each, for the communicator of this
    /// name. The lower rank dials.
    ///
    /// # Errors
    /// [`Error::PeerLost`] for a rank, as the job counts, that has ended; [`Error::Rendezvous`] that
    /// names who does not come within `limit`.
    pub(super) fn connect(
        &self,
        name: &str,
        wanted: &[(usize, usize)],
        limit: Duration,
    ) -> Result<HashMap<usize, Vec<Guarded<TcpStream>>>, Error> {
        let purpose = digest(name) | 1;
        let mut patience = Patience::new(self.rank, limit, self.warn_after);
        let connections = self.connect_all(purpose, wanted, &mut patience);
        // No name is used twice.
        self.arrivals.lock().greeted.retain(|key, _| key.0 != purpose);
        connections
    }

    fn connect_all(
        &self,
        purpose: u64,
        wanted: &[(usize, usize)],
        patience: &mut Patience,
    ) -> Result<HashMap<usize, Vec<Guarded<TcpStream>>>, Error> {
        let mut connections: HashMap<usize, Vec<Guarded<TcpStream>>> = HashMap::new();
        for &(peer, count) in wanted.iter().filter(|(peer, _)| *peer > self.rank) {
            for number in 0..count as u64 {
                let socket = self.dial(peer, purpose, number, patience)?;
                connections.entry(peer).or_default().push(socket);
            }
        }
        let lower: Vec<(usize, usize)> = wanted.iter().copied().filter(|(peer, _)| *peer < self.rank).collect();
        let mut lookout = Lookout::new(self);
        // Those that refused to be connected to, unless they came before they ended.
        let mut gone = Vec::new();
        loop {
            let mut arrivals = self.arrivals.lock();
            arrivals.accept(&self.listener, self.token).map_err(|error| self.fail(explain(&error)))?;
            let keys =
                |(peer, count): (usize, usize)| (0..count as u64).map(move |number| (purpose, peer as u64, number));
            let is_missing = |&&peer: &&(usize, usize)| keys(peer).any(|key| !arrivals.greeted.contains_key(&key));
            let missing: Vec<usize> = lower.iter().filter(is_missing).map(|&(peer, _)| peer).collect();
            let Some(first) = missing.first() else {
                for &(peer, count) in &lower {
                    let sockets =
                        keys((peer, count)).map(|key| arrivals.greeted.remove(&key).expect("none is missing"));
                    connections.insert(peer, sockets.collect());
                }
                break;
            };
            gone.retain(|rank| missing.contains(rank));
            if !gone.is_empty() {
                return Err(lost(self, &gone));
            }
            if Instant::now() >= patience.deadline {
                return Err(self.fail(format!("rank {first} did not connect to this one")));
            }
            patience.warn(|| format!("rank {first} to connect"));
            drop(arrivals);
            gone = lookout.gone(&missing);
            std::thread::sleep(NAP);
        }
        for socket in connections.values().flatten() {
            // Small messages go at once. How long a rank may be silent is not the kernel's to
            // judge, which does not know who was stopped.
            let prepared = socket.set_nonblocking(true).and_then(|()| socket.set_nodelay(true));
            prepared.map_err(|error| self.fail(format!("preparing a connection: {error}")))?;
        }
        Ok(connections)
    }

    /// Every other rank of the job.
    pub(super) fn others(&self) -> impl Iterator<Item = usize> {
        (0..self.world).filter(|&rank| rank != self.rank)
    }

    /// Where a rank of the job listens.
    pub(super) fn address_of(&self, rank: usize) -> SocketAddr {
        let address = self.members[rank].address;
        let ip = if address.ip().is_unspecified() { self.zero } else { address.ip() };
        SocketAddr::new(ip, address.port())
    }

    fn dial(
        &self,
        peer: usize,
        purpose: u64,
        number: u64,
        patience: &mut Patience,
    ) -> Result<Guarded<TcpStream>, Error> {
        let address = self.address_of(peer).to_string();
        let (token, rank) = (self.token, self.rank as u64);
        let (terms, address_of_none, host) = (Terms::default(), Ipv6Addr::UNSPECIFIED.into(), String::new());
        let greeting = Greeting { token, purpose, rank, number, terms, port: 0, address: address_of_none, host };
        loop {
            let socket = dial(&address, patience.left());
            let greeted = socket.and_then(|mut socket| {
                std::io::Write::write_all(&mut *socket, &greeting.bytes())?;
                Ok(socket)
            });
            match greeted {
                Ok(socket) => return Ok(socket),
                Err(error) => {
                    // It listened when it was met.
                    if error.kind() == ErrorKind::ConnectionRefused {
                        return Err(lost(self, &[peer]));
                    }
                    let reason = format!("rank {peer} cannot be reached at {address}: {}", explain(&error));
                    if Instant::now() >= patience.deadline || is_out_of_files(&error) {
                        return Err(self.fail(reason));
                    }
                    patience.warn(|| reason);
                    std::thread::sleep(NAP);
                }
            }
        }
    }

    fn fail(&self, reason: String) -> Error {
        Error::Rendezvous { rank: self.rank, world: self.world, job: self.job.clone(), reason }
    }
}

#[cfg(test)]
impl Network {
    /// As it stands in the table.
    pub(super) fn address(&self, rank: usize) -> IpAddr {
        self.members[rank].address.ip()
    }

    /// Whether every connection that has greeted has been taken.
    pub(super) fn nobody_has_arrived(&self) -> bool {
        self.arrivals.lock().greeted.is_empty()
    }
}

impl Arrivals {
    /// Takes in who has connected and greeted. Strangers, and whoever says nothing for long, are
    /// turned away.
    ///
    /// # Errors
    /// When no file more can be opened.
    fn accept(&mut self, listener: &TcpListener, token: u64) -> std::io::Result<()> {
        accept_some(listener, &mut self.arriving)?;
        for mut arriving in std::mem::take(&mut self.arriving) {
            match arriving.read(token) {
                Ok(None) => self.arriving.push_back(arriving),
                Ok(Some(greeting)) => {
                    let key = (greeting.purpose, greeting.rank, greeting.number);
                    self.greeted.insert(key, arriving.socket);
                }
                Err(_) => {}
            }
        }
        Ok(())
    }
}

/// The address that a rank of `launch` offers to other hosts, where its interface is chosen.
///
/// # Errors
/// [`Error::Rendezvous`], with the interfaces that there are.
pub(crate) fn offered_address(launch: &Launch) -> Result<Option<IpAddr>, Error> {
    let Launch { rank, world, .. } = *launch;
    let address = launch.meeting.as_ref().map_or("", |meeting| &meeting.address);
    let found = launch.interface.as_deref().map_or(Ok(Vec::new()), interface::find);
    let offered = found.and_then(|found| offered_by_zero(&found, address));
    offered.map_err(|reason| Error::Rendezvous { rank, world, job: launch.job.clone(), reason })
}

/// Which of these addresses a rank offers, judged by the name by which ranks reach rank 0.
fn offered_by_zero(offered: &[IpAddr], address: &str) -> Result<Option<IpAddr>, String> {
    let Some(first) = offered.first() else { return Ok(None) };
    // A name that this host does not know may be known elsewhere.
    let zero = address.to_socket_addrs().ok().and_then(|mut known| known.next());
    interface::choose(offered, zero.map_or(*first, |zero| zero.ip())).map(Some)
}

/// A listener for connections of other ranks, and its port.
pub(super) fn listen_for_ranks() -> Result<(Guarded<TcpListener>, u16), String> {
    allow_files();
    let listener = listen(0).and_then(|listener| listener.set_nonblocking(true).map(|()| listener));
    let listener = listener.map_err(|error| format!("cannot listen for other ranks: {error}"))?;
    let port = listener.local_addr().map_err(|error| error.to_string())?.port();
    Ok((listener, port))
}

/// What this rank calls its host.
pub(super) fn host_name(launch: &Launch) -> Result<String, String> {
    let host = hosts::identity(launch);
    if host.len() > HOST {
        return Err(format!("the name of this host (PILLION_HOST) has {} bytes, and at most {HOST} fit", host.len()));
    }
    Ok(host)
}

/// Lets this process open as many files as it may: a rank has some for each rank of other hosts.
fn allow_files() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    // Where that is refused, the first file too many says so.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum });
}

/// Equal on all ranks, which run the same program.
pub(crate) fn digest(text: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    text.hash(&mut hasher);
    hasher.finish()
}
