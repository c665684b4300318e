//! Reads a run's `metrics.jsonl`, also while the run writes it.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use pillion_collectives::limits::explain;

use super::metrics::Line;
use crate::{Error, run_folder};

/// Bytes of a line at most; a run writes about a thousand.
const LONGEST: u64 = 1 << 16;

/// The lines of a run's metrics, one after another.
pub(crate) struct Lines {
    path: PathBuf,
    reader: BufReader<File>,
    /// Lines read.
    count: u64,
    /// The beginning of a line whose end is not written yet.
    begun: Vec<u8>,
    /// Whether the last line was damaged, so that only a run that was killed can have written it.
    cut: bool,
    /// Of the line before.
    step: u64,
}

impl Lines {
    /// Opens those of the run in `folder`.
    ///
    /// # Errors
    /// [`Error::File`] when there are none.
    pub(crate) fn open(folder: &Path) -> Result<Lines, Error> {
        let path = run_folder::metrics(folder);
        if !folder.is_dir() {
            return Err(Error::file(folder, "there is no such folder: give the folder of a run, its --out"));
        }
        let file = File::open(&path).map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => {
                Error::file(folder, "no run has written metrics.jsonl here: give the folder of a run, its --out")
            }
            _ => Error::file(&path, explain(&error)),
        })?;
        Ok(Lines { path, reader: BufReader::new(file), count: 0, begun: Vec::new(), cut: false, step: 0 })
    }

    /// The next whole line; none at the end of the file, where a later call goes on once the run
    /// has written more.
    ///
    /// # Errors
    /// [`Error::File`] when the file cannot be read, or a line in it is no step that follows the
    /// one before. The file's last line may be damaged, because a run that is killed leaves such a
    /// line; [`Lines::is_cut`] tells.
    pub(crate) fn next(&mut self) -> Result<Option<Line>, Error> {
        let fail = |path: &Path, error: std::io::Error| Error::file(path, explain(&error));
        let room = (LONGEST + 1).saturating_sub(self.begun.len() as u64);
        let read = self.reader.by_ref().take(room).read_until(b'\n', &mut self.begun);
        read.map_err(|error| fail(&self.path, error))?;
        if self.begun.len() as u64 > LONGEST {
            return Err(self.foreign(format_args!("is longer than {LONGEST} bytes")));
        }
        if self.begun.last() != Some(&b'\n') {
            return Ok(None);
        }
        let line = std::mem::take(&mut self.begun);
        let parsed: Line = match serde_json::from_slice(&line) {
            Ok(parsed) => parsed,
            Err(error) => {
                let is_last = self.reader.fill_buf().map_err(|error| fail(&self.path, error))?.is_empty();
                if is_last && run_folder::begins_as_metrics(&String::from_utf8_lossy(&line)) {
                    self.cut = true;
                    return Ok(None);
                }
                return Err(self.foreign(format_args!("is no step of a run ({error})")));
            }
        };
        if parsed.step <= self.step {
            return Err(self.foreign(format_args!("has step {} after step {}", parsed.step, self.step)));
        }
        (self.count, self.step) = (self.count + 1, parsed.step);
        Ok(Some(parsed))
    }

    fn foreign(&self, why: std::fmt::Arguments) -> Error {
        let number = self.count + 1;
        Error::file(&self.path, format!("line {number} {why}: remove this line, or leave the run out"))
    }

    /// Whether the file ends in the middle of a line, or with a damaged one.
    pub(crate) fn is_cut(&self) -> bool {
        self.cut || !self.begun.is_empty()
    }

    /// Whether these are still the lines that the run has: a resume writes another file.
    pub(crate) fn are_current(&self) -> bool {
        let of = |metadata: std::fs::Metadata| (metadata.dev(), metadata.ino());
        let here = self.reader.get_ref().metadata().map(of).ok();
        here.is_some() && here == std::fs::metadata(&self.path).map(of).ok()
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::io::Write;

    use super::*;

    /// A line of metrics as a run writes it, with a newline.
    pub(crate) fn line(step: u64, loss: f64) -> String {
        let line = serde_json::json!({
            "loss": loss, "lr": 0.001, "grad_norm": 1.0, "batch_samples": 8, "batch_tokens": 256,
            "samples_seen": 8 * step, "tokens_per_s": 1000.0, "step_ms": 250.0, "exposed_ms": 10.0, "bytes_sent": 64,
            "collectives": 9, "noise_scale": 20.0, "wanted_batch": null, "mfu": 0.5, "memory": 1 << 26,
            "validation_loss": if step.is_multiple_of(10) { Some(loss + 0.1) } else { None }, "flops": 1e9,
        });
        format!("{{\"step\":{step},{}\n", &line.to_string()[1..])
    }

    /// A folder with these metrics.
    pub(crate) fn folder(text: &str) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("metrics.jsonl"), text).unwrap();
        folder
    }

    fn all(text: &str) -> Result<(usize, bool), String> {
        let folder = folder(text);
        let mut lines = Lines::open(folder.path()).map_err(|error| error.to_string())?;
        let mut count = 0;
        while lines.next().map_err(|error| error.to_string())?.is_some() {
            count += 1;
        }
        Ok((count, lines.is_cut()))
    }

    #[test]
    fn a_line_that_a_killed_run_was_writing_is_passed_over() {
        let two = line(1, 5.0) + &line(2, 4.0);
        assert_eq!(all(&two), Ok((2, false)));
        assert_eq!(all(""), Ok((0, false)));
        for cut in 1..line(3, 3.0).len() {
            assert_eq!(all(&(two.clone() + &line(3, 3.0)[..cut])), Ok((2, true)));
        }
        assert_eq!(all(&(two.clone() + "{\"step\":3,\"lo\n")), Ok((2, true)));
    }

    #[test]
    fn other_damage_is_an_error_that_names_the_line() {
        let one = line(1, 5.0);
        for (text, words) in [
            (one.clone() + "nonsense\n", "line 2 is no step"),
            (one.clone() + "{\"step\":2,\"lo\n" + &line(3, 1.0), "line 2 is no step"),
            (one.clone() + &line(2, 1.0).replace("1.0", "NaN") + &line(3, 1.0), "line 2 is no step"),
            (one.clone() + &line(2, 1.0).replace("\"loss\":1.0", "\"loss\":null") + &line(3, 1.0), "null"),
            (one.clone() + &one, "line 2 has step 1 after step 1"),
            ("[]\n".to_owned() + &one, "line 1 is no step"),
            ("x".repeat(1 << 20), "line 1 is longer than"),
            (one.clone() + "\u{0}\u{0}\n" + &one, "line 2"),
        ] {
            let error = all(&text).unwrap_err();
            assert!(error.contains(words) && error.contains("metrics.jsonl: "), "{error}");
            assert!(error.contains("remove this line"), "{error}");
        }
    }

    #[test]
    fn lines_that_are_written_later_follow() {
        let folder = folder(&line(1, 5.0));
        let mut lines = Lines::open(folder.path()).unwrap();
        assert_eq!(lines.next().unwrap().unwrap().step, 1);
        assert!(lines.next().unwrap().is_none());
        let path = folder.path().join("metrics.jsonl");
        let mut file = File::options().append(true).open(&path).unwrap();
        for piece in [&line(2, 4.0)[..20], &line(2, 4.0)[20..]] {
            assert!(lines.next().unwrap().is_none());
            file.write_all(piece.as_bytes()).unwrap();
        }
        assert_eq!(lines.next().unwrap().unwrap().loss, 4.0);
        assert!(!lines.is_cut() && lines.are_current());
        std::fs::rename(&path, folder.path().join("other")).unwrap();
        assert!(!lines.are_current());
        std::fs::write(&path, "").unwrap();
        assert!(!lines.are_current());
    }

    #[test]
    fn no_run_is_an_error_with_a_remedy() {
        let folder = tempfile::tempdir().unwrap();
        for path in [folder.path().to_owned(), folder.path().join("none")] {
            let error = Lines::open(&path).err().unwrap().to_string();
            assert!(error.contains("give the folder of a run"), "{error}");
        }
    }
}
