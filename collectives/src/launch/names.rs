//! The variables in which each launcher gives a rank's place.

/// The names under which a launcher gives a rank's place.
pub(super) struct Names {
    pub(super) rank: &'static str,
    pub(super) world: &'static str,
    pub(super) local_rank: &'static str,
    pub(super) local_world: &'static str,
    /// What to do when one of them is missing.
    pub(super) remedy: &'static str,
}

pub(super) const TORCH: Names = Names {
    rank: "RANK",
    world: "WORLD_SIZE",
    local_rank: "LOCAL_RANK",
    local_world: "LOCAL_WORLD_SIZE",
    remedy: "start with torchrun, or set RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, \
             MASTER_ADDR and MASTER_PORT, or none of them",
};
pub(super) const OPEN_MPI: Names = Names {
    rank: "OMPI_COMM_WORLD_RANK",
    world: "OMPI_COMM_WORLD_SIZE",
    local_rank: "OMPI_COMM_WORLD_LOCAL_RANK",
    local_world: "OMPI_COMM_WORLD_LOCAL_SIZE",
    remedy: "start with Open MPI's mpirun, and let it pass its variables on",
};
pub(super) const HYDRA: Names = Names {
    rank: "PMI_RANK",
    world: "PMI_SIZE",
    local_rank: "MPI_LOCALRANKID",
    local_world: "MPI_LOCALNRANKS",
    remedy: "start with the mpiexec of MPICH or Intel MPI, or with srun",
};
pub(super) const SLURM: Names = Names {
    rank: "SLURM_PROCID",
    world: "SLURM_STEP_NUM_TASKS",
    local_rank: "SLURM_LOCALID",
    local_world: "SLURM_STEP_TASKS_PER_NODE",
    remedy: "start with srun, and let it pass its variables on",
};

/// JSM's `jsrun` gives all four.
pub(super) const JSM: Names = Names {
    rank: "JSM_NAMESPACE_RANK",
    world: "JSM_NAMESPACE_SIZE",
    local_rank: "JSM_NAMESPACE_LOCAL_RANK",
    local_world: "JSM_NAMESPACE_LOCAL_SIZE",
    remedy: "start with jsrun, and let it pass its variables on",
};
/// MVAPICH2's `mpirun_rsh` gives all four.
pub(super) const MVAPICH: Names = Names {
    rank: "MV2_COMM_WORLD_RANK",
    world: "MV2_COMM_WORLD_SIZE",
    local_rank: "MV2_COMM_WORLD_LOCAL_RANK",
    local_world: "MV2_COMM_WORLD_LOCAL_SIZE",
    remedy: "start with mpirun_rsh, and let it pass its variables on",
};
/// HPE's PALS gives its own ranks, and the sizes under the names that Cray's PMI reads.
pub(super) const PALS: Names = Names {
    rank: "PALS_RANKID",
    world: "PMI_SIZE",
    local_rank: "PALS_LOCAL_RANKID",
    local_world: "PMI_LOCAL_SIZE",
    remedy: "start with the mpiexec of PALS, and let it pass its variables on",
};
/// `flux run` gives the number of nodes instead of a node's number of tasks.
pub(super) const FLUX: Names = Names {
    rank: "FLUX_TASK_RANK",
    world: "FLUX_JOB_SIZE",
    local_rank: "FLUX_TASK_LOCAL_ID",
    local_world: "FLUX_JOB_NNODES",
    remedy: "start with flux run, and let it pass its variables on",
};

/// Variables that say only which rank this process is, and the launchers that set them. Without a
/// recognised launcher beside them the number of ranks is unknown.
pub(super) const RANK_ALONE: [(&str, &str); 5] = [
    ("PMIX_RANK", "a PMIx launcher such as prterun"),
    ("ALPS_APP_PE", "ALPS (aprun)"),
    ("MPT_LRANK", "HPE MPT"),
    ("MPIRUN_RANK", "an old MVAPICH"),
    ("PMI_LOCAL_RANK", "a PMI launcher"),
];

impl Names {
    pub(super) fn all(&self) -> [&'static str; 4] {
        [self.rank, self.world, self.local_rank, self.local_world]
    }
}
