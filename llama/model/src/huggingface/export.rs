//! Out: a checkpoint's weights as a folder in Hugging Face's format.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use pillion_collectives::limits::explain;
use pillion_kernels::DType;
use pillion_runtime::TensorSpec;
use pillion_runtime::checkpoint::{Checkpoint, Tensors};
use safetensors::tensor::{Metadata, TensorInfo};
use serde_json::json;

use super::early_sync::EarlySync;
use super::{CONFIG, Error, INDEX, Imported, PIECE, SINGLE, named};

/// What is exported, and how.
pub struct Export<'a> {
    /// The weights.
    pub checkpoint: &'a Checkpoint,
    /// What the checkpoint was imported as, which its tensors' types follow.
    pub imported: Option<&'a Imported>,
    /// Type of the weights.
    pub dtype: DType,
    /// Bytes of tensors in a file, at most, but for a tensor that is longer.
    pub file_bytes: u64,
    /// Other files of the folder: name and content. The configuration is one of them.
    pub companions: &'a [(String, Vec<u8>)],
}

/// Writes a folder that `transformers` loads, and verifies the checkpoint meanwhile. The folder gets
/// its name when all is on the disk. `progress` is called with numbers of bytes that have been
/// written, and stops the work by returning false.
///
/// # Errors
/// [`Error`] when `to` exists and is not empty, when a file cannot be read or written, or when the
/// checkpoint is damaged; nothing is left then.
pub fn export(wanted: &Export<'_>, to: &Path, mut progress: impl FnMut(u64) -> bool) -> Result<(), Error> {
    let taken = fs::read_dir(to).is_ok_and(|mut entries| entries.next().is_some());
    if taken || (to.exists() && !to.is_dir()) {
        return Err(Error::file(to, "exists already: choose another folder, or remove it"));
    }
    let folder = Unfinished::beside(to)?;
    std::thread::scope(|scope| {
        let verified = scope.spawn(|| wanted.checkpoint.verify());
        write_all(wanted, &folder.path, &mut progress)?;
        Ok::<_, Error>(verified.join().expect("verification does not panic")?)
    })?;
    folder.publish(to)
}

fn write_all(wanted: &Export<'_>, folder: &Path, progress: &mut impl FnMut(u64) -> bool) -> Result<(), Error> {
    let tensors = wanted.checkpoint.tensors()?;
    let files = divide(wanted);
    let mut map = BTreeMap::new();
    for (index, file) in files.iter().enumerate() {
        let name = match files.len() {
            1 => SINGLE.to_owned(),
            count => format!("model-{:05}-of-{count:05}.safetensors", index + 1),
        };
        write_tensors(wanted, &tensors, file, &folder.join(&name), progress)?;
        map.extend(file.iter().map(|(tensor, _)| (tensor.name.as_str(), name.clone())));
    }
    if files.len() > 1 {
        let total: u64 = files.iter().flatten().map(bytes_of).sum();
        let index = json!({ "metadata": { "total_size": total }, "weight_map": map });
        let text = serde_json::to_vec_pretty(&index).expect("plain values");
        write_file(&folder.join(INDEX), &text)?;
    }
    for (name, content) in wanted.companions {
        write_file(&folder.join(name), content)?;
    }
    debug_assert!(wanted.companions.iter().any(|(name, _)| name == CONFIG), "a model has a configuration");
    Ok(())
}

/// A tensor, and the type that it gets.
type Part<'a> = (&'a TensorSpec, DType);

fn bytes_of((tensor, dtype): &Part<'_>) -> u64 {
    tensor.shape.iter().product::<usize>() as u64 * dtype.bytes() as u64
}

/// The tensors in order, divided into files.
fn divide<'a>(wanted: &Export<'a>) -> Vec<Vec<Part<'a>>> {
    let mut files: Vec<Vec<Part<'a>>> = vec![Vec::new()];
    let mut bytes = 0;
    for tensor in wanted.checkpoint.manifest.units.iter().flat_map(|unit| &unit.tensors) {
        let dtype = wanted.imported.map_or(wanted.dtype, |imported| imported.dtype(&tensor.name, wanted.dtype));
        let part = (tensor, dtype);
        let more = bytes_of(&part);
        if bytes > 0 && bytes + more > wanted.file_bytes {
            files.push(Vec::new());
            bytes = 0;
        }
        bytes += more;
        files.last_mut().expect("there is one").push(part);
    }
    files
}

