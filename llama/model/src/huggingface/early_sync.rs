//! Brings a long file to the disk while it is still being written, so that the wait at its end is
//! short.

use std::cell::Cell;
use std::fs::File;
use std::io;
use std::sync::mpsc::{SyncSender, sync_channel};

/// Bytes after which a part is brought to the disk.
const PART: usize = 128 << 20;

/// A thread that does so. It ends when this is dropped.
pub(super) struct EarlySync {
    due: SyncSender<()>,
    bytes: Cell<usize>,
}

impl EarlySync {
    pub(super) fn of(file: &File) -> io::Result<EarlySync> {
        let file = file.try_clone()?;
        let (due, parts) = sync_channel(1);
        std::thread::Builder::new().name("pillion-sync".to_owned()).spawn(move || {
            for () in parts {
                // The file's owner meets the same error at the end.
                let _ = file.sync_data();
            }
        })?;
        Ok(EarlySync { due, bytes: Cell::new(0) })
    }

    /// To be called after bytes have been written.
    pub(super) fn wrote(&self, bytes: usize) {
        self.bytes.set(self.bytes.get() + bytes);
        if self.bytes.get() >= PART {
            self.bytes.set(0);
            // A thread that is behind brings this part to the disk with the next one.
            let _ = self.due.try_send(());
        }
    }
}
