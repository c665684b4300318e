//! The transport between ranks of one host, as processes or as threads.
//!
//! One memfd holds everything: a page of words for the job, some pages for each rank ([`control`]), an arena for each rank, and a
//! heap for windows. Rank 0 makes it and hands it over a unix socket ([`rendezvous`]); every rank maps the whole ([`arena`]), so an
//! address in another rank's arena is a matter of arithmetic, and nothing is left behind in the file system however a process ends.
//!
//! An operation is a sequence of synchronised steps ([`flight`]): a rank publishes what it called, waits until every rank has published the
//! same, then reads its peers' memory in place, and keeps its own memory still until all have read it. A progress
//! thread drives the operations in flight ([`progress`]), unless their callers wait for them and do ([`caller`]); whoever waits watches
//! the other ranks ([`life`], [`watch`]). [`record`] remembers when each operation began and ended.

pub(crate) mod arena;
mod caller;
pub(crate) mod control;
pub(crate) mod engine;
pub(crate) mod flight;
pub(crate) mod life;
pub(crate) mod mail;
pub(crate) mod place;
pub(crate) mod progress;
pub(crate) mod protocol;
pub(crate) mod ranges;
pub(crate) mod record;
pub(crate) mod rendezvous;
pub(crate) mod shared;
mod start;
pub(crate) mod watch;
