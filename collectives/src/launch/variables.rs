//! Reads a rank's place from the variables of each launcher, and names its job.
//!
//! The names of the variables are data ([`super::names`]); what the launchers have in common is
//! read and checked in one place, [`Variables::launch`]. What a launcher gives to tell its jobs
//! apart goes into a digest, since some of it is long or holds characters that a socket's name
//! cannot.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::PathBuf;
use std::{fs, io};

use super::names::{FLUX, HYDRA, JSM, MVAPICH, Names, OPEN_MPI, PALS, RANK_ALONE, SLURM, TORCH};
use super::{
    JOB_LENGTH, Launch, LaunchError, OWN_JOB, OWN_LAUNCHER, OWN_LOCAL_RANK, OWN_LOCAL_WORLD, OWN_RANK, OWN_WORLD,
    Source, fresh_job,
};

/// More than any machine has, and few enough that a list of them fits into memory.
pub(crate) const MOST_RANKS: usize = 1 << 20;

/// Step ids above this are Slurm's own: batch script, interactive shell, external and pending
/// (`SLURM_MAX_NORMAL_STEP_ID` in slurm.h).
const LAST_SLURM_STEP: u64 = 0xffff_fff0;

/// What a process finds in its environment.
pub(super) struct Variables<'a> {
    pub(super) lookup: &'a dyn Fn(&str) -> Option<String>,
}

