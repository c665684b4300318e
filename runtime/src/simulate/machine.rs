//! What a machine is to a simulation, and how long a collective takes on it.
//!
//! Links follow the α-β model (Hockney 1994): n bytes take α + n/β. The time of a collective is that of algorithms which move no more than
//! must be moved (Thakur, Rabenseifner and Gropp 2005; Chan et al. 2007): for S bytes over P ranks, an all-gather or a
//! reduce-scatter sends (P−1)/P·S from each rank, and as much arrives there, in P−1 steps, as in a ring or a pairwise exchange:
//!
//! ```text
//! t = (P−1)·α + (P−1)/P·S/β
//! ```
//!
//! With L ranks on each of H hosts, P = H·L, each rank exchanges with those of its place on the other hosts what the ranks of its own host
//! then pass on to each other. These two parts of a transfer are pipelined, so it takes as long as the longer:
//!
//! ```text
//! t = (H−1)·α + (L−1)·α' + max((H−1)/P·S/β, (L−1)/L·S/β')
//! ```
//!
//! where α and β are those between hosts, of a rank's share of its host's network, and α' and β' those on a host. The bytes of both parts add up to (P−1)/P·S.

use serde::Serialize;

use crate::Mesh;

/// One direction of a connection; both work at the same time.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Link {
    /// β: bytes a second.
    pub bandwidth: f64,
    /// α: seconds that a message takes, however short it is.
    pub latency: f64,
}

impl Link {
    /// Takes no time: stands where nothing goes.
    pub const INSTANT: Link = Link { bandwidth: f64::INFINITY, latency: 0.0 };
}

/// Processors and links; all ranks have the same.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Machine {
    /// Floating-point operations a second that a rank sustains in the kernels of the model: less than its processor could make.
    pub flops: f64,
    /// Bytes a second that a rank reads and writes in kernels that only move memory: updates, norms, zeroing. None: they take no time.
    pub memory: Option<f64>,
    /// L: ranks of a host, neighbours in rank. A world that is smaller lies on one host.
    pub ranks_per_host: usize,
    /// Between hosts, a rank's share.
    pub link: Link,
    /// Between ranks of a host.
    pub host_link: Link,
    /// The share of what a rank computes with that moving data takes while it flows, below 1: where threads or interrupts do so on the same processors. 0 where
    /// other engines do.
    pub contention: f64,
}

/// Bytes that a rank sends, and as many that it receives.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Sent {
    /// To other hosts.
    pub link: u64,
    /// To ranks of its host.
    pub host: u64,
}

impl Sent {
    /// Both.
    pub fn total(self) -> u64 {
        self.link + self.host
    }

    pub(super) fn add(&mut self, other: Sent) {
        self.link += other.link;
        self.host += other.host;
    }
}

/// A collective by itself.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Transfer {
    pub(super) sent: Sent,
    /// Seconds in which nothing flows.
    pub(super) latency: f64,
    /// Seconds that it needs of all of each link: between hosts, on the host.
    pub(super) links: [f64; 2],
}

impl Transfer {
    /// Seconds, if it has the links to itself.
    pub(super) fn seconds(&self) -> f64 {
        self.latency + self.links[0].max(self.links[1])
    }
}

impl Transfer {
    /// One after the other.
    pub(super) fn then(self, next: Transfer) -> Transfer {
        Transfer {
            sent: Sent { link: self.sent.link + next.sent.link, host: self.sent.host + next.sent.host },
            latency: self.latency + next.latency,
            links: [self.links[0] + next.links[0], self.links[1] + next.links[1]],
        }
    }
}

/// Ranks that talk: `local` on each of `hosts`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Group {
    hosts: u64,
    local: u64,
}

impl Group {
    /// `ranks` of every `stride`-th rank. None where the hosts have different numbers of them.
    fn new(ranks: usize, stride: usize, ranks_per_host: usize) -> Option<Group> {
        let local = (ranks_per_host / stride).clamp(1, ranks);
        let aligned = ranks_per_host.is_multiple_of(stride) || stride.is_multiple_of(ranks_per_host);
        let alone = ranks * stride <= ranks_per_host;
        let even = ranks.is_multiple_of(local) && (aligned || alone);
        even.then_some(Group { hosts: (ranks / local) as u64, local: local as u64 })
    }
}

/// Who talks to whom.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Groups {
    pub(super) world: Group,
    pub(super) shard: Group,
    pub(super) replicate: Group,
}

impl Machine {
    /// Whether the ranks of a mesh fill its hosts, and each host has as many ranks of each group.
    pub fn fits(&self, mesh: Mesh) -> bool {
        self.groups(mesh).is_some()
    }

    pub(super) fn groups(&self, mesh: Mesh) -> Option<Groups> {
        let Mesh { replicate, shard } = mesh;
        let host = self.ranks_per_host.min(mesh.world());
        let fills = host > 0 && mesh.world().is_multiple_of(host);
        let whole = shard.is_multiple_of(host) || host.is_multiple_of(shard);
        if !(fills && whole) {
            return None;
        }
        Some(Groups {
            world: Group::new(mesh.world(), 1, host)?,
            shard: Group::new(shard, 1, host)?,
            replicate: Group::new(replicate, shard, host)?,
        })
    }

    /// An all-gather of `shard` bytes from each rank of a group, or a reduce-scatter to as many on each.
    pub(super) fn exchange(&self, group: Group, shard: u64) -> Transfer {
        let Group { hosts, local } = group;
        let sent = Sent { link: (hosts - 1) * shard, host: (local - 1) * hosts * shard };
        let latency = (hosts - 1) as f64 * self.link.latency + (local - 1) as f64 * self.host_link.latency;
        self.transfer(sent, latency)
    }

