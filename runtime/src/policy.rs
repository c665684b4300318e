//! How parameters are kept and moved: plain values.

use pillion_kernels::DType;
use serde::{Deserialize, Serialize};

/// How ranks get the weights they compute with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Gather {
    /// Into a slot of this rank's memory, one unit at a time.
    Copy,
    /// In place: every rank reads the others' shards through a window. One host only.
    Window,
}

impl std::fmt::Display for Gather {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Gather::Copy => "copy",
            Gather::Window => "window",
        })
    }
}

/// How parameters are kept and moved.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Policy {
    /// Type of the weights that are gathered and computed with: f32 or bf16. Master weights, optimizer state and
    /// gradients are f32.
    pub weights: DType,
    /// How weights are gathered.
    pub gather: Gather,
    /// Number of units gathered ahead of the one in use.
    pub prefetch: usize,
    /// Gathered units that exist at a time, and gradients on their way: at least `prefetch` + 1.
    pub slots: usize,
    /// Largest norm of the gradient; a longer one is scaled down to it. None: no limit.
    pub clip: Option<f64>,
}

impl Default for Policy {
    fn default() -> Policy {
        Policy { weights: DType::F32, gather: Gather::Window, prefetch: 1, slots: 2, clip: Some(1.0) }
    }
}
