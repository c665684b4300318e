//! Differences of validation losses between schedules, paired by seed, with their 95 % intervals.
//!
//! Runs of one seed start from the same weights and see the same samples in the same order, so the
//! difference of two of them is free of what both have in common. An interval is that of Student's
//! t distribution over the seeds' differences. It is one interval's: of twenty such intervals
//! around differences of zero, one is expected to miss zero.

use statrs::distribution::{ContinuousCDF, StudentsT};

use super::grid::Family;
use super::report::Group;

/// Differences between seeds: their mean, the half width of its 95 % interval, and their number.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Paired {
    pub(super) mean: f64,
    /// None of a single difference, which says nothing of its own scatter.
    pub(super) half_width: Option<f64>,
    pub(super) seeds: usize,
}

impl Paired {
    /// None where there is no difference.
    pub(super) fn of(differences: &[f64]) -> Option<Paired> {
        let count = differences.len();
        if count == 0 {
            return None;
        }
        let mean = differences.iter().sum::<f64>() / count as f64;
        let half_width = (count > 1).then(|| {
            let squares: f64 = differences.iter().map(|difference| (difference - mean).powi(2)).sum();
            let freedom = (count - 1) as f64;
            t(freedom, 0.975) * (squares / freedom / count as f64).sqrt()
        });
        Some(Paired { mean, half_width, seeds: count })
    }

    /// Whether the interval is on one side of zero.
    pub(super) fn separates(&self) -> bool {
        self.half_width.is_some_and(|half_width| self.mean.abs() > half_width)
    }

    /// Whether an interval so wide that `count` such intervals all hold with 95 % (Bonferroni) is
    /// on one side of zero.
    #[cfg(test)]
    pub(super) fn separates_among(&self, count: usize) -> bool {
        let quantile = |tail: f64| t((self.seeds - 1) as f64, 1.0 - tail);
        let wider = quantile(0.025 / count as f64) / quantile(0.025);
        self.half_width.is_some_and(|half_width| self.mean.abs() > wider * half_width)
    }

    /// In nats; an interval on one side of zero in bold.
    pub(super) fn cell(&self) -> String {
        match self.half_width {
            None => format!("{:+.3}", self.mean),
            Some(half_width) if self.separates() => format!("**{:+.3} ± {half_width:.3}**", self.mean),
            Some(half_width) => format!("{:+.3} ± {half_width:.3}", self.mean),
        }
    }
}

/// A quantile of Student's t distribution.
fn t(freedom: f64, probability: f64) -> f64 {
    StudentsT::new(0.0, 1.0, freedom).expect("degrees of freedom above 0").inverse_cdf(probability)
}

/// The validation loss of `group` less that of `other`, over the seeds that both have.
pub(super) fn difference(group: &Group, other: &Group) -> Option<Paired> {
    let differences: Vec<f64> = group
        .seeds
        .iter()
        .filter_map(|(seed, run)| Some(run.validation_loss()? - other.seed(*seed)?.validation_loss()?))
        .collect();
    Paired::of(&differences)
}

/// The validation loss of `group` less what constant batches have at as many steps, by the line
/// through the two constants whose steps are nearest, in the logarithm of steps, of the same seed.
/// Beyond the fewest and the most steps of the constants that line goes on.
pub(super) fn difference_at_equal_steps(group: &Group, constants: &[&Group]) -> Option<Paired> {
    let differences: Vec<f64> = group
        .seeds
        .iter()
        .filter_map(|(seed, run)| {
            let points = constants.iter().map(|constant| {
                let run = constant.seed(*seed)?;
                Some(((run.steps.len() as f64).ln(), run.validation_loss()?))
            });
            let loss = interpolated(points.collect::<Option<Vec<_>>>()?, (run.steps.len() as f64).ln())?;
            Some(run.validation_loss()? - loss)
        })
        .collect();
    Paired::of(&differences)
}

/// The line through the two neighbours of `x`, or through the two outermost points on its side.
fn interpolated(mut points: Vec<(f64, f64)>, x: f64) -> Option<f64> {
    points.sort_by(|a, b| a.0.total_cmp(&b.0));
    let above = points.iter().position(|point| point.0 >= x).unwrap_or(points.len());
    let first = above.saturating_sub(1).min(points.len().checked_sub(2)?);
    let [(x0, y0), (x1, y1)] = [points[first], points[first + 1]];
    (x1 > x0).then(|| y0 + (y1 - y0) * (x - x0) / (x1 - x0))
}

