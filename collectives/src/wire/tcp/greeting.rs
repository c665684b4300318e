//! What a rank says first on a connection, and the reading of it, from whoever connects: of fixed
//! size, so that a stranger costs little.

use std::fmt;
use std::io::{ErrorKind, Read};
use std::net::{IpAddr, TcpStream};
use std::time::{Duration, Instant};

use crate::memory::fork::Guarded;
use crate::terms::Terms;

/// First bytes of a greeting; the digit is the version of the protocol.
const MAGIC: [u8; 8] = *b"pilltcp2";
/// Bytes of a host's name, padded with zeros.
pub(crate) const HOST: usize = 256;
/// Magic, five words, terms, an address, and a host's name.
pub(crate) const LEN: usize = 8 + 8 * 5 + Terms::BYTES + ADDRESS + HOST;
/// Where the terms begin.
const TERMS: usize = 8 + 8 * 5;
/// Bytes of an address, as one of IPv6.
pub(crate) const ADDRESS: usize = 16;
/// A connection that has not greeted by then is closed. Its rank, if it is one, comes again.
const LIMIT: Duration = Duration::from_secs(5);

/// Who connects, and for what.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Greeting {
    /// A digest of the job's secret.
    pub(crate) token: u64,
    /// [`MEETING`], or a digest of the communicator's name.
    pub(crate) purpose: u64,
    /// In the job.
    pub(crate) rank: u64,
    /// Number of ranks of the job; for a communicator, the connection's number.
    pub(crate) number: u64,
    /// Where the rank listens; 0 for a communicator.
    pub(crate) port: u16,
    /// What rank 0 must have been given as well; nothing for a communicator.
    pub(crate) terms: Terms,
    /// The address that the rank offers; unspecified for that from which it connects.
    pub(crate) address: IpAddr,
    /// What the rank calls its host.
    pub(crate) host: String,
}

/// The purpose of a connection to rank 0 at the start.
pub(crate) const MEETING: u64 = 0;
/// That of a rank that cannot join, whose greeting has the digest of the reason for a number. Those
/// of communicators are odd.
pub(crate) const GIVES_UP: u64 = 2;
/// That of a connection to a store.
pub(crate) const STORE: u64 = 4;

impl Greeting {
    pub(crate) fn bytes(&self) -> [u8; LEN] {
        let mut bytes = [0; LEN];
        bytes[..8].copy_from_slice(&MAGIC);
        let words = [self.token, self.purpose, self.rank, self.number, self.port.into()];
        for (place, word) in bytes[8..].chunks_exact_mut(8).zip(words) {
            place.copy_from_slice(&word.to_le_bytes());
        }
        bytes[TERMS..][..Terms::BYTES].copy_from_slice(&self.terms.bytes());
        bytes[LEN - HOST - ADDRESS..][..ADDRESS].copy_from_slice(&octets(self.address));
        let host = self.host.as_bytes();
        bytes[LEN - HOST..][..host.len()].copy_from_slice(host);
        bytes
    }

    /// Reads the part of a greeting that has come. Returns the greeting once it is whole.
    ///
    /// # Errors
    /// As soon as the bytes cannot become a greeting.
    pub(crate) fn parse(received: &[u8]) -> Result<Option<Greeting>, Refusal> {
        let common = received.len().min(MAGIC.len() - 1);
        if received[..common] != MAGIC[..common] {
            return Err(Refusal::Garbage);
        }
        if received.get(common).is_some_and(|version| *version != MAGIC[common]) {
            return Err(Refusal::Version);
        }
        let Some(bytes) = received.first_chunk::<LEN>() else { return Ok(None) };
        let word = |index: usize| u64::from_le_bytes(bytes[8 * (1 + index)..][..8].try_into().expect("8 bytes"));
        let port = u16::try_from(word(4)).map_err(|_| Refusal::Garbage)?;
        let host = name(&bytes[LEN - HOST..]).ok_or(Refusal::Garbage)?;
        let terms = Terms::read(bytes[TERMS..].first_chunk().expect("as many"));
        let address = address(*bytes[LEN - HOST - ADDRESS..].first_chunk().expect("as many"));
        let (token, purpose, rank, number) = (word(0), word(1), word(2), word(3));
        Ok(Some(Greeting { token, purpose, rank, number, port, terms, address, host }))
    }
}

/// An address as bytes.
pub(super) fn octets(address: IpAddr) -> [u8; ADDRESS] {
    match address {
        IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
        IpAddr::V6(ip) => ip.octets(),
    }
}

/// The address that [`octets`] has made these of.
pub(super) fn address(octets: [u8; ADDRESS]) -> IpAddr {
    IpAddr::from(octets).to_canonical()
}

/// A host's name without its padding. None for bytes that are no text, because every rank must know
/// a host by the same name.
pub(super) fn name(padded: &[u8]) -> Option<String> {
    str::from_utf8(padded).ok().map(|name| name.trim_end_matches('\0').to_owned())
}

/// Why a connection was turned away; the numbers are sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Refusal {
    Silent = 1,
    Unfinished,
    HungUp,
    Garbage,
    Version,
    Token,
    /// Rank 0's terms follow.
    Terms,
    NoSuchRank,
    Taken,
    /// Rank 0 gives up; the digest of the reason follows.
    GaveUp,
    /// As [`Refusal::Token`], at a store.
    Secret,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Refusal::Silent => "that said nothing",
            Refusal::Unfinished => "that stopped in the middle of its greeting",
            Refusal::HungUp => "that hung up early",
            Refusal::Garbage => "that did not greet as a rank does",
            Refusal::Version => "by another version of this program",
            Refusal::Token => "of another job, or with another PILLION_SECRET or another spelling of the address",
            Refusal::Terms => "with other settings, of which it was told",
            Refusal::NoSuchRank => "with a rank that cannot be",
            Refusal::Taken => "with the number of one that had come already (--node-rank)",
            Refusal::GaveUp => "that came too late",
            Refusal::Secret => "with another secret",
        })
    }
}

impl Refusal {
    /// The one of this number.
    pub(crate) fn of(number: u64) -> Option<Refusal> {
        use Refusal::*;
        [Silent, Unfinished, HungUp, Garbage, Version, Token, Terms, NoSuchRank, Taken, GaveUp, Secret]
            .into_iter()
            .find(|&refusal| refusal as u64 == number)
    }
}

/// A connection that has not greeted yet.
pub(crate) struct Arriving {
    pub(crate) socket: Guarded<TcpStream>,
    pub(crate) until: Instant,
    bytes: [u8; LEN],
    received: usize,
}

impl Arriving {
    /// For a socket that does not block.
    pub(crate) fn new(socket: Guarded<TcpStream>) -> Arriving {
        Arriving { socket, until: Instant::now() + LIMIT, bytes: [0; LEN], received: 0 }
    }

    /// Reads what has come: the greeting, once it is whole and of this job.
    pub(crate) fn read(&mut self, token: u64) -> Result<Option<Greeting>, Refusal> {
        loop {
            if let Some(greeting) = Greeting::parse(&self.bytes[..self.received])? {
                return if greeting.token == token { Ok(Some(greeting)) } else { Err(Refusal::Token) };
            }
            match self.socket.read(&mut self.bytes[self.received..]) {
                Ok(0) => return Err(Refusal::HungUp),
                Ok(count) => self.received += count,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    return match (Instant::now() < self.until, self.received) {
                        (true, _) => Ok(None),
                        (false, 0) => Err(Refusal::Silent),
                        (false, _) => Err(Refusal::Unfinished),
                    };
                }
                Err(_) => return Err(Refusal::HungUp),
            }
        }
    }
}
