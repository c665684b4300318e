//! Types of elements and ways to combine them, as the command line names them.

use clap::ValueEnum;
use pillion_collectives::Reduction;
use pillion_kernels::DType;

use crate::pattern::REDUCTIONS;

/// What follows -t.
#[derive(Clone, Copy, Debug)]
pub(crate) enum TypeArgument {
    One(DType),
    All,
}

impl TypeArgument {
    /// In order.
    pub(crate) fn dtypes(self) -> Vec<DType> {
        match self {
            TypeArgument::One(dtype) => vec![dtype],
            TypeArgument::All => DType::ALL.to_vec(),
        }
    }
}

/// What nccl-tests, NumPy and C call types that have other names here.
const ALIASES: [(&str, DType); 15] = [
    ("float", DType::F32),
    ("float32", DType::F32),
    ("bfloat16", DType::Bf16),
    ("half", DType::F16),
    ("float16", DType::F16),
    ("double", DType::F64),
    ("float64", DType::F64),
    ("int8", DType::I8),
    ("uint8", DType::U8),
    ("byte", DType::U8),
    ("int", DType::I32),
    ("int32", DType::I32),
    ("uint32", DType::U32),
    ("int64", DType::I64),
    ("uint64", DType::U64),
];

/// Reads a type; a number is what nccl-tests' -t is followed by.
pub(crate) fn type_of(text: &str) -> Result<TypeArgument, String> {
    let text = text.to_ascii_lowercase();
    if let Ok(number) = text.parse::<usize>() {
        return Err(format!(
            "-t is the type of the elements here; for ranks that are threads give --threads -r {number}"
        ));
    }
    if text == "all" {
        return Ok(TypeArgument::All);
    }
    let own = DType::ALL.map(|dtype| (dtype.name(), dtype));
    let known = own.iter().chain(&ALIASES).find(|(name, _)| *name == text);
    known.map(|&(_, dtype)| TypeArgument::One(dtype)).ok_or_else(|| {
        let names: Vec<&str> = own.iter().map(|(name, _)| *name).collect();
        format!("there are {} and all", names.join(", "))
    })
}

/// What follows -o.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum RedopArgument {
    /// The sum
    Sum,
    /// The sum, divided by the number of ranks
    Avg,
    /// The product
    Prod,
    /// The smallest
    Min,
    /// The largest
    Max,
    /// Bits that all have
    Band,
    /// Bits that one has
    Bor,
    /// Bits that an odd number has
    Bxor,
    /// The sum of elements times 0.5
    #[value(alias = "mulsum")]
    Premul,
    /// Each of them, as far as the type has it
    All,
}

impl RedopArgument {
    /// In order.
    pub(crate) fn reductions(self) -> Vec<Reduction> {
        match self {
            RedopArgument::All => REDUCTIONS.to_vec(),
            one => vec![REDUCTIONS[one as usize]],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reductions_have_their_own_names() {
        for argument in RedopArgument::value_variants() {
            let (name, reductions) = (argument.to_possible_value().unwrap(), argument.reductions());
            assert!(*argument == RedopArgument::All || name.get_name() == reductions[0].name(), "{argument:?}");
        }
    }
}
