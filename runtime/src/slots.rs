//! The memory that moves: gathered weights, and gradients on their way. Buffers change hands by ownership: what a collective
//! holds cannot be computed with, and the other way round.

use pillion_collectives::{Communicator, Pending, Reduce, Reduction, Sideband, Window};
use pillion_kernels::{Buffer, DType, Device, Event, Queue, View, ViewMut};

use crate::{Error, Gather, Layout, Policy, Unit};

/// Something that a collective may have, which gives it back as an `M`.
pub(crate) enum Held<T, M = T> {
    Here(T),
    Moving(Pending<M>),
    /// While a function replaces it, and after a collective has failed with it.
    Lost,
}

const LOST: &str = "a buffer is lost after an error, which the caller was told";

impl<T: From<M>, M> Held<T, M> {
    /// Orders `queue` after the collective that has it, if one does.
    fn bring(&mut self, queue: &dyn Queue) -> Result<(), Error> {
        *self = match std::mem::replace(self, Held::Lost) {
            Held::Moving(pending) => Held::Here(pending.then(queue)?.into()),
            here => here,
        };
        Ok(())
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

/// Every unit's weights, in the type they are computed with: this rank's shards, and what has been gathered.
pub(crate) enum WeightStore {
    /// Shards in the arena, gathered by copy into slots.
    Copy { shards: Vec<Option<Buffer>>, slots: Vec<WeightSlot> },
    /// One window for each unit; the plan's slot numbers do not matter.
    Window(Vec<Held<Window>>),
}

pub(crate) struct WeightSlot {
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
        communicator: &Communicator,
        device: &dyn Device,
        layout: &Layout,
        policy: &Policy,
    ) -> Result<WeightStore, Error> {
        match policy.gather {
            Gather::Window => {
                let window = |unit: &Unit| Ok(Held::Here(communicator.window(device, policy.weights, unit.padded)?));
                Ok(WeightStore::Window(layout.units.iter().map(window).collect::<Result<_, Error>>()?))
            }
            Gather::Copy => {
                let shard = |unit: &Unit| Ok(Some(communicator.allocate(device, policy.weights, unit.shard)?));
                let slot = |_| {
                    let buffer = device.allocate(policy.weights, layout.longest_unit())?;
                    Ok(WeightSlot { held: Held::Here(Gathered { shard: None, buffer }), unit: 0 })
                };
                Ok(WeightStore::Copy {
                    shards: layout.units.iter().map(shard).collect::<Result<_, Error>>()?,
                    slots: (0..policy.slots).map(slot).collect::<Result<_, Error>>()?,
                })
            }
        }
    }

    /// Number of slots that a plan may use.
    pub(crate) fn slots(&self) -> usize {
        match self {
            WeightStore::Copy { slots, .. } => slots.len(),
            WeightStore::Window(windows) => windows.len(),
        }
    }

    /// Starts to gather a unit into a slot.
    pub(crate) fn gather(&mut self, communicator: &Communicator, unit: usize, slot: usize, after: Event) {
        match self {
            WeightStore::Copy { shards, slots } => {
                let slot = &mut slots[slot];
                let shard = shards[unit].take().expect(LOST);
                slot.unit = unit;
                slot.held = Held::Moving(communicator.all_gather(shard, slot.held.take().buffer, after));
            }
            WeightStore::Window(windows) => {
                let window = windows[unit].take();
                windows[unit] = Held::Moving(communicator.gather_window(window, after));
            }
        }
    }

    /// Orders `queue` after the gather of a unit.
    pub(crate) fn bring(&mut self, unit: usize, slot: usize, queue: &dyn Queue) -> Result<(), Error> {
        match self {
            WeightStore::Copy { shards, slots } => {
                let slot = &mut slots[slot];
                slot.held.bring(queue)?;
                if let Some(shard) = slot.held.get_mut().shard.take() {
                    shards[slot.unit] = Some(shard);
                }
                Ok(())
            }
            WeightStore::Window(windows) => windows[unit].bring(queue),
        }
    }

    /// A gathered unit, with padding.
    pub(crate) fn gathered(&self, unit: usize, slot: usize) -> View<'_> {
        match self {
            WeightStore::Copy { slots, .. } => slots[slot].held.get().buffer.view(),
            WeightStore::Window(windows) => windows[unit].get().view(),
        }
    }

    /// Ends the reading of everything gathered; blocks the host until `after`, which follows the last kernel that reads.
    pub(crate) fn release(&mut self, after: &Event) {
        if let WeightStore::Window(windows) = self {
            windows.iter_mut().for_each(|window| window.get_mut().release(after));
        }
    }

    /// This rank's shard of a unit.
    pub(crate) fn shard(&self, unit: usize) -> View<'_> {
        match self {
            WeightStore::Copy { shards, .. } => shards[unit].as_ref().expect(LOST).view(),
            WeightStore::Window(windows) => windows[unit].get().shard(),
        }
    }

    /// This rank's shard of a unit, for writing.
    pub(crate) fn shard_mut(&mut self, unit: usize) -> Result<ViewMut<'_>, Error> {
        match self {
            WeightStore::Copy { shards, .. } => Ok(shards[unit].as_mut().expect(LOST).view_mut()),
            WeightStore::Window(windows) => Ok(windows[unit].get_mut().shard_mut()?),
        }
    }
}

