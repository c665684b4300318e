//! The runtime: parameters that are divided among the ranks, gathered while the model computes.
//!
//! A model is a list of units, each a list of tensors. A step goes forward through the units in
//! order, and backward in reverse; each call lends the unit's weights, and the backward pass also
//! room for its gradients. What is lent stays until the next call for this engine.

use std::ffi::{c_char, c_void};
use std::path::Path;
use std::ptr::NonNull;
use std::sync::Arc;

use pillion_kernels::Cpu;
use pillion_runtime::{
    Engine as Runtime, Gather, Layout, Policy as Kept, Sharded, Step, TensorSpec as CoreTensor, UnitSpec as CoreUnit,
    checkpoint,
};

use crate::arguments::{array, place, text};
use crate::communicator::Communicator;
use crate::memory::{PILLION_BF16, PILLION_F32, dtype};
use crate::status::{Failed, guard};
use crate::training::{Adamw, Report};

/// Replicas: every rank holds everything.
pub const PILLION_SHARD_NOTHING: i32 = 0;
/// The optimizer's state is divided (ZeRO-1).
pub const PILLION_SHARD_OPTIMIZER: i32 = 1;
/// Gradients, too (ZeRO-2).
pub const PILLION_SHARD_GRADIENTS: i32 = 2;
/// Weights, too (ZeRO-3).
pub const PILLION_SHARD_EVERYTHING: i32 = 3;

/// Most rounds of a step: a plan lists the operations of each.
const MOST_ROUNDS: usize = 1 << 16;

/// A tensor of a model.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct TensorSpec {
    /// Its name, unique in the model.
    pub name: *const c_char,
    /// Its shape, row-major.
    pub shape: *const usize,
    /// Number of dimensions.
    pub dimensions: usize,
    /// Whether weight decay applies: 1 of matrices, as a rule.
    pub decay: i32,
    /// Whether it stays as it is: its gradient counts nowhere.
    pub frozen: i32,
}

/// Tensors that are gathered together.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct UnitSpec {
    /// Its name, for messages.
    pub name: *const c_char,
    /// Its tensors.
    pub tensors: *const TensorSpec,
    /// Their number.
    pub count: usize,
}

/// How parameters are kept and moved. Begin with zeros, and set `size`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Policy {
    /// sizeof(pillion_policy), which tells versions of this struct apart.
    pub size: usize,
    /// PILLION_SHARD_NOTHING to PILLION_SHARD_EVERYTHING.
    pub sharded: i32,
    /// Type of the weights that are lent: PILLION_F32 or PILLION_BF16. Master weights are f32.
    pub weights: i32,
    /// Type in which gradients travel: PILLION_F32 or PILLION_BF16. They are lent in f32.
    pub reduce: i32,
    /// 1 to gather weights in place, through memory that all ranks of one host read; 0 to copy
    /// them.
    pub window: i32,
    /// Groups of ranks that each hold everything. 0 means 1.
    pub replicas: usize,
    /// Units that are gathered ahead of the one in use.
    pub prefetch: usize,
    /// Gathered units that exist at a time. 0 means prefetch + 1.
    pub slots: usize,
}

/// A rank's share of a model's parameters. One thread uses it at a time.
pub struct Engine {
    /// Borrows what `runtime` points to, and is dropped before it.
    step: Option<Step<'static>>,
    /// From a box, which is dropped with this.
    runtime: NonNull<Runtime>,
    settings: Adamw,
    /// Number of tensors of each unit.
    tensors: Vec<usize>,
    /// Whether the step under way is an evaluation.
    evaluates: bool,
}

impl Engine {
    /// # Safety
    /// NULL, or an engine that has not been freed, which no other thread uses, by the promise of
    /// the library's caller.
    unsafe fn of<'a>(engine: *mut Engine) -> Result<&'a mut Engine, Failed> {
        // SAFETY: the caller's promise.
        unsafe { engine.as_mut() }.ok_or_else(|| Failed::Invalid("engine is NULL".to_owned()))
    }

