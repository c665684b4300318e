//! What a step of training takes and reports.

use pillion_kernels::AdamW;
use pillion_runtime::StepReport;

use crate::arguments::place;
use crate::status::Failed;

/// AdamW (Loshchilov and Hutter 2019), with the limit of the gradient's norm.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Adamw {
    /// Decay of the first moment, in [0, 1).
    pub beta1: f32,
    /// Decay of the second moment, in [0, 1).
    pub beta2: f32,
    /// Added to the root of the second moment; positive.
    pub epsilon: f32,
    /// Decoupled weight decay.
    pub weight_decay: f32,
    /// A mean gradient that is longer is scaled down to this; 0 for no limit.
    pub clip: f64,
}

/// What a step has done; all but exposed_seconds is the same on every rank.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Report {
    /// Sum of the losses over all tokens.
    pub loss_sum: f64,
    /// N, the tokens of all ranks.
    pub tokens: f64,
    /// Norm of the mean gradient, before clipping.
    pub gradient_norm: f64,
    /// |sum over k of G_k|^2 of all groups; see pillion_observation.
    pub square_norm: f64,
    /// The sum over k of |G_k|^2 / n_k; NaN where it was not measured.
    pub group_square_norms: f64,
    /// Time for which this rank waited for others.
    pub exposed_seconds: f64,
}

impl Adamw {
    /// # Safety
    /// NULL or settings, by the promise of the library's caller.
    pub(crate) unsafe fn read(settings: *const Adamw) -> Result<Adamw, Failed> {
        let settings = place(settings.cast_mut(), "settings")?;
        // SAFETY: the caller's promise.
        let settings = unsafe { settings.read() };
        let Adamw { beta1, beta2, epsilon, weight_decay, clip } = settings;
        let decays = [("beta1", beta1), ("beta2", beta2)];
        if let Some((name, value)) = decays.into_iter().find(|(_, value)| !(0.0..1.0).contains(value)) {
            return Err(Failed::Invalid(format!("{name} is {value}: give a number in [0, 1)")));
        }
        if !(epsilon > 0.0 && epsilon.is_finite() && weight_decay >= 0.0 && weight_decay.is_finite()) {
            let text = format!(
                "epsilon is {epsilon} and weight_decay {weight_decay}: give a positive one, and one of 0 or more"
            );
            return Err(Failed::Invalid(text));
        }
        if !(clip >= 0.0 && clip.is_finite()) {
            return Err(Failed::Invalid(format!("clip is {clip}: give a positive number, or 0 for no limit")));
        }
        Ok(settings)
    }

    pub(crate) fn at(&self, lr: f32) -> Result<AdamW, Failed> {
        if !(lr >= 0.0 && lr.is_finite()) {
            return Err(Failed::Invalid(format!("a learning rate of {lr}: give a finite number of 0 or more")));
        }
        let Adamw { beta1, beta2, epsilon, weight_decay, .. } = *self;
        Ok(AdamW { lr, beta1, beta2, epsilon, weight_decay })
    }

    pub(crate) fn limit(&self) -> Option<f64> {
        (self.clip > 0.0).then_some(self.clip)
    }
}

impl Report {
    pub(crate) fn of(report: &StepReport) -> Report {
        Report {
            loss_sum: report.loss_sum,
            tokens: report.tokens,
            gradient_norm: report.gradient_norm,
            square_norm: report.square_norm,
            group_square_norms: report.group_square_norms.unwrap_or(f64::NAN),
            exposed_seconds: report.exposed.as_secs_f64(),
        }
    }
}
