//! How parameters are kept and moved: plain values.

use std::str::FromStr;

use pillion_kernels::DType;
use serde::{Deserialize, Serialize};

use crate::Error;

/// Most ranks whose gradients are compared: what they find goes into the one scalar all-reduce of a step.
pub const COMPARED: usize = 16;

/// How ranks get the weights they compute with, where these are sharded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[cfg_attr(feature = "clap", derive(clap::ValueEnum))]
pub enum Gather {
    /// By copying each unit into a slot.
    Copy,
    /// In place, through memory that all ranks of a host map.
    Window,
}

impl std::fmt::Display for Gather {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Gather::Copy => "copy",
            Gather::Window => "window",
        })
    }
}

/// What the ranks of the mesh's shard axis divide among them. What is not sharded, each rank holds whole.
///
/// The optimizer's state is sharded where anything is: an update needs no more of the others than its own shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Sharded {
    /// Weights: each unit is gathered before each use. Whole, it is gathered once a step, after the update.
    pub parameters: bool,
    /// Gradients: each round's is reduced into the shard at once. Whole, a rank adds up its own gradient over the rounds of a step, and it is reduced once,
    /// in the last.
    pub gradients: bool,
    /// Optimizer state and master weights. Where these are whole, every rank makes the whole update.
    pub optimizer: bool,
}

impl Sharded {
    /// Data parallelism: replicas.
    pub const NOTHING: Sharded = Sharded { parameters: false, gradients: false, optimizer: false };
    /// ZeRO-1 (Rajbhandari et al. 2020).
    pub const OPTIMIZER: Sharded = Sharded { parameters: false, gradients: false, optimizer: true };
    /// ZeRO-2.
    pub const GRADIENTS: Sharded = Sharded { parameters: false, gradients: true, optimizer: true };
    /// ZeRO-3, fully sharded data parallelism.
    pub const EVERYTHING: Sharded = Sharded { parameters: true, gradients: true, optimizer: true };

    const NAMES: [(&str, Sharded); 4] = [
        ("nothing", Sharded::NOTHING),
        ("zero-1", Sharded::OPTIMIZER),
        ("zero-2", Sharded::GRADIENTS),
        ("zero-3", Sharded::EVERYTHING),
    ];
}

impl std::fmt::Display for Sharded {
    /// What is sharded, as [`Sharded::from_str`] reads it.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let parts = [(self.parameters, "parameters"), (self.gradients, "gradients"), (self.optimizer, "optimizer")];
        let parts: Vec<&str> = parts.into_iter().filter(|part| part.0).map(|part| part.1).collect();
        f.write_str(&if parts.is_empty() { "nothing".to_owned() } else { parts.join(",") })
    }
}

impl FromStr for Sharded {
    type Err = String;

    /// Reads `parameters,gradients,optimizer`, any part of it that [`Policy::mesh`] accepts, or one of the names `nothing`, `zero-1`, `zero-2`, `zero-3`.
    fn from_str(text: &str) -> Result<Sharded, String> {
        if let Some(&(_, sharded)) = Sharded::NAMES.iter().find(|(name, _)| *name == text) {
            return Ok(sharded);
        }
        let mut sharded = Sharded::NOTHING;
        for part in text.split(',') {
            match part.trim() {
                "parameters" => sharded.parameters = true,
                "gradients" => sharded.gradients = true,
                "optimizer" => sharded.optimizer = true,
                other => {
                    return Err(format!(
                        "{other:?} cannot be sharded: give some of parameters,gradients,optimizer, or nothing, zero-1, zero-2 or zero-3"
                    ));
                }
            }
        }
        sharded.check()?;
        Ok(sharded)
    }
}

impl Sharded {
    fn check(self) -> Result<(), String> {
        if (self.parameters || self.gradients) && !self.optimizer {
            return Err(format!(
                "{self} is sharded, but not the optimizer: shard it too, since a whole one would need all of them"
            ));
        }
        Ok(())
    }
}