    /// The step under way.
    fn step(&mut self) -> Result<&mut Step<'static>, Failed> {
        self.step.as_mut().ok_or_else(|| Failed::Invalid("no step is under way: call pillion_engine_begin".to_owned()))
    }

    fn tensors_of(&self, unit: usize) -> Result<usize, Failed> {
        let count = self.tensors.get(unit).copied();
        count.ok_or_else(|| Failed::Invalid(format!("there is no unit {unit}: the model has {}", self.tensors.len())))
    }

    /// The runtime between steps.
    fn runtime(&mut self) -> Result<&mut Runtime, Failed> {
        if self.step.is_some() {
            return Err(Failed::Invalid("a step is under way: end it with pillion_engine_finish".to_owned()));
        }
        // SAFETY: no step borrows it, and the box is this engine's.
        Ok(unsafe { self.runtime.as_mut() })
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.step = None;
        // SAFETY: from a box, and nothing borrows it any more.
        drop(unsafe { Box::from_raw(self.runtime.as_ptr()) });
    }
}

/// # Safety
/// Units as the library's caller promises.
unsafe fn units(units: *const UnitSpec, count: usize) -> Result<Vec<CoreUnit>, Failed> {
    // SAFETY: the caller's promise, for all of this body.
    unsafe {
        let mut read = Vec::new();
        for unit in array(units, count, "units")? {
            let name = text(unit.name, "a unit's name")?.to_owned();
            let mut tensors = Vec::new();
            for tensor in array(unit.tensors, unit.count, &format!("tensors of {name}"))? {
                let name = text(tensor.name, "a tensor's name")?.to_owned();
                let shape = array(tensor.shape, tensor.dimensions, &format!("the shape of {name}"))?.to_vec();
                if shape.iter().try_fold(1usize, |product, &len| product.checked_mul(len)).is_none() {
                    return Err(Failed::Invalid(format!("no memory has a tensor {name} of shape {shape:?}")));
                }
                tensors.push(CoreTensor { name, shape, decay: tensor.decay != 0, frozen: tensor.frozen != 0 });
            }
            read.push(CoreUnit { name, tensors });
        }
        let mut names: Vec<&str> = read.iter().flat_map(|unit| &unit.tensors).map(|tensor| &*tensor.name).collect();
        names.sort_unstable();
        match names.windows(2).find(|pair| pair[0] == pair[1]) {
            Some(pair) => {
                Err(Failed::Invalid(format!("two tensors are called {}: give each a name of its own", pair[0])))
            }
            None => Ok(read),
        }
    }
}

/// # Safety
/// NULL or a policy whose first field is there, by the promise of the library's caller.
unsafe fn policy(given: *const Policy, settings: &Adamw) -> Result<Kept, Failed> {
    let given = place(given.cast_mut(), "policy")?;
    // SAFETY: the caller's promise.
    let size = unsafe { given.cast::<usize>().read() };
    if size != size_of::<Policy>() {
        let expected = size_of::<Policy>();
        return Err(Failed::Invalid(format!("policy.size is {size}, and this library has {expected}")));
    }
    // SAFETY: the caller's promise, and the size is this struct's.
    let given = unsafe { given.read() };
    let sharded = match given.sharded {
        PILLION_SHARD_NOTHING => Sharded::NOTHING,
        PILLION_SHARD_OPTIMIZER => Sharded::OPTIMIZER,
        PILLION_SHARD_GRADIENTS => Sharded::GRADIENTS,
        PILLION_SHARD_EVERYTHING => Sharded::EVERYTHING,
        other => return Err(Failed::Invalid(format!("policy.sharded is {other}: give 0 to 3"))),
    };
    for (name, code) in [("weights", given.weights), ("reduce", given.reduce)] {
        if ![PILLION_F32, PILLION_BF16].contains(&code) {
            return Err(Failed::Invalid(format!("policy.{name} is {code}: give PILLION_F32 or PILLION_BF16")));
        }
    }
    Ok(Kept {
        weights: dtype(given.weights)?,
        reduce: dtype(given.reduce)?,
        replicas: given.replicas.max(1),
        sharded,
        gather: if given.window != 0 { Gather::Window } else { Gather::Copy },
        prefetch: given.prefetch,
        slots: if given.slots == 0 { given.prefetch.saturating_add(1) } else { given.slots },
        clip: settings.limit(),
        ..Kept::default()
    })
}