impl Variables<'_> {
    /// The launch that the innermost launcher describes.
    pub(super) fn read(&self) -> Result<Launch, LaunchError> {
        if self.any(&[OWN_RANK, OWN_WORLD, OWN_JOB, OWN_LAUNCHER]) {
            return self.own();
        }
        if self.any(&["TORCHELASTIC_RUN_ID"]) {
            return self.torchrun_agent();
        }
        if self.any(&OPEN_MPI.all()) {
            let launch = self.open_mpi()?;
            self.must_agree(&launch, &OPEN_MPI, &TORCH)?;
            return Ok(launch);
        }
        // Only hydra, their process manager, sets the local pair; `srun --mpi=pmi2` sets the rest.
        if self.any(&[HYDRA.local_rank, HYDRA.local_world]) {
            let launch = self.hydra()?;
            self.must_agree(&launch, &HYDRA, &TORCH)?;
            return Ok(launch);
        }
        let in_step = self.slurm_step()?.is_some();
        let by_hand = TORCH.all();
        let complete = by_hand.iter().all(|name| self.get(name).is_some());
        let others = [(Source::Jsm, &JSM), (Source::Flux, &FLUX), (Source::Pals, &PALS), (Source::Mvapich, &MVAPICH)];
        let other = others.into_iter().find(|(_, names)| self.any(&[names.rank]));
        if complete || (!in_step && other.is_none() && self.any(&by_hand)) {
            return self.torch_by_hand();
        }
        if in_step {
            let launch = self.slurm()?;
            for other in [&TORCH, &HYDRA] {
                self.must_agree(&launch, &SLURM, other)?;
            }
            self.no_other_rank(&launch, &SLURM)?;
            return Ok(launch);
        }
        // Before hydra's: these launchers set PMI variables for others.
        if let Some((source, names)) = other {
            let launch = self.whole(source, names)?;
            self.must_agree(&launch, names, &TORCH)?;
            self.no_other_rank(&launch, names)?;
            return Ok(launch);
        }
        if self.any(&HYDRA.all()) {
            return self.hydra();
        }
        match RANK_ALONE.iter().find(|(variable, _)| self.any(&[variable])) {
            Some(&(variable, launcher)) => Err(LaunchError::Unknown { variable, launcher }),
            None => Ok(Launch::single()),
        }
    }

    fn get(&self, name: &str) -> Option<String> {
        (self.lookup)(name)
    }

    fn any(&self, names: &[&str]) -> bool {
        names.iter().any(|name| self.get(name).is_some())
    }

    /// The launch of a launcher whose variables say everything, but for the variable that names its
    /// job.
    fn whole(&self, source: Source, names: &Names) -> Result<Launch, LaunchError> {
        let identity = || {
            let job = match source {
                // `jsrun` numbers its steps in an allocation as PMIx name spaces.
                Source::Jsm => "PMIX_NAMESPACE",
                Source::Flux => "FLUX_JOB_ID",
                Source::Pals => "PALS_APID",
                // MVAPICH2 has no id, but all ranks of a host descend from one process.
                _ => return Ok(vec![launcher_process(names.rank, "mpispawn")?]),
            };
            let mut identity = vec![self.required(job, &names.all(), names.remedy)?];
            // Numbers repeat from one allocation, and from one instance of Flux, to the next.
            identity.extend(["LSB_JOBID", "FLUX_URI"].iter().filter_map(|name| self.get(name)));
            Ok(identity)
        };
        self.launch(source, names, None, identity)
    }

    /// Refuses a rank of another launcher beside `launch`, which was read from `names`: whichever
    /// launcher is the inner one, its ranks would all be one rank of the outer.
    fn no_other_rank(&self, launch: &Launch, names: &Names) -> Result<(), LaunchError> {
        let others = [JSM.rank, FLUX.rank, PALS.rank, MVAPICH.rank, "PMIX_RANK", "ALPS_APP_PE"];
        for first in others.into_iter().filter(|&other| other != names.rank && self.any(&[other])) {
            let first_value = self.number(first, &[], names.remedy)?;
            if first_value != launch.rank {
                let (first, second, second_value) = (first.into(), names.rank.into(), launch.rank);
                return Err(LaunchError::Contradiction { first, first_value, second, second_value });
            }
        }
        Ok(())
    }

    fn own(&self) -> Result<Launch, LaunchError> {
        let all = [OWN_RANK, OWN_WORLD, OWN_JOB, OWN_LAUNCHER];
        let remedy = "start with --ranks N, or unset all variables that begin with PILLION_";
        for name in all {
            self.required(name, &all, remedy)?;
        }
        let job = self.required(OWN_JOB, &all, remedy)?;
        let fits = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
        if job.is_empty() || job.len() > JOB_LENGTH || !job.bytes().all(fits) {
            let expected = "1 to 64 letters, digits, dots, underscores or hyphens";
            return Err(LaunchError::Malformed { variable: OWN_JOB.into(), value: job, expected });
        }
        let rank = self.number(OWN_RANK, &all, remedy)?;
        let world = self.world(OWN_WORLD, &all, remedy)?;
        must_be_below(OWN_RANK, rank, OWN_WORLD, world)?;
        let of_host = [OWN_LOCAL_RANK, OWN_LOCAL_WORLD];
        let (local_rank, local_world) = match self.any(&of_host) {
            true => (self.number(of_host[0], &of_host, remedy)?, self.number(of_host[1], &of_host, remedy)?),
            false => (rank, world),
        };
        must_be_below(OWN_LOCAL_RANK, local_rank, OWN_LOCAL_WORLD, local_world)?;
        if local_world > world {
            let (variable, bound_variable) = (OWN_LOCAL_WORLD.into(), OWN_WORLD.into());
            let (value, relation, bound) = (local_world, "at most", world);
            return Err(LaunchError::OutOfRange { variable, value, relation, bound_variable, bound });
        }
        Ok(Launch { rank, world, local_rank, local_world, job, source: Source::Local, ..Launch::single() })
    }

    fn torchrun_agent(&self) -> Result<Launch, LaunchError> {
        let identity = || {
            let all = ["TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT"];
            let mut identity = Vec::new();
            for name in all {
                identity.push(self.required(name, &all, TORCH.remedy)?);
            }
            // The run id may be "none" and the port the default one: the agent itself tells apart
            // two runs in a row.
            identity.push(launcher_process("TORCHELASTIC_RUN_ID", "torchrun")?);
            Ok(identity)
        };
        self.launch(Source::Torchrun, &TORCH, Some("TORCHELASTIC_RESTART_COUNT"), identity)
    }

    fn torch_by_hand(&self) -> Result<Launch, LaunchError> {
        let identity = || {
            let all = ["MASTER_ADDR", "MASTER_PORT", TORCH.rank];
            let address = self.required(all[0], &all, TORCH.remedy)?;
            Ok(vec![address, self.required(all[1], &all, TORCH.remedy)?])
        };
        self.launch(Source::Torchrun, &TORCH, Some("TORCHELASTIC_RESTART_COUNT"), identity)
    }

    fn open_mpi(&self) -> Result<Launch, LaunchError> {
        // Version 5 sets the first, version 4 all three. A job id of version 4 has only 16 random
        // bits; the daemon's address, with its port, adds what tells two jobs apart.
        let names = ["PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "OMPI_MCA_orte_hnp_uri"];
        let identity = || {
            let identity: Vec<String> = names.iter().filter_map(|name| self.get(name)).collect();
            if identity.is_empty() {
                let missing = format!("none of {}", names.join(", "));
                return Err(missing_variable(OPEN_MPI.rank, missing, OPEN_MPI.remedy));
            }
            Ok(identity)
        };
        self.launch(Source::OpenMpi, &OPEN_MPI, None, identity)
    }

    fn hydra(&self) -> Result<Launch, LaunchError> {
        // Hydra tells no job id; but all ranks of a host descend from one proxy process.
        let identity = || Ok(vec![launcher_process(HYDRA.local_rank, "mpiexec")?]);
        self.launch(Source::Pmi, &HYDRA, None, identity)
    }

    /// The step's number where `srun` started this process.
    fn slurm_step(&self) -> Result<Option<u64>, LaunchError> {
        let variable = "SLURM_STEP_ID";
        let Some(value) = self.get(variable) else {
            return Ok(None);
        };
        if ["", "batch", "interactive", "extern", "pending"].contains(&value.as_str()) {
            return Ok(None);
        }
        match value.parse::<u64>() {
            Ok(step) => Ok((step <= LAST_SLURM_STEP).then_some(step)),
            Err(_) => {
                let expected = "the number of a job step";
                Err(LaunchError::Malformed { variable: variable.into(), value, expected })
            }
        }
    }

    fn slurm(&self) -> Result<Launch, LaunchError> {
        let identity = || {
            let all = ["SLURM_JOB_ID", "SLURM_STEP_ID"];
            let job = self.required(all[0], &all, SLURM.remedy)?;
            Ok(vec![job, self.required(all[1], &all, SLURM.remedy)?])
        };
        self.launch(Source::Slurm, &SLURM, Some("SLURM_RESTART_COUNT"), identity)
    }

    /// A number of ranks.
    fn world(&self, name: &str, all: &[&str], remedy: &'static str) -> Result<usize, LaunchError> {
        let world = self.number(name, all, remedy)?;
        if world > MOST_RANKS {
            let expected = "a number of ranks up to 1048576";
            return Err(LaunchError::Malformed { variable: name.into(), value: world.to_string(), expected });
        }
        Ok(world)
    }

    /// Reads the place under `names`, checks it, and names the job after `identity` and the count
    /// in the variable `restarts`, if the launcher has one.
    fn launch(
        &self,
        source: Source,
        names: &Names,
        restarts: Option<&str>,
        identity: impl FnOnce() -> Result<Vec<String>, LaunchError>,
    ) -> Result<Launch, LaunchError> {
        let all = names.all();
        let rank = self.number(names.rank, &all, names.remedy)?;
        let world = self.world(names.world, &all, names.remedy)?;
        must_be_below(names.rank, rank, names.world, world)?;
        if world == 1 && !matches!(source, Source::Slurm | Source::Flux) && !self.any(&all[2..]) {
            // Alone in the world, so alone on the host.
            return Ok(Launch { source, ..Launch::single() });
        }
        let local_rank = self.number(names.local_rank, &all, names.remedy)?;
        let local_world = match source {
            Source::Slurm => self.slurm_local_world(world)?,
            Source::Flux => self.flux_local_world(world)?,
            _ => self.number(names.local_world, &all, names.remedy)?,
        };
        must_be_below(names.local_rank, local_rank, names.local_world, local_world)?;
        if local_world > world {
            return Err(LaunchError::OutOfRange {
                variable: names.local_world.into(),
                value: local_world,
                relation: "at most",
                bound_variable: names.world.into(),
                bound: world,
            });
        }
        let restart = match restarts.filter(|name| self.any(&[name])) {
            None => 0,
            Some(name) => self.number(name, &[], names.remedy)?,
        };
        // A rank that is alone meets nobody, and any name will do.
        let job = if world == 1 { fresh_job() } else { job_name(source, &identity()?, restart) };
        Ok(Launch { rank, world, local_rank, local_world, job, source, ..Launch::single() })
    }

    /// Tasks of the step on this node, from a list like `2(x3),1`.
    fn slurm_local_world(&self, world: usize) -> Result<usize, LaunchError> {
        // Older versions lack the first; srun sets the second too, for the step.
        let step = [SLURM.local_world, "SLURM_TASKS_PER_NODE"];
        let variable = if self.any(&step[..1]) { step[0] } else { step[1] };
        let value = self.required(variable, &SLURM.all(), SLURM.remedy)?;
        let expected = "task counts per node, such as 2(x3),1, one for each node of the step";
        let malformed = || LaunchError::Malformed { variable: variable.into(), value: value.clone(), expected };
        let nodes = tasks_per_node(&value).ok_or_else(malformed)?;
        let total = nodes.iter().fold(0, |sum: usize, (tasks, count)| sum.saturating_add(tasks.saturating_mul(*count)));
        if total != world {
            return Err(LaunchError::Contradiction {
                first: SLURM.world.into(),
                first_value: world,
                second: format!("the sum of {variable} ({value})"),
                second_value: total,
            });
        }
        if let [(tasks, _)] = nodes[..] {
            return Ok(tasks);
        }
        let mut node = self.number("SLURM_NODEID", &SLURM.all(), SLURM.remedy)?;
        for (tasks, count) in &nodes {
            if node < *count {
                return Ok(*tasks);
            }
            node -= count;
        }
        Err(malformed())
    }

    /// Tasks of the job on this node. Flux tells how many nodes there are, not how many tasks run
    /// on each.
    fn flux_local_world(&self, world: usize) -> Result<usize, LaunchError> {
        match self.number(FLUX.local_world, &FLUX.all(), FLUX.remedy)? {
            1 => Ok(world),
            nodes => Err(LaunchError::Malformed {
                variable: FLUX.local_world.into(),
                value: nodes.to_string(),
                expected: "1 (flux run -N 1), because Flux does not tell how many tasks run on each node",
            }),
        }
    }

    /// Compares what `other` says, if anything, with `launch`, which was read from `names`.
    fn must_agree(&self, launch: &Launch, names: &Names, other: &Names) -> Result<(), LaunchError> {
        let values = [launch.rank, launch.world, launch.local_rank, launch.local_world];
        for ((first, second), second_value) in other.all().into_iter().zip(names.all()).zip(values) {
            if self.get(first).is_none() {
                continue;
            }
            let first_value = self.number(first, &[], other.remedy)?;
            if first_value != second_value {
                let (first, second) = (first.into(), second.into());
                return Err(LaunchError::Contradiction { first, first_value, second, second_value });
            }
        }
        Ok(())
    }

    fn number(&self, name: &str, siblings: &[&str], remedy: &'static str) -> Result<usize, LaunchError> {
        let value = self.required(name, siblings, remedy)?;
        let expected = "a whole number of at least 0";
        let malformed = |_| LaunchError::Malformed { variable: name.into(), value: value.clone(), expected };
        value.trim().parse().map_err(malformed)
    }

    /// The value of `name`; if unset, an error that names one of `siblings` that is set.
    fn required(&self, name: &str, siblings: &[&str], remedy: &'static str) -> Result<String, LaunchError> {
        self.get(name).ok_or_else(|| {
            let present = siblings.iter().find(|sibling| self.any(&[sibling]));
            missing_variable(present.unwrap_or(&"a launcher's variable"), name.into(), remedy)
        })
    }
}

