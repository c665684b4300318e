//! Gradients: slots that backward passes add to, and this rank's shards of their sums.

use std::sync::Arc;

use pillion_collectives::{Communicator, Observation, Pending, Reduce, Reduction, Sideband, Summand, Sums};
use pillion_kernels::cpu::observe::Observer;
use pillion_kernels::{Buffer, DType, Device, Event, Stream, View, ViewMut};

use crate::axes::Axes;
use crate::buckets::{Bucket, Buckets, InBucket};
use crate::engine::bytes;
use crate::weights::LOST;
use crate::{Error, Layout, Outline, Policy};

/// Numbers that ride with a unit's gradient: what a sideband holds, in order.
pub(crate) mod sideband {
    use std::ops::Range;

    /// Σ over groups of ‖gradient‖² / tokens, and the number of values that were not finite.
    pub(crate) const SQUARE_NORM: Range<usize> = 0..2;
    /// Sum of the losses.
    pub(crate) const LOSS: Range<usize> = 2..3;
    /// What a collective carries beside a gradient; the last number is not used.
    pub(crate) const LEN: usize = 4;

    /// The numbers of a bucket's unit.
    pub(crate) fn of(section: usize) -> Range<usize> {
        section * LEN..(section + 1) * LEN
    }
}

/// By default without slots: where nothing is trained.
#[derive(Default)]
pub(crate) struct GradientStore {
    slots: Vec<Slot>,
    /// The sums of each bucket, `[shard]`. None at all where nothing is sharded: then a bucket's
    /// slot becomes its sum.
    sums: Vec<Sum>,
    buckets: Arc<Buckets>,
}

/// What a collective has is None here until the flight is over.
struct Slot {
    /// f32.
    gradient: Option<Buffer>,
    /// The gradient as it travels, where that is narrower.
    narrow: Option<Buffer>,
    is_narrow: bool,
    sideband: Option<Buffer>,
    flight: Option<Flight>,
}

enum Flight {
    /// To the shards.
    Scatter(Pending<Summand>),
    /// Over the groups, in place.
    Sum(Pending<Buffer>),
    /// Over the groups, from the narrow buffer into the gradient.
    Widen(Pending<(Buffer, Buffer)>),
}

struct Sum {
    gradient: Option<Buffer>,
    /// Sums of the sidebands.
    totals: Option<Buffer>,
    /// What a comparison of the ranks' gradients with the sum has found; made when it is first wanted.
    compared: Option<Buffer>,
    /// To the shards, and then over the groups.
    flight: Option<Pending<Sums>>,
    comparing: Option<Pending<Observation>>,
}

impl GradientStore {
    pub(crate) fn new(
        axes: &Axes,
        device: &dyn Device,
        layout: &Layout,
        policy: &Policy,
        outline: &Outline,
        buckets: Arc<Buckets>,
    ) -> Result<GradientStore, Error> {
        let shared = axes.shard.as_ref().or(axes.replicate.as_ref());
        let is_narrow = policy.reduce != DType::F32 && axes.mesh.world() > 1;
        let slot = |len: usize| {
            // What travels lies where peers can read it; a sum over the groups that is wider than that is written there too.
            let widened = is_narrow && axes.shard.is_none();
            let gradient = match is_narrow && !widened {
                true => device.allocate(DType::F32, len)?,
                false => Axes::allocate(shared, device, DType::F32, len)?,
            };
            let narrow = is_narrow.then(|| Axes::allocate(shared, device, policy.reduce, len)).transpose()?;
            let sideband = Some(device.allocate(DType::F64, sideband::LEN * buckets.most_units())?);
            Ok(Slot { gradient: Some(gradient), narrow, is_narrow, sideband, flight: None })
        };
        let sum = |bucket: &Bucket| {
            let gradient = Axes::allocate(axes.replicate.as_ref(), device, DType::F32, bucket.shard)?;
            let totals = device.allocate(DType::F64, sideband::LEN * bucket.units.len())?;
            Ok(Sum { gradient: Some(gradient), totals: Some(totals), compared: None, flight: None, comparing: None })
        };
        let lens = outline.bucket_lens(layout);
        let lens = outline.gradients.as_ref().map_or(lens.clone(), |slots| slots.lens(&lens));
        let slots = lens.into_iter().map(slot).collect::<Result<_, Error>>()?;
        let sums: Result<_, Error> =
            if outline.sharded { buckets.buckets.iter().map(sum).collect() } else { Ok(Vec::new()) };
        Ok(GradientStore { slots, sums: sums?, buckets })
    }

