//! Finding text under a path the user gives.

use std::fmt;
use std::fs::{self, Metadata};
use std::io;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::runs;
use crate::tokens::Split;

/// A file to tokenize, as it was when it was listed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SourceFile {
    pub(crate) path: PathBuf,
    pub(crate) bytes: u64,
}

impl SourceFile {
    pub(crate) fn new(path: PathBuf, metadata: &Metadata) -> Self {
        Self { path, bytes: metadata.len() }
    }
}

/// The files that make up a text.
#[derive(Debug)]
pub(crate) struct Sources {
    /// In the order in which they are tokenized.
    pub(crate) files: Vec<SourceFile>,
    pub(crate) division: Division,
    pub(crate) skipped: Skipped,
}

/// How a text is divided into train and validation.
#[derive(Debug)]
pub(crate) enum Division {
    /// The last twentieth is for validation.
    Tail,
    /// One entry for each file.
    Given(Vec<Split>),
}

/// What was left out while looking for text, each thing once. A folder counts as one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Skipped {
    /// Files and folders whose name begins with a dot.
    pub hidden: u64,
    /// Files without a byte in them.
    pub empty: u64,
    /// Links to folders (they may lead in circles), pipes, sockets and devices.
    pub special: u64,
    /// Files that are not UTF-8.
    pub not_text: u64,
    /// Source files beyond a crate's share of the default data.
    pub over_share: u64,
    /// Links within a folder to files that are read by another name.
    pub twice: u64,
    /// What runs of this program have written: each run's folder within the text, or what lies in
    /// the text's folder itself.
    pub runs: u64,
}

impl fmt::Display for Skipped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut separator = "";
        for (count, what) in [
            (self.hidden, "hidden"),
            (self.empty, "empty"),
            (self.special, "folder links or special files"),
            (self.not_text, "not UTF-8 text"),
            (self.over_share, "over their crate's share"),
            (self.twice, "links to files that are read anyway"),
            (self.runs, "of runs of pillion"),
        ] {
            if count > 0 {
                write!(f, "{separator}{count} {what}")?;
                separator = ", ";
            }
        }
        if separator.is_empty() {
            f.write_str("nothing")?;
        }
        Ok(())
    }
}

/// What a path that the user gives is: a file or a folder.
///
/// # Errors
/// [`Error::Missing`], [`Error::Stdin`], [`Error::NotAFile`], [`Error::Read`].
pub(crate) fn check(path: &Path) -> Result<Metadata> {
    let metadata = fs::metadata(path).map_err(|source| match source.kind() {
        io::ErrorKind::NotFound if path == Path::new("-") => Error::Stdin,
        io::ErrorKind::NotFound => Error::Missing { path: path.to_owned() },
        _ => Error::Read { path: path.to_owned(), source },
    })?;
    // The path of an anonymous pipe can be opened, but has no canonical form.
    if metadata.is_dir() || metadata.is_file() { Ok(metadata) } else { Err(Error::NotAFile { path: path.to_owned() }) }
}

/// Lists the files under `path`: itself, or all files of a folder and the folders within, sorted by
/// path. Names that begin with a dot are left out below `path`, and so is what runs have written
/// there: a run must not learn from its own output. Links are followed to files, not to folders.
///
/// # Errors
/// [`Error::Missing`], [`Error::NotAFile`], [`Error::Read`] for a folder or a link that cannot be
/// read, [`Error::NoText`] if no file with a byte in it is found.
pub(crate) fn under(path: &Path) -> Result<Sources> {
    let metadata = check(path)?;
    let root = fs::canonicalize(path).map_err(|source| Error::Read { path: path.to_owned(), source })?;
    let mut skipped = Skipped::default();
    let mut files = Vec::new();
    if metadata.is_dir() {
        walk(root, &mut files, &mut skipped)?;
        files.sort_by(|a, b| a.path.cmp(&b.path));
    } else if metadata.len() == 0 {
        skipped.empty += 1;
    } else {
        files.push(SourceFile::new(root, &metadata));
    }
    if files.is_empty() {
        return Err(no_text(path, &skipped));
    }
    Ok(Sources { files, division: Division::Tail, skipped })
}

