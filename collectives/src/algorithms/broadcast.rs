//! Broadcast: after one step every rank but the root copies the root's buffer. A rank reads S and
//! writes S, the lower bound.
//!
//! Between hosts the buffer travels in parts down a binomial tree of hosts, whose root is the
//! root's: a host that has received passes on, so no host sends more than ⌈log₂ H⌉·S. Each rank of
//! a host deals with its share of the parts, and after one more step they copy each other's.

use super::moves::{Moves, Pull};
use super::operation::{Operation, Work};
use crate::call::{Detail, Kind};
use crate::hosts::Hosts;
use crate::request::Operands;

/// output = the input of `root`, `len` elements.
pub(crate) fn broadcast(hosts: &Hosts, rank: usize, operands: Operands, len: usize, root: usize) -> Operation {
    let world = hosts.world();
    let parts = hosts.ranks.iter().map(Vec::len).max().expect("there is a host");
    // Who deals with a part on a host.
    let dealer = |host: usize, part: usize| hosts.ranks[host][part % hosts.ranks[host].len()];
    let (count, top) = (hosts.ranks.len(), hosts.host(root));
    let place = (hosts.own + count - top) % count;
    let host_at = |place: usize| (top + place) % count;
    let below = || children(place, count).into_iter().map(host_at);
    let mut moves = Moves::default();
    if rank == root {
        moves.sends = below().flat_map(|host| (0..parts).map(move |part| (dealer(host, part), part))).collect();
    } else if hosts.own == top {
        let from = hosts.place(root);
        moves.pulls = (0..parts).map(|part| Pull { from, chunk: part, to: part }).collect();
    } else {
        let above = host_at(parent(place));
        let own = || (0..parts).filter(|&part| dealer(hosts.own, part) == rank);
        let sender = |part| if above == top { root } else { dealer(above, part) };
        moves.receives = own().map(|part| (sender(part), part)).collect();
        moves.forwards = below().flat_map(|host| own().map(move |part| (dealer(host, part), part))).collect();
        let place_of = |part| hosts.place(dealer(hosts.own, part));
        moves.spread = (0..parts).map(|part| Pull { from: place_of(part), chunk: part, to: part }).collect();
    }
    // Counted evenly: (P−1)·S in all.
    let sent = (world - 1) * len * operands.dtype.bytes() / world;
    Operation::new(Kind::Broadcast, Detail::Root(root), operands, Work::Moves(moves))
        .cut_into(len.div_ceil(parts), len, parts, parts)
        .sending(sent)
}

/// From whom number `place` of a binomial tree receives.
fn parent(place: usize) -> usize {
    place & (place - 1)
}

/// To whom it sends, those with most below them first.
fn children(place: usize, count: usize) -> Vec<usize> {
    let bits = if place == 0 { usize::BITS } else { place.trailing_zeros() };
    let all = (0..bits).map(|bit| place.wrapping_add(1usize.wrapping_shl(bit))).take_while(|&child| child < count);
    let mut all: Vec<usize> = all.collect();
    all.reverse();
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everybody_but_the_first_has_one_parent_and_few_children() {
        for count in 1..70 {
            let mut reached = vec![0; count];
            for place in 0..count {
                let children = children(place, count);
                assert!(children.len() <= count.next_power_of_two().ilog2() as usize);
                for child in children {
                    assert_eq!(parent(child), place);
                    reached[child] += 1;
                }
            }
            assert!(reached[0] == 0 && reached[1..].iter().all(|&times| times == 1), "{count}: {reached:?}");
        }
    }
}
