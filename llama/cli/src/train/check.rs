//! What can be checked of a run's settings without ranks and data.

use pillion_collectives::{Backend, Launch, WireKind};

use super::recipe::Recipe;
use super::{DEFAULT_RANKS, gpu, parts, unread};
use crate::Error;
use crate::controller::by_flag;
use crate::jobs::{self, MOST_RANKS};
use crate::models::{self, Origin};
use crate::settings::TrainArgs;

/// Settings that have been checked.
pub(crate) struct Checked {
    /// Ranks on all hosts.
    pub(crate) world: usize,
    /// What decides the numbers of the run; none where a checkpoint of --resume does.
    pub(crate) recipe: Option<Recipe>,
}

/// Checks settings as a run over `ranks` ranks would; by default over as many as they ask for.
///
/// # Errors
/// Names the flag and the remedy, or the checkpoint of --from that cannot be read.
pub(crate) fn check(settings: &TrainArgs, ranks: Option<u32>) -> Result<Checked, Error> {
    gpu::check_settings(settings)?;
    let world = world(settings, ranks)?;
    // How ranks meet depends on who starts them.
    let options = pillion_collectives::Options {
        backend: Backend::Auto,
        wire: WireKind::Auto,
        ..jobs::options(&settings.job, None)
    };
    options.check(&Launch { world, local_world: world, ..Launch::single() })?;
    if settings.resume.is_some() {
        unread::check(settings, false)?;
        return Ok(Checked { world, recipe: None });
    }
    let mut settings = settings.clone();
    if let Some(path) = &settings.from {
        settings.model.base = Some(Origin::of(&models::first(path)?)?.model().clone());
    }
    if settings.model.base.is_none() && settings.model.vocab_size.is_none() {
        // What is not there yet is found out by the run.
        settings.model.vocab_size = parts::vocabulary(&settings.data).ok().flatten();
    }
    let recipe = Recipe::new(&settings, world)?;
    recipe.controller.check_growth().map_err(by_flag)?;
    Ok(Checked { world, recipe: Some(recipe) })
}

/// Ranks on all hosts.
fn world(settings: &TrainArgs, ranks: Option<u32>) -> Result<usize, Error> {
    let hosts = settings.job.nodes.unwrap_or(1) as usize;
    let world = match (ranks, settings.job.ranks, settings.policy.mesh) {
        (Some(ranks), ..) => ranks as usize,
        (None, Some(ranks), _) => ranks.saturating_mul(hosts),
        (None, None, Some(mesh)) => mesh.world(),
        (None, None, None) => DEFAULT_RANKS * hosts,
    };
    match (1..=MOST_RANKS).contains(&world) {
        true => Ok(world),
        false => Err(Error::Setting(format!("--ranks: {world} ranks in all: at least 1 and at most {MOST_RANKS}"))),
    }
}
