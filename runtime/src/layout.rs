//! Where every element of every tensor lives: a pure function of (tensors, number of shards).
//!
//! The tensors of a unit lie flat, in order, and are padded with zeros so that every shard has the same length, a multiple of
//! 32 elements. Shards are contiguous, so a tensor may straddle them; [`Layout::pieces`] says which parts of which
//! tensors a shard holds.

use std::ops::Range;

use serde::{Deserialize, Serialize};

/// Shards are multiples of this many elements: a cache line of bf16.
pub(crate) const ALIGNMENT: usize = 32;

/// More elements than a unit can have: with 2¹⁶ bytes for each they would not fit an address.
pub(crate) const MOST: usize = usize::MAX >> 16;

/// Elements of a tensor of a shape, where there can be as many.
pub(crate) fn elements(shape: &[usize]) -> Option<usize> {
    shape.iter().try_fold(1usize, |product, &size| product.checked_mul(size))
}

/// A tensor as the model declares it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TensorSpec {
    /// Its name, unique in the model; Hugging Face's where there is one.
    pub name: String,
    /// Its shape, row-major.
    pub shape: Vec<usize>,
    /// Whether weight decay applies: matrices, as a rule.
    pub decay: bool,
    /// Whether it stays as it is: its gradient counts nowhere, and it is not updated. No checkpoint depends on it.
    #[serde(skip)]
    pub frozen: bool,
}

/// Tensors that are gathered together, as the model declares them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnitSpec {
    /// Its name, for tables and messages.
    pub name: String,
    /// Its tensors, in order.
    pub tensors: Vec<TensorSpec>,
}

/// A tensor with its place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tensor {
    /// Its name.
    pub name: String,
    /// Its shape, row-major.
    pub shape: Vec<usize>,
    /// Its elements in the unit's flat buffer.
    pub range: Range<usize>,
    /// Whether weight decay applies.
    pub decay: bool,
    /// Whether it stays as it is.
    pub frozen: bool,
}

/// A unit with its place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unit {
    /// Its name.
    pub name: String,
    /// Its tensors, in order, without gaps.
    pub tensors: Vec<Tensor>,
    /// Elements of its tensors.
    pub len: usize,
    /// Elements of one shard.
    pub shard: usize,
    /// Elements with padding: `shard` times the number of shards.
    pub padded: usize,
}

/// A part of a tensor that lies in one shard.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Index of the tensor in its unit.
    pub tensor: usize,
    /// Elements of the tensor.
    pub in_tensor: Range<usize>,
    /// The same elements in the shard.
    pub in_shard: Range<usize>,
}

/// Where everything lives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Number of shards: that of the ranks of the mesh's shard axis ([`crate::Policy::mesh`]).
    pub shards: usize,
    /// The units.
    pub units: Vec<Unit>,
    /// The units in the order in which a forward pass uses them; the backward pass goes the other way.
    pub order: Vec<usize>,
}

impl Layout {
    /// Lays `units` out in `shards` shards each; the forward pass uses them in order.
    ///
    /// # Panics
    /// When there are no shards, no units, two tensors with one name, or more elements than an address has room for.
    pub fn new(units: &[UnitSpec], shards: usize) -> Layout {
        assert!(shards > 0 && !units.is_empty(), "a layout of {} units in {shards} shards", units.len());
        let mut names = std::collections::HashSet::new();
        let place = |spec: &UnitSpec| {
            let mut len = 0;
            let tensors = spec.tensors.iter().map(|tensor| {
                let start = len;
                len = elements(&tensor.shape)
                    .and_then(|elements| elements.checked_add(len))
                    .filter(|&len| len < MOST)
                    .unwrap_or_else(|| {
                        panic!(
                            "tensor {} of shape {:?} in a unit with more elements than there is memory",
                            tensor.name, tensor.shape
                        )
                    });
                Tensor {
                    name: tensor.name.clone(),
                    shape: tensor.shape.clone(),
                    range: start..len,
                    decay: tensor.decay,
                    frozen: tensor.frozen,
                }
            });
            let tensors: Vec<Tensor> = tensors.collect();
            let shard = len.div_ceil(shards).next_multiple_of(ALIGNMENT);
            Unit { name: spec.name.clone(), tensors, len, shard, padded: shard * shards }
        };
        let units: Vec<Unit> = units.iter().map(place).collect();
        for tensor in units.iter().flat_map(|unit| &unit.tensors) {
            assert!(names.insert(&tensor.name), "two tensors are called {}", tensor.name);
        }
        let order = (0..units.len()).collect();
        Layout { shards, units, order }
    }

