//! How the ranks of a job meet at rank 0: each greets with the port at which it listens and the
//! name of its host, and gets the table of all ranks once they have come. Whoever is no rank of
//! this job is turned away and counted; the count stands in the error at the deadline.

use std::collections::{BTreeMap, VecDeque};
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, sockopt};

use super::greeting::{self, ADDRESS, Arriving, GIVES_UP, Greeting, HOST, MEETING, Refusal, name, octets};
use super::{decline, interface};
use crate::error::ranks;
use crate::limits::explain;
use crate::memory::fork::Guarded;
use crate::patience::Patience;
use crate::terms::Terms;

const RETRY_EVERY: Duration = Duration::from_millis(20);
/// Connections that may be waiting for their greeting to arrive; one more pushes out the oldest.
const MOST_WAITING: usize = 256;
/// Connections that the kernel keeps until they are accepted, if the system allows as many.
const BACKLOG: i32 = 4096;
/// First word of an answer, before the table; others are a [`Refusal`].
pub(crate) const WELCOME: u64 = 0;
/// Bytes of a rank in the table: its address, its port, and the name of its host.
pub(super) const ENTRY: usize = ADDRESS + 8 + HOST;

/// Where a rank listens, and on which host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Member {
    /// Unspecified for a rank that is on rank 0's host, as far as rank 0 sees.
    pub(super) address: SocketAddr,
    pub(super) host: String,
}

/// Why ranks did not meet.
pub(super) enum Failure {
    /// As this rank sees it.
    Reason(String),
    /// This rank gave up, and has said why.
    GaveUp(usize),
}

impl From<String> for Failure {
    fn from(reason: String) -> Failure {
        Failure::Reason(reason)
    }
}

/// The port of `host:port`.
pub(crate) fn port_of(address: &str) -> Result<u16, String> {
    let Some((host, port)) = address.rsplit_once(':').filter(|(host, _)| !host.is_empty()) else {
        return Err(format!("the address {address:?} has no host or no port: give host:port"));
    };
    match port.parse() {
        Ok(port) if port > 0 => Ok(port),
        _ => Err(format!("the port {port:?} of {address:?} is no number from 1 to 65535: {host} needs one of these")),
    }
}

/// A listener on every address of this host, at this port or, for 0, any.
pub(crate) fn listen(port: u16) -> std::io::Result<Guarded<TcpListener>> {
    // A system without IPv6 refuses the first.
    Ok(bind((Ipv6Addr::UNSPECIFIED, port).into()).or_else(|_| bind((Ipv4Addr::UNSPECIFIED, port).into()))?)
}

/// A listener that ranks can reach over IPv4, too, where the address is one of IPv6.
fn bind(address: SocketAddr) -> rustix::io::Result<Guarded<TcpListener>> {
    let family = if address.is_ipv6() { AddressFamily::INET6 } else { AddressFamily::INET };
    let socket = rustix::net::socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    if address.is_ipv6() {
        // The default is a setting of the system (net.ipv6.bindv6only).
        sockopt::set_ipv6_v6only(&socket, false)?;
    }
    // The next job may have the port of one that has just ended.
    sockopt::set_socket_reuseaddr(&socket, true)?;
    rustix::net::bind(&socket, &address)?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(Guarded::new(socket.into()))
}

