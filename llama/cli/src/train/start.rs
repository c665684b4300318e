//! Before the first step: what ranks must agree on, and what rank 0 finds out for all.

use std::path::PathBuf;

use pillion_collectives::{Communicator, Launch};
use pillion_data::Dataset;
use pillion_llama::model::Recompute;
use pillion_runtime::Policy;
use pillion_runtime::checkpoint::{self, Whole};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::checkpoints::{self, Candidates, Habits};
use super::parts::{self, Part};
use super::plan_table::bytes;
use super::recipe::{self, Recipe};
use super::{evaluation, resume, source, tokenizers};
use crate::Error;
use crate::controller::by_flag;
use crate::models::{self, Origin};
use crate::plan::{Setup, auto, ring_remedy};
use crate::run_folder::{self, RunFolder};
use crate::settings::TrainArgs;

/// What rank 0 finds out before the start.
#[derive(Serialize, Deserialize)]
pub(super) struct Start {
    /// The run's folder.
    pub(super) out: PathBuf,
    pub(super) recipe: Recipe,
    /// The tokens.
    pub(super) tokens: Vec<Part>,
    /// The same where `--data` named them, and none where they were made of text.
    pub(super) given_tokens: Vec<Part>,
    /// What `--data` said of text, absolute; none for the default text, and for tokens.
    pub(super) text: Option<PathBuf>,
    /// Samples of its data that it is validated on: a multiple of the micro-batch, at most what
    /// there is; 0 where there are none, but other sets.
    pub(super) validation_samples: u64,
    /// What the main validation loss is on, to tell it from other losses.
    pub(super) validated_on: String,
    /// What else it is validated on.
    pub(super) validation_sets: Vec<evaluation::Found>,
    pub(super) habits: Habits,
    /// The checkpoint to go on from, and whether another will do if it is damaged.
    resume: Option<(PathBuf, bool)>,
    /// The checkpoint whose weights it begins with.
    from: Option<PathBuf>,
}

/// How a run begins.
pub(super) struct Beginning {
    pub(super) start: Start,
    /// What it goes on from.
    pub(super) resume: Option<Whole>,
    /// What it begins with.
    pub(super) from: Option<Whole>,
    /// Claimed until it is dropped; on rank 0 alone.
    pub(super) folder: Option<RunFolder>,
}

/// What rank 0 knows while it looks for a way to begin.
struct Search<'s> {
    settings: &'s TrainArgs,
    launch: &'s Launch,
    candidates: Candidates,
    folder: Option<RunFolder>,
    /// What to print before the first step.
    said: Vec<String>,
}

/// Finds out, together with the other ranks, how the run begins. Touches nothing of an earlier run.
/// Collective.
pub(super) fn begin(settings: &TrainArgs, launch: &Launch, communicator: &Communicator) -> Result<Beginning, Error> {
    let mut search = on_rank_zero_alone(communicator, || Search::new(settings, launch))?;
    let alone = |error: Error| if communicator.rank() == 0 { error } else { Error::ByRankZero { code: error.code() } };
    let mut decide = |passed_over: Option<pillion_runtime::Error>| {
        on_rank_zero(communicator, || search.as_mut().expect("on rank 0").decide(passed_over))
    };
    let mut start = decide(None)?;
    let resume = loop {
        let Some((path, is_one_of_many)) = &start.resume else { break None };
        match checkpoint::open(path)?.verify_together(communicator) {
            Ok(whole) => break Some(whole),
            Err(error @ pillion_runtime::Error::File { .. }) if *is_one_of_many => start = decide(Some(error))?,
            Err(error @ pillion_runtime::Error::File { .. }) => return Err(alone(error.into())),
            Err(error) => return Err(error.into()),
        }
    };
    let from = start.from.as_ref().map(|path| match checkpoint::open(path)?.verify_together(communicator) {
        Err(error @ pillion_runtime::Error::File { .. }) => Err(alone(error.into())),
        whole => Ok(whole?),
    });
    let from = from.transpose()?;
    search.iter().for_each(Search::say);
    Ok(Beginning { start, resume, from, folder: search.and_then(|search| search.folder) })
}

