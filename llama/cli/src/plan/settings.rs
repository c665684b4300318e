//! The settings of `pillion plan`.

use std::path::PathBuf;

use clap::Args;
use pillion_kernels::DType;
use pillion_runtime::Mesh;
use pillion_runtime::checkpoint::Staging;
use pillion_runtime::simulate::{Link, Machine};

use super::forecast::MOST_CONTENTION;
use super::gpus::{Gpu, ON_A_HOST, SHARE};
use super::quantity::{bandwidth, duration, speed};
use crate::Error;
use crate::settings::{ModelArgs, PolicyArgs, save_memory};

/// Settings of `plan`.
#[derive(Clone, Debug, Args)]
pub struct PlanArgs {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub model: ModelArgs,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub policy: PolicyArgs,
    /// Number of ranks.
    #[arg(long, visible_alias = "world", value_name = "N", default_value_t = 2)]
    pub ranks: usize,
    /// Tokens in a sample.
    #[arg(long, value_name = "N", default_value_t = 128)]
    pub seq: usize,
    /// Samples that a rank computes at a time.
    #[arg(long, value_name = "N", default_value_t = 4)]
    pub micro_batch: u64,
    /// Samples in a step, over all ranks; default: ranks times --micro-batch.
    #[arg(long, value_name = "N")]
    pub batch: Option<u64>,
    /// Micro-batches of each rank in a step, instead of --batch.
    #[arg(long, value_name = "N", conflicts_with = "batch")]
    pub rounds: Option<u64>,
    /// Memory of a rank for its part of a checkpoint: `copies`, which is what `train --save-every`
    /// takes, or a ring of at most BYTES; default: 1MiB, which is what a run takes that saves only
    /// at its end.
    #[arg(long, value_name = "copies|BYTES", value_parser = save_memory)]
    pub save_memory: Option<Staging>,
    /// Print every operation of a step.
    #[arg(long)]
    pub operations: bool,
    /// Print one JSON object instead of tables. Times in it are seconds, speeds are per second, memory and traffic are bytes of one rank.
    #[arg(long, conflicts_with = "operations")]
    pub json: bool,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub machine: MachineArgs,
}

/// The machine that a step is simulated on.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Simulation")]
#[group(skip)]
pub struct MachineArgs {
    /// Simulate a step on GPUs of this kind, with published peaks: hosts of 8, their links and
    /// memory, and --peak-share of their FLOP/s. Flags below say otherwise.
    #[arg(long, value_enum, value_name = "NAME")]
    pub device: Option<Gpu>,
    /// Share of the --device's FLOP/s that it sustains in the model's kernels.
    #[arg(long, value_name = "SHARE", default_value_t = SHARE, requires = "device")]
    pub peak_share: f64,
    /// Simulate a step with ranks that each sustain so many floating-point operations a second in the model's kernels, such as 400T: what was measured there,
    /// not what the processor could make.
    #[arg(long, value_name = "RATE", value_parser = speed)]
    pub flops: Option<f64>,
    /// Instead of --flops, the speed at which the settings given give so many tokens a second and rank: what was measured with them. With --flops, which were measured without
    /// communication, the --contention that does.
    #[arg(long, value_name = "TOKENS/S")]
    pub calibrate: Option<f64>,
    /// Share of what a rank computes with that moving data takes while it flows, from 0 to 0.99: where threads do so on the same processors.
    #[arg(long, value_name = "SHARE", default_value_t = 0.0)]
    pub contention: f64,
    /// Bandwidth between hosts in each direction, of one rank's share, such as 50GB/s or 400Gbit/s.
    #[arg(long, value_name = "RATE", value_parser = bandwidth)]
    pub link: Option<f64>,
    /// Time that any message between hosts takes; a collective pays it once for every other host.
    #[arg(long, value_name = "TIME", value_parser = duration, default_value = "5us")]
    pub latency: f64,
    /// Ranks of a host, neighbours in rank; default: 1, with --device 8.
    #[arg(long, value_name = "N")]
    pub ranks_per_host: Option<usize>,
    /// Bandwidth of a rank to the others of its host, in each direction.
    #[arg(long, value_name = "RATE", value_parser = bandwidth)]
    pub host_link: Option<f64>,
    /// Time that any message between ranks of a host takes.
    #[arg(long, value_name = "TIME", value_parser = duration, default_value = "1us")]
    pub host_latency: f64,
    /// Bandwidth of a rank's memory in updates, norms and zeroing; default: these take no time.
    #[arg(long, value_name = "RATE", value_parser = bandwidth)]
    pub memory_bandwidth: Option<f64>,
    /// Write a timeline of the step for ui.perfetto.dev.
    #[arg(long, value_name = "FILE")]
    pub timeline: Option<PathBuf>,
}

