//! What a rank knows of its job once it has met the others: where each listens, and on which host.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, LazyLock, Weak};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::greeting::{Arriving, Greeting, HOST, MEETING};
use super::meeting::{Member, dial, is_out_of_files, listen, serve, visit};
use crate::limits::explain;
use crate::patience::Patience;
use crate::wire::identities;
use crate::{Error, Launch, Options};

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
    listener: TcpListener,
    /// The kernel gives up after so long without a confirmation.
    timeout: Duration,
    arrivals: Mutex<Arrivals>,
}

/// Who has connected here.
#[derive(Default)]
struct Arrivals {
    arriving: Vec<Arriving>,
    /// By the purpose, the rank, and the number of the connection.
    greeted: HashMap<(u64, u64, u64), TcpStream>,
}

/// Networks by the job's token and the rank.
type Networks = HashMap<(u64, usize), Weak<Network>>;

/// Those of this process: of each job and rank one, while it is used.
static NETWORKS: LazyLock<Mutex<Networks>> = LazyLock::new(Mutex::default);

impl Network {
    /// That of this rank of the job, which meets the others the first time.
    ///
    /// # Errors
    /// [`Error::Rendezvous`].
    pub(crate) fn of(launch: &Launch, options: &Options) -> Result<Arc<Network>, Error> {
        let Launch { rank, world, .. } = *launch;
        let fail = |reason: String| Error::Rendezvous { rank, world, job: launch.job.clone(), reason };
        let Some(meeting) = &launch.meeting else {
            return Err(fail("nothing says where rank 0 is: set PILLION_ADDRESS=host:port on every rank".to_owned()));
        };
        let token = digest(&meeting.secret);
        if let Some(network) = NETWORKS.lock().get(&(token, rank)).and_then(Weak::upgrade) {
            return Ok(network);
        }
        let listener = listen(0).and_then(|listener| listener.set_nonblocking(true).map(|()| listener));
        let listener = listener.map_err(|error| fail(format!("cannot listen for other ranks: {error}")))?;
        let port = listener.local_addr().map_err(|error| fail(error.to_string()))?.port();
        let host = identities::own(launch);
        if host.len() > HOST {
            let reason =
                format!("the name of this host (PILLION_HOST) has {} bytes, and at most {HOST} fit", host.len());
            return Err(fail(reason));
        }
        let (rank_number, number, port) = (rank as u64, world as u64, u64::from(port));
        let own = Greeting { token, purpose: MEETING, rank: rank_number, number, port, host };
        let mut patience = Patience::new(rank, options.startup_timeout, options.warn_after);
        let met = match rank {
            0 => serve(&own, &meeting.address, &mut patience).map(|members| (members, [127, 0, 0, 1].into())),
            _ => visit(&own, &meeting.address, &mut patience),
        };
        let (members, zero) = met.map_err(fail)?;
        let (job, timeout, arrivals) = (launch.job.clone(), options.timeout, Mutex::default());
        let network = Arc::new(Network { rank, world, job, token, members, zero, listener, timeout, arrivals });
        let mut networks = NETWORKS.lock();
        networks.retain(|_, network| network.strong_count() > 0);
        networks.insert((token, rank), Arc::downgrade(&network));
        Ok(network)
    }

    /// The host of a rank of the job.
    pub(crate) fn host(&self, rank: usize) -> &str {
        &self.members[rank].host
    }

