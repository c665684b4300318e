//! The devices of the host.

use std::rc::Rc;
use std::sync::OnceLock;

use pillion_kernels::{Cores, Cpu, DType, LazyCpu};

use crate::common::{Softmax, Stage};
use crate::foreign::Foreign;

/// What an addition of a matrix product may lose, in units of half the distance between neighbours.
pub(crate) const UNITS_OF_PRODUCTS: f64 = 1.0;

/// How the attention works.
pub(crate) fn attention(_: DType, _: usize) -> Softmax {
    Softmax { keys: 512, base_2: false }
}

/// With whose results the others' are compared.
pub(crate) fn reference() -> Rc<Stage> {
    Rc::new(Stage::new(Cpu))
}

/// Threads, memory of another program, and several orders of work that runs later.
pub(crate) fn others() -> Vec<(String, Rc<Stage>)> {
    let cores = cores().map(|cores| (format!("Cores::new({})", cores.threads()), Rc::new(Stage::new(cores))));
    let foreign = ("memory of another program".to_owned(), Rc::new(Stage::new(Foreign::default())));
    let lazy = (0..3).map(|seed| (format!("LazyCpu::new({seed})"), deferred(seed)));
    cores.into_iter().chain([foreign]).chain(lazy).collect()
}

/// A device that runs work after the call that enqueues it.
pub(crate) fn deferred(seed: u64) -> Rc<Stage> {
    Rc::new(Stage::new(LazyCpu::new(seed)))
}

/// Devices with two and with three threads.
fn cores() -> [Cores; 2] {
    static CORES: OnceLock<[Cores; 2]> = OnceLock::new();
    CORES.get_or_init(|| [2, 3].map(|threads| Cores::new(threads).unwrap())).clone()
}
