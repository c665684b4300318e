//! One rank's file of a checkpoint: safetensors with f32 tensors `<unit>.master` and one for each
//! state of the optimizer (of AdamW `<unit>.m` and `<unit>.v`), each `[shard]`; of weights alone the
//! former, in f32, bf16 or f16. It is written a
//! unit at a time and read by ranges of bytes, so neither needs memory for all of it.

use std::fs::File;
use std::io::{Read, Write};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use pillion_collectives::limits::explain;
use pillion_kernels::DType;
use safetensors::tensor::{Dtype, Metadata, TensorInfo};
use xxhash_rust::xxh3::Xxh3;

use super::USE_ANOTHER;
use super::manifest::hex;
use super::staging::{Outlet, PIECE, Staged};
use crate::{Error, Layout, State};

const _: () =
    assert!(cfg!(target_endian = "little"), "safetensors is little-endian, and elements are written as they are");

/// A unit's tensors, in the order of the file: the master weights, and what the optimizer keeps.
pub(super) fn parts(states: &[impl AsRef<str>]) -> impl Iterator<Item = &str> {
    [MASTER].into_iter().chain(states.iter().map(AsRef::as_ref))
}

pub(super) const MASTER: &str = "master";

/// What a manifest keeps of a file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Digest {
    pub(super) bytes: u64,
    /// XXH3-128.
    pub(super) checksum: u128,
}

impl Digest {
    pub(super) fn hex(&self) -> String {
        hex(self.checksum)
    }
}

pub(super) fn name(rank: usize, world: usize) -> String {
    format!("rank-{rank:05}-of-{world:05}.safetensors")
}

/// Writes a new file, to the disk, of what is staged.
pub(super) fn write(path: &Path, layout: &Layout, names: &[&str], staged: &Staged) -> Result<Digest, Error> {
    let file = NewFile::create(path, layout, names, DType::F32);
    match staged {
        Staged::Copies(units) => {
            let mut file = file?;
            for State { master, states } in units {
                for part in [master].into_iter().chain(states) {
                    part.chunks(PIECE).try_for_each(|piece| file.put(bytemuck::cast_slice(piece)))?;
                }
            }
            file.finish()
        }
        Staged::Ring(outlet) => file_of(file, outlet),
    }
}

/// Writes what comes out of a ring. All of it is taken also where it cannot be written.
fn file_of(mut file: Result<NewFile, Error>, outlet: &Outlet) -> Result<Digest, Error> {
    let sent = outlet.receive(|piece| {
        if let Ok(open) = &mut file
            && let Err(error) = open.put(bytemuck::cast_slice(piece))
        {
            file = Err(error);
        }
    });
    let file = file?;
    sent?;
    file.finish()
}

/// A file that is being written.
pub(super) struct NewFile {
    path: PathBuf,
    file: File,
    hash: Xxh3,
    bytes: u64,
}

impl NewFile {
    pub(super) fn create(path: &Path, layout: &Layout, names: &[&str], stored: DType) -> Result<NewFile, Error> {
        let file = File::create_new(path).map_err(|error| NewFile::failed(path, &error))?;
        let mut new = NewFile { path: path.to_owned(), file, hash: Xxh3::new(), bytes: 0 };
        new.put(&header(layout, names, stored))?;
        Ok(new)
    }

    pub(super) fn put(&mut self, data: &[u8]) -> Result<(), Error> {
        self.hash.update(data);
        self.bytes += data.len() as u64;
        self.file.write_all(data).map_err(|error| NewFile::failed(&self.path, &error))
    }

    pub(super) fn finish(self) -> Result<Digest, Error> {
        self.file.sync_all().map_err(|error| NewFile::failed(&self.path, &error))?;
        Ok(Digest { bytes: self.bytes, checksum: self.hash.digest128() })
    }

    fn failed(path: &Path, error: &std::io::Error) -> Error {
        Error::file(path, format!("cannot be written: {}", explain(error)))
    }
}

/// Size and checksum of the file as it is.
pub(super) fn digest(path: &Path) -> Result<Digest, Error> {
    let failed = |error| unreadable(path, error);
    let mut file = File::open(path).map_err(failed)?;
    let (mut hash, mut bytes) = (Xxh3::new(), 0);
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer).map_err(failed)? {
            0 => return Ok(Digest { bytes, checksum: hash.digest128() }),
            count => {
                hash.update(&buffer[..count]);
                bytes += count as u64;
            }
        }
    }
}

