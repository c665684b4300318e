//! Chooses how parameters are moved, by simulating a step with every setting that is worth a try.

use pillion_collectives::{Communicator, available_memory};
use pillion_llama::model::Recompute;
use pillion_runtime::Policy;
use pillion_runtime::checkpoint::Staging;
use pillion_runtime::simulate::Machine;
use serde::{Deserialize, Serialize};

use super::forecast::{Forecast, SAME, best};
use super::setup::{self, Setup};
use super::table::{describe, seconds};
use crate::Error;
use crate::train::bytes;

/// Rounds of a simulated step, at most: the others are like them.
const MOST_ROUNDS: usize = 4;

/// What was chosen, and why.
#[derive(Serialize, Deserialize)]
pub(crate) struct Choice {
    prefetch: usize,
    slots: usize,
    bucket: u64,
    recompute: Recompute,
    pub(crate) why: String,
}

impl Choice {
    /// `given` with what was chosen.
    pub(crate) fn of<'a>(&self, given: Setup<'a>) -> Setup<'a> {
        let &Choice { prefetch, slots, bucket, recompute, .. } = self;
        Setup { policy: Policy { prefetch, slots, bucket, ..given.policy }, recompute, ..given }
    }
}

/// Checks that some setting fits into the memory that this host has.
///
/// # Errors
/// When none does.
pub(crate) fn check_memory(given: &Setup<'_>) -> Result<(), Error> {
    fitting(worth_a_try(given), usable(available_memory().0)).map(|_| ())
}

/// A tenth of the available memory stays free for memory that no plan counts.
fn usable(available: u64) -> u64 {
    available / 10 * 9
}

/// Bytes for all ranks of the host that has the least memory. Collective.
///
/// # Errors
/// When another rank has failed.
pub(crate) fn available(communicator: &Communicator) -> Result<u64, Error> {
    let available = communicator.all_gather_scalars(&[available_memory().0])?;
    Ok(usable(available.iter().map(|rank| rank[0]).min().unwrap_or(0)))
}

fn worth_a_try<'a>(given: &Setup<'a>) -> Vec<Setup<'a>> {
    let modes = [Recompute::None, Recompute::Attention, Recompute::Block];
    let with = |recompute| {
        let with = move |policy| Setup { policy, recompute, ..given.clone() };
        given.settings().into_iter().map(with)
    };
    modes.into_iter().flat_map(with).collect()
}

fn fitting(setups: Vec<Setup<'_>>, available: u64) -> Result<Vec<Setup<'_>>, Error> {
    let staging = setups.first().map_or(Staging::SMALL_RING, |setup| setup.staging);
    let mut least = u64::MAX;
    let fits = |setup: &Setup<'_>| {
        let needed = setup.host_bytes(&setup.needs());
        least = least.min(needed);
        needed <= available
    };
    let fits: Vec<Setup<'_>> = setups.into_iter().filter(fits).collect();
    if fits.is_empty() {
        let ring = setup::ring_remedy(staging);
        return Err(Error::Setting(format!(
            "--auto found no setting whose ranks fit into the {} of memory that a host has for them: the least is {}; \
             choose a smaller --model, --micro-batch or --seq{ring}",
            bytes(available),
            bytes(least)
        )));
    }
    Ok(fits)
}

