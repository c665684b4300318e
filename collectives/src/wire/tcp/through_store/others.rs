//! The side of the ranks other than rank 0 of a meeting through a store.

use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use super::super::greeting::{GIVES_UP, Greeting, MEETING};
use super::super::interface;
use super::record::{Outcome, Record, Table};
use super::{Met, Side, TABLE, TELL_WITHIN, TELL_ZERO_WITHIN, fail, read_key};
use crate::Error;
use crate::patience::Patience;
use crate::store::Nap;

/// How long an answer of rank 0's listener may take.
const ANSWER: Duration = Duration::from_millis(200);

impl Side<'_> {
    /// Returns once rank 0 has set the table of all ranks.
    pub(super) fn visit(&mut self, offered: &[IpAddr], patience: &mut Patience) -> Result<Met, Error> {
        // The session for which this rank's record is set, and whether its table was there before.
        let (mut joined, mut was_over, mut nap) = (None, false, Nap::default());
        loop {
            // In this order: where rank 0 has opened another session, the table of the one before
            // is there.
            let zero = self.record(0)?;
            let table = self.attempt.store.get(TABLE)?.and_then(|bytes| Table::read(&bytes));
            let session = table.as_ref().map(|table| table.session);
            let have_met = matches!(&table, Some(Table { outcome: Outcome::Met { .. }, .. }));
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
                    [] => Ok(interface::source(Some(zero.address))),
                    _ => interface::choose(offered, zero.address),
                };
                let address = match address {
                    Ok(address) => address,
                    Err(reason) => {
                        // This rank ends because of its own error, not because of one in telling
                        // it.
                        let _ = self.tell_zero(&reason);
                        return Err(fail(self.launch, reason));
                    }
                };
                self.own = Greeting { token: zero.token, address, ..self.own.clone() };
                if !(was_over && have_met) {
                    // Rank 0 may still tell why this session fails. Where its ranks have met, this
                    // rank waits for the next session.
                    self.set(MEETING, "")?;
                }
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
                // Rank 0 waits for this. Where the store is gone already, it does not. This rank
                // knows what to report, whatever the store says.
                self.try_to_set_read();
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
        let table = self.attempt.store.get(TABLE)?.and_then(|bytes| Table::read(&bytes));
        let reason = match table {
            Some(table) if table.words.contains(&self.word) => return self.met(table),
            Some(Table { outcome: Outcome::Met { members, .. }, .. }) if was_over && !is_gone => {
                match members.len() == self.launch.world {
                    true => format!(
                        "rank {} has come already, and rank 0 has not come again: was this rank started twice, with \
                         one store, or is rank 0 late?",
                        self.launch.rank
                    ),
                    false => self.met_without(members.len()),
                }
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

    /// Tells rank 0 that this rank cannot join; what rank 0 answers, if it does in time.
    pub(super) fn tell_zero(&mut self, reason: &str) -> Result<Option<Outcome>, Error> {
        let (started, mut joined, mut nap) = (Instant::now(), None, Nap::default());
        while started.elapsed() < TELL_ZERO_WITHIN {
            let table = self.attempt.store.get(TABLE)?.and_then(|bytes| Table::read(&bytes));
            if let Some(table) = table.filter(|table| table.words.contains(&self.word)) {
                self.try_to_set_read();
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

    /// Tells rank 0 that this rank has read the table.
    pub(super) fn set_read(&self) -> Result<(), Error> {
        self.attempt.set(&read_key(self.launch.rank), &self.own.token.to_le_bytes())
    }

    /// The same, if the store takes it soon.
    fn try_to_set_read(&self) {
        let (key, session) = (read_key(self.launch.rank), self.own.token.to_le_bytes());
        self.attempt.within(TELL_WITHIN, move |attempt| attempt.set(&key, &session));
    }
}

/// Whether nobody listens any more where a rank said that it does.
fn has_ended(greeting: &Greeting) -> bool {
    let address = SocketAddr::new(greeting.address, greeting.port);
    let refused = TcpStream::connect_timeout(&address, ANSWER).err();
    refused.is_some_and(|error| error.kind() == ErrorKind::ConnectionRefused)
}