    /// Bytes of slots, and of shards of the sums. Between steps.
    pub(crate) fn bytes(&self) -> (u64, u64) {
        let slots = self.slots.iter().flat_map(|slot| [&slot.gradient, &slot.narrow]);
        let sums = self.sums.iter().map(|sum| &sum.gradient);
        (slots.flatten().map(bytes).sum(), sums.flatten().map(bytes).sum())
    }

    /// Orders `stream` after what a slot's last reduction reads. The `first` to add to a unit's
    /// part zeroes it.
    pub(crate) fn open(&mut self, slot: usize, unit: usize, first: bool, stream: &dyn Stream) -> Result<(), Error> {
        self.bring(slot, stream)?;
        if first {
            let (gradient, sideband) = self.opened(slot, unit);
            stream.zero(gradient);
            stream.zero(sideband);
        }
        Ok(())
    }

    /// A unit's part of an open slot, and of its sideband.
    pub(crate) fn opened(&mut self, slot: usize, unit: usize) -> (ViewMut<'_>, ViewMut<'_>) {
        let Slot { gradient, sideband, .. } = &mut self.slots[slot];
        let InBucket { section, full, .. } = &self.buckets.places[unit];
        let gradient = gradient.as_mut().expect(LOST).slice_mut(full.clone());
        (gradient, sideband.as_mut().expect(LOST).slice_mut(sideband::of(*section)))
    }

    /// Rounds a unit's complete gradient to the type in which it travels. With a `weight` it takes
    /// that times the square norm of what will travel, of `len` elements, into the unit's sideband.
    pub(crate) fn complete(&mut self, slot: usize, unit: usize, len: usize, weight: Option<f64>, stream: &dyn Stream) {
        let Slot { gradient, narrow, sideband, .. } = &mut self.slots[slot];
        let InBucket { section, full, .. } = &self.buckets.places[unit];
        let gradient = gradient.as_ref().expect(LOST);
        if let Some(narrow) = narrow {
            stream.cast(narrow.slice_mut(full.clone()), gradient.slice(full.clone()));
        }
        if let Some(weight) = weight {
            let travels = narrow.as_ref().unwrap_or(gradient).slice(full.start..full.start + len);
            let sideband = sideband.as_mut().expect(LOST).slice_mut(sideband::of(*section));
            stream.square_norm(sideband.slice(sideband::SQUARE_NORM), travels, weight);
        }
    }

    /// Makes room for comparisons of ranks' gradients with their sum, so many numbers for each
    /// unit.
    pub(crate) fn compare(&mut self, device: &dyn Device, numbers: usize) -> Result<(), Error> {
        let sums = self.sums.iter_mut().zip(&self.buckets.buckets);
        for (sum, bucket) in sums.filter(|(sum, _)| sum.compared.is_none()) {
            let len = bucket.units.len() * numbers;
            sum.compared = Some(device.allocate(DType::F64, len)?);
        }
        Ok(())
    }

