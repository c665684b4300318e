//! Validation loss, over the ranks.

use pillion_collectives::Reduction;
use pillion_data::Dataset;
use pillion_llama::model::Model;
use pillion_runtime::Engine;

use crate::Error;

/// Mean loss, in nats a token, of the first `samples` validation windows, dealt to ranks by micro-batches. `samples` is a
/// multiple of `micro_batch`. The same on every rank.
pub(crate) fn validate(
    engine: &mut Engine,
    model: &mut Model,
    dataset: &Dataset,
    samples: u64,
    micro_batch: u64,
) -> Result<f64, Error> {
    let communicator = engine.communicator().clone();
    let (rank, world) = (communicator.rank() as u64, communicator.world() as u64);
    let micro_batches = samples / micro_batch;
    let rounds = micro_batches.div_ceil(world);
    let seq = dataset.seq();
    let mut inputs = vec![0; micro_batch as usize * seq];
    let mut targets = inputs.clone();
    let mut step = engine.begin_evaluation(rounds as usize)?;
    for round in 0..rounds {
        let index = round * world + rank;
        if index >= micro_batches {
            step.idle_round()?;
            continue;
        }
        let rows = inputs.chunks_exact_mut(seq).zip(targets.chunks_exact_mut(seq));
        for (window, (inputs, targets)) in (index * micro_batch..).zip(rows) {
            dataset.validation(window, inputs, targets)?;
        }
        model.evaluate(&mut step, &inputs, &targets)?;
    }
    step.end()?;
    let (loss, tokens) = model.take_loss(engine.stream())?;
    let mut sums = [loss, tokens];
    communicator.all_reduce_scalars(&mut sums, Reduction::Sum)?;
    if sums[1] == 0.0 {
        let reason = "all tokens of the validation samples are masked: give more --validation-samples, or other data";
        return Err(Error::Setting(reason.to_owned()));
    }
    Ok(sums[0] / sums[1])
}
