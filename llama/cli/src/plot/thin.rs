//! Points that can be seen of a long line.

/// Thins a line of ascending x: of the points in a column, those with the smallest and the largest
/// value stay, and the first and the last point of the line. So no peak is lost.
pub(crate) fn thin(points: &[(f64, f64)], column: impl Fn(f64) -> usize) -> Vec<(f64, f64)> {
    let mut kept = Vec::new();
    let mut rest = points;
    while let Some(first) = rest.first() {
        let len = rest.iter().take_while(|point| column(point.0) == column(first.0)).count();
        let (here, after) = rest.split_at(len);
        let by_value = |a: &usize, b: &usize| here[*a].1.total_cmp(&here[*b].1);
        let lowest = (0..len).min_by(by_value).expect("it has a first");
        let highest = (0..len).max_by(by_value).expect("it has a first");
        let mut stay = vec![lowest, highest];
        if kept.is_empty() {
            stay.push(0);
        }
        if after.is_empty() {
            stay.push(len - 1);
        }
        stay.sort_unstable();
        stay.dedup();
        kept.extend(stay.into_iter().map(|index| here[index]));
        rest = after;
    }
    kept
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn extremes_and_ends_stay_and_few_others(values in prop::collection::vec(-1e3..1e3f64, 0..500)) {
            let points: Vec<(f64, f64)> = values.iter().enumerate().map(|(x, y)| (x as f64, *y)).collect();
            let kept = thin(&points, |x| (x / 50.0) as usize);
            prop_assert!(kept.len() <= 2 * points.len().div_ceil(50) + 2);
            prop_assert!(kept.windows(2).all(|pair| pair[0].0 < pair[1].0));
            prop_assert!(kept.iter().all(|point| points.contains(point)));
            prop_assert_eq!(kept.first(), points.first());
            prop_assert_eq!(kept.last(), points.last());
            for column in points.chunks(50) {
                let highest = column.iter().map(|point| point.1).fold(f64::MIN, f64::max);
                prop_assert!(kept.iter().any(|point| point.1 == highest && column.contains(point)));
            }
        }

        #[test]
        fn a_line_with_a_point_a_column_stays_as_it_is(values in prop::collection::vec(-1e3..1e3f64, 0..50)) {
            let points: Vec<(f64, f64)> = values.iter().enumerate().map(|(x, y)| (x as f64, *y)).collect();
            prop_assert_eq!(thin(&points, |x| x as usize), points);
        }
    }
}
