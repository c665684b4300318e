//! Rank 0's side of a meeting through a store.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use super::super::greeting::{GIVES_UP, MEETING};
use super::super::lookout::{Lookout, lost};
use super::super::meeting::Member;
use super::super::network::Network;
use super::record::{Outcome, Record, Table};
use super::{Met, Side, TABLE, TELL_ALL_WITHIN, TELL_WITHIN, aborted, fail, read_key};
use crate::Error;
use crate::error::ranks;
use crate::patience::Patience;
use crate::store::{Nap, random};

impl Side<'_> {
    /// Opens a session, as rank 0.
    pub(super) fn open(&mut self) -> Result<(), Error> {
        [self.own.token] = random()?;
        self.set(MEETING, "")
    }

    /// Every rank but rank 0.
    pub(super) fn others(&self) -> Vec<usize> {
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
    pub(super) fn serve(&mut self, patience: &mut Patience) -> Result<Met, Error> {
        self.open()?;
        let world = self.launch.world;
        let (mut come, mut nap) = (BTreeMap::new(), Nap::default());
        loop {
            // Before the look, so that the ranks that had come by then are told.
            let is_last = patience.is_over();
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
            if is_last {
                let outcome = match patience.is_stopped() {
                    // No other rank is to blame.
                    true => aborted(0, "it was told to end"),
                    false => Outcome::Failed { reason: self.absent(&missing) },
                };
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
        self.set_table(words.clone(), Outcome::Met { token, members: members.clone() })?;
        Ok((token, words, members))
    }

    /// Sets the table of this session for the ranks with these words. Where rank 0 was told to end,
    /// it still says so, unless its next attempt has opened another session.
    fn set_table(&self, words: Vec<u128>, outcome: Outcome) -> Result<(), Error> {
        // A rank that declines has no such words: it was given up because the store is silent.
        let is_end = self.own.purpose == MEETING && matches!(outcome, Outcome::Aborted { rank: 0, .. });
        let table = Table { session: self.own.token, words, outcome }.bytes();
        match self.attempt.set(TABLE, &table) {
            Err(Error::Interrupted) if is_end && self.record_here(0)?.is_some() => {
                self.attempt.store.set(TABLE, &table)
            }
            set => set,
        }
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
    ///
    /// A rank that has read it is told for good. Where this rank comes again in the same session,
    /// it waits for the next one.
    pub(super) fn tell(
        &self,
        whom: &[usize],
        mut come: BTreeMap<usize, Record>,
        outcome: &Outcome,
        limit: Duration,
    ) -> Result<(), Error> {
        let (started, mut nap, mut said, mut told) = (Instant::now(), Nap::default(), None, BTreeSet::new());
        loop {
            let words: Vec<u128> = come.values().map(|record| record.word).collect();
            if said.as_ref() != Some(&words) {
                self.set_table(words.clone(), outcome.clone())?;
                said = Some(words);
            }
            if told.len() == whom.len() || started.elapsed() >= limit {
                return Ok(());
            }
            nap.take(limit);
            for &rank in whom {
                if told.contains(&rank) {
                    continue;
                }
                // In this order: a rank says that it has read the table before it comes again.
                let record = self.record_here(rank)?;
                if self.has_read(rank)? {
                    told.insert(rank);
                } else if let Some(record) = record {
                    come.insert(rank, record);
                }
            }
        }
    }

    /// Whether a rank has read a table of this session.
    fn has_read(&self, rank: usize) -> Result<bool, Error> {
        Ok(self.attempt.store.get(&read_key(rank))?.is_some_and(|session| session == self.own.token.to_le_bytes()))
    }

    /// Waits, as rank 0, until every other rank has read the table.
    pub(super) fn wait_for_readers(&self, network: &Network, patience: &mut Patience) -> Result<(), Error> {
        let mut missing = self.others();
        let (mut lookout, mut nap, mut gone) = (Lookout::new(network), Nap::default(), Vec::new());
        loop {
            let mut still = Vec::new();
            for rank in missing {
                if !self.has_read(rank)? {
                    still.push(rank);
                }
            }
            missing = still;
            if missing.is_empty() {
                return Ok(());
            }
            // A rank may have read the table before it ended. What ended it is told elsewhere.
            gone.retain(|rank| missing.contains(rank));
            if !gone.is_empty() {
                return Err(lost(network, &gone));
            }
            if patience.is_stopped() {
                return Err(Error::Interrupted);
            }
            if patience.is_over() {
                let reason = format!("{} came, and then did not read where the others are", ranks(&missing));
                return Err(fail(self.launch, reason));
            }
            patience.warn(|| format!("{} to read the table", ranks(&missing)));
            gone = lookout.gone(&missing);
            nap.take(patience.left());
        }
    }
}
