//! How a rank's state comes from the engine to the thread that writes it: as a copy of all of it,
//! or piece by piece through a ring of buffers.
//!
//! The rank takes an empty buffer from the ring, fills it and sends it to the thread. The thread
//! writes the buffer and sends it back. So the rank waits where the disk is slower than a copy, and
//! the memory is that of the ring's buffers. The thread takes every piece even if it cannot write,
//! because the rank waits for the buffer.

use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use serde::{Deserialize, Serialize};

use crate::{Engine, Error, Layout, Policy, State};

/// What memory a [`Saver`](super::Saver) has for a rank's state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Staging {
    /// A copy of the whole state. The caller waits for the copy, and the thread writes it while
    /// training goes on.
    Copies,
    /// A ring of buffers, through which the state passes on its way to the file. The caller waits
    /// until the last piece has left the engine.
    Ring {
        /// The most that the buffers take: at least [`Staging::LEAST_RING`]. They never take more
        /// than the state does.
        bytes: u64,
    },
}

/// Elements of a piece: what was copied and hashed is still in the cache when it is written.
pub(super) const PIECE: usize = (256 << 10) / size_of::<f32>();

impl Staging {
    /// A ring for saves that nothing waits for, such as one at the end of a run. A larger one is
    /// not faster, unless the disk stalls.
    pub const SMALL_RING: Staging = Staging::Ring { bytes: 1 << 20 };
    /// Bytes of the smallest ring: one element is written while the next is copied.
    pub const LEAST_RING: u64 = 2 * size_of::<f32>() as u64;

    /// Bytes of a rank that writes a file of `elements` elements.
    pub(super) fn bytes(self, elements: usize) -> u64 {
        match self {
            Staging::Copies => (size_of::<f32>() * elements) as u64,
            Staging::Ring { bytes } => {
                let (buffers, len) = shape(bytes, elements);
                (size_of::<f32>() * buffers * len) as u64
            }
        }
    }
}

/// Elements of all parts of a rank's state.
pub(super) fn elements(layout: &Layout, policy: &Policy) -> usize {
    (1 + policy.states.len()) * layout.shard_len()
}

/// The number of buffers of a ring, and their length: at least two, unless one holds everything.
fn shape(bytes: u64, elements: usize) -> (usize, usize) {
    let most = usize::try_from(bytes / size_of::<f32>() as u64).unwrap_or(usize::MAX);
    let len = (most / 2).min(PIECE).min(elements).max(1);
    ((most / len).min(elements.div_ceil(len)).max(1), len)
}

/// What the thread is given for a save, and gives back.
pub(super) enum Staged {
    /// The state of each unit.
    Copies(Vec<State>),
    /// The end of a ring that the state comes out of.
    Ring(Outlet),
}

enum Filled {
    /// So many elements of a buffer.
    Piece(Vec<f32>, usize),
    /// The last piece was sent, or the rank could not send all.
    End(Result<(), Error>),
}

/// The rank's end of a ring.
pub(super) struct Inlet {
    empty: Receiver<Vec<f32>>,
    filled: SyncSender<Filled>,
}

/// The thread's end of a ring.
pub(super) struct Outlet {
    filled: Receiver<Filled>,
    empty: SyncSender<Vec<f32>>,
}

/// A ring of at most `bytes`, for states of `elements` elements. Its memory is made here.
pub(super) fn ring(bytes: u64, elements: usize) -> (Inlet, Outlet) {
    let (buffers, len) = shape(bytes, elements);
    // Each channel has room for all that there can be, so that no end waits to send.
    let (empties, empty) = sync_channel(buffers);
    let (filled, outgoing) = sync_channel(buffers + 1);
    for _ in 0..buffers {
        // Zeros would become memory only when they are overwritten.
        empties.send(vec![1.0; len]).expect("its other end is here");
    }
    (Inlet { empty, filled }, Outlet { filled: outgoing, empty: empties })
}

impl Inlet {
    /// Sends all that `fill` yields. That fills a part of what it is given only at the end, and
    /// returns how much. Blocks until the last piece is filled. Returns early when the thread has
    /// panicked, which the thread's missing answer says.
    pub(super) fn send(&self, mut fill: impl FnMut(&mut [f32]) -> Result<usize, Error>) {
        loop {
            let Ok(mut buffer) = self.empty.recv() else { return };
            let (len, outcome) = match fill(&mut buffer) {
                Ok(len) => (len, Ok(())),
                Err(error) => (0, Err(error)),
            };
            let is_last = len < buffer.len();
            let is_there = self.filled.send(Filled::Piece(buffer, len)).is_ok();
            if is_last && is_there {
                let _ = self.filled.send(Filled::End(outcome));
            }
            if is_last || !is_there {
                return;
            }
        }
    }
}

impl Outlet {
    /// Gives all pieces to `take`, and each buffer back; returns whether the rank could send all.
    pub(super) fn receive(&self, mut take: impl FnMut(&[f32])) -> Result<(), Error> {
        // A rank that ends while it sends does not ask how this ended.
        while let Ok(filled) = self.filled.recv() {
            match filled {
                Filled::Piece(buffer, len) => {
                    take(&buffer[..len]);
                    let _ = self.empty.send(buffer);
                }
                Filled::End(outcome) => return outcome,
            }
        }
        Err(Error::Unfinished)
    }
}

#[cfg(test)]
impl Outlet {
    /// Takes the first pieces, and gives their buffers back.
    pub(super) fn take(&self, pieces: usize) {
        for _ in 0..pieces {
            let Ok(Filled::Piece(buffer, _)) = self.filled.recv() else { panic!("a piece") };
            self.empty.send(buffer).expect("the rank waits for it");
        }
    }
}

