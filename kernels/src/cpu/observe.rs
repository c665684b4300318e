//! Looking at the terms of a sum beside the sum, while both are in the caches.

use std::fmt::Debug;
use std::marker::PhantomData;

use crate::{DType, Element};

/// Elements of several operands: as many of each, of one type.
#[derive(Clone, Copy, Debug)]
pub struct Terms<'a> {
    dtype: DType,
    starts: &'a [*const u8],
    count: usize,
    _elements: PhantomData<&'a [u8]>,
}

impl<'a> Terms<'a> {
    /// Elements of type `dtype`, `count` of each operand, which start at these addresses.
    ///
    /// # Safety
    /// They are there, aligned to their type, and nobody writes them, while this lives.
    pub unsafe fn new(dtype: DType, starts: &'a [*const u8], count: usize) -> Terms<'a> {
        Terms { dtype, starts, count, _elements: PhantomData }
    }

    /// Type of the elements.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Number of operands.
    pub fn operands(&self) -> usize {
        self.starts.len()
    }

    /// Elements of each operand.
    pub fn count(&self) -> usize {
        self.count
    }

    /// The elements of one operand.
    ///
    /// # Panics
    /// For another type, or an operand that there is not.
    pub fn of<T: Element>(&self, operand: usize) -> &'a [T] {
        assert!(T::DTYPE == self.dtype, "terms of {} read as {}", self.dtype, T::DTYPE);
        // SAFETY: by the promise of `new`; the type is that of the elements.
        unsafe { std::slice::from_raw_parts(self.starts[operand].cast(), self.count) }
    }
}

/// Takes f64 numbers from the terms of sums and the sums. It is given all elements, some at a time,
/// each once.
pub trait Observer: Debug + Send + Sync {
    /// How many numbers it takes of a sum of `terms` terms.
    fn numbers(&self, terms: usize) -> usize;

    /// Whether it can look at terms of this type.
    fn supports(&self, dtype: DType) -> bool;

    /// Adds to `totals`, as many as [`Observer::numbers`] says, what some elements give. `sum` has
    /// as many elements as each term.
    fn observe(&self, terms: &Terms<'_>, sum: &[f32], totals: &mut [f64]);
}
