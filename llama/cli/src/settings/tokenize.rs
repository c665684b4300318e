//! Settings of `tokenize`.

use std::path::PathBuf;

use clap::Args;

/// Settings of `tokenize`.
#[derive(Clone, Debug, Args)]
pub struct TokenizeArgs {
    /// Documents: text (a document a file), JSON lines (.jsonl, .ndjson, .json) and parquet files, and
    /// folders of them. Text and JSON lines may be compressed (.gz, .zst).
    #[arg(value_name = "DATA", required = true)]
    pub data: Vec<PathBuf>,
    /// tokenizer.json of a model on Hugging Face, or the folder that has it.
    #[arg(long, value_name = "FILE")]
    pub tokenizer: PathBuf,
    /// Folder for the tokens. If an earlier call was interrupted, the same command goes on there.
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Field of JSON objects, or column of parquet files, with the text. Without it: `messages` of a
    /// chat, else `prompt` and `completion`, else `text`. Only replies and completions are learned.
    #[arg(long, value_name = "NAME")]
    pub field: Option<String>,
    /// Take each line of a text file as a document, not the file.
    #[arg(long)]
    pub lines: bool,
    /// Share of the documents for validation, chosen by the hash of their text: from 0 to below 1.
    #[arg(long, value_name = "SHARE", default_value_t = 0.005)]
    pub validation: f64,
    /// Token after each document: the tokenizer's end of text (eos), none, or any token by its
    /// spelling.
    #[arg(long, value_name = "eos|none|TOKEN", default_value = "eos")]
    pub append: String,
    /// Tokens in a shard at most.
    #[arg(long, value_name = "N", default_value_t = 1 << 27)]
    pub shard_tokens: u64,
    /// Threads that make tokens; one a processor if not given.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=1024))]
    pub threads: Option<u64>,
    /// Leave out documents that cannot be read, and count them.
    #[arg(long)]
    pub skip_bad: bool,
    /// Begin anew, whatever an earlier call has left in the folder.
    #[arg(long)]
    pub restart: bool,
}
