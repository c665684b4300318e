//! Peers: ranks, launch, rendezvous, moving and reducing buffers.
