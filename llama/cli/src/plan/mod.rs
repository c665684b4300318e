//! `pillion plan`: how a run would be laid out, and what a step would take on a machine that there need not be.

pub(crate) mod auto;
mod forecast;
mod gpus;
pub(crate) mod quantity;
mod settings;
mod setup;
mod table;

use std::fs::File;
use std::io::{BufWriter, Write};

use clap::ValueEnum;
use pillion_collectives::limits::human;
use pillion_llama::model::Recompute;
use pillion_runtime::checkpoint::Staging;
use pillion_runtime::simulate::Machine;
use pillion_runtime::trace::write_trace;
use pillion_runtime::{Memory, Mesh};
use serde::Serialize;

use crate::train::{plan_table, recipe};
use crate::{Error, complain, print_result};
use forecast::{Forecast, best};
pub use settings::{MachineArgs, PlanArgs};
pub(crate) use setup::{Planned, Setup, ring_remedy};
use table::{simulation_table, sweep_table};

/// What `--json` prints.
#[derive(Serialize)]
struct Report {
    parameters: usize,
    ranks: usize,
    mesh: Mesh,
    seq: usize,
    micro_batch: u64,
    rounds: usize,
    recompute: Recompute,
    /// Of a rank, what its parameters take.
    memory: Memory,
    /// What its state passes through when it is saved: copies, or a ring.
    checkpoints: u64,
    activations: u64,
    /// All of it.
    total: u64,
    collectives: usize,
    simulation: Option<Simulated>,
}

#[derive(Serialize)]
struct Simulated {
    machine: Machine,
    /// With the settings that were given, and with the best.
    given: Forecast,
    best: Forecast,
}

/// `pillion plan`.
///
/// # Errors
/// When settings contradict each other, or the timeline cannot be written.
pub(crate) fn plan(settings: &PlanArgs) -> Result<i32, Error> {
    let model = settings.model.config().map_err(|error| Error::Setting(error.to_string()))?;
    let PlanArgs { ranks, seq, micro_batch, .. } = *settings;
    let sizes = [("--ranks", ranks as u64), ("--seq", seq as u64), ("--micro-batch", micro_batch)];
    let more = [("--batch", settings.batch), ("--rounds", settings.rounds)];
    let more = more.into_iter().filter_map(|(flag, value)| Some((flag, value?)));
    for (flag, value) in sizes.into_iter().chain(more) {
        let most = if flag == "--rounds" { MOST_ROUNDS } else { 1 << 20 };
        if !(1..=most).contains(&value) {
            return Err(Error::Setting(format!("{flag} {value} is out of range: at least 1 and at most {most}")));
        }
    }
    if settings.policy.no_overlap {
        return Err(Error::Setting("--no-overlap is not simulated: leave it out".to_owned()));
    }
    recipe::check_tokens(seq as u64, micro_batch)?;
    let policy = recipe::policy(&settings.policy, 1.0, ranks)?;
    let mesh = policy.mesh(ranks)?;
    let batch = settings.batch.unwrap_or(settings.rounds.unwrap_or(1) * ranks as u64 * micro_batch);
    if !batch.is_multiple_of(micro_batch) {
        return Err(Error::Setting(format!("--batch {batch} is not a multiple of --micro-batch {micro_batch}")));
    }
    let rounds = batch.div_ceil(micro_batch).div_ceil(ranks as u64);
    recipe::check_rounds(&model, rounds, if settings.batch.is_some() { "--batch" } else { "--rounds" })?;
    let rounds = rounds as usize;
    let machine = settings.machine.machine(mesh, policy.weights)?;
    // Without a machine all ranks are on one host.
    let local = machine.map_or(ranks, |machine| machine.ranks_per_host.min(ranks));
    let recompute = settings.policy.recompute;
    let staging = settings.save_memory.unwrap_or(Staging::SMALL_RING);
    let setup = Setup { model: &model, policy, recompute, staging, mesh, local, seq, micro_batch, rounds };
    let planned = setup.plan();
    if !settings.json {
        print_result(plan_table(&setup, &planned, batch, "planned"))?;
    }
    if settings.operations {
        for (index, operation) in planned.plan.operations.iter().enumerate() {
            print_result(format_args!("{index:>5}  {:?} after {:?}", operation.action, operation.after))?;
        }
    }
    let mut report = Report {
        parameters: planned.layout.parameters(),
        ranks,
        mesh,
        seq,
        micro_batch,
        rounds,
        recompute,
        memory: planned.needs.memory,
        checkpoints: planned.needs.checkpoints,
        activations: planned.needs.activations,
        total: planned.needs.total(),
        collectives: planned.plan.collectives(),
        simulation: None,
    };
    if let Some(gpu) = settings.machine.device {
        let (room, total) = (gpu.peaks().room, planned.needs.total());
        if total > room {
            let name = gpu.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default();
            let (total, room) = (human(total), human(room));
            complain(format_args!(
                "a rank needs {total}, and {name} has {room}: use a smaller --micro-batch or --seq, --recompute, \
                 or more --ranks"
            ));
        }
    }
    if let Some(mut machine) = machine {
        if let Some(tokens_per_s) = settings.machine.calibrate {
            match settings.machine.flops {
                None => machine.flops = setup.calibrate(&machine, tokens_per_s)?,
                Some(_) => machine.contention = setup.contention(&machine, tokens_per_s)?,
            }
        }
        let simulation = setup.simulate(&planned, &machine);
        let step = simulation.step;
        if step.is_nan() || step > MOST_SECONDS {
            return Err(Error::Setting(format!(
                "a step takes {step:.3e} s on this machine, more than the {MOST_SECONDS:e} s that can be drawn: check --flops and the links"
            )));
        }
        if let Some(path) = &settings.machine.timeline {
            let write = || {
                let mut file = BufWriter::new(File::create(path)?);
                write_trace(&mut file, &simulation.trace(&planned.plan, &planned.layout))?;
                file.flush()
            };
            write().map_err(|error| Error::file(path, error))?;
        }
        let given = setup.figures(&planned, &simulation);
        let sweep = setup.sweep(&machine);
        let best = best(sweep.iter().copied());
        if !settings.json {
            print_result(simulation_table(&setup, &machine, &given))?;
            print_result(format_args!("\n{}", sweep_table(sweep.len(), &given, &best)))?;
        }
        report.simulation = Some(Simulated { machine, given, best });
    }
    if settings.json {
        print_result(serde_json::to_string_pretty(&report).expect("plain values"))?;
    }
    Ok(0)
}

/// Thirty years.
const MOST_SECONDS: f64 = 1e9;
/// Plans of more are long, and no different.
const MOST_ROUNDS: u64 = 1024;