impl<'s> Search<'s> {
    fn new(settings: &'s TrainArgs, launch: &'s Launch) -> Result<Search<'s>, Error> {
        let mut search = Search { settings, launch, candidates: Candidates::default(), folder: None, said: Vec::new() };
        let Some(wanted) = &settings.resume else { return Ok(search) };
        if settings.out.exists() {
            // A run that is just ending may save once more.
            search.claim()?;
        }
        search.candidates = match wanted.as_os_str() == "auto" {
            true => Candidates::of_run(&settings.out)?,
            false => Candidates::at(wanted)?,
        };
        Ok(search)
    }

    fn claim(&mut self) -> Result<&RunFolder, Error> {
        if self.folder.is_none() {
            self.folder = Some(RunFolder::claim(&self.settings.out)?);
        }
        Ok(self.folder.as_ref().expect("it has just been claimed"))
    }

    /// Decides everything about the run, with the newest checkpoint that was not passed over.
    /// Changes nothing but the run's token files.
    fn decide(&mut self, passed_over: Option<pillion_runtime::Error>) -> Result<Start, Error> {
        if let Some(why) = passed_over {
            self.candidates.paths.remove(0);
            self.candidates.pass_over(&why);
            if self.candidates.paths.is_empty() {
                return Err(self.candidates.exhausted());
            }
        }
        self.said = self.candidates.passed_over.clone();
        let saved = match self.candidates.paths.first() {
            Some(path) => Some((path.clone(), checkpoints::progress(&checkpoint::open(path)?)?)),
            None => None,
        };
        let mut settings = self.settings.clone();
        if let Some((_, saved)) = &saved {
            resume::adopt(&mut settings, saved);
        }
        let from = match (&saved, &settings.from) {
            (None, Some(path)) => Some(models::first(path)?),
            _ => None,
        };
        if let Some(checkpoint) = &from {
            settings.model.base = Some(Origin::of(checkpoint)?.model().clone());
            self.said.push(format!("beginning with the weights of {}", checkpoint.path.display()));
        }
        if settings.model.base.is_none() && settings.model.vocab_size.is_none() {
            settings.model.vocab_size = parts::vocabulary(&settings.data)?;
        }
        let (world, launch) = (self.launch.world, self.launch);
        let recipe = Recipe::new(&settings, world)?;
        let policy = recipe::policy(&settings.policy, settings.clip, world)?;
        let staging = Habits::of(&settings).staging();
        let recompute = settings.policy.recompute;
        let setup = Setup::of(&recipe, policy, recompute, staging, launch, recipe.controller.base)?;
        // Before memory: the checkpoint's model may fit where another does not.
        let changes = match &saved {
            Some((path, saved)) => resume::changes(path, saved, &recipe, &settings)?,
            None => Vec::new(),
        };
        if settings.auto {
            auto::check_memory(&setup)?
        } else {
            check_memory(&setup)?
        };
        if saved.as_ref().is_none_or(|(_, saved)| saved.recipe.controller != recipe.controller) {
            recipe.controller.check_growth().map_err(by_flag)?;
        }
        let folder = self.claim()?;
        folder.check(settings.trace)?;
        let out = folder.path().to_owned();
        if let Some((path, _)) = saved.as_ref().filter(|(path, _)| run_folder::is_of(&out, path)) {
            checkpoints::check_name(path)?;
        }
        let source = match &saved {
            Some((path, saved)) => source::of_resumed(&settings, &recipe, &out, path, saved)?,
            None => source::of_new(&settings.data, &recipe, &out)?,
        };
        let dataset = source::open(&source.parts, &recipe)?;
        if let Some(checkpoint) = &from {
            tokenizers::check_tokenizer(&dataset, &models::companions(&checkpoint.path)?)?;
        }
        tokenizers::one_of(&dataset)?;
        let validation_samples = validation_samples(&settings, &recipe, &dataset)?;
        let (sets, most) = (&settings.validation_data, settings.validation_samples);
        let validation_sets = evaluation::find(sets, most, &recipe, &dataset, &out)?;
        let validated_on = match (validation_samples, validation_sets.first()) {
            (0, Some(set)) => set.identity(),
            (samples, _) => format!("{samples} samples of {}", source::fingerprint(&dataset)?),
        };
        let habits = Habits {
            validation_data: validation_sets.iter().map(evaluation::Found::as_given).collect(),
            ..Habits::of(&settings)
        };
        match (&saved, &settings.resume) {
            (Some((path, saved)), _) => {
                let left_out = match checkpoints::count(&saved.left_out) {
                    0 => String::new(),
                    samples => format!(", {samples} of them left out"),
                };
                let (path, step, samples) = (path.display(), saved.step, saved.samples);
                self.said.push(format!("going on from {path} after step {step}: {samples} samples{left_out}"));
            }
            (None, Some(_)) if !settings.change.is_empty() => {
                let out = settings.out.display();
                return Err(Error::Setting(format!(
                    "--change needs a checkpoint, and there is none in {out}: leave it out"
                )));
            }
            (None, Some(_)) => {
                let out = settings.out.display();
                self.said.push(format!("no checkpoint in {out}: starting from the beginning"));
            }
            (None, None) => {}
        }
        self.said.extend(source.said);
        self.said.extend(changes.iter().cloned());
        Ok(Start {
            out,
            given_tokens: if source.is_given { source.parts.clone() } else { Vec::new() },
            tokens: source.parts,
            text: source.text,
            validation_samples,
            validated_on,
            validation_sets,
            habits,
            resume: saved.map(|(path, _)| (path, !self.candidates.is_named)),
            from: from.map(|checkpoint| checkpoint.path),
            recipe,
        })
    }

    /// Says how the run begins.
    fn say(&self) {
        self.said.iter().for_each(crate::print);
    }
}

