//! How long something takes on several ranks: an iteration's time is that of the slowest rank, counted from a barrier.
//!
//! Ranks leave a barrier at slightly different times, and a rank that leaves early waits inside the operation for one that leaves late; so the
//! time of a short operation contains that skew, as in the OSU benchmarks. nccl-tests instead divides the time of many iterations, which
//! hides what a single one costs a program that waits for it.

use std::time::Instant;

use pillion_collectives::Communicator;
use serde::Serialize;

use crate::Error;

/// Scalars that one exchange carries.
const AT_ONCE: usize = 64;

/// Memory larger than the last-level cache, to push everything else out of it.
pub struct Flush(Vec<u8>);

impl Flush {
    /// `bytes` of memory.
    pub fn new(bytes: usize) -> Flush {
        Flush(vec![1; bytes])
    }

    /// Reads and writes every cache line of it.
    pub fn walk(&mut self) {
        self.0.iter_mut().step_by(64).for_each(|byte| *byte = byte.wrapping_add(1));
        std::hint::black_box(&self.0);
    }
}

/// How often something runs, and in which state of the caches.
pub struct Repeat {
    /// Untimed iterations first.
    pub warmup: usize,
    /// Timed iterations.
    pub iterations: usize,
    /// Flushed before each iteration.
    pub flush: Option<Flush>,
}

impl Repeat {
    /// Nanoseconds of each iteration on the slowest rank. Every rank calls this at once.
    ///
    /// # Errors
    /// The communicator's, and those of `run`.
    pub fn time(
        &mut self,
        communicator: &Communicator,
        mut run: impl FnMut() -> Result<(), Error>,
    ) -> Result<Vec<u64>, Error> {
        let mut samples = Vec::new();
        for iteration in 0..self.warmup + self.iterations {
            if let Some(flush) = &mut self.flush {
                flush.walk();
            }
            communicator.barrier()?;
            let started = Instant::now();
            run()?;
            let elapsed = started.elapsed();
            if iteration >= self.warmup {
                samples.push(u64::try_from(elapsed.as_nanos()).unwrap_or(u64::MAX));
            }
        }
        for chunk in samples.chunks_mut(AT_ONCE) {
            let ranks = communicator.all_gather_scalars(chunk)?;
            for (index, sample) in chunk.iter_mut().enumerate() {
                *sample = ranks.iter().map(|rank| rank[index]).max().unwrap_or(*sample);
            }
        }
        Ok(samples)
    }
}

/// Turns that contenders take.
const TURNS: usize = 5;

/// Nanoseconds of each contender's iterations, as many as `contenders` says. They take turns, so that what else the machine does meets all of
/// them: each of up to five turns has a share of the iterations, after untimed ones, and begins with another contender. Every
/// rank calls this at once.
///
/// # Errors
/// The communicator's, and those of `run`, which runs the contender of a number once.
pub fn alternate(
    repeat: &mut Repeat,
    communicator: &Communicator,
    contenders: &[usize],
    mut run: impl FnMut(usize) -> Result<(), Error>,
) -> Result<Vec<Vec<u64>>, Error> {
    let (iterations, warmup) = (repeat.iterations, repeat.warmup);
    let fewest = contenders.iter().copied().min().unwrap_or(0);
    let turns = if contenders.len() > 1 { TURNS.min(fewest) } else { 1 };
    let mut samples = vec![Vec::new(); contenders.len()];
    for turn in 0..turns {
        for place in 0..contenders.len() {
            let contender = (turn + place) % contenders.len();
            let all = contenders[contender];
            repeat.iterations = all * (turn + 1) / turns - all * turn / turns;
            samples[contender].extend(repeat.time(communicator, || run(contender))?);
        }
        // What the others left in the caches is gone sooner than what a first call sets up.
        repeat.warmup = warmup.div_ceil(TURNS);
    }
    (repeat.iterations, repeat.warmup) = (iterations, warmup);
    Ok(samples)
}

