//! How a shard of the parameters is updated.

use pillion_kernels::{AdamW, Buffer, Stream, View, ViewMut};

use crate::Unit;
use crate::layout::Piece;

/// Updates master weights from gradients, one shard of a unit at a time.
pub trait Optimizer {
    /// The names of the numbers that it keeps for each weight between steps, f32, zero at first.
    /// The engine allocates and saves them if they are those of its policy
    /// ([`Policy::states`](crate::Policy)).
    fn states(&self) -> &'static [&'static str];

    /// Enqueues the update of a shard. The engine then rounds the master weights to the type in
    /// which they are gathered, unless [`Optimizer::writes_weights`].
    fn update(&self, shard: ShardUpdate<'_>);

    /// Whether [`Optimizer::update`] writes [`ShardUpdate::weights`] itself, in the same pass.
    fn writes_weights(&self) -> bool {
        false
    }
}

/// What an update of one unit's shard needs; the views are `[shard]`.
pub struct ShardUpdate<'s> {
    /// The unit.
    pub unit: usize,
    /// Its name and tensors.
    pub layout: &'s Unit,
    /// Where kernels go.
    pub stream: &'s dyn Stream,
    /// The gradient summed over tokens, f32. Zero for frozen tensors and for padding.
    pub gradient: View<'s>,
    /// What makes it the clipped mean, `[1]` f32: the clip factor divided by the number of tokens.
    pub scale: View<'s>,
    /// Number of this update, from 1.
    pub step: u64,
    /// Master weights, f32, to be written. Padding stays zero.
    pub master: ViewMut<'s>,
    /// The weights in the type in which they are gathered. None where that is f32: then the master
    /// weights are gathered.
    pub weights: Option<ViewMut<'s>>,
    /// What the optimizer keeps between steps.
    pub states: States<'s>,
    /// The parts of tensors that the shard holds.
    pub pieces: &'s [Piece],
}

/// What an optimizer keeps for the weights of a shard.
pub struct States<'s>(pub(crate) &'s mut [Buffer]);

impl States<'_> {
    /// State number `index`, in the order of [`Optimizer::states`]: `[shard]` f32, to be read and
    /// written.
    pub fn get(&mut self, index: usize) -> ViewMut<'_> {
        self.0[index].view_mut()
    }

    /// As many states as `N`, all at once.
    ///
    /// # Panics
    /// When there are not `N`.
    pub fn all<const N: usize>(&mut self) -> [ViewMut<'_>; N] {
        let states: &mut [Buffer; N] = (&mut *self.0).try_into().expect("an optimizer asks for its own states");
        states.each_mut().map(Buffer::view_mut)
    }
}

/// Enqueues the update of a shard by AdamW, whose settings may differ from tensor to tensor:
/// `settings` is asked for them by a tensor's number in the unit, and whether its specification says
/// that it decays. Frozen tensors stay as they are.
pub fn update_by_adamw(shard: ShardUpdate<'_>, settings: impl Fn(usize, bool) -> AdamW) {
    let ShardUpdate { layout, stream, gradient, scale, step, mut master, mut weights, mut states, pieces, .. } = shard;
    for piece in pieces {
        let tensor = &layout.tensors[piece.tensor];
        if tensor.frozen {
            continue;
        }
        let range = piece.in_shard.clone();
        let [m, v] = states.all().map(|state| state.slice(range.clone()));
        stream.adamw(
            weights.as_mut().map(|weights| weights.reborrow().slice(range.clone())),
            master.reborrow().slice(range.clone()),
            m,
            v,
            gradient.slice(range.clone()),
            scale.clone(),
            settings(piece.tensor, tensor.decay),
            step,
        );
    }
}

/// Loshchilov and Hutter 2019, algorithm 2: fused with the rounding of the weights. Weight decay
/// applies to the tensors whose specification says so, and frozen tensors stay as they are.
impl Optimizer for AdamW {
    fn states(&self) -> &'static [&'static str] {
        crate::policy::ADAMW_STATES
    }

    fn update(&self, shard: ShardUpdate<'_>) {
        update_by_adamw(shard, |_, decays| AdamW {
            weight_decay: if decays { self.weight_decay } else { 0.0 },
            ..*self
        });
    }

    fn writes_weights(&self) -> bool {
        true
    }
}
