//! How ranks meet through a store. Rank 0 opens a session under a random number. Each other rank
//! sets a record for this session. Rank 0 sets the table of all ranks once it has all records.
//!
//! A store may hold values of earlier jobs, and of earlier communicators of this job. So each rank
//! has a random word of its own in its record, and takes a table for its own only if this word is
//! in it. Every key is used again by the next session, so that a store does not grow.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use self::record::{Outcome, Record, Table};
use super::greeting::{GIVES_UP, Greeting, HAS_READ, MEETING};
use super::interface;
use super::lookout::{Lookout, lost};
use super::meeting::Member;
use super::network::{Network, host_name, listen_for_ranks};
use crate::error::ranks;
use crate::patience::Patience;
use crate::store::{Nap, random};
use crate::terms::Terms;
use crate::{Error, Launch, Options, Store};

#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
mod record;

/// How long rank 0 waits, when it gives up, for ranks that have yet to come and be told.
const TELL_ALL_WITHIN: Duration = Duration::from_secs(10);
/// How long rank 0 waits, at its deadline, until the ranks that have come have read who has not.
/// The other ranks wait as long for rank 0's words after their own deadline.
const TELL_WITHIN: Duration = Duration::from_secs(2);
/// How long a rank takes at most when it gives up, beyond its deadline.
pub(crate) const GIVE_UP_WITHIN: Duration = Duration::from_secs(15);
/// How long another rank that cannot join waits until rank 0 has heard of it.
const TELL_ZERO_WITHIN: Duration = Duration::from_secs(4);
/// How long an answer of rank 0's listener may take.
const ANSWER: Duration = Duration::from_millis(200);

const TABLE: &str = "pillion/table";

fn key(rank: usize) -> String {
    format!("pillion/rank/{rank}")
}

/// One rank's side of the meeting.
struct Side<'a> {
    store: &'a dyn Store,
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
    pub(crate) fn meet_through(store: &dyn Store, launch: &Launch, options: &Options) -> Result<Arc<Network>, Error> {
        let fail = |reason: String| fail(launch, reason);
        let (listener, port) = listen_for_ranks().map_err(fail)?;
        let offered = launch.interface.as_deref().map_or(Ok(Vec::new()), interface::find).map_err(fail)?;
        let address = match offered.first() {
            Some(&first) => interface::choose(&offered, first).map_err(fail)?,
            None => interface::source(None),
        };
        let own = Greeting {
            port,
            address,
            host: host_name(launch).map_err(fail)?,
            ..greeting(launch, MEETING, Terms::of(launch, options))
        };
        let mut side = Side { store, launch, own, word: word()? };
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
            0 => side.wait_for_readers(&network, &mut patience)?,
            _ => side.set(HAS_READ, "")?,
        }
        Ok(Arc::new(network))
    }
}