    /// What a unit's comparison has found.
    pub(crate) fn compared(&self, unit: usize) -> View<'_> {
        let InBucket { bucket, section, .. } = &self.buckets.places[unit];
        let compared = self.sums[*bucket].compared.as_ref().expect(LOST);
        let len = compared.len() / self.buckets.buckets[*bucket].units.len();
        compared.slice(section * len..(section + 1) * len)
    }

    /// Starts to sum a slot's gradients over the ranks of a group into a bucket's shard, or to add
    /// them there after an earlier reduction of the bucket; with an `observer`, to compare what is
    /// summed with the sum.
    pub(crate) fn reduce(
        &mut self,
        group: &Communicator,
        bucket: usize,
        slot: usize,
        accumulate: bool,
        observer: Option<Arc<dyn Observer>>,
        after: Event,
    ) {
        let sum = &mut self.sums[bucket];
        let slot = &mut self.slots[slot];
        let input = if slot.is_narrow { slot.narrow.take() } else { slot.gradient.take() }.expect(LOST);
        let sections = self.buckets.buckets[bucket].sections.clone();
        let own = slot.sideband.take().expect(LOST);
        if let Some(earlier) = sum.flight.take() {
            assert!(accumulate, "a bucket's first reduction of a step finds the sums of the last step at rest");
            let summand = Summand { input, own: Some(own) };
            let (summand, sums) = group.reduce_scatter_onto(summand, sections, earlier, Reduction::Sum, after);
            slot.flight = Some(Flight::Scatter(summand));
            sum.flight = Some(sums);
            return;
        }
        let (output, totals) = (sum.gradient.take().expect(LOST), sum.totals.take().expect(LOST));
        let sideband = Some(Sideband { own, totals });
        let reduce = Reduce { input, sections, output, reduction: Reduction::Sum, accumulate, sideband };
        let reduce = match observer {
            None => group.reduce_scatter(reduce, after),
            Some(observer) => {
                let observation = Observation { totals: sum.compared.take().expect(LOST), observer };
                let (reduce, observation) = group.reduce_scatter_observed(reduce, observation, after).split();
                sum.comparing = Some(observation);
                reduce
            }
        };
        let (summand, sums) = reduce.split();
        slot.flight = Some(Flight::Scatter(summand));
        sum.flight = Some(sums);
    }

    /// Starts to sum a bucket over the groups: its shard, once that is reduced, or its slot where
    /// there are no shards.
    pub(crate) fn all_reduce(&mut self, groups: &Arc<Communicator>, bucket: usize, after: Event) {
        if self.sums.is_empty() {
            let slot = &mut self.slots[bucket];
            let gradient = slot.gradient.take().expect(LOST);
            slot.flight = Some(match slot.narrow.take() {
                Some(narrow) => Flight::Widen(groups.all_reduce_into(narrow, gradient, Reduction::Sum, after)),
                None => Flight::Sum(groups.all_reduce(gradient, Reduction::Sum, after)),
            });
            return;
        }
        let sum = &mut self.sums[bucket];
        let reduced = sum.flight.take().expect("a shard is reduced before it is summed over the groups");
        sum.flight = Some(groups.all_reduce_sums(reduced, Reduction::Sum));
    }

    /// Blocks the host until every reduction under way has ended. They keep their buffers.
    pub(crate) fn wait(&self) -> Result<(), Error> {
        let slots = self.slots.iter().filter_map(|slot| slot.flight.as_ref().map(Flight::event));
        let sums = self
            .sums
            .iter()
            .flat_map(|sum| [sum.flight.as_ref().map(Pending::event), sum.comparing.as_ref().map(Pending::event)]);
        Ok(slots.chain(sums.flatten()).try_for_each(|event| event.wait())?)
    }

    /// Orders `stream` after every reduction.
    pub(crate) fn bring_all(&mut self, stream: &dyn Stream) -> Result<(), Error> {
        (0..self.slots.len()).try_for_each(|slot| self.bring(slot, stream))?;
        self.sums.iter_mut().try_for_each(|sum| sum.bring(stream))
    }

    /// A unit's summed gradient, `[shard]`, and the totals of its sidebands over the ranks of the group.
    pub(crate) fn sums(&self, unit: usize) -> (View<'_>, View<'_>) {
        let InBucket { bucket, section, full, shard } = &self.buckets.places[unit];
        let (gradient, range, totals) = match self.sums.get(*bucket) {
            Some(sum) => (&sum.gradient, shard, &sum.totals),
            None => (&self.slots[*bucket].gradient, full, &self.slots[*bucket].sideband),
        };
        let totals = totals.as_ref().expect(LOST).slice(sideband::of(*section));
        (gradient.as_ref().expect(LOST).slice(range.clone()), totals)
    }

    fn bring(&mut self, slot: usize, stream: &dyn Stream) -> Result<(), Error> {
        let slot = &mut self.slots[slot];
        match slot.flight.take() {
            None => {}
            Some(Flight::Scatter(pending)) => {
                let Summand { input, own } = pending.then(stream)?;
                *(if slot.is_narrow { &mut slot.narrow } else { &mut slot.gradient }) = Some(input);
                slot.sideband = own;
            }
            Some(Flight::Sum(pending)) => slot.gradient = Some(pending.then(stream)?),
            Some(Flight::Widen(pending)) => {
                let (narrow, gradient) = pending.then(stream)?;
                (slot.narrow, slot.gradient) = (Some(narrow), Some(gradient));
            }
        }
        Ok(())
    }
}

impl Flight {
    fn event(&self) -> Event {
        match self {
            Flight::Scatter(pending) => pending.event(),
            Flight::Sum(pending) => pending.event(),
            Flight::Widen(pending) => pending.event(),
        }
    }
}

impl Sum {
    /// Orders `stream` after the reduction that has it, if one does.
    fn bring(&mut self, stream: &dyn Stream) -> Result<(), Error> {
        if let Some(pending) = self.flight.take() {
            let Sums { output, totals } = pending.then(stream)?;
            (self.gradient, self.totals) = (Some(output), totals);
        }
        if let Some(pending) = self.comparing.take() {
            self.compared = Some(pending.then(stream)?.totals);
        }
        Ok(())
    }
}
