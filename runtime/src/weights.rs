//! Every unit's weights, in the type they are computed with: this rank's shards, and what has been gathered. Buffers change hands by ownership: what a
//! collective holds cannot be computed with, and the other way round.

use std::ops::Range;

use pillion_collectives::{Communicator, Pending, Window};
use pillion_kernels::{Buffer, DType, Device, Event, Stream, View, ViewMut};

use crate::axes::Axes;
use crate::engine::bytes;
use crate::{Error, Gather, Layout, Outline, Policy, Unit};

/// Something that a collective may have, which gives it back as an `M`.
enum Held<T, M = T> {
    Here(T),
    Moving(Pending<M>),
    /// While a function replaces it, and after a collective has failed with it.
    Lost,
}

pub(crate) const LOST: &str = "a buffer is lost after an error, which the caller was told";

impl<T: From<M>, M> Held<T, M> {
    /// Orders `stream` after the collective that has it, if one does.
    fn bring(&mut self, stream: &dyn Stream) -> Result<(), Error> {
        *self = match std::mem::replace(self, Held::Lost) {
            Held::Moving(pending) => Held::Here(pending.then(stream)?.into()),
            here => here,
        };
        Ok(())
    }

    /// Unless a collective has it.
    fn here(&self) -> Option<&T> {
        match self {
            Held::Here(value) => Some(value),
            _ => None,
        }
    }

    fn get(&self) -> &T {
        match self {
            Held::Here(value) => value,
            _ => panic!("{LOST}"),
        }
    }

    fn get_mut(&mut self) -> &mut T {
        match self {
            Held::Here(value) => value,
            _ => panic!("{LOST}"),
        }
    }

    fn take(&mut self) -> T {
        match std::mem::replace(self, Held::Lost) {
            Held::Here(value) => value,
            _ => panic!("{LOST}"),
        }
    }
}

/// The weights of one rank, and the place of its shard in each unit.
pub(crate) struct WeightStore {
    memory: Memory,
    dtype: DType,
    shards: Vec<Range<usize>>,
}

enum Memory {
    /// All of every unit; where the update is sharded, it is gathered in place.
    Whole(Vec<Held<Buffer>>),
    /// Shards in the arena, gathered by copy into slots.
    Slots { shards: Vec<Option<Buffer>>, slots: Vec<WeightSlot> },
    /// One window for each unit; the plan's slot is the unit.
    Windows(Vec<Held<Window>>),
}

struct WeightSlot {
    held: Held<Gathered, (Buffer, Buffer)>,
    unit: usize,
}

/// A slot's buffer, and the shard that has filled it, until it is put back.
struct Gathered {
    shard: Option<Buffer>,
    buffer: Buffer,
}

impl From<(Buffer, Buffer)> for Gathered {
    fn from((shard, buffer): (Buffer, Buffer)) -> Gathered {
        Gathered { shard: Some(shard), buffer }
    }
}

impl WeightStore {
    pub(crate) fn new(
        axes: &Axes,
        device: &dyn Device,
        layout: &Layout,
        policy: &Policy,
        outline: &Outline,
    ) -> Result<WeightStore, Error> {
        let allocate = |len| Axes::allocate(axes.shard.as_ref(), device, policy.weights, len);
        let memory = match (policy.sharded.parameters, policy.gather, &axes.shard) {
            (true, Gather::Window, Some(group)) => {
                let window = |unit: &Unit| Ok(Held::Here(group.window(device, policy.weights, unit.padded)?));
                Memory::Windows(layout.units.iter().map(window).collect::<Result<_, Error>>()?)
            }
            (true, _, _) => {
                let shard = |unit: &Unit| Ok(Some(allocate(unit.shard)?));
                let count = outline.weights.expect("sharded weights are gathered into slots");
                let slot = |slot: usize| {
                    // With as many slots as units, each has its own.
                    let own = layout.units.get(slot).filter(|_: &&Unit| count >= layout.units.len());
                    let len = own.map_or(layout.longest_unit(), |unit| unit.padded);
                    let buffer = device.allocate(policy.weights, len)?;
                    Ok(WeightSlot { held: Held::Here(Gathered { shard: None, buffer }), unit: 0 })
                };
                let used = if count >= layout.units.len() { layout.units.len() } else { count };
                Memory::Slots {
                    shards: layout.units.iter().map(shard).collect::<Result<_, Error>>()?,
                    slots: (0..used).map(slot).collect::<Result<_, Error>>()?,
                }
            }
            (false, _, _) => {
                let whole = |unit: &Unit| Ok(Held::Here(allocate(unit.padded)?));
                Memory::Whole(layout.units.iter().map(whole).collect::<Result<_, Error>>()?)
            }
        };
        let number = axes.shard_number();
        let shards = layout.units.iter().map(|unit| number * unit.shard..(number + 1) * unit.shard).collect();
        Ok(WeightStore { memory, dtype: policy.weights, shards })
    }