/// Tells the other ranks that this one cannot join. Returns whether rank 0 gives up for the same
/// reason, so that this rank need not say it again.
pub(crate) fn decline(store: &dyn Store, launch: &Launch, reason: &str) -> bool {
    let Ok(word) = word() else { return false };
    let mut side = Side { store, launch, own: greeting(launch, GIVES_UP, Terms::default()), word };
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
    /// Opens a session, as rank 0.
    fn open(&mut self) -> Result<(), Error> {
        [self.own.token] = random()?;
        self.set(MEETING, "")
    }

    /// Sets this rank's record.
    fn set(&self, purpose: u64, reason: &str) -> Result<(), Error> {
        let greeting = Greeting { purpose, ..self.own.clone() };
        let record = Record { word: self.word, greeting, reason: reason.to_owned() };
        self.store.set(&key(self.launch.rank), &record.bytes())
    }

    /// A rank's record, of whatever session.
    fn record(&self, rank: usize) -> Result<Option<Record>, Error> {
        let record = self.store.get(&key(rank))?.and_then(|bytes| Record::read(&bytes));
        Ok(record.filter(|record| record.greeting.rank == rank as u64))
    }

    /// The same, if it is of this rank's session.
    fn record_here(&self, rank: usize) -> Result<Option<Record>, Error> {
        Ok(self.record(rank)?.filter(|record| record.greeting.token == self.own.token))
    }

    /// Every rank but rank 0.
    fn others(&self) -> Vec<usize> {
        (1..self.launch.world).collect()
    }

    /// Adds the records of those of `all` that have come.
    fn gather(&self, all: &[usize], come: &mut BTreeMap<usize, Record>) -> Result<(), Error> {
        for &rank in all {
            if let Some(record) = self.record_here(rank)? {
                come.insert(rank, record);
            }
        }
        Ok(())
    }

    /// Rank 0's side until the table is set.
    fn serve(&mut self, patience: &mut Patience) -> Result<Met, Error> {
        self.open()?;
        let world = self.launch.world;
        let (mut come, mut nap) = (BTreeMap::new(), Nap::default());
        loop {
            let missing: Vec<usize> = (1..world).filter(|rank| !come.contains_key(rank)).collect();
            self.gather(&missing, &mut come)?;
            let is_whole = come.len() == world - 1;
            if is_whole {
                // A rank that was started again meanwhile has another word.
                self.gather(&self.others(), &mut come)?;
            }
            if let Some(outcome) = self.obstacle(&come) {
                // What every rank reports need not be reported twice.
                self.tell(&self.others(), come, &outcome, TELL_ALL_WITHIN)?;
                return Err(outcome.error(self.launch));
            }
            if is_whole {
                break;
            }
            let missing: Vec<usize> = missing.into_iter().filter(|rank| !come.contains_key(rank)).collect();
            if patience.is_over() {
                let outcome = Outcome::Failed { reason: self.absent(&missing) };
                self.tell(&come.keys().copied().collect::<Vec<_>>(), come, &outcome, TELL_WITHIN)?;
                return Err(outcome.error(self.launch));
            }
            patience.warn(|| format!("{} at the store", ranks(&missing)));
            nap.take(patience.left());
        }
        let [token] = random()?;
        let zero = Record { word: self.word, greeting: self.own.clone(), reason: String::new() };
        let all = || std::iter::once(&zero).chain(come.values());
        let words: Vec<u128> = all().map(|record| record.word).collect();
        let members: Vec<Member> = all().map(Record::member).collect();
        let outcome = Outcome::Met { token, members: members.clone() };
        let table = Table { session: self.own.token, words: words.clone(), outcome };
        self.store.set(TABLE, &table.bytes())?;
        Ok((token, words, members))
    }

    /// Why the ranks that have come cannot go on together.
    fn obstacle(&self, come: &BTreeMap<usize, Record>) -> Option<Outcome> {
        let quitter = come.iter().find(|(_, record)| record.greeting.purpose == GIVES_UP);
        if let Some((&rank, record)) = quitter {
            return Some(aborted(rank, &record.reason));
        }
        come.iter().find_map(|(rank, record)| {
            let differences = record.greeting.terms.differences(&format!("rank {rank}"), &self.own.terms)?;
            Some(Outcome::Failed { reason: differences })
        })
    }

    /// Tells `whom` of the other ranks, who have come or come within `limit`, why this attempt
    /// ends. Returns when they have read it, because the store may go then.
    fn tell(
        &self,
        whom: &[usize],
        mut come: BTreeMap<usize, Record>,
        outcome: &Outcome,
        limit: Duration,
    ) -> Result<(), Error> {
        let (started, mut nap, mut told) = (Instant::now(), Nap::default(), None);
        loop {
            let words: Vec<u128> = come.values().map(|record| record.word).collect();
            if told.as_ref() != Some(&words) {
                let table = Table { session: self.own.token, words: words.clone(), outcome: outcome.clone() };
                self.store.set(TABLE, &table.bytes())?;
                told = Some(words);
            }
            let have_read = come.values().all(|record| record.greeting.purpose == HAS_READ);
            if (have_read && come.len() == whom.len()) || started.elapsed() >= limit {
                return Ok(());
            }
            nap.take(limit);
            self.gather(whom, &mut come)?;
        }
    }

    /// Waits, as rank 0, until every other rank has read the table.
    fn wait_for_readers(&self, network: &Network, patience: &mut Patience) -> Result<(), Error> {
        let mut missing = self.others();
        let (mut lookout, mut nap) = (Lookout::new(network), Nap::default());
        loop {
            let mut still = Vec::new();
            for rank in missing {
                if self.record_here(rank)?.is_none_or(|record| record.greeting.purpose != HAS_READ) {
                    still.push(rank);
                }
            }
            missing = still;
            if missing.is_empty() {
                return Ok(());
            }
            let gone = lookout.gone(&missing);
            if !gone.is_empty() {
                return Err(lost(network, &gone));
            }
            if patience.is_over() {
                let reason = format!("{} came, and then did not read where the others are", ranks(&missing));
                return Err(fail(self.launch, reason));
            }
            patience.warn(|| format!("{} to read the table", ranks(&missing)));
            nap.take(patience.left());
        }
    }

    /// The side of the other ranks.
    fn visit(&mut self, offered: &[IpAddr], patience: &mut Patience) -> Result<Met, Error> {
        // The session for which this rank's record is set, and whether its table was there before.
        let (mut joined, mut was_over, mut nap) = (None, false, Nap::default());
        loop {
            // In this order: where rank 0 has opened another session, the table of the one before
            // is there.
            let zero = self.record(0)?;
            let table = self.store.get(TABLE)?.and_then(|bytes| Table::read(&bytes));
            let session = table.as_ref().map(|table| table.session);
            match table {
                Some(table) if table.words.contains(&self.word) => return self.met(table),
                Some(Table { outcome: Outcome::Met { members, .. }, .. }) if session == joined && !was_over => {
                    return Err(fail(self.launch, self.met_without(members.len())));
                }
                _ => {}
            }
            if let Some(Record { greeting: zero, .. }) = &zero
                && joined != Some(zero.token)
            {
                (joined, was_over) = (Some(zero.token), session == Some(zero.token));
                let address = match offered {
                    [] => interface::source(Some(zero.address)),
                    _ => interface::choose(offered, zero.address).map_err(|reason| fail(self.launch, reason))?,
                };
                self.own = Greeting { token: zero.token, address, ..self.own.clone() };
                self.set(MEETING, "")?;
                nap = Nap::default();
            }
            if patience.is_over() {
                return self.give_up(zero.as_ref(), was_over);
            }
            patience.warn(|| "the other ranks at the store".to_owned());
            nap.take(patience.left());
        }
    }

    /// What a table says that is meant for this rank.
    fn met(&self, Table { words, outcome, .. }: Table) -> Result<Met, Error> {
        match outcome {
            Outcome::Met { token, members } => Ok((token, words, members)),
            outcome => {
                // Rank 0 waits for this. Where the store is gone already, it does not.
                let _ = self.set(HAS_READ, "");
                Err(outcome.error(self.launch))
            }
        }
    }

    /// Why this rank is not among those `theirs` ranks that met.
    fn met_without(&self, theirs: usize) -> String {
        let (rank, world) = (self.launch.rank, self.launch.world);
        if theirs == world {
            return format!("rank {rank} has come already: start each rank once, and give each job a store of its own");
        }
        format!("the number of ranks is {world} on this rank and {theirs} on rank 0: give every rank the same settings")
    }

    /// At the deadline of a rank other than 0: says who has not come. `zero` is rank 0's record,
    /// whose meeting was over when this rank came if `was_over`.
    fn give_up(&self, zero: Option<&Record>, was_over: bool) -> Result<Met, Error> {
        let is_gone = zero.is_none_or(|zero| has_ended(&zero.greeting));
        // Rank 0 sets a table before it goes.
        let table = self.store.get(TABLE)?.and_then(|bytes| Table::read(&bytes));
        let reason = match table {
            Some(table) if table.words.contains(&self.word) => return self.met(table),
            Some(Table { outcome: Outcome::Met { members, .. }, .. }) if was_over && !is_gone => {
                self.met_without(members.len())
            }
            _ if was_over || is_gone => self.absent(&[0]),
            _ => {
                let mut missing = Vec::new();
                for rank in (1..self.launch.world).filter(|&rank| rank != self.launch.rank) {
                    if self.record_here(rank)?.is_none() {
                        missing.push(rank);
                    }
                }
                self.absent(if missing.is_empty() { &[0] } else { &missing })
            }
        };
        Err(fail(self.launch, reason))
    }

    fn absent(&self, missing: &[usize]) -> String {
        let remark = self.store.remark().map_or_else(String::new, |remark| format!("; {remark}"));
        format!("{} did not come: was it started, with the same store?{remark}", ranks(missing))
    }

    /// Tells rank 0 that this rank cannot join; what rank 0 answers, if it does in time.
    fn tell_zero(&mut self, reason: &str) -> Result<Option<Outcome>, Error> {
        let (started, mut joined, mut nap) = (Instant::now(), None, Nap::default());
        while started.elapsed() < TELL_ZERO_WITHIN {
            let table = self.store.get(TABLE)?.and_then(|bytes| Table::read(&bytes));
            if let Some(table) = table.filter(|table| table.words.contains(&self.word)) {
                self.set(HAS_READ, "")?;
                return Ok(Some(table.outcome));
            }
            if let Some(zero) = self.record(0)?
                && joined != Some(zero.greeting.token)
            {
                joined = Some(zero.greeting.token);
                self.own.token = zero.greeting.token;
                self.set(GIVES_UP, reason)?;
            }
            nap.take(TELL_ZERO_WITHIN);
        }
        Ok(None)
    }
}

/// Whether nobody listens any more where a rank said that it does.
fn has_ended(greeting: &Greeting) -> bool {
    let address = SocketAddr::new(greeting.address, greeting.port);
    let refused = TcpStream::connect_timeout(&address, ANSWER).err();
    refused.is_some_and(|error| error.kind() == ErrorKind::ConnectionRefused)
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