/// A table of differences: its title, its columns, and its rows.
pub(super) struct Table {
    pub(super) title: String,
    pub(super) columns: Vec<String>,
    pub(super) rows: Vec<Vec<String>>,
}

/// Schedules against the constant batches of a family.
struct Comparison<'g, 'r> {
    against: &'static str,
    constants: Vec<&'g Group<'r>>,
    /// Each schedule less each of the constants, and less constants at as many steps.
    rows: Vec<(&'g Group<'r>, Vec<Option<Paired>>)>,
}

/// Every schedule against constant batches: against those with the usual warm-up, and against those
/// with the longer one, where there are any.
fn comparisons<'g, 'r>(groups: &'g [Group<'r>]) -> Vec<Comparison<'g, 'r>> {
    let families = [
        (Family::Constant, "constant batches with the usual warm-up"),
        (Family::LongWarmup, "constant batches with the longer warm-up"),
    ];
    let comparison = |(family, against)| {
        let (constants, others): (Vec<&Group>, Vec<&Group>) = groups.iter().partition(|group| group.family == family);
        // The families are compared with each other once.
        let others = others.into_iter().filter(|group| group.family != Family::Constant);
        let row = |group: &'g Group<'r>| {
            let each = constants.iter().map(|constant| difference(group, constant));
            // A constant with a longer warm-up has as many steps as the one of its batch.
            let changing = group.family == Family::Changing;
            let equal = if changing { difference_at_equal_steps(group, &constants) } else { None };
            (group, each.chain([equal]).collect())
        };
        Comparison { against, rows: others.map(row).collect(), constants }
    };
    let all = families.into_iter().map(comparison);
    all.filter(|comparison| !comparison.constants.is_empty() && !comparison.rows.is_empty()).collect()
}

/// All differences.
#[cfg(test)]
pub(super) fn intervals(groups: &[Group]) -> Vec<Paired> {
    let rows = comparisons(groups).into_iter().flat_map(|comparison| comparison.rows);
    rows.flat_map(|(_, row)| row).flatten().collect()
}

/// The differences as tables.
pub(super) fn tables(groups: &[Group]) -> Vec<Table> {
    let table = |Comparison { against, constants, rows }: Comparison| {
        let cells =
            |row: Vec<Option<Paired>>| row.into_iter().map(|paired| paired.map_or_else(String::new, |p| p.cell()));
        let row = |(group, row): (&Group, Vec<Option<Paired>>)| {
            [group.schedule.to_owned(), group.seeds.len().to_string()].into_iter().chain(cells(row)).collect()
        };
        let mut columns = vec!["schedule".to_owned(), "seeds".to_owned()];
        columns.extend(constants.iter().map(|constant| format!("less {}", constant.schedule)));
        columns.push("less constants at as many steps".to_owned());
        let title = format!("Validation loss less that of {against}");
        Table { title, columns, rows: rows.into_iter().map(row).collect() }
    };
    comparisons(groups).into_iter().map(table).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Differences 1, 2, 3: mean 2, standard error 1/√3, and t of two degrees of freedom is 4.3027.
    #[test]
    fn an_interval_is_that_of_student() {
        let paired = Paired::of(&[1.0, 2.0, 3.0]).unwrap();
        assert_eq!((paired.mean, paired.seeds), (2.0, 3));
        assert!((paired.half_width.unwrap() - 4.302_652_7 / 3f64.sqrt()).abs() < 1e-6);
        assert!(!paired.separates());
        assert_eq!(paired.cell(), "+2.000 ± 2.484");
        assert_eq!(Paired::of(&[0.5, 0.5]).unwrap().cell(), "**+0.500 ± 0.000**");
        assert_eq!(Paired::of(&[-0.25]).unwrap().cell(), "-0.250");
        assert_eq!(Paired::of(&[]), None);
    }

    #[test]
    fn a_line_goes_through_the_neighbours_and_on_beyond_them() {
        let points = vec![(2.0, 10.0), (1.0, 0.0), (4.0, 14.0)];
        for (x, y) in [(1.0, 0.0), (1.5, 5.0), (2.0, 10.0), (3.0, 12.0), (4.0, 14.0), (5.0, 16.0), (0.0, -10.0)] {
            assert_eq!(interpolated(points.clone(), x), Some(y), "{x}");
        }
        assert_eq!(interpolated(vec![(1.0, 1.0)], 1.0), None);
        assert_eq!(interpolated(vec![(1.0, 1.0), (1.0, 2.0)], 1.0), None);
    }
}
