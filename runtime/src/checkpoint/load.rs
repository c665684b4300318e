//! Loading, at any number of ranks. A unit's tensors lie in the same flat order at every world size and only the
//! padding at the end differs, so a rank's shard is a range of that order, and comes from the one or more old shards
//! that hold the range.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use pillion_collectives::Communicator;
use xxhash_rust::xxh3::xxh3_64;

use super::shard::{self, ShardFile};
use super::{Checkpoint, agree, manifest};
use crate::engine::Health;
use crate::{Engine, Error, Layout, State, Unit};

impl Checkpoint {
    /// Replaces the engine's parameters, optimizer state and number of updates by those saved.
    /// Collective; the engine may have another number of ranks, and another policy (see
    /// [`Checkpoint::differences`]). The ranks verify the files together first
    /// ([`Checkpoint::verify_together`]), then each reads what its shards need.
    ///
    /// # Errors
    /// [`Error::File`] when the checkpoint is of another model, the first tensor that differs named, when a file is
    /// missing or damaged, or when ranks see different checkpoints: the engine is unchanged on every rank. Should a
    /// file that has passed become unreadable, or a rank be lost, the engine refuses to go on until a load succeeds.
    pub fn load(&self, engine: &mut Engine) -> Result<(), Error> {
        // What costs nothing comes first.
        agree(engine.communicator(), &self.path, self.check(engine, Wanted::All))?;
        self.verify_together(engine.communicator())?.load(engine)
    }

    /// As [`Checkpoint::verify`], but each rank reads its part of the files, and every rank learns
    /// the outcome. Collective.
    ///
    /// # Errors
    /// [`Error::File`] on every rank, when ranks see different checkpoints, or a file is missing or
    /// damaged.
    pub fn verify_together(&self, communicator: &Communicator) -> Result<Whole, Error> {
        self.check_same(communicator)?;
        let (rank, world) = (communicator.rank(), communicator.world());
        let verified = (rank..self.manifest.world).step_by(world).try_for_each(|file| self.verify_file(file));
        agree(communicator, &self.path, verified)?;
        Ok(Whole(self.clone()))
    }

    /// The saved tensors by name: for tools, which need no engine. Does not [`Checkpoint::verify`].
    ///
    /// # Errors
    /// [`Error::File`] when a file cannot be opened or is not what the manifest says.
    pub fn tensors(&self) -> Result<Tensors<'_>, Error> {
        self.open_files(0..self.manifest.world)
    }

    /// Whether every rank has opened this very checkpoint.
    fn check_same(&self, communicator: &Communicator) -> Result<(), Error> {
        let checksum = xxh3_64(self.manifest.checksum.as_bytes());
        let checksums = communicator.all_gather_scalars(&[checksum])?;
        match checksums.iter().position(|other| other != &checksums[0]) {
            None => Ok(()),
            Some(rank) => {
                let reason = format!(
                    "is another checkpoint on rank {rank} than on rank 0: resume from a folder that all ranks share, \
                     and name it alike on each"
                );
                Err(Error::file(&self.path, reason))
            }
        }
    }

    /// Whether it can be loaded into this engine at all.
    fn check(&self, engine: &Engine, wanted: Wanted) -> Result<(), Error> {
        // What a load or an update that failed has left is replaced; a step under way is not.
        if engine.health != Health::Torn {
            engine.check_health()?;
        }
        let wrong = |reason| Error::file(self.path.join(manifest::NAME), reason);
        self.manifest.check_model(engine.layout()).map_err(wrong)?;
        let (saved, kept) = (&self.manifest.states, engine.policy().states);
        if engine.trains && wanted == Wanted::All && saved != kept {
            let reason = format!(
                "is of an optimizer that keeps {saved:?} for each weight, and the engine's keeps {kept:?}: go on with the same \
                 optimizer"
            );
            return Err(wrong(reason));
        }
        Ok(())
    }

    /// Opens the files that hold this rank's shards of the engine's units.
    fn open_shards(&self, engine: &Engine) -> Result<Tensors<'_>, Error> {
        let (layout, saved) = (engine.layout(), self.manifest.layout());
        let holders = (0..layout.units.len())
            .flat_map(|unit| shard::holders(saved.units[unit].shard, &in_shard(layout, unit, engine.shard_number())));
        self.open_files(holders.collect::<BTreeSet<usize>>())
    }

    fn open_files(&self, ranks: impl IntoIterator<Item = usize>) -> Result<Tensors<'_>, Error> {
        let layout = self.manifest.layout();
        let open = |rank: usize| {
            let entry = &self.manifest.files[rank];
            let states = &self.manifest.states;
            Ok((
                rank,
                ShardFile::open(self.path.join(&entry.name), entry.bytes, &layout, states, self.manifest.stored())?,
            ))
        };
        let files = ranks.into_iter().map(open).collect::<Result<_, Error>>()?;
        Ok(Tensors { checkpoint: self, layout, files })
    }
}