/// Numbers that ride with a unit's gradient: what a sideband holds, in order.
pub(crate) mod sideband {
    use std::ops::Range;

    /// Σ over groups of ‖gradient‖² / tokens, and the number of values that were not finite.
    pub(crate) const SQUARE_NORM: Range<usize> = 0..2;
    /// Sum of the losses, and number of tokens.
    pub(crate) const LOSS: Range<usize> = 2..4;
    pub(crate) const LEN: usize = 4;
}

/// Gradients: slots that backward passes fill, and this rank's shards of their sums.
pub(crate) struct GradientStore {
    slots: Vec<GradientSlot>,
    /// (sum of the gradients, totals of the sidebands) of each unit, unless a reduction has them.
    sums: Vec<Option<(Buffer, Buffer)>>,
}

struct GradientSlot {
    held: Held<Filled, Reduce>,
    unit: usize,
}

/// A gradient slot's buffers, and while it is reduced the sums that it adds to.
struct Filled {
    gradient: Buffer,
    sideband: Buffer,
    sums: Option<(Buffer, Buffer)>,
}

impl From<Reduce> for Filled {
    fn from(reduce: Reduce) -> Filled {
        let Sideband { own, totals } = reduce.sideband.expect("a gradient is reduced with its sideband");
        Filled { gradient: reduce.input, sideband: own, sums: Some((reduce.output, totals)) }
    }
}

impl GradientStore {
    pub(crate) fn new(
        communicator: &Communicator,
        device: &dyn Device,
        layout: &Layout,
        policy: &Policy,
    ) -> Result<GradientStore, Error> {
        let slot = |_| {
            let gradient = communicator.allocate(device, DType::F32, layout.longest_unit())?;
            let sideband = device.allocate(DType::F64, sideband::LEN)?;
            Ok(GradientSlot { held: Held::Here(Filled { gradient, sideband, sums: None }), unit: 0 })
        };
        let sums = |unit: &Unit| {
            Ok(Some((device.allocate(DType::F32, unit.shard)?, device.allocate(DType::F64, sideband::LEN)?)))
        };
        Ok(GradientStore {
            slots: (0..policy.slots).map(slot).collect::<Result<_, Error>>()?,
            sums: layout.units.iter().map(sums).collect::<Result<_, Error>>()?,
        })
    }

    pub(crate) fn slots(&self) -> usize {
        self.slots.len()
    }

    /// Orders `queue` after what a slot's last reduction reads, and zeroes the slot for a gradient of `len` elements.
    pub(crate) fn open(&mut self, slot: usize, len: usize, queue: &dyn Queue) -> Result<(), Error> {
        self.bring(slot, queue)?;
        let Filled { gradient, sideband, .. } = self.slots[slot].held.get_mut();
        queue.zero(gradient.slice_mut(0..len));
        queue.zero(sideband.view_mut());
        Ok(())
    }

    /// An open slot's gradient and sideband.
    pub(crate) fn opened(&mut self, slot: usize) -> (ViewMut<'_>, ViewMut<'_>) {
        let Filled { gradient, sideband, .. } = self.slots[slot].held.get_mut();
        (gradient.view_mut(), sideband.view_mut())
    }

    /// Starts to sum a slot's gradient over ranks into a unit's shard, or to add it there.
    pub(crate) fn reduce(
        &mut self,
        communicator: &Communicator,
        unit: usize,
        slot: usize,
        accumulate: bool,
        after: Event,
        queue: &dyn Queue,
    ) -> Result<(), Error> {
        // With few units, an earlier round's reduction of the same unit may still have its sums.
        if self.sums[unit].is_none() {
            let earlier = self.slots.iter().position(|slot| slot.unit == unit && matches!(slot.held, Held::Moving(_)));
            self.bring(earlier.expect(LOST), queue)?;
        }
        let (output, totals) = self.sums[unit].take().expect(LOST);
        let Filled { gradient, sideband, .. } = self.slots[slot].held.take();
        let sideband = Some(Sideband { own: sideband, totals });
        let reduce = Reduce { input: gradient, output, reduction: Reduction::Sum, accumulate, sideband };
        self.slots[slot].unit = unit;
        self.slots[slot].held = Held::Moving(communicator.reduce_scatter(reduce, after));
        Ok(())
    }

    /// Orders `queue` after every reduction.
    pub(crate) fn bring_all(&mut self, queue: &dyn Queue) -> Result<(), Error> {
        (0..self.slots.len()).try_for_each(|slot| self.bring(slot, queue))
    }

    /// A unit's summed gradient, `[shard]`, and the totals of its sidebands.
    pub(crate) fn sums(&self, unit: usize) -> (View<'_>, View<'_>) {
        let (gradient, totals) = self.sums[unit].as_ref().expect(LOST);
        (gradient.view(), totals.view())
    }

    fn bring(&mut self, slot: usize, queue: &dyn Queue) -> Result<(), Error> {
        let slot = &mut self.slots[slot];
        slot.held.bring(queue)?;
        if let Some(sums) = slot.held.get_mut().sums.take() {
            self.sums[slot.unit] = Some(sums);
        }
        Ok(())
    }
}
