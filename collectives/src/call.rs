//! What the calls of ranks are made of, and how messages name them.

use pillion_kernels::DType;

use crate::memory::control::Call;
use crate::{Reduction, Sections};

/// The operations there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub(crate) enum Kind {
    AllGather = 1,
    ReduceScatter,
    AllReduce,
    Broadcast,
    Reduce,
    Gather,
    Scatter,
    AllToAll,
    GatherWindow,
    Scalars,
    Message,
    AllGatherV,
    GatherV,
    ScatterV,
    AllToAllV,
    ReduceScatterV,
}

impl Kind {
    const ALL: [Kind; 16] = [
        Kind::AllGather,
        Kind::ReduceScatter,
        Kind::AllReduce,
        Kind::Broadcast,
        Kind::Reduce,
        Kind::Gather,
        Kind::Scatter,
        Kind::AllToAll,
        Kind::GatherWindow,
        Kind::Scalars,
        Kind::Message,
        Kind::AllGatherV,
        Kind::GatherV,
        Kind::ScatterV,
        Kind::AllToAllV,
        Kind::ReduceScatterV,
    ];

    const fn name(self) -> &'static str {
        match self {
            Kind::AllGather => "all-gather",
            Kind::ReduceScatter => "reduce-scatter",
            Kind::AllReduce => "all-reduce",
            Kind::Broadcast => "broadcast",
            Kind::Reduce => "reduce",
            Kind::Gather => "gather",
            Kind::Scatter => "scatter",
            Kind::AllToAll => "all-to-all",
            Kind::GatherWindow => "window gather",
            Kind::Scalars => "scalar exchange",
            Kind::Message => "message",
            Kind::AllGatherV => "all-gather-v",
            Kind::GatherV => "gather-v",
            Kind::ScatterV => "scatter-v",
            Kind::AllToAllV => "all-to-all-v",
            Kind::ReduceScatterV => "reduce-scatter-v",
        }
    }
}

/// What scalars are exchanged for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Purpose {
    Barrier,
    PatientBarrier,
    Gather,
    Bytes,
    Allocate,
    Split,
    Reduce(Reduction),
    /// A step of an operation between GPUs.
    #[cfg_attr(not(feature = "cuda"), allow(dead_code, reason = "GPUs alone have steps"))]
    Step(Kind),
}

impl Purpose {
    /// Words from here on are steps, of kind 0 and on.
    const STEPS: u64 = 0x100;

    /// Of those that combine nothing.
    const NAMES: [&str; 6] =
        ["barrier", "patient barrier", "all-gather of scalars", "broadcast of bytes", "allocation", "split"];

    fn to_word(self) -> u64 {
        match self {
            Purpose::Barrier => 0,
            Purpose::PatientBarrier => 1,
            Purpose::Gather => 2,
            Purpose::Bytes => 3,
            Purpose::Allocate => 4,
            Purpose::Split => 5,
            Purpose::Reduce(reduction) => Purpose::NAMES.len() as u64 + reduction.code(),
            Purpose::Step(kind) => Purpose::STEPS + kind as u64,
        }
    }

    fn describe(word: u64, factor: u64) -> String {
        if let Some(step) = word.checked_sub(Purpose::STEPS) {
            let kind = Kind::ALL.into_iter().find(|&kind| kind as u64 == step);
            return format!("a step of {} between GPUs", kind.map_or("an operation", Kind::name));
        }
        match Purpose::NAMES.get(word as usize) {
            Some(name) => (*name).to_owned(),
            None => format!("{} of scalars", Reduction::describe(word - Purpose::NAMES.len() as u64, factor)),
        }
    }
}

/// What tells operations of one kind apart, packed into a word: a root, a window's number, whether
/// it is in place, or how elements are combined.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Detail {
    None,
    Root(usize),
    InPlace,
    Window(u64),
    Purpose(Purpose),
    Reduction {
        reduction: Reduction,
        output: DType,
        groups: usize,
        root: Option<usize>,
        /// Numbers that ride along.
        sideband: usize,
    },
}

impl Detail {
    pub(crate) fn to_word(self) -> u64 {
        match self {
            Detail::None => 0,
            Detail::InPlace => 1,
            Detail::Root(root) => 1 + root as u64,
            Detail::Window(number) => number,
            Detail::Purpose(purpose) => purpose.to_word(),
            Detail::Reduction { reduction, output, groups, root, sideband } => {
                let root = root.map_or(0, |root| 1 + root as u64);
                root | (groups as u64) << 24 | (output as u64) << 48 | reduction.code() << 52 | (sideband as u64) << 56
            }
        }
    }

    fn factor_bits(self) -> u64 {
        match self {
            Detail::Reduction { reduction, .. } | Detail::Purpose(Purpose::Reduce(reduction)) => {
                reduction.factor_bits()
            }
            _ => 0,
        }
    }
}

/// A call with its sequence number still open.
pub(crate) fn call(kind: Kind, dtype: Option<DType>, deferred: bool, count: usize, detail: Detail) -> Call {
    Call {
        sequence: 0,
        kind: kind as u64,
        dtype: dtype.map_or(0, |dtype| 1 + dtype as u64),
        memory: u64::from(deferred),
        count: count as u64,
        detail: detail.to_word(),
        factor: detail.factor_bits(),
    }
}