/// Allocates this rank's share of a model, zeroed. Every rank calls with the same arguments.
///
/// # Safety
/// The communicator is open; `given` has `count` units, whose texts end with a zero byte and whose
/// arrays are as long as they say; `kept` has its size; `settings` is a struct and `engine` a place
/// for a pointer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pillion_engine_new(
    communicator: *const Communicator,
    given: *const UnitSpec,
    count: usize,
    kept: *const Policy,
    settings: *const Adamw,
    engine: *mut *mut Engine,
) -> i32 {
    guard(|| {
        // SAFETY: the caller's promise, for all of this block.
        unsafe {
            let ranks = Communicator::of(communicator)?.ranks.clone();
            let place = place(engine, "engine")?;
            let settings = Adamw::read(settings)?;
            let (units, policy) = (units(given, count)?, policy(kept, &settings)?);
            let tensors = units.iter().map(|unit| unit.tensors.len()).collect();
            let layout = Layout::new(&units, policy.mesh(ranks.world())?.shard);
            let mut runtime = Box::new(Runtime::new(ranks, Arc::new(Cpu), layout, policy)?);
            runtime.measure_groups(true);
            let runtime = NonNull::from(Box::leak(runtime));
            place.write(Box::into_raw(Box::new(Engine { step: None, runtime, settings, tensors, evaluates: false })));
            Ok(())
        }
    })
}

/// Sets every parameter to value(context, name of its tensor, its index in that), which must depend
/// on nothing else: ranks ask for their shares. The moments become 0.
///
/// # Safety
/// `engine` has not been freed; `value` may be called.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pillion_engine_initialize(
    engine: *mut Engine,
    value: Option<unsafe extern "C" fn(*mut c_void, *const c_char, usize) -> f32>,
    context: *mut c_void,
) -> i32 {
    guard(|| {
        let value = value.ok_or_else(|| Failed::Invalid("value is NULL".to_owned()))?;
        // SAFETY: the caller's promise.
        let runtime = unsafe { Engine::of(engine) }?.runtime()?;
        runtime.initialize(|name, _| {
            let name = std::ffi::CString::new(name).expect("it came as a text that ends with a zero byte");
            // SAFETY: the caller's promise.
            move |index| unsafe { value(context, name.as_ptr(), index) }
        })?;
        Ok(())
    })
}

/// Begins a step of `rounds` rounds, each with a micro-batch at most on each rank; `evaluates` is 1
/// for forward passes alone.
///
/// # Safety
/// `engine` has not been freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pillion_engine_begin(engine: *mut Engine, rounds: usize, evaluates: i32) -> i32 {
    guard(|| {
        // SAFETY: the caller's promise.
        let engine = unsafe { Engine::of(engine) }?;
        if rounds == 0 || rounds > MOST_ROUNDS {
            return Err(Failed::Invalid(format!("a step of {rounds} rounds: give 1 to {MOST_ROUNDS}")));
        }
        engine.runtime()?;
        // SAFETY: the runtime lives in a box of this engine, which drops the step before it, and
        // hands out nothing else of it while the step exists (`Engine::runtime`).
        let runtime: &'static mut Runtime = unsafe { &mut *engine.runtime.as_ptr() };
        engine.evaluates = evaluates != 0;
        engine.step = Some(match engine.evaluates {
            false => runtime.begin(rounds)?,
            true => runtime.begin_evaluation(rounds)?,
        });
        Ok(())
    })
}

/// Begins a round whose micro-batch on this rank has `tokens` tokens in its loss; with 0, passes it
/// as a rank that has none.
///
/// # Safety
/// `engine` has not been freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pillion_engine_round(engine: *mut Engine, tokens: usize) -> i32 {
    guard(|| {
        // SAFETY: the caller's promise.
        let step = unsafe { Engine::of(engine) }?.step()?;
        match tokens {
            0 => step.idle_round()?,
            tokens => step.round(tokens),
        }
        Ok(())
    })
}

/// Waits until a unit's weights are here, and writes where its tensors are: as many pointers as it
/// has tensors. They are read until the next call for this engine.
///
/// # Safety
/// `engine` has not been freed; `weights` has room for the pointers.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pillion_engine_forward(engine: *mut Engine, unit: usize, weights: *mut *const c_void) -> i32 {
    guard(|| {
        if weights.is_null() {
            return Err(Failed::Invalid("weights is NULL".to_owned()));
        }
        // SAFETY: the caller's promise.
        let engine = unsafe { Engine::of(engine) }?;
        let count = engine.tensors_of(unit)?;
        let lent = engine.step()?.forward(unit)?;
        for index in 0..count {
            // SAFETY: the caller's promise.
            unsafe { weights.add(index).write(lent.weights.tensor(index).raw().pointer.as_ptr().cast()) };
        }
        Ok(())
    })
}

