//! Samples and validation windows: the numbers that the model is fed.

use pillion_kernels::IGNORED;
use xxhash_rust::xxh3::Xxh3;

use crate::any::Tokens;
use crate::batch::Row;
use crate::error::{Error, Result};
use crate::mixture::Mixture;
use crate::order::SampleOrder;
use crate::tokens::{Split, TokenFile};

/// Tokens cut into sequences: one source of them, or a mixture of several.
///
/// Window `i` of a split is its tokens `i·seq ..= (i+1)·seq`: `seq` inputs and, one token further,
/// `seq` targets. Neighbours share one token, so every token but the first is a target once. What
/// is left at the end of a split and does not fill a window is not used.
///
/// Samples of a mixture are dealt by weights, so their shares are those of tokens. Each source goes
/// through its epochs at its own pace.
#[derive(Debug)]
pub struct Dataset {
    sources: Vec<Source>,
    train: Mixture,
    /// Of the sources in `validates`, and how many windows keep the proportions.
    validation: Option<Mixture>,
    validation_len: u64,
    validates: Vec<usize>,
    seq: usize,
    /// Tokens that the model knows.
    vocab: usize,
}

#[derive(Debug)]
struct Source {
    tokens: Tokens,
    weight: u32,
    train: SampleOrder,
    /// None where the split does not fill a window.
    validation: Option<SampleOrder>,
}

impl Dataset {
    /// Cuts `tokens` into sequences of `seq` tokens for a model that knows `vocab`; `seed` decides
    /// the order of the train split.
    ///
    /// # Errors
    /// As for [`Dataset::mixed`].
    pub fn open(tokens: Tokens, seq: usize, vocab: usize, seed: u64) -> Result<Self> {
        Self::mixed(vec![(tokens, 1)], seq, vocab, seed)
    }

    /// A mixture of sources with weights, whose samples a run sees in proportion.
    ///
    /// # Errors
    /// [`Error::TooShort`] if a train split does not fill one window of `seq + 1` tokens;
    /// [`Error::EmptySequence`] if `seq` is 0; [`Error::Bad`] if the model knows too few tokens.
    ///
    /// # Panics
    /// When there are no sources, a weight is 0, or the weights, divided by what divides them all,
    /// sum to more than [`LONGEST`](crate::mixture::LONGEST).
    pub fn mixed(sources: Vec<(Tokens, u32)>, seq: usize, vocab: usize, seed: u64) -> Result<Self> {
        if seq == 0 {
            return Err(Error::EmptySequence);
        }
        let sources = sources.into_iter().map(|(tokens, weight)| Source::new(tokens, weight, seq, vocab, seed));
        let sources = sources.collect::<Result<Vec<_>>>()?;
        let weights = |sources: &[&Source]| sources.iter().map(|source| source.weight).collect::<Vec<_>>();
        let train = Mixture::new(&weights(&sources.iter().collect::<Vec<_>>()));
        let validates: Vec<usize> = (0..sources.len()).filter(|&index| sources[index].validation.is_some()).collect();
        let validating: Vec<&Source> = validates.iter().map(|&index| &sources[index]).collect();
        let validation = (!validating.is_empty()).then(|| Mixture::new(&weights(&validating)));
        let mut dataset = Self { sources, train, validation, validation_len: 0, validates, seq, vocab };
        dataset.validation_len = dataset.count_validation();
        Ok(dataset)
    }

    /// What the windows are cut from.
    pub fn sources(&self) -> impl Iterator<Item = &Tokens> {
        self.sources.iter().map(|source| &source.tokens)
    }

    /// The one token file of bytes that the windows are cut from, if they are.
    pub fn bytes(&self) -> Option<&TokenFile> {
        match &self.sources[..] {
            [Source { tokens: Tokens::File(file, _), .. }] => Some(file),
            _ => None,
        }
    }

    /// The identity of the data, and of the proportions.
    ///
    /// # Errors
    /// [`Error::Read`] if a file cannot be read.
    pub fn fingerprint(&self) -> Result<u64> {
        if let [source] = &self.sources[..] {
            return source.tokens.fingerprint();
        }
        let mut hash = Xxh3::new();
        for Source { tokens, weight, .. } in &self.sources {
            hash.update(&tokens.fingerprint()?.to_le_bytes());
            hash.update(&weight.to_le_bytes());
        }
        Ok(hash.digest())
    }

    /// Compares lengths and times of all files with those when they were opened.
    ///
    /// # Errors
    /// [`Error::Bad`], naming the file that has changed; [`Error::Read`] if one is gone.
    pub fn check_unchanged(&self) -> Result<()> {
        self.sources().try_for_each(Tokens::check_unchanged)
    }

