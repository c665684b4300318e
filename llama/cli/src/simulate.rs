//! `pillion abs simulate`: how far the statistics scatter, to choose a moving average by.

use clap::Args;
use comfy_table::{CellAlignment, Table, presets};
use pillion_abs::simulation::{Interval, Scatter, Truth, simulate};
use serde::Serialize;

use crate::controller::by_flag;
use crate::{Error, print_result};

/// Most normal numbers to draw: some minutes.
const MOST_DRAWS: u64 = 1 << 35;

/// Settings of `abs simulate`.
#[derive(Clone, Debug, Args)]
#[command(allow_negative_numbers = true)]
pub struct SimulateArgs {
    /// True noise scale, in samples: σ² where the true gradient has length 1. `noise_scale` in a run's metrics estimates it.
    #[arg(long, value_name = "N", default_value_t = 256.0)]
    pub noise_scale: f64,
    /// Samples in a step.
    #[arg(long, value_name = "N", default_value_t = 64)]
    pub batch: u64,
    /// Groups of a step: micro-batches over all ranks where each is reduced, else ranks.
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "2,4,8,16,32")]
    pub groups: Vec<u64>,
    /// Weights of a step's statistics one step later: what --ema of `train` sets.
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "0,0.5,0.9,0.99")]
    pub ema: Vec<f64>,
    /// Dimensions of the gradient: the effective number, (tr Σ)²/tr Σ², which is far smaller than the number of parameters.
    #[arg(long, value_name = "N", default_value_t = 256)]
    pub dimensions: usize,
    /// Steps to simulate.
    #[arg(long, value_name = "N", default_value_t = 2000)]
    pub steps: usize,
    /// Seed of the gradients.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub seed: u64,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

#[derive(Serialize)]
struct Row {
    groups: u64,
    #[serde(flatten)]
    scatter: Scatter,
}

/// Prints a row for each number of groups and each average.
///
/// # Errors
/// When a setting is out of its range.
pub(crate) fn run(settings: &SimulateArgs) -> Result<i32, Error> {
    let SimulateArgs { noise_scale, batch, dimensions, steps, seed, .. } = *settings;
    let draws = settings.groups.iter().try_fold(0u64, |sum, &groups| {
        sum.checked_add(groups.checked_mul(dimensions as u64)?.checked_mul(steps as u64)?)
    });
    if draws.is_none_or(|draws| draws > MOST_DRAWS) {
        return Err(Error::Setting(
            "more numbers would be drawn than a few minutes suffice for: give fewer --groups, --dimensions or --steps"
                .to_owned(),
        ));
    }
    let mut rows = Vec::new();
    for &groups in &settings.groups {
        let truth = Truth { noise_scale, batch, groups, dimensions };
        let scatters = simulate(truth, &settings.ema, steps, seed).map_err(by_flag)?;
        rows.extend(scatters.into_iter().map(|scatter| Row { groups, scatter }));
    }
    match settings.json {
        true => print_result(serde_json::to_string_pretty(&rows).expect("plain values"))?,
        false => print_result(table(settings, &rows))?,
    }
    Ok(0)
}

fn table(settings: &SimulateArgs, rows: &[Row]) -> String {
    let SimulateArgs { noise_scale, batch, dimensions, steps, .. } = settings;
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header([
        "groups",
        "ema",
        "steps averaged",
        "noise σ̂²/σ²",
        "mean",
        "noise scale",
        "undefined",
        "norm test",
    ]);
    for Row { groups, scatter } in rows {
        let decay = scatter.ema_decay;
        table.add_row([
            groups.to_string(),
            decay.to_string(),
            // As many equal weights have the same variance.
            format!("{:.0}", (1.0 + decay) / (1.0 - decay)),
            interval(scatter.variance),
            format!("{:.4}", scatter.variance_mean),
            scatter.noise_scale.map_or("-".to_owned(), interval),
            format!("{:.1} %", scatter.undefined * 100.0),
            interval(scatter.wanted),
        ]);
    }
    table.column_iter_mut().for_each(|column| column.set_cell_alignment(CellAlignment::Right));
    format!(
        "{steps} steps of {batch} samples in {dimensions} dimensions, true noise scale {noise_scale}. 95 % of the estimates are within these shares of the truth:\n{table}"
    )
}

fn interval(Interval { low, high }: Interval) -> String {
    format!("{low:.2} … {high:.2}")
}