/// A place in a rank's state, in the order of the file.
pub(super) struct Cursor<'e> {
    engine: &'e Engine,
    unit: usize,
    part: usize,
    first: usize,
}

impl<'e> Cursor<'e> {
    pub(super) fn new(engine: &'e Engine) -> Cursor<'e> {
        Cursor { engine, unit: 0, part: 0, first: 0 }
    }

    /// Fills `out` with what comes next; returns how many elements that were.
    ///
    /// # Errors
    /// As for [`Engine::state`].
    pub(super) fn fill(&mut self, out: &mut [f32]) -> Result<usize, Error> {
        let (units, parts) = (&self.engine.layout().units, 1 + self.engine.policy().states.len());
        let mut filled = 0;
        while filled < out.len() && self.unit < units.len() {
            let shard = units[self.unit].shard;
            let count = (shard - self.first).min(out.len() - filled);
            self.engine.read_part(self.unit, self.part, self.first, &mut out[filled..filled + count])?;
            filled += count;
            self.first += count;
            if self.first == shard {
                (self.first, self.part) = (0, self.part + 1);
            }
            if self.part == parts {
                (self.part, self.unit) = (0, self.unit + 1);
            }
        }
        Ok(filled)
    }
}

/// Shows every buffer of a ring that rests, in order of their places.
#[cfg(test)]
pub(super) fn for_each_buffer(inlet: &Inlet, outlet: &Outlet, see: impl FnMut(&mut Vec<f32>)) {
    let mut buffers: Vec<Vec<f32>> = inlet.empty.try_iter().collect();
    buffers.sort_by_key(|buffer| buffer.as_ptr());
    buffers.iter_mut().for_each(see);
    buffers.into_iter().for_each(|buffer| outlet.empty.send(buffer).expect("its other end is here"));
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::thread;

    use proptest::prelude::*;

    use super::*;

    /// Sends `values` and returns what arrives, the places of the buffers, and how it ended.
    fn pass(
        inlet: &Inlet,
        outlet: &mut Outlet,
        values: &[f32],
        fails_at: Option<usize>,
    ) -> (Vec<f32>, BTreeSet<usize>, Result<(), Error>) {
        let (mut sent, mut arrived, mut places) = (0, Vec::new(), BTreeSet::new());
        let fill = |out: &mut [f32]| {
            if fails_at.is_some_and(|at| sent >= at) {
                return Err(Error::Poisoned);
            }
            let count = out.len().min(values.len() - sent);
            out[..count].copy_from_slice(&values[sent..sent + count]);
            sent += count;
            Ok(count)
        };
        let outcome = thread::scope(|scope| {
            let take = |piece: &[f32]| {
                places.insert(piece.as_ptr() as usize);
                arrived.extend_from_slice(piece);
            };
            let receiving = scope.spawn(move || outlet.receive(take));
            inlet.send(fill);
            receiving.join().unwrap()
        });
        (arrived, places, outcome)
    }

    proptest! {
        #[test]
        fn a_ring_of_any_size_passes_any_state_in_order_and_keeps_its_buffers(
            elements in 0usize..3000,
            bytes in Staging::LEAST_RING..20_000,
            fails_at in 0usize..3000,
        ) {
            let values: Vec<f32> = (0..elements).map(|value| value as f32).collect();
            let (inlet, mut outlet) = ring(bytes, elements);
            let (mut held, mut made) = (0, BTreeSet::new());
            for_each_buffer(&inlet, &outlet, |buffer| {
                held += (size_of::<f32>() * buffer.capacity()) as u64;
                made.insert(buffer.as_ptr() as usize);
            });
            prop_assert_eq!(held, Staging::Ring { bytes }.bytes(elements));
            prop_assert!(held <= bytes);
            // What fails in the middle leaves the ring as it was.
            for fails_at in [None, Some(fails_at.min(elements)), None] {
                let (arrived, places, outcome) = pass(&inlet, &mut outlet, &values, fails_at);
                match fails_at {
                    None => prop_assert!(outcome.is_ok() && arrived == values),
                    // The last piece may have left before the failure.
                    Some(_) if arrived == values => {}
                    Some(_) => prop_assert!(matches!(outcome, Err(Error::Poisoned)) && values.starts_with(&arrived)),
                }
                prop_assert!(places.is_subset(&made));
            }
        }
    }

    #[test]
    fn a_ring_takes_no_more_than_the_state_and_at_most_what_it_may() {
        let bytes = |bytes, elements| Staging::Ring { bytes }.bytes(elements);
        assert_eq!(bytes(u64::MAX, 1000), 4000);
        assert_eq!(bytes(4 << 20, 1 << 30), 4 << 20);
        assert_eq!(bytes(Staging::LEAST_RING, 1 << 30), 8);
        assert_eq!(bytes(1 << 30, 0), 4);
        assert_eq!(Staging::Copies.bytes(1000), 4000);
    }

    #[test]
    fn an_end_that_is_gone_does_not_hold_up_the_other() {
        let (inlet, outlet) = ring(64, 1000);
        let mut sent = 0;
        thread::scope(|scope| {
            scope.spawn(move || outlet.take(3));
            inlet.send(|out| {
                sent += out.len();
                Ok(out.len())
            });
        });
        assert!(sent < 1000, "{sent}");
        let (inlet, outlet) = ring(64, 1000);
        drop(inlet);
        assert!(outlet.receive(|_| {}).is_err());
    }
}
