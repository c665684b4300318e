//! A store over TCP: rank 0 keeps the values and serves them at an address.

mod client;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
mod message;
mod server;
#[cfg(test)]
mod tests;

use std::time::Duration;

use self::client::Client;
use self::server::Server;
use super::{Store, check_key, failed};
use crate::Error;

/// A [`Store`] in the memory of one rank, which serves it at `host:port`. The others visit it
/// there.
///
/// A connection must begin with a digest of the job's secret. Rank 0 turns away strangers, garbage,
/// and connections that say nothing, as it does where ranks meet at an address, and counts them
/// ([`Store::remark`]). Nothing is encrypted, so use networks that you trust.
///
/// The store takes keys of at most 1 KiB, values of at most 16 MiB, and 256 MiB in all. It is gone
/// when rank 0 drops it. A thread of rank 0 serves, which ends then.
///
/// A visitor whose connection ends connects again, within the limit that it was given. So it may
/// reach the store of the job before, and later that of its own at the same address. An `add` whose
/// connection ends in its midst is an error, because nobody knows whether it was counted.
#[derive(Debug)]
pub struct TcpStore(Side);

#[derive(Debug)]
enum Side {
    Server(Server),
    Client(Client),
}

impl TcpStore {
    /// Rank 0's side: listens at the port of `address` on every address of this host. Where the
    /// port is taken, because the job before is just ending, this call tries again until `limit`.
    ///
    /// # Errors
    /// [`Error::Store`] where the address has no port, or the port stays taken.
    pub fn serve(address: &str, secret: &str, limit: Duration) -> Result<TcpStore, Error> {
        Server::open(address, secret, limit).map(|server| TcpStore(Side::Server(server)))
    }

    /// The side of the other ranks. Rank 0 need not be there yet, because the first call connects.
    /// Each call waits for rank 0 until `limit`.
    ///
    /// # Errors
    /// [`Error::Store`] where the address has no port.
    pub fn visit(address: &str, secret: &str, limit: Duration) -> Result<TcpStore, Error> {
        Client::new(address, secret, limit).map(|client| TcpStore(Side::Client(client)))
    }
}

impl Store for TcpStore {
    fn set(&self, key: &str, value: &[u8]) -> Result<(), Error> {
        check_key(key)?;
        message::check_value(value)?;
        match &self.0 {
            Side::Server(server) => server.set(key, value),
            Side::Client(client) => client.set(key, value),
        }
    }

    fn get(&self, key: &str) -> Result<Option<Vec<u8>>, Error> {
        check_key(key)?;
        match &self.0 {
            Side::Server(server) => server.get(key),
            Side::Client(client) => client.get(key),
        }
    }

    fn add(&self, key: &str, amount: i64) -> Result<i64, Error> {
        check_key(key)?;
        match &self.0 {
            Side::Server(server) => server.add(key, amount),
            Side::Client(client) => client.add(key, amount),
        }
    }

    fn remark(&self) -> Option<String> {
        match &self.0 {
            Side::Server(server) => server.refusals(),
            Side::Client(_) => None,
        }
    }
}
