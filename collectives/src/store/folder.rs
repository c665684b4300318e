//! A store that is a folder, also one of a file system that hosts share.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::fs::FlockOperation;
use rustix::io::Errno;

use super::{Nap, Store, check_key, failed};
use crate::Error;
use crate::limits::explain;
use crate::memory::fork::Guarded;

/// How long [`Store::add`] waits for another process that is adding to the same count.
const ADD_WITHIN: Duration = Duration::from_secs(60);
/// Most bytes of a file's name that come from a key. A longer key is a path of several names.
const NAME: usize = 200;
/// How often a value is read again that is renamed while it is read.
const MOST_STALE: usize = 10;
/// Bytes of a count in its file.
const COUNT: usize = 8;

/// A [`Store`] in a folder. Ranks on several hosts need a file system that all of them see.
///
/// Values survive the ranks. [`crate::Communicator::connect_through`] tells those of earlier jobs
/// from its own, so jobs can use one folder, one after the other. Jobs at the same time need a
/// folder each. A program that sets values of its own should give each job a folder or keys of its
/// own.
///
/// The store takes keys of at most 1 KiB. A value is written to a temporary file that is then
/// renamed, so readers see all of it or none. A rank that is killed meanwhile leaves a `.part`
/// file, which harms nobody.
///
/// A count is eight bytes in a file of its own. [`Store::add`] locks this file with flock(2). The
/// kernel gives up the lock of a process that ends in any way, so no killed rank leaves a lock that
/// others must judge. Linux passes the lock to an NFS server. A server of NFSv4 ends the locks of a
/// host that is lost; one of NFSv3 keeps them until that host boots again. The client reads the
/// file anew from the server after it has locked it, and writes it back before it unlocks it. Locks
/// must not be switched off there (`nolock`, `local_lock=flock`), and Lustre needs the mount option
/// `flock`.
///
/// An NFS client remembers for some seconds what a folder has in it. [`Store::get`] opens the
/// folder first, upon which the client asks the server. A value may still come to another host
/// late.
#[derive(Debug)]
pub struct FolderStore {
    folder: PathBuf,
}

/// Tells temporary files of this process apart.
static WRITTEN: AtomicU64 = AtomicU64::new(0);

impl FolderStore {
    /// The store in this folder, which is made where there is none.
    ///
    /// # Errors
    /// [`Error::Store`] where it cannot be made.
    pub fn new(folder: impl Into<PathBuf>) -> Result<FolderStore, Error> {
        let folder = folder.into();
        fs::create_dir_all(&folder).map_err(|error| cannot("make the folder", &folder, &error))?;
        Ok(FolderStore { folder })
    }

    /// The file of a key. `kind` keeps values, counts and whatever else is in the folder apart.
    fn file(&self, kind: char, key: &str) -> PathBuf {
        let mut name = String::new();
        for byte in key.bytes() {
            match byte {
                b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'_' => name.push(char::from(byte)),
                // Neither `.` nor `-`, which stand in names of this store.
                _ => name.push_str(&format!("%{byte:02x}")),
            }
        }
        let mut file = self.folder.clone();
        while name.len() > NAME {
            let rest = name.split_off(NAME);
            file.push(format!("{kind}-{name}-"));
            name = rest;
        }
        file.join(format!("{kind}-{name}"))
    }
}

/// A file that this call has locked. A forked child keeps neither the file nor, because it is
/// unlocked and not only closed, the lock.
struct Locked(Guarded<File>);

impl Locked {
    fn open(path: &Path) -> Result<Locked, Error> {
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path);
        let file = Guarded::new(file.map_err(|error| cannot("open", path, &error))?);
        let (started, mut nap) = (Instant::now(), Nap::default());
        loop {
            match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Ok(Locked(file)),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) if started.elapsed() < ADD_WITHIN => nap.take(ADD_WITHIN),
                Err(Errno::AGAIN) => {
                    return Err(failed(format!(
                        "another process has locked {} for {} s: is it stopped?",
                        path.display(),
                        ADD_WITHIN.as_secs()
                    )));
                }
                Err(errno) => return Err(cannot("lock", path, &errno.into())),
            }
        }
    }
}

impl Drop for Locked {
    fn drop(&mut self) {
        // Where that fails, the lock ends with the file.
        let _ = rustix::fs::flock(&self.0, FlockOperation::Unlock);
    }
}

impl Store for FolderStore {
    fn set(&self, key: &str, value: &[u8]) -> Result<(), Error> {
        check_key(key)?;
        let path = self.file('v', key);
        let parent = path.parent().unwrap_or(&self.folder);
        fs::create_dir_all(parent).map_err(|error| cannot("make the folder", parent, &error))?;
        // Threads of this process have different counters, and other processes different words.
        let number = WRITTEN.fetch_add(1, Ordering::Relaxed);
        let part = self.folder.join(format!("{:016x}-{number}.part", random::<1>()?[0]));
        let write = || -> io::Result<()> {
            let mut file = OpenOptions::new().write(true).create_new(true).open(&part)?;
            file.write_all(value)?;
            // A network's file system may say only now that there is no room.
            file.sync_all()?;
            drop(file);
            fs::rename(&part, &path)
        };
        write().map_err(|error| {
            // The file may not be there. The error to report is the first one.
            let _ = fs::remove_file(&part);
            cannot("write", &path, &error)
        })
    }

