//! `pillion import` and `pillion export`: models from and for Hugging Face's transformers.

use std::path::{Path, PathBuf};

use indicatif::{ProgressBar, ProgressStyle};
use pillion_collectives::launcher;
use pillion_data::{Tokenizer, tokenizer};
use pillion_llama::huggingface::{self, CONFIG, Export, Source, parse_config, write_config};
use pillion_runtime::checkpoint::Checkpoint;
use serde_json::{Map, Value};

use crate::models::{self, Companion, Origin, TOKENIZER};
use crate::run_folder::{self, RunFolder};
use crate::settings::{ExportArgs, ImportArgs, dtype};
use crate::signals::{self, Second};
use crate::text::Vocabulary;
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
    check_tokenizer(&settings.folder, &files)?;
    let stop = signals::flag(Second::Ends)?;
    let bar = bar(source.bytes());
    // An earlier run stays in its place until all is on the disk.
    let begun = run_folder::unfinished(&settings.out, "import");
    let imported = huggingface::import(&source, &begun, |more| {
        bar.inc(more);
        !stopping(&stop)
    });
    bar.finish_and_clear();
    let imported = match imported {
        Ok(path) => path,
        Err(error) => {
            // It goes only if nothing is in it.
            let _ = std::fs::remove_dir(&begun);
            return interrupted(error);
        }
    };
    let path = put_in_place(&folder, &files, &imported, &settings.out);
    let path = path.inspect_err(|_| drop(std::fs::remove_dir_all(&begun)))?;
    let _ = std::fs::remove_dir(&begun);
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

/// Sets an earlier run aside, and gives an imported checkpoint its place, which is returned.
fn put_in_place(folder: &RunFolder, files: &[Companion], imported: &Path, out: &Path) -> Result<PathBuf, Error> {
    folder.set_aside(None, false)?;
    // The checkpoint counts once it is there, so what goes with it comes first.
    models::keep(files, out)?;
    let checkpoints = run_folder::checkpoints(out);
    let path = checkpoints.join(imported.file_name().expect("a checkpoint has a name"));
    let sync = |folder: &Path| std::fs::File::open(folder).and_then(|folder| folder.sync_all());
    let moved = std::fs::create_dir_all(&checkpoints).and_then(|()| std::fs::rename(imported, &path));
    let moved = moved.and_then(|()| sync(&checkpoints));
    moved.map_err(|error| Error::file(&path, format!("cannot get its place: {error}: choose another --out")))?;
    Ok(path)
}

/// Checks that the tokenizer of a folder, where there is one, can be used.
fn check_tokenizer(folder: &Path, files: &[Companion]) -> Result<(), Error> {
    if files.iter().any(|(name, _)| name == TOKENIZER) {
        Tokenizer::load(folder)?;
    }
    Ok(())
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
    let ends = ends(checkpoint, &origin)?;
    let original = original.or_else(|| seq.map(|seq| fresh(seq, ends)));
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

/// The tokens that begin and end a text of a model that began here.
fn ends(checkpoint: &Checkpoint, origin: &Origin) -> Result<[Option<u32>; 2], Error> {
    if origin.has_bytes() {
        return Ok([Some(u32::from(tokenizer::END)); 2]);
    }
    let run = run_folder::of_checkpoint(&checkpoint.path);
    match run.map(|run| Vocabulary::in_run(&run, false)).transpose()?.flatten() {
        Some(Vocabulary::Subwords(tokenizer)) => Ok([tokenizer.begin_of_sequence(), tokenizer.end_of_sequence()]),
        _ => Ok([None; 2]),
    }
}

/// What a configuration says besides the shape, of a model that began here.
fn fresh(seq: usize, [begin, end]: [Option<u32>; 2]) -> Map<String, Value> {
    let mut map = Map::new();
    map.insert("max_position_embeddings".to_owned(), seq.into());
    // Without a value transformers takes 1 and 2.
    map.insert("bos_token_id".to_owned(), begin.into());
    map.insert("eos_token_id".to_owned(), end.into());
    map
}

fn bar(bytes: u64) -> ProgressBar {
    if !on_terminal() {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("{wide_bar} {bytes}/{total_bytes} {bytes_per_sec}").expect("a template");
    ProgressBar::new(bytes).with_style(style)
}
