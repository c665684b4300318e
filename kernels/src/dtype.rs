//! Element types, as run-time values ([`DType`]) and as Rust types ([`Element`]).

use bytemuck::{Pod, Zeroable};
use half::{bf16, f16};

/// The type of a buffer's elements.
///
/// A step needs f32, bf16, f64, u32 and i64. Collectives move and combine all of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DType {
    /// IEEE binary32: sums, gradients of weights, optimizer state, master weights; activations where weights are gathered so.
    F32,
    /// bfloat16: gathered weights, and the activations that meet them.
    Bf16,
    /// IEEE binary16.
    F16,
    /// IEEE binary64: sums and statistics.
    F64,
    /// Signed 8-bit.
    I8,
    /// Unsigned 8-bit: bytes.
    U8,
    /// Signed 32-bit.
    I32,
    /// Unsigned 32-bit: token ids.
    U32,
    /// Signed 64-bit: counts.
    I64,
    /// Unsigned 64-bit.
    U64,
    /// A byte that is true unless it is 0 ([`Bool`]).
    Bool,
}

impl DType {
    /// All of them.
    pub const ALL: [DType; 11] = [
        DType::F32,
        DType::Bf16,
        DType::F16,
        DType::F64,
        DType::I8,
        DType::U8,
        DType::I32,
        DType::U32,
        DType::I64,
        DType::U64,
        DType::Bool,
    ];

    /// Size of one element in bytes.
    pub const fn bytes(self) -> usize {
        match self {
            DType::I8 | DType::U8 | DType::Bool => 1,
            DType::Bf16 | DType::F16 => 2,
            DType::F32 | DType::I32 | DType::U32 => 4,
            DType::F64 | DType::I64 | DType::U64 => 8,
        }
    }

    /// The name used in files and messages, as safetensors writes it in lower case.
    pub const fn name(self) -> &'static str {
        match self {
            DType::F32 => "f32",
            DType::Bf16 => "bf16",
            DType::F16 => "f16",
            DType::F64 => "f64",
            DType::I8 => "i8",
            DType::U8 => "u8",
            DType::I32 => "i32",
            DType::U32 => "u32",
            DType::I64 => "i64",
            DType::U64 => "u64",
            DType::Bool => "bool",
        }
    }

    /// Whether its values are floating-point numbers.
    pub const fn is_float(self) -> bool {
        matches!(self, DType::F32 | DType::Bf16 | DType::F16 | DType::F64)
    }
}

impl std::fmt::Display for DType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// A Rust type that is the element of some [`DType`].
pub trait Element: Pod + Send + Sync {
    /// Its run-time name.
    const DTYPE: DType;
}

/// A truth value in memory of others, which may hold any byte. Those that this library writes are 0
/// and 1.
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
#[repr(transparent)]
pub struct Bool(u8);

impl From<bool> for Bool {
    fn from(value: bool) -> Bool {
        Bool(u8::from(value))
    }
}

impl From<Bool> for bool {
    fn from(Bool(byte): Bool) -> bool {
        byte != 0
    }
}

impl PartialEq for Bool {
    fn eq(&self, other: &Bool) -> bool {
        bool::from(*self) == bool::from(*other)
    }
}

impl Eq for Bool {}

macro_rules! elements {
    ($($element:ty => $dtype:ident),* $(,)?) => {
        $(impl Element for $element {
            const DTYPE: DType = DType::$dtype;
        })*
    };
}
elements! {
    f32 => F32, bf16 => Bf16, f16 => F16, f64 => F64, i8 => I8, u8 => U8, i32 => I32, u32 => U32,
    i64 => I64, u64 => U64, Bool => Bool,
}

/// `$body` with `$T` as the Rust type of a [`DType`].
///
/// ```
/// use pillion_kernels::{DType, with_element};
///
/// for dtype in DType::ALL {
///     assert_eq!(with_element!(dtype, T => size_of::<T>()), dtype.bytes());
/// }
/// ```
#[macro_export]
macro_rules! with_element {
    ($dtype:expr, $T:ident => $body:expr) => {
        $crate::with_element!(@ $dtype, $T, $body,
            F32 f32, Bf16 half::bf16, F16 half::f16, F64 f64, I8 i8, U8 u8, I32 i32, U32 u32,
            I64 i64, U64 u64, Bool $crate::Bool)
    };
    (@ $dtype:expr, $T:ident, $body:expr, $($name:ident $element:ty),*) => {
        match $dtype {
            $($crate::DType::$name => {
                type $T = $element;
                $body
            })*
        }
    };
}