/// Percentiles in microseconds, by nearest rank: the smallest sample that so many percent of all do not exceed.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Summary {
    /// Half of the samples are at most this.
    pub p50_us: f64,
    /// 95 % are.
    pub p95_us: f64,
    /// 99 % are.
    pub p99_us: f64,
    /// The smallest.
    pub min_us: f64,
}

impl Summary {
    /// Of nanoseconds, at least one.
    pub fn of(samples: &[u64]) -> Summary {
        let mut sorted = samples.to_vec();
        sorted.sort_unstable();
        let percentile = |percent: usize| {
            let place = (sorted.len() * percent).div_ceil(100).max(1);
            sorted[place - 1] as f64 / 1e3
        };
        Summary {
            p50_us: percentile(50),
            p95_us: percentile(95),
            p99_us: percentile(99),
            min_us: sorted[0] as f64 / 1e3,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pillion_collectives::{Launch, Options};
    use std::time::Duration;

    /// Nearest rank of 1..=200: place ⌈2p⌉ holds the value 2p.
    #[test]
    fn percentiles_are_by_nearest_rank() {
        let samples: Vec<u64> = (1..=200).rev().map(|number| number * 1000).collect();
        let summary = Summary::of(&samples);
        assert_eq!(summary, Summary { p50_us: 100.0, p95_us: 190.0, p99_us: 198.0, min_us: 1.0 });
        let one = Summary::of(&[7000]);
        assert_eq!(one, Summary { p50_us: 7.0, p95_us: 7.0, p99_us: 7.0, min_us: 7.0 });
    }

    #[test]
    fn contenders_take_turns_and_each_has_all_its_iterations() {
        let launch = Launch::single();
        let communicator = Communicator::connect(&launch, Options::default()).unwrap();
        for (iterations, contenders) in [(1, 3), (4, 2), (12, 3), (20, 1)] {
            let mut repeat = Repeat { warmup: 0, iterations, flush: None };
            let mut order = Vec::new();
            let note = |contender| {
                order.push(contender);
                Ok(())
            };
            let samples = alternate(&mut repeat, &communicator, &vec![iterations; contenders], note).unwrap();
            assert_eq!(samples.iter().map(Vec::len).collect::<Vec<_>>(), vec![iterations; contenders]);
            assert_eq!((repeat.iterations, repeat.warmup), (iterations, 0), "as before");
            let changes = order.windows(2).filter(|pair| pair[0] != pair[1]).count();
            // Each turn begins after the one that began the turn before: no two neighbours are the same contender, but for two contenders,
            // where the second of a turn begins the next one.
            let turns = iterations.min(5);
            let expected = match contenders {
                1 => 0,
                2 => turns,
                _ => contenders * turns - 1,
            };
            assert_eq!(changes, expected, "{order:?}");
        }
    }

    #[test]
    fn a_sample_is_that_of_the_slowest_rank_on_every_rank() {
        let run = |launch: Launch| {
            let communicator = Communicator::connect(&launch, Options::default()).unwrap();
            let mut repeat = Repeat { warmup: 1, iterations: 70, flush: None };
            let slow = Duration::from_micros(500);
            repeat.time(&communicator, || {
                if launch.rank == 1 {
                    std::thread::sleep(slow);
                }
                Ok(())
            })
        };
        std::thread::scope(|scope| {
            let ranks = Launch::threads(2).into_iter().map(|launch| scope.spawn(move || run(launch).unwrap()));
            let samples: Vec<Vec<u64>> =
                ranks.collect::<Vec<_>>().into_iter().map(|rank| rank.join().unwrap()).collect();
            assert_eq!(samples[0], samples[1]);
            assert_eq!(samples[0].len(), 70);
            assert!(samples[0].iter().all(|&sample| sample >= 500_000), "rank 0 alone would be faster");
        });
    }
}
