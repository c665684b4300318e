//! `pillion generate`.

use std::ops::ControlFlow;
use std::sync::Arc;

use pillion_collectives::{Communicator, Launch, Options};
use pillion_kernels::{Cores, Device};
use pillion_runtime::{Engine, Layout, Policy};

use crate::Error;
use crate::data::tokenizer;
use crate::generate::generate_each;
use crate::model::{Model, Recompute};
use crate::output::{Escaped, write};
use crate::settings::GenerateArgs;
use crate::train::checkpoints;

/// `pillion generate`: prints text, each token as soon as it is chosen.
///
/// # Errors
/// When there is no checkpoint, settings contradict each other, or stdout takes nothing more.
pub(crate) fn generate(settings: &GenerateArgs) -> Result<i32, Error> {
    if !(settings.temperature >= 0.0 && settings.temperature.is_finite()) {
        return Err(Error::Setting(format!("--temperature {} must be a number from 0 up", settings.temperature)));
    }
    if settings.prompt.is_empty() {
        return Err(Error::Setting("--prompt is empty: give at least one character to go on from".to_owned()));
    }
    if settings.tokens > MOST_TOKENS {
        let message = format!("--tokens {} is out of range: at most {MOST_TOKENS}", settings.tokens);
        return Err(Error::Setting(message));
    }
    let communicator = Arc::new(Communicator::connect(&Launch::single(), Options::default())?);
    let (whole, progress) = checkpoints::newest(&settings.checkpoint, &communicator)?;
    let recipe = progress.recipe;
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let device: Arc<dyn Device> = Arc::new(Cores::new(threads).map_err(pillion_runtime::Error::from)?);
    let layout = Layout::new(&recipe.model.units(), 1);
    let mut engine = Engine::for_evaluation(communicator, device.clone(), layout, Policy::default())?;
    whole.load(&mut engine)?;
    let dtype = engine.policy().weights;
    // Without a backward pass nothing is computed again.
    let mut model = Model::new(&*device, &recipe.model, dtype, 1, recipe.seq, Recompute::Block)?;
    // Without the end that follows a document.
    let mut prompt = Vec::new();
    tokenizer::encode(settings.prompt.as_bytes(), &mut prompt);
    prompt.truncate(settings.prompt.len());
    let GenerateArgs { tokens, temperature, seed, .. } = *settings;
    let mut escaped = Escaped::for_stdout();
    if !write(&escaped.push(settings.prompt.as_bytes()))? {
        return Ok(0);
    }
    generate_each(&mut engine, &mut model, recipe.seq, &prompt, tokens, temperature, seed, |token| {
        let there = write(&escaped.push(&tokenizer::decode(&[token])))?;
        Ok::<_, Error>(if there { ControlFlow::Continue(()) } else { ControlFlow::Break(()) })
    })?;
    write(&format!("{}\n", escaped.finish()))?;
    Ok(0)
}

/// More would take days.
const MOST_TOKENS: usize = 1 << 20;
