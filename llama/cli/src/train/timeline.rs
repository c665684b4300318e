//! `trace.json`: what every rank did and when. Each rank writes a timeline of its own, step by step; at the end rank 0 joins them.

use std::fs::File;
use std::io::{BufReader, BufWriter};
use std::path::{Path, PathBuf};

use pillion_collectives::Communicator;
use pillion_runtime::Engine;
use pillion_runtime::trace::TraceWriter;

use super::start::on_rank_zero_alone;
use crate::{Error, run_folder};

/// This rank's part, open.
pub(crate) struct Timeline {
    out: PathBuf,
    folder: PathBuf,
    path: PathBuf,
    writer: TraceWriter<BufWriter<File>>,
    /// Why there is no more of it.
    failed: Option<Error>,
}

impl Timeline {
    /// Begins to record. Collective; `out` is the run's folder.
    pub(crate) fn begin(out: &Path, communicator: &Communicator, engine: &mut Engine) -> Result<Timeline, Error> {
        let folder = run_folder::unfinished(out, "trace");
        let path = part(&folder, communicator.rank());
        let create = || {
            std::fs::create_dir_all(&folder)?;
            TraceWriter::new(BufWriter::new(File::create(&path)?))
        };
        let writer = create().map_err(|error| Error::file(&path, error))?;
        engine.record(true)?;
        Ok(Timeline { out: out.to_owned(), folder, path, writer, failed: None })
    }

    /// Writes what the engine has recorded by now. Training goes on without a timeline; [`Timeline::finish`] says why there is none.
    pub(crate) fn write(&mut self, engine: &mut Engine) {
        let events = engine.recorded();
        if self.failed.is_none() {
            self.failed = self.writer.write(&events).map_err(|error| Error::file(&self.path, error)).err();
        }
    }

    /// Ends it, once the device has run everything, and joins those of all ranks. Collective;
    /// returns the path of the whole, or, on every rank, why there is none.
    pub(crate) fn finish(
        mut self,
        communicator: &Communicator,
        engine: &mut Engine,
    ) -> Result<Result<PathBuf, Error>, Error> {
        engine.stream().synchronize().map_err(pillion_runtime::Error::from)?;
        self.write(engine);
        let Timeline { out, folder, path, writer, failed } = self;
        let mine = failed.map_or(Ok(()), Err);
        let mine = mine.and_then(|()| writer.finish().map_err(|error| Error::file(&path, error)));
        let failed = communicator.all_gather_scalars(&[u64::from(mine.is_err())])?;
        if let Some(rank) = failed.iter().position(|flag| flag[0] != 0) {
            return Ok(Err(mine.err().unwrap_or_else(|| {
                Error::file(&folder, format!("rank {rank} could not write its part: make room, or leave --trace out"))
            })));
        }
        let whole = run_folder::trace(&out);
        let joined = on_rank_zero_alone(communicator, || Ok(join(&folder, &whole, communicator.world())))?;
        Ok(joined.unwrap_or(Ok(())).map(|()| whole))
    }
}

/// Writes the parts of all ranks into one file, and removes them.
fn join(folder: &Path, whole: &Path, world: usize) -> Result<(), Error> {
    let file = File::create(whole).and_then(|file| TraceWriter::new(BufWriter::new(file)));
    let mut writer = file.map_err(|error| Error::file(whole, error))?;
    for rank in 0..world {
        let path = part(folder, rank);
        let append = File::open(&path).and_then(|part| writer.append(BufReader::new(part)));
        append.map_err(|error| Error::file(&path, error))?;
    }
    writer.finish().map_err(|error| Error::file(whole, error))?;
    for rank in 0..world {
        let path = part(folder, rank);
        std::fs::remove_file(&path).map_err(|error| Error::file(&path, error))?;
    }
    // Something else may lie in it.
    let _ = std::fs::remove_dir(folder);
    Ok(())
}

fn part(folder: &Path, rank: usize) -> PathBuf {
    folder.join(format!("rank-{rank:04}.json"))
}