/// A checkpoint whose files the ranks of a job have compared with its manifest, each a part of
/// them.
#[derive(Clone, Debug)]
pub struct Whole(Checkpoint);

impl Whole {
    /// What was verified.
    pub fn checkpoint(&self) -> &Checkpoint {
        &self.0
    }

    /// As [`Checkpoint::load`], without reading the files once more to verify them. Collective.
    ///
    /// # Errors
    /// As for [`Checkpoint::load`].
    pub fn load(&self, engine: &mut Engine) -> Result<(), Error> {
        self.load_wanted(engine, Wanted::All)
    }

    /// As [`Whole::load`], but the optimizer begins anew: its states are zeros, and it has made no
    /// updates. Collective.
    ///
    /// # Errors
    /// As for [`Checkpoint::load`].
    pub fn load_weights(&self, engine: &mut Engine) -> Result<(), Error> {
        self.load_wanted(engine, Wanted::Weights)
    }

    fn load_wanted(&self, engine: &mut Engine, wanted: Wanted) -> Result<(), Error> {
        let Whole(checkpoint) = self;
        let communicator = engine.communicator().clone();
        let tensors = checkpoint.check(engine, wanted).and_then(|()| checkpoint.open_shards(engine));
        let tensors = agree(&communicator, &checkpoint.path, tensors)?;
        let (layout, shard) = (engine.layout.clone(), engine.shard_number());
        let (saved, anew) = match (engine.trains, wanted) {
            (true, Wanted::All) => (&checkpoint.manifest.states[..], 0),
            (true, Wanted::Weights) => (&[][..], engine.policy.states.len()),
            (false, _) => (&[][..], 0),
        };
        engine.health = Health::Torn;
        let loaded = (0..layout.units.len()).try_for_each(|unit| {
            let mut state = tensors.state(unit, &layout, shard, saved)?;
            state.states.resize(state.states.len() + anew, vec![0.0; state.master.len()]);
            engine.set_state(unit, &state)
        });
        agree(&communicator, &checkpoint.path, loaded)?;
        engine.set_updates(if wanted == Wanted::All { checkpoint.manifest.updates } else { 0 });
        engine.health = Health::Good;
        Ok(())
    }
}

/// What of a checkpoint is loaded.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Wanted {
    All,
    Weights,
}

/// A checkpoint's tensors, readable by name.
pub struct Tensors<'c> {
    checkpoint: &'c Checkpoint,
    /// That of the ranks that saved.
    layout: Layout,
    files: BTreeMap<usize, ShardFile>,
}

impl Tensors<'_> {
    /// The master weights of a whole tensor, row-major.
    ///
    /// # Errors
    /// [`Error::File`] when there is no tensor of that name, or a file cannot be read.
    pub fn master(&self, name: &str) -> Result<Vec<f32>, Error> {
        for (index, unit) in self.layout.units.iter().enumerate() {
            if let Some(tensor) = unit.tensors.iter().find(|tensor| tensor.name == name) {
                return self.read(index, shard::MASTER, tensor.range.clone());
            }
        }
        Err(self.no_tensor(name))
    }

    /// Elements of a tensor's master weights from `first` on, in the type that the files have
    /// ([`Manifest::stored`](super::Manifest::stored)), little-endian: as many as fill `out`.
    ///
    /// # Errors
    /// As for [`Tensors::master`].
    ///
    /// # Panics
    /// When the elements do not lie within the tensor, or `out` holds part of one.
    pub fn stored(&self, name: &str, first: usize, out: &mut [u8]) -> Result<(), Error> {
        let bytes = self.checkpoint.manifest.stored().bytes();
        let named = |unit: &Unit| unit.tensors.iter().find(|tensor| tensor.name == name).map(|t| t.range.clone());
        let found = self.layout.units.iter().find_map(|unit| Some((unit, named(unit)?)));
        let Some((unit, tensor)) = found else { return Err(self.no_tensor(name)) };
        let count = out.len() / bytes;
        assert!(out.len() == count * bytes && first + count <= tensor.len(), "elements of {name}");
        let flat = tensor.start + first..tensor.start + first + count;
        for rank in shard::holders(unit.shard, &flat) {
            let shard = rank * unit.shard..(rank + 1) * unit.shard;
            let held = flat.start.max(shard.start)..flat.end.min(shard.end);
            let out = &mut out[(held.start - flat.start) * bytes..(held.end - flat.start) * bytes];
            self.files[&rank].read_bytes(&unit.name, shard::MASTER, held.start - shard.start, out)?;
        }
        Ok(())
    }

    fn no_tensor(&self, name: &str) -> Error {
        Error::file(&self.checkpoint.path, format!("has no tensor {name}: its manifest lists those it has"))
    }

    /// What `rank` of `layout` keeps of a unit, with these states of the optimizer.
    fn state(&self, unit: usize, layout: &Layout, rank: usize, states: &[String]) -> Result<State, Error> {
        let part = |part: &str| {
            let mut values = self.read(unit, part, in_shard(layout, unit, rank))?;
            values.resize(layout.units[unit].shard, 0.0);
            Ok::<_, Error>(values)
        };
        let states = states.iter().map(|name| part(name)).collect::<Result<_, _>>()?;
        Ok(State { master: part(shard::MASTER)?, states })
    }

    /// Elements `flat` of a unit.
    fn read(&self, unit: usize, part: &str, flat: Range<usize>) -> Result<Vec<f32>, Error> {
        let unit = &self.layout.units[unit];
        let mut values = vec![0.0; flat.len()];
        for rank in shard::holders(unit.shard, &flat) {
            let shard = rank * unit.shard..(rank + 1) * unit.shard;
            let held = flat.start.max(shard.start)..flat.end.min(shard.end);
            let out = &mut values[held.start - flat.start..held.end - flat.start];
            self.files[&rank].read(&unit.name, part, held.start - shard.start, out)?;
        }
        Ok(values)
    }
}

