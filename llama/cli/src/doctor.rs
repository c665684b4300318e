//! `pillion doctor`: what this machine and job offer, what would be chosen, and why.

use std::fmt::Write;
use std::net::UdpSocket;
use std::time::Duration;
use std::{env, fs};

use comfy_table::{Table, presets};
use pillion_collectives::launch::Source;
use pillion_collectives::limits::human;
use pillion_collectives::{Backend, Capabilities, Communicator, Launch, Options, WireKind, available_memory};
use pillion_kernels::cpu::Isa;
use rustix::process::{Resource, getrlimit};
use rustix::thread::{CpuSet, sched_getaffinity};

use crate::Error;
use crate::output::write;
use crate::settings::DoctorArgs;

/// Starts of the names of variables that launchers, and this program, set for a rank.
const VARIABLES: [&str; 17] = [
    "PILLION_",
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_",
    "TORCHELASTIC_",
    "OMPI_COMM_WORLD_",
    "PMI_",
    "MPI_LOCAL",
    "SLURM_",
    "JSM_NAMESPACE_",
    "FLUX_",
    "PALS_",
    "MV2_COMM_WORLD_",
    "OMP_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
];

/// Parts of the names of variables whose values are nobody's business, such as `SLURM_JWT`.
const SECRETS: [&str; 6] = ["SECRET", "TOKEN", "JWT", "KEY", "PASS", "CRED"];

/// Most variables that are printed: Slurm sets many that say nothing of a rank.
const MOST_VARIABLES: usize = 24;

/// `pillion doctor`: prints a table on rank 0.
///
/// # Errors
/// Where launcher variables contradict each other, ranks do not come, or stdout takes nothing.
pub(crate) fn doctor(settings: &DoctorArgs) -> Result<i32, Error> {
    let mut findings = Findings::default();
    findings.launcher();
    let launch = Launch::detect();
    // What is wrong with the job is said after what there is.
    let is_well = match &launch {
        Ok(launch) => findings.look_at_job(launch, settings),
        Err(_) => Ok(()),
    };
    findings.memory();
    findings.processors();
    findings.gpus();
    findings.networks();
    findings.mpi();
    if launch.as_ref().map_or(0, |launch| launch.rank) == 0 {
        write(&format!("{}\n", findings.table()))?;
    }
    launch?;
    is_well.map(|()| 0)
}

/// What was found: a subject, what is there, and what follows from it.
#[derive(Default)]
struct Findings(Vec<[String; 3]>);

impl Findings {
    fn add(&mut self, subject: &str, found: impl Into<String>, follows: impl Into<String>) {
        self.0.push([subject.to_owned(), found.into(), follows.into()]);
    }

    fn table(&self) -> String {
        let mut table = Table::new();
        table.load_style(presets::NOTHING);
        table.set_header(["what", "found", "so"]);
        table.add_rows(&self.0);
        table.trim_fmt()
    }

    fn launcher(&mut self) {
        let mut names: Vec<String> = env::vars_os()
            .filter_map(|(name, _)| name.into_string().ok())
            .filter(|name| VARIABLES.iter().any(|start| name.starts_with(start)))
            .collect();
        names.sort_unstable();
        let left_out = names.len().saturating_sub(MOST_VARIABLES);
        let mut text = String::new();
        for name in names.iter().take(MOST_VARIABLES) {
            let value = match SECRETS.iter().any(|part| name.contains(part)) {
                true => "(not shown)".to_owned(),
                false => env::var_os(name).unwrap_or_default().to_string_lossy().into_owned(),
            };
            let _ = writeln!(text, "{name}={value}");
        }
        if left_out > 0 {
            let _ = writeln!(text, "and {left_out} more");
        }
        let found = if text.is_empty() { "none".to_owned() } else { text.trim_end().to_owned() };
        self.add("launcher's variables", found, "");
    }

    fn look_at_job(&mut self, launch: &Launch, settings: &DoctorArgs) -> Result<(), Error> {
        self.job(launch);
        let options = Options {
            backend: settings.backend,
            wire: settings.wire,
            startup_timeout: Duration::from_secs(settings.timeout),
            ..Options::default()
        };
        self.meeting(launch, &options);
        if launch.world > 1 {
            self.ranks(&Communicator::connect(launch, options)?)?;
        }
        Ok(())
    }

    fn job(&mut self, launch: &Launch) {
        let Launch { rank, world, local_rank, local_world, source, .. } = launch;
        let follows = match source {
            Source::Single => "no job: `pillion train --ranks N` starts ranks here",
            _ => "this is one of its ranks",
        };
        self.add("started by", source.to_string(), follows);
        if *world > 1 {
            let place = format!("{rank} of {world}; {local_rank} of {local_world} on this host");
            self.add("rank", place, "");
        }
        if let Some(host) = &launch.host {
            self.add("PILLION_HOST", host.clone(), "ranks with the same name share memory");
        }
    }

