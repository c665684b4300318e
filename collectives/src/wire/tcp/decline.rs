//! A rank that cannot join tells rank 0 at the place where the hosts would meet, and rank 0 tells
//! every rank that comes, so that all end at once instead of at their deadline.

use std::collections::{BTreeSet, VecDeque};
use std::io::{Read, Write};
use std::net::{Ipv6Addr, TcpListener};
use std::time::{Duration, Instant};

use super::greeting::{Arriving, GIVES_UP, Greeting, Refusal};
use super::meeting::{accept_some, dial, listen, port_of, wait};
use super::network::digest;
use crate::Launch;
use crate::memory::fork::Guarded;
use crate::terms::Terms;

/// How long rank 0 waits for the others to come and be told.
const LISTEN_FOR: Duration = Duration::from_secs(10);
/// How long another rank tries to tell rank 0: less than our launcher's grace period, since this
/// rank prints its message afterwards.
const TELL_FOR: Duration = Duration::from_secs(4);
const RETRY_EVERY: Duration = Duration::from_millis(20);

/// What a rank answers that gives up, to whoever comes: the digest of the reason.
pub(super) fn answer(reason: u64) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&(Refusal::GaveUp as u64).to_le_bytes());
    bytes[8..].copy_from_slice(&reason.to_le_bytes());
    bytes
}

/// Tells the other ranks that this one cannot join, for a reason with this digest. Returns whether
/// rank 0 gives up for the same reason, so that this rank need not say it again.
pub(crate) fn decline(launch: &Launch, reason: u64) -> bool {
    let Some(meeting) = &launch.meeting else { return false };
    let (token, deadline) = (digest(&meeting.secret), Instant::now() + TELL_FOR);
    if launch.rank == 0 {
        // This rank ends because of its own error, not because of one in telling it.
        let listener = port_of(&meeting.address).ok().and_then(|port| listen(port).ok());
        let listener = listener.filter(|listener| listener.set_nonblocking(true).is_ok());
        let all = (1..launch.world as u64).collect();
        let _ = listener.inspect(|listener| tell(listener, VecDeque::new(), token, all, reason));
        return false;
    }
    while Instant::now() < deadline {
        match tell_zero(&meeting.address, launch, token, reason) {
            Ok(answered) => return answered == answer(reason),
            Err(_) => std::thread::sleep(RETRY_EVERY),
        }
    }
    false
}

fn tell_zero(address: &str, launch: &Launch, token: u64, reason: u64) -> std::io::Result<[u8; 16]> {
    let mut socket = dial(address, TELL_FOR)?;
    let (rank, terms, address) = (launch.rank as u64, Terms::default(), Ipv6Addr::UNSPECIFIED.into());
    let greeting =
        Greeting { token, purpose: GIVES_UP, rank, number: reason, terms, port: 0, address, host: String::new() };
    socket.write_all(&greeting.bytes())?;
    socket.set_read_timeout(Some(TELL_FOR))?;
    let mut answered = [0; 16];
    socket.read_exact(&mut answered)?;
    Ok(answered)
}

/// Answers whoever greets, until each of the `missing` ranks has.
pub(super) fn tell(
    listener: &Guarded<TcpListener>,
    mut waiting: VecDeque<Arriving>,
    token: u64,
    mut missing: BTreeSet<u64>,
    reason: u64,
) {
    let deadline = Instant::now() + LISTEN_FOR;
    while !missing.is_empty() && Instant::now() < deadline {
        wait(listener, &waiting, [], deadline);
        if accept_some(listener, &mut waiting).is_err() {
            return;
        }
        for _ in 0..waiting.len() {
            let Some(mut arriving) = waiting.pop_front() else { break };
            match arriving.read(token) {
                Ok(None) => waiting.push_back(arriving),
                Ok(Some(greeting)) => {
                    missing.remove(&greeting.rank);
                    let _ = arriving.socket.write(&answer(reason));
                }
                Err(_) => {}
            }
        }
    }
}
