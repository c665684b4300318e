//! The parsers of what other ranks set in a store, for fuzzers.

use super::record::{Outcome, Record, Table};
use crate::Launch;

/// A rank's record.
pub mod store_record {
    use super::{Launch, Record};
    use crate::terms::Terms;
    use crate::wire::tcp::greeting::{GIVES_UP, MEETING};

    /// A record of a rank that joins, and one of a rank that cannot.
    pub fn seeds() -> Vec<Vec<u8>> {
        let launch = Launch::threads(2).remove(1);
        let record = |purpose, reason: &str| {
            let greeting = super::super::greeting(&launch, purpose, Terms::default());
            Record { word: 1 << 100, greeting, reason: reason.into() }.bytes()
        };
        vec![record(MEETING, ""), record(GIVES_UP, "rank 1 has no memory")]
    }

    /// A record that is read is the one that was written.
    pub fn check(data: &[u8]) {
        if let Some(record) = Record::read(data) {
            let written = record.bytes();
            assert!(data.starts_with(&written), "{record:?}");
        }
    }
}

/// The table of all ranks, or why there is none.
pub mod store_table {
    use super::{Outcome, Table};
    use crate::wire::tcp::meeting::Member;

    /// A table of each outcome.
    pub fn seeds() -> Vec<Vec<u8>> {
        let member = |port| Member { address: ([10, 0, 0, 1], port).into(), host: format!("host {port}") };
        let outcomes = [
            Outcome::Met { token: 7, members: vec![member(1), member(2)] },
            Outcome::Aborted { rank: 3, reason: "é".repeat(20) },
            Outcome::Failed { reason: String::new() },
        ];
        let bytes = |outcome| Table { session: 9, words: vec![u128::MAX, 5], outcome }.bytes();
        outcomes.into_iter().map(bytes).collect()
    }

    /// A table that is read is the one that was written, and has an address for each word.
    pub fn check(data: &[u8]) {
        if let Some(table) = Table::read(data) {
            if let Outcome::Met { members, .. } = &table.outcome {
                assert_eq!(members.len(), table.words.len());
            }
            let written = table.bytes();
            assert!(data.starts_with(&written), "{table:?}");
        }
    }
}
