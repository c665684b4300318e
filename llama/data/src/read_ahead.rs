//! A thread that reads the next samples while a step computes.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::batch::Batch;
use crate::dataset::Dataset;
use crate::error::{Error, Result};

/// Reads batches of a train split, one ahead of the one that is used.
#[derive(Debug)]
pub struct ReadAhead {
    /// What the thread is to fill, from a sample on; none once it shall end.
    empty: Option<SyncSender<(u64, Batch)>>,
    filled: Receiver<Result<Batch>>,
    thread: Option<JoinHandle<()>>,
    dataset: Arc<Dataset>,
    samples: usize,
    has_documents: bool,
    /// The first sample of what the thread reads now or has read.
    ahead: Option<u64>,
    /// What was taken last, and what is to be filled next.
    taken: Batch,
    spare: Option<Batch>,
    waited: Duration,
}

impl ReadAhead {
    /// Starts a thread that reads `samples` samples at a time, and where their documents begin if
    /// `has_documents`.
    ///
    /// # Errors
    /// [`Error::Thread`] when the system has no more threads.
    pub fn new(dataset: Arc<Dataset>, samples: usize, has_documents: bool) -> Result<Self> {
        let (empty, to_fill) = sync_channel::<(u64, Batch)>(1);
        let (give, filled) = sync_channel(1);
        let reader = dataset.clone();
        let read = move || {
            for (first, mut batch) in to_fill {
                let result = fill(&mut batch, first, &reader);
                if give.send(result.map(|()| batch)).is_err() {
                    break;
                }
            }
        };
        let thread = std::thread::Builder::new().name("data".to_owned()).spawn(read).map_err(Error::Thread)?;
        let batch = || Batch::new(samples, dataset.seq(), has_documents);
        let (taken, spare) = (batch(), Some(batch()));
        Ok(Self {
            empty: Some(empty),
            filled,
            thread: Some(thread),
            samples,
            has_documents,
            ahead: None,
            taken,
            spare,
            waited: Duration::ZERO,
            dataset,
        })
    }

    /// Samples `first` and those that follow it. The thread goes on with those from `next` on, if
    /// there are any: what the caller will most likely take next.
    ///
    /// # Errors
    /// As for [`Dataset::fill`].
    pub fn take(&mut self, first: u64, next: Option<u64>) -> Result<&Batch> {
        let began = Instant::now();
        if self.ahead != Some(first) {
            self.discard();
            self.ask(first);
        }
        self.ahead = None;
        let batch = self.receive()?;
        self.spare = Some(std::mem::replace(&mut self.taken, batch));
        if let Some(next) = next {
            self.ask(next);
        }
        self.waited += began.elapsed();
        Ok(&self.taken)
    }

    /// How long calls of [`take`](Self::take) have taken since this was asked last.
    pub fn waited(&mut self) -> Duration {
        std::mem::take(&mut self.waited)
    }

    fn ask(&mut self, first: u64) {
        let new = || Batch::new(self.samples, self.dataset.seq(), self.has_documents);
        let batch = self.spare.take().unwrap_or_else(new);
        let sent = self.empty.as_ref().expect("the thread is wanted").send((first, batch));
        // A thread that has panicked is found when its batch is received.
        self.ahead = sent.is_ok().then_some(first);
    }

    /// Drops what was read ahead and is not wanted, and its error, if it has one.
    fn discard(&mut self) {
        if self.ahead.take().is_some() {
            self.spare = self.receive().ok();
        }
    }

    fn receive(&mut self) -> Result<Batch> {
        match self.filled.recv() {
            Ok(result) => result,
            Err(_) => match self.thread.take().map(JoinHandle::join) {
                Some(Err(panic)) => std::panic::resume_unwind(panic),
                _ => panic!("the thread that reads data has ended"),
            },
        }
    }
}

impl Drop for ReadAhead {
    fn drop(&mut self) {
        self.empty = None;
        // A batch that nobody takes any more leaves room for another.
        if self.ahead.take().is_some() {
            let _ = self.filled.recv();
        }
        if let Some(thread) = self.thread.take() {
            // Its panic would have no more to say than that of the caller.
            let _ = thread.join();
        }
    }
}

/// Fills in the samples from `first` on.
fn fill(batch: &mut Batch, first: u64, dataset: &Dataset) -> Result<()> {
    (first..).zip(batch.rows()).try_for_each(|(sample, row)| dataset.fill(sample, row))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::any::Tokens;
    use crate::batch::Row;
    use crate::tokenizer::{END, VOCAB};
    use crate::tokens::tests::token_file;

    const SEQ: usize = 8;

    fn dataset() -> Arc<Dataset> {
        let folder = tempfile::tempdir().unwrap();
        let text: Vec<u16> = (0..4001).map(|i| if i % 13 == 5 { END } else { (i * i % 251) as u16 }).collect();
        let file = token_file(folder.path(), &text, &text);
        // The open file outlives its name.
        Arc::new(Dataset::open(Tokens::of_file(file).unwrap(), SEQ, VOCAB, 3).unwrap())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn whatever_was_read_ahead_the_samples_are_those_asked_for(
            asked in prop::collection::vec((0u64..2000, any::<bool>(), 0u64..2000), 1..20),
        ) {
            let data = dataset();
            let mut ahead = ReadAhead::new(data.clone(), 3, true).unwrap();
            let mut expected = Batch::new(3, SEQ, true);
            for (index, &(first, is_foreseen, other)) in asked.iter().enumerate() {
                let next = match asked.get(index + 1) {
                    Some(&(next, ..)) if is_foreseen => Some(next),
                    _ => (other % 2 == 0).then_some(other),
                };
                fill(&mut expected, first, &data).unwrap();
                let found = ahead.take(first, next).unwrap();
                prop_assert_eq!(&found.inputs, &expected.inputs);
                prop_assert_eq!(&found.targets, &expected.targets);
                prop_assert_eq!(found.documents(), expected.documents());
            }
            prop_assert!(ahead.waited() > Duration::ZERO);
            prop_assert_eq!(ahead.waited(), Duration::ZERO);
        }
    }

    #[test]
    fn an_error_of_what_is_not_taken_is_nobodys() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokens.bin");
        // nanoGPT's: 16-bit tokens without a header. The last of them no model of 100 tokens knows.
        let tokens: Vec<u8> = (0..100u16).map(|i| if i == 99 { 500 } else { i }).flat_map(u16::to_le_bytes).collect();
        std::fs::write(&path, tokens).unwrap();
        let data = Arc::new(Dataset::open(Tokens::open(&path, None).unwrap(), 9, 100, 1).unwrap());
        let is_bad = |sample| data.fill(sample, Row::new(&mut [0; 9], &mut [0; 9])).is_err();
        let bad = (0..data.samples_per_epoch(0)).find(|&sample| is_bad(sample)).expect("one sample has the token");
        let good = (0..data.samples_per_epoch(0)).find(|&sample| !is_bad(sample)).unwrap();
        let mut ahead = ReadAhead::new(data, 1, false).unwrap();
        ahead.take(good, Some(bad)).unwrap();
        ahead.take(good, Some(bad)).unwrap();
        let error = ahead.take(bad, Some(good)).unwrap_err().to_string();
        assert!(error.contains("has the token 500"), "{error}");
        ahead.take(good, None).unwrap();
    }
}
