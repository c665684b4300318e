//! Working memory that a thread keeps from one kernel to the next.

use std::cell::Cell;
use std::thread::LocalKey;

use super::value::Value;

/// Exactly so many elements of `memory`, which grows when it has fewer. What they hold is left over.
pub(super) fn take<T: Clone + Default>(memory: &mut Vec<T>, len: usize) -> &mut [T] {
    if memory.len() < len {
        memory.resize(len, T::default());
    }
    &mut memory[..len]
}

/// The same of another type that is no wider.
pub(super) fn take_as<T: Value>(memory: &mut Vec<f32>, len: usize) -> &mut [T] {
    &mut bytemuck::cast_slice_mut(take(memory, len.div_ceil(size_of::<f32>() / size_of::<T>())))[..len]
}

/// Runs a kernel with `len` elements of a thread's memory. That is out of its place meanwhile, so a thread that waits for others and takes
/// up another kernel finds none, and makes some.
pub(super) fn with<T: Clone + Default>(
    place: &'static LocalKey<Cell<Vec<T>>>,
    len: usize,
    kernel: impl FnOnce(&mut [T]),
) {
    let mut memory = place.take();
    kernel(take(&mut memory, len));
    place.set(memory);
}
