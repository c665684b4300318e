//! What each launcher's variables must be read as, and which sets of them must be refused.
//!
//! The values are those that the launchers document, or were seen to set.

use std::collections::HashSet;

use pillion_collectives::launch::{JOB_LENGTH, Launch, LaunchError, Source};
use proptest::prelude::*;

type Set<'a> = Vec<(&'a str, &'a str)>;

fn read(variables: &[(&str, &str)]) -> Result<Launch, LaunchError> {
    // Later entries override earlier ones, so that a test can change one of a complete set.
    let value = |name: &str| variables.iter().rev().find(|(key, _)| *key == name);
    Launch::from_variables(|name| value(name).map(|(_, value)| value.to_string()))
}

fn place(variables: &[(&str, &str)]) -> (Source, usize, usize, usize, usize) {
    let launch = read(variables).unwrap();
    (launch.source, launch.rank, launch.world, launch.local_rank, launch.local_world)
}

fn refused(variables: &[(&str, &str)]) -> String {
    read(variables).unwrap_err().to_string()
}

fn without<'a>(variables: &[(&'a str, &'a str)], name: &str) -> Set<'a> {
    variables.iter().copied().filter(|(key, _)| *key != name).collect()
}

fn with<'a>(variables: &[(&'a str, &'a str)], more: &[(&'a str, &'a str)]) -> Set<'a> {
    [variables, more].concat()
}

const OWN: &[(&str, &str)] = &[
    ("PILLION_RANK", "2"),
    ("PILLION_WORLD", "4"),
    ("PILLION_JOB", "1000-local-00ff-0"),
    ("PILLION_LAUNCHER_PID", "4242"),
];
/// `torchrun --nnodes 2 --nproc-per-node 4`, second host.
const TORCHRUN: &[(&str, &str)] = &[
    ("RANK", "5"),
    ("WORLD_SIZE", "8"),
    ("LOCAL_RANK", "1"),
    ("LOCAL_WORLD_SIZE", "4"),
    ("MASTER_ADDR", "node0"),
    ("MASTER_PORT", "29500"),
    ("TORCHELASTIC_RUN_ID", "none"),
    ("TORCHELASTIC_RESTART_COUNT", "0"),
];
const OPEN_MPI_4: &[(&str, &str)] = &[
    ("OMPI_COMM_WORLD_RANK", "3"),
    ("OMPI_COMM_WORLD_SIZE", "4"),
    ("OMPI_COMM_WORLD_LOCAL_RANK", "1"),
    ("OMPI_COMM_WORLD_LOCAL_SIZE", "2"),
    ("PMIX_NAMESPACE", "3236233217"),
    ("OMPI_MCA_ess_base_jobid", "3236233217"),
    ("OMPI_MCA_orte_hnp_uri", "3236233216.0;tcp://10.0.0.1,10.1.0.1:33559"),
];
const OPEN_MPI_5: &[(&str, &str)] = &[
    ("OMPI_COMM_WORLD_RANK", "3"),
    ("OMPI_COMM_WORLD_SIZE", "4"),
    ("OMPI_COMM_WORLD_LOCAL_RANK", "1"),
    ("OMPI_COMM_WORLD_LOCAL_SIZE", "2"),
    ("PMIX_NAMESPACE", "prterun-node0-257891@1"),
];
const HYDRA: &[(&str, &str)] =
    &[("PMI_RANK", "4"), ("PMI_SIZE", "5"), ("MPI_LOCALRANKID", "1"), ("MPI_LOCALNRANKS", "2")];
