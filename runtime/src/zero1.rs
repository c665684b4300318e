//! ZeRO-1 (Rajbhandari et al. 2020) over one flat array of parameters that its owner keeps: for
//! trainers with a loop of their own, which compute gradients and leave the rest.

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use pillion_collectives::{Communicator, Parts, Reduction, Start};
use pillion_kernels::{AdamW, Buffer, DType, Device, Stream};

use crate::{Error, StepReport};

/// Elements of a rank's part are a multiple of this, as long as there are enough: a cache line.
const ALIGNMENT: usize = 16;

/// The optimizer's state of `n` parameters, divided among the ranks. In a step each rank sums its
/// part of the gradients, updates its part of the parameters, and gathers the others'.
pub struct Zero1 {
    communicator: Arc<Communicator>,
    stream: Box<dyn Stream>,
    /// `[n]` f32 each. None once an operation has failed and kept them.
    memory: Option<(Buffer, Buffer)>,
    lengths: Vec<usize>,
    own: Range<usize>,
    /// `[own]` f32 each: the summed gradient, AdamW's moments.
    sum: Option<Buffer>,
    m: Buffer,
    v: Buffer,
    /// `[1]` f32.
    scale: Buffer,
    /// `[2]` f64: a square norm, and how many elements are not finite.
    norm: Buffer,
    updates: u64,
    clip: Option<f64>,
}

impl Zero1 {
    /// For parameters and gradients, `[n]` f32 each in memory of `device`, which its owner, or
    /// [`Zero1::memory`], reads and writes between calls. The parameters become those of rank 0. A
    /// gradient longer than `clip` is scaled down to it. Every rank calls, with as many parameters.
    ///
    /// # Errors
    /// [`Error::Policy`] for other types or lengths, or a limit that is not positive;
    /// [`Error::Device`] where there is no memory; another rank's failure.
    pub fn new(
        communicator: Arc<Communicator>,
        device: &dyn Device,
        params: Buffer,
        grads: Buffer,
        clip: Option<f64>,
    ) -> Result<Zero1, Error> {
        if [&params, &grads].iter().any(|buffer| buffer.dtype() != DType::F32) || params.len() != grads.len() {
            return Err(Error::Policy(format!(
                "parameters {params:?} and gradients {grads:?}: give as many of each, of f32"
            )));
        }
        if clip.is_some_and(|clip| clip.is_nan() || clip <= 0.0) {
            return Err(Error::Policy(format!("a limit of the gradient's norm of {clip:?}: give a positive one")));
        }
        let (n, world) = (params.len(), communicator.world());
        let part = n.div_ceil(world).next_multiple_of(ALIGNMENT);
        let bound = |rank: usize| (rank * part).min(n);
        let own = bound(communicator.rank())..bound(communicator.rank() + 1);
        let lengths = (0..world).map(|rank| bound(rank + 1) - bound(rank)).collect();
        let state = || device.allocate(DType::F32, own.len());
        let (sum, m, v) = (state()?, state()?, state()?);
        let (scale, norm) = (device.allocate(DType::F32, 1)?, device.allocate(DType::F64, 2)?);
        let params = communicator.broadcast(params, 0, Start::Here).wait()?;
        Ok(Zero1 {
            communicator,
            stream: device.stream(),
            memory: Some((params, grads)),
            lengths,
            own,
            sum: Some(sum),
            m,
            v,
            scale,
            norm,
            updates: 0,
            clip,
        })
    }

