//! What a run is validated on, and its loss there, over the ranks.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use pillion_collectives::Reduction;
use pillion_data::{Batch, Dataset, Prepared, Row, Tokens, ValidationSet, synthetic};
use pillion_llama::model::Model;
use pillion_runtime::Engine;
use serde::{Deserialize, Serialize};

use super::parts::{absolute, holds_tokens};
use super::recipe::Recipe;
use super::{source, tokenizers};
use crate::{Error, run_folder};

/// Data to validate on besides those of `--data`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ValidationData {
    /// What its loss is called.
    pub name: String,
    /// Text, or tokens.
    pub path: PathBuf,
    /// Whether both splits of a token file are meant, because a run has made it of text.
    #[serde(default)]
    pub all: bool,
}

impl FromStr for ValidationData {
    type Err = String;

    /// Reads `NAME=PATH`, or a path whose name without its ending is the name.
    fn from_str(text: &str) -> Result<ValidationData, String> {
        let whole = Path::new(text);
        let named = text.split_once('=').filter(|_| !whole.exists());
        let (name, path) = match named {
            Some((name, path)) => (name.to_owned(), Path::new(path)),
            None => (whole.file_stem().unwrap_or_default().to_string_lossy().into_owned(), whole),
        };
        if name.trim().is_empty() || path.as_os_str().is_empty() {
            return Err("write NAME=PATH, such as books=tokens/books".to_owned());
        }
        if name.chars().any(char::is_control) {
            return Err(format!("the name {name:?} has a control character: write NAME=PATH with another one"));
        }
        Ok(ValidationData { name, path: path.to_owned(), all: false })
    }
}

/// A set of `--validation-data` as rank 0 has found it.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Found {
    name: String,
    /// Tokens.
    path: PathBuf,
    /// Whether both splits are used, because both are of the text that the user gave.
    all: bool,
    /// Samples that are used: a multiple of the micro-batch.
    samples: u64,
    /// Of the tokens.
    fingerprint: String,
}

impl Found {
    /// As a run that goes on is given it: with the tokens that it was found to have.
    pub(super) fn as_given(&self) -> ValidationData {
        ValidationData { name: self.name.clone(), path: self.path.clone(), all: self.all }
    }

    /// What tells a loss on it from others.
    pub(super) fn identity(&self) -> String {
        format!("{} samples of {}", self.samples, self.fingerprint)
    }
}

/// Finds the sets, with at most `most` samples each. Text becomes tokens in the run's folder `out`.
///
/// # Errors
/// When there is nothing to read, a set is too short, or has tokens of another kind than the run's.
pub(super) fn find(
    wanted: &[ValidationData],
    most: u64,
    recipe: &Recipe,
    dataset: &Dataset,
    out: &Path,
) -> Result<Vec<Found>, Error> {
    let of_bytes = dataset.bytes().is_some_and(|tokens| !tokens.is_synthetic());
    let mut found: Vec<Found> = Vec::new();
    for set in wanted {
        let ValidationData { name, path, .. } = set;
        if found.iter().any(|other| other.name == *name) {
            return Err(Error::Setting(format!("--validation-data has {name} twice: name one of them NAME=PATH")));
        }
        let is_text = !holds_tokens(path);
        if path == Path::new(synthetic::NAME) || (is_text && !of_bytes) {
            let what = if of_bytes { "random tokens" } else { "text, but the run's tokens are no bytes of text" };
            return Err(Error::Setting(format!(
                "--validation-data {} is {what}: give tokens, which `pillion tokenize` makes",
                path.display()
            )));
        }
        found.push(find_one(set, is_text, most, recipe, dataset, out).map_err(|error| of_set(name, error))?);
    }
    Ok(found)
}

fn find_one(
    set: &ValidationData,
    is_text: bool,
    most: u64,
    recipe: &Recipe,
    dataset: &Dataset,
    out: &Path,
) -> Result<Found, Error> {
    let ValidationData { name, path, all } = set;
    let (all, path) = match is_text {
        true => {
            let Prepared { tokens, .. } = pillion_data::prepare(Some(path), &run_folder::tokens(out))?;
            (true, tokens.path().to_owned())
        }
        false => (*all, absolute(path)),
    };
    let tokens = Tokens::open(&path, None)?;
    tokenizers::check_same_tokenizer(dataset, &tokens)?;
    let fingerprint = source::hex(tokens.fingerprint()?);
    let opened = ValidationSet::open(tokens, all, recipe.seq, recipe.model.vocab_size)?;
    if recipe.document_attention {
        opened.check_documents()?;
    }
    let samples = most.min(opened.len()) / recipe.micro_batch * recipe.micro_batch;
    if samples == 0 {
        let (has, needs) = (opened.len(), recipe.micro_batch);
        return Err(Error::Setting(format!(
            "it has {has} samples, but a micro-batch has {needs}: use a smaller --micro-batch, or more data"
        )));
    }
    Ok(Found { name: name.clone(), path, all, samples, fingerprint })
}

/// An error of the set of this name: what errors of data say of --data is meant of it.
fn of_set(name: &str, error: Error) -> Error {
    let flag = format!("--validation-data {name}");
    match error {
        Error::Data(error) => {
            let text = error.to_string().replace("--data ", "--validation-data ");
            Error::file(flag, text.strip_prefix("--validation-data ").unwrap_or(&text))
        }
        Error::Setting(text) => {
            let text = text.strip_prefix("--validation-data ").unwrap_or(&text);
            Error::Setting(format!("{flag}: {text}"))
        }
        error => error,
    }
}

