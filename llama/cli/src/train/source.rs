//! Which tokens a run learns from: text prepared now, token files, or, where a run goes on, the
//! tokens that it began with.

use std::path::{Path, PathBuf};

use pillion_data::{Append, Dataset, Prepared, Split, Summary, TokenFile, Tokens, synthetic, tokenizer};
use serde::{Deserialize, Serialize};
use tempfile::TempDir;

use super::checkpoints::Progress;
use super::parts::{Part, Wanted, absolute};
use super::recipe::Recipe;
use crate::models::Origin;
use crate::settings::TrainArgs;
use crate::text::Vocabulary;
use crate::{Error, run_folder};

/// The tokens of a run.
pub(super) struct Source {
    pub(super) parts: Vec<Part>,
    /// Whether `--data` named them, instead of text.
    pub(super) is_given: bool,
    /// What `--data` said of text, absolute; none for the default text, and for tokens.
    pub(super) text: Option<PathBuf>,
    /// What to print of it.
    pub(super) said: Vec<String>,
}

/// Opens the tokens of a run, of which headers and indices alone are read.
///
/// # Errors
/// When one cannot be opened, is too short, does not fit the model, or does not say where its
/// documents begin and attention shall stay within them.
pub(super) fn open(parts: &[Part], recipe: &Recipe) -> Result<Dataset, Error> {
    cut(parts, recipe.seq, recipe.model.vocab_size, recipe.seed, recipe.document_attention)
}

/// Opens tokens and cuts them into samples of `seq` tokens, for a model that knows `vocab`.
///
/// # Errors
/// As for [`open`].
pub(crate) fn cut(
    parts: &[Part],
    seq: usize,
    vocab: usize,
    seed: u64,
    document_attention: bool,
) -> Result<Dataset, Error> {
    let opened = parts.iter().map(|part| Ok((Tokens::open(&part.path, None)?, part.weight)));
    let opened = opened.collect::<Result<Vec<_>, Error>>()?;
    let dataset = Dataset::mixed(opened, seq, vocab, seed)?;
    if document_attention {
        dataset.check_documents()?;
    }
    Ok(dataset)
}

/// A dataset's fingerprint, as checkpoints keep it.
pub(super) fn fingerprint(dataset: &Dataset) -> Result<String, Error> {
    Ok(hex(dataset.fingerprint()?))
}

pub(super) fn hex(fingerprint: u64) -> String {
    format!("{fingerprint:016x}")
}

/// What a model is evaluated on.
#[derive(Serialize, Deserialize)]
pub(crate) struct ToEvaluate {
    pub(crate) parts: Vec<Part>,
    /// Whether they are one text that the user gave, all of which is meant.
    pub(crate) is_text: bool,
}

/// What a model in a checkpoint is evaluated on by ranks on so many hosts. Text becomes tokens in a
/// folder that lasts as long as `made`.
///
/// # Errors
/// When there is no text, no tokenizer for it, or a host that would not see its tokens.
pub(crate) fn to_evaluate(
    data: &[String],
    checkpoint: &Path,
    origin: &Origin,
    hosts: usize,
    made: &mut Option<TempDir>,
) -> Result<ToEvaluate, Error> {
    let setting = |message: &str| Err(Error::Setting(message.to_owned()));
    let data = match Wanted::of(data)? {
        Wanted::Tokens(parts) => return Ok(ToEvaluate { parts, is_text: false }),
        Wanted::Text(path) if path == Path::new(synthetic::NAME) => {
            return setting("--data synthetic has no loss to compare: give text, or tokens");
        }
        Wanted::Text(path) => Some(path),
        Wanted::Default => None,
    };
    if hosts > 1 {
        return setting("--data is text, which becomes tokens on one host: give tokens that all hosts see");
    }
    let folder = tempfile::Builder::new().prefix("pillion-eval-").tempdir();
    let folder = made.insert(folder.map_err(|error| Error::file(std::env::temp_dir(), error))?).path();
    let is_text = data.is_some();
    let path = match (Vocabulary::of(checkpoint, origin)?, data) {
        (Vocabulary::Bytes, data) => pillion_data::prepare(data.as_deref(), folder)?.tokens.path().to_owned(),
        (Vocabulary::Subwords(_), None) => {
            return setting("--data is missing: give text, or tokens of `pillion tokenize`");
        }
        (Vocabulary::Subwords(tokenizer), Some(text)) => {
            let settings = pillion_data::Settings {
                tokenizer: tokenizer.path().to_owned(),
                data: vec![text],
                out: folder.to_owned(),
                field: None,
                lines: false,
                validation: 0.0,
                append: if tokenizer.end_of_sequence().is_some() { Append::End } else { Append::Nothing },
                shard_tokens: 1 << 27,
                threads: 0,
                skip_bad: false,
                restart: false,
            };
            pillion_data::tokenize_folder(&settings, &mut |_| true)?;
            folder.to_owned()
        }
    };
    Ok(ToEvaluate { parts: vec![Part { path, weight: 1 }], is_text })
}

