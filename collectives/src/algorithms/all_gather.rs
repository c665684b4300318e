//! All-gather: after one step each rank copies every rank's shard from where it lies. A rank reads S and writes S, of which (P−1)/P·S
//! are read from others: the lower bound for a gather that copies. (A window's gather moves nothing.)
//!
//! Between hosts a rank sends its shard to its partners, and after one more step copies what its
//! neighbours received: (H−1)/H·S/L a rank on the wire, the lower bound, and 2·S of copies.

use super::moves::{Moves, Pull};
use super::operation::{Operation, Work};
use super::sides::End;
use crate::Sections;
use crate::call::{Detail, Kind};
use crate::hosts::Hosts;
use crate::request::Operands;

/// output\[p\] = the input of rank p, for `chunk` elements of each rank, cut into sections in the
/// output. `in_place` input and output are one buffer, and a rank's input is its chunk of that.
pub(crate) fn all_gather(
    hosts: &Hosts,
    rank: usize,
    operands: Operands,
    chunk: usize,
    sections: Option<Sections>,
    in_place: bool,
) -> Operation {
    let world = hosts.world();
    let own = hosts.local().iter().enumerate();
    let of = |rank: usize| if in_place { rank } else { 0 };
    let pulls = own.map(|(from, &rank)| Pull { from, chunk: of(rank), to: rank }).collect();
    let moves = Moves {
        pulls,
        sends: hosts.partners(rank).map(|peer| (peer, of(rank))).collect(),
        source: End::Input,
        receives: hosts.partnered(rank).map(|peer| (peer, peer)).collect(),
        spread: spread(hosts),
        ..Moves::default()
    };
    let sent = (world - 1) * chunk * operands.dtype.bytes();
    let detail = if in_place { Detail::InPlace } else { Detail::None };
    Operation::new(Kind::AllGather, detail, operands, Work::Moves(moves))
        .cut_into(chunk, world * chunk, if in_place { world } else { 1 }, world)
        .in_sections(sections)
        .sending(sent)
}

/// Chunks of other hosts' ranks, from their partners here.
pub(super) fn spread(hosts: &Hosts) -> Vec<Pull> {
    hosts.remote().map(|rank| Pull { from: hosts.partner_here(rank), chunk: rank, to: rank }).collect()
}
