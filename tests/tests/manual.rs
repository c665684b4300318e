//! Completions of shells, and manual pages.

use std::collections::BTreeSet;
use std::fs;
use std::process::Command;

use pillion_tests::program::Workplace;

const PROGRAM: &str = env!("CARGO_BIN_EXE_pillion-under-test");

/// The words of a command that `help` lists below a heading.
fn below(help: &str, heading: &str) -> Vec<String> {
    let lines = help.lines().skip_while(|line| *line != heading).skip(1);
    let lines = lines.take_while(|line| !line.is_empty() && line.starts_with(' '));
    let is_entry = |line: &&str| line.starts_with("  ") && !line.starts_with("   ");
    lines.filter(is_entry).map(|line| line.split_whitespace().next().unwrap().to_owned()).collect()
}

/// Every command, with its long flags, as `--help` says them.
fn commands(place: &Workplace) -> Vec<(String, BTreeSet<String>)> {
    let mut found = Vec::new();
    let mut left = vec![String::new()];
    while let Some(command) = left.pop() {
        let help = place.run(&format!("{command} --help")).succeeded().stdout;
        let subcommands = below(&help, "Commands:").into_iter().filter(|name| name != "help");
        left.extend(subcommands.map(|name| format!("{command} {name}").trim().to_owned()));
        // Descriptions are indented more.
        let is_flag_line = |line: &&str| line.trim_start().starts_with("-") && !line.starts_with("        ");
        let words = help.lines().filter(is_flag_line).flat_map(str::split_whitespace);
        let flags = words.filter(|word| word.starts_with("--")).map(|word| word.trim_end_matches(',').to_owned());
        found.push((command, flags.collect()));
    }
    assert!(found.len() > 20, "{found:?}");
    found
}

#[test]
fn completions_have_every_command_and_flag() {
    let place = Workplace::new(PROGRAM);
    let commands = commands(&place);
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = place.run(&format!("completions {shell}")).succeeded().stdout;
        for (command, flags) in &commands {
            let name = command.split(' ').next_back().unwrap();
            assert!(script.contains(name), "{shell} does not complete {command}");
            // Fish has flags without their dashes.
            let is_there =
                |flag: &&String| script.contains(flag.as_str()) || script.contains(&format!("-l {}", &flag[2..]));
            let missing: Vec<_> = flags.iter().filter(|flag| !is_there(flag)).collect();
            assert!(missing.is_empty(), "{shell} does not complete {missing:?} of {command}");
        }
    }
    place.run("completions tcsh").refused(2, &["'tcsh'"]);
}

#[test]
fn bash_completes_what_is_typed() {
    let place = Workplace::new(PROGRAM);
    let script = place.run("completions bash").succeeded().stdout;
    fs::write(place.path("pillion.bash"), script).unwrap();
    let bash = |line: &str| {
        let ended = Command::new("bash").args(["--norc", "-c", line]).current_dir(place.path("")).output().unwrap();
        assert!(ended.status.success(), "{line}: {}", String::from_utf8_lossy(&ended.stderr));
        String::from_utf8(ended.stdout).unwrap()
    };
    bash("bash -n pillion.bash");
    let completed = |words: &str, at: usize| {
        let call = format!(
            "source pillion.bash; COMP_WORDS=({words}); COMP_CWORD={at}; \
             _pillion pillion \"${{COMP_WORDS[{at}]}}\" \"${{COMP_WORDS[{at}-1]}}\"; printf '%s\\n' \"${{COMPREPLY[@]}}\""
        );
        bash(&call).lines().map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(completed("pillion config ch", 2), ["check"]);
    assert_eq!(completed("pillion train --final", 2), ["--final-lr"]);
    assert_eq!(completed("pillion train --schedule w", 3), ["wsd"]);
    for (command, flags) in commands(&place) {
        let words = format!("pillion {command} --").replace("  ", " ");
        let found = completed(&words, words.split(' ').count() - 1);
        let missing: Vec<_> = flags.iter().filter(|flag| !found.contains(flag)).collect();
        assert!(missing.is_empty(), "{missing:?} of {command:?} are not among {found:?}");
    }
}

#[test]
fn there_is_a_manual_page_for_every_command() {
    let place = Workplace::new(PROGRAM);
    place.run("man --out share/man/man1").succeeded();
    let commands = commands(&place);
    let pages = fs::read_dir(place.path("share/man/man1")).unwrap().flatten();
    let pages: BTreeSet<String> = pages.map(|page| page.file_name().into_string().unwrap()).collect();
    let page_of = |command: &str| format!("pillion {command}").trim().replace(' ', "-") + ".1";
    assert_eq!(pages, commands.iter().map(|(command, _)| page_of(command)).collect());
    let is_groff_there = Command::new("groff").arg("--version").output().is_ok();
    for (command, flags) in &commands {
        let path = place.path("share/man/man1").join(page_of(command));
        let page = fs::read_to_string(&path).unwrap();
        for section in [".SH NAME", ".SH SYNOPSIS", ".SH DESCRIPTION", ".SH OPTIONS"] {
            assert!(page.lines().any(|line| line == section), "{command} has no {section}");
        }
        let plain = page.replace('\\', "");
        let missing: Vec<_> = flags.iter().filter(|flag| !plain.contains(flag.as_str())).collect();
        assert!(missing.is_empty(), "the page of {command} has no {missing:?}");
        if !is_groff_there {
            eprintln!("SKIPPED: there is no groff on the PATH");
            continue;
        }
        let ended =
            Command::new("groff").args(["-Kutf8", "-man", "-Tutf8", "-P-cbou", "-ww"]).arg(&path).output().unwrap();
        let warnings = String::from_utf8_lossy(&ended.stderr);
        assert!(ended.status.success() && warnings.is_empty(), "{command}: {warnings}");
        assert!(String::from_utf8_lossy(&ended.stdout).contains("SYNOPSIS"), "{command}");
    }
    let main = fs::read_to_string(place.path("share/man/man1/pillion.1")).unwrap();
    assert_eq!(place.run("man").succeeded().stdout, main);
    place.run("man --out text/module_000.rs").refused(1, &["text/module_000.rs", "--out DIR"]);
}