/// Of a run that begins in the folder `out`.
///
/// # Errors
/// When there is no text, or the model knows too few tokens for it.
pub(super) fn of_new(data: &[String], recipe: &Recipe, out: &Path) -> Result<Source, Error> {
    match Wanted::of(data)? {
        Wanted::Default => of_text(None, recipe, out),
        Wanted::Text(path) => of_text(Some(&path), recipe, out),
        Wanted::Tokens(parts) => of_tokens(parts, recipe),
    }
}

fn of_text(data: Option<&Path>, recipe: &Recipe, out: &Path) -> Result<Source, Error> {
    let (cache, vocab) = (run_folder::tokens(out), recipe.model.vocab_size);
    let is_synthetic = data == Some(Path::new(synthetic::NAME));
    if is_synthetic && vocab > synthetic::LARGEST_VOCAB {
        let most = synthetic::LARGEST_VOCAB;
        return Err(Error::Setting(format!(
            "synthetic data has at most {most} different tokens, but the model knows {vocab}: choose another --model"
        )));
    }
    if is_synthetic && recipe.document_attention {
        let reason = "synthetic data has no documents: leave out --document-attention, or give text or tokens";
        return Err(Error::Setting(reason.to_owned()));
    }
    if !is_synthetic && vocab < tokenizer::VOCAB {
        let needed = tokenizer::VOCAB;
        return Err(Error::Setting(format!(
            "the model knows {vocab} tokens, but the text needs {needed}: choose another --model"
        )));
    }
    let Prepared { tokens, summary, .. } = match is_synthetic {
        true => pillion_data::prepare_synthetic(vocab, &cache)?,
        false => pillion_data::prepare(data, &cache)?,
    };
    check_vocabulary(&tokens, recipe)?;
    let parts = vec![Part { path: tokens.path().to_owned(), weight: 1 }];
    let text = data.map(|data| if is_synthetic { data.to_owned() } else { absolute(data) });
    Ok(Source { parts, is_given: false, text, said: vec![summary.to_string()] })
}

/// Checks that the model and the trigram model of text know every token of a file that we have made:
/// a file of its name from elsewhere may have others.
fn check_vocabulary(tokens: &TokenFile, recipe: &Recipe) -> Result<(), Error> {
    let most = if tokens.is_synthetic() { recipe.model.vocab_size } else { tokenizer::VOCAB };
    if tokens.vocab() <= most {
        return Ok(());
    }
    let found = tokens.vocab();
    let reason = format!("has a vocabulary of {found} tokens instead of {most}: remove it, and it is made again");
    Err(Error::file(tokens.path(), reason))
}

fn of_tokens(parts: Vec<Part>, recipe: &Recipe) -> Result<Source, Error> {
    let dataset = open(&parts, recipe)?;
    let total: u32 = parts.iter().map(|part| part.weight).sum();
    let said = dataset.sources().zip(&parts).map(|(tokens, part)| {
        let share = match parts.len() {
            1 => String::new(),
            _ => format!("{:.2} % of the samples from ", 100.0 * f64::from(part.weight) / f64::from(total)),
        };
        let (train, validation) = (tokens.len(Split::Train), tokens.len(Split::Validation));
        let documents = tokens.documents(Split::Train).map_or(String::new(), |count| format!(" of {count} documents"));
        let path = part.path.display();
        format!("tokens: {share}{path}: {train} train{documents}, {validation} validation")
    });
    Ok(Source { parts: parts.clone(), is_given: true, text: None, said: said.collect() })
}

