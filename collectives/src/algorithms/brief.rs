//! All-reduce on one host of an operand so brief that it lies beside the steps, on the one cache line that a peer looks at anyway. One step:
//! then every rank combines all operands itself, in order of rank. A rank reads (P−1)·S and writes S: for a few bytes what counts is the
//! number of cache lines that change hands, one from each rank, which is the least there can be.

use pillion_kernels::cpu::reduce;
use pillion_kernels::exclusive;

use super::folds::{Addresses, Combination};
use crate::Error;
use crate::call::{Kind, call};
use crate::engine::flight::{Algorithm, Opening, Peers, Progress};
use crate::hosts::Hosts;
use crate::memory::control::{BRIEF, Call};
use crate::memory::place::Place;
use crate::request::Operands;

/// An all-reduce of at most [`BRIEF`] words.
pub(crate) struct BriefAllReduce {
    operands: Operands,
    len: usize,
    combination: Combination,
}

impl BriefAllReduce {
    /// Whether operands of `bytes` bytes are reduced like this: the same on every rank, since it follows from the call.
    pub(crate) fn fits(hosts: &Hosts, bytes: usize) -> bool {
        bytes <= 8 * BRIEF && hosts.ranks.len() == 1
    }

    /// output = combination over p of the input of rank p, `len` elements.
    pub(crate) fn new(operands: Operands, len: usize, combination: Combination) -> BriefAllReduce {
        BriefAllReduce { operands, len, combination }
    }

    fn deferred(&self) -> bool {
        self.operands.input.as_ref().is_some_and(|span| span.deferred())
    }
}

impl Algorithm for BriefAllReduce {
    fn call(&self) -> Call {
        let detail = self.combination.detail(None, 0);
        call(Kind::AllReduce, Some(self.operands.dtype), self.deferred(), self.len, detail)
    }

    fn begin(&mut self, _peers: &mut Peers<'_>) -> Result<Opening, Error> {
        let _access = exclusive(self.deferred());
        let mut opening = Opening::new(Place::Header, Place::None);
        if let Some(input) = &self.operands.input {
            let bytes = input.len() * self.operands.dtype.bytes();
            assert!(bytes <= size_of_val(&opening.brief));
            // SAFETY: the operand is this operation's, and fits by the assertion.
            unsafe { input.address().as_ptr().copy_to_nonoverlapping(opening.brief.as_mut_ptr().cast(), bytes) };
        }
        Ok(opening)
    }

    fn exchange(&mut self, _step: u32, peers: &mut Peers<'_>) -> Result<Progress, Error> {
        let Some(output) = self.operands.output.as_ref().filter(|output| !output.is_empty()) else {
            return Ok(Progress::Done);
        };
        assert!(self.len <= output.len() && self.len * self.operands.dtype.bytes() <= 8 * BRIEF);
        let _access = exclusive(self.deferred());
        let inputs: Addresses<*const u8> = (0..peers.world()).map(|rank| peers.brief(rank).as_ptr().cast()).collect();
        let job = reduce::Fold {
            output: self.combination.output,
            groups: self.combination.groups,
            inputs: &inputs,
            outputs: &[output.address().as_ptr()],
            count: self.len,
            ..self.combination.reduction.whole(self.operands.dtype, self.combination.world)
        };
        // SAFETY: every rank's operand lies beside its steps, whole by the assertion. A rank writes there again for the operation after the next,
        // which it starts once all ranks have taken their first step of the next, after this. The output is this operation's.
        unsafe { reduce::fold(&job) };
        Ok(Progress::Done)
    }

    fn bytes_sent(&self, world: usize) -> u64 {
        ((world - 1) * self.len * self.operands.dtype.bytes()) as u64
    }
}
