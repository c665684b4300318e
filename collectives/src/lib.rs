//! Peers: ranks, launch, rendezvous, moving and reducing buffers.

pub mod launch;
pub mod launcher;
