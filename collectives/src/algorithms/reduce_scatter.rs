//! Reduce-scatter in one pass: after one step rank r reads chunk r of all P inputs in place and writes their sum. Every rank
//! reads S and writes S/P, the lower bound; nothing is staged, and each sum is rounded once.
//!
//! The sideband travels in the header: no operation more, no buffer more.

use pillion_kernels::cpu::reduce;
use pillion_kernels::{DType, Span, exclusive};

use super::peer_slice;
use crate::Error;
use crate::shm::control::PAYLOAD;
use crate::shm::flight::{Collective, Kind, Peers};

/// Numbers in a sideband.
pub(crate) const SIDEBAND: usize = 4;

pub(crate) struct ReduceScatter {
    pub(crate) world: usize,
    pub(crate) input: Span,
    pub(crate) offset: u64,
    pub(crate) output: Span,
    pub(crate) sideband: Span,
    pub(crate) totals: Span,
    pub(crate) accumulate: bool,
}

impl Collective for ReduceScatter {
    fn kind(&self) -> Kind {
        Kind::ReduceScatter
    }

    fn dtype(&self) -> Option<DType> {
        Some(self.input.dtype())
    }

    fn is_deferred(&self) -> bool {
        self.input.deferred()
    }

    fn count(&self) -> usize {
        self.world * self.output.len()
    }

    fn offset(&self) -> u64 {
        self.offset
    }

    fn payload(&mut self, words: &mut [u64; PAYLOAD]) -> usize {
        let _access = exclusive(self.sideband.deferred());
        // SAFETY: this operation owns the sideband, and its event has happened.
        let sideband = unsafe { self.sideband.as_slice::<f64>() };
        for (word, value) in words.iter_mut().zip(sideband) {
            *word = value.to_bits();
        }
        SIDEBAND
    }

    fn exchanges(&self) -> u32 {
        1
    }

    fn is_read_by_peers(&self) -> bool {
        true
    }

    fn exchange(&mut self, _step: u32, peers: &Peers<'_>) -> Result<(), Error> {
        let _access = exclusive(self.output.deferred());
        // SAFETY: this operation owns the totals.
        let totals = unsafe { self.totals.as_mut_slice::<f64>() };
        for (index, total) in totals.iter_mut().enumerate() {
            let sum: f64 = (0..peers.world()).map(|rank| f64::from_bits(peers.payload(rank, index))).sum();
            *total = if self.accumulate { *total + sum } else { sum };
        }
        let (first, count) = (peers.rank() * self.output.len(), self.output.len());
        /// Sums one chunk of every rank with the given function and types.
        macro_rules! sum {
            ($sum:path, $input:ty, $output:ty) => {{
                // SAFETY: every rank's operation owns its input until its last step, which it takes after this rank's exchange.
                let inputs = (0..peers.world()).map(|rank| unsafe { peer_slice::<$input>(peers, rank, first, count) });
                let inputs = inputs.collect::<Result<Vec<_>, Error>>()?;
                // SAFETY: this operation owns the output, which is no part of any rank's input.
                $sum(unsafe { self.output.as_mut_slice::<$output>() }, &inputs, self.accumulate)
            }};
        }
        match self.input.dtype() {
            DType::F32 => sum!(reduce::sum_f32, f32, f32),
            DType::F64 => sum!(reduce::sum_f64, f64, f64),
            DType::Bf16 => sum!(reduce::sum_bf16_to_f32, half::bf16, f32),
            DType::U32 => panic!("a reduce-scatter of {}", self.input.dtype()),
        }
        Ok(())
    }

    fn bytes_sent(&self, world: usize) -> u64 {
        ((world - 1) * self.output.len() * self.input.dtype().bytes()) as u64
    }
}