/// The ranks as a grid: `replicate` groups of `shard` ranks each. Ranks next to each other are of one group, so a group lies on one host where it
/// fits there. Rank r is number r mod `shard` of group r div `shard`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Mesh {
    /// Number of groups, which hold the same.
    pub replicate: usize,
    /// Ranks of a group, which divide what is sharded.
    pub shard: usize,
}

impl Mesh {
    /// Number of ranks.
    pub fn world(&self) -> usize {
        self.replicate * self.shard
    }

    /// A rank's place in its group.
    pub fn shard_of(&self, rank: usize) -> usize {
        rank % self.shard
    }

    /// A rank's group.
    pub fn replica_of(&self, rank: usize) -> usize {
        rank / self.shard
    }
}

/// How parameters are kept and moved.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Policy {
    /// Type of the weights that are gathered and computed with: f32 or bf16. Master weights, optimizer state and sums of
    /// gradients are f32.
    pub weights: DType,
    /// Type in which gradients travel to the shards: f32, or bf16, which rounds each rank's gradient once; sums are f32.
    pub reduce: DType,
    /// Number of groups of ranks that each hold everything: the mesh's replicate axis. With nothing sharded it does not matter.
    pub replicas: usize,
    /// What the ranks of a group divide among them.
    pub sharded: Sharded,
    /// How sharded weights are gathered.
    pub gather: Gather,
    /// Units that follow each other move as one operation, a *bucket*, as long as their weights, in
    /// the type in which they are gathered, take at most so many bytes. 0: each moves by itself. No
    /// bit of a step or of a checkpoint depends on it.
    pub bucket: u64,
    /// Number of buckets gathered ahead of the one in use.
    pub prefetch: usize,
    /// Gathered buckets that exist at a time, and gradients on their way: at least `prefetch` + 1.
    /// What is whole has a slot for each bucket.
    pub slots: usize,
    /// Whether collectives go on while the queue computes. Otherwise each is waited for where it starts, which shows what overlap is worth; no bit depends on it.
    pub overlap: bool,
    /// Largest norm of the gradient, positive; a longer one is scaled down to it. None: no limit.
    pub clip: Option<f64>,
    /// Names of what the optimizer keeps for each weight ([`Optimizer::states`](crate::Optimizer)),
    /// f32 each.
    pub states: &'static [&'static str],
}

/// What AdamW keeps for each weight: the first and the second moment.
pub const ADAMW_STATES: &[&str] = &["m", "v"];

impl Default for Policy {
    fn default() -> Policy {
        Policy {
            weights: DType::F32,
            reduce: DType::F32,
            replicas: 1,
            sharded: Sharded::EVERYTHING,
            gather: Gather::Window,
            bucket: 0,
            prefetch: 1,
            slots: 2,
            overlap: true,
            clip: Some(1.0),
            states: ADAMW_STATES,
        }
    }
}

impl Policy {
    /// Whether an engine of this policy on `world` ranks of one host can compare groups by this `eta` ([`Engine::compare_groups`](crate::Engine::compare_groups)).
    ///
    /// # Errors
    /// [`Error::Policy`] that says why not.
    pub fn check_comparison(&self, world: usize, eta: f64) -> Result<(), Error> {
        let refuse = |why: String| Err(Error::Policy(format!("groups cannot be compared {why}")));
        if !(eta.is_finite() && eta > 0.0) {
            return refuse(format!("by an eta of {eta}: choose a number above 0"));
        }
        if self.sharded == Sharded::NOTHING || self.mesh(world)?.replicate > 1 {
            let remedy = "shard at least the optimizer, in one group";
            return refuse(format!("unless all ranks sum gradients to shards: {remedy}"));
        }
        if world > COMPARED {
            return refuse(format!("on {world} ranks: at most {COMPARED}"));
        }
        Ok(())
    }