    fn meeting(&mut self, launch: &Launch, options: &Options) {
        let needed = options.needs_meeting(launch);
        match &launch.meeting {
            Some(meeting) => {
                let secret = env::var_os("PILLION_SECRET").is_some();
                let keeps =
                    if secret { "PILLION_SECRET keeps strangers out" } else { "set PILLION_SECRET against strangers" };
                let reach = own_address(&meeting.address)
                    .map_or_else(|| "no route to it is known".to_owned(), |address| format!("reached from {address}"));
                let used = if needed { "" } else { "not needed here; " };
                self.add("ranks meet at", meeting.address.clone(), format!("{used}{reach}; {keeps}"));
            }
            None if needed => {
                self.add("ranks meet at", "nothing says where", "set PILLION_ADDRESS=host:port on every rank")
            }
            None => {}
        }
        if let Some(interface) = &launch.interface {
            let used = if needed { "" } else { "not needed here; " };
            let follows = match launch.offered_address() {
                Ok(Some(address)) => format!("{used}offers {address} to ranks of other hosts"),
                Ok(None) => String::new(),
                Err(error) => error.to_string(),
            };
            self.add("PILLION_INTERFACE", interface.clone(), follows);
        }
    }

    /// Every rank calls this.
    fn ranks(&mut self, communicator: &Communicator) -> Result<(), Error> {
        let own = sched_getaffinity(None).map_or(0, |set| u64::from(set.count()));
        let processors = communicator.all_gather_scalars(&[own])?;
        let (fewest, most) = processors
            .iter()
            .map(|words| words[0])
            .fold((u64::MAX, 0), |(fewest, most), count| (fewest.min(count), most.max(count)));
        let (hosts, wire) = (communicator.hosts(), communicator.wire());
        let (found, why) = match communicator.backend() {
            Backend::Shm => ("shared memory".to_owned(), "all ranks are on one host".to_owned()),
            Backend::Hierarchical => {
                (format!("shared memory on each of {hosts} hosts, {wire} between them"), wire_reason(wire))
            }
            _ => (format!("{wire} between all ranks"), wire_reason(wire)),
        };
        self.add("transport", found, why);
        let Capabilities { windows, reads_peers_in_place, reads_private_memory, rank_order, .. } =
            communicator.capabilities();
        let can = [
            (windows, "windows"),
            (reads_peers_in_place, "sums observed term by term (--alignment)"),
            (reads_private_memory, "private memory read where it lies"),
            (rank_order, "the same bits in every run"),
        ];
        let can: Vec<&str> = can.into_iter().filter_map(|(can, what)| can.then_some(what)).collect();
        self.add("it has", can.join(", "), "");
        let range = if fewest == most { format!("{most}") } else { format!("{fewest} to {most}") };
        self.add("processors of a rank", range, "");
        Ok(())
    }

    fn memory(&mut self) {
        let (available, limit) = available_memory();
        self.add("memory", human(available), format!("{limit}; shared memory counts as this rank's"));
        for (name, resource, purpose) in [
            ("ulimit -v", Resource::As, "a job maps its host's memory for each of its ranks"),
            ("ulimit -f", Resource::Fsize, "the job's shared memory is a file of that size"),
            ("ulimit -n", Resource::Nofile, "connections between hosts need descriptors"),
        ] {
            let found = match getrlimit(resource).current {
                Some(limit) if resource == Resource::Nofile => limit.to_string(),
                Some(limit) => human(limit),
                None => "unlimited".to_owned(),
            };
            self.add(name, found, purpose);
        }
        for (name, file, buffers, gives) in [
            ("huge pages, shared", "shmem_enabled", "shared buffers", "advise"),
            ("huge pages, private", "enabled", "private buffers", "madvise"),
        ] {
            let path = format!("/sys/kernel/mm/transparent_hugepage/{file}");
            let setting = chosen(&fs::read_to_string(&path).unwrap_or_default());
            let follows = match setting.as_str() {
                "always" | "advise" | "madvise" | "within_size" | "force" => format!("large {buffers} get huge pages"),
                _ => format!("{buffers} have small pages; `{gives}` in {path} gives large ones"),
            };
            self.add(name, if setting.is_empty() { "unknown".to_owned() } else { setting }, follows);
        }
    }

    fn processors(&mut self) {
        let online = fs::read_to_string("/sys/devices/system/cpu/online").unwrap_or_default();
        let (own, list) = sched_getaffinity(None).map_or((0, String::new()), |set| (set.count(), ranges(&set)));
        let found = format!("{list} ({own}) of {}", online.trim());
        let bound = std::thread::available_parallelism().map_or(1, usize::from);
        self.add("processors here", found, format!("--threads takes up to {bound}"));
        let (isa, why) = match Isa::of_process() {
            Ok(isa) => (
                isa.name().to_owned(),
                match env::var("PILLION_ISA") {
                    Ok(wish) => format!("PILLION_ISA={wish}"),
                    Err(_) => "the best that this processor and this program know".to_owned(),
                },
            ),
            Err(error) => ("refused".to_owned(), error.to_string()),
        };
        self.add("instructions", isa, why);
    }

