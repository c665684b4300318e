//! The machine that figures come from.

use std::fs;

use pillion_collectives::Communicator;
use serde::Serialize;

use crate::Error;

/// Words of a rank's affinity that are exchanged: 1,024 processors, as many as a `cpu_set_t` has.
const WORDS: usize = 16;

/// What is known of it.
#[derive(Clone, Debug, Serialize)]
pub struct Machine {
    /// Name of the processor.
    pub cpu: String,
    /// Processors that are online.
    pub cores: usize,
    /// Last-level cache in bytes, as the system reports it; 0 where it does not.
    pub last_level_cache: usize,
    /// Instruction sets that matter to the kernels, as this processor has them.
    pub isa: Vec<&'static str>,
    /// Release of the kernel.
    pub kernel: String,
    /// Processors on which each rank may run, as in `0-3,8`.
    pub affinity: Vec<String>,
}

impl Machine {
    /// Asks the system, and every rank for its processors; every rank calls this.
    ///
    /// # Errors
    /// The communicator's.
    pub fn look(communicator: &Communicator) -> Result<Machine, Error> {
        let mut own = [0u64; WORDS];
        if let Ok(set) = rustix::thread::sched_getaffinity(None) {
            for cpu in (0..WORDS * 64).filter(|&cpu| set.is_set(cpu)) {
                own[cpu / 64] |= 1 << (cpu % 64);
            }
        }
        let affinity = communicator.all_gather_scalars(&own)?;
        let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let field = |name: &str| {
            let line = info.lines().find_map(|line| line.strip_prefix(name))?;
            Some(line.trim_start_matches([' ', '\t', ':']).to_string())
        };
        Ok(Machine {
            cpu: field("model name").unwrap_or_else(|| std::env::consts::ARCH.into()),
            cores: info.lines().filter(|line| line.starts_with("processor")).count(),
            last_level_cache: last_level_cache(),
            isa: isa(),
            kernel: rustix::system::uname().release().to_string_lossy().into_owned(),
            affinity: affinity.iter().map(|words| ranges(words)).collect(),
        })
    }
}

/// Bytes of the largest cache that the first processor reports.
pub fn last_level_cache() -> usize {
    let size = |index: usize| {
        let text = fs::read_to_string(format!("/sys/devices/system/cpu/cpu0/cache/index{index}/size")).ok()?;
        text.trim().strip_suffix('K')?.parse::<usize>().ok().map(|kib| kib << 10)
    };
    (0..8).filter_map(size).max().unwrap_or(0)
}

#[cfg(target_arch = "x86_64")]
fn isa() -> Vec<&'static str> {
    let mut names = vec!["sse2"];
    for (name, has) in [
        ("avx2", std::is_x86_feature_detected!("avx2")),
        ("fma", std::is_x86_feature_detected!("fma")),
        ("avx512f", std::is_x86_feature_detected!("avx512f")),
        ("avx512bw", std::is_x86_feature_detected!("avx512bw")),
        ("avx512bf16", std::is_x86_feature_detected!("avx512bf16")),
    ] {
        if has {
            names.push(name);
        }
    }
    names
}

#[cfg(not(target_arch = "x86_64"))]
fn isa() -> Vec<&'static str> {
    vec![std::env::consts::ARCH]
}

fn ranges(words: &[u64]) -> String {
    let has = |cpu: usize| words[cpu / 64] >> (cpu % 64) & 1 == 1;
    let mut parts = Vec::new();
    let mut cpu = 0;
    while cpu < words.len() * 64 {
        if !has(cpu) {
            cpu += 1;
            continue;
        }
        let first = cpu;
        while cpu < words.len() * 64 && has(cpu) {
            cpu += 1;
        }
        parts.push(if cpu - first == 1 { first.to_string() } else { format!("{first}-{}", cpu - 1) });
    }
    parts.join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processors_are_written_as_ranges() {
        assert_eq!(ranges(&[0b1111, 0]), "0-3");
        assert_eq!(ranges(&[0b1_0000_0001, 1]), "0,8,64");
        assert_eq!(ranges(&[u64::MAX, 1]), "0-64");
        assert_eq!(ranges(&[0]), "");
    }
}