/// The elements of a unit in the shard of `rank`, without padding.
fn in_shard(layout: &Layout, unit: usize, rank: usize) -> Range<usize> {
    let unit = &layout.units[unit];
    (rank * unit.shard).min(unit.len)..((rank + 1) * unit.shard).min(unit.len)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use pillion_collectives::{Communicator, Launch, Options};
    use pillion_kernels::{Cpu, DType};
    use serde_json::Value;

    use super::*;
    use crate::checkpoint::{open, save};
    use crate::{Policy, TensorSpec, UnitSpec};

    #[test]
    fn an_engine_for_evaluation_loads_the_weights_alone_and_cannot_train_or_save() {
        let dir = tempfile::tempdir().unwrap();
        let tensor = TensorSpec { name: "x".to_owned(), shape: vec![3], decay: false, frozen: false };
        let units = [UnitSpec { name: "unit".to_owned(), tensors: vec![tensor] }];
        for weights in [DType::F32, DType::Bf16] {
            let policy = Policy { weights, ..Policy::default() };
            let communicator =
                || Arc::new(Communicator::connect(&Launch::threads(1).remove(0), Options::default()).unwrap());
            let mut trained = Engine::new(communicator(), Arc::new(Cpu), Layout::new(&units, 1), policy).unwrap();
            trained.initialize(|_, _| |index: usize| index as f32).unwrap();
            let step = 1 + weights.bytes() as u64;
            let folder = save(&trained, dir.path(), step, &Value::Null).unwrap();
            let mut engine =
                Engine::for_evaluation(communicator(), Arc::new(Cpu), Layout::new(&units, 1), policy).unwrap();
            open(&folder).unwrap().load(&mut engine).unwrap();
            let (all, less) = (trained.memory(), engine.memory());
            assert_eq!((less.gradients, less.gradient_shard, less.moments), (0, 0, 0));
            assert_eq!((less.weights, less.master), (all.weights, all.master));
            let seen = [&mut trained, &mut engine].map(|engine| {
                let mut step = engine.begin_evaluation(1).unwrap();
                let forward = step.forward(0).unwrap();
                let seen = forward.stream.download_bytes(forward.weights.tensor(0)).unwrap();
                step.end().unwrap();
                seen
            });
            assert_eq!(seen[0], seen[1]);
            assert!(engine.begin(1).err().unwrap().to_string().contains("Engine::new"));
            assert!(save(&engine, dir.path(), 9, &Value::Null).unwrap_err().to_string().contains("Engine::new"));
        }
    }

    #[test]
    fn an_engine_whose_update_failed_cannot_be_saved_and_is_sound_again_after_a_load() {
        let dir = tempfile::tempdir().unwrap();
        let tensor = TensorSpec { name: "x".to_owned(), shape: vec![3], decay: false, frozen: false };
        let units = [UnitSpec { name: "unit".to_owned(), tensors: vec![tensor] }];
        let launch = Launch::threads(1).remove(0);
        let communicator = Arc::new(Communicator::connect(&launch, Options::default()).unwrap());
        let mut engine = Engine::new(communicator, Arc::new(Cpu), Layout::new(&units, 1), Policy::default()).unwrap();
        engine.initialize(|_, _| |index: usize| index as f32).unwrap();
        let state = engine.state(0).unwrap();
        let folder = save(&engine, dir.path(), 1, &Value::Null).unwrap();
        engine.health = Health::Torn;
        assert!(matches!(save(&engine, dir.path(), 2, &Value::Null), Err(Error::Poisoned)));
        open(&folder).unwrap().load(&mut engine).unwrap();
        assert_eq!(engine.state(0).unwrap(), state);
        engine.health = Health::Unfinished;
        assert!(matches!(open(&folder).unwrap().load(&mut engine), Err(Error::Unfinished)), "a step is under way");
    }
}
