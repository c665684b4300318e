//! The files beside a `tokenizer.json`: which tokens begin and end a text, and the chat template.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::chat::ChatTemplate;
use crate::durable;
use crate::error::{Error, Result};

/// The name of a tokenizer's file.
pub(super) const TOKENIZER: &str = "tokenizer.json";
const CONFIG: &str = "tokenizer_config.json";
const TEMPLATE: &str = "chat_template.jinja";
/// Files with ids, the first of which counts.
const ID_FILES: [&str; 2] = ["generation_config.json", "config.json"];
/// What is copied with a tokenizer.
const COPIED: [&str; 5] = [CONFIG, TEMPLATE, ID_FILES[0], ID_FILES[1], "special_tokens_map.json"];

/// Names of tokens that begin a text, where no file says.
const BEGINS: [&str; 4] = ["<s>", "<|begin_of_text|>", "<bos>", "[BOS]"];
/// Names of tokens that end a text, where no file says.
const ENDS: [&str; 6] = ["</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "[EOS]", "<｜end▁of▁sentence｜>"];

/// What the files say.
pub(super) struct Neighbours {
    folder: PathBuf,
    config: Option<Value>,
    /// With the path, to name it.
    ids: Vec<(PathBuf, Value)>,
}

impl Neighbours {
    pub(super) fn beside(tokenizer: &Path) -> Result<Self> {
        let folder = folder_of(tokenizer);
        let config = object(&folder.join(CONFIG))?;
        let mut ids = Vec::new();
        for path in ID_FILES.map(|name| folder.join(name)) {
            if let Some(value) = object(&path)? {
                ids.push((path, value));
            }
        }
        Ok(Self { folder, config, ids })
    }

    /// By `tokenizer_config.json`, else the lists of ids, else the tokenizer's own template, else a
    /// well-known name.
    pub(super) fn begin(&self, template: Option<u32>, ids: &HashMap<String, u32>) -> Result<Option<u32>> {
        let named = self.named("bos_token", ids)?;
        let listed = self.listed("bos_token_id", ids)?.first().copied();
        Ok(named.or(listed).or(template).or_else(|| known(&BEGINS, ids)))
    }

    /// As [`Self::begin`]; after the first, the other ids that a file lists.
    pub(super) fn ends(&self, template: Option<u32>, ids: &HashMap<String, u32>) -> Result<Vec<u32>> {
        let listed = self.listed("eos_token_id", ids)?;
        let named = self.named("eos_token", ids)?;
        let first = named.or(listed.first().copied()).or(template).or_else(|| known(&ENDS, ids));
        let mut ends: Vec<u32> = first.into_iter().collect();
        for id in listed {
            if !ends.contains(&id) {
                ends.push(id);
            }
        }
        Ok(ends)
    }

    pub(super) fn template(&self) -> Result<Option<ChatTemplate>> {
        let path = self.folder.join(TEMPLATE);
        let token = |role: &str| self.name_of(role).unwrap_or_default();
        let (begin, end) = (token("bos_token"), token("eos_token"));
        if path.exists() {
            let source = fs::read_to_string(&path).map_err(Error::reading(&path))?;
            return ChatTemplate::new(&path, source, begin, end).map(Some);
        }
        let path = self.folder.join(CONFIG);
        let source = match self.config.as_ref().map(|config| &config["chat_template"]) {
            None | Some(Value::Null) => return Ok(None),
            Some(Value::String(source)) => source,
            Some(Value::Array(named)) => {
                let default = named.iter().find(|template| template["name"] == "default");
                let source = default.and_then(|template| template["template"].as_str());
                source.ok_or_else(|| Error::bad(&path, "none of its chat templates has the name default"))?
            }
            Some(_) => return Err(Error::bad(&path, "its chat_template is neither a text nor a list")),
        };
        ChatTemplate::new(&path, source.to_owned(), begin, end).map(Some)
    }

    /// The spelling of a token by its role: a text, or an object with a content.
    fn name_of(&self, role: &str) -> Option<String> {
        let token = &self.config.as_ref()?[role];
        token.as_str().or_else(|| token["content"].as_str()).map(str::to_owned)
    }

    fn named(&self, role: &str, ids: &HashMap<String, u32>) -> Result<Option<u32>> {
        let Some(name) = self.name_of(role) else { return Ok(None) };
        match ids.get(&name) {
            Some(&id) => Ok(Some(id)),
            None => {
                let problem = format!("its {role} {name:?} is not in {TOKENIZER}: take both files of one model");
                Err(Error::bad(self.folder.join(CONFIG), problem))
            }
        }
    }

    fn listed(&self, key: &str, ids: &HashMap<String, u32>) -> Result<Vec<u32>> {
        for (path, value) in &self.ids {
            let values = match &value[key] {
                Value::Null => continue,
                Value::Array(values) => values.clone(),
                one => vec![one.clone()],
            };
            let largest = ids.values().max().copied().unwrap_or(0);
            let id = |value: &Value| {
                let id = value.as_u64().and_then(|id| u32::try_from(id).ok()).filter(|&id| id <= largest);
                let problem = format!("its {key} {value} is no token of {TOKENIZER}: take both files of one model");
                id.ok_or_else(|| Error::bad(path, problem))
            };
            return values.iter().map(id).collect();
        }
        Ok(Vec::new())
    }
}

fn known(names: &[&str], ids: &HashMap<String, u32>) -> Option<u32> {
    names.iter().find_map(|name| ids.get(*name).copied())
}

fn folder_of(file: &Path) -> PathBuf {
    file.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new(".")).to_owned()
}

/// A JSON object, or nothing where there is no file.
fn object(path: &Path) -> Result<Option<Value>> {
    if !path.exists() {
        return Ok(None);
    }
    let text = fs::read_to_string(path).map_err(Error::reading(path))?;
    let value: Value = serde_json::from_str(&text).map_err(|error| Error::bad(path, format!("no JSON: {error}")))?;
    if !value.is_object() {
        return Err(Error::bad(path, "no JSON object"));
    }
    Ok(Some(value))
}

/// Copies a tokenizer, under its usual name, and the files beside it.
pub(super) fn copy(tokenizer: &Path, folder: &Path) -> Result<()> {
    let beside = folder_of(tokenizer);
    let others = COPIED.iter().map(|name| (beside.join(name), folder.join(name)));
    let all = std::iter::once((tokenizer.to_owned(), folder.join(TOKENIZER))).chain(others);
    for (from, to) in all {
        if from.exists() {
            durable::write(&to, &fs::read(&from).map_err(Error::reading(&from))?)?;
        } else if to.exists() {
            // Of another tokenizer.
            fs::remove_file(&to).map_err(Error::writing(&to))?;
        }
    }
    Ok(())
}
