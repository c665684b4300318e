//! What goes to stdout and stderr.
//!
//! - A command whose result is what it prints uses [`print_result`] or [`write`]. It fails when stdout
//!   accepts no more bytes, for example on a full disk. A closed pipe (`| head`) is no failure, because
//!   the reader has read what it wanted.
//! - A training run uses [`print`] and [`tell`]. Its results are files, so it goes on, and reports once
//!   on stderr that stdout fails.
//! - A file that a command makes as a whole is written by [`replace_file`].
//! - Text by a model may hold any bytes. [`Escaped`] keeps control characters from a terminal.

use std::fmt::Display;
use std::fs::Permissions;
use std::io::{ErrorKind, IsTerminal, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use pillion_collectives::limits::explain;
use serde::Serialize;

use crate::Error;

/// Prints a line of a command's result on stdout.
///
/// # Errors
/// When stdout accepts no more bytes, unless its reader has closed the pipe.
pub(crate) fn print_result(what: impl Display) -> Result<(), Error> {
    write(&format!("{what}\n")).map(drop)
}

/// Prints text on stdout, at once. Returns whether the reader is still there.
///
/// # Errors
/// As for [`print_result`].
pub(crate) fn write(text: &str) -> Result<bool, Error> {
    match try_write(text) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(Error::Stdout(error)),
    }
}

/// Whether training runs of this process print JSON.
static JSON: AtomicBool = AtomicBool::new(false);

/// Has training runs of this process print an object for each line from now on.
pub(crate) fn print_json() {
    JSON.store(true, Ordering::Relaxed);
}

/// Whether training runs of this process print JSON.
pub(crate) fn is_json() -> bool {
    JSON.load(Ordering::Relaxed)
}

/// Prints something that happens in a training run on stdout: `event` as an object, or the text.
pub(crate) fn tell(event: &impl Serialize, text: impl Display) {
    if is_json() { print_line(serde_json::to_string(event).expect("plain values")) } else { print_line(text) }
}

/// Prints a line of a training run on stdout.
pub(crate) fn print(what: impl Display) {
    if is_json() {
        let text = what.to_string();
        print_line(serde_json::json!({ "event": "message", "text": text.trim() }));
    } else {
        print_line(what);
    }
}

fn print_line(what: impl Display) {
    static LOST: AtomicBool = AtomicBool::new(false);
    if let Err(error) = write(&format!("{what}\n"))
        && !LOST.swap(true, Ordering::Relaxed)
    {
        complain(format_args!("{error}; the run goes on, and lines that stdout does not take are lost"));
    }
}

fn try_write(text: &str) -> std::io::Result<()> {
    let mut stdout = std::io::stdout().lock();
    stdout.write_all(text.as_bytes())?;
    stdout.flush()
}

/// Writes a file that is whole or not there: under another name in its folder first.
///
/// # Errors
/// [`Error::File`] when it cannot be written; what was there before stays.
pub(crate) fn replace_file(path: &Path, text: &[u8]) -> Result<(), Error> {
    let folder = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let write = || {
        // The umask takes from these.
        let permissions = Permissions::from_mode(0o666);
        let mut file = tempfile::Builder::new().prefix(".pillion-").permissions(permissions).tempfile_in(folder)?;
        file.write_all(text)?;
        file.as_file().sync_all()?;
        file.persist(path).map_err(|error| error.error)
    };
    let remedy = "choose another file with --out FILE";
    write().map(drop).map_err(|error| Error::file(path, format!("{}: {remedy}", explain(&error))))
}

/// Prints a line on stderr, in one piece: ranks that fail at the same moment write to the same
/// terminal.
pub(crate) fn complain(what: impl Display) {
    complain_as_it_is(&format!("pillion: {what}\n"));
}

/// Prints text on stderr.
pub(crate) fn complain_as_it_is(text: &str) {
    // A failure to write to stderr has no other place to be reported.
    let _ = std::io::stderr().write_all(text.as_bytes());
}

