//! The parsers of what launchers say, for fuzzers.

/// The variables of all launchers.
pub mod launch_variables {
    use super::super::variables::MOST_RANKS;
    use super::super::{JOB_LENGTH, Launch};

    /// Lines of names and values.
    pub fn seeds() -> Vec<Vec<u8>> {
        let torch = "RANK=1\nWORLD_SIZE=4\nLOCAL_RANK=1\nLOCAL_WORLD_SIZE=2\nMASTER_ADDR=node1\nMASTER_PORT=29500";
        let seeds = [
            "PILLION_RANK=0\nPILLION_WORLD=2\nPILLION_JOB=a\nPILLION_LAUNCHER_PID=1\nPILLION_ADDRESS=node1:29400",
            torch,
            &format!("{torch}\nTORCHELASTIC_RUN_ID=none\nTORCHELASTIC_RESTART_COUNT=1\nPILLION_SECRET=x"),
            "OMPI_COMM_WORLD_RANK=1\nOMPI_COMM_WORLD_SIZE=2\nOMPI_COMM_WORLD_LOCAL_RANK=1\nOMPI_COMM_WORLD_LOCAL_SIZE=2\n\
             PMIX_NAMESPACE=job",
            "PMI_RANK=1\nPMI_SIZE=2\nMPI_LOCALRANKID=1\nMPI_LOCALNRANKS=2",
            "SLURM_JOB_ID=10\nSLURM_STEP_ID=0\nSLURM_PROCID=2\nSLURM_STEP_NUM_TASKS=7\nSLURM_LOCALID=0\nSLURM_NODEID=1\n\
             SLURM_STEP_TASKS_PER_NODE=2(x3),1\nSLURM_STEP_NODELIST=n[01-03],m",
            "FLUX_TASK_RANK=1\nFLUX_JOB_SIZE=2\nFLUX_TASK_LOCAL_ID=1\nFLUX_JOB_NNODES=1\nFLUX_JOB_ID=f1",
            "PMIX_RANK=1",
        ];
        seeds.iter().map(|seed| seed.as_bytes().to_vec()).collect()
    }

    /// A place that is read is one that a rank can have.
    pub fn check(data: &[u8]) {
        let text = String::from_utf8_lossy(data);
        let variables: Vec<(&str, &str)> = text.lines().filter_map(|line| line.split_once('=')).collect();
        let lookup =
            |name: &str| variables.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned());
        let Ok(Launch { rank, world, local_rank, local_world, job, meeting, .. }) = Launch::from_variables(lookup)
        else {
            return;
        };
        assert!(rank < world && local_rank < local_world && local_world <= world && world <= MOST_RANKS);
        assert!((1..=JOB_LENGTH).contains(&job.len()), "{job}");
        assert!(job.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte)), "{job}");
        if let Some(meeting) = meeting {
            let (host, port) = meeting.address.rsplit_once(':').expect("a port");
            assert!(!host.is_empty() && port.parse::<u16>().is_ok_and(|port| port > 0), "{}", meeting.address);
        }
    }
}

/// Slurm's lists of nodes, and of tasks on each.
pub mod launch_lists {
    use super::super::meeting::first_node;
    use super::super::variables::tasks_per_node;

    /// Lists as srun writes them.
    pub fn seeds() -> Vec<Vec<u8>> {
        let seeds = ["node[003-010,020]-ib,other", "rack[0-1]node[04-11]", "a,b[1-2]", "2(x3),1", "16"];
        seeds.iter().map(|seed| seed.as_bytes().to_vec()).collect()
    }

    /// The first node is one name, and counts are those that are written.
    pub fn check(data: &[u8]) {
        let Ok(text) = str::from_utf8(data) else { return };
        if let Some(node) = first_node(text) {
            assert!(!node.is_empty() && !node.contains(['[', ']', ',', ' ', ':']), "{node}");
            assert_eq!(first_node(&node), Some(node.clone()));
        }
        if let Some(counts) = tasks_per_node(text) {
            let written: Vec<String> = counts.iter().map(|(tasks, nodes)| format!("{tasks}(x{nodes})")).collect();
            assert_eq!(tasks_per_node(&written.join(",")), Some(counts));
        }
    }
}
