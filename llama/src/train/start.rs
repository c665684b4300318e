//! Before the first step: what ranks must agree on, and what rank 0 finds out for all.

use std::fs::File;
use std::path::{Path, PathBuf};

use pillion_collectives::{Communicator, Launch};
use pillion_runtime::checkpoint::{self, Saver};
use pillion_runtime::{Layout, Memory, Policy};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::checkpoints;
use super::plan_table::bytes;
use super::recipe::{self, Recipe};
use crate::Error;
use crate::data::{self, Dataset, TokenFile, synthetic, tokenizer};
use crate::model::Model;
use crate::settings::TrainArgs;

/// What rank 0 finds out before the start.
#[derive(Serialize, Deserialize)]
pub(super) struct Start {
    pub(super) resume: Option<PathBuf>,
    pub(super) recipe: Recipe,
    pub(super) tokens: PathBuf,
    pub(super) validation_samples: u64,
}

/// Whether random tokens stand for text.
pub(super) fn is_synthetic(settings: &TrainArgs) -> bool {
    settings.data.as_deref() == Some(Path::new(synthetic::NAME))
}

/// Checks that every rank was given the same settings: a launcher can start each with others.
pub(super) fn same_settings(settings: &TrainArgs, communicator: &Communicator) -> Result<(), Error> {
    let digest = xxhash_rust::xxh3::xxh3_64(format!("{settings:?}").as_bytes());
    let digests = communicator.all_gather_scalars(&[digest])?;
    match digests.iter().position(|other| other != &digests[0]) {
        None => Ok(()),
        Some(rank) => {
            Err(Error::Setting(format!("rank {rank} was given other settings than rank 0: give every rank the same")))
        }
    }
}

/// What rank 0 does first: looks for a checkpoint, checks the settings, claims the folder, prepares the text.
pub(super) fn start(settings: &TrainArgs, launch: &Launch, lock: &mut Option<File>) -> Result<Start, Error> {
    let world = launch.world;
    if settings.resume.is_some() && settings.out.exists() {
        // A run that is just ending may save once more.
        *lock = Some(checkpoints::lock(&settings.out)?);
    }
    let (resume, said) = checkpoints::find(settings)?;
    let saved = match &resume {
        None => None,
        Some(path) => Some(checkpoints::progress(&checkpoint::open(path)?)?),
    };
    let mut settings = settings.clone();
    if let Some(saved) = &saved {
        // Defaults that depend on the world are those of the run's beginning.
        let controller = &saved.recipe.controller;
        settings.round_to.get_or_insert(controller.round_to);
        settings.batch.get_or_insert(controller.base);
        settings.max_batch.get_or_insert(controller.cap);
    }
    let recipe = Recipe::new(&settings, world)?;
    let synthetic = is_synthetic(&settings);
    if synthetic && recipe.model.vocab_size > synthetic::LARGEST_VOCAB {
        let (vocab, most) = (recipe.model.vocab_size, synthetic::LARGEST_VOCAB);
        return Err(Error::Setting(format!(
            "synthetic data has at most {most} different tokens, but the model knows {vocab}: choose another --model"
        )));
    }
    if !synthetic && recipe.model.vocab_size < tokenizer::VOCAB {
        let (vocab, needed) = (recipe.model.vocab_size, tokenizer::VOCAB);
        return Err(Error::Setting(format!(
            "the model knows {vocab} tokens, but the text needs {needed}: choose another --model"
        )));
    }
    check_memory(&recipe, &recipe::policy(&settings.policy, settings.clip, world)?, launch)?;
    if let (Some(path), Some(saved)) = (&resume, &saved) {
        checkpoints::same_recipe(path, saved, &recipe)?;
    }
    let tokens = checkpoints::make_tokens_folder(&settings.out)?;
    if lock.is_none() {
        *lock = Some(checkpoints::lock(&settings.out)?);
    }
    // All that can be wrong is found here, so that it is said once, and before an earlier run is touched.
    let prepared = match synthetic {
        true => data::prepare_synthetic(recipe.model.vocab_size, &tokens)?,
        false => data::prepare(settings.data.as_deref(), &tokens)?,
    };
    let fingerprint = fingerprint(&prepared.tokens);
    let dataset = Dataset::open(prepared.tokens, recipe.seq, recipe.seed)?;
    let validation_samples = validation_samples(&settings, &recipe, &dataset)?;
    if let (Some(path), Some(saved)) = (&resume, &saved) {
        checkpoints::same_data(path, saved, &fingerprint)?;
    }
    said.iter().for_each(crate::print);
    if let Some(aside) = checkpoints::prepare_folder(&settings.out, resume.as_deref())? {
        crate::print(format_args!("the earlier run in {} is now {}", settings.out.display(), aside.display()));
    }
    crate::print(&prepared.summary);
    if let (Some(path), Some(saved)) = (&resume, &saved) {
        crate::print(format_args!("going on from {} after step {}", path.display(), saved.step));
    }
    Ok(Start { resume, recipe, tokens: dataset.tokens().path().to_owned(), validation_samples })
}