impl MachineArgs {
    /// The machine, for the ranks of `mesh` and weights of this type, at any speed; none where
    /// nothing is to be simulated.
    ///
    /// # Errors
    /// Names the flag that is missing, or how ranks do not fit on hosts.
    pub(super) fn machine(&self, mesh: Mesh, weights: DType) -> Result<Option<Machine>, Error> {
        let fail = |message: String| Err(Error::Setting(message));
        let peaks = self.device.map(Gpu::peaks);
        if self.flops.is_none() && self.calibrate.is_none() && peaks.is_none() {
            let given = [
                (self.link.is_some(), "--link"),
                (self.host_link.is_some(), "--host-link"),
                (self.memory_bandwidth.is_some(), "--memory-bandwidth"),
                (self.timeline.is_some(), "--timeline"),
                (self.contention > 0.0, "--contention"),
            ];
            return match given.into_iter().find(|(given, _)| *given) {
                None => Ok(None),
                Some((_, flag)) => {
                    fail(format!("{flag} needs to know how fast ranks compute: give --flops, --calibrate or --device"))
                }
            };
        }
        if !(0.0..=MOST_CONTENTION).contains(&self.contention) {
            return fail(format!("--contention {} is no share from 0 to {MOST_CONTENTION}", self.contention));
        }
        if self.contention > 0.0 && self.flops.is_some() && self.calibrate.is_some() {
            return fail("--flops with --calibrate finds the --contention: leave out one of them".to_owned());
        }
        if !(self.peak_share > 0.0 && self.peak_share <= 1.0) {
            return fail(format!("--peak-share {} is no share above 0 and up to 1", self.peak_share));
        }
        let ranks_per_host = self.ranks_per_host.unwrap_or(if peaks.is_some() { ON_A_HOST } else { 1 });
        let world = mesh.world();
        if ranks_per_host == 0 {
            return fail("--ranks-per-host is 0: it must be at least 1".to_owned());
        }
        let link = match (self.link, world > ranks_per_host) {
            (Some(bandwidth), _) => Link { bandwidth, latency: self.latency },
            (None, false) => Link::INSTANT,
            (None, true) => {
                return fail(format!(
                    "{world} ranks on hosts of {ranks_per_host} need --link, such as 50GB/s; ranks of one host are said with --ranks-per-host"
                ));
            }
        };
        let between = self.host_link.or(peaks.map(|peaks| peaks.link));
        let host_link = match (between, world.min(ranks_per_host) > 1) {
            (Some(bandwidth), _) => Link { bandwidth, latency: self.host_latency },
            (None, false) => Link::INSTANT,
            (None, true) => {
                return fail(format!(
                    "--ranks-per-host {ranks_per_host}: ranks of a host need --host-link, such as 450GB/s"
                ));
            }
        };
        let sustained = peaks.map(|peaks| self.peak_share * peaks.flops(weights));
        let machine = Machine {
            flops: self.flops.or(sustained).unwrap_or(f64::INFINITY),
            memory: self.memory_bandwidth.or(peaks.map(|peaks| peaks.memory)),
            ranks_per_host,
            link,
            host_link,
            contention: self.contention,
        };
        if !machine.fits(mesh) {
            let Mesh { replicate, shard } = mesh;
            return fail(format!(
                "{replicate} groups of {shard} ranks do not lie evenly on hosts of {ranks_per_host}: choose --ranks, --mesh and --ranks-per-host that divide \
                 each other"
            ));
        }
        Ok(Some(machine))
    }
}