fn missing_variable(present: &str, missing: String, remedy: &'static str) -> LaunchError {
    LaunchError::Missing { present: present.into(), missing, remedy }
}

fn must_be_below(variable: &str, value: usize, bound_variable: &str, bound: usize) -> Result<(), LaunchError> {
    if value < bound {
        return Ok(());
    }
    let (variable, bound_variable) = (variable.into(), bound_variable.into());
    Err(LaunchError::OutOfRange { variable, value, relation: "below", bound_variable, bound })
}

fn job_name(source: Source, identity: &[String], restart: usize) -> String {
    let launcher = match source {
        Source::Single | Source::Local => "local",
        Source::Torchrun => "torchrun",
        Source::OpenMpi => "openmpi",
        Source::Pmi => "pmi",
        Source::Slurm => "slurm",
        Source::Flux => "flux",
        Source::Pals => "pals",
        Source::Mvapich => "mvapich",
        Source::Jsm => "jsm",
    };
    // A fixed key: every rank, running the same program, must come to the same name.
    let mut hasher = DefaultHasher::new();
    identity.hash(&mut hasher);
    let user = rustix::process::getuid().as_raw();
    format!("{user}-{launcher}-{:016x}-{restart}", hasher.finish())
}

/// Parses Slurm's `2(x3),1` into (tasks, nodes) pairs.
pub(super) fn tasks_per_node(list: &str) -> Option<Vec<(usize, usize)>> {
    let entry = |entry: &str| match entry.split_once("(x") {
        None => Some((entry.parse().ok()?, 1)),
        Some((tasks, count)) => Some((tasks.parse().ok()?, count.strip_suffix(')')?.parse().ok()?)),
    };
    list.split(',').map(entry).collect()
}

