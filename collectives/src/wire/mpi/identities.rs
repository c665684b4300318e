//! Which host each rank is on, as the ranks tell each other at the start.

use std::time::{Duration, Instant};

use crate::Error;
use crate::wire::{Receipt, Wire};

/// Bytes of an identity, padded with zeros.
const LEN: usize = 256;
const TAG: u8 = 32;

/// The identities of all ranks, in their order.
///
/// # Errors
/// The wire's, or a timeout that names a rank that has not said anything.
pub(crate) fn exchange(
    wire: &mut dyn Wire,
    rank: usize,
    world: usize,
    identity: &str,
    limit: Duration,
) -> Result<Vec<String>, Error> {
    let mut padded = identity.as_bytes().to_vec();
    if padded.len() > LEN {
        let reason = format!("it has {} bytes, and at most {LEN} are possible", padded.len());
        return Err(Error::System { what: "the name of this host (PILLION_HOST)", reason });
    }
    padded.resize(LEN, 0);
    let own: Box<[u8]> = padded.into();
    let mut all = vec![0u8; LEN * world].into_boxed_slice();
    all[rank * LEN..][..LEN].copy_from_slice(&own);
    let mut waiting: Vec<(usize, Receipt)> = Vec::new();
    let mut pass = || -> Result<(), Error> {
        for peer in (0..world).filter(|&peer| peer != rank) {
            // SAFETY: both boxes stay where they are and untouched until every request is complete, or are leaked below.
            unsafe {
                let into = all.as_mut_ptr().add(peer * LEN);
                waiting.push((peer, wire.receive(peer, TAG, into, LEN)?));
                waiting.push((peer, wire.send(peer, TAG, own.as_ptr(), LEN)?));
            }
        }
        let started = Instant::now();
        while let Some((peer, request)) = waiting.last() {
            if wire.test(request)? {
                waiting.pop();
            } else if started.elapsed() > limit {
                return Err(Error::Timeout {
                    op: "the start".to_owned(),
                    waiting_on: vec![*peer],
                    seconds: limit.as_secs(),
                    how: "it has not said on which host it is".to_owned(),
                });
            } else {
                std::thread::yield_now();
            }
        }
        Ok(())
    };
    if let Err(error) = pass() {
        std::mem::forget((own, all));
        return Err(error);
    }
    let name = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim_end_matches('\0').to_owned();
    Ok(all.chunks(LEN).map(name).collect())
}