    /// Sums the ranks' gradients, and updates the parameters with their mean over tokens. Gradients
    /// are those of the loss summed over this rank's `tokens` tokens, which is `loss_sum`; they are
    /// not zeroed. Weight decay applies to all parameters. Every rank calls.
    ///
    /// # Errors
    /// [`Error::NonFinite`] and [`Error::NoTokens`] with the parameters as they were; another rank's
    /// failure, after which the parameters are invalid.
    pub fn step(&mut self, settings: &AdamW, loss_sum: f64, tokens: u64) -> Result<StepReport, Error> {
        let traffic = self.communicator.traffic();
        let (Some((params, grads)), Some(sum)) = (self.memory.take(), self.sum.take()) else {
            return Err(Error::Poisoned);
        };
        self.stream.square_norm(self.norm.view_mut(), grads.view(), 1.0);
        let mut local = [0.0; 2];
        self.stream.read(self.norm.view(), &mut local)?;
        let began_reducing = Instant::now();
        let parts = Parts::cut(grads, &self.lengths)?;
        let reduced = self.communicator.reduce_scatter_v(parts, sum, Reduction::Sum, Start::Here).wait();
        let (parts, sum) = reduced?;
        let mut exposed = began_reducing.elapsed();
        let grads = parts.into_buffers().remove(0);
        self.stream.square_norm(self.norm.view_mut(), sum.view(), 1.0);
        let mut summed = [0.0; 2];
        self.stream.read(self.norm.view(), &mut summed)?;
        let own_tokens = tokens as f64;
        // A rank without tokens is no group.
        let group = if tokens > 0 { local[0] / own_tokens } else { 0.0 };
        let mut sums = [summed[0], group, own_tokens, local[1] + summed[1], loss_sum];
        let agreeing = Instant::now();
        self.communicator.all_reduce_scalars(&mut sums, Reduction::Sum)?;
        exposed += agreeing.elapsed();
        let [square_norm, group_square_norms, tokens, non_finite, loss_sum] = sums;
        let number = self.updates + 1;
        let refused = if non_finite > 0.0 || !loss_sum.is_finite() {
            Some(Error::NonFinite { step: number, count: non_finite as u64, loss: loss_sum / tokens })
        } else if tokens == 0.0 {
            Some(Error::NoTokens { step: number })
        } else {
            None
        };
        if let Some(refused) = refused {
            (self.memory, self.sum) = (Some((params, grads)), Some(sum));
            return Err(refused);
        }
        let gradient_norm = square_norm.sqrt() / tokens;
        let clip = match self.clip {
            Some(limit) if gradient_norm > limit => limit / gradient_norm,
            _ => 1.0,
        };
        let mut params = params;
        self.stream.upload(self.scale.view_mut(), &[(clip / tokens) as f32]);
        self.stream.adamw(
            None,
            params.slice_mut(self.own.clone()),
            self.m.view_mut(),
            self.v.view_mut(),
            sum.view(),
            self.scale.view(),
            *settings,
            number,
        );
        self.stream.synchronize()?;
        let gathering = Instant::now();
        let parts = Parts::cut(params, &self.lengths)?;
        let params = self.communicator.all_gather_v_in_place(parts, Start::Here).wait()?.into_buffers().remove(0);
        exposed += gathering.elapsed();
        (self.memory, self.sum, self.updates) = (Some((params, grads)), Some(sum), number);
        let now = self.communicator.traffic();
        Ok(StepReport {
            loss_sum,
            tokens,
            gradient_norm,
            square_norm,
            group_square_norms: Some(group_square_norms),
            comparison: None,
            exposed,
            host_waits: 0,
            operations: now.operations - traffic.operations,
            bytes: now.bytes - traffic.bytes,
        })
    }

    /// Parameters and gradients, `[n]` f32 each.
    ///
    /// # Errors
    /// [`Error::Poisoned`] when an operation has failed.
    pub fn memory(&mut self) -> Result<(&mut Buffer, &mut Buffer), Error> {
        self.memory.as_mut().map(|(params, grads)| (params, grads)).ok_or(Error::Poisoned)
    }

    /// The parameters that this rank updates.
    pub fn own(&self) -> Range<usize> {
        self.own.clone()
    }

    /// AdamW's moments of the parameters that this rank updates, `[own]` f32 each, and the number of
    /// updates: what a checkpoint needs besides the parameters.
    pub fn state(&self) -> (&Buffer, &Buffer, u64) {
        (&self.m, &self.v, self.updates)
    }

    /// The same, to be written.
    pub fn state_mut(&mut self) -> (&mut Buffer, &mut Buffer, &mut u64) {
        (&mut self.m, &mut self.v, &mut self.updates)
    }
}
