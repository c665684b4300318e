//! What is known of a run while it goes.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use crate::plot::thin;
use crate::train::Line;
use crate::train::about::About;
use crate::train::lines::Lines;
use crate::{Error, run_folder};

/// Steps whose speed is taken for that of the rest.
const RECENT: usize = 20;
/// Points of a line that are kept; half of them stay where there are more.
const MOST_POINTS: usize = 20_000;

/// A run, as far as its files have it.
pub(super) struct Watch {
    folder: PathBuf,
    lines: Lines,
    pub(super) about: Option<About>,
    /// Of the last step.
    pub(super) last: Option<Line>,
    /// Samples and losses.
    pub(super) loss: Vec<(f64, f64)>,
    pub(super) validation: Vec<(f64, f64)>,
    /// Samples and seconds of the last steps.
    recent: VecDeque<(f64, f64)>,
    /// Why nothing more is read of the metrics.
    damage: Option<Error>,
    /// Why `about` is not known.
    unknown: Option<Error>,
}

impl Watch {
    /// Reads the run in `folder`, as far as it is.
    ///
    /// # Errors
    /// [`Error::File`] when there is none.
    pub(super) fn open(folder: &Path) -> Result<Watch, Error> {
        let (about, unknown) = match About::read(folder) {
            Ok(about) => (about, None),
            Err(error) => (None, Some(error)),
        };
        let mut watch = Watch {
            folder: folder.to_owned(),
            lines: Lines::open(folder)?,
            about,
            last: None,
            loss: Vec::new(),
            validation: Vec::new(),
            recent: VecDeque::new(),
            damage: None,
            unknown,
        };
        watch.read();
        Ok(watch)
    }

    /// Reads what the run has written since. A run that is resumed is read from its beginning.
    pub(super) fn follow(&mut self) {
        if self.lines.are_current() {
            self.read();
        } else if let Ok(again) = Watch::open(&self.folder) {
            // Where the folder is gone, the last that was known stays.
            *self = again;
        }
    }

    fn read(&mut self) {
        while self.damage.is_none() {
            match self.lines.next() {
                Ok(Some(line)) => self.add(line),
                Ok(None) => break,
                Err(error) => self.damage = Some(error),
            }
        }
    }

    fn add(&mut self, line: Line) {
        let samples = line.samples_seen as f64;
        for (points, value) in [(&mut self.loss, Some(line.loss)), (&mut self.validation, line.validation_loss)] {
            points.extend(value.map(|value| (samples, value)));
            if points.len() > MOST_POINTS {
                let column = |x: f64| (x / samples * (MOST_POINTS / 4) as f64) as usize;
                *points = thin(points, column);
            }
        }
        self.recent.push_back((line.batch_samples as f64, line.step_ms / 1e3));
        if self.recent.len() > RECENT {
            self.recent.pop_front();
        }
        self.last = Some(line);
    }

    /// What is wrong with the run's files, if anything is.
    pub(super) fn fault(&self) -> Option<String> {
        self.damage.as_ref().or(self.unknown.as_ref()).map(Error::to_string)
    }

    /// As [`Watch::fault`], in the end.
    pub(super) fn into_fault(self) -> Option<Error> {
        self.damage.or(self.unknown)
    }

    /// The run's folder, as the user wrote it.
    pub(super) fn folder(&self) -> &Path {
        &self.folder
    }

    /// Time since the metrics were written last.
    pub(super) fn since_last(&self) -> Option<Duration> {
        let written = std::fs::metadata(run_folder::metrics(&self.folder)).and_then(|metadata| metadata.modified());
        SystemTime::now().duration_since(written.ok()?).ok()
    }

    /// Samples of the whole run.
    pub(super) fn samples(&self) -> Option<u64> {
        self.about.as_ref().map(|about| about.recipe.schedule.samples)
    }

    /// The rest at the speed of the last steps; none while this is not known.
    pub(super) fn to_go(&self) -> Option<Duration> {
        let (last, about) = (self.last.as_ref()?, self.about.as_ref()?);
        let (samples, seconds) = self.recent.iter().fold((0.0, 0.0), |sum, step| (sum.0 + step.0, sum.1 + step.1));
        let by_samples = self.samples()?.saturating_sub(last.samples_seen) as f64 * seconds / samples;
        let of_steps = |steps: u64| steps.saturating_sub(last.step) as f64 * seconds / self.recent.len() as f64;
        Duration::try_from_secs_f64(about.steps.map_or(by_samples, |steps| of_steps(steps).min(by_samples))).ok()
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::fs;
    use std::io::Write;

    use super::*;
    use crate::train::lines::tests::{folder, line};

    #[test]
    fn a_run_is_followed_and_read_again_when_it_is_resumed() {
        let place = folder(&line(1, 5.0));
        let mut watch = Watch::open(place.path()).unwrap();
        assert_eq!((watch.loss.len(), watch.to_go()), (1, None));
        let metrics = place.path().join("metrics.jsonl");
        let mut file = fs::File::options().append(true).open(&metrics).unwrap();
        file.write_all((2..=30).map(|step| line(step, 4.0)).collect::<String>().as_bytes()).unwrap();
        watch.follow();
        assert_eq!((watch.loss.len(), watch.validation.len(), watch.recent.len()), (30, 3, RECENT));
        fs::write(place.path().join("next"), (1..=4).map(|step| line(step, 3.0)).collect::<String>()).unwrap();
        fs::rename(place.path().join("next"), &metrics).unwrap();
        watch.follow();
        assert_eq!(watch.loss.len(), 4);
        fs::remove_file(&metrics).unwrap();
        watch.follow();
        assert_eq!((watch.loss.len(), watch.fault()), (4, None));
    }

    #[test]
    fn damage_is_told_and_ends_the_reading() {
        let place = folder(&(line(1, 5.0) + "nonsense\n" + &line(3, 3.0)));
        fs::write(place.path().join("run.json"), "{}").unwrap();
        let mut watch = Watch::open(place.path()).unwrap();
        watch.follow();
        assert_eq!(watch.loss.len(), 1);
        assert!(watch.fault().unwrap().contains("line 2"));
        fs::write(place.path().join("next"), line(1, 5.0)).unwrap();
        fs::rename(place.path().join("next"), place.path().join("metrics.jsonl")).unwrap();
        watch.follow();
        assert!(watch.fault().unwrap().contains("run.json"));
    }

    #[test]
    fn points_of_long_runs_are_bounded() {
        let place = folder("");
        let mut watch = Watch::open(place.path()).unwrap();
        for step in 1..=50_000 {
            watch.add(serde_json::from_str(&line(step, 5.0)).unwrap());
            assert!(watch.loss.len() <= MOST_POINTS);
        }
        assert_eq!(watch.loss[0].0, 8.0);
    }
}
