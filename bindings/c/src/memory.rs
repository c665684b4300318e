//! Memory of the caller, and memory that ranks share.

use std::collections::BTreeMap;
use std::ffi::c_void;
use std::ops::Range;
use std::ptr::NonNull;

use parking_lot::Mutex;
use pillion_kernels::{Buffer, Cpu, DType, Space};

use crate::arguments::place;
use crate::communicator::Communicator;
use crate::status::{Failed, guard};

/// IEEE binary32.
pub const PILLION_F32: i32 = 0;
/// bfloat16.
pub const PILLION_BF16: i32 = 1;
/// IEEE binary16.
pub const PILLION_F16: i32 = 2;
/// IEEE binary64.
pub const PILLION_F64: i32 = 3;
/// Signed 8-bit.
pub const PILLION_I8: i32 = 4;
/// Unsigned 8-bit: bytes.
pub const PILLION_U8: i32 = 5;
/// Signed 32-bit.
pub const PILLION_I32: i32 = 6;
/// Unsigned 32-bit.
pub const PILLION_U32: i32 = 7;
/// Signed 64-bit.
pub const PILLION_I64: i32 = 8;
/// Unsigned 64-bit.
pub const PILLION_U64: i32 = 9;
/// A byte that is true unless it is 0.
pub const PILLION_BOOL: i32 = 10;

/// Elements in the caller's memory.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Tensor {
    /// The first element, at a multiple of its size. May be NULL where there are none.
    pub data: *mut c_void,
    /// Number of elements.
    pub count: usize,
    /// Their type, PILLION_F32 and so on.
    pub dtype: i32,
}

pub(crate) fn dtype(code: i32) -> Result<DType, Failed> {
    let known = usize::try_from(code).ok().and_then(|code| DType::ALL.get(code).copied());
    known.ok_or_else(|| Failed::Invalid(format!("there is no type {code}: give PILLION_F32 to PILLION_BOOL")))
}

impl Tensor {
    /// The addresses of its bytes.
    fn addresses(&self) -> Result<Range<usize>, Failed> {
        let bytes = self.count.checked_mul(dtype(self.dtype)?.bytes());
        let start = self.data.addr();
        let end = bytes.and_then(|bytes| start.checked_add(bytes));
        end.map(|end| start..end).ok_or_else(|| Failed::Invalid(format!("no memory has {} elements", self.count)))
    }

    /// Whether `own`, which is as long as a part for each rank, is the part of this rank.
    pub(crate) fn holds(&self, own: &Tensor, rank: usize) -> Result<bool, Failed> {
        let bytes = own.count.checked_mul(dtype(self.dtype)?.bytes());
        let place = bytes.and_then(|bytes| self.data.addr().checked_add(bytes.checked_mul(rank)?));
        Ok(own.dtype == self.dtype && place == Some(own.data.addr()))
    }

    /// Refuses a part that is not as long as that of one of `world` ranks.
    pub(crate) fn is_divided(&self, part: &Tensor, world: usize, whole_name: &str, name: &str) -> Result<(), Failed> {
        if part.count.checked_mul(world) == Some(self.count) {
            return Ok(());
        }
        let (whole, part) = (self.count, part.count);
        let text = format!(
            "{whole_name} has {whole} elements and {name} {part}, among {world} ranks: give {world} times as many"
        );
        Err(Failed::Invalid(text))
    }

    /// Whether both are the same elements.
    pub(crate) fn is(&self, other: &Tensor) -> bool {
        self.data == other.data && self.count == other.count && self.dtype == other.dtype
    }

    /// A buffer of these elements.
    ///
    /// # Safety
    /// The memory is there, and nobody else touches it, until the buffer is gone. Only the caller
    /// of the library knows: `pillion.h` says so.
    pub(crate) unsafe fn buffer(&self, what: &str) -> Result<Buffer, Failed> {
        let dtype = dtype(self.dtype)?;
        self.addresses()?;
        let start = match NonNull::new(self.data.cast::<u8>()) {
            Some(start) => start,
            // No element is there, and the address is a multiple of every size.
            None if self.count == 0 => NonNull::<u64>::dangling().cast(),
            None => return Err(Failed::Invalid(format!("{what} is NULL and has {} elements", self.count))),
        };
        // SAFETY: the caller's promise; the owner is nothing, because the memory is the caller's.
        Ok(unsafe { Buffer::foreign(start, self.count, dtype, Space::Host, Box::new(())) }?)
    }
}

/// Refuses tensors that share memory, because an operation reads one while it writes the other.
pub(crate) fn apart(tensors: &[(&str, &Tensor)]) -> Result<(), Failed> {
    let mut places = Vec::with_capacity(tensors.len());
    for (name, tensor) in tensors {
        let addresses = tensor.addresses()?;
        if !addresses.is_empty() {
            places.push((addresses.start, addresses.end, name));
        }
    }
    places.sort_unstable();
    match places.windows(2).find(|pair| pair[1].0 < pair[0].1) {
        Some(pair) => Err(Failed::Invalid(format!("{} and {} share memory: give each its own", pair[0].2, pair[1].2))),
        None => Ok(()),
    }
}

/// What pillion_allocate has given, by address.
static ALLOCATED: Mutex<BTreeMap<usize, Buffer>> = Mutex::new(BTreeMap::new());

/// Zeroed memory that the other ranks of this host read in place, which saves operations of any
/// communicator of the job a copy. It stays until pillion_free, also when the communicator is
/// closed. Only this rank calls.
///
/// # Safety
/// `communicator` is open, and `memory` is a place for a pointer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pillion_allocate(
    communicator: *const Communicator,
    bytes: usize,
    memory: *mut *mut c_void,
) -> i32 {
    guard(|| {
        // SAFETY: the caller's promise.
        let communicator = unsafe { Communicator::of(communicator) }?;
        let memory = place(memory, "memory")?;
        // Of no byte there would be no address of its own.
        let buffer = communicator.ranks.allocate_alone(&Cpu, DType::U8, bytes.max(1))?;
        let start = buffer.view().raw().pointer.as_ptr().cast::<c_void>();
        ALLOCATED.lock().insert(start.addr(), buffer);
        // SAFETY: a place for a pointer, by the caller's promise.
        unsafe { memory.write(start) };
        Ok(())
    })
}

/// Gives memory back that pillion_allocate gave. NULL does nothing. Only this rank calls; no work
/// uses the memory any more.
#[unsafe(no_mangle)]
pub extern "C" fn pillion_free(memory: *mut c_void) -> i32 {
    guard(|| {
        if memory.is_null() {
            return Ok(());
        }
        let buffer = ALLOCATED.lock().remove(&memory.addr());
        let unknown = || Failed::Invalid("pillion_allocate did not give this memory".to_owned());
        buffer.map(drop).ok_or_else(unknown)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_code_is_the_place_of_its_type() {
        let codes = [
            (PILLION_F32, DType::F32),
            (PILLION_BF16, DType::Bf16),
            (PILLION_F16, DType::F16),
            (PILLION_F64, DType::F64),
            (PILLION_I8, DType::I8),
            (PILLION_U8, DType::U8),
            (PILLION_I32, DType::I32),
            (PILLION_U32, DType::U32),
            (PILLION_I64, DType::I64),
            (PILLION_U64, DType::U64),
            (PILLION_BOOL, DType::Bool),
        ];
        assert_eq!(codes.map(|(code, _)| dtype(code).ok()), codes.map(|(_, dtype)| Some(dtype)));
        assert!(dtype(-1).is_err() && dtype(DType::ALL.len() as i32).is_err());
    }
}
