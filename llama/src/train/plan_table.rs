//! The table that stands before a run: what is trained, where it lives, what a step moves.

use comfy_table::{Table, presets};
use pillion_runtime::checkpoint::Saver;
use pillion_runtime::simulate::AGREEMENT_BYTES;
use pillion_runtime::{Action, Gather, Layout, Memory, Mesh, Outline, Plan, Policy, Sharded};

use crate::Error;
use crate::config::Config;
use crate::model::{Model, Recompute};

/// The table, for `world` ranks, `local` on each host, with micro-batches of `micro_batch` samples of `seq` tokens and steps of `batch` samples.
///
/// # Errors
/// When the policy does not fit the ranks.
pub(crate) fn plan_table(
    model: &Config,
    policy: &Policy,
    recompute: Recompute,
    world: usize,
    local: usize,
    seq: usize,
    micro_batch: u64,
    batch: u64,
    backend: &str,
) -> Result<Table, Error> {
    let mesh = policy.mesh(world)?;
    let layout = Layout::new(&model.units(), mesh.shard);
    let memory = Memory::of(&layout, policy, mesh).on_hosts_of(local, &layout, policy, mesh);
    let activations = Model::activation_bytes(model, policy.weights, micro_batch as usize, seq, recompute);
    let rounds = batch.div_ceil(micro_batch).div_ceil(world as u64) as usize;
    let plan = Plan::step(&Outline::new(&layout, policy, mesh), rounds);
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
            "{batch} samples of {seq} tokens at first: {rounds} rounds of {world} × {micro_batch}; {} collectives, {} sent by a rank",
            plan.collectives(),
            bytes(step_bytes(&layout, policy, mesh, local, &plan))
        ),
    );
    let in_slots = |count: usize, total: u64| match count < layout.units.len() {
        true => format!("copy into {count} slots of {}", bytes(total / count as u64)),
        false => format!("copy into a slot for each unit, {}", bytes(total)),
    };
    let gathered = match (policy.sharded.parameters, policy.gather) {
        (true, Gather::Window) if local < mesh.shard => ", gathered once a step into a window on each host".to_owned(),
        (true, Gather::Window) => ", gathered by reading all shards in place: nothing is copied".to_owned(),
        (true, Gather::Copy) => format!(", gathered by {}", in_slots(policy.slots, memory.gathered)),
        (false, _) if policy.sharded == Sharded::NOTHING => String::new(),
        (false, _) => ", gathered once a step".to_owned(),
    };
    row("weights", format!("{} a rank in {}{gathered}", bytes(memory.weights), policy.weights));
    let slots = match policy.sharded.gradients {
        true => format!("in {} slots", policy.slots),
        false => "for all of them, reduced in the last round".to_owned(),
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
    row("checkpoints", format!("{} a rank for the copies that are written", bytes(Saver::bytes(&layout, policy))));
    let again = match recompute {
        Recompute::None => "",
        Recompute::Block => "; blocks are computed again in the backward pass",
        Recompute::Attention => "; attention is computed again in the backward pass",
    };
    row("activations", format!("{} a rank{again}", bytes(activations)));
    row("memory", format!("{} a rank in all", bytes(memory.total() + activations + Saver::bytes(&layout, policy))));
    Ok(table)
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
