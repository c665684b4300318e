//! Whether every rank was given the same settings, and which one differs.

use std::fmt::Debug;

use pillion_collectives::Communicator;

use crate::Error;
use crate::settings::TrainArgs;

/// Collective.
///
/// # Errors
/// [`Error::Setting`], the same on every rank, with the first rank that was given other settings
/// than rank 0, the first setting that differs, and both values.
pub(super) fn same_settings(settings: &TrainArgs, communicator: &Communicator) -> Result<(), Error> {
    // Which host a rank is on is its own.
    let mut settings = settings.clone();
    settings.job.node_rank = None;
    let digest = xxhash_rust::xxh3::xxh3_64(format!("{settings:?}").as_bytes());
    let digests = communicator.all_gather_scalars(&[digest])?;
    let Some(rank) = digests.iter().position(|other| other != &digests[0]) else { return Ok(()) };
    let pairs = |text: &[u8]| serde_json::from_slice::<Vec<(String, String)>>(text).unwrap_or_default();
    let own = serde_json::to_vec(&values(&settings)).unwrap_or_default();
    let [zero, other] = [0, rank].map(|root| communicator.broadcast_bytes(root, &own).map(|text| pairs(&text)));
    let (zero, other) = (zero?, other?);
    let which = match zero.iter().zip(&other).find(|(zero, other)| zero != other) {
        Some(((name, zero), (_, other))) => format!("{name} is {other} on rank {rank} and {zero} on rank 0"),
        None => format!("rank {rank} was given other settings than rank 0"),
    };
    Err(Error::Setting(format!("{which}: give every rank the same settings")))
}

/// The fields of a value, those of structures in it included, with their names as flags, in order.
fn values(of: &impl Debug) -> Vec<(String, String)> {
    let mut values: Vec<(String, String)> = Vec::new();
    for line in format!("{of:#?}").lines().map(str::trim) {
        let field = line
            .split_once(": ")
            .filter(|(name, _)| name.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_'));
        match (field, values.last_mut()) {
            (Some((name, value)), _) => values.push((format!("--{}", name.replace('_', "-")), value.to_owned())),
            // What is in brackets begins on a line of its own.
            (None, Some((_, value))) => value.push_str(line),
            (None, None) => {}
        }
    }
    for (_, value) in &mut values {
        *value = value.replace(",)", ")").trim_end_matches([',', '}']).to_owned();
        if let Some(inner) = value.strip_prefix("Some(").and_then(|value| value.strip_suffix(')')) {
            *value = inner.to_owned();
        } else if value == "None" {
            *value = "not given".to_owned();
        }
    }
    values
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug)]
    #[expect(dead_code, reason = "printed")]
    struct Inner {
        first_name: Option<f32>,
        second: Option<&'static str>,
        text: &'static str,
    }

    #[derive(Debug)]
    #[expect(dead_code, reason = "printed")]
    struct Outer {
        inner: Inner,
        number: u64,
        list: Vec<u8>,
    }

    #[test]
    fn values_have_the_names_of_flags() {
        let inner = Inner { first_name: Some(0.5), second: None, text: "a: b" };
        let values = values(&Outer { inner, number: 7, list: vec![1, 2] });
        let expected = [
            ("--inner", "Inner {"),
            ("--first-name", "0.5"),
            ("--second", "not given"),
            ("--text", "\"a: b\""),
            ("--number", "7"),
            ("--list", "[1,2,]"),
        ];
        assert_eq!(values, expected.map(|(name, value)| (name.to_owned(), value.to_owned())));
    }
}