    /// Tokens in a sequence.
    pub fn seq(&self) -> usize {
        self.seq
    }

    /// Checks that every source says where its documents begin, as [`Row::starts`] need.
    ///
    /// # Errors
    /// [`Error::Bad`], naming the source that does not.
    pub fn check_documents(&self) -> Result<()> {
        self.sources().try_for_each(check_documents)
    }

    /// Fills in sample `g` of the run. Any `g` is valid: epochs follow each other, each in an order
    /// of its own. Targets that are masked are [`IGNORED`](pillion_kernels::IGNORED).
    ///
    /// # Errors
    /// [`Error::Read`] if a file can no longer be read; [`Error::Bad`] if a token is outside the
    /// vocabulary, or if the row has starts and the tokens do not say where documents begin.
    ///
    /// # Panics
    /// If the row does not hold `seq` tokens.
    pub fn fill(&self, g: u64, row: Row<'_>) -> Result<()> {
        let (source, index) = self.train.place(g);
        let source = &self.sources[source];
        self.window(&source.tokens, Split::Train, source.train.index(index), row)
    }

    /// Samples of a source in one pass over its train split.
    pub fn samples_per_epoch(&self, source: usize) -> u64 {
        self.sources[source].train.samples_per_epoch()
    }

    /// Windows of a split, of all sources.
    pub fn windows(&self, split: Split) -> u64 {
        self.sources.iter().map(|source| source.windows(split)).sum()
    }

    /// Fills in window `i` of a split, in the order of the text, source after source.
    ///
    /// # Errors
    /// As for [`Dataset::fill`].
    ///
    /// # Panics
    /// If `i` is not below [`windows`](Self::windows), or the row does not hold `seq` tokens.
    pub fn in_order(&self, split: Split, i: u64, row: Row<'_>) -> Result<()> {
        let mut rest = i;
        for source in &self.sources {
            let windows = source.windows(split);
            if rest < windows {
                return self.window(&source.tokens, split, rest, row);
            }
            rest -= windows;
        }
        panic!("window {i} of {}", self.windows(split))
    }

    /// Number of validation windows: as many as keep the proportions of the sources that have any.
    pub fn validation_len(&self) -> u64 {
        self.validation_len
    }

    fn count_validation(&self) -> u64 {
        let Some(mixture) = &self.validation else { return 0 };
        let has = |index: usize| self.sources[index].validation.as_ref().map_or(0, SampleOrder::samples_per_epoch);
        let fits = |windows: u64| {
            self.validates.iter().enumerate().all(|(place, &index)| mixture.count(windows, place) <= has(index))
        };
        let all: u64 = self.validates.iter().map(|&index| has(index)).sum();
        // The largest number that fits: counts grow with it.
        let (mut low, mut high) = (0, all);
        while low < high {
            let middle = high - (high - low) / 2;
            (low, high) = if fits(middle) { (middle, high) } else { (low, middle - 1) };
        }
        low
    }

    /// Fills in validation window `i`.
    ///
    /// The windows come in a fixed shuffled order, the same for every seed, so the first `m` are a
    /// sample from the whole split: to validate on less, take fewer.
    ///
    /// # Errors
    /// As for [`Dataset::fill`].
    ///
    /// # Panics
    /// If `i` is not below [`validation_len`](Self::validation_len), or the row does not hold `seq`
    /// tokens.
    pub fn validation(&self, i: u64, row: Row<'_>) -> Result<()> {
        assert!(i < self.validation_len(), "validation window {i} of {}", self.validation_len());
        let (place, index) = self.validation.as_ref().expect("there are windows").place(i);
        let source = &self.sources[self.validates[place]];
        let window = source.validation.as_ref().expect("it validates").index(index);
        self.window(&source.tokens, Split::Validation, window, row)
    }

    fn window(&self, tokens: &Tokens, split: Split, window: u64, row: Row<'_>) -> Result<()> {
        read_window(tokens, split, window, [self.seq, self.vocab], row)
    }
}

