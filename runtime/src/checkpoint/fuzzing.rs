//! The parsers of a checkpoint's files, for fuzzers.

use super::manifest::{Manifest, adamw_states, hex};
use super::{FileEntry, shard};
use crate::{TensorSpec, UnitSpec};

/// A manifest of two ranks.
pub(super) fn example() -> Manifest {
    let tensor = |name: &str, shape: &[usize]| TensorSpec {
        name: name.to_owned(),
        shape: shape.to_vec(),
        decay: true,
        frozen: false,
    };
    let unit = |name: &str, tensors| UnitSpec { name: name.to_owned(), tensors };
    let file = |rank| FileEntry { name: shard::name(rank, 2), bytes: 100 + rank as u64, xxh3: hex(7 + rank as u128) };
    let unsealed = Manifest {
        checksum: String::new(),
        format: String::new(),
        version: 0,
        step: 10,
        updates: 9,
        world: 2,
        weights: "bf16".to_owned(),
        stored: None,
        clip: Some(0.1),
        states: adamw_states(),
        units: vec![unit("a", vec![tensor("x", &[3, 4])]), unit("b", vec![tensor("y", &[65]), tensor("z", &[1])])],
        files: vec![file(0), file(1)],
        extra: serde_json::json!({ "samples": u64::MAX, "noise": 0.1 + 0.2, "name": "ünï" }),
    };
    unsealed.sealed()
}

/// A checkpoint's manifest.
pub mod manifest {
    use super::{Manifest, example};
    use crate::layout::{ALIGNMENT, MOST};

    /// A manifest as a saver writes it.
    pub fn seeds() -> Vec<Vec<u8>> {
        vec![example().text().into_bytes()]
    }

    /// What is read is what was written, and a layout can be made of it.
    pub fn check(data: &[u8]) {
        let Ok(text) = str::from_utf8(data) else { return };
        if let Ok(manifest) = Manifest::parse(text) {
            check_layout(&manifest);
        }
        // Few inputs have the right checksum, so each is tried with it as well.
        if let Ok(manifest) = serde_json::from_str::<Manifest>(text) {
            let sealed = manifest.sealed();
            if let Ok(read) = Manifest::parse(&sealed.text()) {
                assert_eq!(read, sealed);
                check_layout(&read);
            }
        }
    }

    fn check_layout(manifest: &Manifest) {
        let layout = manifest.layout();
        assert!(layout.parameters() < MOST && layout.shards == manifest.files.len());
        for unit in &layout.units {
            assert!(unit.padded >= unit.len && unit.padded < unit.len + (1 + ALIGNMENT) * layout.shards);
        }
    }
}

/// A rank's file of a checkpoint.
pub mod shard_file {
    use std::os::fd::AsRawFd;

    use pillion_kernels::DType;

    use super::super::shard::{ShardFile, header, parts};
    use super::example;
    use crate::ADAMW_STATES;

    /// A file as a saver writes it.
    pub fn seeds() -> Vec<Vec<u8>> {
        let layout = example().layout();
        let elements = ADAMW_STATES.len() + 1;
        let values = (0..elements * layout.shard_len()).flat_map(|index| (index as f32).to_le_bytes());
        vec![header(&layout, ADAMW_STATES, DType::F32).into_iter().chain(values).collect()]
    }

    /// A file that is opened has every tensor, each where the header says.
    pub fn check(data: &[u8]) {
        let memory = rustix::fs::memfd_create("fuzzing", rustix::fs::MemfdFlags::CLOEXEC).expect("memory");
        let mut rest = data;
        while !rest.is_empty() {
            rest = &rest[rustix::io::write(&memory, rest).expect("memory")..];
        }
        let (manifest, path) = (example(), format!("/proc/self/fd/{}", memory.as_raw_fd()));
        let (layout, states) = (manifest.layout(), &manifest.states);
        let Ok(file) = ShardFile::open(path.into(), data.len() as u64, &layout, states, DType::F32) else { return };
        for unit in &layout.units {
            for part in parts(states) {
                let mut values = vec![0.0; unit.shard];
                file.read(&unit.name, part, 0, &mut values).expect("it has been opened");
                let mut last = [0.0];
                file.read(&unit.name, part, unit.shard - 1, &mut last).expect("it has been opened");
                assert_eq!(last[0].to_bits(), values[unit.shard - 1].to_bits());
            }
        }
    }
}
