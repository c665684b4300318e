//! Settings that nothing would read, because of another setting. They are refused: a setting
//! without effect would seem to work.

use clap::ValueEnum;

use super::schedule::Shape;
use crate::Error;
use crate::settings::{COOLDOWN, FINAL_LR, NON_FINITE_LIMIT, OnNonFinite, TrainArgs};

/// Refuses a setting that was given, that has another value than its default, and that nothing
/// would read. A default may be given, because a file of `pillion config show` has all of them; what
/// was not given may be the checkpoint's of a resumed run. Where that checkpoint is not known, as
/// `knows_all` says, settings are compared that were both given.
///
/// # Errors
/// [`Error::Setting`] with both flags and the remedy.
pub(super) fn check(settings: &TrainArgs, knows_all: bool) -> Result<(), Error> {
    let is_given = |flag: &str| settings.given.contains(flag);
    let is_refused = |flag: &str, other: &str| is_given(flag) && (knows_all || is_given(other));
    match unread(settings).into_iter().find(|(flag, other, _)| is_refused(flag, other)) {
        Some((flag, _, reason)) => Err(Error::Setting(format!("--{flag} {reason}"))),
        None => Ok(()),
    }
}

/// Each setting that another one keeps from being read, this other one, and what to say.
fn unread(settings: &TrainArgs) -> Vec<(&'static str, &'static str, String)> {
    let TrainArgs { schedule, cooldown, final_lr, non_finite_limit: limit, .. } = *settings;
    let name = schedule.to_possible_value().expect("every shape has a name");
    let name = name.get_name();
    let stops = settings.on_non_finite.unwrap_or_default() == OnNonFinite::Stop;
    let deviation = settings.init_std.unwrap_or(0.0);
    let refused = [
        (
            "cooldown",
            "schedule",
            cooldown != COOLDOWN && schedule != Shape::Wsd,
            format!("{cooldown} is not read with --schedule {name}: leave it out, or give --schedule wsd"),
        ),
        (
            "final-lr",
            "schedule",
            final_lr != FINAL_LR && schedule == Shape::Constant,
            format!("{final_lr} is not read with --schedule {name}: leave it out, or give another --schedule"),
        ),
        (
            "init-std",
            "from",
            settings.from.is_some(),
            format!("{deviation} is not read with --from, which has the first weights: leave out one of them"),
        ),
        (
            "non-finite-limit",
            "on-non-finite",
            limit != NON_FINITE_LIMIT && stops,
            format!(
                "{limit} is not read with --on-non-finite stop: leave it out, or give --on-non-finite skip or rewind"
            ),
        ),
    ];
    let is_unread = refused.into_iter().filter(|(_, _, is_unread, _)| *is_unread);
    is_unread.map(|(flag, other, _, reason)| (flag, other, reason)).collect()
}
