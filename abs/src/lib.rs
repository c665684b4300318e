//! Gradient statistics in, next batch size out.
//!
//! Pure functions of numbers: this crate touches no gradient, knows no rank and moves no data. The trainer hands it the
//! sums of one optimizer step (an [`Observation`]) and trains the next step with the batch of the returned [`Decision`].
//!
//! # What is measured
//!
//! A batch is large enough while the noise of its gradient is small against the gradient itself. Let σ² be the trace of
//! the covariance of the gradient of one sample (one sequence), and |G|² the square-norm of the true gradient. The
//! gradient of a batch of b samples then has E‖g‖² = |G|² + σ²/b.
//!
//! A group is what one rank back-propagates in one microbatch. Group k sums the gradients of its n_k tokens into G_k.
//! With K groups, N = Σ n_k tokens, and Q = ‖Σ_k G_k / N‖² the square-norm of the gradient that the optimizer sees:
//!
//! ```text
//! σ̂ₜ² = ( Σ_k ‖G_k‖²/n_k − N·Q ) / (K − 1)      noise per token
//! σ̂²  = σ̂ₜ² / (tokens per sample)               noise per sample
//! |Ĝ|² = Q − σ̂ₜ²/N                               square-norm of the true gradient; may come out negative
//! B_simple = σ̂² / |Ĝ|²                           gradient noise scale, in samples (McCandlish et al. 2018)
//! norm test:  b' = ⌈σ̂² / (η² Q)⌉,  debiased: ⌈B_simple / η²⌉
//! ```
//!
//! Every term is a sum over groups or a norm that gradient clipping needs anyway, so the measurement costs neither a
//! collective nor a buffer. [`Observation::noise`] derives the formulas, and says under which assumption they are exact.
//!
//! # Why not the formula as printed
//!
//! The norm test is from Lau, Li, Xu, Liu and Kolar, "Adaptive Batch Size Schedules for Distributed Training of Language
//! Models with Data and Model Parallelism", CPAL 2025, arXiv 2412.21124. With J workers whose mean gradients g_j have the
//! mean g, it prints V̂ = (1/J) Σ_j (g_j − g)², tests ‖V̂‖₁/b ≤ η²‖g‖² and otherwise takes b' = ⌈‖V̂‖₁/(η²‖g‖²)⌉.
//!
//! But g_j is already a mean over b/J samples. Its variance is σ²J/b, so E‖V̂‖₁ = (J − 1)σ²/b and not σ²: the division by
//! b happens twice. Since E‖g‖² is at least σ²/b, the printed b' is in expectation at most about (J − 1)/η², whatever
//! the batch. With J = 4 and η = 0.2 that is 75, below the 256 that the paper's runs start from: no batch could ever grow.
//! The traces in the paper's figures exceed the bound, so what it ran is not what it prints. This crate scales the
//! statistic so that it is unbiased for σ², and keeps the printed form to compare with ([`Variant::PaperLiteral`]).
//!
//! # How a decision survives noise
//!
//! Numerator and denominator are smoothed separately, then divided ([`Settings::ema_decay`]): a mean of ratios would be
//! biased. [`Settings::patience`] and [`Settings::growth_limit`] damp what is left. The batch is rounded up to
//! [`Settings::round_to`] and stays within [`Settings::base`] and [`Settings::cap`]. A step with non-finite values
//! changes nothing but the counters.
//!
//! Everything that affects a decision is in [`Settings`], [`State`] and the [`Observation`], and all arithmetic is plain
//! IEEE f64. Ranks that hold the same sums therefore decide the same bits, and a run resumed from its saved [`State`]
//! goes on as if it had not stopped.
//!
//! ```
//! use pillion_abs::{Controller, Observation, Reason, Rule, Settings, Variant};
//!
//! let settings = Settings::new(256, 8192, 16, Rule::NormTest { eta: 0.2, variant: Variant::Unbiased });
//! let mut controller = Controller::new(settings)?;
//! let decision = controller.observe(&Observation {
//!     groups: 4,
//!     samples: 256,
//!     tokens: 256 * 2048,
//!     group_square_norms: 3.0e6,
//!     square_norm: 4.0e11,
//!     non_finite: 0,
//! });
//! assert_eq!(decision.reason, Reason::Grown);
//! assert_eq!(decision.batch, 512); // it asked for more; the growth limit is ×2 a step
//! # Ok::<(), pillion_abs::Error>(())
//! ```
//!
//! # A further controller
//!
//! One variant of [`Rule`], one file with its formula and its validation, and one line in each of the two `match`es over
//! `Rule`: `Settings::validate` and `Controller::observe`.
#![forbid(unsafe_code)]

mod alignment;
mod controller;
mod coupling;
mod error;
mod linear_ramp;
mod noise_scale;
mod norm_test;
mod settings;
pub mod simulation;
mod stagewise;
mod statistics;

pub use alignment::{Alignment, ByChance};
pub use controller::{Controller, Decision, Reason, State};
pub use coupling::Coupling;
pub use error::Error;
pub use norm_test::Variant;
pub use settings::{Rule, Settings};
pub use stagewise::Stage;
pub use statistics::{Noise, Observation, Unusable};