/// `srun -N 4 -n 7`: three nodes with two tasks, one with one.
const SRUN: &[(&str, &str)] = &[
    ("SLURM_JOB_ID", "815"),
    ("SLURM_STEP_ID", "0"),
    ("SLURM_PROCID", "6"),
    ("SLURM_STEP_NUM_TASKS", "7"),
    ("SLURM_NTASKS", "7"),
    ("SLURM_LOCALID", "0"),
    ("SLURM_NODEID", "3"),
    ("SLURM_STEP_TASKS_PER_NODE", "2(x3),1"),
    ("SLURM_TASKS_PER_NODE", "2(x3),1"),
];
/// The shell of a batch script: an allocation, and no step.
const SBATCH: &[(&str, &str)] = &[
    ("SLURM_JOB_ID", "815"),
    ("SLURM_NTASKS", "7"),
    ("SLURM_NPROCS", "7"),
    ("SLURM_PROCID", "0"),
    ("SLURM_LOCALID", "0"),
    ("SLURM_NODEID", "0"),
    ("SLURM_TASKS_PER_NODE", "2(x3),1"),
];
/// `flux run -N 1 -n 4`, with the PMI that it offers by default.
const FLUX: &[(&str, &str)] = &[
    ("FLUX_TASK_RANK", "3"),
    ("FLUX_JOB_SIZE", "4"),
    ("FLUX_TASK_LOCAL_ID", "3"),
    ("FLUX_JOB_NNODES", "1"),
    ("FLUX_JOB_ID", "23622320128"),
    ("FLUX_URI", "local:///tmp/flux-abcdef/local-0"),
    ("PMI_RANK", "3"),
    ("PMI_SIZE", "4"),
    ("PMI_FD", "9"),
];
/// `mpiexec -n 4 --ppn 2` of HPE's PALS, second host.
const PALS: &[(&str, &str)] = &[
    ("PALS_RANKID", "3"),
    ("PALS_LOCAL_RANKID", "1"),
    ("PALS_NODEID", "1"),
    ("PALS_APID", "b5a5a4ef-6bcb-4b4e-9f5c-5f2f0f7f5a11"),
    ("PMI_RANK", "3"),
    ("PMI_SIZE", "4"),
    ("PMI_LOCAL_RANK", "1"),
    ("PMI_LOCAL_SIZE", "2"),
];
/// MVAPICH2's `mpirun_rsh -np 4`, two hosts.
const MVAPICH: &[(&str, &str)] = &[
    ("MV2_COMM_WORLD_RANK", "2"),
    ("MV2_COMM_WORLD_SIZE", "4"),
    ("MV2_COMM_WORLD_LOCAL_RANK", "0"),
    ("MV2_COMM_WORLD_LOCAL_SIZE", "2"),
    ("PMI_ID", "2"),
];
/// `jsrun -n 4`, one host.
const JSRUN: &[(&str, &str)] = &[
    ("JSM_NAMESPACE_RANK", "1"),
    ("JSM_NAMESPACE_SIZE", "4"),
    ("JSM_NAMESPACE_LOCAL_RANK", "1"),
    ("JSM_NAMESPACE_LOCAL_SIZE", "4"),
    ("PMIX_NAMESPACE", "7"),
    ("PMIX_RANK", "1"),
    ("LSB_JOBID", "123456"),
];

#[test]
fn each_launcher_is_recognised() {
    assert_eq!(place(&[]), (Source::Single, 0, 1, 0, 1));
    assert_eq!(place(OWN), (Source::Local, 2, 4, 2, 4));
    assert_eq!(place(TORCHRUN), (Source::Torchrun, 5, 8, 1, 4));
    assert_eq!(place(OPEN_MPI_4), (Source::OpenMpi, 3, 4, 1, 2));
    assert_eq!(place(OPEN_MPI_5), (Source::OpenMpi, 3, 4, 1, 2));
    assert_eq!(place(HYDRA), (Source::Pmi, 4, 5, 1, 2));
    assert_eq!(place(SRUN), (Source::Slurm, 6, 7, 0, 1));
    assert_eq!(place(FLUX), (Source::Flux, 3, 4, 3, 4));
    assert_eq!(place(PALS), (Source::Pals, 3, 4, 1, 2));
    assert_eq!(place(MVAPICH), (Source::Mvapich, 2, 4, 0, 2));
    assert_eq!(place(JSRUN), (Source::Jsm, 1, 4, 1, 4));
    assert_eq!(read(OWN).unwrap().job, "1000-local-00ff-0");
    // As seen from Open MPI 5.0.11 on one host: the local count has an order of its own.
    let own_order = ["1", "3", "2", "3"];
    let seen: Set = OPEN_MPI_5.iter().zip(own_order).map(|((name, _), value)| (*name, value)).collect();
    assert_eq!(place(&with(OPEN_MPI_5, &seen)), (Source::OpenMpi, 1, 3, 2, 3));
}

#[test]
fn an_allocation_without_a_step_is_a_single_process() {
    assert_eq!(place(SBATCH).0, Source::Single);
    // 0xfffffffb and 0xfffffffa: batch script and interactive shell, in slurm.h.
    for step in ["4294967291", "4294967290", "batch", "interactive", ""] {
        assert_eq!(place(&with(SBATCH, &[("SLURM_STEP_ID", step)])).0, Source::Single, "{step:?}");
    }
    // 0xfffffff0 is the last number of an ordinary step.
    assert_eq!(place(&with(SRUN, &[("SLURM_STEP_ID", "4294967280")])).0, Source::Slurm);
    assert_eq!(place(&with(SRUN, &[("SLURM_STEP_ID", "4294967281")])).0, Source::Single);
    let text = refused(&with(SRUN, &[("SLURM_STEP_ID", "three")]));
    assert!(text.contains("SLURM_STEP_ID") && text.contains("three"), "{text}");
}

