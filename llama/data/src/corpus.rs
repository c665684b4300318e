//! The default data: sources of the crates that this program is built from.
//!
//! Cargo has just downloaded them, so a first run needs nothing else. To be the same on every
//! machine, the text must not depend on what else cargo happens to have fetched. So:
//!
//! - The crates are those named in [`CRATES`], in the version that the Cargo.lock built into this
//!   program names (the newest, if it names several). All are normal dependencies of the program on
//!   every Linux, so building it downloads them; crates for other systems, for tests and for one
//!   processor are not listed, nor are those that are mostly tables of constants (`libc`,
//!   `linux-raw-sys`, `unicode-*`) or generated (`zerocopy-derive`, `pulp`).
//! - Of each crate come the `.rs` files under `src`, without folders named `gen` (generated code),
//!   sorted by path, and of these those that end within the first [`SHARE`] bytes, so that a few
//!   large crates do not drown the others.
//! - A crate is for validation if its family, the name up to the first `-` or `_`, hashes to
//!   [`VALIDATION_CLASS`] of [`CLASSES`]: 5.5 % of the bytes when the list was made. Relatives
//!   (`serde`, `serde_core`) share text, hence the family.
//!
//! A crate that is missing all the same is reported, since the text is then another.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use xxhash_rust::xxh3::xxh3_64;

use crate::error::{Error, Result};
use crate::sources::{self, Division, Sources};
use crate::tokens::Split;

/// The crates of the default data, sorted.
#[rustfmt::skip]
pub(crate) const CRATES: &[&str] = &[
    "allocator-api2", "anstream", "anstyle", "anstyle-parse", "anstyle-query", "bitflags",
    "bytemuck", "bytemuck_derive", "cfg-if", "clap", "clap_builder", "clap_derive", "clap_lex",
    "colorchoice", "comfy-table", "console", "crossterm", "equivalent", "errno", "fastrand",
    "foldhash", "getrandom", "half", "heck", "indicatif", "is_terminal_polyfill", "itoa", "libm",
    "litrs", "lock_api", "memchr", "num-complex", "num-traits", "once_cell", "parking_lot",
    "parking_lot_core", "paste", "portable-atomic", "proc-macro2", "quote", "reborrow", "rustix",
    "safetensors", "scopeguard", "serde", "serde_core", "serde_derive", "serde_json",
    "serde_spanned", "signal-hook", "signal-hook-registry", "smallvec", "strsim", "syn",
    "tempfile", "terminal_size", "thiserror", "thiserror-impl", "toml", "toml_datetime",
    "toml_parser", "toml_writer", "unit-prefix", "utf8parse", "winnow", "xxhash-rust", "zerocopy",
    "zmij",
];

/// Bytes of one crate that are used at most.
pub(crate) const SHARE: u64 = 1 << 20;

/// Classes into which the hash of a family's name falls.
const CLASSES: u64 = 16;

/// The class for validation, chosen because its share of the text lies between 5 and 10 % and
/// it holds ordinary code.
const VALIDATION_CLASS: u64 = 6;

const LOCK: &str = include_str!("../../../Cargo.lock");

/// The default data on this machine.
#[derive(Debug)]
pub(crate) struct Corpus {
    pub(crate) sources: Sources,
    /// Crates that should be there and are not, as `name-version`.
    pub(crate) missing: Vec<String>,
}

/// Finds the default data under `$CARGO_HOME/registry/src`, where `CARGO_HOME` is `~/.cargo` unless
/// set.
///
/// # Errors
/// [`Error::NoCrates`] if none of the crates is there.
pub(crate) fn installed() -> Result<Corpus> {
    let set = |name| env::var_os(name).filter(|value| !value.is_empty());
    let cargo_home = match (set("CARGO_HOME"), set("HOME")) {
        (Some(cargo_home), _) => PathBuf::from(cargo_home),
        (None, Some(home)) => Path::new(&home).join(".cargo"),
        (None, None) => {
            return Err(Error::NoCrates { looked_in: "$CARGO_HOME or $HOME (neither is set)".to_owned() });
        }
    };
    within(&cargo_home.join("registry/src"), &locked(LOCK))
}

