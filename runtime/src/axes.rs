//! The communicators along the axes of the mesh.

use std::sync::Arc;

use pillion_collectives::{Communicator, Recorded, Traffic};
use pillion_kernels::{Buffer, DType, Device};

use crate::{Error, Mesh, Policy, Sharded};

/// The ranks that this one moves parameters between.
pub(crate) struct Axes {
    pub(crate) mesh: Mesh,
    /// All ranks.
    pub(crate) world: Arc<Communicator>,
    /// Those that divide what is sharded; none where nothing is.
    pub(crate) shard: Option<Arc<Communicator>>,
    /// Those that hold the same as this one, one of each group; none where there is one group.
    pub(crate) replicate: Option<Arc<Communicator>>,
}

impl Axes {
    /// Splits `world`; every rank calls it.
    pub(crate) fn new(world: Arc<Communicator>, policy: &Policy) -> Result<Axes, Error> {
        let mesh = policy.mesh(world.world())?;
        let rank = world.rank();
        let split = |color: usize| -> Result<Arc<Communicator>, Error> {
            let part = world.split(Some(color as u64), rank as u64)?;
            Ok(Arc::new(part.expect("a rank with a color is in a part")))
        };
        let shard = match (policy.sharded, mesh.replicate) {
            (Sharded::NOTHING, _) => None,
            (_, 1) => Some(world.clone()),
            _ => Some(split(mesh.replica_of(rank))?),
        };
        let replicate = match (mesh.replicate, mesh.shard) {
            (1, _) => None,
            (_, 1) => Some(world.clone()),
            _ => Some(split(mesh.shard_of(rank))?),
        };
        Ok(Axes { mesh, world, shard, replicate })
    }

    /// This rank's shard.
    pub(crate) fn shard_number(&self) -> usize {
        self.mesh.shard_of(self.world.rank())
    }

    /// This rank's group.
    pub(crate) fn replica(&self) -> usize {
        self.mesh.replica_of(self.world.rank())
    }

    /// The first error along any axis, if there was one.
    pub(crate) fn healthy(&self) -> Result<(), Error> {
        let parts = [Some(&self.world), self.shard.as_ref(), self.replicate.as_ref()];
        Ok(parts.into_iter().flatten().try_for_each(|part| part.healthy())?)
    }

    /// What has been moved along all axes so far.
    pub(crate) fn traffic(&self) -> Traffic {
        let parts = [self.shard.as_ref(), self.replicate.as_ref()].into_iter().flatten();
        let parts = parts.filter(|part| !Arc::ptr_eq(part, &self.world)).map(|part| part.traffic());
        parts.fold(self.world.traffic(), |sum, part| Traffic {
            operations: sum.operations + part.operations,
            bytes: sum.bytes + part.bytes,
        })
    }

    /// What was recorded of collectives, along the two axes, since this was last asked.
    pub(crate) fn recorded(&self) -> [Vec<Recorded>; 2] {
        [&self.shard, &self.replicate].map(|axis| axis.as_ref().map_or_else(Vec::new, |axis| axis.recorded()))
    }

    /// Zeroed memory that the ranks along an axis read in place, where there is such an axis.
    pub(crate) fn allocate(
        axis: Option<&Arc<Communicator>>,
        device: &dyn Device,
        dtype: DType,
        len: usize,
    ) -> Result<Buffer, Error> {
        Ok(match axis {
            Some(communicator) => communicator.allocate(device, dtype, len)?,
            None => device.allocate(dtype, len)?,
        })
    }
}