#[test]
fn the_innermost_launcher_wins() {
    for inner in [OWN, TORCHRUN, OPEN_MPI_4, OPEN_MPI_5, HYDRA] {
        assert_eq!(place(&with(SBATCH, inner)), place(inner));
        // `srun torchrun`, and an mpirun that starts its daemons by srun.
        assert_eq!(place(&with(SRUN, inner)), place(inner));
    }
    // One torchrun agent for each rank of mpirun.
    assert_eq!(place(&with(OPEN_MPI_4, TORCHRUN)), place(TORCHRUN));
    assert_eq!(place(&with(HYDRA, TORCHRUN)), place(TORCHRUN));
    for others in [TORCHRUN, OPEN_MPI_4, HYDRA, SRUN] {
        assert_eq!(place(&with(others, OWN)), place(OWN));
    }
}

#[test]
fn a_rank_without_a_number_of_ranks_is_refused_by_the_variables_name() {
    for set in [FLUX, PALS, MVAPICH, JSRUN] {
        let (variable, value) = set[0];
        let text = refused(&[(variable, value)]);
        assert!(text.contains(&format!("{variable} is set, ")) && text.contains(" is not: start with"), "{text}");
    }
    for variable in ["PMIX_RANK", "ALPS_APP_PE", "MPT_LRANK", "MPIRUN_RANK", "PMI_LOCAL_RANK"] {
        for value in ["0", "3"] {
            let text = refused(&[(variable, value)]);
            let remedies = [variable, "how many ranks", "mpirun, srun or torchrun", "RANK, WORLD_SIZE", "unset"];
            assert!(remedies.iter().all(|part| text.contains(part)), "{text}");
        }
    }
    // Flux gives the number of nodes, from which that of a node's tasks follows only on one.
    let text = refused(&with(FLUX, &[("FLUX_JOB_NNODES", "2")]));
    assert!(text.contains("FLUX_JOB_NNODES is \"2\"") && text.contains("flux run -N 1"), "{text}");
}

#[test]
fn launchers_that_say_the_same_do_not_disturb_each_other_and_others_do() {
    // Open MPI 5 and `srun --mpi=pmix` set it beside their own.
    assert_eq!(place(&with(OPEN_MPI_5, &[("PMIX_RANK", "3")])), place(OPEN_MPI_5));
    assert_eq!(place(&with(SRUN, &[("PMIX_RANK", "6")])), place(SRUN));
    assert_eq!(place(&with(SRUN, &[("PALS_RANKID", "6"), ("PMI_LOCAL_RANK", "0")])), place(SRUN));
    // `flux run -o pmi=cray-pals` sets PALS's for Cray MPICH.
    assert_eq!(place(&with(FLUX, &[("PALS_RANKID", "3"), ("PALS_NODEID", "0")])), place(FLUX));
    for inner in [OWN, TORCHRUN, OPEN_MPI_5, HYDRA] {
        for outer in [FLUX, PALS, MVAPICH, JSRUN] {
            assert_eq!(place(&with(outer, inner)), place(inner));
        }
    }
    // Below a broker that srun has started, every task would be the broker's rank.
    let text = refused(&with(SRUN, &FLUX[..6]));
    assert!(text.contains("FLUX_TASK_RANK is 3") && text.contains("SLURM_PROCID is 6"), "{text}");
    assert_eq!(place(&with(SBATCH, FLUX)), place(FLUX));
    let text = refused(&with(FLUX, &[("PMIX_RANK", "0")]));
    assert!(text.contains("PMIX_RANK is 0") && text.contains("FLUX_TASK_RANK is 3"), "{text}");
    // Exported by a wrapper script.
    assert_eq!(place(&with(JSRUN, &[("RANK", "1"), ("WORLD_SIZE", "4")])), place(JSRUN));
    assert!(refused(&with(JSRUN, &[("LOCAL_RANK", "0")])).contains("LOCAL_RANK is 0"));
}

