//! `pillion tokenize`: documents to a folder of tokens.

use std::io::IsTerminal;
use std::time::Instant;

use indicatif::{ProgressBar, ProgressStyle};
use pillion_data::{Append, Index, Outcome, Settings, Split, Watched, tokenize_folder};

use crate::Error;
use crate::settings::TokenizeArgs;
use crate::train::grouped;

/// Tokenizes, and prints what was made.
///
/// # Errors
/// When a setting cannot be, something cannot be read or written, or stdout takes nothing more.
pub(crate) fn tokenize(settings: &TokenizeArgs) -> Result<i32, Error> {
    let bar = Bar::new();
    let began = Instant::now();
    let outcome = tokenize_folder(&given(settings), &mut |watched| {
        bar.show(watched);
        true
    });
    bar.0.finish_and_clear();
    let Outcome { index, was_complete, went_on, skipped, bad, .. } = match outcome {
        Err(pillion_data::Error::Setting(problem)) => return Err(Error::Setting(problem)),
        outcome => outcome?,
    };
    for problem in &bad {
        crate::complain(problem);
    }
    let more = index.origin.bad.saturating_sub(bad.len() as u64);
    if more > 0 && !was_complete {
        crate::complain(format_args!("and {more} more that could not be read"));
    }
    let state = match (was_complete, went_on) {
        (true, _) => " was complete already",
        (false, true) => ", begun earlier, is complete",
        (false, false) => " is complete",
    };
    crate::print_result(format_args!("{}{state}", settings.out.display()))?;
    crate::print_result(lines(&index))?;
    if skipped != Default::default() {
        crate::print_result(format_args!("left out of folders: {skipped}"))?;
    }
    if !was_complete {
        crate::print_result(format_args!("{:.1} s", began.elapsed().as_secs_f64()))?;
    }
    Ok(0)
}

fn given(settings: &TokenizeArgs) -> Settings {
    let append = match settings.append.as_str() {
        "eos" => Append::End,
        "none" => Append::Nothing,
        token => Append::Token(token.to_owned()),
    };
    Settings {
        tokenizer: settings.tokenizer.clone(),
        data: settings.data.clone(),
        out: settings.out.clone(),
        field: settings.field.clone(),
        lines: settings.lines,
        validation: settings.validation,
        append,
        shard_tokens: settings.shard_tokens,
        threads: settings.threads.map_or(0, |threads| threads as usize),
        skip_bad: settings.skip_bad,
        restart: settings.restart,
    }
}

/// What an index holds, for the screen.
fn lines(index: &Index) -> String {
    let documents = index.train.documents + index.validation.documents;
    let mut text = String::new();
    for split in [Split::Train, Split::Validation] {
        let shards = index.split(split);
        let masked = match shards.masked {
            0 => String::new(),
            masked => format!(", {} of them left out of the loss", grouped(masked)),
        };
        let share = 100.0 * shards.documents as f64 / documents.max(1) as f64;
        text += &format!(
            "{split}: {} tokens{masked}, in {} documents ({share:.2} %) and {} shards\n",
            grouped(shards.tokens),
            grouped(shards.documents),
            shards.shards.len()
        );
    }
    let origin = index.origin;
    let tokens = index.train.tokens + index.validation.tokens;
    text += &format!(
        "from {} bytes of text ({:.2} a token) in {} files; {} empty and {} bad documents left out",
        grouped(origin.bytes),
        origin.bytes as f64 / tokens.max(1) as f64,
        grouped(origin.files),
        grouped(origin.empty),
        grouped(origin.bad)
    );
    text
}

/// A line on the terminal, if stderr is one.
struct Bar(ProgressBar);

impl Bar {
    fn new() -> Bar {
        let bar = if std::io::stderr().is_terminal() { ProgressBar::new(0) } else { ProgressBar::hidden() };
        let template = "{bytes} of {total_bytes} {wide_bar} {binary_bytes_per_sec}, {eta} left, {msg}";
        bar.set_style(ProgressStyle::with_template(template).expect("a valid template"));
        Bar(bar)
    }

    fn show(&self, Watched { bytes, total, documents, tokens, .. }: Watched) {
        self.0.set_length(total);
        self.0.set_position(bytes);
        self.0.set_message(format!("{} documents, {} tokens", grouped(documents), grouped(tokens)));
    }
}