pub(crate) fn no_text(path: &Path, skipped: &Skipped) -> Error {
    let found = if *skipped == Skipped::default() { "no file".to_owned() } else { format!("only these: {skipped}") };
    Error::NoText { path: path.to_owned(), found }
}

fn walk(root: PathBuf, files: &mut Vec<SourceFile>, skipped: &mut Skipped) -> Result<()> {
    let mut folders = vec![root.clone()];
    while let Some(folder) = folders.pop() {
        let is_run = runs::is_one(&folder);
        if is_run && folder != root {
            skipped.runs += 1;
            continue;
        }
        let unreadable = |source| Error::Read { path: folder.clone(), source };
        for entry in fs::read_dir(&folder).map_err(unreadable)? {
            let entry = entry.map_err(unreadable)?;
            let path = entry.path();
            if entry.file_name().as_encoded_bytes().starts_with(b".") {
                skipped.hidden += 1;
                continue;
            }
            if is_run && runs::is_of_run(&entry.file_name()) {
                skipped.runs += 1;
                continue;
            }
            if entry.file_type().map_err(unreadable)?.is_dir() {
                folders.push(path);
                continue;
            }
            let metadata = metadata(&path)?;
            if !metadata.is_file() {
                skipped.special += 1;
            } else if metadata.len() == 0 {
                skipped.empty += 1;
            } else {
                files.push(SourceFile::new(path, &metadata));
            }
        }
    }
    Ok(())
}

fn metadata(path: &Path) -> Result<Metadata> {
    fs::metadata(path).map_err(|source| Error::Read { path: path.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;
    use std::os::unix::net::UnixListener;

    #[test]
    fn a_folder_is_listed_in_order_and_what_is_left_out_is_counted() {
        let folder = tempfile::tempdir().unwrap();
        // Canonical, as the temporary folder may itself lie behind a link.
        let root = folder.path().canonicalize().unwrap();
        fs::create_dir_all(root.join("b/deep")).unwrap();
        fs::create_dir_all(root.join(".git")).unwrap();
        for (name, text) in [
            ("z.txt", "last"),
            ("b/deep/one", "1"),
            ("b/a", "two"),
            (".git/config", "hidden with its folder"),
            (".hidden", "hidden"),
            ("empty", ""),
        ] {
            fs::write(root.join(name), text).unwrap();
        }
        symlink(root.join("z.txt"), root.join("c_link")).unwrap();
        symlink(&root, root.join("loop")).unwrap();
        let _socket = UnixListener::bind(root.join("socket")).unwrap();

        let sources = under(folder.path()).unwrap();
        let found: Vec<_> = sources
            .files
            .iter()
            .map(|file| (file.path.strip_prefix(&root).unwrap().to_str().unwrap(), file.bytes))
            .collect();
        let expected = [("b/a", 3), ("b/deep/one", 1), ("c_link", 4), ("z.txt", 4)];
        assert_eq!(found, expected);
        let skipped = Skipped { hidden: 2, empty: 1, special: 2, ..Skipped::default() };
        assert_eq!(sources.skipped, skipped);
    }

    #[test]
    fn a_path_without_text_is_an_error_that_names_it() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        fs::create_dir(at("bare")).unwrap();
        fs::create_dir(at("hollow")).unwrap();
        fs::write(at("hollow/empty"), "").unwrap();
        fs::write(at("empty"), "").unwrap();
        let _socket = UnixListener::bind(at("socket")).unwrap();
        fs::create_dir(at("broken")).unwrap();
        symlink(at("nowhere"), at("broken/link")).unwrap();
        for (name, says) in [
            ("none", "no such file or folder"),
            ("bare", "no text in it (no file)"),
            ("hollow", "only these: 1 empty"),
            ("empty", "only these: 1 empty"),
            ("socket", "neither a file nor a folder"),
            ("broken", "cannot read"),
        ] {
            let error = under(&at(name)).unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
            assert!(error.contains(at(name).to_str().unwrap()), "{error}");
        }
    }
}