/// Rank 0's side: waits for all others, and gives each the table.
///
/// # Errors
/// Says who did not come, and who was turned away.
pub(super) fn serve(own: &Greeting, address: &str, patience: &mut Patience) -> Result<Vec<Member>, Failure> {
    let (world, token, terms) = (own.number, own.token, own.terms);
    let port = port_of(address)?;
    let listener = loop {
        match listen(port) {
            Ok(listener) => break listener,
            Err(error) if patience.is_over() => {
                return Err(format!(
                    "rank 0 cannot listen at port {port}: {error}; meet at another one (--address, PILLION_ADDRESS, or \
                     torchrun's master port + 1)"
                )
                .into());
            }
            // Perhaps the job before is just ending.
            Err(error) => {
                patience.warn(|| format!("port {port}, which it cannot have: {error}"));
                std::thread::sleep(RETRY_EVERY);
            }
        }
    };
    listener.set_nonblocking(true).map_err(|error| format!("listening at port {port}: {error}"))?;
    let mut come: BTreeMap<u64, (Member, Guarded<TcpStream>)> = BTreeMap::new();
    let mut waiting: VecDeque<Arriving> = VecDeque::new();
    let mut refused: BTreeMap<Refusal, usize> = BTreeMap::new();
    loop {
        // A rank that has greeted says nothing more until it ends; then it may come again.
        come.retain(
            |_, (_, socket)| matches!(socket.peek(&mut [0]), Err(error) if error.kind() == ErrorKind::WouldBlock),
        );
        if come.len() as u64 == world - 1 {
            break;
        }
        let is_missing = |rank: &usize| !come.contains_key(&(*rank as u64));
        let missing = || ranks(&(1..world as usize).filter(is_missing).collect::<Vec<usize>>());
        if patience.is_over() {
            return Err(format!("{} did not come to port {port} of this host{}", missing(), count(&refused)).into());
        }
        patience.warn(|| format!("{} at port {port}{}", missing(), count(&refused)));
        wait(&listener, &waiting, come.values().map(|(_, socket)| socket), patience.next());
        accept_some(&listener, &mut waiting).map_err(|error| explain(&error))?;
        for _ in 0..waiting.len() {
            let Some(mut arriving) = waiting.pop_front() else { break };
            let greeting = arriving.read(token);
            if let Ok(Some(Greeting { purpose: GIVES_UP, rank, number: reason, .. })) = greeting
                && (1..world).contains(&rank)
            {
                // It learns that it was heard, all others what it has said.
                let _ = arriving.socket.write(&[0; 16]);
                for (_, socket) in come.values_mut() {
                    let _ = socket.write(&decline::answer(reason));
                }
                let untold = (1..world).filter(|other| *other != rank && !come.contains_key(other)).collect();
                decline::tell(&listener, waiting, token, untold, reason);
                return Err(Failure::GaveUp(rank as usize));
            }
            let admitted = greeting.and_then(|greeting| match greeting {
                None => Ok(None),
                Some(greeting) if greeting.purpose == MEETING && greeting.terms != terms => {
                    patience.complain(greeting.rank, &greeting.terms, &terms);
                    Err(Refusal::Terms)
                }
                Some(greeting) => admit(greeting, world, &come, &arriving.socket).map(Some),
            });
            match admitted {
                Ok(None) => waiting.push_back(arriving),
                Ok(Some((rank, member))) => {
                    come.insert(rank, (member, arriving.socket));
                }
                Err(refusal) => {
                    // Whoever does not want to hear it is turned away all the same.
                    let reason = [&(refusal as u64).to_le_bytes()[..], &terms.bytes()].concat();
                    let _ = arriving.socket.write(&reason[..if refusal == Refusal::Terms { reason.len() } else { 8 }]);
                    *refused.entry(refusal).or_default() += 1;
                }
            }
        }
    }
    let here = SocketAddr::new(own.address, own.port);
    let members: Vec<Member> = std::iter::once(Member { address: here, host: own.host.clone() })
        .chain(come.values().map(|(member, _)| member.clone()))
        .collect();
    let table: Vec<u8> = WELCOME.to_le_bytes().into_iter().chain(members.iter().flat_map(entry)).collect();
    for (rank, (_, socket)) in &mut come {
        let blocking = socket.set_nonblocking(false).and_then(|()| socket.set_write_timeout(Some(patience.left())));
        blocking.and_then(|()| socket.write_all(&table)).map_err(|error| format!("rank {rank} is gone: {error}"))?;
    }
    Ok(members)
}

/// Takes in some of those who connect, and returns how many. The newest push out the oldest that
/// have not greeted.
///
/// # Errors
/// When no file more can be opened.
pub(crate) fn accept_some(listener: &TcpListener, waiting: &mut VecDeque<Arriving>) -> std::io::Result<usize> {
    let mut accepted = 0;
    for _ in 0..MOST_WAITING {
        match listener.accept() {
            Ok((socket, _)) if socket.set_nonblocking(true).is_ok() => {
                waiting.push_back(Arriving::new(Guarded::new(socket)));
                accepted += 1;
            }
            Ok(_) => accepted += 1,
            // Without the older ones there is room for this one.
            Err(error) if is_out_of_files(&error) => match waiting.pop_front() {
                Some(_) => {}
                None => return Err(error),
            },
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(_) => break,
        }
        if waiting.len() > MOST_WAITING {
            waiting.pop_front();
        }
    }
    Ok(accepted)
}

