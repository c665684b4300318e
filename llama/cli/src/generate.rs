//! `pillion generate`: text by a model that is sharded over the ranks.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use pillion_collectives::{Communicator, Launch};
use pillion_llama::decoder::Decoder;
use pillion_llama::generate::{Sampling, generate};
use pillion_runtime::Engine;
use serde::Serialize;

use crate::evaluating::{self, Passes};
use crate::gpu;
use crate::jobs::{self, Ended};
use crate::models;
use crate::output::{self, Escaped, write};
use crate::settings::{DeviceKind, GenerateArgs};
use crate::text::{Stops, Vocabulary};
use crate::train::stopping;
use crate::{Error, print_result};

/// Far more than anybody reads.
const MOST_TOKENS: usize = 1 << 20;
/// Ranks that nobody else has started.
const DEFAULT_RANKS: usize = 1;

/// What is said of a text with `--json`.
#[derive(Serialize)]
struct Written<'a> {
    prompt: &'a str,
    text: String,
    /// Tokens of the prompt, and those that were written.
    prompt_tokens: usize,
    tokens: usize,
    /// Why it ends: `length`, `end` of the text, `stop` at a word, or `interrupted` by a signal.
    finish: &'static str,
    seconds: f64,
}

/// `pillion generate`; returns the exit code.
///
/// # Errors
/// When settings contradict each other, or the ranks cannot be started.
pub(crate) fn run(settings: &GenerateArgs) -> Result<i32, Error> {
    check(settings)?;
    let prompts = prompts(settings)?;
    if let DeviceKind::Cuda(gpu) = settings.job.device {
        gpu::check(gpu)?;
    }
    jobs::start(&settings.job, DEFAULT_RANKS, |launch, stop| on_rank(settings, &prompts, launch, stop))
}

fn check(settings: &GenerateArgs) -> Result<(), Error> {
    let fail = |message: String| Err(Error::Setting(message));
    let GenerateArgs { temperature, top_p, min_p, repetition_penalty, tokens, context, .. } = *settings;
    if !(temperature >= 0.0 && temperature.is_finite()) {
        return fail(format!("--temperature {temperature} must be a number from 0 up"));
    }
    if !(top_p > 0.0 && top_p <= 1.0) {
        return fail(format!("--top-p {top_p} must be above 0 and at most 1"));
    }
    if !(0.0..=1.0).contains(&min_p) {
        return fail(format!("--min-p {min_p} must be from 0 to 1"));
    }
    if !(repetition_penalty > 0.0 && repetition_penalty.is_finite()) {
        return fail(format!("--repetition-penalty {repetition_penalty} must be above 0"));
    }
    if tokens > MOST_TOKENS {
        return fail(format!("--tokens {tokens} is out of range: at most {MOST_TOKENS}"));
    }
    if context.is_some_and(|context| context == 0 || context > MOST_TOKENS) {
        return fail(format!("--context must be from 1 to {MOST_TOKENS}"));
    }
    if settings.stop.iter().any(String::is_empty) {
        return fail("--stop is empty: give the word at which a text stops".to_owned());
    }
    Ok(())
}

/// The prompts: that of the command line, or the lines of a file.
fn prompts(settings: &GenerateArgs) -> Result<Vec<String>, Error> {
    let Some(path) = &settings.prompts else {
        return match settings.prompt.is_empty() {
            true => Err(Error::Setting("--prompt is empty: give at least one character to go on from".to_owned())),
            false => Ok(vec![settings.prompt.clone()]),
        };
    };
    let text = std::fs::read_to_string(path).map_err(|error| {
        Error::file(path, format!("cannot be read: {error}: give a file with a prompt in each line"))
    })?;
    let prompts: Vec<String> = text.lines().map(str::to_owned).collect();
    if let Some(line) = prompts.iter().position(String::is_empty) {
        return Err(Error::file(path, format!("line {} is empty: give a prompt in each line", line + 1)));
    }
    if prompts.is_empty() {
        return Err(Error::file(path, "is empty: give a prompt in each line"));
    }
    Ok(prompts)
}

fn on_rank(
    settings: &GenerateArgs,
    prompts: &[String],
    launch: &Launch,
    stop: &Arc<AtomicBool>,
) -> Result<Ended, Error> {
    let communicator = jobs::join(&settings.job, launch, stop)?;
    let give_up = |error| jobs::give_up(&communicator, error);
    let mut writer = Writer::new(settings, launch, &communicator).map_err(give_up)?;
    for prompt in prompts {
        match writer.write(prompt, stop).map_err(give_up)? {
            After::GoOn => {}
            After::NobodyReads => break,
            After::Interrupted => return Ok(Ended::Interrupted),
        }
    }
    Ok(Ended::Done)
}

/// What is to be done after a text, on every rank alike.
#[derive(Clone, Copy, PartialEq)]
enum After {
    GoOn,
    NobodyReads,
    /// A signal has asked some rank to end.
    Interrupted,
}

