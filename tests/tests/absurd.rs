//! Gives extreme numbers to every flag that takes a number. The program accepts each, or refuses it
//! and names the flag. It never panics, overflows or runs out of memory.

use std::fs;
use std::process::Command;

use pillion_tests::program::{Ended, TINY, Workplace};

const PROGRAM: &str = env!("CARGO_BIN_EXE_pillion-under-test");

/// Integers: the largest, one that is too much where several factors are, and what is too little.
const INTEGERS: [&str; 4] = ["18446744073709551615", "1048576", "0", "-1"];
/// Numbers that are no integers: the largest, the smallest, and what is no number.
const FRACTIONS: [&str; 4] = ["1e308", "5e-324", "inf", "nan"];

/// Names of values that are numbers, with what follows the number and the unit.
const KINDS: [(&str, &str); 10] = [
    ("N", ""),
    ("X", ""),
    ("S", ""),
    ("SHARE", ""),
    ("TOKENS/S", ""),
    ("LIST", ""),
    ("BATCH:SHARE", ":0.5"),
    ("RATE", "GB/s"),
    ("TIME", "s"),
    ("copies|BYTES", "B"),
];
/// Names of values that are something else.
const OTHERS: [&str; 16] = [
    "[NAME=]PATH",
    "PATH[:SHARE]",
    "PATTERN:lr=X,decay=Y",
    "SHAPE",
    "FORMAT",
    "eos|none|TOKEN",
    "FILE",
    "PATH",
    "DIR",
    "NAME",
    "WHAT",
    "TEXT",
    "PART",
    "auto|PATH",
    "replicate=R,shard=S",
    "HOST:PORT",
];

/// Flags whose refusal goes by another name.
const BY_OTHER_NAMES: [(&str, &str); 11] = [
    ("--vocab-size", "vocab_size"),
    ("--groups", "fewer groups"),
    ("--reduce-groups", "groups of reduction"),
    ("--batch", "of the batch"),
    ("--hidden-size", "hidden_size"),
    ("--intermediate-size", "intermediate_size"),
    ("--layers", "num_hidden_layers"),
    ("--heads", "num_attention_heads"),
    ("--kv-heads", "num_key_value_heads"),
    ("--ranks", "ranks"),
    ("--seq", "a sequence of"),
];

/// The numeric flags of a command, each with what follows its number, as its help tells.
fn numeric_flags(place: &Workplace, command: &str) -> Vec<(String, &'static str)> {
    let help = place.run(&format!("{command} --help")).succeeded().stdout;
    let mut flags = Vec::new();
    for line in help.lines() {
        let mut words = line.split_whitespace().skip_while(|word| !word.starts_with("--"));
        let (Some(flag), Some(value)) = (words.next(), words.next()) else { continue };
        let Some(value) = value.strip_prefix('<').and_then(|value| value.strip_suffix('>')) else { continue };
        if !line.trim_start().starts_with('-') {
            continue;
        }
        if let Some((_, suffix)) = KINDS.iter().find(|(kind, _)| *kind == value) {
            let suffix = if flag == "--flops" { "" } else { suffix };
            flags.push((flag.to_owned(), suffix));
        } else {
            let is_choice = value.chars().all(|c| c.is_ascii_uppercase() || c == '_') && value.len() > 3;
            assert!(OTHERS.contains(&value) || is_choice, "{command}: is {flag} <{value}> a number?");
        }
    }
    flags
}

/// Runs a command with at most 4 GiB of address space where `limited`.
fn run(place: &Workplace, arguments: &str, limited: bool) -> Ended {
    if !limited {
        return place.run(arguments);
    }
    let mut command = Command::new("bash");
    place.prepare(&mut command);
    command.args(["-c", "ulimit -v 4194304; exec \"$@\"", "bash"]).arg(place.program());
    command.args(arguments.split_whitespace());
    place.spawn(command).finish()
}

