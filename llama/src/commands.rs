//! `pillion generate`.

use std::sync::Arc;

use pillion_collectives::{Communicator, Launch, Options};
use pillion_kernels::{Cores, Device};
use pillion_runtime::{Engine, Layout, Policy};

use crate::Error;
use crate::data::tokenizer;
use crate::model::Model;
use crate::settings::GenerateArgs;
use crate::train::checkpoints;

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
    let communicator = Arc::new(Communicator::connect(&Launch::single(), Options::default())?);
    let (whole, progress) = checkpoints::newest(&settings.checkpoint, &communicator)?;
    let recipe = progress.recipe;
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let device: Arc<dyn Device> = Arc::new(Cores::new(threads).map_err(pillion_runtime::Error::from)?);
    let layout = Layout::new(&recipe.model.units(), 1);
    let mut engine = Engine::new(communicator, device.clone(), layout, Policy::default())?;
    whole.load(&mut engine)?;
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
