//! In: the tensors of a folder, as a checkpoint of weights alone.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use pillion_kernels::DType;
use pillion_runtime::checkpoint::{Checkpoint, WeightsWriter};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::{Error, Source};
use crate::config::Config;

/// Bytes of a file of a checkpoint, about: ranks verify the files at once.
const FILE: u64 = 1 << 30;
const MOST_FILES: u64 = 64;

/// What a checkpoint keeps of the model that it was imported as.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Imported {
    /// Its shape.
    pub model: Config,
    /// Types of tensors that had another type than most, where there were several.
    #[serde(default)]
    pub dtypes: BTreeMap<String, String>,
}

impl Imported {
    /// What a checkpoint says of the model that it was imported as; none for one that a run wrote.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn of(checkpoint: &Checkpoint) -> Result<Option<Imported>, Error> {
        let Some(value) = checkpoint.extra().get("imported") else { return Ok(None) };
        let wrong = |what: String| Error::file(&checkpoint.path, format!("its manifest is not ours: {what}"));
        let imported: Imported = serde_json::from_value(value.clone()).map_err(|error| wrong(error.to_string()))?;
        imported.model.validate().map_err(|error| wrong(error.to_string()))?;
        Ok(Some(imported))
    }

    /// The type that a tensor had.
    pub fn dtype(&self, tensor: &str, most: DType) -> DType {
        match self.dtypes.get(tensor).map(String::as_str) {
            Some("bf16") => DType::Bf16,
            Some("f16") => DType::F16,
            Some(_) => DType::F32,
            None => most,
        }
    }
}

/// Writes the model's weights as `checkpoints/step-00000000`, and returns that folder. `progress` is
/// called with numbers of bytes that have been read, which sum to [`Source::bytes`], and stops the
/// work by returning false.
///
/// # Errors
/// [`Error`] when a file cannot be read or written; nothing is left then.
pub fn import(source: &Source, checkpoints: &Path, mut progress: impl FnMut(u64) -> bool) -> Result<PathBuf, Error> {
    let (units, stored) = (source.config.units(), source.dtype());
    let files = source.bytes().div_ceil(FILE).clamp(1, MOST_FILES);
    let mut writer = WeightsWriter::create(checkpoints, &units, stored, files as usize)?;
    let mut imported = Imported { model: source.config.clone(), dtypes: BTreeMap::new() };
    let mut wide = Vec::new();
    for tensor in units.iter().flat_map(|unit| &unit.tensors) {
        let dtype = source.dtype_of(&tensor.name);
        if dtype != stored {
            imported.dtypes.insert(tensor.name.clone(), dtype.name().to_owned());
        }
        source.for_each_piece(&tensor.name, |piece| {
            Error::unless(progress(piece.len() as u64))?;
            if dtype == stored {
                return Ok(writer.put(piece)?);
            }
            widen(piece, dtype, &mut wide);
            Ok(writer.put(&wide)?)
        })?;
    }
    Ok(writer.finish(json!({ "imported": imported }))?)
}

/// Elements of 16 bits as f32, little-endian.
fn widen(piece: &[u8], dtype: DType, wide: &mut Vec<u8>) {
    wide.clear();
    let (elements, _) = piece.as_chunks::<2>();
    for &element in elements {
        let value = match dtype {
            DType::F16 => f16::from_le_bytes(element).to_f32(),
            _ => bf16::from_le_bytes(element).to_f32(),
        };
        wide.extend(value.to_le_bytes());
    }
}
