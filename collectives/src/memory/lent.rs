//! Memory that others use without this rank's help.

use std::mem::ManuallyDrop;

/// What a message on the wire, or another rank, may use at any time: dropped, it stays for ever.
pub(crate) struct Lent<T>(pub(crate) ManuallyDrop<T>);

impl<T> Lent<T> {
    pub(crate) fn new(value: T) -> Lent<T> {
        Lent(ManuallyDrop::new(value))
    }

    /// Takes it back, once nobody else uses it.
    pub(crate) fn back(self) -> T {
        ManuallyDrop::into_inner(self.0)
    }
}