    fn networks(&mut self) {
        let mut found: Vec<String> = fs::read_dir("/sys/class/net")
            .into_iter()
            .flatten()
            .flatten()
            .map(|entry| {
                let read =
                    |file: &str| fs::read_to_string(entry.path().join(file)).unwrap_or_default().trim().to_owned();
                let speed =
                    read("speed").parse::<u64>().map_or_else(|_| String::new(), |speed| format!(", {speed} Mbit/s"));
                format!("{}: {}, mtu {}{speed}", entry.file_name().to_string_lossy(), read("operstate"), read("mtu"))
            })
            .collect();
        found.sort_unstable();
        let found = if found.is_empty() { "none".to_owned() } else { found.join("\n") };
        self.add(
            "networks",
            found,
            "between hosts the route to a rank's address decides; PILLION_INTERFACE names another to be reached at",
        );
    }

    /// The GPUs that this process sees, or what is missing.
    #[cfg(feature = "cuda")]
    fn gpus(&mut self) {
        use pillion_kernels::Cuda;

        let count = match Cuda::count() {
            Ok(count) => count,
            Err(error) => return self.add("GPUs", "none", error.to_string()),
        };
        for ordinal in 0..count {
            let name = format!("GPU {ordinal}");
            match Cuda::info(ordinal) {
                Ok(info) => {
                    let (free, total) = (human(info.free), human(info.total));
                    let driver = format!("{}.{}", info.driver / 1000, info.driver % 1000 / 10);
                    let found = format!("{}, {free} of {total} free, CUDA {driver}", info.name);
                    self.add(&name, found, format!("--device cuda:{ordinal} computes on it"));
                }
                Err(error) => self.add(&name, "cannot be used", error.to_string()),
            }
        }
        match pillion_collectives::nccl_version() {
            Ok(version) => self.add("NCCL", version, "--gpu-transport nccl, and GPUs of several hosts, use it"),
            Err(error) => self.add("NCCL", "none", error.to_string()),
        }
    }

    /// The GPUs that this process sees, or what is missing.
    #[cfg(not(feature = "cuda"))]
    fn gpus(&mut self) {
        self.add("GPUs", "not looked for", "this program was built without them: --features cuda");
    }

    fn mpi(&mut self) {
        let mpi = if cfg!(feature = "mpi") { "in this build" } else { "not in this build" };
        self.add(
            "MPI",
            mpi,
            if cfg!(feature = "mpi") { "" } else { "TCP connects hosts; --features mpi for fast networks" },
        );
    }
}

fn wire_reason(wire: WireKind) -> String {
    match wire {
        WireKind::Mpi => "mpirun started the ranks, or --wire mpi asks for it".to_owned(),
        _ => "no MPI is needed; --wire mpi uses one that is installed".to_owned(),
    }
}

/// The address from which this host would reach another; nothing is sent.
fn own_address(address: &str) -> Option<String> {
    let socket = UdpSocket::bind("0.0.0.0:0").and_then(|socket| socket.connect(address).map(|()| socket));
    let socket =
        socket.or_else(|_| UdpSocket::bind("[::]:0").and_then(|socket| socket.connect(address).map(|()| socket)));
    Some(socket.ok()?.local_addr().ok()?.ip().to_string())
}

/// What a file of the kernel has chosen: `always [advise] never`.
fn chosen(text: &str) -> String {
    let chosen = text.split_whitespace().find_map(|word| word.strip_prefix('[')?.strip_suffix(']'));
    chosen.unwrap_or_default().to_owned()
}

/// Processors as in `0-3,8`.
fn ranges(set: &CpuSet) -> String {
    let mut ranges: Vec<[usize; 2]> = Vec::new();
    for processor in (0..CpuSet::MAX_CPU).filter(|&processor| set.is_set(processor)) {
        match ranges.last_mut() {
            Some([_, last]) if *last + 1 == processor => *last = processor,
            _ => ranges.push([processor; 2]),
        }
    }
    let text = |[first, last]: [usize; 2]| if first == last { first.to_string() } else { format!("{first}-{last}") };
    ranges.into_iter().map(text).collect::<Vec<String>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_has_chosen_and_processors_are_read() {
        assert_eq!(chosen("always within_size advise [never] deny force\n"), "never");
        assert_eq!(chosen(""), "");
        let mut set = CpuSet::new();
        [0, 1, 2, 5, 7, 8].into_iter().for_each(|processor| set.set(processor));
        assert_eq!(ranges(&set), "0-2,5,7-8");
        assert_eq!(ranges(&CpuSet::new()), "");
    }
}