/// Of a run that goes on in the folder `out`, from `checkpoint`. The run's own token file serves
/// it, whatever has become of the text since: a text that grew, moved or is gone stops no resume.
///
/// # Errors
/// [`Error::Setting`] when `--data` names another text, or the token file is gone and the text is
/// not what it was.
pub(super) fn of_resumed(
    settings: &TrainArgs,
    recipe: &Recipe,
    out: &Path,
    checkpoint: &Path,
    saved: &Progress,
) -> Result<Source, Error> {
    let wanted = Wanted::of(&settings.data)?;
    let parts = match (wanted, &saved.tokens[..]) {
        (Wanted::Default, []) => return of_resumed_text(None, recipe, out, checkpoint, saved),
        (Wanted::Text(path), []) => return of_resumed_text(Some(&path), recipe, out, checkpoint, saved),
        (Wanted::Default, tokens) => tokens.to_vec(),
        (Wanted::Tokens(parts), _) => parts,
        (Wanted::Text(path), _) => {
            let reason = format!("--data {} is text, but the run began with tokens: leave --data out", path.display());
            return Err(Error::Setting(reason));
        }
    };
    let source = of_tokens(parts, recipe)?;
    let found = fingerprint(&open(&source.parts, recipe)?)?;
    if found == saved.data {
        return Ok(source);
    }
    Err(Error::Setting(format!(
        "the checkpoint {} was made on other tokens (checksum {}, but these have {found}): give those that the run began \
         with, or start afresh without --resume",
        checkpoint.display(),
        saved.data,
    )))
}

fn of_resumed_text(
    wanted: Option<&Path>,
    recipe: &Recipe,
    out: &Path,
    checkpoint: &Path,
    saved: &Progress,
) -> Result<Source, Error> {
    let own = own(out, checkpoint, saved)?;
    let is_synthetic = |path: &Path| path == Path::new(synthetic::NAME);
    let meant = |path: &Path| if is_synthetic(path) { path.to_owned() } else { absolute(path) };
    let is_same = wanted.map(meant) == saved.data_path;
    let own = match own {
        Some(own) if wanted.is_none() => return own_source(&own, recipe, saved, Vec::new()),
        own => own,
    };
    let data = wanted.map(Path::to_owned).or(saved.data_path.clone());
    let found = of_text(data.as_deref(), recipe, out).and_then(|found| {
        let fingerprint = hex(TokenFile::open(&found.parts[0].path)?.fingerprint());
        Ok((found, fingerprint))
    });
    let found = match found {
        Ok((found, fingerprint)) if fingerprint == saved.data => return Ok(found),
        found => found.map(|(_, fingerprint)| fingerprint),
    };
    let text = data.as_ref().map_or("the default text".to_owned(), |data| data.display().to_string());
    match (own, found) {
        (Some(own), found) if is_same => {
            let what = match found {
                Ok(found) => format!("has changed (checksum {found}, was {})", saved.data),
                Err(error) => format!("cannot be read any more ({error})"),
            };
            let said = format!("{text} {what}: going on with the tokens that the run began with");
            own_source(&own, recipe, saved, vec![said])
        }
        (_, Err(error)) => Err(error),
        (own, Ok(found)) => {
            let remedy = match own {
                Some(_) => "leave --data out to go on with the run's own tokens",
                None => "the token file that the run began with is gone, so bring the text back as it was",
            };
            Err(Error::Setting(format!(
                "the checkpoint {} was made on other text (checksum {}, but {text} has {found}): {remedy}, or start afresh \
                 without --resume",
                checkpoint.display(),
                saved.data,
            )))
        }
    }
}

fn own_source(own: &TokenFile, recipe: &Recipe, saved: &Progress, mut said: Vec<String>) -> Result<Source, Error> {
    check_vocabulary(own, recipe)?;
    let description = match own.is_synthetic() {
        true => "the random tokens that the run began with",
        false => "the text that the run began with",
    };
    said.push(Summary::of(own, description.to_owned()).to_string());
    let parts = vec![Part { path: own.path().to_owned(), weight: 1 }];
    Ok(Source { parts, is_given: false, text: saved.data_path.clone(), said })
}

/// The token file that a run began with, which lies in its folder; copied into `out` where that is
/// another one.
fn own(out: &Path, checkpoint: &Path, saved: &Progress) -> Result<Option<TokenFile>, Error> {
    // A fingerprint is a hexadecimal number; no token file has any other.
    let Ok(fingerprint) = u64::from_str_radix(&saved.data, 16) else { return Ok(None) };
    let here = run_folder::tokens(out);
    let run = checkpoint.canonicalize().ok().and_then(|path| Some(path.parent()?.parent()?.to_owned()));
    // A run that was set aside has left its tokens a folder above.
    let folders = run.iter().flat_map(|run| [Some(run.as_path()), run.parent()]).flatten().map(run_folder::tokens);
    if let Some(found) = pillion_data::find(fingerprint, std::slice::from_ref(&here))? {
        return Ok(Some(found));
    }
    let Some(elsewhere) = pillion_data::find(fingerprint, &folders.collect::<Vec<_>>())? else { return Ok(None) };
    Ok(Some(elsewhere.copy_into(&here)?))
}