/// Who greeted.
fn admit(
    greeting: Greeting,
    world: u64,
    come: &BTreeMap<u64, (Member, Guarded<TcpStream>)>,
    socket: &TcpStream,
) -> Result<(u64, Member), Refusal> {
    let Greeting { purpose, rank, port, address, host, .. } = greeting;
    if purpose != MEETING || !(1..world).contains(&rank) {
        return Err(Refusal::NoSuchRank);
    }
    if come.contains_key(&rank) {
        return Err(Refusal::Taken);
    }
    let ip = socket.peer_addr().map_err(|_| Refusal::HungUp)?.ip().to_canonical();
    let ip = match (address.is_unspecified(), ip.is_loopback()) {
        (false, _) => address,
        (true, true) => Ipv6Addr::UNSPECIFIED.into(),
        (true, false) => ip,
    };
    Ok((rank, Member { address: SocketAddr::new(ip, port), host }))
}

/// The side of the other ranks, for one that offers one of these addresses, where there are any.
/// Returns the table, and the address by which rank 0 was reached.
///
/// # Errors
/// Says why rank 0 could not be reached, or turned this rank away.
pub(super) fn visit(
    own: &Greeting,
    offered: &[IpAddr],
    address: &str,
    patience: &mut Patience,
) -> Result<(Vec<Member>, IpAddr), Failure> {
    // An answer tells more than a connection that is refused later, when rank 0 has given up.
    let mut answer = None;
    loop {
        let obstacle = match attempt(own, offered, address, patience) {
            Ok(table) => return Ok(table),
            Err(Obstacle::Stays(reason)) => return Err(reason.into()),
            Err(Obstacle::GaveUp) => return Err(Failure::GaveUp(0)),
            Err(Obstacle::Answered(reason)) => answer.insert(reason).clone(),
            Err(Obstacle::MayGo(reason)) => reason,
        };
        if patience.is_over() {
            return Err(answer.unwrap_or(obstacle).into());
        }
        patience.warn(|| format!("rank 0: {obstacle}"));
        std::thread::sleep(RETRY_EVERY);
    }
}

/// Why an attempt to meet rank 0 failed.
enum Obstacle {
    /// The next may go better: rank 0 may not listen yet, or the job before, at the same address,
    /// is just ending.
    MayGo(String),
    /// The same, where rank 0 has said why.
    Answered(String),
    Stays(String),
    /// Rank 0 gives up.
    GaveUp,
}

fn attempt(
    own: &Greeting,
    offered: &[IpAddr],
    address: &str,
    patience: &Patience,
) -> Result<(Vec<Member>, IpAddr), Obstacle> {
    let mut socket = dial(address, patience.left()).map_err(|error| {
        let reason = format!("rank 0 cannot be reached at {address}: {}", explain(&error));
        if is_out_of_files(&error) { Obstacle::Stays(reason) } else { Obstacle::MayGo(reason) }
    })?;
    let failed = |what: &str, error: std::io::Error| match error.kind() {
        ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset | ErrorKind::BrokenPipe => Obstacle::MayGo(format!(
            "rank 0 at {address} hung up {what}: it has given up and says why, or another program listens there"
        )),
        ErrorKind::WouldBlock | ErrorKind::TimedOut => Obstacle::Stays(format!(
            "rank 0 at {address} waited for other ranks, or did not answer, until this one gave up"
        )),
        _ => Obstacle::MayGo(format!("rank 0 at {address}: {error}")),
    };
    let zero = socket.peer_addr().map_err(|error| failed("at once", error))?.ip().to_canonical();
    let own = match offered {
        [] => own.clone(),
        _ => Greeting { address: interface::choose(offered, zero).map_err(Obstacle::Stays)?, ..own.clone() },
    };
    socket.write_all(&own.bytes()).map_err(|error| failed("at the greeting", error))?;
    // Rank 0 answers once all ranks have come.
    while !patience.is_over() && !sleep(&mut [PollFd::new(&socket, PollFlags::IN)], patience.next()) {}
    socket.set_read_timeout(Some(patience.left())).map_err(|error| failed("at once", error))?;
    let mut first = [0; 8];
    socket.read_exact(&mut first).map_err(|error| failed("without an answer", error))?;
    match u64::from_le_bytes(first) {
        WELCOME => {}
        other => {
            let refusal = Refusal::of(other);
            if refusal == Some(Refusal::GaveUp) {
                return Err(Obstacle::GaveUp);
            }
            if refusal == Some(Refusal::Terms) {
                let mut theirs = [0; Terms::BYTES];
                socket.read_exact(&mut theirs).map_err(|error| failed("in the middle of an answer", error))?;
                let differences = own.terms.differences("this rank", &Terms::read(&theirs));
                return Err(Obstacle::Stays(differences.unwrap_or_else(|| {
                    format!("rank 0 at {address} refused this rank, but has the same settings: is it another program?")
                })));
            }
            let why = refusal.map_or("without a reason".to_owned(), |refusal| refusal.to_string());
            let reason = format!("rank 0 at {address} refused this rank: it was taken for one {why}");
            // The job before, or this rank's own earlier self, may just be ending.
            let may_go = matches!(refusal, None | Some(Refusal::Token | Refusal::Taken));
            return Err(if may_go { Obstacle::Answered(reason) } else { Obstacle::Stays(reason) });
        }
    }
    let mut table = vec![0; ENTRY * own.number as usize];
    socket.read_exact(&mut table).map_err(|error| failed("in the middle of the table", error))?;
    let members = members(&table).ok_or_else(|| {
        Obstacle::MayGo(format!(
            "rank 0 at {address} sent a table that no rank 0 sends: perhaps another program listens there; meet at another \
             address (--address, PILLION_ADDRESS, or torchrun's master port + 1)"
        ))
    })?;
    Ok((members, zero))
}

