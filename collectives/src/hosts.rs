//! Which ranks are where.

use std::sync::Once;

use crate::Launch;

/// Which ranks of the communicator are on which host: `hosts[h][l]`, as many on each.
#[derive(Clone, Debug)]
pub(crate) struct Hosts {
    pub(crate) ranks: Vec<Vec<usize>>,
    /// This rank's host.
    pub(crate) own: usize,
}

impl Hosts {
    /// Ranks whose hosts have these numbers, if there are as many on every host; else every rank on
    /// its own.
    pub(crate) fn of(homes: &[usize], rank: usize) -> Hosts {
        let mut ranks: Vec<Vec<usize>> = Vec::new();
        for (rank, home) in homes.iter().enumerate() {
            match ranks.iter_mut().find(|host| homes[host[0]] == *home) {
                Some(host) => host.push(rank),
                None => ranks.push(vec![rank]),
            }
        }
        let is_even = ranks.iter().all(|host| host.len() == ranks[0].len());
        if !is_even {
            say_once(
                rank,
                &UNEVEN,
                "hosts have different numbers of ranks, so every rank talks to every other over the network",
            );
            return Hosts::alone(homes.len(), rank);
        }
        let is_in_order = ranks.iter().flat_map(|host| host.windows(2)).all(|pair| pair[0] + 1 == pair[1]);
        if !is_in_order {
            say_once(
                rank,
                &NOT_IN_ORDER,
                "the ranks of a host are not consecutive, so sums run in an order that one host cannot reproduce; \
                 place ranks in blocks (mpirun --map-by slot) where that matters",
            );
        }
        let own = ranks.iter().position(|host| host.contains(&rank)).expect("every rank is on a host");
        Hosts { ranks, own }
    }

    /// Every rank on a host of its own.
    pub(crate) fn alone(world: usize, rank: usize) -> Hosts {
        Hosts { ranks: (0..world).map(|rank| vec![rank]).collect(), own: rank }
    }

    /// Those of some ranks of these hosts, counted in this order, `rank` being this one's number
    /// among them.
    pub(crate) fn among(&self, members: &[usize], rank: usize) -> Hosts {
        let homes: Vec<usize> = members.iter().map(|&member| self.host(member)).collect();
        Hosts::of(&homes, rank)
    }

    /// The ranks of this host.
    pub(crate) fn local(&self) -> &[usize] {
        &self.ranks[self.own]
    }

    /// The place of a rank among those of its host.
    pub(crate) fn column(&self, rank: usize) -> usize {
        let place = |host: &Vec<usize>| host.iter().position(|&other| other == rank);
        self.ranks.iter().find_map(place).expect("every rank is on a host")
    }

    /// Every rank of other hosts.
    pub(crate) fn remote(&self) -> impl Iterator<Item = usize> {
        let others = self.ranks.iter().enumerate().filter(|&(host, _)| host != self.own);
        others.flat_map(|(_, ranks)| ranks.iter().copied())
    }

    /// The host of a rank.
    pub(crate) fn host(&self, rank: usize) -> usize {
        self.ranks.iter().position(|host| host.contains(&rank)).expect("every rank is on a host")
    }

    /// The ranks with this rank's place on the other hosts.
    pub(crate) fn column_of(&self, rank: usize) -> impl Iterator<Item = usize> {
        let place = self.column(rank);
        let own = self.own;
        self.ranks.iter().enumerate().filter(move |&(host, _)| host != own).map(move |(_, ranks)| ranks[place])
    }

    /// Number of ranks on all hosts.
    pub(crate) fn world(&self) -> usize {
        self.ranks.len() * self.local().len()
    }
}

static UNEVEN: Once = Once::new();
static NOT_IN_ORDER: Once = Once::new();

/// Says what costs speed or order: rank 0 of a communicator, and once in a process, which may make
/// many.
fn say_once(rank: usize, said: &Once, what: &str) {
    if rank == 0 {
        said.call_once(|| crate::launcher::say(what));
    }
}

/// What a rank calls its host: what the launch says, or else the running kernel and the network
/// name space, since ranks meet on a socket that only their name space sees.
pub(crate) fn identity(launch: &Launch) -> String {
    if let Some(host) = &launch.host {
        return format!("named {host}");
    }
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let space = std::fs::read_link("/proc/self/ns/net").unwrap_or_default();
    format!("{} {}", boot.trim(), space.display())
}