#[test]
fn variables_exported_beside_a_launcher_must_agree_with_it() {
    let exported = [("RANK", "3"), ("WORLD_SIZE", "4"), ("LOCAL_RANK", "1"), ("MASTER_PORT", "1")];
    assert_eq!(place(&with(OPEN_MPI_4, &exported)), place(OPEN_MPI_4));
    let text = refused(&with(OPEN_MPI_4, &[("WORLD_SIZE", "8")]));
    for part in ["WORLD_SIZE is 8", "OMPI_COMM_WORLD_SIZE is 4", "unset"] {
        assert!(text.contains(part), "{text}");
    }
    let text = refused(&with(HYDRA, &[("RANK", "0")]));
    assert!(text.contains("RANK is 0") && text.contains("PMI_RANK is 4"), "{text}");
    // An sbatch script exports the world size, and srun's tasks inherit it.
    assert_eq!(place(&with(SRUN, &[("WORLD_SIZE", "7")])), place(SRUN));
    let text = refused(&with(SRUN, &[("WORLD_SIZE", "4")]));
    assert!(text.contains("SLURM_STEP_NUM_TASKS is 7"), "{text}");
    // `srun --mpi=pmi2` sets rank and size, and says nothing of the node.
    assert_eq!(place(&with(SRUN, &[("PMI_RANK", "6"), ("PMI_SIZE", "7")])), place(SRUN));
    assert!(refused(&with(SRUN, &[("PMI_RANK", "5")])).contains("PMI_RANK is 5"));
    // A complete set by hand stands before Slurm.
    let by_hand = without(&without(TORCHRUN, "TORCHELASTIC_RUN_ID"), "TORCHELASTIC_RESTART_COUNT");
    assert_eq!(place(&with(SRUN, &by_hand)), (Source::Torchrun, 5, 8, 1, 4));
}

#[test]
fn a_missing_variable_is_named_with_the_remedy() {
    let cases = [
        (OWN, "PILLION_RANK PILLION_WORLD PILLION_JOB PILLION_LAUNCHER_PID", "--ranks"),
        (TORCHRUN, "RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT", "torchrun"),
        (OPEN_MPI_4, "OMPI_COMM_WORLD_RANK OMPI_COMM_WORLD_SIZE", "mpirun"),
        (OPEN_MPI_4, "OMPI_COMM_WORLD_LOCAL_RANK OMPI_COMM_WORLD_LOCAL_SIZE", "mpirun"),
        (OPEN_MPI_5, "PMIX_NAMESPACE", "mpirun"),
        (HYDRA, "PMI_RANK PMI_SIZE MPI_LOCALRANKID MPI_LOCALNRANKS", "mpiexec"),
        (SRUN, "SLURM_JOB_ID SLURM_PROCID SLURM_STEP_NUM_TASKS", "srun"),
        (SRUN, "SLURM_LOCALID SLURM_NODEID", "srun"),
        (FLUX, "FLUX_JOB_SIZE FLUX_TASK_LOCAL_ID FLUX_JOB_NNODES FLUX_JOB_ID", "flux run"),
        (PALS, "PMI_SIZE PALS_LOCAL_RANKID PMI_LOCAL_SIZE PALS_APID", "mpiexec of PALS"),
        (MVAPICH, "MV2_COMM_WORLD_SIZE MV2_COMM_WORLD_LOCAL_RANK MV2_COMM_WORLD_LOCAL_SIZE", "mpirun_rsh"),
        (JSRUN, "JSM_NAMESPACE_SIZE JSM_NAMESPACE_LOCAL_RANK JSM_NAMESPACE_LOCAL_SIZE PMIX_NAMESPACE", "jsrun"),
    ];
    for (set, names, remedy) in cases {
        for name in names.split(' ') {
            let text = refused(&without(set, name));
            let parts = [name, " is not: ", remedy];
            assert!(parts.iter().all(|part| text.contains(part)), "{name}: {text}");
        }
    }
    assert!(refused(&[("RANK", "0")]).starts_with("RANK is set, WORLD_SIZE is not"));
    assert!(refused(&[("WORLD_SIZE", "2")]).starts_with("WORLD_SIZE is set, RANK is not"));
    assert!(refused(&[("LOCAL_RANK", "0")]).starts_with("LOCAL_RANK is set, RANK is not"));
    assert!(refused(&[("PMI_RANK", "0"), ("PMI_SIZE", "2")]).contains("MPI_LOCALRANKID is not"));
}

