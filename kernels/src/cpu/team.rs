//! The threads of a device. Kernels cut their work by rows of what they write, so no number depends on how many threads there are.

use std::sync::Arc;

use rayon::prelude::*;

use crate::Error;

/// The caller alone, or the threads of a pool, for which the caller waits.
#[derive(Clone, Default)]
pub(super) struct Team(Option<Arc<rayon::ThreadPool>>);

impl Team {
    /// As many threads as a kernel may use at a time, on the processors that the calling thread may run on.
    pub(super) fn new(threads: usize) -> Result<Team, Error> {
        if threads <= 1 {
            return Ok(Team(None));
        }
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .thread_name(|index| format!("kernels-{index}"))
            .build()
            .map_err(|error| Error::Threads { threads, reason: error.to_string() })?;
        Ok(Team(Some(Arc::new(pool))))
    }

    pub(super) fn threads(&self) -> usize {
        self.0.as_ref().map_or(1, |pool| pool.current_num_threads())
    }

    /// Runs `work(0)` to `work(tasks − 1)`.
    pub(super) fn run(&self, tasks: usize, work: impl Fn(usize) + Sync) {
        match &self.0 {
            Some(pool) if tasks > 1 => pool.install(|| (0..tasks).into_par_iter().with_max_len(1).for_each(&work)),
            _ => (0..tasks).for_each(work),
        }
    }

    /// Runs `work` on parts of `rows` that together are all of them, in any order. A part has at least `least` rows.
    pub(super) fn split<R: Rows>(&self, rows: R, least: usize, work: impl Fn(R) + Sync) {
        match &self.0 {
            Some(pool) if rows.rows() >= 2 * least.max(1) => {
                let parts = (rows.rows() / least.max(1)).min(pool.current_num_threads());
                pool.install(|| halve(rows, parts, &work));
            }
            _ => work(rows),
        }
    }
}

fn halve<R: Rows>(rows: R, parts: usize, work: &(impl Fn(R) + Sync)) {
    if parts <= 1 {
        return work(rows);
    }
    let before = parts / 2;
    let at = rows.rows() * before / parts;
    let (first, second) = rows.split_at(at);
    rayon::join(|| halve(first, before, work), || halve(second, parts - before, work));
}

/// Arguments of a kernel that can be cut at a row.
pub(super) trait Rows: Send + Sized {
    fn rows(&self) -> usize;
    fn split_at(self, row: usize) -> (Self, Self);
}

/// What a kernel reads, so many elements a row; the last row may be shorter.
pub(super) struct Read<'a, T>(pub(super) &'a [T], pub(super) usize);

/// What a kernel writes, as well.
pub(super) struct Write<'a, T>(pub(super) &'a mut [T], pub(super) usize);

impl<T: Sync> Rows for Read<'_, T> {
    fn rows(&self) -> usize {
        self.0.len().div_ceil(self.1.max(1))
    }

    fn split_at(self, row: usize) -> (Self, Self) {
        let (first, second) = self.0.split_at((row * self.1).min(self.0.len()));
        (Read(first, self.1), Read(second, self.1))
    }
}

impl<T: Send> Rows for Write<'_, T> {
    fn rows(&self) -> usize {
        self.0.len().div_ceil(self.1.max(1))
    }

    fn split_at(self, row: usize) -> (Self, Self) {
        let (first, second) = self.0.split_at_mut((row * self.1).min(self.0.len()));
        (Write(first, self.1), Write(second, self.1))
    }
}

macro_rules! tuples {
    ($first:ident $($other:ident)*) => {
        impl<$first: Rows, $($other: Rows),*> Rows for ($first, $($other),*) {
            fn rows(&self) -> usize {
                self.0.rows()
            }

            #[allow(non_snake_case)]
            fn split_at(self, row: usize) -> (Self, Self) {
                let ($first, $($other),*) = self;
                let $first = $first.split_at(row);
                $(let $other = $other.split_at(row);)*
                (($first.0, $($other.0),*), ($first.1, $($other.1),*))
            }
        }
    };
}

tuples!(A B);
tuples!(A B C);
tuples!(A B C D);
tuples!(A B C D E);
tuples!(A B C D E F);

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn every_row_is_worked_on_once() {
        for threads in [1, 2, 3] {
            let team = Team::new(threads).unwrap();
            for (rows, missing) in [(0, 0), (1, 2), (5, 0), (64, 1), (257, 2)] {
                for least in [1, 7, 1000] {
                    let (mut out, x) = (vec![0; 3 * rows - missing], (0..rows).collect::<Vec<_>>());
                    let parts = AtomicUsize::new(0);
                    team.split((Write(&mut out, 3), Read(&x, 1)), least, |(Write(out, _), Read(x, _))| {
                        assert_eq!(out.len().div_ceil(3), x.len());
                        parts.fetch_add(1, Ordering::Relaxed);
                        for (out, x) in out.chunks_mut(3).zip(x) {
                            out.iter_mut().for_each(|out| *out += x + 1);
                        }
                    });
                    let parts = parts.into_inner();
                    assert!(parts >= 1 && parts <= threads && (parts == 1 || rows / parts >= least));
                    assert!(out.iter().enumerate().all(|(index, &out)| out == index / 3 + 1));
                }
            }
            let runs: Vec<AtomicUsize> = (0..17).map(|_| AtomicUsize::new(0)).collect();
            team.run(17, |index| _ = runs[index].fetch_add(1, Ordering::Relaxed));
            assert!(runs.into_iter().all(|runs| runs.into_inner() == 1));
        }
    }
}
