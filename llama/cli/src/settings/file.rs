//! Files of settings: TOML, whose keys are the names of the flags of `pillion train`.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use clap::{ArgAction, CommandFactory};
use toml::de::DeTable;

use super::{Cli, Command, TrainArgs, parse};

/// A file of settings that has been read. What is wrong with it is said in one line, with the name
/// of the file and the number of the line, where that is known.
pub(crate) struct SettingsFile {
    path: PathBuf,
    /// Its settings as flags of `pillion train`.
    pub(crate) flags: Vec<String>,
    /// Its settings that no flag says: switches that are off, and empty lists.
    pub(crate) without_flags: BTreeSet<String>,
    /// The line of each key, counted from 1.
    lines: BTreeMap<String, usize>,
}

/// The settings of a file, but for those that were also `given` on the command line, and those that
/// nobody can give together with them.
///
/// # Errors
/// When the file cannot be read, or its settings alone are refused.
pub(crate) fn read_beside(path: &Path, given: &BTreeSet<String>) -> Result<SettingsFile, String> {
    let mut file = SettingsFile::read(path)?;
    // Alone first, so that what the file gets wrong is said of the file.
    file.settings()?;
    let command = train_command();
    file.flags.retain(|flag| {
        let name = flag.trim_start_matches("--");
        let name = name.split_once('=').map_or(name, |(name, _)| name);
        // Values of a list would add up.
        !given.contains(name) && !given.iter().any(|given| excludes(&command, name, given))
    });
    Ok(file)
}

/// `pillion train`, whose flags are the settings, and --config.
pub(crate) fn train_command() -> clap::Command {
    let mut command = Cli::command().mut_subcommand("train", |train| train.disable_help_flag(true));
    command.build();
    command.find_subcommand("train").expect("a command of the program").clone()
}

/// The settings of `pillion train` with these flags.
///
/// # Errors
/// When clap refuses them.
pub(crate) fn train_settings(flags: &[String]) -> Result<TrainArgs, clap::Error> {
    let arguments = ["pillion", "train"].map(str::to_owned);
    match parse(&[&arguments, flags].concat())?.command {
        Command::Train(settings) => Ok(*settings),
        _ => unreachable!("the command is train"),
    }
}

/// Whether two settings of `command` cannot be given together.
pub(crate) fn excludes(command: &clap::Command, one: &str, other: &str) -> bool {
    let says = |one: &str, other: &str| {
        let argument = command.get_arguments().find(|argument| argument.get_long() == Some(one));
        let excluded = argument.map(|argument| command.get_arg_conflicts_with(argument)).unwrap_or_default();
        excluded.iter().any(|argument| argument.get_long() == Some(other))
    };
    says(one, other) || says(other, one)
}

impl SettingsFile {
    /// Reads a file.
    ///
    /// # Errors
    /// When it cannot be read, is not TOML, or has keys or kinds of values that no setting has.
    pub(crate) fn read(path: &Path) -> Result<SettingsFile, String> {
        let text = std::fs::read_to_string(path);
        let text = text.map_err(|error| format!("{}: {error}: give a file of settings in TOML", path.display()))?;
        SettingsFile::parse(path, &text)
    }

    /// Reads the text of a file that is called `path`.
    ///
    /// # Errors
    /// As for [`SettingsFile::read`].
    pub(crate) fn parse(path: &Path, text: &str) -> Result<SettingsFile, String> {
        let line = |at: usize| text.as_bytes()[..at].iter().filter(|&&byte| byte == b'\n').count() + 1;
        let (flags, without_flags, lines) = (Vec::new(), BTreeSet::new(), BTreeMap::new());
        let mut file = SettingsFile { path: path.to_owned(), flags, without_flags, lines };
        let table = DeTable::parse(text).and_then(|keys| {
            file.lines = keys.get_ref().keys().map(|key| (key.get_ref().to_string(), line(key.span().start))).collect();
            text.parse::<toml::Table>()
        });
        let table = table.map_err(|error| {
            let at = error.span().map(|span| line(span.start));
            file.say(at, &one_line(error.message()))
        })?;
        let command = train_command();
        for (key, value) in table {
            let flags = self::flags(&command, &key, value);
            let flags = flags.map_err(|reason| file.say(file.lines.get(&key).copied(), &reason))?;
            if flags.is_empty() {
                file.without_flags.insert(key);
            }
            file.flags.extend(flags);
        }
        Ok(file)
    }

