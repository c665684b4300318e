//! The table that stands before a run: what is trained, where it lives, what a step moves.

use comfy_table::{Table, presets};
use pillion_llama::model::Recompute;
use pillion_runtime::checkpoint::Staging;
use pillion_runtime::simulate::AGREEMENT_BYTES;
use pillion_runtime::{Action, Gather, Layout, Mesh, Outline, Plan, Policy, Sharded, Slots};

use crate::plan::{Planned, Setup};

/// The table, for steps of `batch` samples at first.
pub(crate) fn plan_table(setup: &Setup<'_>, planned: &Planned, batch: u64, backend: &str) -> Table {
    let &Setup { model, ref policy, mesh, local, seq, micro_batch, rounds, .. } = setup;
    let Planned { layout, plan, needs, .. } = planned;
    let memory = &needs.memory;
    let world = mesh.world();
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    let mut row = |name: &str, value: String| {
        table.add_row([name, &value]);
    };
    row(
        "model",
        format!(
            "{} parameters: {} blocks, width {}, feed-forward {}, {} heads ({} for keys), vocabulary {}",
            grouped(layout.parameters() as u64),
            model.num_hidden_layers,
            model.hidden_size,
            model.intermediate_size,
            model.num_attention_heads,
            model.num_key_value_heads,
            model.vocab_size
        ),
    );
    row("ranks", format!("{} ({backend})", placement(world, mesh, policy.sharded)));
    row(
        "step",
        format!(
            "{batch} samples of {seq} tokens at first: {} of {world} × {micro_batch}; {} collectives, {} sent by a rank",
            if rounds == 1 { "1 round".to_owned() } else { format!("{rounds} rounds") },
            plan.collectives(),
            bytes(step_bytes(layout, policy, mesh, local, plan))
        ),
    );
    let in_slots = |slots: &Slots, total: u64| match slots.are_own() {
        true => format!("a slot for each, {}", bytes(total)),
        false => format!("{} slots, {}", slots.count(), bytes(total)),
    };
    let weights_in = |total| plan.outline.weights.as_ref().map_or_else(String::new, |slots| in_slots(slots, total));
    let gathered = match (policy.sharded.parameters, policy.gather) {
        (true, Gather::Window) if local < mesh.shard => ", gathered once a step into a window on each host".to_owned(),
        (true, Gather::Window) => ", gathered by reading all shards in place: nothing is copied".to_owned(),
        (true, Gather::Copy) => format!(", gathered by copy into {}", weights_in(memory.gathered)),
        (false, _) if policy.sharded == Sharded::NOTHING => String::new(),
        (false, _) => ", gathered once a step".to_owned(),
    };
    if policy.bucket > 0 {
        let elements = |units: &std::ops::Range<usize>| {
            layout.units[units.clone()].iter().map(|unit| unit.padded).sum::<usize>() * policy.weights.bytes()
        };
        let longest = plan.outline.buckets.iter().map(elements).max().unwrap_or(0) as u64;
        let (buckets, units) = (plan.outline.buckets.len(), layout.units.len());
        row("buckets", format!("{buckets} for {units} units, the longest of {}", bytes(longest)));
    }
    row("weights", format!("{} a rank in {}{gathered}", bytes(memory.weights), policy.weights));
    let flags = without_effect(setup, planned);
    if !flags.is_empty() {
        row("no effect", format!("{}: a step is the same without", flags.join(" and ")));
    }
    let slots = match &plan.outline.gradients {
        Some(slots) if slots.are_own() => "in a slot for each".to_owned(),
        Some(slots) => format!("in {} slots", slots.count()),
        None => "for all of them, reduced in the last round".to_owned(),
    };
    let shard = match memory.gradient_shard {
        0 => String::new(),
        shard => format!(", and {} for its shard of the sum", bytes(shard)),
    };
    row("gradients", format!("{} a rank {slots}{shard}; they travel in {}", bytes(memory.gradients), policy.reduce));
    row(
        "optimizer",
        match memory.master {
            0 => format!("{} a rank of AdamW moments; the weights are f32", bytes(memory.moments)),
            master => {
                format!("{} a rank of AdamW moments, {} of f32 master weights", bytes(memory.moments), bytes(master))
            }
        },
    );
    let saving = needs.checkpoints;
    let of_whom = if mesh.replicate > 1 { " of the first group" } else { "" };
    row(
        "checkpoints",
        match setup.staging {
            Staging::Copies => {
                format!("{} a rank{of_whom} for copies: steps go on while they are written", bytes(saving))
            }
            Staging::Ring { .. } => {
                format!("{} a rank{of_whom} for a ring: steps wait while a checkpoint passes through it", bytes(saving))
            }
        },
    );
    let again = match setup.recompute {
        // The backward pass begins with the last block, so there is nothing to compute again.
        _ if model.num_hidden_layers == 1 => "",
        Recompute::None => "",
        Recompute::Block => "; all blocks but the last are computed again in the backward pass",
        Recompute::Attention => "; attention is computed again in the backward pass, but for the last block",
    };
    row("activations", format!("{} a rank{again}", bytes(needs.activations)));
    row("memory", format!("{} a rank in all", bytes(needs.total())));
    table
}

