//! The settings of commands that ranks run together: how these start, meet and move data, and what
//! they compute on.

use std::str::FromStr;

use clap::{Args, ValueEnum};
use pillion_collectives::{Backend, GpuTransport, WireKind};

/// A year, in seconds.
pub(crate) const LONGEST_TIMEOUT: u64 = 365 * 24 * 60 * 60;

/// How ranks of this host are started.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LaunchKind {
    /// Each rank is a process.
    Processes,
    /// Each rank is a thread of this process.
    Threads,
}

/// The device that ranks compute on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceKind {
    /// The processor.
    Cpu,
    /// A processor that runs work as late as allowed, for tests.
    LazyCpu,
    /// A GPU: this one for all ranks of a host, or one for each rank in turn.
    Cuda(Option<u32>),
}

impl DeviceKind {
    /// Whether ranks compute on GPUs.
    pub fn is_gpu(self) -> bool {
        matches!(self, DeviceKind::Cuda(_))
    }
}

impl FromStr for DeviceKind {
    type Err = String;

    fn from_str(text: &str) -> Result<DeviceKind, String> {
        let number = |text: &str| text.parse().map_err(|_| format!("cuda:{text} is no GPU: GPUs are counted from 0"));
        match text.split_once(':') {
            None if text == "cpu" => Ok(DeviceKind::Cpu),
            None if text == "lazy-cpu" => Ok(DeviceKind::LazyCpu),
            None if text == "cuda" => Ok(DeviceKind::Cuda(None)),
            Some(("cuda", gpu)) => Ok(DeviceKind::Cuda(Some(number(gpu)?))),
            _ => Err("a device is cpu, cuda, or cuda:N for GPU number N".to_owned()),
        }
    }
}

/// Settings of the ranks of a job.
#[derive(Clone, Debug, Args)]
pub struct JobArgs {
    /// Number of ranks to start on this host; default: those of mpirun, torchrun or srun, else those
    /// of the command.
    #[arg(long, value_name = "N")]
    pub ranks: Option<usize>,
    /// How --ranks are started; default: processes, on GPUs threads.
    #[arg(long, value_enum)]
    pub launch: Option<LaunchKind>,
    /// Number of hosts; default: 1. On each, start the program with the same settings and its own --node-rank.
    #[arg(long, value_name = "N", requires = "node_rank", value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub nodes: Option<u32>,
    /// Which host this is, from 0, on which rank 0 runs.
    #[arg(long, value_name = "N", requires = "nodes")]
    pub node_rank: Option<u32>,
    /// Where the ranks of all hosts meet: the first host and a free port of it, spelled alike on
    /// all; default: PILLION_ADDRESS.
    #[arg(long, value_name = "HOST:PORT", value_parser = address)]
    pub address: Option<String>,
    /// Start more than 8 ranks for each core.
    #[arg(long)]
    pub oversubscribe: bool,
    /// What moves the bytes between ranks.
    #[arg(long, value_enum, default_value = "auto", value_name = "NAME")]
    pub backend: Backend,
    /// What connects hosts.
    #[arg(long, value_enum, default_value = "auto", value_name = "NAME")]
    pub wire: WireKind,
    /// What moves elements between GPUs.
    #[arg(long, value_enum, default_value = "auto", value_name = "NAME")]
    pub gpu_transport: GpuTransport,
    /// Groups of consecutive ranks in which gradients are summed; as many as a cluster has hosts
    /// gives its bits on one host.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub reduce_groups: usize,
    /// Threads of each rank; default: the processors that it may run on, divided among the ranks of
    /// its host.
    #[arg(long, value_name = "N")]
    pub threads: Option<usize>,
    /// Seconds after which a rank that waits for another gives up, at the start and in each
    /// operation.
    #[arg(long, value_name = "S", default_value_t = 300, value_parser = clap::value_parser!(u64).range(..=LONGEST_TIMEOUT))]
    pub timeout: u64,
    /// What ranks compute on: cpu, cuda for a GPU of each rank, or cuda:N for GPU N. GPUs need a
    /// build with the feature cuda.
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    pub device: DeviceKind,
}

/// Reads an address with a port.
pub(crate) fn address(text: &str) -> Result<String, String> {
    let port = text.rsplit_once(':').filter(|(host, _)| !host.is_empty() && !host.contains('/'));
    match port.and_then(|(_, port)| port.parse::<u16>().ok()).filter(|&port| port > 0) {
        Some(_) => Ok(text.to_owned()),
        None => Err("give a host and a port, as in node1:29400".to_owned()),
    }
}