    /// The settings of a run that has these alone.
    ///
    /// # Errors
    /// When a value is refused, or two settings cannot be given together.
    pub(crate) fn settings(&self) -> Result<TrainArgs, String> {
        train_settings(&self.flags).map_err(|error| self.blame(&reason(&error)))
    }

    /// Says what is wrong with the settings, with the line of the first one that `reason` names.
    pub(crate) fn blame(&self, reason: &str) -> String {
        let is_of_name = |character: char| character.is_ascii_alphanumeric() || character == '-';
        let names = reason.split("--").skip(1).map(|rest| rest.split(|c| !is_of_name(c)).next().unwrap_or_default());
        self.say(names.into_iter().find_map(|name| self.lines.get(name).copied()), reason)
    }

    fn say(&self, line: Option<usize>, reason: &str) -> String {
        let line = line.map_or(String::new(), |line| format!(", line {line}"));
        format!("{}{line}: {reason}", self.path.display())
    }
}

/// A setting as flags.
fn flags(command: &clap::Command, key: &str, value: toml::Value) -> Result<Vec<String>, String> {
    let known = || command.get_arguments().filter(|argument| argument.get_long() != Some("config"));
    let Some(argument) = known().find(|argument| argument.get_long() == Some(key)) else {
        let distance = |known: &&str| strsim::damerau_levenshtein(known, key);
        let nearest = known().filter_map(|argument| argument.get_long()).min_by_key(distance);
        let hint = nearest.map_or(String::new(), |name| format!("; the nearest is `{name}`"));
        return Err(format!("there is no setting `{key}`{hint}"));
    };
    match (argument.get_action().takes_values(), value) {
        (false, toml::Value::Boolean(true)) => Ok(vec![format!("--{key}")]),
        (false, toml::Value::Boolean(false)) => Ok(Vec::new()),
        (false, _) => Err(format!("`{key}` is on or off: write `{key} = true` or `{key} = false`")),
        (true, toml::Value::Array(values)) => {
            if values.len() != 1 && !matches!(argument.get_action(), ArgAction::Append) {
                return Err(format!("`{key}` is a list of {} values: give one", values.len()));
            }
            values.into_iter().map(|value| flag(key, value)).collect()
        }
        (true, value) => Ok(vec![flag(key, value)?]),
    }
}

fn flag(key: &str, value: toml::Value) -> Result<String, String> {
    let value = match value {
        toml::Value::String(text) => text,
        toml::Value::Integer(number) => number.to_string(),
        toml::Value::Float(number) => number.to_string(),
        other => {
            let kind = other.type_str();
            return Err(format!("`{key}` is a {kind}, but settings are strings, numbers, or lists of them"));
        }
    };
    Ok(format!("--{key}={value}"))
}

