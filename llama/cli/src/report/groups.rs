//! Runs that differ only in their seed, as one line: their mean, and a band from the smallest to the
//! largest.

use super::runs::{Run, Step};
use crate::plot::Line;

/// Runs that are drawn as one line.
pub(super) struct Group<'r> {
    pub(super) name: String,
    pub(super) runs: Vec<&'r Run>,
}

impl<'r> Group<'r> {
    /// A group for each run.
    pub(super) fn each(runs: &'r [Run]) -> Vec<Group<'r>> {
        runs.iter().map(|run| Group { name: run.name.clone(), runs: vec![run] }).collect()
    }

    /// A group for all runs that differ only in their seed, in the order of the first ones. Runs of
    /// unknown settings are alone, as is a run of settings and a seed that another run has.
    pub(super) fn by_seed(runs: &'r [Run]) -> Vec<Group<'r>> {
        let mut groups: Vec<(_, Vec<&Run>)> = Vec::new();
        for run in runs {
            let settings = run.settings();
            let is_other_seed = |runs: &[&Run]| runs.iter().all(|other| other.seed() != run.seed());
            let known = run.about.is_some();
            match groups.iter_mut().find(|(of, runs)| known && *of == settings && is_other_seed(runs)) {
                Some((_, runs)) => runs.push(run),
                None => groups.push((settings, vec![run])),
            }
        }
        groups.into_iter().map(|(_, runs)| Group { name: name(&runs), runs }).collect()
    }

    /// The line of `points` of each run.
    pub(super) fn line(&self, points: impl Fn(&Run) -> Vec<(f64, f64)>) -> Line {
        let each: Vec<Vec<(f64, f64)>> = self.runs.iter().map(|run| points(run)).collect();
        let name = self.name.clone();
        match each.len() {
            1 => Line { name, points: each.into_iter().next().expect("there is one"), band: Vec::new() },
            _ => {
                let (points, band) = mean(&each);
                Line { name, points, band }
            }
        }
    }
}

/// What the names of runs begin with, and how many these are.
fn name(runs: &[&Run]) -> String {
    let first = &runs[0].name;
    if runs.len() == 1 {
        return first.clone();
    }
    let shared =
        |end: &usize| first.is_char_boundary(*end) && runs.iter().all(|run| run.name.starts_with(&first[..*end]));
    let end = (0..=first.len()).rev().find(shared).unwrap_or(0);
    let is_between = |c: char| !c.is_alphanumeric();
    let begin = first[..end].trim_end_matches(is_between);
    let begin = begin.strip_suffix("seed").map_or(begin, |rest| rest.trim_end_matches(is_between));
    let count = runs.len();
    if begin.is_empty() { format!("{first} and {} more seeds", count - 1) } else { format!("{begin} ({count} seeds)") }
}

/// Points of a line, and a band: x, its lowest and its highest value.
type Mean = (Vec<(f64, f64)>, Vec<(f64, f64, f64)>);

/// The mean of lines where all of them have values, at the points of the one with the fewest.
fn mean(lines: &[Vec<(f64, f64)>]) -> Mean {
    let fewest = lines.iter().min_by_key(|line| line.len()).expect("there are lines");
    let (mut points, mut band) = (Vec::new(), Vec::new());
    let mut at: Vec<usize> = vec![0; lines.len()];
    for &(x, _) in fewest {
        let values: Option<Vec<f64>> = lines.iter().zip(&mut at).map(|(line, at)| interpolated(line, at, x)).collect();
        let Some(values) = values else { continue };
        let range =
            values.iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(a, b), value| (a.min(*value), b.max(*value)));
        // The mean of quotients, because a sum of large values may be infinite.
        points.push((x, values.iter().map(|value| value / values.len() as f64).sum()));
        band.push((x, range.0, range.1));
    }
    (points, band)
}

/// The value of a line at `x`, between two points; none beyond its ends. `at` is where the search
/// begins, and ends: x ascends from call to call.
fn interpolated(line: &[(f64, f64)], at: &mut usize, x: f64) -> Option<f64> {
    while line.get(*at)?.0 < x {
        *at += 1;
    }
    let (x1, y1) = line[*at];
    if x1 == x {
        return Some(y1);
    }
    let (x0, y0) = *line.get(at.checked_sub(1)?)?;
    Some(y0 + (y1 - y0) * ((x - x0) / (x1 - x0)))
}

/// The values of steps, where there are any, at `x`.
pub(super) fn points(run: &Run, x: impl Fn(&Step) -> f64, y: impl Fn(&Step) -> Option<f64>) -> Vec<(f64, f64)> {
    run.steps.iter().filter_map(|step| Some((x(step), y(step)?))).collect()
}

/// An exponential moving average of the values of a run's steps, whose weights fall by e over a
/// share of the run's samples.
pub(super) fn smoothed(run: &Run, share: f64, y: impl Fn(&Step) -> Option<f64>) -> Vec<Option<f64>> {
    let length = (share * run.last().samples).max(1.0);
    let (mut sum, mut weight) = (0.0, 0.0);
    let mut one = |step: &Step| {
        let value = y(step)?;
        let keep = (-step.batch / length).exp();
        (sum, weight) = (keep * sum + step.batch * value, keep * weight + step.batch);
        Some(sum / weight)
    };
    run.steps.iter().map(&mut one).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_mean_is_where_all_lines_are() {
        let (points, band) = mean(&[
            vec![(0.0, 1.0), (2.0, 3.0), (4.0, 5.0)],
            vec![(1.0, 0.0), (2.0, 1.0), (3.0, 2.0), (4.0, 3.0), (5.0, 4.0)],
        ]);
        assert_eq!(points, [(2.0, 2.0), (4.0, 4.0)]);
        assert_eq!(band, [(2.0, 1.0, 3.0), (4.0, 3.0, 5.0)]);
        assert_eq!(mean(&[vec![(0.0, 1.0)], vec![]]).0, []);
    }

    proptest! {
        /// Lines through the points of one straight line have its values as their mean.
        #[test]
        fn lines_of_other_points_of_the_same_values_have_their_mean(
            steps in prop::collection::vec(prop::collection::vec(0.1..10.0f64, 1..50), 1..5),
        ) {
            let lines: Vec<Vec<(f64, f64)>> = steps
                .iter()
                .map(|steps| {
                    let mut x = 0.0;
                    let points = steps.iter().map(|step| {
                        x += step;
                        (x, 3.0 * x + 1.0)
                    });
                    points.collect()
                })
                .collect();
            let (points, band) = mean(&lines);
            prop_assert_eq!(points.len(), band.len());
            for ((x, y), (_, low, high)) in points.into_iter().zip(band) {
                prop_assert!((y - 3.0 * x - 1.0).abs() < 1e-9 * y);
                prop_assert!(low <= y * (1.0 + 1e-12) && y <= high * (1.0 + 1e-12));
            }
        }
    }
}