/// The listed crates under `registry`, a folder of one folder for each registry.
fn within(registry: &Path, crates: &[Locked]) -> Result<Corpus> {
    let mut registries: Vec<PathBuf> = match fs::read_dir(registry) {
        Ok(entries) => entries.flatten().map(|entry| entry.path()).collect(),
        Err(_) => Vec::new(),
    };
    registries.sort();

    let mut corpus = Corpus {
        sources: Sources { files: Vec::new(), division: Division::Tail, skipped: Default::default() },
        missing: Vec::new(),
    };
    let mut splits = Vec::new();
    for locked in crates {
        let folder = locked.folder();
        let candidates = registries.iter().map(|r| r.join(&folder).join("src"));
        // Canonical, as the listed paths are.
        let Some(found) = candidates.filter_map(|path| path.canonicalize().ok()).next() else {
            corpus.missing.push(folder);
            continue;
        };
        let listed = match sources::under(&found) {
            Err(Error::NoText { .. }) => {
                corpus.missing.push(folder);
                continue;
            }
            listed => listed?,
        };
        let mut end = 0;
        for file in listed.files {
            let inside = file.path.strip_prefix(&found).unwrap_or(&file.path);
            if file.path.extension().is_none_or(|extension| extension != "rs")
                || inside.iter().any(|folder| folder == "gen")
            {
                continue;
            }
            end += file.bytes;
            if end > SHARE {
                corpus.sources.skipped.over_share += 1;
                continue;
            }
            corpus.sources.files.push(file);
            splits.push(locked.split());
        }
    }
    if corpus.sources.files.is_empty() {
        return Err(Error::NoCrates { looked_in: registry.display().to_string() });
    }
    corpus.sources.division = Division::Given(splits);
    Ok(corpus)
}

/// A package of a lock file.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
struct Locked {
    name: String,
    version: String,
}

impl Locked {
    /// Cargo's name for the folder with its sources.
    fn folder(&self) -> String {
        format!("{}-{}", self.name, self.version)
    }

    fn split(&self) -> Split {
        let family = self.name.split(['-', '_']).next().unwrap_or(&self.name);
        if xxh3_64(family.as_bytes()) % CLASSES == VALIDATION_CLASS { Split::Validation } else { Split::Train }
    }

    /// Sorts newer versions later. What follows a `+` does not order versions.
    fn order(&self) -> Vec<u64> {
        let release = self.version.split('+').next().unwrap_or_default();
        release.split(['.', '-']).filter_map(|part| part.parse().ok()).collect()
    }
}