/// A model that writes, on one rank.
struct Writer<'s> {
    settings: &'s GenerateArgs,
    communicator: Arc<Communicator>,
    engine: Engine,
    decoder: Decoder,
    vocabulary: Vocabulary,
}

impl<'s> Writer<'s> {
    fn new(settings: &'s GenerateArgs, launch: &Launch, communicator: &Arc<Communicator>) -> Result<Writer<'s>, Error> {
        let (whole, origin) = models::newest(&settings.checkpoint, communicator)?;
        let vocabulary = Vocabulary::of(&whole.checkpoint().path, &origin)?;
        let model = origin.model();
        let checkpoint = &whole.checkpoint().path;
        let capacity = settings.context.map_or_else(|| models::context(checkpoint, &origin), Ok)?;
        let (precision, passes) = (settings.precision, Passes::Text { capacity });
        let (engine, device) = evaluating::open(&whole, model, precision, passes, &settings.job, launch, communicator)?;
        let decoder = Decoder::new(&*device, model, precision, capacity)?;
        Ok(Writer { settings, communicator: communicator.clone(), engine, decoder, vocabulary })
    }

    /// Writes what follows a prompt.
    fn write(&mut self, prompt: &str, stop: &AtomicBool) -> Result<After, Error> {
        let Writer { settings, communicator, engine, decoder, vocabulary } = self;
        let tokens = vocabulary.encode(prompt)?;
        if let Some(token) = tokens.iter().find(|&&token| token as usize >= decoder.vocab()) {
            let known = decoder.vocab();
            return Err(Error::Setting(format!("the prompt has the token {token}, but the model knows {known}")));
        }
        if tokens.len() > decoder.capacity() {
            let (count, most) = (tokens.len(), decoder.capacity());
            return Err(Error::Setting(format!("the prompt has {count} tokens, but --context is {most}: raise it")));
        }
        let (is_first, start) = (communicator.rank() == 0, Instant::now());
        let streams = is_first && !settings.json;
        let (mut text, mut escaped) = (vocabulary.decoder(&tokens)?, Escaped::for_stdout());
        let mut stops = Stops::new(&settings.stop);
        let (mut all, mut count, mut finish, mut is_read) = (Vec::new(), 0, "length", true);
        let mut after = After::GoOn;
        if streams {
            is_read = write(&escaped.push(prompt.as_bytes()))?;
        }
        let known = vocabulary.len().min(decoder.vocab());
        generate(engine, decoder, known, &tokens, settings.tokens, &sampling(settings), |token| {
            count += 1;
            if vocabulary.is_end(token) && !settings.ignore_end {
                finish = "end";
                return Ok::<_, Error>(ControlFlow::Break(()));
            }
            let (more, stopped) = stops.push(&text.push(token)?);
            if streams {
                is_read = is_read && write(&escaped.push(&more))?;
            }
            all.extend(more);
            if stopped {
                finish = "stop";
            }
            after = agree(communicator, is_read, stop)?;
            if after == After::Interrupted && !stopped {
                finish = "interrupted";
            }
            let ends = stopped || after != After::GoOn;
            Ok(if ends { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
        })?;
        if finish != "stop" {
            let (mut rest, stopped) = stops.push(&text.finish()?);
            if !stopped {
                rest.extend(stops.finish());
            }
            if streams && is_read {
                is_read = write(&escaped.push(&rest))?;
            }
            all.extend(rest);
        }
        let seconds = start.elapsed().as_secs_f64();
        if streams && is_read {
            is_read = write(&format!("{}\n", escaped.finish()))?;
            output::complain_as_it_is(&format!(
                "{count} tokens in {seconds:.1} s: {:.1} a second\n",
                count as f64 / seconds
            ));
        }
        if is_first && settings.json {
            let text = String::from_utf8_lossy(&all).into_owned();
            let written = Written { prompt, text, prompt_tokens: tokens.len(), tokens: count, finish, seconds };
            print_result(serde_json::to_string(&written).expect("plain values"))?;
        }
        if after == After::GoOn { agree(communicator, is_read, stop) } else { Ok(after) }
    }
}

/// What all ranks do next. Only rank 0 knows whether somebody reads. Collective.
fn agree(communicator: &Communicator, is_read: bool, stop: &AtomicBool) -> Result<After, Error> {
    let all = communicator.all_gather_scalars(&[u64::from(is_read), u64::from(stopping(stop))])?;
    Ok(match (all[0][0] == 1, all.iter().any(|rank| rank[1] == 1)) {
        (_, true) => After::Interrupted,
        (false, _) => After::NobodyReads,
        (true, false) => After::GoOn,
    })
}

fn sampling(settings: &GenerateArgs) -> Sampling {
    let &GenerateArgs { temperature, top_k, top_p, min_p, repetition_penalty, seed, .. } = settings;
    Sampling { repetition_penalty, temperature, top_k, top_p, min_p, seed }
}