/// A file open for reading, whose tensors are those of a layout.
pub(super) struct ShardFile {
    path: PathBuf,
    file: File,
    header: Metadata,
    /// Where the header ends.
    start: u64,
    /// Type of the elements.
    stored: DType,
}

impl ShardFile {
    pub(super) fn open(
        path: PathBuf,
        bytes: u64,
        layout: &Layout,
        states: &[String],
        stored: DType,
    ) -> Result<ShardFile, Error> {
        let failed = |error| unreadable(&path, error);
        let file = File::open(&path).map_err(failed)?;
        check_size(&path, file.metadata().map_err(failed)?.len(), bytes)?;
        let mut len = [0; 8];
        file.read_exact_at(&mut len, 0).map_err(failed)?;
        let len = u64::from_le_bytes(len);
        if len > bytes - 8 {
            return Err(Error::file(path, format!("is damaged: it is shorter than its header; {USE_ANOTHER}")));
        }
        let mut header = vec![0; len as usize];
        file.read_exact_at(&mut header, 8).map_err(failed)?;
        let header: Metadata = serde_json::from_slice(&header).map_err(|error| {
            Error::file(&path, format!("is damaged: no safetensors header ({error}); {USE_ANOTHER}"))
        })?;
        let tensors = bytes - 8 - len;
        if header.data_len() as u64 != tensors {
            let expected = header.data_len();
            let reason = format!("is damaged: {tensors} bytes follow its header instead of {expected}; {USE_ANOTHER}");
            return Err(Error::file(path, reason));
        }
        for unit in &layout.units {
            for part in parts(states) {
                let tensor = format!("{}.{part}", unit.name);
                let expected = (in_file(stored), vec![unit.shard]);
                let found = header.info(&tensor).map(|info| (info.dtype, info.shape.clone()));
                if found.as_ref() != Some(&expected) {
                    let reason = format!("{tensor} should be {expected:?}, but is {found:?}; {USE_ANOTHER}");
                    return Err(Error::file(path, reason));
                }
            }
        }
        Ok(ShardFile { path, file, header, start: 8 + len, stored })
    }

    /// Fills `out` with elements of a tensor from `first` on.
    pub(super) fn read(&self, unit: &str, part: &str, first: usize, out: &mut [f32]) -> Result<(), Error> {
        if self.stored == DType::F32 {
            return self.read_bytes(unit, part, first, bytemuck::cast_slice_mut(out));
        }
        let mut narrow = vec![0; 2 * out.len()];
        self.read_bytes(unit, part, first, &mut narrow)?;
        let (elements, _) = narrow.as_chunks::<2>();
        for (out, &element) in out.iter_mut().zip(elements) {
            *out = match self.stored {
                DType::F16 => f16::from_le_bytes(element).to_f32(),
                _ => bf16::from_le_bytes(element).to_f32(),
            };
        }
        Ok(())
    }

    /// As [`ShardFile::read`], in the type that the file has.
    pub(super) fn read_bytes(&self, unit: &str, part: &str, first: usize, out: &mut [u8]) -> Result<(), Error> {
        let info = self.header.info(&format!("{unit}.{part}")).expect("`open` has looked for every tensor");
        let offset = self.start + (info.data_offsets.0 + self.stored.bytes() * first) as u64;
        self.file.read_exact_at(out, offset).map_err(|error| unreadable(&self.path, error))
    }
}

/// The ranks whose shards hold elements `flat` of a unit with shards of `shard` elements.
pub(super) fn holders(shard: usize, flat: &Range<usize>) -> Range<usize> {
    if flat.is_empty() { 0..0 } else { flat.start / shard..(flat.end - 1) / shard + 1 }
}

/// Compares a file's size with the manifest's.
pub(super) fn check_size(path: &Path, found: u64, expected: u64) -> Result<(), Error> {
    if found == expected {
        return Ok(());
    }
    Err(Error::file(path, format!("has {found} bytes instead of {expected}: {USE_ANOTHER}")))
}

