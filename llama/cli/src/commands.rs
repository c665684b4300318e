//! `pillion generate`.

use std::ops::ControlFlow;
use std::sync::Arc;

use pillion_collectives::{Communicator, GpuTransport, Launch, Options};
use pillion_data::tokenizer;
use pillion_kernels::{Cores, LazyCpu};
use pillion_llama::generate::generate_each;
use pillion_llama::model::{Model, Recompute};
use pillion_runtime::{Engine, Gather, Memory, Mesh, Policy};

use crate::Error;
use crate::gpu::{self, Load, Moved};
use crate::models::{self, Origin};
use crate::output::{Escaped, write};
use crate::settings::{DeviceKind, GenerateArgs};

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
    if let DeviceKind::Cuda(gpu) = settings.device {
        gpu::check(gpu)?;
    }
    let communicator = Arc::new(Communicator::connect(&Launch::single(), Options::default())?);
    let (whole, origin) = models::newest(&settings.checkpoint, &communicator)?;
    let Origin::Run(progress) = origin else { return Err(Error::Setting("not yet".to_owned())) };
    let recipe = progress.recipe;
    let layout = recipe.model.layout(1);
    let (mut policy, one) = (Policy::default(), Mesh { replicate: 1, shard: 1 });
    let (device, moves): Moved = match settings.device {
        DeviceKind::Cpu => {
            let threads = std::thread::available_parallelism().map_or(1, usize::from);
            (Arc::new(Cores::new(threads)?), communicator)
        }
        DeviceKind::LazyCpu => (Arc::new(LazyCpu::new(settings.seed)), communicator),
        DeviceKind::Cuda(gpu) => {
            policy.gather = Gather::Copy;
            let activations = Model::activation_bytes(&recipe.model, policy.weights, 1, recipe.seq, Recompute::Block);
            let allocated = Memory::of(&layout, &policy, one).total() + activations;
            let load =
                Load { allocated, model: &recipe.model, batch: 1, seq: recipe.seq, policy, by: GpuTransport::Auto };
            gpu::open(gpu, 0, &load, &communicator)?.0
        }
    };
    let mut engine = Engine::for_evaluation(moves, device.clone(), layout, policy)?;
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
    generate_each(
        &mut engine,
        &mut model,
        recipe.seq,
        tokenizer::VOCAB,
        &prompt,
        tokens,
        temperature,
        seed,
        |token| {
            let there = write(&escaped.push(&tokenizer::decode(&[token])))?;
            Ok::<_, Error>(if there { ControlFlow::Continue(()) } else { ControlFlow::Break(()) })
        },
    )?;
    write(&format!("{}\n", escaped.finish()))?;
    Ok(0)
}

/// More would take days.
const MOST_TOKENS: usize = 1 << 20;
