//! How ranks meet through a store. Rank 0 opens a session under a random number. Each other rank
//! sets a record for this session. Rank 0 sets the table of all ranks once it has all records.
//!
//! A store may hold values of earlier jobs, and of earlier communicators of this job. So each rank
//! has a random word of its own in its record, and takes a table for its own only if this word is
//! in it. Every key is used again by the next session, so that a store does not grow.

use std::collections::BTreeMap;
use std::net::{IpAddr, TcpListener};
use std::sync::Arc;
use std::time::Duration;

use self::attempt::Attempt;
use self::record::{Outcome, Record};
use super::greeting::{GIVES_UP, Greeting, MEETING};
use super::interface;
use super::meeting::Member;
use super::network::{Network, host_name, listen_for_ranks};
use crate::error::ranks;
use crate::memory::fork::Guarded;
use crate::patience::Patience;
use crate::store::random;
use crate::terms::Terms;
use crate::{Error, Launch, Options};

pub(crate) mod attempt;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
mod others;
mod record;
mod zero;

/// How long rank 0 waits, when it gives up, for ranks that have yet to come and be told.
const TELL_ALL_WITHIN: Duration = Duration::from_secs(10);
/// How long rank 0 waits, at its deadline, until the ranks that have come have read who has not.
/// The other ranks wait as long for rank 0's words after their own deadline.
const TELL_WITHIN: Duration = Duration::from_secs(2);
/// How long the ranks have at least, from rank 0's table on, to read it. A folder of another host
/// may show it late.
const READ_WITHIN: Duration = Duration::from_secs(10);
/// How long a rank takes at most beyond its deadline, when it gives up or when rank 0 waits for
/// readers.
pub(crate) const GIVE_UP_WITHIN: Duration = Duration::from_secs(15);
/// How long another rank that cannot join waits until rank 0 has heard of it.
const TELL_ZERO_WITHIN: Duration = Duration::from_secs(4);

const TABLE: &str = "pillion/table";

/// Where a rank sets its record.
fn key(rank: usize) -> String {
    format!("pillion/rank/{rank}")
}

/// Where a rank sets the session whose table it has read. Its next attempt overwrites its record,
/// and leaves this.
fn read_key(rank: usize) -> String {
    format!("pillion/read/{rank}")
}

/// One rank's side of the meeting.
struct Side<'a> {
    attempt: &'a Arc<Attempt>,
    launch: &'a Launch,
    /// Its `token` is the session, once there is one.
    own: Greeting,
    word: u128,
}

impl Network {
    /// Meets the other ranks through a store. Collective.
    ///
    /// # Errors
    /// [`Error::Rendezvous`] that names the ranks that did not come, or the settings that differ;
    /// [`Error::Aborted`] for a rank that cannot join; those of the store.
    pub(crate) fn meet_through(
        attempt: &Arc<Attempt>,
        launch: &Launch,
        options: &Options,
    ) -> Result<Arc<Network>, Error> {
        let (listener, offered, own) = prepare(launch, options).map_err(|reason| {
            // No other rank would know it.
            decline(attempt, launch, &reason);
            fail(launch, reason)
        })?;
        let mut side = Side { attempt, launch, own, word: word()? };
        let limit = options.startup_timeout.saturating_add(if launch.rank == 0 { Duration::ZERO } else { TELL_WITHIN });
        let patience = Patience::new(launch.rank, limit, options.warn_after);
        let mut patience = patience.stopped_by(options.stop.clone());
        let (token, words, members) = match launch.rank {
            0 => side.serve(&mut patience)?,
            _ => side.visit(&offered, &mut patience)?,
        };
        let network = Network::new(launch, options, token, members, listener).with(words);
        match launch.rank {
            // The store may go when rank 0 goes on.
            0 => {
                // The last rank may have come just before rank 0's deadline.
                patience.last_at_least(READ_WITHIN);
                side.wait_for_readers(&network, &mut patience)?;
            }
            _ => side.set_read()?,
        }
        attempt.set_met();
        Ok(Arc::new(network))
    }
}

