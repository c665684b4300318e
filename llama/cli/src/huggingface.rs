//! `pillion import` and `pillion export`: models from and for Hugging Face's transformers.

use indicatif::{ProgressBar, ProgressStyle};
use pillion_collectives::launcher;
use pillion_data::tokenizer;
use pillion_llama::huggingface::{self, CONFIG, Export, Source, parse_config, write_config};
use pillion_runtime::checkpoint::Checkpoint;
use serde_json::{Map, Value};

use crate::models::{self, Companion, Origin, TOKENIZER};
use crate::run_folder::{self, RunFolder};
use crate::settings::{ExportArgs, ImportArgs, dtype};
use crate::signals::{self, Second};
use crate::train::{bytes, grouped, on_terminal, stopping};
use crate::{Error, print_result};

/// `pillion import`.
///
/// # Errors
/// When the folder is no model that Pillion computes, or the checkpoint cannot be written; nothing
/// is left then.
pub(crate) fn import(settings: &ImportArgs) -> Result<i32, Error> {
    let source = Source::open(&settings.folder)?;
    let files = models::files_in(&settings.folder)?;
    let folder = RunFolder::claim(&settings.out)?;
    folder.check(false)?;
    if let Some(aside) = folder.set_aside(None, false)? {
        crate::print(format_args!("the earlier run in {} is now {}", settings.out.display(), aside.display()));
    }
    let stop = signals::flag(Second::Ends)?;
    // The checkpoint counts once it is there, so what goes with it comes first.
    models::keep(&files, &settings.out)?;
    let bar = bar(source.bytes());
    let checkpoints = run_folder::checkpoints(&settings.out);
    let imported = huggingface::import(&source, &checkpoints, |more| {
        bar.inc(more);
        !stopping(&stop)
    });
    bar.finish_and_clear();
    let path = match imported {
        Ok(path) => path,
        Err(error) => {
            models::forget(&files, &settings.out);
            // It goes only if nothing is in it.
            let _ = std::fs::remove_dir(&checkpoints);
            return interrupted(error);
        }
    };
    let parameters = parameters(&source);
    let (has_tokenizer, stored) = (files.iter().any(|(name, _)| name == TOKENIZER), source.dtype());
    let tokenizer = if has_tokenizer { "" } else { "; there is no tokenizer.json" };
    let left_out = match source.left_out.first() {
        Some(name) => format!("; {name} follows from other tensors and was left out"),
        None => String::new(),
    };
    print_result(format_args!(
        "{parameters} parameters in {stored}{tokenizer}{left_out}\ncheckpoint  {}",
        path.display()
    ))?;
    Ok(0)
}

/// The exit code where a signal has ended it; any other error is one.
fn interrupted(error: huggingface::Error) -> Result<i32, Error> {
    let huggingface::Error::Stopped = error else { return Err(error.into()) };
    crate::complain("interrupted: nothing of it is left");
    Ok(launcher::EXIT_INTERRUPTED)
}

fn parameters(source: &Source) -> String {
    grouped(source.config.layout(1).parameters() as u64)
}

/// `pillion export`.
///
/// # Errors
/// When there is no whole checkpoint, or the folder cannot be written; nothing is left then.
pub(crate) fn export(settings: &ExportArgs) -> Result<i32, Error> {
    // What it reads is verified while it is written.
    let checkpoint = &models::first(&settings.checkpoint)?;
    let origin = Origin::of(checkpoint)?;
    let (model, imported) = (
        origin.model(),
        match &origin {
            // Types that are not asked for are those that the model came with.
            Origin::Imported(imported) if settings.dtype.is_none() => Some(imported),
            _ => None,
        },
    );
    let default = match &origin {
        Origin::Run(progress) => dtype(&progress.recipe.precision),
        Origin::Imported(_) => checkpoint.manifest.stored(),
    };
    let as_what = settings.dtype.unwrap_or(default);
    let mut companions = companions(checkpoint, &origin)?;
    let original = take_config(&mut companions);
    let seq = origin.seq();
    let original = original.or_else(|| seq.map(|seq| fresh(seq, origin.has_bytes())));
    companions.push((CONFIG.to_owned(), write_config(model, original.as_ref(), as_what).into_bytes()));
    let has_tokenizer = companions.iter().any(|(name, _)| name == TOKENIZER);
    let parameters = model.layout(1).parameters() as u64;
    let bar = bar(parameters * as_what.bytes() as u64);
    let wanted =
        Export { checkpoint, imported, dtype: as_what, file_bytes: settings.file_size, companions: &companions };
    let stop = signals::flag(Second::Ends)?;
    let exported = huggingface::export(&wanted, &settings.to, |more| {
        bar.inc(more);
        !stopping(&stop)
    });
    bar.finish_and_clear();
    if let Err(error) = exported {
        return interrupted(error);
    }
    let tokenizer = if has_tokenizer { "" } else { "; there is no tokenizer beside the checkpoint" };
    print_result(format_args!(
        "{} parameters of {} in {as_what}, {}{tokenizer}\nmodel       {}",
        grouped(parameters),
        checkpoint.path.display(),
        bytes(parameters * as_what.bytes() as u64),
        settings.to.display()
    ))?;
    Ok(0)
}

/// Files beside the weights: those that the run keeps, or the tokenizer of bytes.
fn companions(checkpoint: &Checkpoint, origin: &Origin) -> Result<Vec<Companion>, Error> {
    let kept = models::companions(&checkpoint.path)?;
    if kept.is_empty() && origin.has_bytes() {
        let files = tokenizer::huggingface_files().map(|(name, text)| (name.to_owned(), text.into_bytes()));
        return Ok(files.into());
    }
    Ok(kept)
}

/// Takes the configuration that the model began with out of the other files. One of another model
/// would say nothing of this one.
fn take_config(companions: &mut Vec<Companion>) -> Option<Map<String, Value>> {
    let index = companions.iter().position(|(name, _)| name == CONFIG)?;
    let (_, text) = companions.remove(index);
    let text = String::from_utf8(text).ok()?;
    parse_config(&text).ok()?;
    serde_json::from_str(&text).ok()
}

/// What a configuration says besides the shape, of a model that began here.
fn fresh(seq: usize, is_of_bytes: bool) -> Map<String, Value> {
    let mut map = Map::new();
    map.insert("max_position_embeddings".to_owned(), seq.into());
    let end = if is_of_bytes { Value::from(tokenizer::END) } else { Value::Null };
    // Without a value transformers takes 1 and 2.
    for key in ["bos_token_id", "eos_token_id"] {
        map.insert(key.to_owned(), end.clone());
    }
    map
}

fn bar(bytes: u64) -> ProgressBar {
    if !on_terminal() {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("{wide_bar} {bytes}/{total_bytes} {bytes_per_sec}").expect("a template");
    ProgressBar::new(bytes).with_style(style)
}
