//! What a checkpoint is: its manifest. The text begins with a checksum of itself, taken with the checksum's digits as
//! zeros, so any byte that changes is noticed.

use std::collections::HashSet;
use std::path::Path;

use pillion_kernels::DType;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use xxhash_rust::xxh3::xxh3_128;

use super::{USE_ANOTHER, shard};
use crate::layout::{MOST, elements};
use crate::{Error, Layout, TensorSpec, UnitSpec};

pub(super) const NAME: &str = "manifest.json";
const FORMAT: &str = "pillion-checkpoint";
const VERSION: u64 = 1;
const ZEROS: &str = "00000000000000000000000000000000";

/// What a checkpoint is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// XXH3-128 of the manifest with these digits as zeros, in hexadecimal. First, so that its digits are the text's
    /// first.
    pub(super) checksum: String,
    pub(super) format: String,
    pub(super) version: u64,
    /// The number in the folder's name.
    pub step: u64,
    /// Updates that the engine had made.
    pub updates: u64,
    /// Number of ranks that saved.
    pub world: usize,
    /// Type of the weights that were computed with: `f32` or `bf16`.
    pub weights: String,
    /// Type of the elements in the files; none for f32.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stored: Option<Stored>,
    /// Largest norm of the gradient.
    pub clip: Option<f64>,
    /// Names of what the optimizer kept for each weight; none in a checkpoint of weights alone.
    /// Checkpoints that do not say are AdamW's.
    #[serde(default = "adamw_states")]
    pub states: Vec<String>,
    /// The model's tensors.
    pub units: Vec<UnitSpec>,
    /// The files, by rank.
    pub files: Vec<FileEntry>,
    /// What the caller added.
    pub extra: Value,
}

/// A type of elements in files, besides f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stored {
    /// bfloat16.
    Bf16,
    /// IEEE binary16.
    F16,
}

pub(super) fn adamw_states() -> Vec<String> {
    crate::ADAMW_STATES.iter().map(|&name| name.to_owned()).collect()
}

/// A file of a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileEntry {
    /// Its name in the folder.
    pub name: String,
    /// Its size.
    pub bytes: u64,
    /// XXH3-128 of its bytes, in hexadecimal.
    pub xxh3: String,
}

impl Manifest {
    /// Completes the fields that say what a manifest is.
    pub(super) fn sealed(mut self) -> Manifest {
        self.format = FORMAT.to_owned();
        self.version = VERSION;
        self.checksum = ZEROS.to_owned();
        self.checksum = hex(xxh3_128(self.text().as_bytes()));
        self
    }

    pub(super) fn text(&self) -> String {
        serde_json::to_string_pretty(self).expect("a manifest has text keys and writes to memory")
    }

    pub(super) fn read(path: &Path) -> Result<Manifest, Error> {
        let text = std::fs::read_to_string(path).map_err(|error| {
            Error::file(path, format!("cannot be read ({error}), so this is no complete checkpoint: use another one"))
        })?;
        Manifest::parse(&text).map_err(|reason| Error::file(path, reason))
    }

    pub(super) fn parse(text: &str) -> Result<Manifest, String> {
        let value: Value = serde_json::from_str(text)
            .map_err(|error| format!("is damaged: it is no JSON ({error}); {USE_ANOTHER}"))?;
        if value["format"] != FORMAT {
            return Err(format!(
                "is no manifest of a Pillion checkpoint: its `format` is not {FORMAT:?}; name another folder"
            ));
        }
        if value["version"] != VERSION {
            let found = &value["version"];
            return Err(format!(
                "has format version {found}, but this program reads version {VERSION}: use the program that saved it"
            ));
        }
        let manifest: Manifest = serde_json::from_value(value)
            .map_err(|error| format!("is damaged: it lacks what a manifest has ({error}); {USE_ANOTHER}"))?;
        if hex(xxh3_128(text.replacen(&manifest.checksum, ZEROS, 1).as_bytes())) != manifest.checksum {
            return Err(format!("is damaged, or was edited: its checksum is not what it says; {USE_ANOTHER}"));
        }
        manifest.check().map_err(|what| format!("makes no sense: {what}; {USE_ANOTHER}"))?;
        Ok(manifest)
    }

    /// Whether a [`Layout`] can be made of it, and its files can be its own.
    fn check(&self) -> Result<(), String> {
        if self.stored.is_some() && !self.states.is_empty() {
            return Err("the state of an optimizer in 16 bits".to_owned());
        }
        if self.world == 0 || self.files.len() != self.world {
            return Err(format!("{} files of {} ranks", self.files.len(), self.world));
        }
        for (rank, file) in self.files.iter().enumerate() {
            let expected = shard::name(rank, self.world);
            if file.name != expected {
                return Err(format!("file {rank} is called {:?} instead of {expected:?}", file.name));
            }
        }
        let (mut units, mut names) = (HashSet::new(), HashSet::new());
        let mut total = 0usize;
        for unit in &self.units {
            if !units.insert(&unit.name) {
                return Err(format!("unit {:?} is there twice", unit.name));
            }
            for tensor in &unit.tensors {
                let sum = elements(&tensor.shape).and_then(|elements| total.checked_add(elements));
                match sum.filter(|&sum| sum < MOST) {
                    Some(sum) if names.insert(&tensor.name) => total = sum,
                    _ => {
                        return Err(format!(
                            "tensor {:?} of shape {:?} is impossible after {total} elements, or there twice",
                            tensor.name, tensor.shape
                        ));
                    }
                }
            }
        }
        if self.units.is_empty() { Err("there are no units".to_owned()) } else { Ok(()) }
    }