/// As pillion_engine_forward, in a backward pass, with room for the gradients: f32, zeroed where
/// the unit's first are added; sums over tokens. `loss` gets where the sum of this rank's losses
/// is, to be added to in one unit.
///
/// # Safety
/// `engine` has not been freed; `weights` and `gradients` have room for the pointers; `loss` is
/// NULL or a place for one.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pillion_engine_backward(
    engine: *mut Engine,
    unit: usize,
    weights: *mut *const c_void,
    gradients: *mut *mut f32,
    loss: *mut *mut f64,
) -> i32 {
    guard(|| {
        if weights.is_null() || gradients.is_null() {
            return Err(Failed::Invalid("weights or gradients is NULL".to_owned()));
        }
        // SAFETY: the caller's promise.
        let engine = unsafe { Engine::of(engine) }?;
        let count = engine.tensors_of(unit)?;
        let mut lent = engine.step()?.backward(unit)?;
        // SAFETY: the caller's promise, for all of this block.
        unsafe {
            for index in 0..count {
                weights.add(index).write(lent.weights.tensor(index).raw().pointer.as_ptr().cast());
                gradients.add(index).write(lent.gradients.tensor(index).raw().pointer.as_ptr().cast());
            }
            if let Some(loss) = NonNull::new(loss) {
                loss.write(lent.loss.raw().pointer.as_ptr().cast());
            }
        }
        Ok(())
    })
}

/// Ends a step: sums the gradients that are still on their way, and updates the parameters with
/// their mean over tokens. Of an evaluation, only ends it. `report` may be NULL.
///
/// PILLION_NO_UPDATE says that no parameter was changed on any rank, and training can go on.
///
/// # Safety
/// `engine` has not been freed; `report` is NULL or a place for a report.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pillion_engine_finish(engine: *mut Engine, lr: f32, report: *mut Report) -> i32 {
    guard(|| {
        // SAFETY: the caller's promise.
        let engine = unsafe { Engine::of(engine) }?;
        let settings = engine.settings.at(lr)?;
        engine.step()?;
        let step = engine.step.take().expect("a step is under way");
        if engine.evaluates {
            return Ok(step.end()?);
        }
        let done = step.finish(&settings, &mut [])?;
        if let Some(report) = NonNull::new(report) {
            // SAFETY: the caller's promise.
            unsafe { report.write(Report::of(&done)) };
        }
        Ok(())
    })
}

/// Saves parameters and optimizer as the folder step-NUMBER in `folder`, which all ranks see;
/// returns once it is on disk.
///
/// # Safety
/// `engine` has not been freed; `folder` ends with a zero byte.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pillion_engine_save(engine: *mut Engine, folder: *const c_char, number: u64) -> i32 {
    guard(|| {
        // SAFETY: the caller's promise.
        let (engine, folder) = unsafe { (Engine::of(engine)?, text(folder, "folder")?) };
        checkpoint::save(engine.runtime()?, Path::new(folder), number, &serde_json::Value::Null)?;
        Ok(())
    })
}

/// Loads the newest whole checkpoint in `folder`, of any number of ranks and placement, and writes
/// its number; PILLION_FILE where there is none.
///
/// # Safety
/// `engine` has not been freed; `folder` ends with a zero byte; `number` is a place for a number.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pillion_engine_load(engine: *mut Engine, folder: *const c_char, number: *mut u64) -> i32 {
    guard(|| {
        // SAFETY: the caller's promise.
        let (engine, folder) = unsafe { (Engine::of(engine)?, text(folder, "folder")?) };
        let place = place(number, "number")?;
        let newest = checkpoint::newest(Path::new(folder))?;
        let found = newest.checkpoint.ok_or_else(|| pillion_runtime::Error::File {
            path: folder.into(),
            reason: "there is no whole checkpoint: name the folder that pillion_engine_save was given".to_owned(),
        })?;
        found.load(engine.runtime()?)?;
        // SAFETY: the caller's promise.
        unsafe { place.write(found.manifest.step) };
        Ok(())
    })
}

/// Frees an engine. NULL does nothing. Where a step is under way, other ranks wait for it in vain.
/// Only this rank calls.
///
/// # Safety
/// `engine` has not been freed before.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pillion_engine_free(engine: *mut Engine) -> i32 {
    guard(|| {
        if !engine.is_null() {
            // SAFETY: made by pillion_engine_new, and freed once.
            drop(unsafe { Box::from_raw(engine) });
        }
        Ok(())
    })
}
