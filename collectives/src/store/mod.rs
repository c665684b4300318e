//! Stores, through which ranks find each other: one rank sets a value, and others get it.
//!
//! [`FolderStore`] and [`TcpStore`] are stores of this crate. A program that has a store of its
//! own, such as PyTorch's, implements [`Store`] for it. [`crate::Communicator::connect_through`]
//! takes any of them.

mod folder;
pub(crate) mod tcp;

use std::time::{Duration, Instant};

pub use folder::FolderStore;
pub(crate) use folder::random;
pub use tcp::TcpStore;

use crate::Error;

/// The first and the longest pause between two looks at a key.
const FIRST_NAP: Duration = Duration::from_millis(1);
const LONGEST_NAP: Duration = Duration::from_millis(50);

/// Values by key, which every rank of a job sees. Any thread may call any method at any time.
///
/// A key is any text. A value may be empty. The keys of [`Store::add`] are apart from those of the
/// other methods: a program uses a key for a value or for a count, and never for both.
///
/// A store that a program brings returns [`Error::Store`] for failures of its own.
pub trait Store: Send + Sync {
    /// Sets the value of a key, in place of an older one. No rank ever gets a part of a value.
    ///
    /// # Errors
    /// [`Error::Store`] where the store cannot be reached or has no room.
    fn set(&self, key: &str, value: &[u8]) -> Result<(), Error>;

    /// The value of a key, or `None` where no rank has set it. Returns without waiting for a value.
    ///
    /// # Errors
    /// [`Error::Store`] where the store cannot be reached.
    fn get(&self, key: &str) -> Result<Option<Vec<u8>>, Error>;

    /// The value of a key, once a rank has set it. The default calls [`Store::get`] again and
    /// again, with pauses that grow to a twentieth of a second.
    ///
    /// # Errors
    /// [`Error::Store`] when no rank has set the key within `limit`. Those of [`Store::get`].
    fn wait(&self, key: &str, limit: Duration) -> Result<Vec<u8>, Error> {
        let (started, mut nap) = (Instant::now(), Nap::default());
        loop {
            if let Some(value) = self.get(key)? {
                return Ok(value);
            }
            if started.elapsed() >= limit {
                let remark = self.remark().map_or_else(String::new, |remark| format!("; {remark}"));
                return Err(failed(format!(
                    "no rank has set the key {key:?} within {:.1} s: has the rank that sets it started, with the same \
                     store?{remark}",
                    limit.as_secs_f64()
                )));
            }
            nap.take(limit.saturating_sub(started.elapsed()));
        }
    }

    /// Adds to the count of a key, which begins at 0, and returns the sum. No other call comes
    /// between, so each of several callers that add 1 gets a sum of its own.
    ///
    /// # Errors
    /// [`Error::Store`] where the store cannot be reached, or the sum is no `i64`.
    fn add(&self, key: &str, amount: i64) -> Result<i64, Error>;

    /// What a rank that waited in vain may want to know of the store, such as how many strangers it
    /// refused. Errors at a deadline repeat it. The default has nothing to say.
    fn remark(&self) -> Option<String> {
        None
    }
}

/// Pauses between two looks, each twice as long as the one before.
pub(crate) struct Nap(Duration);

impl Default for Nap {
    fn default() -> Nap {
        Nap(FIRST_NAP)
    }
}

impl Nap {
    /// Sleeps, not longer than `most`.
    pub(crate) fn take(&mut self, most: Duration) {
        std::thread::sleep(self.0.min(most));
        self.0 = (2 * self.0).min(LONGEST_NAP);
    }
}

/// Most bytes of a key in the stores of this crate. A folder's path has at most 4 KiB, in which a
/// byte of a key may need three.
const MOST_KEY: usize = 1 << 10;

fn check_key(key: &str) -> Result<(), Error> {
    let bytes = key.len();
    if bytes > MOST_KEY {
        return Err(failed(format!("a key has {bytes} bytes, and at most {MOST_KEY} fit: choose a shorter one")));
    }
    Ok(())
}

pub(crate) fn failed(reason: String) -> Error {
    Error::Store { reason }
}
