//! A wire between ranks that are threads of one process, which behave as if they were on several hosts: for tests of what runs
//! between hosts, without any network.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Weak};

use parking_lot::Mutex;

use super::{Receipt, Wire};
use crate::Error;

/// Sender, receiver, tag.
type Line = (usize, usize, u8);

/// What the ranks of one job have sent and not yet received.
#[derive(Default)]
struct Board {
    messages: HashMap<Line, VecDeque<Vec<u8>>>,
    abort: Option<(usize, String)>,
}

static BOARDS: Mutex<Option<HashMap<String, Weak<Mutex<Board>>>>> = Mutex::new(None);

/// One rank's end.
pub(crate) struct ThreadWire {
    rank: usize,
    board: Arc<Mutex<Board>>,
    posted: HashMap<(usize, u8), VecDeque<Posted>>,
    next: u64,
}

/// A receive that waits for its message.
struct Posted {
    number: u64,
    data: *mut u8,
    len: usize,
}

impl ThreadWire {
    /// The end of `rank` in the job of this name.
    pub(crate) fn open(job: &str, rank: usize) -> ThreadWire {
        let mut boards = BOARDS.lock();
        let boards = boards.get_or_insert_default();
        boards.retain(|_, board| board.strong_count() > 0);
        let board = boards.get(job).and_then(Weak::upgrade).unwrap_or_default();
        boards.insert(job.to_owned(), Arc::downgrade(&board));
        ThreadWire { rank, board, posted: HashMap::new(), next: 0 }
    }
}

// SAFETY: the pointer is to memory that `Wire::receive`'s caller lends to whoever drives the wire,
// whichever thread that is.
unsafe impl Send for Posted {}

impl Wire for ThreadWire {
    unsafe fn send(&mut self, to: usize, tag: u8, data: *const u8, len: usize) -> Result<Receipt, Error> {
        // SAFETY: readable, by the caller's promise.
        let bytes = unsafe { std::slice::from_raw_parts(data, len) }.to_vec();
        self.board.lock().messages.entry((self.rank, to, tag)).or_default().push_back(bytes);
        self.next += 1;
        Ok(Receipt(self.next))
    }

    unsafe fn receive(&mut self, from: usize, tag: u8, data: *mut u8, len: usize) -> Result<Receipt, Error> {
        self.next += 1;
        self.posted.entry((from, tag)).or_default().push_back(Posted { number: self.next, data, len });
        Ok(Receipt(self.next))
    }

    fn has_come(&mut self, from: usize, tag: u8) -> Result<bool, Error> {
        let board = self.board.lock();
        Ok(board.messages.get(&(from, self.rank, tag)).is_some_and(|messages| !messages.is_empty()))
    }

    fn test(&mut self, request: &Receipt) -> Result<bool, Error> {
        let mut board = self.board.lock();
        for (&(from, tag), posted) in &mut self.posted {
            let Some(messages) = board.messages.get_mut(&(from, self.rank, tag)) else { continue };
            while let (Some(receive), Some(message)) = (posted.front(), messages.front()) {
                if message.len() != receive.len {
                    let reason =
                        format!("rank {from} sent {} bytes where {} were expected", message.len(), receive.len);
                    return Err(Error::System { what: "receiving from another host", reason });
                }
                // SAFETY: the bytes are writable and nobody else's until this request is complete, by the promise of `receive`.
                unsafe { std::ptr::copy_nonoverlapping(message.as_ptr(), receive.data, receive.len) };
                posted.pop_front();
                messages.pop_front();
            }
        }
        Ok(self.posted.values().flatten().all(|posted| posted.number != request.0))
    }

    fn abort(&mut self, reason: &str) {
        self.board.lock().abort.get_or_insert((self.rank, reason.to_owned()));
    }

    fn failure(&mut self) -> Option<Error> {
        let (rank, reason) = self.board.lock().abort.clone().filter(|(rank, _)| *rank != self.rank)?;
        Some(Error::Aborted { rank, reason })
    }
}