#[test]
fn numbers_that_cannot_be_are_refused_by_name_and_value() {
    let cases = [
        (TORCHRUN, "RANK", "8", "below WORLD_SIZE, which is 8"),
        (TORCHRUN, "RANK", "five", "a whole number"),
        (TORCHRUN, "RANK", "-1", "a whole number"),
        (TORCHRUN, "RANK", "", "a whole number"),
        (TORCHRUN, "WORLD_SIZE", "0", "below WORLD_SIZE, which is 0"),
        (TORCHRUN, "WORLD_SIZE", "99999999999", "a number of ranks up to 1048576"),
        (OWN, "PILLION_WORLD", "18446744073709551615", "a number of ranks up to 1048576"),
        (TORCHRUN, "LOCAL_RANK", "4", "below LOCAL_WORLD_SIZE, which is 4"),
        (TORCHRUN, "LOCAL_WORLD_SIZE", "9", "at most WORLD_SIZE, which is 8"),
        (TORCHRUN, "TORCHELASTIC_RESTART_COUNT", "x", "a whole number"),
        (OPEN_MPI_5, "OMPI_COMM_WORLD_RANK", "4", "below OMPI_COMM_WORLD_SIZE, which is 4"),
        (HYDRA, "MPI_LOCALRANKID", "2", "below MPI_LOCALNRANKS, which is 2"),
        (SRUN, "SLURM_LOCALID", "1", "below SLURM_STEP_TASKS_PER_NODE, which is 1"),
        (OWN, "PILLION_RANK", "4", "below PILLION_WORLD, which is 4"),
        (OWN, "PILLION_JOB", "../socket", "letters, digits"),
    ];
    for (set, name, value, expected) in cases {
        let text = refused(&with(set, &[(name, value)]));
        let parts = [name, value, expected];
        assert!(parts.iter().all(|part| text.contains(part)), "{name}={value}: {text}");
    }
}

#[test]
fn a_world_of_one_needs_no_local_variables() {
    assert_eq!(place(&[("RANK", "0"), ("WORLD_SIZE", "1")]), (Source::Torchrun, 0, 1, 0, 1));
    assert_eq!(place(&[("PMI_RANK", "0"), ("PMI_SIZE", "1")]), (Source::Pmi, 0, 1, 0, 1));
    let half = [("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")];
    assert!(refused(&half).contains("LOCAL_WORLD_SIZE is not"));
}

#[test]
fn the_tasks_of_a_slurm_node_come_from_the_compressed_list() {
    let tasks = |list, node| place(&with(SRUN, &[("SLURM_STEP_TASKS_PER_NODE", list), ("SLURM_NODEID", node)])).4;
    assert_eq!(["0", "1", "2", "3"].map(|node| tasks("2(x3),1", node)), [2, 2, 2, 1]);
    assert_eq!(["0", "1"].map(|node| tasks("4,3", node)), [4, 3]);
    assert_eq!(tasks("7", "0"), 7);
    // Equal on all nodes: which one this is does not matter.
    let uniform = with(&without(SRUN, "SLURM_NODEID"), &[("SLURM_STEP_TASKS_PER_NODE", "1(x7)")]);
    assert_eq!(place(&uniform).4, 1);
    // Some versions have only the second name.
    assert_eq!(place(&without(SRUN, "SLURM_STEP_TASKS_PER_NODE")), place(SRUN));
}

#[test]
fn a_slurm_list_that_does_not_fit_is_refused() {
    let cases = [
        ("2(x3),2", "3", "SLURM_STEP_NUM_TASKS is 7"),
        ("18446744073709551615(x3)", "0", "SLURM_STEP_NUM_TASKS is 7"),
        ("2(x3", "0", "task counts per node"),
        ("two", "0", "task counts per node"),
        ("", "0", "task counts per node"),
        ("2(x3),1", "4", "task counts per node"),
    ];
    for (list, node, expected) in cases {
        let text = refused(&with(SRUN, &[("SLURM_STEP_TASKS_PER_NODE", list), ("SLURM_NODEID", node)]));
        let parts = ["SLURM_STEP_TASKS_PER_NODE", expected];
        assert!(parts.iter().all(|part| text.contains(part)), "{list}: {text}");
    }
}