/// What a run is validated on.
pub(super) struct Validation {
    /// Samples of the run's own data; 0 where they have none.
    own: u64,
    sets: Vec<(String, ValidationSet, u64)>,
}

/// The losses of a validation, in nats a token.
#[derive(Clone, Debug)]
pub(super) struct Losses {
    /// On the run's own data; where they have no validation split, on the first set.
    pub(super) main: f64,
    /// On each set; none where it is not finite.
    pub(super) sets: BTreeMap<String, Option<f64>>,
}

impl Validation {
    /// Opens what rank 0 has found.
    ///
    /// # Errors
    /// When tokens cannot be opened here.
    pub(super) fn open(own: u64, found: &[Found], recipe: &Recipe) -> Result<Validation, Error> {
        let open = |found: &Found| {
            let tokens = Tokens::open(&found.path, None)?;
            let set = ValidationSet::open(tokens, found.all, recipe.seq, recipe.model.vocab_size)?;
            Ok((found.name.clone(), set, found.samples))
        };
        Ok(Validation { own, sets: found.iter().map(open).collect::<Result<_, Error>>()? })
    }

    /// Samples that the main loss is on.
    pub(super) fn samples(&self) -> u64 {
        if self.own > 0 { self.own } else { self.sets[0].2 }
    }

    /// Compares the files of the sets with what they were.
    ///
    /// # Errors
    /// When one has changed.
    pub(super) fn check_unchanged(&self) -> Result<(), Error> {
        Ok(self.sets.iter().try_for_each(|(_, set, _)| set.check_unchanged())?)
    }

    /// The losses of the model. Collective.
    ///
    /// # Errors
    /// When data cannot be read, all tokens of a set are masked, or another rank has failed.
    pub(super) fn losses(
        &self,
        engine: &mut Engine,
        model: &mut Model,
        dataset: &Dataset,
        recipe: &Recipe,
    ) -> Result<Losses, Error> {
        let mut of = |samples, fill: Fill<'_>| mean_loss(engine, model, samples, recipe, fill);
        let own = match self.own {
            0 => None,
            samples => Some(of(samples, &|i, row| dataset.validation(i, row))?),
        };
        let mut losses = Vec::new();
        for (name, set, samples) in &self.sets {
            let loss = of(*samples, &|i, row| set.fill(i, row)).map_err(|error| of_set(name, error))?;
            losses.push((name.clone(), loss));
        }
        let main = own.or(losses.first().map(|(_, loss)| *loss)).expect("there is something to validate on");
        let sets = losses.into_iter().map(|(name, loss)| (name, loss.is_finite().then_some(loss)));
        Ok(Losses { main, sets: sets.collect() })
    }
}

/// Fills in the window of this number.
type Fill<'f> = &'f dyn Fn(u64, Row<'_>) -> pillion_data::Result<()>;

/// Mean loss, in nats a token, of the first `samples` windows, dealt to ranks by the recipe's
/// micro-batches, of which `samples` is a multiple. The same on every rank.
fn mean_loss(
    engine: &mut Engine,
    model: &mut Model,
    samples: u64,
    recipe: &Recipe,
    fill: Fill<'_>,
) -> Result<f64, Error> {
    let communicator = engine.communicator().clone();
    let (rank, world) = (communicator.rank() as u64, communicator.world() as u64);
    let (micro_batch, document_attention) = (recipe.micro_batch, recipe.document_attention);
    let micro_batches = samples / micro_batch;
    let rounds = micro_batches.div_ceil(world);
    let mut batch = Batch::new(micro_batch as usize, recipe.seq, document_attention);
    let mut step = engine.begin_evaluation(rounds as usize)?;
    for round in 0..rounds {
        let index = round * world + rank;
        if index >= micro_batches {
            step.idle_round()?;
            continue;
        }
        for (window, row) in (index * micro_batch..).zip(batch.rows()) {
            fill(window, row)?;
        }
        model.evaluate(&mut step, &batch.inputs, &batch.targets, batch.documents().as_ref())?;
    }
    step.end()?;
    let (loss, tokens) = model.take_loss(engine.stream())?;
    let mut sums = [loss, tokens];
    communicator.all_reduce_scalars(&mut sums, Reduction::Sum)?;
    if sums[1] == 0.0 {
        let reason = "all tokens of the validation samples are masked: give more --validation-samples, or other data";
        return Err(Error::Setting(reason.to_owned()));
    }
    Ok(sums[0] / sums[1])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_set_has_the_name_that_it_is_given_or_that_of_its_file() {
        let read = |text: &str| text.parse::<ValidationData>().map(|set| (set.name, set.path));
        assert_eq!(read("books=a/b.txt"), Ok(("books".to_owned(), PathBuf::from("a/b.txt"))));
        assert_eq!(read("a/b.txt"), Ok(("b".to_owned(), PathBuf::from("a/b.txt"))));
        for wrong in ["", "=a", "books=", "/", ".."] {
            assert!(read(wrong).unwrap_err().contains("NAME=PATH"), "{wrong}");
        }
        let folder = tempfile::tempdir().unwrap();
        let odd = folder.path().join("x=y.txt");
        std::fs::write(&odd, "text").unwrap();
        assert_eq!(read(odd.to_str().unwrap()), Ok(("x=y".to_owned(), odd)));
    }
}
