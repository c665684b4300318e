//! One algorithm a file, each with its steps and the bytes it moves. S is the size of the full buffer, P the number of ranks.

mod all_gather;
mod all_reduce;
mod broadcast;
mod gather_window;
mod reduce_scatter;
mod scalars;

pub(crate) use all_gather::AllGather;
pub(crate) use all_reduce::AllReduce;
pub(crate) use broadcast::Broadcast;
pub(crate) use gather_window::GatherWindow;
pub(crate) use reduce_scatter::{ReduceScatter, SIDEBAND};
pub(crate) use scalars::Scalars;

use pillion_kernels::{Element, Span, exclusive};

use crate::Error;
use crate::shm::flight::Peers;

/// `count` elements of a rank's published buffer from element `first` on, while the operation of `peers` is under way.
///
/// # Safety
/// No rank writes these elements until this rank has taken its next step in the operation.
unsafe fn peer_slice<'a, T: Element>(
    peers: &'a Peers<'_>,
    rank: usize,
    first: usize,
    count: usize,
) -> Result<&'a [T], Error> {
    let address = peers.address(rank, T::DTYPE, first, count)?;
    // SAFETY: `address` checked that the range is inside the rank's arena, which stays mapped as long as `peers` borrows it, and
    // aligned; any bits are a T; nobody writes it, by the caller's promise.
    Ok(unsafe { std::slice::from_raw_parts(address.cast().as_ptr(), count) })
}

/// out\[..\] = a peer's elements from `first` on, as bytes of one type.
///
/// # Safety
/// As for [`peer_slice`]; and `out` is this rank's alone.
unsafe fn copy_from_peer(
    peers: &Peers<'_>,
    rank: usize,
    first: usize,
    out: &Span,
    at: usize,
    count: usize,
) -> Result<(), Error> {
    let width = out.dtype().bytes();
    let from = peers.address(rank, out.dtype(), first, count)?;
    assert!(at + count <= out.len(), "a copy beyond its destination");
    let _access = exclusive(out.deferred());
    // SAFETY: the source is `count` elements inside the rank's arena that nobody writes (caller); the destination is inside `out`, which
    // this operation owns. They do not overlap: the source belongs to another rank, or to another buffer of this one.
    unsafe {
        let to = out.address().as_ptr().add(at * width);
        std::ptr::copy_nonoverlapping(from.as_ptr(), to, count * width);
    }
    Ok(())
}