/// Fills in window `window` of `seq` tokens of a split, for a model that knows `vocab`.
///
/// # Errors
/// As for [`Dataset::fill`].
///
/// # Panics
/// If the row does not hold `seq` tokens.
pub(crate) fn read_window(
    tokens: &Tokens,
    split: Split,
    window: u64,
    [seq, vocab]: [usize; 2],
    Row { inputs, targets, starts }: Row<'_>,
) -> Result<()> {
    assert_eq!(inputs.len(), seq, "inputs hold one sequence");
    assert_eq!(targets.len(), seq, "targets hold one sequence");
    let start = window * seq as u64;
    // Targets are the inputs one place on, so only the last of them is read for itself.
    tokens.read(split, start, inputs)?;
    targets[..seq - 1].copy_from_slice(&inputs[1..]);
    tokens.read(split, start + seq as u64, &mut targets[seq - 1..])?;
    // The tokens know their own vocabulary, or none.
    if tokens.vocab().is_none()
        && let Some(token) = inputs.iter().chain(&*targets).find(|&&token| token as usize >= vocab)
    {
        let problem = format!("has the token {token}, but the model knows {vocab}: choose another model");
        return Err(Error::bad(tokens.path(), problem));
    }
    if tokens.has_mask(split) {
        let mut masked = [false; 1024];
        for (piece, targets) in (0..).zip(targets.chunks_mut(masked.len())) {
            let masked = &mut masked[..targets.len()];
            tokens.read_mask(split, start + 1 + 1024 * piece, masked)?;
            let left_out = targets.iter_mut().zip(masked).filter(|(_, masked)| **masked);
            left_out.for_each(|(target, _)| *target = IGNORED);
        }
    }
    if let Some(starts) = starts {
        assert_eq!(starts.len(), seq, "starts hold one sequence");
        let begins = tokens.document_starts(split, start..start + seq as u64)?;
        fill_starts(starts, begins.ok_or_else(|| no_documents(tokens))?.into_iter().map(|begin| begin - start));
    }
    Ok(())
}

/// Fills in where each token's document begins, from where documents begin within the window,
/// ascending.
fn fill_starts(starts: &mut [u32], begins: impl Iterator<Item = u64>) {
    let (mut begins, mut start) = (begins.peekable(), 0);
    for (position, of_token) in (0..).zip(starts) {
        // An empty document begins where the next one does.
        while begins.next_if_eq(&u64::from(position)).is_some() {
            start = position;
        }
        *of_token = start;
    }
}

/// Checks that tokens say where documents begin.
///
/// # Errors
/// [`Error::Bad`].
pub(crate) fn check_documents(tokens: &Tokens) -> Result<()> {
    match tokens.document_starts(Split::Train, 0..0)? {
        Some(_) => Ok(()),
        None => Err(no_documents(tokens)),
    }
}

fn no_documents(tokens: &Tokens) -> Error {
    let problem = "does not say where documents begin, as a model with --document-attention needs: give text, or \
                   tokens of `pillion tokenize`";
    Error::bad(tokens.path(), problem)
}

/// Checks that a model that knows `vocab` tokens knows these.
///
/// # Errors
/// [`Error::Bad`].
pub(crate) fn check_vocabulary(tokens: &Tokens, vocab: usize) -> Result<()> {
    match tokens.vocab().filter(|&needed| needed > vocab) {
        None => Ok(()),
        Some(needed) => {
            let problem = format!("has {needed} different tokens, but the model knows {vocab}: choose another model");
            Err(Error::bad(tokens.path(), problem))
        }
    }
}

impl Source {
    fn windows(&self, split: Split) -> u64 {
        match split {
            Split::Train => self.train.samples_per_epoch(),
            Split::Validation => self.validation.as_ref().map_or(0, SampleOrder::samples_per_epoch),
        }
    }

    fn new(tokens: Tokens, weight: u32, seq: usize, vocab: usize, seed: u64) -> Result<Self> {
        check_vocabulary(&tokens, vocab)?;
        let windows = |split| tokens.len(split).saturating_sub(1) / seq as u64;
        let too_short = |split| Error::TooShort {
            path: tokens.path().to_owned(),
            split,
            tokens: tokens.len(split),
            seq: seq as u64,
        };
        let (train, validation) = (windows(Split::Train), windows(Split::Validation));
        if train == 0 {
            return Err(too_short(Split::Train));
        }
        // Tokens of bytes always have both splits. Of others the validation split may be empty.
        if validation == 0 && (matches!(tokens, Tokens::File(..)) || tokens.len(Split::Validation) > 0) {
            return Err(too_short(Split::Validation));
        }
        Ok(Self {
            weight,
            train: SampleOrder::new(train, seed),
            validation: (validation > 0).then(|| SampleOrder::new(validation, VALIDATION_SEED)),
            tokens,
        })
    }
}

/// Fixed, so that all runs on the same text validate on the same windows.
pub(crate) const VALIDATION_SEED: u64 = 0;

#[cfg(test)]
mod tests;
