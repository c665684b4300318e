//! The numbers of a step that the host needs: collected on the device, and read once.

use std::ops::Range;

use pillion_kernels::{Buffer, DType, Device, Failure, Stream, View, ViewMut};

use crate::gradients::sideband;

/// Numbers of each unit, f64.
pub(crate) struct Summary {
    units: usize,
    /// Numbers of a unit's comparison, where groups are compared.
    compared: usize,
    device: Buffer,
    host: Vec<f64>,
}

/// Of a square norm: the sum, and the count of values that are not finite.
const NORM: usize = 2;

impl Summary {
    pub(crate) fn new(device: &dyn Device, units: usize, compared: usize) -> Result<Summary, pillion_kernels::Error> {
        let len = units * (NORM + sideband::LEN + compared);
        Ok(Summary { units, compared, device: device.allocate(DType::F64, len)?, host: vec![0.0; len] })
    }

    fn norm_range(&self, unit: usize) -> Range<usize> {
        unit * NORM..(unit + 1) * NORM
    }

    fn totals_range(&self, unit: usize) -> Range<usize> {
        let start = self.units * NORM + unit * sideband::LEN;
        start..start + sideband::LEN
    }

    fn compared_range(&self, unit: usize) -> Range<usize> {
        let start = self.units * (NORM + sideband::LEN) + unit * self.compared;
        start..start + self.compared
    }

    /// Where the square norm of this rank's part of a unit's gradient goes.
    pub(crate) fn norm_mut(&mut self, unit: usize) -> ViewMut<'_> {
        let range = self.norm_range(unit);
        self.device.slice_mut(range)
    }

    /// Collects the totals of a unit's sidebands.
    pub(crate) fn collect_totals(&mut self, unit: usize, totals: View<'_>, stream: &dyn Stream) {
        let range = self.totals_range(unit);
        stream.copy(self.device.slice_mut(range), totals);
    }

    /// Collects what a unit's comparison has found.
    pub(crate) fn collect_comparison(&mut self, unit: usize, found: View<'_>, stream: &dyn Stream) {
        let range = self.compared_range(unit);
        stream.copy(self.device.slice_mut(range), found);
    }

    /// Brings all that was collected to the host, which waits for the stream.
    pub(crate) fn read(&mut self, stream: &dyn Stream) -> Result<(), Failure> {
        stream.read(self.device.view(), &mut self.host)
    }

    /// A unit's square norm and count, as read.
    pub(crate) fn norm(&self, unit: usize) -> &[f64] {
        &self.host[self.norm_range(unit)]
    }

    /// The totals of a unit's sidebands, as read.
    pub(crate) fn totals(&self, unit: usize) -> &[f64] {
        &self.host[self.totals_range(unit)]
    }

    /// What a unit's comparison has found, as read.
    pub(crate) fn comparison(&self, unit: usize) -> &[f64] {
        &self.host[self.compared_range(unit)]
    }
}