/// The shortest step on `machine` among those that need at most `available` bytes of a host, and
/// among equally short ones that of the least memory.
///
/// # Errors
/// When none has the memory, or the ranks do not lie evenly on the hosts.
pub(crate) fn choose(given: &Setup<'_>, machine: &Machine, available: u64) -> Result<Choice, Error> {
    if !machine.fits(given.mesh) {
        let (shard, hosts) = (given.mesh.shard, machine.ranks_per_host);
        return Err(Error::Setting(format!(
            "--auto cannot simulate groups of {shard} ranks on hosts of {hosts}: leave it out, and give --prefetch, \
             --slots, --bucket and --recompute"
        )));
    }
    let (asked, rounds) = (given.rounds, given.rounds.min(MOST_ROUNDS));
    let given = &Setup { rounds, ..given.clone() };
    let setups = worth_a_try(given);
    let (tried, fits) = (setups.len(), fitting(setups, available)?);
    let forecasts: Vec<Forecast> = fits.iter().map(|setup| setup.forecast(machine)).collect();
    let chosen = best(forecasts.iter().copied());
    let default = given.forecast(machine);
    let is_as_good = default.step <= chosen.step * (1.0 + SAME) && default.memory <= chosen.memory;
    let chosen = if is_as_good && given.host_bytes(&given.needs()) <= available { default } else { chosen };
    let Forecast { prefetch, slots, bucket, recompute, step, memory, .. } = chosen;
    let without = match tried - fits.len() {
        0 => String::new(),
        others => format!("; {others} need more than the {} that a host has", bytes(available)),
    };
    let rounds = if rounds < asked { format!(", steps of only {rounds} rounds") } else { String::new() };
    let moved = if bucket == 0 { String::new() } else { format!(" --bucket {bucket}") };
    let verdict = match chosen == default {
        true => format!("the defaults are best: {} and {} a rank", seconds(step), bytes(memory)),
        false => format!(
            "--prefetch {prefetch} --slots {slots}{moved} --recompute {recompute}: {} and {} a rank, instead of {} and {}",
            seconds(step),
            bytes(memory),
            seconds(default.step),
            bytes(default.memory),
        ),
    };
    let why = format!(
        "{verdict}\n              simulated: {tried} settings{rounds}{without}; chosen: the least memory within 0.1 % of the shortest step\n              \
         measured: {}",
        describe(machine, given.mesh.world()),
    );
    Ok(Choice { prefetch, slots, bucket, recompute, why })
}

#[cfg(test)]
mod tests {
    use pillion_runtime::simulate::Link;
    use pillion_runtime::{Gather, Mesh};

    use super::*;
    use pillion_llama::config::Preset;

    const MEBI: u64 = 1 << 20;

    /// `contention` is the share of a rank's processor that moving data takes.
    fn machine(bandwidth: f64, contention: f64) -> Machine {
        let link = Link { bandwidth, latency: 5e-6 };
        Machine { flops: 70e9, memory: None, ranks_per_host: 1, link, host_link: Link::INSTANT, contention }
    }

    fn chosen(machine: &Machine, available: u64) -> Result<Choice, Error> {
        let model = Preset::named("peer-30m").unwrap().config();
        let policy = Policy { gather: Gather::Copy, ..Policy::default() };
        let mesh = Mesh { replicate: if machine.ranks_per_host == 3 { 2 } else { 1 }, shard: 2 };
        let (recompute, staging) = (Recompute::None, Staging::SMALL_RING);
        let setup =
            Setup { model: &model, policy, recompute, staging, mesh, local: 1, seq: 256, micro_batch: 4, rounds: 1 };
        let choice = choose(&setup, machine, available)?;
        let after = choice.of(setup.clone());
        assert!(after.forecast(machine).memory <= available);
        let default = setup.forecast(machine);
        assert!(default.memory > available || after.forecast(machine).step <= 1.001 * default.step, "{}", choice.why);
        Ok(choice)
    }

    #[test]
    fn memory_buys_gathers_that_a_slow_link_need_not_repeat() {
        let choice = chosen(&machine(125e6, 0.4), 8192 * MEBI).unwrap();
        assert_eq!((choice.slots, choice.recompute), (10, Recompute::None), "{}", choice.why);
    }

    #[test]
    fn groups_that_no_host_holds_evenly_are_refused() {
        let odd = Machine { ranks_per_host: 3, ..machine(125e6, 0.0) };
        let error = chosen(&odd, 8192 * MEBI).map(|choice| choice.why).unwrap_err();
        assert!(error.to_string().contains("on hosts of 3: leave it out"), "{error}");
    }

    #[test]
    fn what_costs_nothing_takes_the_least_memory() {
        let choice = chosen(&machine(f64::INFINITY, 0.0), 8192 * MEBI).unwrap();
        assert_eq!((choice.slots, choice.bucket), (1, 0), "{}", choice.why);
    }

    #[test]
    fn where_memory_is_short_activations_are_computed_again_and_at_last_nothing_fits() {
        let with = |mebi: u64| chosen(&machine(125e6, 0.4), mebi * MEBI);
        for (mebi, recompute) in [(600, Recompute::None), (460, Recompute::Attention), (400, Recompute::Block)] {
            let choice = with(mebi).unwrap();
            assert_eq!(choice.recompute, recompute, "{mebi}: {}", choice.why);
        }
        let error = with(128).map(|choice| choice.why).unwrap_err();
        assert!(error.to_string().contains("choose a smaller --model"), "{error}");
    }
}
