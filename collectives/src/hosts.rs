//! Which ranks are where, and who talks to whom between hosts.
//!
//! Each rank has a *partner* on every other host: the rank there with its place, or, where there
//! are fewer, with its place modulo their number. A rank sends its partners what their hosts want
//! from it, and receives for its host from the ranks whose partner it is. With as many ranks on
//! every host, partners are each other's, and share the work of the wire evenly.

use std::sync::Once;

use crate::Launch;

/// Which ranks of the communicator are on which host: `ranks[h][l]`.
#[derive(Clone, Debug)]
pub(crate) struct Hosts {
    pub(crate) ranks: Vec<Vec<usize>>,
    /// This rank's host.
    pub(crate) own: usize,
}

impl Hosts {
    /// Ranks whose hosts have these numbers.
    pub(crate) fn of(homes: &[usize], rank: usize) -> Hosts {
        let mut ranks: Vec<Vec<usize>> = Vec::new();
        for (rank, home) in homes.iter().enumerate() {
            match ranks.iter_mut().find(|host| homes[host[0]] == *home) {
                Some(host) => host.push(rank),
                None => ranks.push(vec![rank]),
            }
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
    pub(crate) fn place(&self, rank: usize) -> usize {
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

    /// A rank's partner on a host; the rank itself on its own.
    pub(crate) fn partner(&self, rank: usize, host: usize) -> usize {
        let ranks = &self.ranks[host];
        ranks[self.place(rank) % ranks.len()]
    }

    /// The place, among those of this host, of a rank's partner here.
    pub(crate) fn partner_here(&self, rank: usize) -> usize {
        self.place(rank) % self.local().len()
    }

    /// The partners of this host's rank `rank` on the other hosts.
    pub(crate) fn partners(&self, rank: usize) -> impl Iterator<Item = usize> {
        let others = (0..self.ranks.len()).filter(move |&host| host != self.own);
        others.map(move |host| self.partner(rank, host))
    }

    /// The ranks of other hosts whose partner is this host's rank `rank`.
    pub(crate) fn partnered(&self, rank: usize) -> impl Iterator<Item = usize> {
        self.remote().filter(move |&other| self.partner(other, self.own) == rank)
    }

    /// Everybody with whom this host's rank `rank` talks as a partner, either way.
    pub(crate) fn correspondents(&self, rank: usize) -> Vec<usize> {
        let mut all: Vec<usize> = self.partners(rank).chain(self.partnered(rank)).collect();
        all.sort_unstable();
        all.dedup();
        all
    }

    /// Whether every rank is on a host of its own.
    pub(crate) fn are_single(&self) -> bool {
        self.ranks.iter().all(|host| host.len() == 1)
    }

    /// Number of ranks on all hosts.
    pub(crate) fn world(&self) -> usize {
        self.ranks.iter().map(Vec::len).sum()
    }
}

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