/// The same call for buffers that are cut into sections.
pub(crate) fn in_sections(call: Call, sections: Option<&Sections>) -> Call {
    Call { memory: call.memory | sections.map_or(0, |sections| sections.digest() << 1), ..call }
}

/// The kind of a call's operation.
pub(crate) fn kind(call: Call) -> Option<Kind> {
    Kind::ALL.into_iter().find(|&kind| kind as u64 == call.kind)
}

/// The name of a call's operation.
pub(crate) fn name(call: Call) -> &'static str {
    kind(call).map_or("unknown operation", Kind::name)
}

/// A call in words.
pub(crate) fn describe(call: Call) -> String {
    let (kind, name) = (kind(call), name(call));
    if kind == Some(Kind::Scalars) && call.count == 0 {
        // Barriers, and what else has no values.
        return format!("{} #{}", Purpose::describe(call.detail, call.factor), call.sequence);
    }
    let dtype_of = |word| DType::ALL.into_iter().find(|&dtype| dtype as u64 == word);
    let dtype = call.dtype.checked_sub(1).and_then(dtype_of);
    let elements = dtype.map_or_else(|| call.count.to_string(), |dtype| format!("{} × {dtype}", call.count));
    let root = |word: u64| if word == 0 { String::new() } else { format!(" (root {})", word - 1) };
    let detail = match kind {
        Some(Kind::Broadcast | Kind::Gather | Kind::GatherV | Kind::Scatter | Kind::ScatterV) => root(call.detail),
        Some(Kind::AllGather) if call.detail == 1 => " in place".to_owned(),
        Some(Kind::Scalars) => format!(" ({})", Purpose::describe(call.detail, call.factor)),
        Some(Kind::GatherWindow) => format!(" (window {})", call.detail),
        Some(Kind::ReduceScatter | Kind::ReduceScatterV | Kind::AllReduce | Kind::Reduce) => {
            let reduction = Reduction::describe(call.detail >> 52 & 0xf, call.factor);
            let output = dtype_of(call.detail >> 48 & 0xf).filter(|&output| Some(output) != dtype);
            let groups = match call.detail >> 24 & 0xff_ffff {
                0 | 1 => String::new(),
                groups => format!(" in {groups} groups"),
            };
            let output = output.map_or_else(String::new, |output| format!(" to {output}"));
            let sideband = match call.detail >> 56 {
                0 => String::new(),
                numbers => format!(" with a sideband of {numbers}"),
            };
            format!(" ({reduction}{output}{groups}){sideband}{}", root(call.detail & 0xff_ffff))
        }
        _ => String::new(),
    };
    let sections = match call.memory >> 1 {
        0 => String::new(),
        mark => format!(" in {} sections (cut {:04x})", mark >> 16, mark & 0xffff),
    };
    let device = if call.memory & 1 == 1 { " on a deferring device" } else { "" };
    format!("{name} #{} of {elements}{sections}{detail}{device}", call.sequence)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_are_described_with_what_tells_them_apart() {
        let sum = |reduction, output, groups, root| {
            let sideband = if groups == 2 { 4 } else { 0 };
            Detail::Reduction { reduction, output, groups, root, sideband }
        };
        let cases = [
            (call(Kind::AllGather, Some(DType::F32), false, 8, Detail::None), "all-gather #0 of 8 × f32"),
            (call(Kind::Broadcast, Some(DType::I64), false, 1, Detail::Root(3)), "broadcast #0 of 1 × i64 (root 3)"),
            (
                call(Kind::ReduceScatter, Some(DType::Bf16), true, 6, sum(Reduction::Sum, DType::F32, 2, None)),
                "reduce-scatter #0 of 6 × bf16 (sum to f32 in 2 groups) with a sideband of 4 on a deferring device",
            ),
            (
                call(Kind::Reduce, Some(DType::F64), false, 5, sum(Reduction::Max, DType::F64, 1, Some(0))),
                "reduce #0 of 5 × f64 (max) (root 0)",
            ),
            (
                call(Kind::AllReduce, Some(DType::U8), false, 5, sum(Reduction::PremulSum(0.5), DType::U8, 1, None)),
                "all-reduce #0 of 5 × u8 (premul by 0.5)",
            ),
            (
                call(Kind::Scalars, None, false, 3, Detail::Purpose(Purpose::Reduce(Reduction::Max))),
                "scalar exchange #0 of 3 (max of scalars)",
            ),
            (call(Kind::Scalars, None, false, 0, Detail::Purpose(Purpose::Split)), "split #0"),
            (
                call(Kind::Scalars, None, false, 10, Detail::Purpose(Purpose::Step(Kind::AllReduce))),
                "scalar exchange #0 of 10 (a step of all-reduce between GPUs)",
            ),
        ];
        for (call, expected) in cases {
            assert_eq!(describe(call), expected);
        }
        let in_sections = |chunks: &[usize]| {
            let call = call(Kind::AllGather, Some(DType::F32), false, 8, Detail::None);
            describe(super::in_sections(call, Some(&Sections::new(chunks).unwrap())))
        };
        assert!(in_sections(&[1, 3]).starts_with("all-gather #0 of 8 × f32 in 2 sections (cut "));
        assert_ne!(in_sections(&[1, 3]), in_sections(&[3, 1]));
    }
}
