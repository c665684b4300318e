//! The commands besides `train`.

use std::sync::Arc;

use pillion_collectives::{Communicator, Launch, Options};
use pillion_kernels::{Cores, Device};
use pillion_runtime::{Engine, Layout, Outline, Plan, Policy, checkpoint};

use crate::Error;
use crate::data::tokenizer;
use crate::model::Model;
use crate::settings::{GenerateArgs, PlanArgs};
use crate::train::{self, checkpoints, recipe};

/// `pillion generate`: prints text.
///
/// # Errors
/// When there is no checkpoint, or settings contradict each other.
pub(crate) fn generate(settings: &GenerateArgs) -> Result<i32, Error> {
    if !(settings.temperature >= 0.0 && settings.temperature.is_finite()) {
        return Err(Error::Setting(format!("--temperature {} must be a number from 0 up", settings.temperature)));
    }
    if settings.prompt.is_empty() {
        return Err(Error::Setting("--prompt is empty: give at least one character to go on from".to_owned()));
    }
    let (path, progress) = checkpoints::newest(&settings.checkpoint)?;
    let recipe = progress.recipe;
    let communicator = Arc::new(Communicator::connect(&Launch::single(), Options::default())?);
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let device: Arc<dyn Device> = Arc::new(Cores::new(threads).map_err(pillion_runtime::Error::from)?);
    let layout = Layout::new(&recipe.model.units(), 1);
    let mut engine = Engine::new(communicator, device.clone(), layout, Policy::default())?;
    checkpoint::open(&path)?.load(&mut engine)?;
    let dtype = engine.policy().weights;
    let mut model = Model::new(&*device, &recipe.model, dtype, 1, recipe.seq)?;
    // Without the end that follows a document.
    let mut prompt = Vec::new();
    tokenizer::encode(settings.prompt.as_bytes(), &mut prompt);
    prompt.truncate(settings.prompt.len());
    let GenerateArgs { tokens, temperature, seed, .. } = *settings;
    let text = crate::generate::generate(&mut engine, &mut model, recipe.seq, &prompt, tokens, temperature, seed)?;
    crate::print(format_args!("{}{}", settings.prompt, String::from_utf8_lossy(&tokenizer::decode(&text))));
    Ok(0)
}

/// `pillion plan`: prints how a run would be laid out.
///
/// # Errors
/// When settings contradict each other.
pub(crate) fn plan(settings: &PlanArgs) -> Result<i32, Error> {
    let model = settings.model.config().map_err(|error| Error::Setting(error.to_string()))?;
    let PlanArgs { ranks, seq, micro_batch, .. } = *settings;
    let sizes = [("--ranks", ranks as u64), ("--seq", seq as u64), ("--micro-batch", micro_batch)];
    for (flag, value) in sizes.into_iter().chain(settings.batch.map(|batch| ("--batch", batch))) {
        if !(1..=1 << 20).contains(&value) {
            return Err(Error::Setting(format!("{flag} {value} is out of range: at least 1 and at most {}", 1 << 20)));
        }
    }
    let policy = recipe::policy(&settings.policy, 1.0, settings.ranks)?;
    let batch = settings.batch.unwrap_or(ranks as u64 * micro_batch);
    if !batch.is_multiple_of(micro_batch) {
        return Err(Error::Setting(format!("--batch {batch} is not a multiple of --micro-batch {micro_batch}")));
    }
    crate::print(train::plan_table(&model, &policy, ranks, seq, micro_batch, batch, "planned")?);
    if settings.operations {
        let mesh = policy.mesh(ranks)?;
        let layout = Layout::new(&model.units(), mesh.shard);
        let rounds = batch.div_ceil(micro_batch).div_ceil(ranks as u64) as usize;
        let plan = Plan::step(&Outline::new(&layout, &policy, mesh), rounds);
        for (index, operation) in plan.operations.iter().enumerate() {
            crate::print(format_args!("{index:>5}  {:?} after {:?}", operation.action, operation.after));
        }
    }
    Ok(0)
}
