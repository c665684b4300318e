//! The parsers of what comes over TCP, for fuzzers.

/// What whoever connects says first.
pub mod tcp_greeting {
    use super::super::greeting::{Greeting, LEN, MEETING};
    use crate::terms::Terms;

    /// Greetings of both kinds.
    pub fn seeds() -> Vec<Vec<u8>> {
        let (terms, address) = (Terms::default(), [10, 0, 0, 1].into());
        let greeting = |purpose, port, host: &str| {
            let host = host.to_owned();
            Greeting { token: 7, purpose, rank: 1, number: 2, port, terms, address, host }
        };
        let greetings =
            [greeting(MEETING, 29_400, "node1"), greeting(99, 0, ""), greeting(MEETING, 1, &"ü".repeat(128))];
        greetings.iter().map(|greeting| greeting.bytes().to_vec()).collect()
    }

    /// A greeting says what its bytes say, and is refused at the first byte that is wrong.
    pub fn check(data: &[u8]) {
        let (whole, mut refused) = (Greeting::parse(data), None);
        for received in 0..data.len().min(LEN) {
            match Greeting::parse(&data[..received]) {
                Ok(greeting) => assert_eq!((greeting, refused), (None, None), "after {received} bytes"),
                Err(refusal) => refused = Some(refusal),
            }
        }
        match whole {
            Ok(Some(greeting)) => assert_eq!(greeting.bytes(), data[..LEN]),
            Ok(None) => assert!(data.len() < LEN && refused.is_none()),
            Err(refusal) => assert!(refused.is_none_or(|earlier| earlier == refusal)),
        }
    }
}

/// The table of all ranks, from rank 0.
pub mod tcp_table {
    use super::super::meeting::{Member, entry, members};

    /// A table of addresses of all kinds.
    pub fn seeds() -> Vec<Vec<u8>> {
        let addresses = ["[::]:29400", "10.0.0.1:29401", "[fe80::1]:9"];
        let member = |address: &&str| Member { address: address.parse().expect("an address"), host: "node1".into() };
        vec![addresses.iter().map(member).flat_map(|member| entry(&member)).collect()]
    }

    /// A table that is read is the one that was written.
    pub fn check(data: &[u8]) {
        if let Some(members) = members(data) {
            let written: Vec<u8> = members.iter().flat_map(entry).collect();
            assert!(data.starts_with(&written));
        }
    }
}

/// That a rank of another host leaves or gives up.
pub mod tcp_control {
    use super::super::control::{abort_message, said};
    use crate::Error;

    /// What ranks say.
    pub fn seeds() -> Vec<Vec<u8>> {
        vec![vec![1], abort_message("rank 1 is out of memory"), abort_message(&"ü".repeat(300))]
    }

    /// A reason that is understood once stays the same however much follows.
    pub fn check(data: &[u8]) {
        let mut understood: Option<String> = None;
        for received in 0..=data.len() {
            let error = said(&data[..received], false, 3);
            if let Some(Error::Aborted { rank, reason }) = error {
                assert_eq!(rank, 3);
                assert_eq!(*understood.get_or_insert(reason.clone()), reason, "after {received} bytes");
            } else {
                assert!(error.is_none() && understood.is_none(), "after {received} bytes");
            }
        }
        if let Ok(reason) = str::from_utf8(data) {
            let Some(Error::Aborted { reason: heard, .. }) = said(&abort_message(reason), false, 3) else {
                panic!("{reason:?} is not understood")
            };
            assert!(reason.starts_with(&heard) && heard.len() >= reason.len().min(509));
        }
    }
}
