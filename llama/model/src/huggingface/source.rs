//! The tensors of a folder in Hugging Face's format: where each lies, checked against the model's.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use pillion_kernels::DType;
use safetensors::tensor::Metadata;
use serde::Deserialize;

use super::{CONFIG, Error, INDEX, PIECE, SINGLE, dtype, parse_config};
use crate::config::Config;

/// A model in a folder, whose configuration and headers have been read and agree.
#[derive(Debug)]
pub struct Source {
    folder: PathBuf,
    /// Its shape.
    pub config: Config,
    /// Tensors that it has and the model does not need, because they follow from others.
    pub left_out: Vec<String>,
    tensors: BTreeMap<String, Located>,
    files: Vec<Weights>,
}

/// A file of tensors.
#[derive(Debug)]
struct Weights {
    path: PathBuf,
    file: File,
    /// Where its header ends.
    start: u64,
}

/// Where a tensor lies.
#[derive(Clone, Debug)]
struct Located {
    file: usize,
    /// Bytes from the end of the header.
    offset: u64,
    bytes: u64,
    dtype: DType,
}

/// A header longer than safetensors allows.
const LONGEST_HEADER: u64 = 100_000_000;

impl Source {
    /// Reads the configuration and the headers of a folder, and checks that it has every tensor of
    /// the model, and no other.
    ///
    /// # Errors
    /// [`Error::File`] that names the file, what is wrong with it, and the remedy.
    pub fn open(folder: &Path) -> Result<Source, Error> {
        let path = folder.join(CONFIG);
        let text = fs::read_to_string(&path).map_err(|error| match folder.is_dir() {
            true => {
                Error::file(&path, format!("cannot be read ({error}): give the folder of a model with config.json"))
            }
            false => Error::file(folder, "there is no such folder: give one with config.json and safetensors"),
        })?;
        let config = parse_config(&text).map_err(|reason| Error::file(&path, reason))?;
        let mut source = Source {
            folder: folder.to_owned(),
            config,
            left_out: Vec::new(),
            tensors: BTreeMap::new(),
            files: Vec::new(),
        };
        let tensors = source.config.units().into_iter().flat_map(|unit| unit.tensors);
        let mut shapes: BTreeMap<String, Vec<usize>> = tensors.map(|tensor| (tensor.name, tensor.shape)).collect();
        // A head that is the embedding may be there all the same.
        let head = vec![source.config.vocab_size, source.config.hidden_size];
        let wanted: BTreeSet<String> = shapes.keys().cloned().collect();
        shapes.insert(LM_HEAD.to_owned(), head);
        for name in file_names(folder)? {
            source.add(&folder.join(name), &shapes)?;
        }
        source.check(&wanted)?;
        Ok(source)
    }

    /// Where it is.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Bytes of the model's tensors.
    pub fn bytes(&self) -> u64 {
        self.tensors.values().map(|tensor| tensor.bytes).sum()
    }

    /// The narrowest type that holds every tensor's elements exactly.
    pub fn dtype(&self) -> DType {
        let dtypes: Vec<DType> = self.tensors.values().map(|tensor| tensor.dtype).collect();
        match dtypes.iter().all(|dtype| dtype == &dtypes[0]) {
            true => dtypes[0],
            false => DType::F32,
        }
    }

    /// Of which type a tensor is.
    pub(super) fn dtype_of(&self, name: &str) -> DType {
        self.tensors[name].dtype
    }

    /// Calls `visit` with the bytes of a tensor, in order, in pieces of whole elements.
    pub(super) fn for_each_piece(
        &self,
        name: &str,
        mut visit: impl FnMut(&mut [u8]) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let Located { file, offset, bytes, .. } = self.tensors[name];
        let Weights { path, file, start } = &self.files[file];
        let mut buffer = vec![0; PIECE.min(bytes as usize)];
        let mut done = 0;
        while done < bytes {
            let now = buffer.len().min((bytes - done) as usize);
            let piece = &mut buffer[..now];
            file.read_exact_at(piece, start + offset + done).map_err(|error| Error::unreadable(path, &error))?;
            visit(piece)?;
            done += now as u64;
        }
        Ok(())
    }

