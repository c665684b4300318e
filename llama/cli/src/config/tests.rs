//! What `config show` prints is read again as the same settings.

use std::path::Path;

use proptest::prelude::*;

use super::show;
use super::*;
use crate::settings::file::train_command;
use crate::settings::{Cli, Command, ConfigCommand};

/// Values of settings that are neither a number nor one of a few names; several flags where one
/// alone is refused.
const VALUES: [(&str, &[&str]); 24] = [
    ("data", &["--data=text", "--data=2024", "--data=web:0.75 --data=books:0.25", "--data=a\"b\n'c"]),
    ("out", &["--out=1e5", "--out=runs/π \\ #"]),
    ("node-rank", &["--nodes=3 --node-rank=2"]),
    ("nodes", &["--nodes=2 --node-rank=0"]),
    ("address", &["--address=node1:29400"]),
    ("device", &["--device=lazy-cpu", "--device=cuda:1"]),
    ("model", &["--model=tiny", "--model=llama3.1-8b"]),
    ("stages", &["--stages=8:0.5,16:0.5"]),
    ("ramp", &["--ramp=64:0.25"]),
    ("group", &["--group=*norm*:lr=2,decay=0 --group=*:decay=0.5"]),
    ("precision", &["--precision=bf16"]),
    ("reduce-precision", &["--reduce-precision=bf16"]),
    ("mesh", &["--mesh=replicate=2,shard=4"]),
    ("shard", &["--shard=zero-2", "--shard=parameters,optimizer"]),
    ("bucket", &["--bucket=16MiB", "--bucket=1000000"]),
    ("from", &["--from=runs/imported"]),
    ("resume", &["--resume=auto", "--resume=7"]),
    ("change", &["--resume=auto --change=lr,warmup --change=clip"]),
    ("save-memory", &["--save-memory=copies", "--save-memory=65536"]),
    ("keep", &["--keep=3"]),
    ("validation-data", &["--validation-data=books --validation-data=web=held out/web"]),
    ("timeout", &["--timeout=31536000"]),
    ("reduce-groups", &["--reduce-groups=2"]),
    ("seed", &["--seed=18446744073709551615", "--seed=0007"]),
];

/// A flag of each setting, or several that go together.
fn flags() -> Vec<Vec<String>> {
    let mut all = Vec::new();
    for argument in train_command().get_arguments() {
        let name = argument.get_long().expect("every setting has a name");
        let split =
            |flags: &&str| flags.split(" --").map(|flag| format!("--{}", flag.trim_start_matches("--"))).collect();
        let values = VALUES.iter().find(|(known, _)| *known == name).map(|(_, values)| *values);
        let names: Vec<_> = argument.get_possible_values().iter().map(|value| value.get_name().to_owned()).collect();
        if name == "config" {
            continue;
        } else if !argument.get_action().takes_values() {
            all.push(vec![format!("--{name}")]);
        } else if let Some(values) = values {
            all.extend(values.iter().map(split));
        } else if !names.is_empty() {
            all.extend(names.iter().map(|value| vec![format!("--{name}={value}")]));
        } else {
            let kinds = argument.get_value_names().expect("a value has a name");
            assert!(["N", "X"].contains(&kinds[0].as_str()), "give --{name} some values above");
            let is_fraction = argument.get_value_parser().type_id() == std::any::TypeId::of::<f64>();
            let numbers = if is_fraction { ["0", "0.1", "1e-8", "3e20"] } else { ["1", "2", "12", "100000"] };
            all.extend(numbers.iter().map(|number| vec![format!("--{name}={number}")]));
        }
    }
    all
}

fn shown(flags: &[String]) -> Option<ShowArgs> {
    let arguments = [&["pillion", "config", "show"].map(str::to_owned), flags].concat();
    match crate::settings::parse(&arguments).ok()?.command {
        Command::Config(ConfigCommand::Show(show)) => Some(*show),
        _ => unreachable!("the command is config show"),
    }
}

/// All settings as text, but for which of them were given.
fn all(settings: &TrainArgs) -> String {
    format!("{:#?}", TrainArgs { given: Default::default(), config: None, ..settings.clone() })
}