/// Opens this rank's listener. Returns it, the addresses of the interface that was chosen, if one
/// was, and what this rank says of itself.
fn prepare(launch: &Launch, options: &Options) -> Result<(Guarded<TcpListener>, Vec<IpAddr>, Greeting), String> {
    let (listener, port) = listen_for_ranks()?;
    let offered = launch.interface.as_deref().map_or(Ok(Vec::new()), interface::find)?;
    let address = match offered.first() {
        Some(&first) => interface::choose(&offered, first)?,
        None => interface::source(None),
    };
    let own = greeting(launch, MEETING, Terms::of(launch, options));
    Ok((listener, offered, Greeting { port, address, host: host_name(launch)?, ..own }))
}

/// Tells the other ranks that this one cannot join. Returns whether rank 0 gives up for the same
/// reason, so that this rank need not say it again. Takes some seconds at most, whatever the store
/// does.
pub(crate) fn decline(attempt: &Arc<Attempt>, launch: &Launch, reason: &str) -> bool {
    let limit = if launch.rank == 0 { TELL_ALL_WITHIN } else { TELL_ZERO_WITHIN };
    let (launch, reason) = (launch.clone(), reason.to_owned());
    let is_said = attempt.within(limit, move |attempt| tell_reason(attempt, &launch, &reason));
    if is_said.is_none() {
        attempt.give_up();
    }
    is_said.unwrap_or(false)
}

fn tell_reason(attempt: &Arc<Attempt>, launch: &Launch, reason: &str) -> bool {
    let Ok(word) = word() else { return false };
    let mut side = Side { attempt, launch, own: greeting(launch, GIVES_UP, Terms::default()), word };
    // This rank ends because of its own error, not because of one in telling it.
    let told = match launch.rank {
        0 => side
            .open()
            .and_then(|()| side.tell(&side.others(), BTreeMap::new(), &aborted(0, reason), TELL_ALL_WITHIN))
            .map(|()| None),
        _ => side.tell_zero(reason),
    };
    matches!(told, Ok(Some(Outcome::Aborted { rank: 0, reason: said })) if said == reason)
}

type Met = (u64, Vec<u128>, Vec<Member>);

impl Side<'_> {
    /// Sets this rank's record.
    fn set(&self, purpose: u64, reason: &str) -> Result<(), Error> {
        let greeting = Greeting { purpose, ..self.own.clone() };
        let record = Record { word: self.word, greeting, reason: reason.to_owned() };
        self.attempt.set(&key(self.launch.rank), &record.bytes())
    }

    /// A rank's record, of whatever session.
    fn record(&self, rank: usize) -> Result<Option<Record>, Error> {
        let record = self.attempt.store.get(&key(rank))?.and_then(|bytes| Record::read(&bytes));
        Ok(record.filter(|record| record.greeting.rank == rank as u64))
    }

    /// The same, if it is of this rank's session.
    fn record_here(&self, rank: usize) -> Result<Option<Record>, Error> {
        Ok(self.record(rank)?.filter(|record| record.greeting.token == self.own.token))
    }

    fn absent(&self, missing: &[usize]) -> String {
        let remark = self.attempt.store.remark().map_or_else(String::new, |remark| format!("; {remark}"));
        format!("{} did not come: was it started, with the same store?{remark}", ranks(missing))
    }
}

fn aborted(rank: usize, reason: &str) -> Outcome {
    Outcome::Aborted { rank, reason: reason.to_owned() }
}

fn greeting(launch: &Launch, purpose: u64, terms: Terms) -> Greeting {
    let (rank, number) = (launch.rank as u64, launch.world as u64);
    let address = IpAddr::from([127, 0, 0, 1]);
    Greeting { token: 0, purpose, rank, number, terms, port: 0, address, host: String::new() }
}

fn word() -> Result<u128, Error> {
    let [low, high] = random()?;
    Ok(u128::from(high) << 64 | u128::from(low))
}

fn fail(launch: &Launch, reason: String) -> Error {
    let Launch { rank, world, ref job, .. } = *launch;
    Error::Rendezvous { rank, world, job: job.clone(), reason }
}