    /// Type of the elements in the files.
    pub fn stored(&self) -> DType {
        match self.stored {
            None => DType::F32,
            Some(Stored::Bf16) => DType::Bf16,
            Some(Stored::F16) => DType::F16,
        }
    }

    /// Where everything was when it was saved.
    pub(super) fn layout(&self) -> Layout {
        Layout::new(&self.units, self.world)
    }

    /// Whether it is of the model that `layout` is of, in words.
    pub(super) fn check_model(&self, layout: &Layout) -> Result<(), String> {
        let model = specs(layout);
        let (expected, found) = (tensors(&model), tensors(&self.units));
        match (0..expected.len().max(found.len())).find(|&index| expected.get(index) != found.get(index)) {
            None => Ok(()),
            Some(index) => Err(format!(
                "is a checkpoint of another model: of tensors in order, number {} is expected to be {}, but is {}; resume with \
                 the model that was saved, or start in another folder",
                index + 1,
                describe(expected.get(index)),
                describe(found.get(index)),
            )),
        }
    }
}

/// The tensors of a layout, as the model declares them.
pub(super) fn specs(layout: &Layout) -> Vec<UnitSpec> {
    let tensor = |tensor: &crate::Tensor| TensorSpec {
        name: tensor.name.clone(),
        shape: tensor.shape.clone(),
        decay: tensor.decay,
        frozen: false,
    };
    let unit =
        |unit: &crate::Unit| UnitSpec { name: unit.name.clone(), tensors: unit.tensors.iter().map(tensor).collect() };
    layout.units.iter().map(unit).collect()
}

pub(super) fn hex(checksum: u128) -> String {
    format!("{checksum:032x}")
}

/// Each tensor with the name of its unit.
fn tensors(units: &[UnitSpec]) -> Vec<(&str, &TensorSpec)> {
    units.iter().flat_map(|unit| unit.tensors.iter().map(|tensor| (unit.name.as_str(), tensor))).collect()
}

fn describe(tensor: Option<&(&str, &TensorSpec)>) -> String {
    match tensor {
        None => "absent".to_owned(),
        Some((unit, TensorSpec { name, shape, decay, .. })) => {
            let decay = if *decay { "with" } else { "without" };
            format!("{name} {shape:?} of unit {unit} {decay} weight decay")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::fuzzing::example as manifest;

    #[test]
    fn a_manifest_reads_as_it_was_written() {
        assert_eq!(Manifest::parse(&manifest().text()).unwrap(), manifest());
    }

    #[test]
    fn any_byte_that_changes_or_lacks_is_noticed() {
        let text = manifest().text().into_bytes();
        for position in 0..text.len() {
            for bit in 0..8 {
                let mut damaged = text.clone();
                damaged[position] ^= 1 << bit;
                let parsed = String::from_utf8(damaged).ok().and_then(|text| Manifest::parse(&text).ok());
                assert_eq!(parsed, None, "bit {bit} of byte {position}");
            }
            let cut = String::from_utf8_lossy(&text[..position]);
            assert!(Manifest::parse(&cut).is_err(), "the first {position} bytes");
        }
    }

    #[test]
    fn what_no_layout_can_be_made_of_is_refused() {
        type Change = fn(&mut Manifest);
        let changes: [Change; 9] = [
            |manifest| manifest.world = 3,
            |manifest| manifest.files.clear(),
            |manifest| manifest.files[1].name = "../x".to_owned(),
            |manifest| manifest.units.clear(),
            |manifest| manifest.units[1].tensors[0].name = "x".to_owned(),
            |manifest| manifest.units[0].tensors[0].shape = vec![1 << 40, 1 << 40],
            |manifest| manifest.units[0].tensors[0].shape = vec![1 << 63],
            // Each fits, but not all.
            |manifest| {
                manifest.units[0].tensors[0].shape = vec![MOST - 1];
                manifest.units[1].tensors[0].shape = vec![MOST - 1];
            },
            |manifest| manifest.units[1].name = "a".to_owned(),
        ];
        for (index, change) in changes.iter().enumerate() {
            let mut changed = manifest();
            change(&mut changed);
            let error = Manifest::parse(&changed.sealed().text()).unwrap_err();
            assert!(error.contains("makes no sense"), "change {index}: {error}");
        }
    }

    #[test]
    fn a_later_version_is_named() {
        let text = manifest().text().replace("\"version\": 1", "\"version\": 2");
        let error = Manifest::parse(&text).unwrap_err();
        assert!(error.contains("version 2, but this program reads version 1"), "{error}");
    }
}