    /// The grid that `world` ranks make. With nothing sharded, all are replicas.
    ///
    /// # Errors
    /// [`Error::Policy`] when there is none, or the policy contradicts itself.
    pub fn mesh(&self, world: usize) -> Result<Mesh, Error> {
        let refuse = |reason: String| Err(Error::Policy(reason));
        self.sharded.check().map_err(Error::Policy)?;
        for (what, dtype) in [("weights", self.weights), ("reduced gradients", self.reduce)] {
            if !matches!(dtype, DType::F32 | DType::Bf16) {
                return refuse(format!("{what} of type {dtype}: choose f32 or bf16"));
            }
        }
        if self.slots <= self.prefetch {
            let (slots, prefetch) = (self.slots, self.prefetch);
            return refuse(format!(
                "{slots} slots cannot hold {prefetch} prefetched buckets and the one in use: give at least {}",
                prefetch + 1
            ));
        }
        if let Some(clip) = self.clip.filter(|clip| !(clip.is_finite() && *clip > 0.0)) {
            return refuse(format!("a largest gradient norm of {clip}: choose a positive number, or none"));
        }
        let replicas = self.replicas;
        if replicas == 0 || !world.is_multiple_of(replicas) {
            return refuse(format!(
                "{world} ranks cannot make {replicas} equal groups: choose a divisor of the number of ranks"
            ));
        }
        let shard = if self.sharded == Sharded::NOTHING { 1 } else { world / replicas };
        Ok(Mesh { replicate: world / shard, shard })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_sharded_reads_as_it_prints() {
        for parameters in [false, true] {
            for gradients in [false, true] {
                for optimizer in [false, true] {
                    let sharded = Sharded { parameters, gradients, optimizer };
                    let read = sharded.to_string().parse::<Sharded>();
                    match optimizer || !(parameters || gradients) {
                        true => assert_eq!(read, Ok(sharded)),
                        false => assert!(read.unwrap_err().contains("not the optimizer"), "{sharded}"),
                    }
                }
            }
        }
        for (name, sharded) in Sharded::NAMES {
            assert_eq!(name.parse(), Ok(sharded));
        }
        for wrong in ["", "zero-4", "parameters,", "weights"] {
            assert!(wrong.parse::<Sharded>().unwrap_err().contains("cannot be sharded"), "{wrong}");
        }
    }

    #[test]
    fn ranks_make_a_grid_whose_groups_are_neighbours() {
        let mesh = Policy { replicas: 2, ..Policy::default() }.mesh(6).unwrap();
        assert_eq!((mesh, mesh.world()), (Mesh { replicate: 2, shard: 3 }, 6));
        let places: Vec<_> = (0..6).map(|rank| (mesh.replica_of(rank), mesh.shard_of(rank))).collect();
        assert_eq!(places, [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]);
        let nothing = Policy { sharded: Sharded::NOTHING, ..Policy::default() };
        assert_eq!(nothing.mesh(4).unwrap(), Mesh { replicate: 4, shard: 1 });
    }

    #[test]
    fn a_policy_that_contradicts_itself_says_how() {
        let default = Policy::default();
        let optimizer_whole = Sharded { optimizer: false, ..Sharded::EVERYTHING };
        for (policy, reason) in [
            (Policy { replicas: 3, ..default }, "3 equal groups"),
            (Policy { replicas: 0, ..default }, "0 equal groups"),
            (Policy { prefetch: 2, ..default }, "give at least 3"),
            (Policy { sharded: optimizer_whole, ..default }, "not the optimizer"),
            (Policy { weights: DType::F64, ..default }, "choose f32 or bf16"),
            (Policy { reduce: DType::U32, ..default }, "choose f32 or bf16"),
            (Policy { clip: Some(0.0), ..default }, "choose a positive number"),
            (Policy { clip: Some(f64::NAN), ..default }, "choose a positive number"),
        ] {
            let error = policy.mesh(4).unwrap_err().to_string();
            assert!(error.contains(reason), "{error}");
        }
    }
}