    /// Connects to these ranks of the job, so many times to each, for the communicator of this
    /// name. The lower rank dials.
    ///
    /// # Errors
    /// [`Error::Rendezvous`] that names who does not come within `limit`.
    pub(super) fn connect(
        &self,
        name: &str,
        wanted: &[(usize, usize)],
        limit: Duration,
    ) -> Result<HashMap<usize, Vec<TcpStream>>, Error> {
        let purpose = digest(name) | 1;
        let deadline = Instant::now() + limit.min(Duration::from_secs(1 << 30));
        let mut connections: HashMap<usize, Vec<TcpStream>> = HashMap::new();
        for &(peer, count) in wanted.iter().filter(|(peer, _)| *peer > self.rank) {
            for number in 0..count as u64 {
                let socket = self.dial(peer, purpose, number, deadline)?;
                connections.entry(peer).or_default().push(socket);
            }
        }
        let lower: Vec<(usize, usize)> = wanted.iter().copied().filter(|(peer, _)| *peer < self.rank).collect();
        loop {
            let mut arrivals = self.arrivals.lock();
            arrivals.accept(&self.listener, self.token).map_err(|error| self.fail(explain(&error)))?;
            let keys =
                |(peer, count): (usize, usize)| (0..count as u64).map(move |number| (purpose, peer as u64, number));
            let is_missing = |&&peer: &&(usize, usize)| keys(peer).any(|key| !arrivals.greeted.contains_key(&key));
            let Some((missing, _)) = lower.iter().find(is_missing) else {
                for &(peer, count) in &lower {
                    let sockets =
                        keys((peer, count)).map(|key| arrivals.greeted.remove(&key).expect("none is missing"));
                    connections.insert(peer, sockets.collect());
                }
                break;
            };
            if Instant::now() >= deadline {
                return Err(self.fail(format!("rank {missing} did not connect to this one")));
            }
            drop(arrivals);
            std::thread::sleep(NAP);
        }
        for socket in connections.values().flatten() {
            self.prepare(socket).map_err(|error| self.fail(format!("preparing a connection: {error}")))?;
        }
        Ok(connections)
    }

    fn dial(&self, peer: usize, purpose: u64, number: u64, deadline: Instant) -> Result<TcpStream, Error> {
        let address = self.members[peer].address;
        let ip = if address.ip().is_unspecified() { self.zero } else { address.ip() };
        let address = SocketAddr::new(ip, address.port()).to_string();
        let (token, rank) = (self.token, self.rank as u64);
        let greeting = Greeting { token, purpose, rank, number, port: 0, host: String::new() };
        loop {
            let socket = dial(&address, deadline.saturating_duration_since(Instant::now()));
            let greeted = socket.and_then(|mut socket| {
                std::io::Write::write_all(&mut socket, &greeting.bytes())?;
                Ok(socket)
            });
            match greeted {
                Ok(socket) => return Ok(socket),
                Err(error) if Instant::now() >= deadline || is_out_of_files(&error) => {
                    let why = explain(&error);
                    return Err(self.fail(format!("rank {peer} cannot be reached at {address}: {why}")));
                }
                Err(_) => std::thread::sleep(NAP),
            }
        }
    }

    /// Small messages go at once, and what nobody confirms ends the connection.
    fn prepare(&self, socket: &TcpStream) -> std::io::Result<()> {
        socket.set_nonblocking(true)?;
        socket.set_nodelay(true)?;
        let millis = u32::try_from(self.timeout.as_millis()).unwrap_or(u32::MAX).max(1);
        Ok(rustix::net::sockopt::set_tcp_user_timeout(socket, millis)?)
    }

    fn fail(&self, reason: String) -> Error {
        Error::Rendezvous { rank: self.rank, world: self.world, job: self.job.clone(), reason }
    }
}

impl Arrivals {
    /// Takes in who has connected and greeted. Strangers, and whoever says nothing for long, are
    /// turned away.
    ///
    /// # Errors
    /// When no file more can be opened.
    fn accept(&mut self, listener: &TcpListener, token: u64) -> std::io::Result<()> {
        loop {
            match listener.accept() {
                Ok((socket, _)) if socket.set_nonblocking(true).is_ok() => self.arriving.push(Arriving::new(socket)),
                Ok(_) => {}
                Err(error) if is_out_of_files(&error) => return Err(error),
                Err(_) => break,
            }
        }
        for mut arriving in std::mem::take(&mut self.arriving) {
            match arriving.read(token) {
                Ok(None) => self.arriving.push(arriving),
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

/// Equal on all ranks, which run the same program.
pub(super) fn digest(text: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    text.hash(&mut hasher);
    hasher.finish()
}