fn write_tensors(
    wanted: &Export<'_>,
    tensors: &Tensors<'_>,
    parts: &[Part<'_>],
    path: &Path,
    progress: &mut impl FnMut(u64) -> bool,
) -> Result<(), Error> {
    let failed = |error: std::io::Error| Error::file(path, format!("cannot be written: {}", explain(&error)));
    let mut out = File::create_new(path).map_err(failed)?;
    let early = EarlySync::of(&out).map_err(failed)?;
    out.write_all(&header(parts)).map_err(failed)?;
    let stored = wanted.checkpoint.manifest.stored();
    let (mut read, mut narrow) = (Vec::new(), Vec::new());
    for (tensor, dtype) in parts {
        let elements: usize = tensor.shape.iter().product();
        let mut first = 0;
        while first < elements {
            let count = (PIECE / stored.bytes()).min(elements - first);
            read.resize(count * stored.bytes(), 0);
            tensors.stored(&tensor.name, first, &mut read)?;
            let written = match *dtype == stored {
                true => &read,
                false => {
                    let converted = convert(&read, stored, *dtype, &mut narrow);
                    converted
                        .map_err(|what| Error::file(&wanted.checkpoint.path, format!("{}: {what}", tensor.name)))?;
                    &narrow
                }
            };
            out.write_all(written).map_err(failed)?;
            early.wrote(written.len());
            Error::unless(progress(written.len() as u64))?;
            first += count;
        }
    }
    out.sync_all().map_err(failed)
}

/// Length and text of a safetensors header.
fn header(parts: &[Part<'_>]) -> Vec<u8> {
    let mut end = 0;
    let infos = parts.iter().map(|part| {
        let start = end;
        end += bytes_of(part) as usize;
        let (tensor, dtype) = part;
        let info = TensorInfo { dtype: named(*dtype), shape: tensor.shape.clone(), data_offsets: (start, end) };
        (tensor.name.clone(), info)
    });
    // Transformers refuses files that do not say it.
    let format = [("format".to_owned(), "pt".to_owned())].into_iter().collect();
    let header = Metadata::new(Some(format), infos.collect()).expect("tensors that follow each other");
    let mut header = serde_json::to_vec(&header).expect("a header has text keys and writes to memory");
    header.resize(header.len().next_multiple_of(8), b' ');
    [(header.len() as u64).to_le_bytes().as_slice(), &header].concat()
}

/// Elements of one type in another, little-endian; rounded to the nearest.
///
/// # Errors
/// When a number is beyond the other type's.
fn convert(elements: &[u8], from: DType, to: DType, out: &mut Vec<u8>) -> Result<(), String> {
    out.clear();
    for element in elements.chunks_exact(from.bytes()) {
        let value = match *element {
            [a, b] if from == DType::F16 => f16::from_le_bytes([a, b]).to_f32(),
            [a, b] => bf16::from_le_bytes([a, b]).to_f32(),
            [a, b, c, d] => f32::from_le_bytes([a, b, c, d]),
            _ => unreachable!("elements of {from}"),
        };
        let rounded = match to {
            DType::Bf16 => bf16::from_f32(value).to_f32(),
            DType::F16 => f16::from_f32(value).to_f32(),
            _ => value,
        };
        if rounded.is_infinite() && value.is_finite() {
            return Err(format!("{value} is too large for {to}: choose another --dtype"));
        }
        match to {
            DType::Bf16 => out.extend(bf16::from_f32(value).to_le_bytes()),
            DType::F16 => out.extend(f16::from_f32(value).to_le_bytes()),
            _ => out.extend(value.to_le_bytes()),
        }
    }
    Ok(())
}

fn write_file(path: &Path, content: &[u8]) -> Result<(), Error> {
    let written = File::create_new(path).and_then(|mut file| {
        file.write_all(content)?;
        file.sync_all()
    });
    written.map_err(|error| Error::file(path, format!("cannot be written: {}", explain(&error))))
}

/// A folder that is removed unless it is published.
struct Unfinished {
    path: PathBuf,
}

impl Unfinished {
    fn beside(to: &Path) -> Result<Unfinished, Error> {
        let name = to.file_name().ok_or_else(|| Error::file(to, "is no name for a folder"))?;
        let mut unfinished = std::ffi::OsString::from(".");
        unfinished.push(name);
        unfinished.push(format!(".{}.incomplete", std::process::id()));
        let path = to.with_file_name(unfinished);
        fs::create_dir_all(&path)
            .map_err(|error| Error::file(&path, format!("cannot be made: {error}; choose another place")))?;
        Ok(Unfinished { path })
    }

    fn publish(self, to: &Path) -> Result<(), Error> {
        let sync = |folder: &Path| File::open(folder).and_then(|folder| folder.sync_all());
        let parent = to.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        // A rename replaces an empty folder.
        let renamed = sync(&self.path).and_then(|()| fs::rename(&self.path, to)).and_then(|()| sync(parent));
        renamed.map_err(|error| Error::file(to, format!("cannot get its name: {error}")))
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        // After the rename there is nothing under this name.
        let _ = fs::remove_dir_all(&self.path);
    }
}