#[test]
fn ranks_of_a_job_share_its_name() {
    let cases: [(_, &[(&str, &str)]); 8] = [
        (TORCHRUN, &[("RANK", "4"), ("LOCAL_RANK", "0")]),
        (OPEN_MPI_4, &[("OMPI_COMM_WORLD_RANK", "2"), ("OMPI_COMM_WORLD_LOCAL_RANK", "0")]),
        (HYDRA, &[("PMI_RANK", "3"), ("MPI_LOCALRANKID", "0")]),
        (SRUN, &[("SLURM_PROCID", "0"), ("SLURM_NODEID", "0")]),
        (FLUX, &[("FLUX_TASK_RANK", "0"), ("FLUX_TASK_LOCAL_ID", "0")]),
        (PALS, &[("PALS_RANKID", "2"), ("PALS_LOCAL_RANKID", "0")]),
        (MVAPICH, &[("MV2_COMM_WORLD_RANK", "3"), ("MV2_COMM_WORLD_LOCAL_RANK", "1")]),
        (JSRUN, &[("JSM_NAMESPACE_RANK", "0"), ("PMIX_RANK", "0"), ("JSM_NAMESPACE_LOCAL_RANK", "0")]),
    ];
    for (set, other) in cases {
        assert_eq!(read(set).unwrap().job, read(&with(set, other)).unwrap().job);
    }
}

#[test]
fn another_job_or_restart_has_another_name() {
    let user = format!("{}-", rustix::process::getuid().as_raw());
    let mut names = HashSet::new();
    let mut new = |variables: &[(&str, &str)]| {
        let job = read(variables).unwrap().job;
        assert!(job.starts_with(&user) && job.len() <= JOB_LENGTH, "{job}");
        assert!(names.insert(job.clone()), "{job} names two jobs");
    };
    for set in [&[], TORCHRUN, OPEN_MPI_4, OPEN_MPI_5, HYDRA, SRUN, FLUX, PALS, MVAPICH, JSRUN] {
        new(set);
    }
    new(&[]);
    new(&with(TORCHRUN, &[("TORCHELASTIC_RUN_ID", "other")]));
    new(&with(TORCHRUN, &[("MASTER_PORT", "29501")]));
    new(&with(TORCHRUN, &[("TORCHELASTIC_RESTART_COUNT", "1")]));
    new(&with(OPEN_MPI_5, &[("PMIX_NAMESPACE", "prterun-node0-257892@1")]));
    new(&with(OPEN_MPI_4, &[("OMPI_MCA_orte_hnp_uri", "3236233216.0;tcp://10.0.0.1:33560")]));
    new(&with(FLUX, &[("FLUX_JOB_ID", "23622320129")]));
    new(&with(FLUX, &[("FLUX_URI", "local:///tmp/flux-ghijkl/local-0")]));
    new(&with(PALS, &[("PALS_APID", "another")]));
    new(&with(JSRUN, &[("PMIX_NAMESPACE", "8")]));
    new(&with(JSRUN, &[("LSB_JOBID", "123457")]));
    new(&with(SRUN, &[("SLURM_JOB_ID", "816")]));
    new(&with(SRUN, &[("SLURM_STEP_ID", "1")]));
    new(&with(SRUN, &[("SLURM_RESTART_COUNT", "1")]));
    assert!(read(&with(SRUN, &[("SLURM_RESTART_COUNT", "3")])).unwrap().job.ends_with("-3"));
}

#[test]
fn threads_are_ranks_of_one_fresh_job() {
    let ranks = Launch::threads(3);
    assert_eq!(ranks.len(), 3);
    for (rank, launch) in ranks.iter().enumerate() {
        assert_eq!((launch.rank, launch.world, launch.source), (rank, 3, Source::Local));
        assert_eq!((launch.local_rank, launch.local_world), (rank, 3));
        assert_eq!(launch.job, ranks[0].job);
    }
    assert_ne!(Launch::threads(1)[0].job, ranks[0].job);
    assert!(Launch::threads(0).is_empty());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_values_give_a_valid_place_or_an_error(
        set in prop::sample::select(vec![OWN, TORCHRUN, OPEN_MPI_4, HYDRA, SRUN, FLUX, PALS, MVAPICH, JSRUN]),
        changed in prop::collection::vec((0usize..9, "[0-9]{0,2}|[ -~]{0,8}"), 0..4),
    ) {
        let changed: Set =
            changed.iter().map(|(index, value)| (set[index % set.len()].0, value.as_str())).collect();
        if let Ok(launch) = read(&with(set, &changed)) {
            prop_assert!(launch.rank < launch.world);
            prop_assert!(launch.local_rank < launch.local_world);
            prop_assert!(launch.local_world <= launch.world);
            prop_assert!(launch.job.len() <= JOB_LENGTH);
        }
    }
}
