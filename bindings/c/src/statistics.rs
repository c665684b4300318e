//! Sums of a step's gradients in, batch of the next step out: the controllers of Pillion.
//!
//! Nothing here talks to other ranks: all give the same sums, and decide alike.

use std::ffi::{CString, c_char};
use std::ptr::NonNull;

use parking_lot::Mutex;
use pillion_abs::{Controller as Rules, Observation as Sums, Settings, State};
use pillion_kernels::{Cpu, DType, Device};

use crate::arguments::{place, text};
use crate::memory::{PILLION_BF16, PILLION_F32, Tensor};
use crate::status::{Failed, guard};

/// Chooses the batch of each step. Any thread may use it, one at a time.
pub struct Controller {
    rules: Mutex<Rules>,
    /// What pillion_controller_state gave last.
    state: Mutex<CString>,
    /// Of the last decision.
    words: Mutex<Words>,
}

/// The sums of one step over all ranks, before clipping. A group is what one rank summed between
/// two reductions. G_k is the gradient of the loss of group k, summed over its n_k tokens, or
/// samples where all have the same weight.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Observation {
    /// K, the number of groups.
    pub groups: u64,
    /// Samples of the step.
    pub samples: u64,
    /// N, the tokens that the loss counts: the sum of n_k.
    pub tokens: u64,
    /// The sum over k of |G_k|^2 / n_k.
    pub group_square_norms: f64,
    /// |sum over k of G_k|^2.
    pub square_norm: f64,
    /// Number of gradient values that were not finite.
    pub non_finite: u64,
}

/// What a controller decided.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Decision {
    /// Samples of the next step.
    pub batch: u64,
    /// Smoothed gradient noise scale in samples; NaN while it is unknown.
    pub noise_scale: f64,
    /// What the rule asked for in samples, before limits; NaN where that is nothing.
    pub wanted: f64,
    /// This step's variance of one sample's gradient, summed over parameters; NaN where the sums
    /// say nothing of it.
    pub variance: f64,
    /// This step's |mean gradient|^2; NaN as above.
    pub square_norm: f64,
    /// The same less the noise that it contains; NaN as above.
    pub debiased_square_norm: f64,
    /// Why the batch is what it is, in a word: scheduled, unusable, between-tests, no-gradient,
    /// sufficient, waiting, at-cap, grown or shrunk. Lasts until the next decision.
    pub reason: *const c_char,
    /// Why the sums say nothing, or NULL. Lasts until the next decision.
    pub unusable: *const c_char,
}

/// # Safety
/// NULL or a text that ends with a zero byte, by the promise of the library's caller.
unsafe fn read<T: serde::de::DeserializeOwned>(given: *const c_char, name: &str) -> Result<T, Failed> {
    // SAFETY: the caller's promise.
    let given = unsafe { text(given, name) }?;
    serde_json::from_str(given).map_err(|error| Failed::Invalid(format!("{name}: {error}")))
}

/// The words of a decision: why the batch is what it is, as settings files write it, and why the
/// sums say nothing.
#[derive(Default)]
struct Words {
    reason: CString,
    unusable: Option<CString>,
}

impl Words {
    fn of(decision: &pillion_abs::Decision) -> Words {
        let reason = serde_json::to_value(decision.reason).unwrap_or_default();
        let text = |text: &str| CString::new(text).unwrap_or_default();
        Words {
            reason: text(reason.as_str().unwrap_or_default()),
            unusable: decision.noise.err().map(|unusable| text(&unusable.to_string())),
        }
    }
}

impl Controller {
    /// # Safety
    /// NULL, or a controller that has not been freed, by the promise of the library's caller.
    unsafe fn of<'a>(controller: *const Controller) -> Result<&'a Controller, Failed> {
        // SAFETY: the caller's promise.
        unsafe { controller.as_ref() }.ok_or_else(|| Failed::Invalid("controller is NULL".to_owned()))
    }
}

/// Writes the sum of the squares of a tensor's finite elements, summed in f64, and the number of
/// the others. The tensor: n elements of f32 or bf16. Only this rank calls.
///
/// # Safety
/// The tensor's memory is there, and nobody writes to it; both results are places for a number.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pillion_square_norm(tensor: Tensor, square_norm: *mut f64, non_finite: *mut u64) -> i32 {
    guard(|| {
        let (square_norm, non_finite) = (place(square_norm, "square_norm")?, place(non_finite, "non_finite")?);
        if ![PILLION_F32, PILLION_BF16].contains(&tensor.dtype) {
            return Err(Failed::Invalid("square norms are of PILLION_F32 and PILLION_BF16".to_owned()));
        }
        // SAFETY: the caller's promise.
        let elements = unsafe { tensor.buffer("tensor") }?;
        let mut sums = Cpu.allocate(DType::F64, 2)?;
        Cpu.stream().square_norm(sums.view_mut(), elements.view(), 1.0);
        let sums = sums.view().as_slice::<f64>().expect("memory of the host");
        // SAFETY: places for numbers, by the caller's promise.
        unsafe {
            square_norm.write(sums[0]);
            non_finite.write(sums[1] as u64);
        }
        Ok(())
    })
}

