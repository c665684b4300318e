//! The table that stands before a run: what is trained, where it lives, what a step moves.

use comfy_table::{Table, presets};
use pillion_runtime::{Action, Gather, Layout, Memory, Plan, Policy, Slots};

use crate::config::Config;
use crate::model::Model;

/// The table, for `world` ranks with micro-batches of `micro_batch` samples of `seq` tokens and steps of `batch` samples.
pub(crate) fn plan_table(
    model: &Config,
    policy: &Policy,
    world: usize,
    seq: usize,
    micro_batch: u64,
    batch: u64,
    backend: &str,
) -> Table {
    let layout = Layout::new(&model.units(), world);
    let memory = Memory::of(&layout, policy);
    let activations = Model::activation_bytes(model, policy.weights, micro_batch as usize, seq);
    let rounds = batch.div_ceil(micro_batch).div_ceil(world as u64) as usize;
    let plan = Plan::step(slots(&layout, policy), rounds);
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
    row("ranks", format!("{world}, each holds 1/{world} of weights, gradients and optimizer state ({backend})"));
    row(
        "step",
        format!(
            "{batch} samples of {seq} tokens at first: {rounds} rounds of {world} × {micro_batch}; {} collectives, {} sent by a rank",
            plan.collectives(),
            bytes(step_bytes(&layout, policy, &plan))
        ),
    );
    row(
        "weights",
        format!(
            "{} a rank in {}, gathered by {}",
            bytes(memory.weights),
            policy.weights,
            match policy.gather {
                Gather::Window => "reading all shards in place: nothing is copied".to_owned(),
                Gather::Copy =>
                    format!("copy into {} slots of {}", policy.slots, bytes(memory.gathered / policy.slots as u64)),
            }
        ),
    );
    row(
        "gradients",
        format!(
            "{} a rank in {} slots, and {} for its shard of the sum",
            bytes(memory.gradients),
            policy.slots,
            bytes(memory.gradient_shard)
        ),
    );
    row(
        "optimizer",
        match memory.master {
            0 => format!("{} a rank of AdamW moments; the weights are f32", bytes(memory.moments)),
            master => {
                format!("{} a rank of AdamW moments, {} of f32 master weights", bytes(memory.moments), bytes(master))
            }
        },
    );
    row("activations", format!("{} a rank", bytes(activations)));
    row("memory", format!("{} a rank in all", bytes(memory.total() + activations)));
    table
}

/// The memory that an engine's plans are made for.
pub(crate) fn slots(layout: &Layout, policy: &Policy) -> Slots {
    let units = layout.units.len();
    let weights = match policy.gather {
        Gather::Window => units,
        Gather::Copy => policy.slots,
    };
    Slots { units, prefetch: policy.prefetch, weights: weights.max(policy.prefetch + 1), gradients: policy.slots }
}

/// Bytes that the other ranks read from one in a step.
fn step_bytes(layout: &Layout, policy: &Policy, plan: &Plan) -> u64 {
    let others = (layout.world - 1) as u64;
    let sent = |action: Action| match action {
        Action::Gather { unit, .. } if policy.gather == Gather::Copy => {
            layout.units[unit].shard * policy.weights.bytes()
        }
        Action::Reduce { unit, .. } => layout.units[unit].shard * 4,
        // The square norm, the count of non-finite values, and the request to stop.
        Action::Agree => 3 * 8,
        _ => 0,
    };
    others * plan.operations.iter().map(|operation| sent(operation.action) as u64).sum::<u64>()
}

/// A number of bytes for reading.
pub(crate) fn bytes(count: u64) -> String {
    indicatif::HumanBytes(count).to_string()
}

/// A count with separators.
pub(crate) fn grouped(count: u64) -> String {
    indicatif::HumanCount(count).to_string()
}