    /// The same, for a model whose forward pass uses the units in another order. One that it uses more than once holds tied tensors, say an
    /// embedding that is also the output projection; its gradient is reduced when the backward pass has come to its first use.
    ///
    /// # Panics
    /// When a unit is never used, or there is no such unit.
    pub fn visiting(self, order: Vec<usize>) -> Layout {
        let mut used = vec![false; self.units.len()];
        let exist = order.iter().all(|&unit| used.get_mut(unit).map(|used| *used = true).is_some());
        assert!(exist && used.iter().all(|&used| used), "an order {order:?} of {} units", self.units.len());
        Layout { order, ..self }
    }

    /// Number of parameters, without padding.
    pub fn parameters(&self) -> usize {
        self.units.iter().map(|unit| unit.len).sum()
    }

    /// Elements of one shard of each unit.
    pub fn shard_len(&self) -> usize {
        self.units.iter().map(|unit| unit.shard).sum()
    }

    /// The parts of tensors in shard number `shard` of a unit, in order.
    pub fn pieces(&self, unit: usize, shard: usize) -> impl Iterator<Item = Piece> + '_ {
        let unit = &self.units[unit];
        let shard = shard * unit.shard..(shard + 1) * unit.shard;
        unit.tensors.iter().enumerate().filter_map(move |(index, tensor)| {
            let start = tensor.range.start.max(shard.start);
            let end = tensor.range.end.min(shard.end);
            (start < end).then(|| Piece {
                tensor: index,
                in_tensor: start - tensor.range.start..end - tensor.range.start,
                in_shard: start - shard.start..end - shard.start,
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn units(shapes: &[Vec<Vec<usize>>]) -> Vec<UnitSpec> {
        let tensor = |unit: usize, index: usize, shape: &Vec<usize>| TensorSpec {
            name: format!("{unit}.{index}"),
            shape: shape.clone(),
            decay: shape.len() > 1,
            frozen: false,
        };
        let unit = |(index, shapes): (usize, &Vec<Vec<usize>>)| UnitSpec {
            name: format!("unit {index}"),
            tensors: shapes.iter().enumerate().map(|(at, shape)| tensor(index, at, shape)).collect(),
        };
        shapes.iter().enumerate().map(unit).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn pieces_cover_every_element_once(
            shapes in prop::collection::vec(prop::collection::vec(prop::collection::vec(1usize..20, 1..3), 1..5), 1..4),
            world in 1usize..9,
        ) {
            let layout = Layout::new(&units(&shapes), world);
            for (index, unit) in layout.units.iter().enumerate() {
                prop_assert_eq!(unit.padded, unit.shard * world);
                prop_assert!(unit.shard.is_multiple_of(ALIGNMENT) && unit.padded >= unit.len);
                prop_assert!(unit.padded < unit.len + world * ALIGNMENT + world, "no more padding than the shards need");
                let mut seen = vec![0; unit.len];
                for rank in 0..world {
                    for piece in layout.pieces(index, rank) {
                        let tensor = &unit.tensors[piece.tensor];
                        prop_assert_eq!(piece.in_tensor.len(), piece.in_shard.len());
                        for offset in 0..piece.in_tensor.len() {
                            let flat = tensor.range.start + piece.in_tensor.start + offset;
                            prop_assert_eq!(flat, rank * unit.shard + piece.in_shard.start + offset);
                            seen[flat] += 1;
                        }
                    }
                }
                prop_assert!(seen.iter().all(|&times| times == 1));
            }
        }
    }
}
