//! The operations: their names, sizes and bandwidths, as nccl-tests counts them.

use pillion_kernels::DType;

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Operation {
    /// Each rank gets its part of the combined inputs; size: the input.
    ReduceScatter,
    /// Each rank gets all shards; size: the output.
    AllGather,
    /// Each rank gets the combined inputs; size: the buffer.
    AllReduce,
    /// Each rank gets the buffer of rank 0; size: the buffer.
    Broadcast,
    /// Rank 0 gets the combined inputs; size: the buffer.
    Reduce,
    /// Rank 0 gets all shards; size: its output.
    Gather,
    /// Each rank gets its part of rank 0's input; size: that input.
    Scatter,
    /// Each rank gets its part of every rank's input; size: the input.
    AllToAll,
    /// Each rank sends to the next and receives from the previous one at once; size: the buffer.
    SendRecv,
    /// Nobody goes on before all have come.
    Barrier,
    /// Each rank writes its shard of a window, gathers it and reads all of it; size: the window.
    Window,
    /// One f64 is combined over the ranks, by the call that a training step makes for its scalars.
    Scalars,
    /// As reduce-scatter, of parts that differ in length: that of rank p is p + 1 times as long as
    /// that of rank 0.
    ReduceScatterV,
    /// As all-gather, of such shards.
    AllGatherV,
    /// As gather, of such shards.
    GatherV,
    /// As scatter, of such parts.
    ScatterV,
    /// As all-to-all: rank p sends to rank q the part of rank (p + q) mod the number of ranks.
    AllToAllV,
}

/// Which of an operation's forms.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// From one buffer into another.
    OutOfPlace,
    /// In one buffer.
    InPlace,
}

impl Operation {
    /// All of them, in the order of `all`.
    pub const ALL: [Operation; 17] = [
        Operation::ReduceScatter,
        Operation::AllGather,
        Operation::AllReduce,
        Operation::Broadcast,
        Operation::Reduce,
        Operation::Gather,
        Operation::Scatter,
        Operation::AllToAll,
        Operation::SendRecv,
        Operation::Barrier,
        Operation::Window,
        Operation::Scalars,
        Operation::ReduceScatterV,
        Operation::AllGatherV,
        Operation::GatherV,
        Operation::ScatterV,
        Operation::AllToAllV,
    ];

    /// Its name on the command line and in results.
    pub fn name(self) -> &'static str {
        match self {
            Operation::ReduceScatter => "reduce-scatter",
            Operation::AllGather => "all-gather",
            Operation::AllReduce => "all-reduce",
            Operation::Broadcast => "broadcast",
            Operation::Reduce => "reduce",
            Operation::Gather => "gather",
            Operation::Scatter => "scatter",
            Operation::AllToAll => "all-to-all",
            Operation::SendRecv => "send-recv",
            Operation::Barrier => "barrier",
            Operation::Window => "window",
            Operation::Scalars => "scalars",
            Operation::ReduceScatterV => "reduce-scatter-v",
            Operation::AllGatherV => "all-gather-v",
            Operation::GatherV => "gather-v",
            Operation::ScatterV => "scatter-v",
            Operation::AllToAllV => "all-to-all-v",
        }
    }

    /// Its forms, the one that is always measured first.
    pub fn forms(self) -> &'static [Form] {
        match self {
            Operation::ReduceScatter
            | Operation::AllGather
            | Operation::AllReduce
            | Operation::ReduceScatterV
            | Operation::AllGatherV => &[Form::OutOfPlace, Form::InPlace],
            Operation::Broadcast => &[Form::InPlace],
            _ => &[Form::OutOfPlace],
        }
    }

    /// Whether it combines elements.
    pub fn reduces(self) -> bool {
        use Operation::*;
        matches!(self, ReduceScatter | ReduceScatterV | AllReduce | Reduce | Scalars)
    }

    /// Whether it moves buffers, of a size and type that can be chosen.
    pub fn moves_buffers(self) -> bool {
        !matches!(self, Operation::Barrier | Operation::Scalars)
    }

    /// Whether its buffers are an arena's or private, as told.
    pub fn chooses_buffers(self) -> bool {
        self.moves_buffers() && self != Operation::Window
    }

    /// Whether it can run while its caller computes.
    pub fn overlaps(self) -> bool {
        self.chooses_buffers()
    }

    /// The root, where there is one; always rank 0.
    pub fn root(self) -> Option<usize> {
        use Operation::*;
        matches!(self, Broadcast | Reduce | Gather | Scatter | GatherV | ScatterV).then_some(0)
    }

    /// Whether the size is that of `world` parts, as long as each other on the average.
    fn is_of_parts(self) -> bool {
        use Operation::*;
        matches!(self, ReduceScatter | AllGather | Gather | Scatter | AllToAll | Window) || self.is_uneven()
    }

    /// Whether parts differ in length.
    pub fn is_uneven(self) -> bool {
        use Operation::*;
        matches!(self, ReduceScatterV | AllGatherV | GatherV | ScatterV | AllToAllV)
    }

    /// Elements of a part, or of the buffer where there are no parts: as many as fit into `bytes`. nccl-tests' column `count`.
    pub fn count(self, bytes: usize, world: usize, dtype: DType) -> usize {
        match self {
            Operation::Barrier => 0,
            Operation::Scalars => 1,
            _ if self.is_of_parts() => bytes / dtype.bytes() / world,
            _ => bytes / dtype.bytes(),
        }
    }

    /// Size in bytes of a call with that count.
    pub fn bytes(self, count: usize, world: usize, dtype: DType) -> usize {
        count * dtype.bytes() * if self.is_of_parts() { world } else { 1 }
    }

    /// busbw / algbw: the share of the size that must cross a rank's link, by nccl-tests' PERFORMANCE.md. A window counts as
    /// the all-gather that it replaces.
    pub fn bus_factor(self, world: usize) -> f64 {
        let n = world as f64;
        match self {
            Operation::AllReduce => 2.0 * (n - 1.0) / n,
            Operation::Broadcast | Operation::Reduce | Operation::SendRecv => 1.0,
            Operation::Barrier | Operation::Scalars => 0.0,
            _ => (n - 1.0) / n,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn names_are_those_of_the_command_line() {
        use clap::ValueEnum;
        for operation in Operation::ALL {
            assert_eq!(operation.to_possible_value().unwrap().get_name(), operation.name());
        }
        assert_eq!(Operation::value_variants(), Operation::ALL);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn a_size_is_rounded_down_by_less_than_an_element_of_each_rank(bytes in 0usize..100_000, world in 1usize..9) {
            for operation in Operation::ALL.into_iter().filter(|operation| operation.moves_buffers()) {
                for dtype in [DType::Bf16, DType::F32, DType::F64] {
                    let used = operation.bytes(operation.count(bytes, world, dtype), world, dtype);
                    prop_assert!(used <= bytes && bytes < used + world * dtype.bytes());
                }
            }
        }
    }

    /// PERFORMANCE.md of nccl-tests at n = 4.
    #[test]
    fn bus_factors_at_four_ranks() {
        let factors = Operation::ALL.map(|operation| operation.bus_factor(4));
        assert_eq!(
            factors,
            [0.75, 0.75, 1.5, 1.0, 1.0, 0.75, 0.75, 0.75, 1.0, 0.0, 0.75, 0.0, 0.75, 0.75, 0.75, 0.75, 0.75]
        );
    }
}
