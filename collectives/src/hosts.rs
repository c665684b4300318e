//! Which ranks are where.

use crate::Launch;

/// Which ranks of the communicator are on which host: `hosts[h][l]`, as many on each.
#[derive(Clone, Debug)]
pub(crate) struct Hosts {
    pub(crate) ranks: Vec<Vec<usize>>,
    /// This rank's host.
    pub(crate) own: usize,
}

impl Hosts {
    /// All ranks on one host.
    pub(crate) fn single(world: usize) -> Hosts {
        Hosts { ranks: vec![(0..world).collect()], own: 0 }
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
