//! Samples and validation windows: the numbers that the model is fed.

use pillion_kernels::IGNORED;
use xxhash_rust::xxh3::Xxh3;

use crate::any::Tokens;
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

    /// Fills in sample `g` of the run; `inputs: [seq]`, `targets: [seq]`. Any `g` is valid: epochs
    /// follow each other, each in an order of its own. Targets that are masked are
    /// [`IGNORED`](pillion_kernels::IGNORED).
    ///
    /// # Errors
    /// [`Error::Read`] if a file can no longer be read; [`Error::Bad`] if a token is outside the
    /// vocabulary.
    ///
    /// # Panics
    /// If a slice does not hold `seq` tokens.
    pub fn fill(&self, g: u64, inputs: &mut [u32], targets: &mut [u32]) -> Result<()> {
        let (source, index) = self.train.place(g);
        let source = &self.sources[source];
        self.window(&source.tokens, Split::Train, source.train.index(index), inputs, targets)
    }

    /// Samples of a source in one pass over its train split.
    pub fn samples_per_epoch(&self, source: usize) -> u64 {
        self.sources[source].train.samples_per_epoch()
    }

    /// Windows of a split, of all sources.
    pub fn windows(&self, split: Split) -> u64 {
        self.sources.iter().map(|source| source.windows(split)).sum()
    }

    /// Fills in window `i` of a split, in the order of the text, source after source; `inputs: [seq]`,
    /// `targets: [seq]`.
    ///
    /// # Errors
    /// As for [`Dataset::fill`].
    ///
    /// # Panics
    /// If `i` is not below [`windows`](Self::windows), or a slice does not hold `seq` tokens.
    pub fn in_order(&self, split: Split, i: u64, inputs: &mut [u32], targets: &mut [u32]) -> Result<()> {
        let mut rest = i;
        for source in &self.sources {
            let windows = source.windows(split);
            if rest < windows {
                return self.window(&source.tokens, split, rest, inputs, targets);
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

    /// Fills in validation window `i`; `inputs: [seq]`, `targets: [seq]`.
    ///
    /// The windows come in a fixed shuffled order, the same for every seed, so the first `m` are a
    /// sample from the whole split: to validate on less, take fewer.
    ///
    /// # Errors
    /// As for [`Dataset::fill`].
    ///
    /// # Panics
    /// If `i` is not below [`validation_len`](Self::validation_len), or a slice does not hold `seq`
    /// tokens.
    pub fn validation(&self, i: u64, inputs: &mut [u32], targets: &mut [u32]) -> Result<()> {
        assert!(i < self.validation_len(), "validation window {i} of {}", self.validation_len());
        let (place, index) = self.validation.as_ref().expect("there are windows").place(i);
        let source = &self.sources[self.validates[place]];
        let window = source.validation.as_ref().expect("it validates").index(index);
        self.window(&source.tokens, Split::Validation, window, inputs, targets)
    }

    fn window(
        &self,
        tokens: &Tokens,
        split: Split,
        window: u64,
        inputs: &mut [u32],
        targets: &mut [u32],
    ) -> Result<()> {
        assert_eq!(inputs.len(), self.seq, "inputs hold one sequence");
        assert_eq!(targets.len(), self.seq, "targets hold one sequence");
        read_window(tokens, split, window, self.vocab, inputs, targets)
    }
}

/// Fills in window `window` of a split: `inputs: [seq]`, `targets: [seq]`.
///
/// # Errors
/// As for [`Dataset::fill`].
pub(crate) fn read_window(
    tokens: &Tokens,
    split: Split,
    window: u64,
    vocab: usize,
    inputs: &mut [u32],
    targets: &mut [u32],
) -> Result<()> {
    let seq = inputs.len();
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
    Ok(())
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
mod tests {
    use super::*;
    use crate::tokenizer::VOCAB;
    use crate::tokens::tests::token_file;
    use proptest::prelude::*;

    fn open(file: TokenFile, seq: usize, seed: u64) -> Result<Dataset> {
        Dataset::open(Tokens::of_file(file)?, seq, VOCAB, seed)
    }

    /// A split whose token `i` is a function of `i` that repeats late.
    fn tokens(len: usize) -> Vec<u16> {
        (0..len).map(|i| (i * i % 251) as u16).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn an_epoch_is_every_window_once(seq in 1usize..60, len in 2usize..6000, seed: u64) {
            // Long sequences also cross the read buffer's end.
            let seq = if seq > 50 { seq * 100 } else { seq };
            let len = len.max(seq + 1);
            let folder = tempfile::tempdir().unwrap();
            let text = tokens(len);
            let data =
                open(token_file(folder.path(), &text, &text), seq, seed).unwrap();
            let n = (len - 1) / seq;
            prop_assert_eq!(data.samples_per_epoch(0), n as u64);
            prop_assert_eq!(data.validation_len(), n as u64);

            let wide: Vec<u32> = text.iter().map(|&t| t.into()).collect();
            let mut expected: Vec<_> = (0..n)
                .map(|i| (wide[i * seq..][..seq].to_vec(), wide[i * seq + 1..][..seq].to_vec()))
                .collect();
            expected.sort();
            for validation in [false, true] {
                let mut seen = Vec::new();
                for g in 0..n as u64 {
                    let (mut inputs, mut targets) = (vec![0; seq], vec![0; seq]);
                    if validation {
                        data.validation(g, &mut inputs, &mut targets).unwrap();
                    } else {
                        data.fill(g + 3 * n as u64, &mut inputs, &mut targets).unwrap();
                    }
                    seen.push((inputs, targets));
                }
                seen.sort();
                prop_assert_eq!(&seen, &expected);
            }
        }
    }

    #[test]
    fn validation_windows_ignore_the_seed_and_samples_follow_it() {
        let folder = tempfile::tempdir().unwrap();
        let text = tokens(4001);
        let read = |seed| {
            let data = open(token_file(folder.path(), &text, &text), 8, seed).unwrap();
            let (mut inputs, mut targets) = ([0; 8], [0; 8]);
            data.fill(0, &mut inputs, &mut targets).unwrap();
            let sample = inputs;
            data.validation(0, &mut inputs, &mut targets).unwrap();
            (sample, inputs)
        };
        assert_eq!(read(1), read(1));
        assert_ne!(read(1).0, read(2).0);
        assert_eq!(read(1).1, read(2).1);
    }

    #[test]
    fn a_split_shorter_than_a_window_is_an_error_that_names_both_lengths() {
        let folder = tempfile::tempdir().unwrap();
        for (train, validation, split) in [(16, 17, "train"), (17, 16, "validation")] {
            let file = token_file(folder.path(), &tokens(train), &tokens(validation));
            let error = open(file, 16, 0).unwrap_err().to_string();
            let expected = format!("the {split} split of ");
            assert!(error.starts_with(&expected), "{error}");
            assert!(error.contains("has 16 tokens"), "{error}");
            assert!(error.contains("sequence of 16 needs 17"), "{error}");
            assert!(error.contains("--data PATH"), "{error}");
        }
        let file = token_file(folder.path(), &tokens(17), &tokens(17));
        assert_eq!(open(file, 16, 0).unwrap().samples_per_epoch(0), 1);
        let file = token_file(folder.path(), &[], &[]);
        assert!(matches!(open(file, 0, 0), Err(Error::EmptySequence)));
    }

    #[test]
    fn a_token_file_cut_short_under_a_run_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let data = open(token_file(folder.path(), &tokens(33), &tokens(33)), 16, 0).unwrap();
        std::fs::OpenOptions::new().write(true).open(data.bytes().unwrap().path()).unwrap().set_len(80).unwrap();
        let (mut inputs, mut targets) = ([0; 16], [0; 16]);
        let error = data.fill(0, &mut inputs, &mut targets).unwrap_err();
        assert!(matches!(error, Error::Read { .. }), "{error}");
    }

    #[test]
    fn a_mixture_sees_every_window_of_each_source_in_proportion() {
        let folders = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        // 30 and 20 windows of 4, whose tokens tell the source.
        let text = |windows: usize, of: u16| (0..=4 * windows).map(|i| 100 * of + (i % 90) as u16).collect::<Vec<_>>();
        let files = [(30, 0), (20, 1)].map(|(windows, of)| {
            let text = text(windows, of);
            token_file(folders[usize::from(of)].path(), &text, &text[..=4 * 5])
        });
        let sources = files.into_iter().zip([3, 1]).map(|(file, weight)| (Tokens::of_file(file).unwrap(), weight));
        let data = Dataset::mixed(sources.collect(), 4, VOCAB, 7).unwrap();
        let mut seen = [Vec::new(), Vec::new()];
        // Two epochs of the first source, one of the second.
        for g in 0..80 {
            let (mut inputs, mut targets) = ([0; 4], [0; 4]);
            data.fill(g, &mut inputs, &mut targets).unwrap();
            assert_eq!(inputs[1..], targets[..3]);
            seen[usize::from(inputs[0] >= 100)].push((inputs, targets[3]));
        }
        assert_eq!(seen.each_ref().map(Vec::len), [60, 20]);
        for (windows, repeats) in seen.iter_mut().zip([2, 1]) {
            windows.sort_unstable();
            assert!(windows.chunk_by(|a, b| a == b).all(|same| same.len() == repeats));
        }
        // Each has 5 windows to validate on; three of four are the first's, so of 8 windows 6 would be.
        assert_eq!(data.validation_len(), 7);
        let mut first = 0;
        for i in 0..7 {
            let (mut inputs, mut targets) = ([0; 4], [0; 4]);
            data.validation(i, &mut inputs, &mut targets).unwrap();
            first += usize::from(inputs[0] < 100);
        }
        assert_eq!(first, 5);
    }

    #[test]
    fn a_model_that_knows_too_few_tokens_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let file = token_file(folder.path(), &tokens(33), &tokens(33));
        let error = Dataset::open(Tokens::of_file(file).unwrap(), 16, 100, 0).unwrap_err().to_string();
        assert!(error.contains("has 257 different tokens, but the model knows 100"), "{error}");
    }
}