    /// The same where the ranks of a host read each other's memory in place.
    pub(super) fn exchange_in_place(&self, group: Group, shard: u64) -> Transfer {
        let Group { hosts, local } = group;
        let sent = Sent { link: (hosts - 1) * shard, host: 0 };
        self.transfer(sent, (hosts - 1) as f64 * self.link.latency + f64::from(steps(local)) * self.host_link.latency)
    }

    /// An all-reduce of `bytes` that are so few that latency decides: ⌈log₂ H⌉ + ⌈log₂ L⌉ steps.
    pub(super) fn agreement(&self, group: Group, bytes: u64) -> Transfer {
        let Group { hosts, local } = group;
        let latency = f64::from(steps(hosts)) * self.link.latency + f64::from(steps(local)) * self.host_link.latency;
        self.transfer(Sent { link: (hosts - 1) * bytes, host: (local - 1) * hosts * bytes }, latency)
    }

    fn transfer(&self, sent: Sent, latency: f64) -> Transfer {
        let links = [(sent.link, self.link), (sent.host, self.host_link)];
        Transfer { sent, latency, links: links.map(|(bytes, link)| bytes as f64 / link.bandwidth) }
    }
}

/// ⌈log₂ n⌉.
fn steps(n: u64) -> u32 {
    n.next_power_of_two().ilog2()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn machine(ranks_per_host: usize) -> Machine {
        let link = Link { bandwidth: 100.0, latency: 3.0 };
        Machine {
            flops: 1.0,
            memory: None,
            ranks_per_host,
            link,
            host_link: Link { bandwidth: 1000.0, latency: 0.5 },
            contention: 0.0,
        }
    }

    fn group(world: usize, ranks_per_host: usize) -> Group {
        machine(ranks_per_host).groups(Mesh { replicate: 1, shard: world }).unwrap().world
    }

    #[test]
    fn groups_of_a_grid_lie_on_as_many_hosts_as_their_ranks_do() {
        let groups = |replicate, shard, ranks_per_host: usize| {
            let groups = machine(ranks_per_host).groups(Mesh { replicate, shard })?;
            let place = |group: Group| (group.hosts, group.local);
            Some((place(groups.shard), place(groups.replicate)))
        };
        // (hosts, ranks on each): 8 ranks on 2 hosts.
        assert_eq!(groups(2, 4, 4), Some(((1, 4), (2, 1))), "a group on each host");
        assert_eq!(groups(4, 2, 4), Some(((1, 2), (2, 2))), "two groups on each host");
        assert_eq!(groups(1, 8, 4), Some(((2, 4), (1, 1))), "a group over both");
        assert_eq!(groups(8, 1, 4), Some(((1, 1), (2, 4))), "nothing but replicas");
        assert_eq!(groups(2, 4, 2), Some(((2, 2), (2, 1))), "groups over two of four hosts");
        assert_eq!(groups(2, 4, 16), Some(((1, 4), (1, 2))), "one host that is not full");
        assert_eq!(groups(1, 6, 4), None, "a host that is not full beside one that is");
        assert_eq!(groups(4, 3, 4), None, "groups of three on hosts of four");
    }

    #[test]
    fn alone_on_its_host_a_rank_sends_all_but_its_own_part_over_its_link() {
        // 4 ranks with 200 bytes each: 3 steps of 3 s, and 3 × 200 bytes at 100 bytes/s.
        let transfer = machine(1).exchange(group(4, 1), 200);
        assert_eq!(transfer, Transfer { sent: Sent { link: 600, host: 0 }, latency: 9.0, links: [6.0, 0.0] });
        assert_eq!(transfer.seconds(), 15.0);
        assert_eq!(machine(1).exchange_in_place(group(4, 1), 200), transfer, "there is nobody to share memory with");
        // ⌈log₂ 5⌉ = 3 steps.
        assert_eq!(machine(1).agreement(group(5, 1), 25).seconds(), 9.0 + 1.0);
    }

    #[test]
    fn on_one_host_only_its_links_count() {
        // 4 ranks with 200 bytes each: 3 steps of 0.5 s, and 600 bytes at 1000 bytes/s.
        let transfer = machine(8).exchange(group(4, 8), 200);
        assert_eq!(transfer, Transfer { sent: Sent { link: 0, host: 600 }, latency: 1.5, links: [0.0, 0.6] });
        assert_eq!(machine(8).exchange_in_place(group(4, 8), 200).seconds(), 1.0, "two steps of a flag, and no bytes");
        assert_eq!(machine(8).exchange(group(1, 8), 200).seconds(), 0.0, "one rank has everything");
    }

    #[test]
    fn between_hosts_the_slower_part_of_the_pipeline_decides() {
        // 3 hosts of 4 ranks with 200 bytes each. To other hosts: 2 × 200 bytes; on the host: to 3 others what 3 hosts have.
        let transfer = machine(4).exchange(group(12, 4), 200);
        let expected =
            Transfer { sent: Sent { link: 400, host: 1800 }, latency: 2.0 * 3.0 + 3.0 * 0.5, links: [4.0, 1.8] };
        assert_eq!(transfer, expected);
        assert_eq!(transfer.seconds(), 7.5 + 4.0);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn a_rank_sends_all_but_its_own_part_however_the_ranks_lie(hosts in 1usize..9, local in 1usize..9, shard in 0u64..1000) {
            let sent = machine(local).exchange(group(hosts * local, local), shard).sent;
            prop_assert_eq!(sent.total(), (hosts * local - 1) as u64 * shard);
        }
    }
}
