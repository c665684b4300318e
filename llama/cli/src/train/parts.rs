//! The values of `--data`: text, or tokens with their shares.

use std::path::{Path, PathBuf};

use pillion_data::{Tokens, is_token_folder, mixture};
use serde::{Deserialize, Serialize};

use crate::Error;

/// Tokens, and their weight in the mixture.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Part {
    pub(crate) path: PathBuf,
    pub(crate) weight: u32,
}

/// What `--data` asks for.
pub(super) enum Wanted {
    /// The default text.
    Default,
    /// Text, or random tokens.
    Text(PathBuf),
    /// Files or folders of tokens.
    Tokens(Vec<Part>),
}

impl Wanted {
    /// Reads the values of `--data`.
    ///
    /// # Errors
    /// When they contradict each other, or a share cannot be.
    pub(super) fn of(data: &[String]) -> Result<Wanted, Error> {
        let fail = |message: String| Err(Error::Setting(message));
        let parts = data.iter().map(|data| part(data)).collect::<Result<Vec<_>, _>>()?;
        match &parts[..] {
            [] => Ok(Wanted::Default),
            [(path, None)] if !holds_tokens(path) => Ok(Wanted::Text(path.clone())),
            _ => {
                if let Some((path, _)) = parts.iter().find(|(path, _)| !holds_tokens(path)) {
                    let path = path.display();
                    return fail(format!(
                        "--data {path} is text, and a mixture is of tokens: make them with `pillion tokenize`"
                    ));
                }
                if parts.len() > 1
                    && let Some((path, _)) = parts.iter().find(|(_, share)| share.is_none())
                {
                    return fail(format!("--data {0} has no share: write {0}:0.5, say", path.display()));
                }
                let shares: Vec<u64> = parts.iter().map(|(_, share)| share.unwrap_or(SHARE)).collect();
                let parts = parts.into_iter().zip(weights(&shares)?);
                Ok(Wanted::Tokens(parts.map(|((path, _), weight)| Part { path: absolute(&path), weight }).collect()))
            }
        }
    }
}

/// A share of 1, in the unit of shares.
pub(super) const SHARE: u64 = 10_000;

/// A path, and its share in units of 1/[`SHARE`]. A path that has a colon itself may stand alone.
pub(super) fn part(data: &str) -> Result<(PathBuf, Option<u64>), Error> {
    let whole = || (PathBuf::from(data), None);
    if Path::new(data).exists() {
        return Ok(whole());
    }
    let Some((path, share)) = data.rsplit_once(':').filter(|(_, share)| share.parse::<f64>().is_ok()) else {
        return Ok(whole());
    };
    let number: f64 = share.parse().expect("it has just been parsed");
    let units = (number * SHARE as f64).round();
    if !(1.0..=1e9).contains(&units) || (units - number * SHARE as f64).abs() > 1e-6 {
        let message = format!("--data {data}: the share {share} must be above 0, and have at most four decimals");
        return Err(Error::Setting(message));
    }
    Ok((PathBuf::from(path), Some(units as u64)))
}

/// The weights of shares: the smallest whole numbers in their proportions.
fn weights(shares: &[u64]) -> Result<Vec<u32>, Error> {
    let divisor = shares.iter().copied().fold(0, gcd);
    let weights: Vec<u64> = shares.iter().map(|share| share / divisor).collect();
    if weights.iter().sum::<u64>() > u64::from(mixture::LONGEST) {
        let message = "the shares of --data have too many different digits: round them".to_owned();
        return Err(Error::Setting(message));
    }
    Ok(weights.into_iter().map(|weight| weight as u32).collect())
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// Whether a path is of tokens, by what it is called or has in it.
pub(super) fn holds_tokens(path: &Path) -> bool {
    let ending = path.extension().and_then(|ending| ending.to_str());
    is_token_folder(path) || (path.is_file() && ["bin", "idx", "tokens"].iter().any(|known| ending == Some(known)))
}

/// Tokens that the vocabulary of token files and folders has, where they say so.
///
/// # Errors
/// When one cannot be opened.
pub(super) fn vocabulary(data: &[String]) -> Result<Option<usize>, Error> {
    let Wanted::Tokens(parts) = Wanted::of(data)? else { return Ok(None) };
    let known = parts.iter().map(|part| Ok(Tokens::open(&part.path, None)?.vocab()));
    let known = known.collect::<Result<Vec<_>, Error>>()?;
    Ok(known.into_iter().flatten().max())
}

/// A path that means the same from everywhere.
pub(super) fn absolute(path: &Path) -> PathBuf {
    path.canonicalize().or_else(|_| std::path::absolute(path)).unwrap_or(path.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_read_exactly_and_become_the_smallest_weights() {
        let share = |data: &str| part(data).unwrap();
        assert_eq!(share("a:0.7"), (PathBuf::from("a"), Some(7000)));
        assert_eq!(share("a:2"), (PathBuf::from("a"), Some(20_000)));
        assert_eq!(share("a:b"), (PathBuf::from("a:b"), None));
        assert_eq!(weights(&[7000, 3000]).unwrap(), [7, 3]);
        assert_eq!(weights(&[10_000]).unwrap(), [1]);
        for wrong in ["a:0", "a:-1", "a:0.00001", "a:nan", "a:inf"] {
            assert!(part(wrong).unwrap_err().to_string().contains("the share"), "{wrong}");
        }
        assert!(weights(&[9_999, 10_000, 99_991_000]).is_err());
    }
}