/// Makes a controller. `settings` is JSON, such as {"base": 64, "cap": 4096, "round_to": 8,
/// "rule": {"norm-test": {"eta": 0.5}}}; other rules are "constant", {"noise-scale": {"ratio": r}},
/// {"stagewise": {"stages": [{"batch": b, "share": s}, ...], "horizon": samples}} and
/// {"linear-ramp": {"end": b, "samples": s}}; growth_limit, patience, ema_decay, interval, monotone
/// and, of a norm test, variant may be set. `state` is NULL for a new run, or JSON from
/// pillion_controller_state. Only this rank calls.
///
/// # Safety
/// Texts end with a zero byte; `controller` is a place for a pointer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pillion_controller_new(
    settings: *const c_char,
    state: *const c_char,
    controller: *mut *mut Controller,
) -> i32 {
    guard(|| {
        let place = place(controller, "controller")?;
        // SAFETY: the caller's promise.
        let settings: Settings = unsafe { read(settings, "settings") }?;
        let rules = if state.is_null() {
            Rules::new(settings)
        } else {
            // SAFETY: the caller's promise.
            let state: State = unsafe { read(state, "state") }?;
            Rules::resume(settings, state)
        };
        let rules = rules.map_err(|error| Failed::Invalid(error.to_string()))?;
        let new = Box::new(Controller { rules: Mutex::new(rules), state: Mutex::default(), words: Mutex::default() });
        // SAFETY: the caller's promise.
        unsafe { place.write(Box::into_raw(new)) };
        Ok(())
    })
}

/// Samples of the next step; 0 for no controller. Only this rank calls.
///
/// # Safety
/// `controller` is NULL or has not been freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pillion_controller_batch(controller: *const Controller) -> u64 {
    // SAFETY: the caller's promise.
    unsafe { controller.as_ref() }.map_or(0, |controller| controller.rules.lock().batch())
}

/// Takes in the step that just ran, and decides on the next one. To be called once for every step.
/// `decision` may be NULL. Only this rank calls.
///
/// # Safety
/// `controller` has not been freed; `decision` is NULL or a place for a decision.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pillion_observe(
    controller: *const Controller,
    observation: Observation,
    decision: *mut Decision,
) -> i32 {
    guard(|| {
        let Observation { groups, samples, tokens, group_square_norms, square_norm, non_finite } = observation;
        let sums = Sums { groups, samples, tokens, group_square_norms, square_norm, non_finite };
        // SAFETY: the caller's promise.
        let controller = unsafe { Controller::of(controller) }?;
        let decided = controller.rules.lock().observe(&sums);
        let Some(place) = NonNull::new(decision) else { return Ok(()) };
        let mut words = controller.words.lock();
        *words = Words::of(&decided);
        let noise = decided.noise.ok();
        let of_noise = |value: fn(&pillion_abs::Noise) -> f64| noise.as_ref().map_or(f64::NAN, value);
        let decision = Decision {
            batch: decided.batch,
            noise_scale: decided.noise_scale.unwrap_or(f64::NAN),
            wanted: decided.wanted.unwrap_or(f64::NAN),
            variance: of_noise(|noise| noise.variance),
            square_norm: of_noise(|noise| noise.square_norm),
            debiased_square_norm: of_noise(|noise| noise.debiased_square_norm),
            reason: words.reason.as_ptr(),
            unusable: words.unusable.as_ref().map_or(std::ptr::null(), |text| text.as_ptr()),
        };
        // SAFETY: the caller's promise.
        unsafe { place.write(decision) };
        Ok(())
    })
}

/// Passes over samples that no step has learnt from: schedules go on as if one had. Only this rank
/// calls.
///
/// # Safety
/// `controller` has not been freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pillion_controller_skip(controller: *const Controller, samples: u64) -> i32 {
    guard(|| {
        // SAFETY: the caller's promise.
        unsafe { Controller::of(controller) }?.rules.lock().skip(samples);
        Ok(())
    })
}

/// All that a controller remembers, as JSON for a checkpoint: a controller that is made of it
/// decides the same, bit for bit. The text lasts until the next call for this controller. NULL for
/// no controller. Only this rank calls.
///
/// # Safety
/// `controller` is NULL or has not been freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pillion_controller_state(controller: *const Controller) -> *const c_char {
    // SAFETY: the caller's promise.
    let Some(controller) = (unsafe { controller.as_ref() }) else { return std::ptr::null() };
    // A state of numbers has no zero byte, and the numbers are finite: `Controller` sees to it.
    let text = serde_json::to_vec(controller.rules.lock().state()).unwrap_or_default();
    let mut state = controller.state.lock();
    *state = CString::new(text).unwrap_or_default();
    state.as_ptr()
}

/// Frees a controller. NULL does nothing. Only this rank calls.
///
/// # Safety
/// `controller` has not been freed before.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pillion_controller_free(controller: *mut Controller) -> i32 {
    guard(|| {
        if !controller.is_null() {
            // SAFETY: made by pillion_controller_new, and freed once.
            drop(unsafe { Box::from_raw(controller) });
        }
        Ok(())
    })
}
