//! What ranks set in a store when they meet there. Values that are something else, such as those of
//! another version of this program, count as absent.

use std::net::SocketAddr;

use super::super::greeting::{Greeting, LEN};
use super::super::meeting::{ENTRY, Member, entry, members};
use super::fail;
use crate::{Error, Launch};

/// First bytes of a table; the digit is the version.
const MAGIC: [u8; 8] = *b"pilltab1";
/// Most bytes of a reason.
const REASON: usize = 4096;

/// What one rank sets: its word, its greeting, and why it cannot join, if it cannot.
#[derive(Debug)]
pub(super) struct Record {
    pub(super) word: u128,
    pub(super) greeting: Greeting,
    pub(super) reason: String,
}

impl Record {
    pub(super) fn bytes(&self) -> Vec<u8> {
        [&self.word.to_le_bytes()[..], &self.greeting.bytes(), shortened(&self.reason)].concat()
    }

    pub(super) fn read(bytes: &[u8]) -> Option<Record> {
        let (word, rest) = bytes.split_first_chunk()?;
        let (greeting, reason) = rest.split_first_chunk::<LEN>()?;
        let greeting = Greeting::parse(greeting).ok()??;
        let reason = str::from_utf8(reason).ok()?.to_owned();
        Some(Record { word: u128::from_le_bytes(*word), greeting, reason })
    }

    pub(super) fn member(&self) -> Member {
        let Greeting { address, port, host, .. } = &self.greeting;
        Member { address: SocketAddr::new(*address, *port), host: host.clone() }
    }
}

/// What rank 0 sets when the ranks have come, or cannot.
#[derive(Debug, PartialEq)]
pub(super) struct Table {
    pub(super) session: u64,
    /// Of the ranks to which this is said.
    pub(super) words: Vec<u128>,
    pub(super) outcome: Outcome,
}

/// What came of a meeting.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Outcome {
    /// All ranks are there. Their connections begin with this token.
    Met { token: u64, members: Vec<Member> },
    /// This rank cannot join.
    Aborted { rank: usize, reason: String },
    /// The ranks cannot go on together, for a reason that is no single rank's.
    Failed { reason: String },
}

impl Outcome {
    /// The error of a rank of `launch`.
    pub(super) fn error(self, launch: &Launch) -> Error {
        match self {
            Outcome::Aborted { rank, reason } => Error::Aborted { rank, reason },
            Outcome::Failed { reason } => fail(launch, reason),
            Outcome::Met { .. } => fail(launch, "the ranks met, and one of them says otherwise".to_owned()),
        }
    }
}

impl Table {
    pub(super) fn bytes(&self) -> Vec<u8> {
        let (kind, number, rest) = match &self.outcome {
            Outcome::Met { token, members } => (0, *token, members.iter().flat_map(entry).collect()),
            Outcome::Aborted { rank, reason } => (1, *rank as u64, shortened(reason).to_vec()),
            Outcome::Failed { reason } => (2, 0, shortened(reason).to_vec()),
        };
        let words = [self.session, kind, number, self.words.len() as u64];
        let words = words.iter().flat_map(|word| word.to_le_bytes());
        let those = self.words.iter().flat_map(|word| word.to_le_bytes());
        MAGIC.into_iter().chain(words).chain(those).chain(rest).collect()
    }

    pub(super) fn read(bytes: &[u8]) -> Option<Table> {
        let rest = bytes.strip_prefix(&MAGIC)?;
        let (head, rest) = rest.split_first_chunk::<32>()?;
        let (head, _) = head.as_chunks();
        let [session, kind, number, count] = std::array::from_fn(|index| u64::from_le_bytes(head[index]));
        let count = usize::try_from(count).ok()?;
        let (words, rest) = rest.split_at_checked(count.checked_mul(16)?)?;
        let words: Vec<u128> = words.as_chunks().0.iter().map(|word| u128::from_le_bytes(*word)).collect();
        let reason = || str::from_utf8(rest).ok().map(str::to_owned);
        let outcome = match kind {
            0 if rest.len() == count * ENTRY => Outcome::Met { token: number, members: members(rest)? },
            1 => Outcome::Aborted { rank: usize::try_from(number).ok()?, reason: reason()? },
            2 if number == 0 => Outcome::Failed { reason: reason()? },
            _ => return None,
        };
        Some(Table { session, words, outcome })
    }
}

fn shortened(reason: &str) -> &[u8] {
    &reason.as_bytes()[..reason.floor_char_boundary(REASON)]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::terms::Terms;

    #[test]
    fn tables_and_records_are_read_as_they_were_set_and_no_part_of_them_panics() {
        let member = |port| Member { address: ([10, 0, 0, 1], port).into(), host: format!("host {port}") };
        for outcome in [
            Outcome::Met { token: 7, members: vec![member(1), member(2)] },
            Outcome::Aborted { rank: 3, reason: "é".repeat(3000) },
            Outcome::Failed { reason: String::new() },
        ] {
            let table = Table { session: 9, words: vec![u128::MAX, 5], outcome };
            let bytes = table.bytes();
            let again = Table::read(&bytes).unwrap();
            assert_eq!(again.bytes(), bytes);
            for end in 0..bytes.len() {
                Table::read(&bytes[..end]);
            }
            // A count of words that no table has.
            let mut wild = bytes;
            wild[32..40].fill(0xff);
            assert_eq!(Table::read(&wild), None);
        }
        let launch = Launch::threads(2).remove(1);
        let record = Record {
            word: 1 << 100,
            greeting: super::super::greeting(&launch, 0, Terms::default()),
            reason: "why".into(),
        };
        let bytes = record.bytes();
        let again = Record::read(&bytes).unwrap();
        assert_eq!((again.word, &again.reason, &again.greeting), (record.word, &record.reason, &record.greeting));
        for end in 0..bytes.len() - 3 {
            assert!(Record::read(&bytes[..end]).is_none());
        }
    }
}
