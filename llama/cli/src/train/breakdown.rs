//! Where the time of the steps went (`--profile`): kernel by kernel, and the rest.

use std::sync::Arc;
use std::time::Duration;

use comfy_table::{CellAlignment, Table, presets};
use pillion_kernels::cpu::{KernelTime, Profile};

/// Times of a rank's kernels, over all steps but the first, which touches most memory for the first time.
pub(super) struct Breakdown {
    profile: Arc<Profile>,
    kernels: Vec<KernelTime>,
    steps: u64,
    time: Duration,
    exposed: Duration,
}

impl Breakdown {
    pub(super) fn new(profile: Arc<Profile>) -> Breakdown {
        Breakdown { profile, kernels: Vec::new(), steps: 0, time: Duration::ZERO, exposed: Duration::ZERO }
    }

    /// Forgets what has run outside of steps.
    pub(super) fn begin_step(&self) {
        self.profile.take();
    }

    /// Adds a step, of which the host has waited for others for `exposed`.
    pub(super) fn end_step(&mut self, time: Duration, exposed: Duration) {
        if self.steps == 1 {
            self.kernels.clear();
            (self.time, self.exposed) = (Duration::ZERO, Duration::ZERO);
        }
        self.steps += 1;
        self.time += time;
        self.exposed += exposed;
        for new in self.profile.take() {
            match self.kernels.iter_mut().find(|kernel| kernel.name == new.name) {
                Some(kernel) => {
                    kernel.calls += new.calls;
                    kernel.time += new.time;
                    kernel.flops += new.flops;
                    kernel.bytes += new.bytes;
                }
                None => self.kernels.push(new),
            }
        }
    }

    /// The table, if there were steps; `peak` is that of this rank, in floating-point operations a second.
    pub(super) fn table(mut self, peak: f64) -> Option<Table> {
        if self.steps == 0 {
            return None;
        }
        self.kernels.sort_by_key(|kernel| std::cmp::Reverse(kernel.time));
        let steps = if self.steps > 1 { self.steps - 1 } else { 1 } as f64;
        let mut table = Table::new();
        table.load_style(presets::NOTHING);
        table.set_header(["kernel of rank 0", "calls", "ms a step", "share", "GFLOP/s", "of peak", "GB/s"]);
        let total = self.time.as_secs_f64();
        let share = |time: Duration| {
            let seconds = time.as_secs_f64();
            [format!("{:.2}", seconds * 1e3 / steps), format!("{:.1} %", 100.0 * seconds / total.max(1e-9))]
        };
        for kernel in &self.kernels {
            let seconds = kernel.time.as_secs_f64().max(1e-9);
            let flops = kernel.flops as f64 / seconds;
            let [time, share] = share(kernel.time);
            let [speed, of_peak] = match kernel.flops {
                0 => ["-".to_owned(), "-".to_owned()],
                _ => [format!("{:.1}", flops / 1e9), format!("{:.0} %", 100.0 * flops / peak)],
            };
            let moved = format!("{:.1}", kernel.bytes as f64 / seconds / 1e9);
            let calls = format!("{:.0}", kernel.calls as f64 / steps);
            table.add_row([kernel.name.to_owned(), calls, time, share, speed, of_peak, moved]);
        }
        let kernels: Duration = self.kernels.iter().map(|kernel| kernel.time).sum();
        let others = self.time.saturating_sub(kernels + self.exposed);
        for (name, time) in
            [("waiting for collectives", self.exposed), ("everything else", others), ("step", self.time)]
        {
            let [time, share] = share(time);
            table.add_row([name.to_owned(), String::new(), time, share]);
        }
        table.column_iter_mut().skip(1).for_each(|column| column.set_cell_alignment(CellAlignment::Right));
        Some(table)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_steps_there_is_nothing_to_show() {
        assert!(Breakdown::new(Arc::new(Profile::default())).table(1e9).is_none());
    }

    #[test]
    fn shares_are_of_the_steps_after_the_first() {
        let mut breakdown = Breakdown::new(Arc::new(Profile::default()));
        for millis in [900, 40, 40] {
            breakdown.begin_step();
            breakdown.end_step(Duration::from_millis(millis), Duration::from_millis(10));
        }
        let text = breakdown.table(1e9).unwrap().to_string();
        let row = |name: &str| text.lines().find(|line| line.contains(name)).unwrap().to_owned();
        assert!(row("waiting").contains("10.00") && row("waiting").contains("25.0 %"), "{text}");
        assert!(row("everything else").contains("30.00") && row("everything else").contains("75.0 %"), "{text}");
    }
}
