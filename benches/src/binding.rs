//! Which processors a rank runs on. Two ranks that share one take turns, and small operations then take microseconds more; the system may put them
//! there when other programs run.

use clap::ValueEnum;
use pillion_collectives::Launch;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

use crate::Error;

/// How ranks are bound.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Binding {
    /// Each rank of a host to processors of its own, where there are enough.
    Core,
    /// Not at all.
    None,
}

/// Binds the calling thread, and the threads that it will start.
///
/// # Errors
/// What the system says.
pub fn bind(binding: Binding, launch: &Launch) -> Result<(), Error> {
    if binding == Binding::None {
        return Ok(());
    }
    let allowed =
        sched_getaffinity(None).map_err(|error| Error::Usage(format!("--bind core: {error}: try --bind none")))?;
    let processors: Vec<usize> = (0..CpuSet::MAX_CPU).filter(|&cpu| allowed.is_set(cpu)).collect();
    // A launcher that has bound this rank gives it fewer processors than there are ranks.
    let Some(share) = share(&processors, launch.local_rank, launch.local_world) else { return Ok(()) };
    let mut set = CpuSet::new();
    share.iter().for_each(|&cpu| set.set(cpu));
    sched_setaffinity(None, &set).map_err(|error| Error::Usage(format!("--bind core: {error}: try --bind none")))
}

/// The `rank`-th of `ranks` equal shares, if there is one processor for each.
fn share(processors: &[usize], rank: usize, ranks: usize) -> Option<&[usize]> {
    let count = processors.len() / ranks;
    (count > 0).then(|| &processors[rank * count..(rank + 1) * count])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_disjoint_and_equal() {
        let processors = [0, 1, 4, 5, 9];
        assert_eq!(share(&processors, 0, 2), Some(&[0, 1][..]));
        assert_eq!(share(&processors, 1, 2), Some(&[4, 5][..]));
        assert_eq!(share(&processors, 4, 5), Some(&[9][..]));
        assert_eq!(share(&processors, 0, 6), None);
    }
}
