//! Which processors a rank runs on. Two ranks that the system puts on one processor take turns of its scheduler, and every small operation
//! then takes tens to hundreds of microseconds; so each rank keeps to a share of its own.

use std::fmt;

use pillion_collectives::Launch;
use pillion_collectives::launch::Source;
use rustix::thread::CpuSet;

use crate::Error;

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Bind {
    /// Each rank to its share of the processors
    Core,
    /// Ranks run where the system puts them
    None,
}

/// What was done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Binding {
    /// This rank keeps to its share.
    Core,
    /// It runs wherever its process may.
    None,
    /// The launcher had bound it, and that is left as it is.
    Launcher,
}

impl fmt::Display for Binding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Binding::Core => "core",
            Binding::None => "none",
            Binding::Launcher => "by the launcher",
        })
    }
}

/// Binds the calling thread, and so the threads that it starts later. Without a wish, ranks are bound where there is a processor for
/// each. A launcher that gave this rank fewer processors than it has itself has bound it.
///
/// # Errors
/// [`Error::Binding`] where the system refuses.
pub fn bind(launch: &Launch, wish: Option<Bind>) -> Result<Binding, Error> {
    if wish == Some(Bind::None) {
        return Ok(Binding::None);
    }
    let refused = |error: rustix::io::Errno| Error::Binding(error.into());
    let own = rustix::thread::sched_getaffinity(None).map_err(refused)?;
    // Ranks that this program started have what the user gave to all of them.
    if !matches!(launch.source, Source::Local | Source::Single)
        && let Ok(launcher) = rustix::thread::sched_getaffinity(rustix::process::getppid())
        && own.count() < launcher.count()
    {
        return Ok(Binding::Launcher);
    }
    let processors: Vec<usize> = (0..CpuSet::MAX_CPU).filter(|&processor| own.is_set(processor)).collect();
    if wish.is_none() && launch.local_world > processors.len() {
        return Ok(Binding::None);
    }
    let mut set = CpuSet::new();
    share(&processors, launch.local_rank, launch.local_world).iter().for_each(|&processor| set.set(processor));
    rustix::thread::sched_setaffinity(None, &set).map_err(refused)?;
    Ok(Binding::Core)
}

/// The part of `processors` for one of `ranks` ranks: as equal as can be, or one processor that several ranks have in turn.
fn share(processors: &[usize], rank: usize, ranks: usize) -> &[usize] {
    let count = processors.len();
    if ranks > count {
        return &processors[rank % count..][..1];
    }
    &processors[rank * count / ranks..(rank + 1) * count / ranks]
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn shares_are_disjoint_cover_all_and_differ_by_one_at_most(count in 1usize..70, ranks in 1usize..70) {
            let processors: Vec<usize> = (0..count).map(|index| 3 * index).collect();
            let shares: Vec<&[usize]> = (0..ranks).map(|rank| share(&processors, rank, ranks)).collect();
            let (least, most) = (shares.iter().map(|one| one.len()).min(), shares.iter().map(|one| one.len()).max());
            prop_assert!(least >= Some(1) && most <= least.map(|least| least + 1));
            if ranks <= count {
                prop_assert_eq!(shares.concat(), processors);
            } else {
                prop_assert_eq!(shares[..count].concat(), processors, "each has some rank");
            }
        }
    }

    #[test]
    fn threads_are_bound_to_their_shares_and_those_they_start_too() {
        let affinity = || {
            let set = rustix::thread::sched_getaffinity(None).unwrap();
            (0..CpuSet::MAX_CPU).filter(|&processor| set.is_set(processor)).collect::<Vec<_>>()
        };
        let all = affinity();
        let run = |launch: &Launch, wish| {
            let bound = bind(launch, wish).unwrap();
            (bound, std::thread::scope(|scope| scope.spawn(affinity).join().unwrap()))
        };
        let on_a_thread =
            |launch: &Launch, wish| std::thread::scope(|scope| scope.spawn(|| run(launch, wish)).join().unwrap());
        let fitting = Launch::threads(all.len());
        for launch in &fitting {
            assert_eq!(on_a_thread(launch, None), (Binding::Core, vec![all[launch.rank]]));
            assert_eq!(on_a_thread(launch, Some(Bind::None)), (Binding::None, all.clone()));
        }
        let many = Launch::threads(all.len() + 1);
        assert_eq!(on_a_thread(&many[0], None), (Binding::None, all.clone()), "more ranks than processors");
        assert_eq!(on_a_thread(&many[all.len()], Some(Bind::Core)), (Binding::Core, vec![all[0]]));
    }
}
