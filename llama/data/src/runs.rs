//! What runs write, by name: text is looked for in folders that runs may write in too.

use std::ffi::OsStr;
use std::fs::File;
use std::io::Read;
use std::path::Path;

/// Held by the run that writes in a folder; marks the folder as one of runs.
pub const LOCK: &str = ".pillion.lock";
/// One line a step.
pub const METRICS: &str = "metrics.jsonl";
/// Lines of steps that a resume or a rewind undid, and lines of others.
pub const METRICS_ASIDE: &str = "metrics.aside.jsonl";
/// How each line of the metrics begins.
pub const METRICS_BEGIN: &str = r#"{"step":"#;
/// What the run is.
pub const ABOUT: &str = "run.json";
/// How it begins.
pub const ABOUT_BEGIN: &str = r#"{"pillion":"#;
/// The folder of checkpoints.
pub const CHECKPOINTS: &str = "checkpoints";
/// The folder of token files.
pub const TOKENS: &str = "tokens";
/// The folder of event files, which TensorBoard reads.
pub const TENSORBOARD: &str = "tensorboard";
/// The folder of files that go with the model: its tokenizer, and how it generates text.
pub const HUGGINGFACE: &str = "huggingface";
/// The timeline.
pub const TRACE: &str = "trace.json";
/// How the names of folders begin that earlier runs are set aside in; a number follows.
pub const EARLIER: &str = "earlier-";

/// Whether runs write in a folder.
pub fn is_one(folder: &Path) -> bool {
    // Runs of versions that kept the lock elsewhere are known by their metrics.
    folder.join(LOCK).exists() || (folder.join(CHECKPOINTS).is_dir() && has_metrics(folder))
}

/// Whether runs write files or folders of this name.
pub fn is_of_run(name: &OsStr) -> bool {
    let is_earlier = |name: &str| name.strip_prefix(EARLIER).is_some_and(|number| number.parse::<u32>().is_ok());
    name.to_str().is_some_and(|name| {
        [METRICS, METRICS_ASIDE, ABOUT, CHECKPOINTS, TENSORBOARD, TOKENS, HUGGINGFACE, TRACE].contains(&name)
            || is_earlier(name)
    })
}

fn has_metrics(folder: &Path) -> bool {
    let mut found = Vec::new();
    let read =
        File::open(folder.join(METRICS)).and_then(|file| file.take(METRICS_BEGIN.len() as u64).read_to_end(&mut found));
    // The line may have been cut off in the middle.
    read.is_ok() && !found.is_empty() && METRICS_BEGIN.as_bytes().starts_with(&found)
}
