//! A checkpoint of weights alone, written element by element by one process: where a model from
//! elsewhere begins.

use std::path::{Path, PathBuf};

use pillion_kernels::DType;
use serde_json::Value;

use super::manifest::{FileEntry, Manifest, Stored};
use super::save::{Folders, prepare, publish, remove};
use super::shard::{self, NewFile};
use crate::{Error, Layout, UnitSpec};

/// Bytes of zeros that are written at a time.
const PIECE: usize = 1 << 16;

/// A checkpoint of weights alone that is being written, into a folder that gets its name when all
/// is on the disk. Dropping it before leaves nothing behind.
pub struct WeightsWriter {
    folders: Folders,
    units: Vec<UnitSpec>,
    layout: Layout,
    stored: DType,
    files: Vec<NewFile>,
    /// The unit that comes next, and how many of its elements have come.
    unit: usize,
    element: usize,
    is_finished: bool,
}

impl WeightsWriter {
    /// Begins `dir/step-00000000` for a model of these units, in `files` files, which as many ranks
    /// verify at once when they load it. `stored` is the type of the elements.
    ///
    /// # Errors
    /// [`Error::File`] when a file cannot be made.
    ///
    /// # Panics
    /// As for [`Layout::new`]; when `stored` is neither f32 nor bf16 nor f16.
    pub fn create(dir: &Path, units: &[UnitSpec], stored: DType, files: usize) -> Result<WeightsWriter, Error> {
        assert!([DType::F32, DType::Bf16, DType::F16].contains(&stored), "weights in {stored}");
        let layout = Layout::new(units, files);
        shard::check_names(&layout, dir)?;
        let folders = Folders::new(dir, 0);
        prepare(&folders)?;
        let mut writer = WeightsWriter {
            folders,
            units: units.to_vec(),
            layout,
            stored,
            files: Vec::new(),
            unit: 0,
            element: 0,
            is_finished: false,
        };
        for file in 0..files {
            let path = writer.folders.incomplete.join(shard::name(file, files));
            writer.files.push(NewFile::create(&path, &writer.layout, &[], stored)?);
        }
        Ok(writer)
    }

    /// Takes the next elements, little-endian, in the order of units, tensors and indices.
    ///
    /// # Errors
    /// [`Error::File`] when they cannot be written.
    ///
    /// # Panics
    /// When there are more than the units have, or `elements` holds part of one.
    pub fn put(&mut self, mut elements: &[u8]) -> Result<(), Error> {
        let bytes = self.stored.bytes();
        assert!(elements.len().is_multiple_of(bytes), "a part of an element");
        while !elements.is_empty() {
            let unit = &self.layout.units[self.unit];
            let file = self.element / unit.shard;
            let room = ((file + 1) * unit.shard).min(unit.len) - self.element;
            let (now, rest) = elements.split_at(elements.len().min(room * bytes));
            self.files[file].put(now)?;
            self.element += now.len() / bytes;
            elements = rest;
            if self.element == unit.len {
                self.pad()?;
            }
        }
        Ok(())
    }

    /// Ends a unit: zeros follow its elements up to the end of its last shard.
    fn pad(&mut self) -> Result<(), Error> {
        let unit = &self.layout.units[self.unit];
        let bytes = self.stored.bytes();
        let zeros = vec![0; PIECE];
        for (file, new) in self.files.iter_mut().enumerate() {
            let shard = file * unit.shard..(file + 1) * unit.shard;
            let mut missing = shard.end.saturating_sub(shard.start.max(unit.len)) * bytes;
            while missing > 0 {
                let now = missing.min(zeros.len());
                new.put(&zeros[..now])?;
                missing -= now;
            }
        }
        (self.unit, self.element) = (self.unit + 1, 0);
        Ok(())
    }

