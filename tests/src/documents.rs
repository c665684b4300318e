//! The documents, and the commands in them: in blocks of shell and in code spans.

use std::fs;
use std::path::{Path, PathBuf};

/// What commands begin with.
const PROGRAMS: [&str; 15] = [
    "pillion",
    "collbench",
    "cargo",
    "mpirun",
    "torchrun",
    "srun",
    "flux",
    "mpiexec",
    "mpirun_rsh",
    "jsrun",
    "target/release/pillion",
    "target/release/collbench",
    "benches/peers/",
    "ci/",
    "./",
];

/// A command as a document has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Documented {
    /// The document, from the root of the repository.
    pub document: PathBuf,
    /// Without a comment that follows it; lines that a backslash joins are one.
    pub command: String,
}

/// The root of the repository.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("this crate lies in the repository").to_owned()
}

/// The Markdown files below a folder, both by their paths from the root of the repository. Sorted.
///
/// # Panics
/// When a folder cannot be read.
pub fn below(folder: &str) -> Vec<PathBuf> {
    let mut documents = Vec::new();
    let mut folders = vec![PathBuf::from(folder)];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(root().join(&folder)).expect("a folder of documents").flatten() {
            let path = folder.join(entry.file_name());
            if entry.path().is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "md") {
                documents.push(path);
            }
        }
    }
    documents.sort();
    documents
}

/// All commands of README.md and of the documents below docs, in order.
///
/// # Panics
/// When a document cannot be read, or a block of shell is not closed.
pub fn commands() -> Vec<Documented> {
    let documents = [PathBuf::from("README.md")].into_iter().chain(below("docs"));
    let of = |document: PathBuf| {
        let text = fs::read_to_string(root().join(&document)).expect("a document");
        let found = commands_in(&text);
        found.into_iter().map(move |command| Documented { document: document.clone(), command })
    };
    documents.flat_map(of).collect()
}

/// The commands in a text. A block that begins with `#!` is a script, whose lines are no commands
/// of their own.
///
/// # Panics
/// When a block is not closed.
pub fn commands_in(text: &str) -> Vec<String> {
    let mut commands = Vec::new();
    let mut prose = String::new();
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        let Some(language) = line.trim_start().strip_prefix("```") else {
            prose.push_str(line);
            prose.push('\n');
            continue;
        };
        // Spans do not go on behind a block.
        commands.extend(in_spans(&std::mem::take(&mut prose)));
        let is_script = lines.clone().next().is_some_and(|first| first.starts_with("#!"));
        let is_shell = matches!(language.trim(), "sh" | "bash" | "shell" | "console") && !is_script;
        let mut joined = String::new();
        loop {
            let line = lines.next().expect("a block is closed");
            if line.trim() == "```" {
                break;
            }
            if let Some(begun) = line.trim_end().strip_suffix('\\') {
                joined.push_str(begun);
                continue;
            }
            joined.push_str(line);
            let command = without_comment(&std::mem::take(&mut joined));
            if is_shell && !command.is_empty() {
                commands.push(command);
            }
        }
    }
    commands.extend(in_spans(&prose));
    commands
}

/// The commands in code spans, which do not go on behind an empty line.
fn in_spans(prose: &str) -> Vec<String> {
    let spans = prose.split("\n\n").flat_map(|paragraph| paragraph.split('`').skip(1).step_by(2));
    let spans = spans.map(|span| span.split_whitespace().collect::<Vec<_>>().join(" "));
    let is_command = |span: &String| {
        // Variables of the environment may come first.
        let mut words = span.split(' ').skip_while(|word| word.contains('=') && !word.starts_with('-'));
        let (Some(program), Some(_)) = (words.next(), words.next()) else { return false };
        PROGRAMS.iter().any(|known| program == *known || (known.ends_with('/') && program.starts_with(known)))
    };
    spans.filter(is_command).collect()
}

/// A line of shell without its comment.
fn without_comment(line: &str) -> String {
    let (mut quote, mut before) = (None, ' ');
    for (index, c) in line.char_indices() {
        match (quote, c) {
            (None, '#') if before.is_whitespace() => return words(&line[..index]),
            (None, '\'' | '"') => quote = Some(c),
            (Some(open), _) if open == c => quote = None,
            _ => {}
        }
        before = c;
    }
    words(line)
}

fn words(line: &str) -> String {
    line.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_found_in_blocks_and_spans() {
        let text = "Run `pillion plan\n--json`, or `plan`, not `pillion`.\n\n```sh\n# Comment:\ncargo run -- a \"# b\"   # c\nmpirun \\\n  -n 2 x\n```\n\
                    ```text\npillion no\n```\n```bash\n#!/bin/sh\npillion no\n```\n| `srun -n 4 x` | `benches/peers/train --quick` |\n";
        let expected = [
            "pillion plan --json",
            "cargo run -- a \"# b\"",
            "mpirun -n 2 x",
            "srun -n 4 x",
            "benches/peers/train --quick",
        ];
        assert_eq!(commands_in(text), expected);
    }
}
