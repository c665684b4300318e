//! How much of an operation a computation hides, as OSU's nonblocking benchmarks (`osu_iallreduce` and others) define it:
//! max(0, 100 − 100 · (overall − compute) / pure) percent, where *pure* is the operation started and waited for, *compute* a computation
//! of the same length, and *overall* both at once.

use pillion_collectives::Communicator;
use serde::Serialize;

use crate::Error;
use crate::case::Case;
use crate::timing::{Repeat, Summary};

/// What was measured: medians in microseconds.
#[derive(Clone, Debug, Serialize)]
pub struct Overlap {
    /// The operation alone, on the progress thread.
    pub pure_us: f64,
    /// The computation alone.
    pub compute_us: f64,
    /// Both, from the start of the operation to its end.
    pub overall_us: f64,
    /// Share of the operation that took no time of its own.
    pub hidden_percent: f64,
}

/// Rounds of [`compute`] whose time says how many take as long as an operation.
const CALIBRATION: u64 = 100_000;

/// Arithmetic that touches no memory: each round waits for the one before.
fn compute(rounds: u64) {
    let mut x = 1.0f64;
    for _ in 0..rounds {
        x = std::hint::black_box(x * 0.999_999 + 1e-6);
    }
    std::hint::black_box(x);
}

/// Measures it. Every rank calls this at once.
///
/// # Errors
/// The communicator's.
pub fn measure(communicator: &Communicator, case: &mut Case, repeat: &mut Repeat) -> Result<Overlap, Error> {
    let median = |samples: Vec<u64>| Summary::of(&samples).p50_us;
    let pure_us = median(repeat.time(communicator, || case.run_beside(communicator, || ()))?);
    let mut computing = |rounds: u64| -> Result<f64, Error> {
        let samples = repeat.time(communicator, || {
            compute(rounds);
            Ok(())
        })?;
        Ok(median(samples))
    };
    // Here and now: ranks that share a core compute more slowly than one alone.
    let rounds = (CALIBRATION as f64 * pure_us / computing(CALIBRATION)?) as u64;
    let compute_us = computing(rounds)?;
    let overall_us = median(repeat.time(communicator, || case.run_beside(communicator, || compute(rounds)))?);
    Ok(Overlap { pure_us, compute_us, overall_us, hidden_percent: hidden_percent(pure_us, compute_us, overall_us) })
}

fn hidden_percent(pure: f64, compute: f64, overall: f64) -> f64 {
    (100.0 - 100.0 * (overall - compute) / pure).clamp(0.0, 100.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_hidden_is_what_the_computation_does_not_wait_for() {
        assert_eq!(hidden_percent(10.0, 10.0, 10.0), 100.0);
        assert_eq!(hidden_percent(10.0, 10.0, 20.0), 0.0);
        assert_eq!(hidden_percent(10.0, 10.0, 12.5), 75.0);
        assert_eq!(hidden_percent(10.0, 10.0, 30.0), 0.0, "slower than one after the other");
    }
}