/// What clap says of wrong flags, in a line, without the usage that it prints as well.
fn reason(error: &clap::Error) -> String {
    let text = error.render().to_string();
    let first = text.split("\n\n").next().unwrap_or_default();
    one_line(first.trim_start_matches("error: "))
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn train(file: &str, flags: &[&str]) -> Result<TrainArgs, String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run.toml");
        std::fs::write(&path, file).unwrap();
        let mut arguments = vec!["pillion".to_owned(), "train".to_owned()];
        arguments.push(format!("--config={}", path.display()));
        arguments.extend(flags.iter().map(|&flag| flag.to_owned()));
        match Cli::from_arguments(&arguments) {
            Ok(Cli { command: Command::Train(train) }) => Ok(*train),
            Ok(_) => unreachable!("the command is train"),
            Err((message, code)) => {
                assert_eq!(code, 2);
                Err(message)
            }
        }
    }

    #[test]
    fn flags_win_over_the_file_and_the_file_over_defaults() {
        let settings = train("lr = 0.5\nmicro-batch = 8\nmodel = \"tiny\"", &["--lr", "0.25"]).unwrap();
        assert_eq!(
            (settings.lr, settings.micro_batch, settings.model.model.name, settings.seq),
            (0.25, 8, "tiny", 128)
        );
    }

    #[test]
    fn a_flag_wins_over_what_it_excludes_in_the_file() {
        let settings = train("auto = true\nseq = 64", &["--slots", "3"]).unwrap();
        assert_eq!((settings.auto, settings.policy.slots, settings.seq), (false, Some(3), 64));
        let settings = train("slots = 3\nprefetch = 2", &["--auto"]).unwrap();
        assert_eq!((settings.auto, settings.policy.slots, settings.policy.prefetch), (true, None, 1));
        assert!(train("auto = true\nslots = 3", &[]).unwrap_err().contains("run.toml"));
        assert!(train("", &["--auto", "--slots", "3"]).is_err());
    }

    #[test]
    fn switches_are_true_or_false() {
        assert!(train("profile = true", &[]).unwrap().profile);
        assert!(!train("profile = false", &[]).unwrap().profile);
        assert!(train("profile = false", &["--profile"]).unwrap().profile);
        // A run that goes on must know that they were given.
        let settings = train("keep-best = false\nvalidation-data = []", &[]).unwrap();
        assert!(["keep-best", "validation-data"].iter().all(|name| settings.given.contains(*name)));
    }

    #[test]
    fn unknown_keys_suggest_the_nearest() {
        let message = train("micro_batch = 8", &[]).unwrap_err();
        assert!(message.contains("no setting `micro_batch`; the nearest is `micro-batch`"), "{message}");
        let message = train("", &["--micro-bach", "8"]).unwrap_err();
        assert!(message.contains("--micro-batch"), "{message}");
    }

    #[test]
    fn what_a_file_gets_wrong_is_said_of_the_file() {
        for (file, part) in [
            ("lr = \"fast\"", "invalid value 'fast' for '--lr"),
            ("model = \"huge\"", "no preset has this name"),
            ("lr = true", "`lr` is a boolean"),
            ("lr = ", "run.toml"),
        ] {
            let message = train(file, &[]).unwrap_err();
            assert!(message.contains(part) && message.contains("run.toml"), "{message}");
        }
    }

    #[test]
    fn each_reason_is_one_line_with_the_line_of_the_setting() {
        for (text, reason) in [
            (
                "seq = 64\n\nmicro_batch = 8",
                "run.toml, line 3: there is no setting `micro_batch`; the nearest is `micro-batch`",
            ),
            ("help = true", "run.toml, line 1: there is no setting `help`; the nearest is `keep`"),
            ("# first\nlr = \"fast\"", "run.toml, line 2: invalid value 'fast' for '--lr <X>': invalid float literal"),
            ("\nlr = {}", "run.toml, line 2: `lr` is a table, but settings are strings, numbers, or lists of them"),
            ("lr = [1, 2]", "run.toml, line 1: `lr` is a list of 2 values: give one"),
            ("lr = []", "run.toml, line 1: `lr` is a list of 0 values: give one"),
            (
                "seq = 8\nprofile = 1",
                "run.toml, line 2: `profile` is on or off: write `profile = true` or `profile = false`",
            ),
            ("seq = 8\nseq = 9", "run.toml, line 2: duplicate key"),
            (
                "auto = true\nseq = 8\nslots = 3",
                "run.toml, line 1: the argument '--auto' cannot be used with '--slots <N>'",
            ),
        ] {
            let read = SettingsFile::parse(Path::new("run.toml"), text).and_then(|file| file.settings().map(drop));
            assert_eq!(read.unwrap_err(), reason, "{text}");
        }
        let file = SettingsFile::parse(Path::new("run.toml"), "seq = 8\nbatch = 7").unwrap();
        assert_eq!(file.blame("--batch 7 is odd"), "run.toml, line 2: --batch 7 is odd");
        assert_eq!(file.blame("no flag is named"), "run.toml: no flag is named");
    }
}
