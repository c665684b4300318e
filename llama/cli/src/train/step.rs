//! One optimizer step of a run.

use std::collections::BTreeMap;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use pillion_abs::Observation;

use super::metrics::Line;
use super::run::Run;
use super::{statistics, stopping};
use crate::Error;

/// What came of a step.
pub(super) enum Outcome {
    /// An update; whether any rank was asked to stop.
    Made(Box<Line>, bool),
    /// A gradient or loss that is not finite, for which nothing was updated. The samples of the
    /// batch are still to be accounted for.
    NonFinite { error: Error, batch: u64, stopped: bool },
    /// No token of the batch counts, because all are masked.
    Masked { batch: u64, stopped: bool },
}

impl Run<'_> {
    /// One optimizer step: micro-batches are dealt to ranks in turn.
    pub(super) fn step(&mut self, stop: &AtomicBool) -> Result<Outcome, Error> {
        if let Some(breakdown) = &self.processor.breakdown {
            breakdown.begin_step();
        }
        let started = Instant::now();
        let (rank, world) = (self.communicator.rank() as u64, self.communicator.world() as u64);
        let recipe = &self.start.recipe;
        let micro_batch = recipe.micro_batch;
        let batch = self.controller.batch().min(recipe.schedule.samples - self.progress.samples);
        let micro_batches = batch / micro_batch;
        let rounds = micro_batches.div_ceil(world);
        let lr = recipe.lr(batch, self.progress.samples + batch);
        let whole_gradients = !self.engine.policy().sharded.gradients;
        let mut step = self.engine.begin(rounds as usize)?;
        // Micro-batches of this rank, and those of them in which no token counts.
        let (mut own, mut masked) = (0u64, 0u64);
        for round in 0..rounds {
            let index = round * world + rank;
            if index >= micro_batches {
                step.idle_round()?;
                continue;
            }
            let first = |index| self.progress.samples + index * micro_batch;
            // After the last of this step, the next step's first, as long as nothing is left out.
            let next = if index + world < micro_batches { first(index + world) } else { first(micro_batches + rank) };
            let next = (next < recipe.schedule.samples).then_some(next);
            let batch = self.samples.take(first(index), next)?;
            (own, masked) = (own + 1, masked + u64::from(batch.is_masked()));
            self.model.train(&mut step, &batch.inputs, &batch.targets, batch.documents().as_ref())?;
        }
        let decided = self.controller.batch() as f64;
        let no_groups = if whole_gradients { u64::from(own > 0 && own == masked) } else { masked };
        let stops = f64::from(u8::from(stopping(stop)));
        let mut asked = [stops, self.saver.request(), decided, decided * decided, no_groups as f64];
        let report = match step.finish(&self.groups.adamw(recipe.adamw(lr)), &mut asked) {
            Err(error @ (pillion_runtime::Error::NonFinite { .. } | pillion_runtime::Error::NoTokens { .. })) => {
                Err(error)
            }
            report => Ok(report?),
        };
        // What ranks asked of each other was summed in either case.
        statistics::check_same(world, asked[2], asked[3])?;
        let saved = self.saver.observe(&self.engine, asked[1]).map_err(Error::from);
        saved.map(|saved| self.note(saved)).or_else(|error| self.survive(error))?;
        let stopped = asked[0] > 0.0;
        let report = match report {
            Err(pillion_runtime::Error::NoTokens { .. }) => return Ok(Outcome::Masked { batch, stopped }),
            Err(error) => return Ok(Outcome::NonFinite { error: error.into(), batch, stopped }),
            Ok(report) => report,
        };
        let observation = Observation {
            // Summed over the ranks.
            groups: statistics::groups(&self.engine, micro_batches) - asked[4] as u64,
            samples: batch,
            tokens: report.tokens as u64,
            group_square_norms: report.group_square_norms.expect("groups are measured unless told otherwise"),
            square_norm: report.square_norm,
            non_finite: 0,
        };
        let decision = self.controller.observe(&observation);
        let unit_noise_scales = self.unit_noise.observe(self.engine.unit_norms(), &observation);
        let alignment = statistics::alignment(&self.engine, self.settings.controller.alignment, &observation, &report);
        self.progress.step += 1;
        self.progress.samples += batch;
        let elapsed = started.elapsed();
        if let Some(breakdown) = &mut self.processor.breakdown {
            breakdown.end_step(elapsed, report.exposed);
        }
        if let Some(timeline) = &mut self.timeline {
            timeline.write(&mut self.engine);
        }
        let seconds = elapsed.as_secs_f64();
        let tokens_per_s = report.tokens / seconds;
        let flops = tokens_per_s * self.start.recipe.flops_per_token();
        let line = Line {
            step: self.progress.step,
            loss: report.loss_sum / report.tokens,
            lr,
            grad_norm: report.gradient_norm,
            batch_samples: batch,
            batch_tokens: report.tokens as u64,
            samples_seen: self.progress.samples,
            samples_left_out: self.progress.left_out(),
            tokens_per_s,
            step_ms: seconds * 1e3,
            exposed_ms: report.exposed.as_secs_f64() * 1e3,
            data_wait_ms: self.samples.waited().as_secs_f64() * 1e3,
            host_waits: report.host_waits,
            bytes_sent: report.bytes,
            collectives: report.operations,
            groups: Some(observation.groups),
            group_square_norms: Some(observation.group_square_norms),
            sum_square_norm: Some(observation.square_norm),
            noise_scale: decision.noise_scale,
            unit_noise_scales,
            wanted_batch: decision.wanted,
            decision: Some(decision.reason),
            alignment,
            validation_loss: None,
            validation_losses: BTreeMap::new(),
            flops,
            mfu: self.processor.peak.map(|peak| flops / peak),
            memory: None,
            parameter_memory: self.engine.memory(),
        };
        Ok(Outcome::Made(Box::new(line), stopped))
    }
}
