//! `pillion config show`: the settings of a run as a commented file.
//!
//! The comments are the help of the flags, and the values are clap's, as text. So a setting is
//! described once, and a new flag is shown without a line here.

use std::any::TypeId;
use std::collections::BTreeMap;
use std::path::PathBuf;

use clap::{Arg, ValueEnum};
use pillion_abs::Rule;
use pillion_runtime::checkpoint::Staging;

use super::ShowArgs;
use crate::settings::TrainArgs;
use crate::settings::file::{excludes, train_command};
use crate::train::check::{self, Checked};
use crate::train::checkpoints::Habits;
use crate::{Error, output};

/// Columns of a comment at most.
const COLUMNS: usize = 100;

/// `pillion config show`. Returns the exit code.
///
/// # Errors
/// When a run would refuse the settings, or stdout takes nothing more.
pub(crate) fn show(args: &ShowArgs) -> Result<i32, Error> {
    let checked = check::check(&args.settings, None)?;
    output::write(&text(args, &checked)).map(|_| 0)
}

/// The settings as a file that --config accepts.
pub(super) fn text(args: &ShowArgs, checked: &Checked) -> String {
    let ranks = if checked.world == 1 { "1 rank".to_owned() } else { format!("{} ranks", checked.world) };
    let mut text = comment(&format!(
        "The settings of `pillion train` on {ranks}, as `pillion train --config FILE` reads them. A line that \
         begins with `#` and a key is a setting that is not given, with what the run does without it, or in <> the kind of its value."
    ));
    let (command, derived) = (train_command(), derived(&args.settings, checked));
    for argument in command.get_arguments() {
        let Some(name) = argument.get_long().filter(|name| *name != "config") else { continue };
        let default: Vec<String> =
            argument.get_default_values().iter().map(|text| text.to_string_lossy().into()).collect();
        let default = literal(argument, &default);
        let value = literal(argument, args.values.get(name).map_or(&[], |values| values));
        let other = args.settings.given.iter().find(|other| excludes(&command, name, other));
        let line = match (value, other) {
            (Some(value), Some(other)) if argument.get_action().takes_values() => {
                format!("#{name} = {value} # not with {other}")
            }
            (Some(value), _) => match default {
                Some(default) if default == value => format!("{name} = {value} # default"),
                Some(default) => format!("{name} = {value} # default: {default}"),
                None => format!("{name} = {value}"),
            },
            (None, _) => match derived.get(name) {
                Some(value) => format!("#{name} = {value}"),
                None => format!("#{name} = <{}>", kind(argument)),
            },
        };
        text += &format!("\n{}{line}\n", comment(&description(argument)));
    }
    text
}

/// What the run does without settings that are not given, as values of theirs.
fn derived(settings: &TrainArgs, checked: &Checked) -> BTreeMap<&'static str, String> {
    let mut derived = BTreeMap::new();
    if !settings.auto {
        derived.insert("slots", (settings.policy.prefetch + 1).to_string());
    }
    let Some(recipe) = &checked.recipe else { return derived };
    let habits = Habits::of(settings);
    derived.insert("on-non-finite", name(habits.on_non_finite));
    derived.insert(
        "save-memory",
        match habits.staging() {
            Staging::Copies => text_literal("copies"),
            Staging::Ring { bytes } => bytes.to_string(),
        },
    );
    let controller = &recipe.controller;
    derived.insert("round-to", controller.round_to.to_string());
    derived.insert("batch", controller.base.to_string());
    derived.insert("max-batch", controller.cap.to_string());
    derived.insert("ema", number(controller.ema_decay));
    if settings.controller.measures() {
        derived.insert("patience", controller.patience.to_string());
        derived.insert("growth-limit", number(controller.growth_limit));
        derived.insert("test-interval", controller.interval.to_string());
    }
    match &controller.rule {
        Rule::NormTest { eta, variant } => {
            derived.insert("eta", number(*eta));
            derived.insert("variant", name(*variant));
        }
        Rule::NoiseScale { ratio } => {
            derived.insert("ratio", number(*ratio));
        }
        _ => {}
    }
    derived
}

/// The name of a value in TOML.
fn name(value: impl ValueEnum) -> String {
    text_literal(value.to_possible_value().expect("every value has a name").get_name())
}

/// Text in TOML.
fn text_literal(text: &str) -> String {
    toml::Value::from(text).to_string()
}

/// The help of a setting, with the values that it may have.
fn description(argument: &Arg) -> String {
    let help = argument.get_long_help().or(argument.get_help()).map(ToString::to_string).unwrap_or_default();
    let values = argument.get_possible_values();
    let help = help.trim_end_matches('.');
    if values.is_empty() || !argument.get_action().takes_values() {
        return format!("{help}.");
    }
    let values: Vec<&str> = values.iter().map(|value| value.get_name()).collect();
    format!("{help}. One of: {}.", values.join(", "))
}

/// What kind of value a setting has, as its help says it.
fn kind(argument: &Arg) -> String {
    argument.get_value_names().map_or("VALUE".to_owned(), |names| names.join(" "))
}

/// The value of a setting in TOML; none where it has none.
fn literal(argument: &Arg, values: &[String]) -> Option<String> {
    let is_list = matches!(argument.get_action(), clap::ArgAction::Append);
    match values {
        [] if argument.get_action().takes_values() => None,
        [] => Some("false".to_owned()),
        [value] if !argument.get_action().takes_values() => Some(value.clone()),
        [value] if !is_list => Some(single(argument, value)),
        values => {
            let values: Vec<String> = values.iter().map(|value| single(argument, value)).collect();
            Some(format!("[{}]", values.join(", ")))
        }
    }
}

/// A value in TOML: a number where the setting is one and the text is as a number is written.
fn single(argument: &Arg, text: &str) -> String {
    let kind = argument.get_value_parser().type_id();
    let is_text = kind == TypeId::of::<String>() || kind == TypeId::of::<PathBuf>();
    match text.parse::<f64>() {
        Ok(value) if value.is_finite() && kind == TypeId::of::<f64>() => number(value),
        _ if !is_text && text.parse::<i64>().is_ok_and(|value| value.to_string() == text) => text.to_owned(),
        _ => text_literal(text),
    }
}

/// A number with the fewest digits that are read as the same.
fn number(value: f64) -> String {
    format!("{value:?}")
}

/// Text as lines of comment.
fn comment(text: &str) -> String {
    let mut lines = String::new();
    let mut line = "#".to_owned();
    for word in text.split_whitespace() {
        if line.chars().count() + 1 + word.chars().count() > COLUMNS {
            lines += &format!("{line}\n");
            line = "#".to_owned();
        }
        line += &format!(" {word}");
    }
    lines + &line + "\n"
}
