//! What `pillion plan` prints of a simulated step.

use comfy_table::{Table, presets};
use pillion_runtime::simulate::{Link, Machine};

use super::forecast::Forecast;
use super::setup::Setup;
use crate::train::bytes;

/// The simulated step, for reading.
pub(super) fn simulation_table(setup: &Setup<'_>, machine: &Machine, given: &Forecast) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    let mut row = |name: &str, value: String| {
        table.add_row([name, &value]);
    };
    row("machine", describe(machine, setup.mesh.world()));
    row(
        "time",
        format!(
            "{} a step: {} computing, {} exposed, waiting for collectives",
            seconds(given.step),
            seconds(given.computing),
            seconds(given.exposed)
        ),
    );
    let again = match given.recomputed_flops {
        0.0 => String::new(),
        flops => format!("; {}FLOP more compute activations again", scaled(flops)),
    };
    row(
        "speed",
        format!(
            "{:.0} tokens/s a rank, {:.0} in all; {}FLOP a step and rank, {}FLOP/s{again}",
            given.tokens_per_s_per_rank,
            given.tokens_per_s,
            scaled(given.flops),
            scaled(given.flops / given.step)
        ),
    );
    let sent = [
        ("gathers", given.sent.gathers),
        ("reductions", given.sent.reductions),
        ("sums over groups", given.sent.all_reductions),
    ];
    let sent = sent.into_iter().filter(|(_, sent)| sent.total() > 0).map(|(name, sent)| {
        let within = if sent.host > 0 { format!(" and {} on its host", bytes(sent.host)) } else { String::new() };
        format!("{name} {} to other hosts{within}", bytes(sent.link))
    });
    let sent: Vec<String> = sent.collect();
    row(
        "moved",
        if sent.is_empty() { "nothing".to_owned() } else { format!("{}; a rank receives as much", sent.join(", ")) },
    );
    let hidden = match given.communicating {
        0.0 => "there is nothing to hide".to_owned(),
        time => format!("{:.0} % of the {} in which collectives are under way", 100.0 * given.hidden, seconds(time)),
    };
    row("hidden", hidden);
    table
}

/// The given settings beside the best of a sweep.
pub(super) fn sweep_table(tried: usize, given: &Forecast, best: &Forecast) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.add_row(["", "prefetch", "slots", "bucket", "step", "exposed", "tokens/s a rank", "memory"]);
    let rows = [("given".to_owned(), given), (format!("best of {tried} simulated"), best)];
    for (name, forecast) in rows {
        table.add_row([
            name,
            forecast.prefetch.to_string(),
            forecast.slots.to_string(),
            if forecast.bucket == 0 { "a unit".to_owned() } else { bytes(forecast.bucket) },
            seconds(forecast.step),
            seconds(forecast.exposed),
            format!("{:.0}", forecast.tokens_per_s_per_rank),
            bytes(forecast.memory),
        ]);
    }
    table
}

pub(super) fn describe(machine: &Machine, world: usize) -> String {
    let link =
        |Link { bandwidth, latency }: Link| format!("{}B/s each way and {}", scaled(bandwidth), seconds(latency));
    let local = machine.ranks_per_host.min(world);
    let mut parts = vec![format!("{}FLOP/s sustained by a rank", scaled(machine.flops))];
    if world > local {
        parts.push(format!("{} between hosts", link(machine.link)));
    }
    if local > 1 {
        parts.push(format!("{} on hosts of {local}", link(machine.host_link)));
    }
    parts.push(match machine.memory {
        Some(bandwidth) => format!("memory {}B/s", scaled(bandwidth)),
        None => "updates take no time".to_owned(),
    });
    if machine.contention > 0.0 {
        parts.push(format!("{:.0} % of a rank's processor while data moves", 100.0 * machine.contention));
    }
    parts.join(", ")
}

/// A time, in a unit that gives three digits or so.
pub(super) fn seconds(time: f64) -> String {
    match time {
        0.0 => "0 s".to_owned(),
        time if time < 1e-3 => format!("{:.1} µs", 1e6 * time),
        time if time < 1.0 => format!("{:.1} ms", 1e3 * time),
        time => format!("{time:.2} s"),
    }
}

/// A number with a decimal prefix.
fn scaled(value: f64) -> String {
    let prefixes = [(1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")];
    let (scale, prefix) = prefixes.into_iter().find(|(scale, _)| value >= *scale).unwrap_or((1.0, ""));
    format!("{:.4} {prefix}", value / scale).replace(".0000", "")
}