/// Runs a command once for every value of every numeric flag in its help. Only flags that begin
/// with `only` are tried. The flag replaces its occurrence in `base`.
#[track_caller]
fn every_number(place: &Workplace, command: &str, base: &str, only: &str, limited: bool) {
    run(place, &format!("{command} {base}"), limited).succeeded();
    let mut flags = numeric_flags(place, command);
    flags.retain(|(flag, _)| flag.starts_with(only));
    assert!(flags.len() > 1, "{flags:?}");
    let mut faults = String::new();
    for (flag, suffix) in flags {
        let others: Vec<&str> = base.split(" --").map(|part| part.trim_start_matches("--")).collect();
        let others = others.iter().filter(|part| part.split(' ').next() != Some(flag.trim_start_matches("--")));
        let others: String = others.filter(|part| !part.is_empty()).map(|part| format!(" --{part}")).collect();
        for value in INTEGERS.into_iter().chain(FRACTIONS) {
            if (&*flag, value) == ("--tokens", "1048576") {
                // What it allows takes hours.
                continue;
            }
            let arguments = format!("{command}{others} {flag}={value}{suffix}");
            let ended = run(place, &arguments, limited);
            if value == FRACTIONS[0] && ended.stderr.contains("invalid digit") {
                // The others are no integers either.
                break;
            }
            let other = BY_OTHER_NAMES.iter().find(|(name, _)| *name == flag).map_or(&*flag, |(_, other)| other);
            let is_named = ended.stderr.contains(&flag) || ended.stderr.contains(other);
            let is_fine = match ended.code() {
                Some(0) => true,
                Some(1 | 2) => is_named,
                _ => false,
            };
            if !is_fine || ended.stderr.contains("panicked") {
                faults += &format!("{arguments}: {ended}\n");
            }
        }
    }
    assert!(faults.is_empty(), "neither accepted nor refused by the flag's name:\n{faults}");
}

#[test]
fn numbers_of_plan() {
    let place = Workplace::new(PROGRAM);
    every_number(&place, "plan", "--model tiny --ranks 2 --flops 1T --link 1GB/s", "--", true);
    every_number(
        &place,
        "plan",
        "--model tiny --ranks 2 --ranks-per-host 2 --host-link 1GB/s --flops 1T --timeline step.json",
        "--host",
        true,
    );
    // Each number is within its limit, but not all of them together.
    for (together, parts) in [
        ("--layers 65536 --rounds 1024", ["--rounds", "at most 4 rounds"]),
        ("--layers 8192 --ranks 1 --micro-batch 1 --batch 1048576", ["--batch", "at most 32 rounds"]),
        ("--seq 1048576 --micro-batch 1048576", ["--seq 1048576", "at most 4194304 tokens"]),
        (
            "--flops 1 --link 1B/s --latency 1000s --hidden-size 262144 --intermediate-size 262144",
            ["a step takes", "check --flops"],
        ),
    ] {
        run(&place, &format!("plan {together}"), true).refused(2, &parts);
    }
    let largest = "plan --layers 64 --hidden-size 262144 --heads 2048 --intermediate-size 262144 --seq 1048576 --ranks 1048576 --prefetch 1023";
    run(&place, largest, true).succeeded();
}

#[test]
fn as_many_layers_as_there_may_be_are_planned() {
    let place = Workplace::new(PROGRAM);
    for flags in ["--layers 65536", "--layers 65536 --gather copy --rounds 4", "--layers 8192 --flops 1T --link 1GB/s"]
    {
        place.run(&format!("plan --model tiny --json {flags}")).succeeded();
    }
}

#[test]
fn numbers_of_train() {
    let place = Workplace::new(PROGRAM);
    let base = format!("{} --ranks 1 --steps 1 --out out", TINY.replace("--samples 2000", "--samples 16"));
    every_number(&place, "train", &base, "--", false);
}

#[test]
fn numbers_of_settings_that_are_only_looked_at() {
    let place = Workplace::new(PROGRAM);
    every_number(&place, "config show", "--model tiny --ranks 1 --seq 32 --micro-batch 2 --samples 16", "--", true);
    fs::write(place.path("run.toml"), "").unwrap();
    for value in INTEGERS.into_iter().chain(FRACTIONS) {
        let ended = place.run(&format!("config check run.toml --ranks={value}"));
        assert!(matches!(ended.code(), Some(0 | 2)), "{value}: {ended}");
        ended.has_no_panic();
    }
}

#[test]
fn numbers_of_the_other_commands() {
    let place = Workplace::new(PROGRAM);
    place.train("run", "--ranks 1 --steps 1");
    every_number(&place, "generate", "--checkpoint run --tokens 1", "--", false);
    place.write_tokenizer("tokenizer.json");
    every_number(&place, "tokenize text", "--tokenizer tokenizer.json --out tokens --restart", "--", true);
    every_number(&place, "abs simulate", "--steps 300 --dimensions 4 --groups 2 --ema 0.5", "--", true);
    // Only refusals are of interest; the report needs no run.
    let base = "--report --out none --ranks 2 --samples 64";
    let ended = place.run(&format!("experiment paper {base}"));
    ended.refused(1, &["no run in it is finished"]);
    for (flag, suffix) in numeric_flags(&place, "experiment paper") {
        for value in INTEGERS.into_iter().chain(FRACTIONS) {
            let ended = place.run(&format!("experiment paper --report --out none {flag}={value}{suffix}"));
            ended.has_no_panic();
            assert!(matches!(ended.code(), Some(1 | 2)), "{flag} {value}: {ended}");
        }
    }
}