/// Whether each unit has a name of its own, which its tensors in the file are called by.
pub(super) fn check_names(layout: &Layout, dir: &Path) -> Result<(), Error> {
    for (index, unit) in layout.units.iter().enumerate() {
        if layout.units[..index].iter().any(|earlier| earlier.name == unit.name) {
            return Err(Error::file(dir, format!("two units are called {}: give each a name of its own", unit.name)));
        }
    }
    Ok(())
}

/// What safetensors calls a type of elements.
fn in_file(stored: DType) -> Dtype {
    match stored {
        DType::Bf16 => Dtype::BF16,
        DType::F16 => Dtype::F16,
        _ => Dtype::F32,
    }
}

pub(super) fn header(layout: &Layout, states: &[&str], stored: DType) -> Vec<u8> {
    let mut tensors: Vec<(String, TensorInfo)> = Vec::new();
    let mut end = 0;
    for unit in &layout.units {
        for part in parts(states) {
            let start = end;
            end += stored.bytes() * unit.shard;
            let info = TensorInfo { dtype: in_file(stored), shape: vec![unit.shard], data_offsets: (start, end) };
            tensors.push((format!("{}.{part}", unit.name), info));
        }
    }
    let header = Metadata::new(None, tensors).expect("tensors that follow each other");
    let mut header = serde_json::to_vec(&header).expect("a header has text keys and writes to memory");
    // Spaces, so that elements are aligned for those who map the file.
    header.resize(header.len().next_multiple_of(8), b' ');
    [(header.len() as u64).to_le_bytes().as_slice(), &header].concat()
}

fn unreadable(path: &Path, error: std::io::Error) -> Error {
    Error::file(path, format!("cannot be read: {error}; {USE_ANOTHER}"))
}

#[cfg(test)]
mod tests {
    use super::super::staging::ring;
    use super::*;
    use crate::{TensorSpec, UnitSpec};

    #[test]
    fn a_file_whose_header_says_another_size_is_not_opened() {
        let dir = tempfile::tempdir().unwrap();
        let tensor = TensorSpec { name: "x".to_owned(), shape: vec![3], decay: false, frozen: false };
        let layout = Layout::new(&[UnitSpec { name: "unit".to_owned(), tensors: vec![tensor] }], 1);
        let header = header(&layout, &[], DType::F32);
        let tensors = size_of::<f32>() * layout.shard_len();
        for (bytes, opens) in [(tensors, true), (tensors - 1, false), (tensors + 4, false), (0, false)] {
            let path = dir.path().join("file");
            std::fs::write(&path, [header.clone(), vec![0; bytes]].concat()).unwrap();
            let opened = ShardFile::open(path, (header.len() + bytes) as u64, &layout, &[], DType::F32);
            assert_eq!(opened.is_ok(), opens, "{bytes} bytes");
            if let Err(error) = opened {
                assert!(error.to_string().contains("bytes follow its header"), "{error}");
            }
        }
    }

    #[test]
    fn what_cannot_be_written_is_taken_from_the_ring_and_the_error_is_told() {
        let (full, missing) = (Path::new("/dev/full"), Path::new("/nowhere/at/all"));
        let on_a_full_disk = || {
            let file = File::options().write(true).open(full).expect("Linux has /dev/full");
            Ok(NewFile { path: full.to_owned(), file, hash: Xxh3::new(), bytes: 0 })
        };
        let refused =
            File::create_new(missing).map(|_| unreachable!()).map_err(|error| NewFile::failed(missing, &error));
        let (inlet, mut outlet) = ring(64, 1000);
        for (file, path) in [(on_a_full_disk(), full), (refused, missing), (on_a_full_disk(), full)] {
            let mut sent = 0;
            let outlet = &mut outlet;
            let result = std::thread::scope(|scope| {
                let writing = scope.spawn(move || file_of(file, outlet));
                inlet.send(|out| {
                    let count = out.len().min(1000 - sent);
                    sent += count;
                    Ok(count)
                });
                writing.join().unwrap()
            });
            assert_eq!(sent, 1000, "the rank does not wait for a buffer that never comes");
            assert!(matches!(result, Err(Error::File { path: named, .. }) if named == path));
        }
    }
}