    /// Adds the tensors of a file, which must have these shapes.
    fn add(&mut self, path: &Path, shapes: &BTreeMap<String, Vec<usize>>) -> Result<(), Error> {
        let unreadable = |error| Error::unreadable(path, &error);
        let damaged = |what: String| Error::file(path, format!("is damaged: {what}; copy it again"));
        let file = File::open(path).map_err(unreadable)?;
        let len = file.metadata().map_err(unreadable)?.len();
        let mut count = [0; 8];
        if len < 8 {
            return Err(damaged(format!("it has {len} bytes")));
        }
        file.read_exact_at(&mut count, 0).map_err(unreadable)?;
        let count = u64::from_le_bytes(count);
        if count > LONGEST_HEADER || count > len - 8 {
            return Err(damaged("it is no safetensors file, or shorter than its header".to_owned()));
        }
        let mut header = vec![0; count as usize];
        file.read_exact_at(&mut header, 8).map_err(unreadable)?;
        let header: Metadata =
            serde_json::from_slice(&header).map_err(|error| damaged(format!("no safetensors header ({error})")))?;
        let (expected, found) = (header.data_len() as u64, len - 8 - count);
        if expected != found {
            return Err(damaged(format!("{found} bytes follow its header instead of {expected}")));
        }
        for (name, info) in header.tensors() {
            let bytes = (info.data_offsets.1 - info.data_offsets.0) as u64;
            let Some(dtype) = dtype(info.dtype) else {
                let reason = format!(
                    "{name} is of type {:?}, but weights are F32, BF16 or F16: convert the model, or use the one it \
                     was made from",
                    info.dtype
                );
                return Err(Error::file(path, reason));
            };
            if let Some(shape) = shapes.get(&name).filter(|&shape| shape != &info.shape) {
                let reason = format!("{name} has the shape {:?}, but config.json asks for {shape:?}", info.shape);
                return Err(Error::file(path, reason));
            }
            let located = Located { file: self.files.len(), offset: info.data_offsets.0 as u64, bytes, dtype };
            if self.tensors.insert(name.clone(), located).is_some() {
                return Err(Error::file(path, format!("has the tensor {name}, which another file has, too")));
            }
        }
        self.files.push(Weights { path: path.to_owned(), file, start: 8 + count });
        Ok(())
    }

    /// Checks that there are the tensors that are wanted and no others.
    fn check(&mut self, wanted: &BTreeSet<String>) -> Result<(), Error> {
        if let Some(missing) = wanted.iter().find(|name| !self.tensors.contains_key(*name)) {
            let hint = match missing.as_str() {
                LM_HEAD => ": if the embedding is the head's matrix, config.json must say tie_word_embeddings = true",
                _ => ": config.json asks for it",
            };
            return Err(Error::file(&self.folder, format!("has no tensor {missing}{hint}")));
        }
        let others: Vec<String> = self.tensors.keys().filter(|name| !wanted.contains(*name)).cloned().collect();
        for name in others {
            // Older versions of transformers saved the angles, which follow from the configuration.
            if name.ends_with("rotary_emb.inv_freq") {
                self.left_out.push(name.clone());
            } else if name == LM_HEAD {
                self.check_tied()?;
                self.left_out.push(name.clone());
            } else {
                let reason = format!("has the tensor {name}, which a model of this config.json has not");
                return Err(Error::file(&self.folder, reason));
            }
            self.tensors.remove(&name);
        }
        Ok(())
    }

    /// Checks that a head that is said to be the embedding is.
    fn check_tied(&self) -> Result<(), Error> {
        let differs = || {
            let reason = format!("says tie_word_embeddings, but {LM_HEAD} is not the embedding: correct it");
            Error::file(self.folder.join(CONFIG), reason)
        };
        let head = self.tensors[LM_HEAD].clone();
        if head.dtype != self.tensors[EMBEDDING].dtype {
            return Err(differs());
        }
        let Weights { path, file, start } = &self.files[head.file];
        let (mut at, mut other) = (start + head.offset, Vec::new());
        self.for_each_piece(EMBEDDING, |piece| {
            other.resize(piece.len(), 0);
            file.read_exact_at(&mut other, at).map_err(|error| Error::unreadable(path, &error))?;
            at += piece.len() as u64;
            if other == piece { Ok(()) } else { Err(differs()) }
        })
    }
}

const LM_HEAD: &str = "lm_head.weight";
const EMBEDDING: &str = "model.embed_tokens.weight";

/// The names of a folder's files of weights, sorted.
fn file_names(folder: &Path) -> Result<Vec<String>, Error> {
    let index = folder.join(INDEX);
    if index.exists() {
        return names_of_index(&index);
    }
    if folder.join(SINGLE).exists() {
        return Ok(vec![SINGLE.to_owned()]);
    }
    let entries = fs::read_dir(folder).map_err(|error| Error::unreadable(folder, &error))?;
    let is_pickle = |path: &PathBuf| path.extension().is_some_and(|ending| ending == "bin" || ending == "pth");
    let reason = match entries.flatten().map(|entry| entry.path()).find(is_pickle) {
        Some(pickle) => format!(
            "has no {SINGLE}, but {}, which Pillion does not read: load it in transformers, and save it with \
             save_pretrained",
            pickle.file_name().unwrap_or_default().display()
        ),
        None => format!("has neither {SINGLE} nor {INDEX}: give the folder of a model"),
    };
    Err(Error::file(folder, reason))
}

fn names_of_index(path: &Path) -> Result<Vec<String>, Error> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let text = fs::read(path).map_err(|error| Error::unreadable(path, &error))?;
    let index: Index = serde_json::from_slice(&text)
        .map_err(|error| Error::file(path, format!("is no index of safetensors files: {error}")))?;
    let names: BTreeSet<String> = index.weight_map.into_values().collect();
    if let Some(name) = names.iter().find(|name| name.contains('/') || name.as_str() == "..") {
        return Err(Error::file(path, format!("names the file {name:?}, which is not one beside it")));
    }
    Ok(names.into_iter().collect())
}
