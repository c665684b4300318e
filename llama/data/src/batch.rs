//! Samples that a rank computes at a time.

use pillion_kernels::{Documents, IGNORED};

/// Inputs and targets of some samples.
#[derive(Debug)]
pub struct Batch {
    /// `[samples, seq]`.
    pub inputs: Vec<u32>,
    /// `[samples, seq]`; masked ones are [`IGNORED`](pillion_kernels::IGNORED).
    pub targets: Vec<u32>,
    /// Where each input's document begins, `[samples, seq]`: see [`Row::starts`].
    starts: Option<Vec<u32>>,
    seq: usize,
}

/// One sample of a [`Batch`], to be filled in.
#[derive(Debug)]
pub struct Row<'a> {
    /// `[seq]`.
    pub inputs: &'a mut [u32],
    /// `[seq]`: the inputs one place on.
    pub targets: &'a mut [u32],
    /// `[seq]`, where attention stays within documents: the position at which each input's document
    /// begins, 0 for the one that the sample begins within. A separator belongs to the document that
    /// it begins or ends ([`Tokens::document_starts`](crate::Tokens::document_starts)).
    pub starts: Option<&'a mut [u32]>,
}

impl<'a> Row<'a> {
    /// Of samples whose documents do not matter.
    pub fn new(inputs: &'a mut [u32], targets: &'a mut [u32]) -> Self {
        Self { inputs, targets, starts: None }
    }
}

impl Batch {
    /// Of `samples` samples of `seq` tokens, all of token 0. `has_documents` tells whether it notes
    /// where documents begin.
    pub fn new(samples: usize, seq: usize, has_documents: bool) -> Self {
        let zeros = vec![0; samples * seq];
        let starts = has_documents.then(|| zeros.clone());
        Self { inputs: zeros.clone(), targets: zeros, starts, seq }
    }

    /// Its samples.
    pub fn rows(&mut self) -> impl Iterator<Item = Row<'_>> {
        let mut starts = self.starts.as_mut().map(|starts| starts.chunks_exact_mut(self.seq));
        let rows = self.inputs.chunks_exact_mut(self.seq).zip(self.targets.chunks_exact_mut(self.seq));
        rows.map(move |(inputs, targets)| Row { inputs, targets, starts: starts.as_mut().and_then(Iterator::next) })
    }

    /// The documents of all samples, where they are noted.
    pub fn documents(&self) -> Option<Documents> {
        self.starts.as_ref().map(|starts| Documents::new(starts, self.seq))
    }

    /// Whether all targets are masked.
    pub fn is_masked(&self) -> bool {
        self.targets.iter().all(|&target| target == IGNORED)
    }
}
