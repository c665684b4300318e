//! What a rank knows of its job once it has met the others: where each listens, and on which host.

use std::collections::{HashMap, VecDeque};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::greeting::{Arriving, Greeting, HOST, MEETING};
use super::meeting::{Member, accept_some, dial, is_out_of_files, listen, serve, visit};
use crate::limits::explain;
use crate::memory::fork::Kept;
use crate::patience::Patience;
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
    _kept: Kept,
    listener: TcpListener,
    /// When to say for whom this rank waits.
    warn_after: Duration,
    arrivals: Mutex<Arrivals>,
}

/// Who has connected here.
#[derive(Default)]
struct Arrivals {
    arriving: VecDeque<Arriving>,
    /// By the purpose, the rank, and the number of the connection.
    greeted: HashMap<(u64, u64, u64), TcpStream>,
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
        allow_files();
        let listener = listen(0).and_then(|listener| listener.set_nonblocking(true).map(|()| listener));
        let listener = listener.map_err(|error| fail(format!("cannot listen for other ranks: {error}")))?;
        let port = listener.local_addr().map_err(|error| fail(error.to_string()))?.port();
        let host = hosts::identity(launch);
        if host.len() > HOST {
            let reason =
                format!("the name of this host (PILLION_HOST) has {} bytes, and at most {HOST} fit", host.len());
            return Err(fail(reason));
        }
        let own = Greeting { token, purpose: MEETING, rank: rank as u64, number: world as u64, port, host };
        let mut patience = Patience::new(rank, options.startup_timeout, options.warn_after);
        let met = match rank {
            0 => serve(&own, &meeting.address, &mut patience).map(|members| (members, [127, 0, 0, 1].into())),
            _ => visit(&own, &meeting.address, &mut patience),
        };
        let (members, zero) = met.map_err(fail)?;
        let (job, arrivals) = (launch.job.clone(), Mutex::default());
        let warn_after = options.warn_after;
        Ok(Arc::new(Network {
            rank,
            world,
            job,
            token,
            members,
            zero,
            _kept: Kept::new(&listener),
            listener,
            warn_after,
            arrivals,
        }))
    }

    /// What the job is called on every host, where launchers may have given it different names.
    pub(crate) fn name(&self) -> String {
        format!("{}-tcp-{:016x}", rustix::process::getuid().as_raw(), self.token)
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
    ) -> Result<HashMap<usize, Vec<TcpStream>>, Error> {
        let mut connections: HashMap<usize, Vec<TcpStream>> = HashMap::new();
        for &(peer, count) in wanted.iter().filter(|(peer, _)| *peer > self.rank) {
            for number in 0..count as u64 {
                let socket = self.dial(peer, purpose, number, patience)?;
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
            if Instant::now() >= patience.deadline {
                return Err(self.fail(format!("rank {missing} did not connect to this one")));
            }
            patience.warn(|| format!("rank {missing} to connect"));
            drop(arrivals);
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

    fn dial(&self, peer: usize, purpose: u64, number: u64, patience: &mut Patience) -> Result<TcpStream, Error> {
        let address = self.members[peer].address;
        let ip = if address.ip().is_unspecified() { self.zero } else { address.ip() };
        let address = SocketAddr::new(ip, address.port()).to_string();
        let (token, rank) = (self.token, self.rank as u64);
        let greeting = Greeting { token, purpose, rank, number, port: 0, host: String::new() };
        loop {
            let socket = dial(&address, patience.left());
            let greeted = socket.and_then(|mut socket| {
                std::io::Write::write_all(&mut socket, &greeting.bytes())?;
                Ok(socket)
            });
            match greeted {
                Ok(socket) => return Ok(socket),
                Err(error) => {
                    // It listened before it was met, so whoever refuses is not there any more.
                    let is_gone = error.kind() == ErrorKind::ConnectionRefused;
                    let reason = format!("rank {peer} cannot be reached at {address}: {}", explain(&error));
                    if Instant::now() >= patience.deadline || is_gone || is_out_of_files(&error) {
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

/// Lets this process open as many files as it may: a rank has some for each rank of other hosts.
fn allow_files() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    // Where that is refused, the first file too many says so.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum });
}

/// Equal on all ranks, which run the same program.
pub(super) fn digest(text: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    text.hash(&mut hasher);
    hasher.finish()
}
