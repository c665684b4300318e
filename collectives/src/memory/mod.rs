//! The memory that the ranks of a host share, and the words through which they see each other.
//!
//! One [memory object](mapping) has everything: control words for each rank and an arena for each.
//! Every process maps all of it, so an address in another rank's arena is a matter of arithmetic,
//! and nothing is left behind in the file system however a process ends. [`control`] and
//! [`mailbox`] are the words, [`protocol`] is how ranks wait for each other, and [`life`] how they
//! know that one has died. [`fork`] keeps children of a rank out of all that. [`private`] reads
//! what is not shared.

pub(crate) mod available;
pub(crate) mod control;
pub(crate) mod fork;
pub(crate) mod lent;
pub(crate) mod life;
pub(crate) mod mailbox;
pub(crate) mod mapping;
pub(crate) mod place;
pub(crate) mod private;
pub(crate) mod protocol;