    /// Bytes of what this rank keeps, and of slots; a rank's own part of windows. Between steps: what a collective has does not count.
    pub(crate) fn bytes(&self) -> (u64, u64) {
        match &self.memory {
            Memory::Whole(whole) => (whole.iter().filter_map(Held::here).map(bytes).sum(), 0),
            Memory::Slots { shards, slots } => (
                shards.iter().flatten().map(bytes).sum(),
                slots.iter().filter_map(|slot| slot.held.here()).map(|gathered| bytes(&gathered.buffer)).sum(),
            ),
            Memory::Windows(windows) => {
                let own = |window: &Window| (window.shard().len() * self.dtype.bytes()) as u64;
                (windows.iter().filter_map(Held::here).map(own).sum(), 0)
            }
        }
    }

    /// Starts to gather a unit into a slot.
    pub(crate) fn gather(&mut self, group: &Communicator, unit: usize, slot: usize, after: Event) {
        match &mut self.memory {
            Memory::Slots { shards, slots } => {
                let slot = &mut slots[slot];
                let shard = shards[unit].take().expect(LOST);
                slot.unit = unit;
                slot.held = Held::Moving(group.all_gather(shard, slot.held.take().buffer, after));
            }
            Memory::Windows(windows) => {
                let window = windows[unit].take();
                windows[unit] = Held::Moving(group.gather_window(window, after));
            }
            Memory::Whole(whole) => {
                let buffer = whole[unit].take();
                whole[unit] = Held::Moving(group.all_gather_in_place(buffer, after));
            }
        }
    }

    /// Orders `stream` after the gather of a unit.
    pub(crate) fn bring(&mut self, unit: usize, slot: usize, stream: &dyn Stream) -> Result<(), Error> {
        match &mut self.memory {
            Memory::Slots { shards, slots } => {
                let slot = &mut slots[slot];
                slot.held.bring(stream)?;
                if let Some(shard) = slot.held.get_mut().shard.take() {
                    shards[slot.unit] = Some(shard);
                }
                Ok(())
            }
            Memory::Windows(windows) => windows[unit].bring(stream),
            Memory::Whole(whole) => whole[unit].bring(stream),
        }
    }

    /// A gathered unit, with padding.
    pub(crate) fn gathered(&self, unit: usize, slot: usize) -> View<'_> {
        match &self.memory {
            Memory::Slots { slots, .. } => slots[slot].held.get().buffer.view(),
            Memory::Windows(windows) => windows[unit].get().view(),
            Memory::Whole(whole) => whole[unit].get().view(),
        }
    }

    /// Ends the reading of everything gathered; blocks the host until `after`, which follows the last kernel that reads.
    pub(crate) fn release(&mut self, after: &Event) -> Result<(), Error> {
        if let Memory::Windows(windows) = &mut self.memory {
            windows.iter_mut().try_for_each(|window| window.get_mut().release(after))?;
        }
        Ok(())
    }

    /// This rank's shard of a unit.
    pub(crate) fn shard(&self, unit: usize) -> View<'_> {
        match &self.memory {
            Memory::Slots { shards, .. } => shards[unit].as_ref().expect(LOST).view(),
            Memory::Windows(windows) => windows[unit].get().shard(),
            Memory::Whole(whole) => whole[unit].get().slice(self.shards[unit].clone()),
        }
    }

    /// This rank's shard of a unit, for writing.
    pub(crate) fn shard_mut(&mut self, unit: usize) -> Result<ViewMut<'_>, Error> {
        match &mut self.memory {
            Memory::Slots { shards, .. } => Ok(shards[unit].as_mut().expect(LOST).view_mut()),
            Memory::Windows(windows) => Ok(windows[unit].get_mut().shard_mut()?),
            Memory::Whole(whole) => Ok(whole[unit].get_mut().slice_mut(self.shards[unit].clone())),
        }
    }
}