    /// Brings everything to the disk, and gives the folder its name, which is returned. `extra` is
    /// what the manifest keeps for the caller.
    ///
    /// # Errors
    /// [`Error::File`] when that fails.
    ///
    /// # Panics
    /// When elements are missing.
    pub fn finish(mut self, extra: Value) -> Result<PathBuf, Error> {
        assert_eq!(self.unit, self.layout.units.len(), "elements of {} units", self.layout.units.len());
        let world = self.files.len();
        let entry = |(rank, file): (usize, NewFile)| {
            let digest = file.finish()?;
            Ok(FileEntry { name: shard::name(rank, world), bytes: digest.bytes, xxh3: digest.hex() })
        };
        let files = std::mem::take(&mut self.files).into_iter().enumerate().map(entry).collect::<Result<_, Error>>()?;
        let stored = match self.stored {
            DType::Bf16 => Some(Stored::Bf16),
            DType::F16 => Some(Stored::F16),
            _ => None,
        };
        let manifest = Manifest {
            checksum: String::new(),
            format: String::new(),
            version: 0,
            step: 0,
            updates: 0,
            world,
            weights: DType::F32.name().to_owned(),
            stored,
            clip: None,
            states: Vec::new(),
            units: std::mem::take(&mut self.units),
            files,
            extra,
        };
        publish(&self.folders, &manifest.sealed())?;
        self.is_finished = true;
        Ok(self.folders.complete.clone())
    }
}

impl Drop for WeightsWriter {
    fn drop(&mut self) {
        if !self.is_finished {
            // What cannot be removed now is removed with what other saves have left.
            let _ = remove(&self.folders.incomplete);
        }
    }
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};
    use proptest::prelude::*;

    use super::*;
    use crate::TensorSpec;
    use crate::checkpoint::open;

    fn units(lens: &[Vec<usize>]) -> Vec<UnitSpec> {
        let tensor = |name: String, len: usize| TensorSpec { name, shape: vec![len], decay: false, frozen: false };
        let unit = |(index, lens): (usize, &Vec<usize>)| UnitSpec {
            name: format!("unit {index}"),
            tensors: lens.iter().enumerate().map(|(at, &len)| tensor(format!("{index}.{at}"), len)).collect(),
        };
        lens.iter().enumerate().map(unit).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn what_is_put_is_read_by_name_in_any_number_of_files_and_pieces(
            lens in prop::collection::vec(prop::collection::vec(1usize..300, 1..4), 1..4),
            files in 1usize..6,
            piece in 1usize..200,
            stored in prop::sample::select(vec![DType::F32, DType::Bf16, DType::F16]),
        ) {
            let dir = tempfile::tempdir().unwrap();
            let count: usize = lens.iter().flatten().sum();
            let element = |index: usize| {
                // Every pattern of bits, those of NaN too, comes back.
                let bits = (index as u32).wrapping_mul(2_654_435_761);
                match stored {
                    DType::F32 => bits.to_le_bytes().to_vec(),
                    _ => (bits as u16).to_le_bytes().to_vec(),
                }
            };
            let all: Vec<u8> = (0..count).flat_map(element).collect();
            let mut writer = WeightsWriter::create(dir.path(), &units(&lens), stored, files).unwrap();
            for piece in all.chunks(piece * stored.bytes()) {
                writer.put(piece).unwrap();
            }
            let path = writer.finish(Value::Null).unwrap();
            let checkpoint = open(&path).unwrap();
            checkpoint.verify().unwrap();
            let tensors = checkpoint.tensors().unwrap();
            let mut start = 0;
            for (unit, lens) in lens.iter().enumerate() {
                for (at, &len) in lens.iter().enumerate() {
                    let name = format!("{unit}.{at}");
                    let bytes = &all[start * stored.bytes()..(start + len) * stored.bytes()];
                    let mut read = vec![0; bytes.len()];
                    tensors.stored(&name, 0, &mut read).unwrap();
                    prop_assert_eq!(&read, bytes);
                    let wide = tensors.master(&name).unwrap();
                    for (wide, bytes) in wide.iter().zip(bytes.chunks_exact(stored.bytes())) {
                        let expected = match stored {
                            DType::F32 => f32::from_le_bytes(bytes.try_into().unwrap()),
                            DType::Bf16 => bf16::from_le_bytes(bytes.try_into().unwrap()).to_f32(),
                            _ => f16::from_le_bytes(bytes.try_into().unwrap()).to_f32(),
                        };
                        prop_assert!(wide.to_bits() == expected.to_bits() || wide.is_nan() && expected.is_nan());
                    }
                    start += len;
                }
            }
        }
    }

    #[test]
    fn one_that_is_dropped_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = WeightsWriter::create(dir.path(), &units(&[vec![9]]), DType::Bf16, 2).unwrap();
        writer.put(&[0; 6]).unwrap();
        drop(writer);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