/// Whether this host has the memory that its ranks will come to use; found out late, it would be the kernel that ends them.
fn check_memory(setup: &Setup<'_>) -> Result<(), Error> {
    let local = setup.local;
    let needs = setup.needs();
    let (needed, saving) = (setup.host_bytes(&needs), setup.checkpoint_bytes(&needs));
    let (available, limit) = pillion_collectives::available_memory();
    if needed <= available {
        return Ok(());
    }
    let fewer = if setup.recompute == Recompute::Block { "" } else { "--recompute block, or " };
    let ring = ring_remedy(setup.staging);
    let one = Policy { bucket: 0, prefetch: 0, slots: 1, ..setup.policy };
    let moved = needs.memory.total() > Setup { policy: one, ..setup.clone() }.needs().memory.total();
    let slots = if moved { ", or fewer --slots, a lower --prefetch or no --bucket" } else { "" };
    Err(Error::Setting(format!(
        "the {local} ranks of a host need {} of memory, {} of it for checkpoints, but {limit} allows {} more: choose {fewer}a smaller --model, --micro-batch or --seq{ring}{slots}",
        bytes(needed),
        bytes(saving),
        bytes(available)
    )))
}

/// A multiple of the micro-batch, at most what there is.
fn validation_samples(settings: &TrainArgs, recipe: &Recipe, dataset: &Dataset) -> Result<u64, Error> {
    let available = dataset.validation_len();
    let samples = settings.validation_samples.min(available) / recipe.micro_batch * recipe.micro_batch;
    if available == 0 && !settings.validation_data.is_empty() {
        return Ok(0);
    }
    if available == 0 {
        let reason = "the data has no sample to validate on: give a token folder with more --validation, a mixture \
                      with one, or --validation-data; files of other programs have none";
        return Err(Error::Setting(reason.to_owned()));
    }
    if samples == 0 {
        return Err(Error::Setting(format!(
            "validation needs at least one micro-batch of {} samples, but has {} of the {available} there are: use a smaller \
             --micro-batch, more --validation-samples or more text",
            recipe.micro_batch,
            settings.validation_samples.min(available)
        )));
    }
    Ok(samples)
}

/// What rank 0 sends before its exit code where it has failed; no JSON begins with it.
const FAILED: u8 = 0xff;

/// Does something on rank 0 and gives every rank the result; where it fails, every rank fails, and only rank 0 says why.
pub(crate) fn on_rank_zero<T: Serialize + DeserializeOwned>(
    communicator: &Communicator,
    work: impl FnOnce() -> Result<T, Error>,
) -> Result<T, Error> {
    let result = (communicator.rank() == 0).then(work).transpose();
    let bytes = match &result {
        Ok(Some(value)) => serde_json::to_vec(value).expect("plain values"),
        Err(error) => vec![FAILED, error.code() as u8],
        Ok(None) => Vec::new(),
    };
    // Tokenizing text or reading checkpoints may take longer than any operation should.
    communicator.patient_barrier()?;
    let bytes = communicator.broadcast_bytes(0, &bytes)?;
    match result? {
        Some(value) => Ok(value),
        None => match bytes[..] {
            [FAILED, code] => Err(Error::ByRankZero { code: code.into() }),
            _ => Ok(serde_json::from_slice(&bytes).expect("rank 0 runs the same program")),
        },
    }
}

/// Does something on rank 0, whose result the others do not need.
pub(super) fn on_rank_zero_alone<T>(
    communicator: &Communicator,
    work: impl FnOnce() -> Result<T, Error>,
) -> Result<Option<T>, Error> {
    let mut result = None;
    on_rank_zero(communicator, || {
        result = Some(work()?);
        Ok(())
    })?;
    Ok(result)
}
