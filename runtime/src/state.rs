//! A rank's parameters and optimizer state, as the host sets and reads them between steps.

use parking_lot::Mutex;
use pillion_kernels::{Buffer, DType, View};

use crate::engine::Health;
use crate::{Engine, Error, Unit};

/// What a checkpoint keeps of a unit's shard: host copies, each `[shard]`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct State {
    /// Master weights.
    pub master: Vec<f32>,
    /// What the optimizer keeps, in the order of [`Policy::states`](crate::Policy::states).
    pub states: Vec<Vec<f32>>,
}

/// Elements that a thread makes at a time, in about a millisecond.
const PART: usize = 1 << 15;

/// Fills `out` with `value(first)`, `value(first + 1)` and so on, by several threads where it is
/// long.
fn fill<V: Fn(usize) -> f32 + Sync>(threads: usize, out: &mut [f32], first: usize, value: &V) {
    let threads = threads.min(out.len().div_ceil(PART));
    let parts = Mutex::new(out.chunks_mut(PART).zip((first..).step_by(PART)));
    let next = || parts.lock().next();
    let work = || {
        while let Some((out, first)) = next() {
            out.iter_mut().zip(first..).for_each(|(out, element)| *out = value(element));
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..threads {
            // Where the system starts no more threads, those that there are do more.
            let _ = std::thread::Builder::new().spawn_scoped(scope, work);
        }
        work();
    });
}

impl Engine {
    /// Sets every parameter of this rank's shards: `values(tensor name, shape)` is asked once for
    /// each piece of a tensor, and gives the element at an index. No rank ever holds more than its
    /// shards.
    ///
    /// # Errors
    /// When another rank has failed.
    pub fn initialize<V: Fn(usize) -> f32>(&mut self, values: impl Fn(&str, &[usize]) -> V) -> Result<(), Error> {
        self.initialize_by(values, |out, first, value| {
            out.iter_mut().zip(first..).for_each(|(out, element)| *out = value(element));
        })
    }

    /// As [`Engine::initialize`], with elements made on so many threads.
    ///
    /// # Errors
    /// When another rank has failed.
    pub fn initialize_on_threads<V: Fn(usize) -> f32 + Sync>(
        &mut self,
        threads: usize,
        values: impl Fn(&str, &[usize]) -> V,
    ) -> Result<(), Error> {
        self.initialize_by(values, |out, first, value| fill(threads, out, first, value))
    }

    fn initialize_by<V>(
        &mut self,
        values: impl Fn(&str, &[usize]) -> V,
        fill: impl Fn(&mut [f32], usize, &V),
    ) -> Result<(), Error> {
        let layout = self.layout.clone();
        for (index, unit) in layout.units.iter().enumerate() {
            let mut master = vec![0.0; unit.shard];
            for piece in layout.pieces(index, self.shard_number()) {
                let tensor = &unit.tensors[piece.tensor];
                let value = values(&tensor.name, &tensor.shape);
                fill(&mut master[piece.in_shard], piece.in_tensor.start, &value);
            }
            let states = vec![vec![0.0; unit.shard]; self.policy.states.len()];
            self.set_state(index, &State { master, states })?;
        }
        self.updates = 0;
        Ok(())
    }

    /// A unit's master weights, whole and without padding: for exports and for tests. Collective.
    /// Memory for one unit is enough.
    ///
    /// # Errors
    /// When an update was interrupted, or another rank has failed.
    pub fn master(&mut self, unit: usize) -> Result<Vec<f32>, Error> {
        let State { master, .. } = self.state(unit)?;
        let Unit { len, padded, .. } = self.layout.units[unit];
        let mut whole = match &self.axes.shard {
            None => master,
            Some(group) => {
                let mut shard = self.device.allocate(DType::F32, master.len())?;
                self.stream.upload(shard.view_mut(), &master);
                let output = self.device.allocate(DType::F32, padded)?;
                let (_, output) = group.all_gather(shard, output, self.stream.record()).then(&*self.stream)?;
                self.stream.download(output.view())?
            }
        };
        whole.truncate(len);
        Ok(whole)
    }

    /// A copy of this rank's state of a unit.
    ///
    /// # Errors
    /// When an update was interrupted.
    pub fn state(&self, unit: usize) -> Result<State, Error> {
        let mut state = State::default();
        self.read_state(unit, &mut state)?;
        Ok(state)
    }

    /// As [`Engine::state`], into memory that is used again.
    ///
    /// # Errors
    /// As for [`Engine::state`].
    pub fn read_state(&self, unit: usize, state: &mut State) -> Result<(), Error> {
        self.check_state()?;
        state.states.resize_with(self.optimizer[unit].states.len(), Vec::new);
        for (part, to) in std::iter::once(&mut state.master).chain(&mut state.states).enumerate() {
            let from = self.part(unit, part);
            to.resize(from.len(), 0.0);
            self.stream.read(from, to)?;
        }
        Ok(())
    }

    /// Reads elements from `first` on of one part of a unit's state. Part 0 is the master weights,
    /// and the optimizer's states follow.
    ///
    /// # Errors
    /// As for [`Engine::state`].
    pub(crate) fn read_part(&self, unit: usize, part: usize, first: usize, out: &mut [f32]) -> Result<(), Error> {
        self.check_state()?;
        Ok(self.stream.read(self.part(unit, part).slice(first..first + out.len()), out)?)
    }

    /// Whether there is a state that can be read.
    pub(crate) fn check_state(&self) -> Result<(), Error> {
        self.check_trains()?;
        self.check_health()
    }

    fn part(&self, unit: usize, part: usize) -> View<'_> {
        let shard = &self.optimizer[unit];
        match part {
            0 => shard.master.as_ref().map_or_else(|| self.weights.shard(unit), Buffer::view),
            part => shard.states[part - 1].view(),
        }
    }

    /// Replaces this rank's state of a unit, and rounds its weights.
    ///
    /// # Errors
    /// When another rank has failed, or a step is under way.
    ///
    /// # Panics
    /// When the lengths are not those of the shard.
    pub fn set_state(&mut self, unit: usize, state: &State) -> Result<(), Error> {
        // What a failed update or load has left is replaced; a step under way is not.
        if self.health != Health::Torn {
            self.check_health()?;
        }
        let shard = &mut self.optimizer[unit];
        if self.trains {
            assert!(state.states.len() == shard.states.len(), "a state has what the optimizer keeps");
            let kept = shard.states.iter_mut().zip(&state.states);
            kept.for_each(|(to, from)| self.stream.upload(to.view_mut(), from));
        }
        let weights = self.weights.shard_mut(unit)?;
        match &mut shard.master {
            Some(master) => {
                self.stream.upload(master.view_mut(), &state.master);
                self.stream.cast(weights, master.view());
            }
            None => self.stream.upload(weights, &state.master),
        }
        self.written[unit] = self.stream.record();
        Ok(())
    }

    /// Sets the number of updates made, which bias correction depends on: for a resume.
    pub fn set_updates(&mut self, updates: u64) {
        self.updates = updates;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn threads_fill_every_place_with_its_own_value(
            threads in 1usize..4,
            len in 0usize..5 * PART,
            first in 0usize..1 << 20,
        ) {
            let mut out = vec![f32::NAN; len];
            fill(threads, &mut out, first, &|element| element as f32);
            prop_assert!(out.iter().zip(first..).all(|(out, element)| *out == element as f32));
        }
    }
}
