//! How long each kernel takes.

use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::Work;

/// Time that kernels have taken, by name.
#[derive(Default)]
pub struct Profile {
    kernels: Mutex<Vec<KernelTime>>,
}

/// All calls of one kernel.
#[derive(Clone, Debug)]
pub struct KernelTime {
    /// As the method of [`crate::Stream`] is called.
    pub name: &'static str,
    /// How often it ran.
    pub calls: u64,
    /// How long, in all.
    pub time: Duration,
    /// Floating-point operations of its matrix products.
    pub flops: u64,
    /// Bytes of its operands and results, each counted once a call.
    pub bytes: u64,
}

impl Profile {
    /// What has been measured, in the order in which kernels first ran; starts anew.
    pub fn take(&self) -> Vec<KernelTime> {
        std::mem::take(&mut self.kernels.lock())
    }

    /// Runs a kernel.
    pub(super) fn time(&self, work: Work, bytes: u64, kernel: impl FnOnce()) {
        let started = Instant::now();
        kernel();
        let time = started.elapsed();
        let mut kernels = self.kernels.lock();
        let index = kernels.iter().position(|kernel| kernel.name == work.name).unwrap_or_else(|| {
            kernels.push(KernelTime { name: work.name, calls: 0, time: Duration::ZERO, flops: 0, bytes: 0 });
            kernels.len() - 1
        });
        let kernel = &mut kernels[index];
        kernel.calls += 1;
        kernel.time += time;
        kernel.flops += work.flops;
        kernel.bytes += bytes;
    }
}