/// The launcher on this host, as a word that no other process shares.
fn launcher_process(variable: &str, launcher: &'static str) -> Result<String, LaunchError> {
    ancestor_without(variable, launcher).map(|(process, start)| format!("{process}@{start}"))
}

/// Process id and start time of the launcher on this host: the nearest ancestor that `variable`,
/// which the launcher sets for its ranks, was not given to. A shell between launcher and rank has
/// the variable too.
pub(crate) fn ancestor_without(variable: &str, launcher: &'static str) -> Result<(i32, u64), LaunchError> {
    let key = format!("{variable}=");
    let mut ancestor = rustix::process::Pid::as_raw(rustix::process::getppid());
    loop {
        let directory = PathBuf::from(format!("/proc/{ancestor}"));
        let path = directory.join("stat");
        let read = fs::read_to_string(&path)
            .and_then(|stat| parent_and_start(&stat).ok_or_else(|| io::Error::other("unexpected content")));
        let (parent, start) = read.map_err(|source| LaunchError::Ancestor { launcher, path, source })?;
        // Unreadable is what belongs to another user, a system daemon: a launcher, not a shell.
        let environment = fs::read(directory.join("environ")).unwrap_or_default();
        if !environment.split(|byte| *byte == 0).any(|entry| entry.starts_with(key.as_bytes())) {
            return Ok((ancestor, start));
        }
        ancestor = parent;
    }
}

/// Parent's process id and start time (clock ticks since boot) from `/proc/PID/stat`, fields 4 and
/// 22 of proc(5). Field 2, the name, may hold spaces and parentheses.
fn parent_and_start(stat: &str) -> Option<(i32, u64)> {
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    let parent = fields.nth(1)?.parse().ok()?;
    Some((parent, fields.nth(17)?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_name_with_spaces_and_parentheses_does_not_shift_the_fields() {
        let stat = "42 (a) b (c) S 7 42 42 0 -1 4194560 1 0 0 0 1 2 0 0 20 0 1 0 98765 1000 9";
        assert_eq!(parent_and_start(stat), Some((7, 98765)));
        assert_eq!(parent_and_start("42 (cut"), None);
    }

    #[test]
    fn the_launcher_is_the_nearest_ancestor_without_the_variable() {
        // Nobody has this variable, so the parent itself is the launcher.
        let parent = launcher_process("PILLION_TEST_NOBODY_HAS_THIS", "test").unwrap();
        let id = rustix::process::Pid::as_raw(rustix::process::getppid());
        assert!(parent.starts_with(&format!("{id}@")), "{parent}");
    }
}
