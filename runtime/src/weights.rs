//! Every unit's weights, in the type they are computed with: this rank's shards, and what has been gathered. Buffers change hands by ownership: what a
//! collective holds cannot be computed with, and the other way round.

use std::ops::Range;
use std::sync::Arc;

use pillion_collectives::{Communicator, Pending, Window};
use pillion_kernels::{Buffer, DType, Device, Event, Stream, View, ViewMut};

use crate::axes::Axes;
use crate::buckets::{Bucket, Buckets, InBucket};
use crate::engine::bytes;
use crate::{Error, Gather, Layout, Outline, Policy};

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
    buckets: Arc<Buckets>,
    /// Each unit's shard in the bucket's full buffer.
    shards: Vec<Range<usize>>,
}

enum Memory {
    /// All of every bucket; where the update is sharded, it is gathered in place.
    Whole(Vec<Held<Buffer>>),
    /// Shards in the arena, gathered by copy into slots.
    Slots { shards: Vec<Option<Buffer>>, slots: Vec<WeightSlot> },
    /// One window for each bucket; the plan's slot is the bucket.
    Windows(Vec<Held<Window>>),
}

struct WeightSlot {
    held: Held<Gathered, (Buffer, Buffer)>,
    bucket: usize,
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
        buckets: Arc<Buckets>,
    ) -> Result<WeightStore, Error> {
        let allocate = |len| Axes::allocate(axes.shard.as_ref(), device, policy.weights, len);
        let memory = match (policy.sharded.parameters, policy.gather, &axes.shard) {
            (true, Gather::Window, Some(group)) => {
                let window = |bucket: &Bucket| {
                    Ok(Held::Here(match &bucket.sections {
                        Some(sections) => group.window_of(device, policy.weights, sections)?,
                        None => group.window(device, policy.weights, bucket.padded)?,
                    }))
                };
                Memory::Windows(buckets.buckets.iter().map(window).collect::<Result<_, Error>>()?)
            }
            (true, _, _) => {
                let shard = |bucket: &Bucket| Ok(Some(allocate(bucket.shard)?));
                let slots = outline.weights.as_ref().expect("sharded weights are gathered into slots");
                let slot = |len: usize| {
                    let buffer = device.allocate(policy.weights, len)?;
                    Ok(WeightSlot { held: Held::Here(Gathered { shard: None, buffer }), bucket: 0 })
                };
                Memory::Slots {
                    shards: buckets.buckets.iter().map(shard).collect::<Result<_, Error>>()?,
                    slots: slots
                        .lens(&outline.bucket_lens(layout))
                        .into_iter()
                        .map(slot)
                        .collect::<Result<_, Error>>()?,
                }
            }
            (false, _, _) => {
                let whole = |bucket: &Bucket| Ok(Held::Here(allocate(bucket.padded)?));
                Memory::Whole(buckets.buckets.iter().map(whole).collect::<Result<_, Error>>()?)
            }
        };
        let number = axes.shard_number();
        let shard = |place: &InBucket| {
            let (start, len) = (place.full.start, place.shard.len());
            start + number * len..start + (number + 1) * len
        };
        let shards = buckets.places.iter().map(shard).collect();
        Ok(WeightStore { memory, dtype: policy.weights, buckets, shards })
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
                let here = windows.iter().zip(&self.buckets.buckets).filter(|(window, _)| window.here().is_some());
                (here.map(|(_, bucket)| (bucket.shard * self.dtype.bytes()) as u64).sum(), 0)
            }
        }
    }

    /// Starts to gather a bucket into a slot.
    pub(crate) fn gather(&mut self, group: &Communicator, bucket: usize, slot: usize, after: Event) {
        let sections = &self.buckets.buckets[bucket].sections;
        match &mut self.memory {
            Memory::Slots { shards, slots } => {
                let slot = &mut slots[slot];
                let shard = shards[bucket].take().expect(LOST);
                let output = slot.held.take().buffer;
                slot.bucket = bucket;
                slot.held = Held::Moving(match sections {
                    Some(sections) => group.all_gather_sections(sections, shard, output, after),
                    None => group.all_gather(shard, output, after),
                });
            }
            Memory::Windows(windows) => {
                let window = windows[bucket].take();
                windows[bucket] = Held::Moving(group.gather_window(window, after));
            }
            Memory::Whole(whole) => {
                let buffer = whole[bucket].take();
                whole[bucket] = Held::Moving(match sections {
                    Some(sections) => group.all_gather_sections_in_place(sections, buffer, after),
                    None => group.all_gather_in_place(buffer, after),
                });
            }
        }
    }

    /// Orders `stream` after the gather of a bucket.
    pub(crate) fn bring(&mut self, bucket: usize, slot: usize, stream: &dyn Stream) -> Result<(), Error> {
        match &mut self.memory {
            Memory::Slots { shards, slots } => {
                let slot = &mut slots[slot];
                slot.held.bring(stream)?;
                if let Some(shard) = slot.held.get_mut().shard.take() {
                    shards[slot.bucket] = Some(shard);
                }
                Ok(())
            }
            Memory::Windows(windows) => windows[bucket].bring(stream),
            Memory::Whole(whole) => whole[bucket].bring(stream),
        }
    }

    /// A gathered unit, with padding.
    pub(crate) fn gathered(&self, unit: usize, slot: usize) -> View<'_> {
        let InBucket { bucket, full, .. } = &self.buckets.places[unit];
        let all = match &self.memory {
            Memory::Slots { slots, .. } => slots[slot].held.get().buffer.view(),
            Memory::Windows(windows) => windows[*bucket].get().view().expect("a plan gathers what it reads"),
            Memory::Whole(whole) => whole[*bucket].get().view(),
        };
        all.slice(full.clone())
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
        let InBucket { bucket, section, shard, .. } = &self.buckets.places[unit];
        match &self.memory {
            Memory::Slots { shards, .. } => shards[*bucket].as_ref().expect(LOST).slice(shard.clone()),
            Memory::Windows(windows) => {
                windows[*bucket].get().shard(*section).expect("a window has a section for each unit")
            }
            Memory::Whole(whole) => whole[*bucket].get().slice(self.shards[unit].clone()),
        }
    }

    /// This rank's shard of a unit, for writing.
    pub(crate) fn shard_mut(&mut self, unit: usize) -> Result<ViewMut<'_>, Error> {
        let InBucket { bucket, section, shard, .. } = &self.buckets.places[unit];
        match &mut self.memory {
            Memory::Slots { shards, .. } => Ok(shards[*bucket].as_mut().expect(LOST).slice_mut(shard.clone())),
            Memory::Windows(windows) => Ok(windows[*bucket].get_mut().shard_mut(*section)?),
            Memory::Whole(whole) => Ok(whole[*bucket].get_mut().slice_mut(self.shards[unit].clone())),
        }
    }
}