/// A file that shows these settings. Whether a run could have them does not matter.
fn file(show: &ShowArgs) -> (String, SettingsFile) {
    let checked = check::check(&show.settings, None).unwrap_or(Checked { world: 2, recipe: None });
    let text = show::text(show, &checked);
    let file = SettingsFile::parse(Path::new("shown.toml"), &text).unwrap_or_else(|error| panic!("{error}\n{text}"));
    (text, file)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn what_is_shown_is_read_as_the_same(chosen in prop::collection::vec(any::<prop::sample::Index>(), 0..12)) {
        let all_flags = flags();
        let mut given: Vec<String> = Vec::new();
        for index in chosen {
            let more = [&given[..], &index.get(&all_flags)[..]].concat();
            // What cannot be given together is left out.
            if shown(&more).is_some() {
                given = more;
            }
        }
        let show = shown(&given).expect("flags that can be given together");
        let (text, file) = file(&show);
        let read = file.settings().unwrap_or_else(|error| panic!("{given:?}: {error}\n{text}"));
        prop_assert_eq!(all(&read), all(&show.settings), "{:?}\n{}", given, text);
    }
}

#[test]
fn each_setting_alone_is_read_as_the_same() {
    let mut names = std::collections::BTreeSet::new();
    for flags in flags() {
        let show = shown(&flags).unwrap_or_else(|| panic!("{flags:?} is refused"));
        let (text, file) = file(&show);
        let read = file.settings().unwrap_or_else(|error| panic!("{flags:?}: {error}\n{text}"));
        assert_eq!(all(&read), all(&show.settings), "{flags:?}\n{text}");
        names.extend(show.settings.given);
    }
    for argument in train_command().get_arguments().filter(|argument| argument.get_long() != Some("config")) {
        assert!(names.contains(argument.get_long().unwrap()), "{argument:?} has not been tried");
    }
}

#[test]
fn a_shown_file_has_each_setting_once_and_its_run_is_that_without_a_file() {
    let show = shown(&[]).unwrap();
    let (text, file) = file(&show);
    for argument in train_command().get_arguments() {
        let name = argument.get_long().unwrap();
        let is_its = |line: &&str| line.trim_start_matches('#').split_once(" = ").is_some_and(|(key, _)| key == name);
        assert_eq!(text.lines().filter(is_its).count(), usize::from(name != "config"), "{name}");
    }
    assert!(text.lines().all(|line| line.chars().count() <= 100), "{text}");
    let read = file.settings().unwrap();
    assert!(read.given.contains("cooldown"), "a default that is given is no reason to refuse");
    let recipe = |settings: &TrainArgs| check::check(settings, None).unwrap().recipe.unwrap();
    assert_eq!(recipe(&read), recipe(&show.settings));
}

#[test]
fn what_a_run_does_without_a_setting_is_what_it_does_with_it() {
    for flags in [
        "",
        "--batch 16 --round-to 16",
        "--controller noise-scale --prefetch 2",
        "--controller constant --save-every 5",
        "--shard zero-1 --on-non-finite skip",
    ] {
        let flags: Vec<String> = flags.split_whitespace().map(str::to_owned).collect();
        let show = shown(&flags).unwrap();
        let checked = check::check(&show.settings, None).unwrap();
        let text = show::text(&show, &checked);
        let given = |line: &str| match line.strip_prefix('#') {
            Some(line) if !line.starts_with(' ') && !line.contains(" = <") => format!("{line}\n"),
            _ => format!("{line}\n"),
        };
        let text: String = text.lines().map(given).collect();
        let file = SettingsFile::parse(Path::new("given.toml"), &text).unwrap();
        let read = check::check(&file.settings().unwrap(), None).unwrap();
        assert_eq!(read.recipe, checked.recipe, "{text}");
        assert!(text.contains("\nround-to = ") && text.contains("\nsave-memory = "), "{text}");
    }
}

#[test]
fn flags_win_over_the_file_that_is_shown() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("run.toml");
    std::fs::write(&path, "lr = 0.5\nauto = true").unwrap();
    for file in [vec![path.display().to_string()], vec!["--config".to_owned(), path.display().to_string()]] {
        let arguments = ["pillion", "config", "show"].map(str::to_owned);
        let flags = ["--lr", "0.25"].map(str::to_owned);
        let cli = Cli::from_arguments(&[&arguments[..], &file, &flags].concat()).unwrap();
        let Command::Config(ConfigCommand::Show(show)) = cli.command else {
            unreachable!("the command is config show")
        };
        let text = self::file(&show).0;
        for line in ["lr = 0.25 # default: 0.003", "auto = true # default: false", "#prefetch = 1 # not with auto"] {
            assert!(text.lines().any(|found| found == line), "{line}\n{text}");
        }
    }
}