/// Connects to the first address of a name that answers.
pub(crate) fn dial(address: &str, limit: Duration) -> std::io::Result<Guarded<TcpStream>> {
    let mut last = std::io::Error::other("the name has no address");
    for address in address.to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, limit.clamp(Duration::from_millis(1), Duration::from_secs(5))) {
            Ok(socket) => return Ok(Guarded::new(socket)),
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// Whether this process, or the system, can open no file more.
pub(crate) fn is_out_of_files(error: &std::io::Error) -> bool {
    [Errno::MFILE, Errno::NFILE].map(Errno::raw_os_error).map(Some).contains(&error.raw_os_error())
}

pub(super) fn entry(member: &Member) -> Vec<u8> {
    let mut host = member.host.as_bytes().to_vec();
    host.resize(HOST, 0);
    [&octets(member.address.ip())[..], &u64::from(member.address.port()).to_le_bytes(), &host].concat()
}

/// Reads the table. None if it holds what [`entry`] does not write.
pub(super) fn members(table: &[u8]) -> Option<Vec<Member>> {
    let member = |entry: &[u8]| {
        let (ip, rest) = entry.split_first_chunk().expect("as many bytes");
        let (port, host) = rest.split_first_chunk().expect("as many bytes");
        let port = u64::from_le_bytes(*port).try_into().ok()?;
        Some(Member { address: SocketAddr::new(greeting::address(*ip), port), host: name(host)? })
    };
    table.chunks_exact(ENTRY).map(member).collect()
}

/// Whom this rank turned away, to be added to a message.
pub(crate) fn count(refused: &BTreeMap<Refusal, usize>) -> String {
    let each: Vec<String> = refused.iter().map(|(refusal, count)| format!("{count} {refusal}")).collect();
    if each.is_empty() { String::new() } else { format!("; connections were refused: {}", each.join(", ")) }
}

/// Sleeps until somebody connects or says something, or the time has come.
pub(super) fn wait<'a>(
    listener: &'a TcpListener,
    waiting: &'a VecDeque<Arriving>,
    come: impl IntoIterator<Item = &'a Guarded<TcpStream>>,
    until: Instant,
) {
    let until = waiting.iter().map(|arriving| arriving.until).fold(until, Instant::min);
    let sockets = waiting.iter().map(|arriving| &arriving.socket).chain(come);
    let sockets = sockets.map(|socket| PollFd::new(socket, PollFlags::IN));
    let mut events: Vec<PollFd<'_>> = std::iter::once(PollFd::new(listener, PollFlags::IN)).chain(sockets).collect();
    // Whatever comes of it, everything is looked at.
    sleep(&mut events, until);
}

/// Sleeps until one of these has happened, which it returns, or the time has come.
fn sleep(events: &mut [PollFd<'_>], until: Instant) -> bool {
    let left = Timespec::try_from(until.saturating_duration_since(Instant::now())).ok();
    rustix::event::poll(events, left.as_ref()).is_ok_and(|count| count > 0)
}