/// Flags that were given other values than their defaults, and change nothing.
fn without_effect(setup: &Setup<'_>, planned: &Planned) -> Vec<String> {
    let (policy, outline) = (&setup.policy, &planned.plan.outline);
    let (prefetch, slots) = (policy.prefetch, policy.slots);
    let fewest = Policy { slots: prefetch + 1, ..*policy };
    let mut flags = Vec::new();
    if prefetch != Policy::default().prefetch && outline.weights.is_none() {
        flags.push(format!("--prefetch {prefetch}"));
    }
    if slots > fewest.slots && Outline::new(&planned.layout, &fewest, setup.mesh) == *outline {
        flags.push(format!("--slots {slots}"));
    }
    flags
}

/// What a rank holds of what, in words.
fn placement(world: usize, mesh: Mesh, sharded: Sharded) -> String {
    let Mesh { replicate, shard } = mesh;
    let Sharded { parameters, gradients, .. } = sharded;
    let groups = if replicate > 1 { format!(" in {replicate} groups of {shard}") } else { String::new() };
    let divided = match (parameters, gradients) {
        _ if sharded == Sharded::NOTHING => return format!("{world}, each holds everything"),
        (true, true) => "weights, gradients and optimizer state",
        (true, false) => "weights and optimizer state, and all gradients",
        (false, true) => "gradients and optimizer state, and all weights",
        (false, false) => "optimizer state, and all weights and gradients",
    };
    format!("{world}{groups}, each holds 1/{shard} of {divided}")
}

/// Bytes that the other ranks read from one in a step.
pub(crate) fn step_bytes(layout: &Layout, policy: &Policy, mesh: Mesh, local: usize, plan: &Plan) -> u64 {
    let Mesh { replicate, shard } = mesh;
    let (of_group, of_all) = (shard - 1, mesh.world() - 1);
    // Into a window goes one shard to each other host.
    let window = policy.sharded.parameters && policy.gather == Gather::Window;
    let gathered = if window { shard.div_ceil(local.max(1)) - 1 } else { of_group };
    let shard = |bucket: usize| -> usize {
        layout.units[plan.outline.buckets[bucket].clone()].iter().map(|unit| unit.shard).sum()
    };
    let sent = |action: Action| match action {
        Action::Gather { bucket, .. } => gathered * shard(bucket) * policy.weights.bytes(),
        Action::Reduce { bucket, .. } => of_group * shard(bucket) * policy.reduce.bytes(),
        // Each rank sums a part of all, and gives it to all: twice the part of a rank goes to each other rank.
        Action::AllReduce { bucket } => 2 * (replicate - 1) * shard(bucket).div_ceil(replicate) * 4,
        Action::Agree => of_all * AGREEMENT_BYTES as usize,
        Action::Compute { .. } | Action::Update { .. } => 0,
    };
    plan.operations.iter().map(|operation| sent(operation.action) as u64).sum()
}

/// A number of bytes for reading.
pub(crate) fn bytes(count: u64) -> String {
    indicatif::HumanBytes(count).to_string()
}

/// A count with separators.
pub(crate) fn grouped(count: u64) -> String {
    indicatif::HumanCount(count).to_string()
}
