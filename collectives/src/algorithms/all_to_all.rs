//! All-to-all: after one step rank r copies chunk r of every rank's buffer, or receives it from another host. A rank reads S and writes S,
//! the lower bound.

use super::moves::{Moves, Pull};
use super::operation::{Operation, Work};
use super::sides::End;
use crate::call::{Detail, Kind};
use crate::hosts::Hosts;
use crate::request::Operands;

/// output\[p\] at rank r = chunk r of the input of rank p, of `chunk` elements.
pub(crate) fn all_to_all(hosts: &Hosts, rank: usize, operands: Operands, chunk: usize) -> Operation {
    let world = hosts.world();
    let own = hosts.local().iter().enumerate();
    let moves = Moves {
        pulls: own.map(|(from, &peer)| Pull { from, chunk: rank, to: peer }).collect(),
        sends: hosts.remote().map(|peer| (peer, peer)).collect(),
        source: End::Input,
        receives: hosts.remote().map(|peer| (peer, peer)).collect(),
        ..Moves::default()
    };
    let sent = (world - 1) * chunk * operands.dtype.bytes();
    Operation::new(Kind::AllToAll, Detail::None, operands, Work::Moves(moves))
        .cut_into(chunk, world * chunk, world, world)
        .sending(sent)
}