/// The packages of [`CRATES`] in a lock file, in the order of the list, each in its newest version.
fn locked(lock: &str) -> Vec<Locked> {
    #[derive(Deserialize)]
    struct Lock {
        package: Vec<Locked>,
    }
    let lock: Lock = toml::from_str(lock).expect("cargo writes valid lock files");
    CRATES
        .iter()
        .map(|name| {
            let versions = lock.package.iter().filter(|package| package.name == *name);
            let newest = versions.max_by_key(|package| package.order());
            newest.expect("a test holds the list to the lock file").clone()
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn locked_as(name: &str, version: &str) -> Locked {
        Locked { name: name.to_owned(), version: version.to_owned() }
    }

    /// Writes `bytes` bytes of text as a source file of a crate.
    fn write(registry: &Path, name: &str, bytes: usize) {
        let path = registry.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, vec![b'x'; bytes]).unwrap();
    }

    #[test]
    fn sources_are_taken_by_the_stated_rule_and_missing_crates_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let registry = folder.path().join("gen"); // Only folders inside a crate count as generated.
        let share = SHARE as usize;
        write(&registry, "one/serde-1.0.0/src/lib.rs", 10);
        write(&registry, "one/serde-1.0.0/src/gen/table.rs", 10);
        write(&registry, "one/serde-1.0.0/src/notes.md", 10);
        write(&registry, "one/serde-1.0.0/build.rs", 10);
        write(&registry, "two/syn-2.0.0/src/a.rs", share - 1);
        write(&registry, "two/syn-2.0.0/src/b.rs", 2);
        write(&registry, "two/syn-2.0.0/src/c.rs", 1);
        write(&registry, "two/toml-1.2.3+spec/src/lib.rs", 5);
        write(&registry, "two/hollow-1.0.0/src/deep/.hidden", 5);
        write(&registry, "two/unlisted-1.0.0/src/lib.rs", 5);
        let listed = [
            locked_as("hollow", "1.0.0"),
            locked_as("serde", "1.0.0"),
            locked_as("serde_json", "1.0.0"),
            locked_as("syn", "2.0.0"),
            locked_as("toml", "1.2.3+spec"),
        ];
        let corpus = within(&registry, &listed).unwrap();
        let registry = registry.canonicalize().unwrap();
        let found: Vec<_> = corpus
            .sources
            .files
            .iter()
            .map(|file| file.path.strip_prefix(&registry).unwrap().to_str().unwrap())
            .collect();
        let expected = ["one/serde-1.0.0/src/lib.rs", "two/syn-2.0.0/src/a.rs", "two/toml-1.2.3+spec/src/lib.rs"];
        assert_eq!(found, expected);
        assert_eq!(corpus.missing, ["hollow-1.0.0", "serde_json-1.0.0"]);
        assert_eq!(corpus.sources.skipped.over_share, 2);
        let Division::Given(splits) = corpus.sources.division else {
            panic!("the default data is divided by crate");
        };
        assert_eq!(splits, [Split::Train, Split::Train, Split::Validation]);
    }

    #[test]
    fn without_any_crate_the_error_names_the_folder_and_the_way_out() {
        let folder = tempfile::tempdir().unwrap();
        let registry = folder.path().join("none");
        let error = within(&registry, &locked(LOCK)).unwrap_err().to_string();
        assert!(error.contains(registry.to_str().unwrap()), "{error}");
        assert!(error.contains("--data PATH"), "{error}");
    }

    #[test]
    fn the_list_is_sorted_and_every_crate_is_in_the_lock_file() {
        assert!(CRATES.is_sorted_by(|a, b| a < b));
        assert_eq!(locked(LOCK).len(), CRATES.len());
    }

    #[test]
    fn both_splits_have_crates_and_families_stay_together() {
        let crates = locked(LOCK);
        for split in [Split::Train, Split::Validation] {
            assert!(crates.iter().any(|locked| locked.split() == split));
        }
        let split = |name| locked_as(name, "1.0.0").split();
        assert_eq!(split("toml"), split("toml_parser"));
        assert_eq!(split("signal-hook"), split("signal-hook-registry"));
    }

    #[test]
    fn versions_are_ordered_by_number() {
        let order = |version| locked_as("x", version).order();
        assert!(order("0.10.0") > order("0.9.12"));
        assert!(order("1.2.10+spec-1.1.0") > order("1.2.9+spec-9"));
    }

    #[test]
    fn every_listed_crate_is_a_normal_dependency_of_the_program() {
        // Else building the program does not download it, and the default data differs between
        // those who have also run the tests and those who have not.
        let tree = std::process::Command::new(env!("CARGO"))
            .args(["tree", "--offline", "--locked", "--edges", "normal"])
            .args(["--package", "pillion-cli", "--prefix", "none"])
            .args(["--format", "{p}"])
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .output()
            .unwrap();
        let errors = String::from_utf8_lossy(&tree.stderr);
        assert!(tree.status.success(), "{errors}");
        let tree = String::from_utf8(tree.stdout).unwrap();
        for locked in locked(LOCK) {
            let package = format!("{} v{}", locked.name, locked.version);
            let listed = |line: &str| line.strip_prefix(&package).is_some_and(ends_or_space);
            assert!(tree.lines().any(listed), "{package} is not in:\n{tree}");
        }
    }

    fn ends_or_space(rest: &str) -> bool {
        rest.is_empty() || rest.starts_with(' ')
    }
}