    fn get(&self, key: &str) -> Result<Option<Vec<u8>>, Error> {
        check_key(key)?;
        let path = self.file('v', key);
        // A missing folder is an error, and a missing file in it is not.
        File::open(&self.folder).map_err(|error| cannot("open the folder", &self.folder, &error))?;
        let mut stale = 0;
        loop {
            match fs::read(&path) {
                Ok(value) => return Ok(Some(value)),
                Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
                // Another host has renamed a new value over the one that was being read.
                Err(error) if error.raw_os_error() == Some(Errno::STALE.raw_os_error()) && stale < MOST_STALE => {
                    stale += 1;
                }
                Err(error) => return Err(cannot("read", &path, &error)),
            }
        }
    }

    fn add(&self, key: &str, amount: i64) -> Result<i64, Error> {
        check_key(key)?;
        let path = self.file('c', key);
        let failed_to = |what: &'static str| {
            let path = &path;
            move |error: io::Error| cannot(what, path, &error)
        };
        let parent = path.parent().unwrap_or(&self.folder);
        fs::create_dir_all(parent).map_err(|error| cannot("make the folder", parent, &error))?;
        let locked = Locked::open(&path)?;
        let file = &*locked.0;
        let mut bytes = [0; COUNT];
        match file.metadata().map_err(failed_to("read"))?.len() {
            0 => {}
            len if len == COUNT as u64 => file.read_exact_at(&mut bytes, 0).map_err(failed_to("read"))?,
            len => {
                return Err(failed(format!(
                    "{} has {len} bytes, and a count has {COUNT}: another program wrote it; remove it",
                    path.display()
                )));
            }
        }
        let sum = sum(key, i64::from_le_bytes(bytes), amount)?;
        // One call, so that a process that is killed writes the whole count or nothing.
        let written = file.write_at(&sum.to_le_bytes(), 0).map_err(failed_to("write"))?;
        if written < COUNT {
            return Err(cannot("write", &path, &io::Error::from(ErrorKind::WriteZero)));
        }
        // As for a value. The count on a server must be this one before others may lock it.
        file.sync_data().map_err(failed_to("write"))?;
        Ok(sum)
    }
}

/// A count plus an amount.
pub(super) fn sum(key: &str, count: i64, amount: i64) -> Result<i64, Error> {
    count.checked_add(amount).ok_or_else(|| failed(format!("the count {key:?} is {count}, and {amount} more overflow")))
}

/// Words that no stranger knows.
pub(crate) fn random<const N: usize>() -> Result<[u64; N], Error> {
    let mut words = [0; N];
    for word in &mut words {
        let (mut bytes, mut have) = ([0; 8], 0);
        while have < bytes.len() {
            match rustix::rand::getrandom(&mut bytes[have..], rustix::rand::GetRandomFlags::empty()) {
                Ok(count) => have += count,
                Err(Errno::INTR) => {}
                Err(errno) => return Err(Error::system("asking for random numbers")(errno)),
            }
        }
        *word = u64::from_le_bytes(bytes);
    }
    Ok(words)
}

fn cannot(what: &str, path: &Path, error: &io::Error) -> Error {
    failed(format!("cannot {what} {}: {}", path.display(), explain(error)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::fork::Child;

    #[test]
    fn a_forked_child_keeps_no_lock() {
        let folder = tempfile::tempdir().unwrap();
        let store = FolderStore::new(folder.path()).unwrap();
        let path = store.file('c', "count");
        let locked = Locked::open(&path).unwrap();
        let child = Child::fork();
        let is_kept = || {
            let open = fs::read_dir(format!("/proc/{}/fd", child.id())).unwrap();
            open.filter_map(|file| fs::read_link(file.unwrap().path()).ok()).any(|file| file == path)
        };
        // The child closes it when it first runs.
        let started = Instant::now();
        while is_kept() {
            assert!(started.elapsed() < ADD_WITHIN, "the child keeps the file");
            std::thread::sleep(Duration::from_millis(1));
        }
        // Nor does one that was forked before the file was guarded.
        let copy = locked.0.try_clone().unwrap();
        drop(locked);
        assert_eq!(store.add("count", 1).unwrap(), 1);
        // An error ends the lock, too.
        store.add("count", i64::MAX).unwrap_err();
        assert_eq!(store.add("count", 1).unwrap(), 2);
        drop((child, copy));
    }
}