/// Text that arrives in pieces, such as single bytes, as it may be printed.
///
/// [`Escaped::push`] returns a character once all of its bytes have arrived. Bytes that are not
/// UTF-8 become U+FFFD. For a terminal, control characters are escaped, because a terminal would
/// obey them; line feeds and tabs stay.
pub(crate) struct Escaped {
    terminal: bool,
    /// The beginning of a character.
    pending: Vec<u8>,
}

impl Escaped {
    /// For stdout.
    pub(crate) fn for_stdout() -> Escaped {
        Escaped::new(std::io::stdout().is_terminal())
    }

    fn new(terminal: bool) -> Escaped {
        Escaped { terminal, pending: Vec::new() }
    }

    /// Takes more bytes; returns what can be printed now.
    pub(crate) fn push(&mut self, bytes: &[u8]) -> String {
        self.pending.extend_from_slice(bytes);
        let mut text = String::new();
        loop {
            match std::str::from_utf8(&self.pending) {
                Ok(valid) => {
                    text.push_str(valid);
                    self.pending.clear();
                    break;
                }
                Err(error) => {
                    let (valid, rest) = self.pending.split_at(error.valid_up_to());
                    text.push_str(std::str::from_utf8(valid).expect("valid up to there"));
                    let rest = rest.to_vec();
                    let Some(wrong) = error.error_len() else {
                        self.pending = rest;
                        break;
                    };
                    text.push(char::REPLACEMENT_CHARACTER);
                    self.pending = rest[wrong..].to_vec();
                }
            }
        }
        self.escape(&text)
    }

    /// Returns what stands for the beginning of a character that will not be completed.
    pub(crate) fn finish(self) -> String {
        self.escape(&String::from_utf8_lossy(&self.pending))
    }

    fn escape(&self, text: &str) -> String {
        let mut escaped = String::with_capacity(text.len());
        for character in text.chars() {
            match character {
                '\n' | '\t' => escaped.push(character),
                _ if self.terminal && character.is_control() => escaped.extend(character.escape_default()),
                _ => escaped.push(character),
            }
        }
        escaped
    }
}

/// All of a text by a model, as stdout may have it.
pub(crate) fn escaped(bytes: &[u8]) -> String {
    let mut escaped = Escaped::for_stdout();
    let text = escaped.push(bytes);
    text + &escaped.finish()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn all(terminal: bool, pieces: &[&[u8]]) -> String {
        let mut escaped = Escaped::new(terminal);
        let text: String = pieces.iter().map(|piece| escaped.push(piece)).collect();
        text + &escaped.finish()
    }

    #[test]
    fn a_character_is_given_out_when_its_last_byte_is_there() {
        let mut escaped = Escaped::new(false);
        let given: Vec<String> = "aé€".bytes().map(|byte| escaped.push(&[byte])).collect();
        assert_eq!(given, ["a", "", "é", "", "", "€"]);
        assert_eq!(escaped.finish(), "");
        assert_eq!(all(false, &[b"\xe2\x82"]), "\u{fffd}", "a character that is not completed");
    }

    #[test]
    fn a_terminal_gets_no_control_characters_but_a_pipe_does() {
        let text = "a\tb\n\x1b[2J\r\x07\u{9b}\x7f";
        assert_eq!(all(true, &[text.as_bytes()]), "a\tb\n\\u{1b}[2J\\r\\u{7}\\u{9b}\\u{7f}");
        assert_eq!(all(false, &[text.as_bytes()]), text);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn pieces_give_what_the_whole_gives(bytes in prop::collection::vec(prop_oneof![0u8..128, 0xc0u8..=255, 0x80u8..0xc0], 0..40)) {
            let whole = String::from_utf8_lossy(&bytes).into_owned();
            let singly: Vec<&[u8]> = bytes.chunks(1).collect();
            prop_assert_eq!(all(false, &singly), whole.clone());
            prop_assert_eq!(all(false, &[&bytes]), whole);
            let shown = all(true, &singly);
            prop_assert!(shown.chars().all(|shown| !shown.is_control() || shown == '\n' || shown == '\t'));
        }
    }
}