/// Whether this host has the memory that its ranks will come to use; found out late, it would be the kernel that ends them.
fn check_memory(recipe: &Recipe, policy: &Policy, launch: &Launch) -> Result<(), Error> {
    let Launch { world, local_world: local, .. } = *launch;
    let mesh = policy.mesh(world)?;
    let layout = Layout::new(&recipe.model.units(), mesh.shard);
    let state = Memory::of(&layout, policy, mesh).on_hosts_of(local, &layout, policy, mesh).total();
    let activations = Model::activation_bytes(&recipe.model, policy.weights, recipe.micro_batch as usize, recipe.seq);
    // The first group saves; on the fullest host all ranks are of that.
    let copies = Saver::bytes(&layout).saturating_mul(local.min(mesh.shard) as u64);
    let needed = (state + activations).saturating_mul(local as u64).saturating_add(copies);
    let (available, limit) = pillion_collectives::available_memory();
    if needed <= available {
        return Ok(());
    }
    Err(Error::Setting(format!(
        "the {local} ranks of a host need {} of memory, {} of it for checkpoints, but {limit} allows {} more: choose a smaller --model, --micro-batch or --seq",
        bytes(needed),
        bytes(copies),
        bytes(available)
    )))
}

/// A multiple of the micro-batch, at most what there is.
fn validation_samples(settings: &TrainArgs, recipe: &Recipe, dataset: &Dataset) -> Result<u64, Error> {
    let available = dataset.validation_len();
    let samples = settings.validation_samples.min(available) / recipe.micro_batch * recipe.micro_batch;
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

pub(super) fn fingerprint(tokens: &TokenFile) -> String {
    format!("{:016x}", tokens.fingerprint())
}

/// What rank 0 sends where a setting is wrong; no JSON begins with it.
const A_SETTING: u8 = 0xff;

/// Does something on rank 0 and gives every rank the result; where it fails, every rank fails, and only rank 0 says why.
pub(super) fn on_rank_zero<T: Serialize + DeserializeOwned>(
    communicator: &Communicator,
    work: impl FnOnce() -> Result<T, Error>,
) -> Result<T, Error> {
    let result = (communicator.rank() == 0).then(work).transpose();
    let bytes = match &result {
        Ok(Some(value)) => serde_json::to_vec(value).expect("plain values"),
        Err(error) if error.code() == 2 => vec![A_SETTING],
        _ => Vec::new(),
    };
    // Tokenizing text or reading checkpoints may take longer than any operation should.
    communicator.patient_barrier()?;
    let bytes = communicator.broadcast_bytes(0, &bytes)?;
    match result? {
        Some(value) => Ok(value),
        None if matches!(bytes[..], [] | [A_SETTING]) => Err(Error::ByRankZero { setting: !bytes.is_empty() }),
        None => Ok(serde_json::from_slice(&bytes).expect("rank 0 runs the same program")),
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
