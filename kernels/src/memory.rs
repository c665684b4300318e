//! Memory by address: whose it is ([`Space`]), how long it stays valid ([`Region`]), and the
//! elements that an operation in flight holds ([`Span`]).

use std::alloc::{Layout, alloc, alloc_zeroed, dealloc};
use std::any::Any;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;

use parking_lot::{Mutex, MutexGuard};

use crate::{DType, Element, Error, Part};

/// Allocations start at multiples of this many bytes: a page, so that no two of them share a cache
/// line or a TLB entry.
const ALIGNMENT: usize = 4096;
/// Bytes of a huge page, which the processor maps with one entry.
pub const HUGE_PAGE: usize = 2 << 20;
/// Bytes from which on a buffer asks for huge pages: the processor finds their addresses faster,
/// and the system pins fewer pages when another rank reads the buffer.
const LONG: usize = 2 * HUGE_PAGE;

/// Serialises every access to memory of a deferring device (see [`exclusive`]).
static DEFERRED_ACCESS: Mutex<()> = Mutex::new(());

/// The kind of memory that an address belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Space {
    /// Memory of the host.
    Host,
    /// Memory of the host in pages that do not move. A device copies from and to it by itself.
    Pinned,
    /// Memory of the device with this number. A processor cannot read it.
    Device(u32),
}

impl Space {
    /// Whether a processor can read and write it.
    pub fn is_host(self) -> bool {
        matches!(self, Space::Host | Space::Pinned)
    }
}

impl std::fmt::Display for Space {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Space::Host => f.write_str("host memory"),
            Space::Pinned => f.write_str("pinned host memory"),
            Space::Device(number) => write!(f, "memory of device {number}"),
        }
    }
}

/// A range of addresses that stays valid while anything refers to it.
pub struct Region {
    start: NonNull<u8>,
    bytes: usize,
    space: Space,
    deferred: bool,
    /// Unmaps or frees when the last reference goes.
    _owner: Box<dyn Any + Send + Sync>,
}

// SAFETY: a Region is an address range, not an access to it. Every dereference goes through `Span`,
// whose unsafe functions state what the caller must know.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

impl Region {
    /// Wraps memory that somebody else owns, such as a mapping shared with other ranks. It starts
    /// at any address.
    ///
    /// # Safety
    /// `start..start + bytes` must be valid memory of `space`, readable and writable, for as long
    /// as `owner` lives. No other `Region` of this process may overlap it, and nothing else may
    /// access it, unless the code that accesses both orders the accesses itself.
    pub unsafe fn from_raw(
        start: NonNull<u8>,
        bytes: usize,
        space: Space,
        owner: Box<dyn Any + Send + Sync>,
    ) -> Region {
        Region { start, bytes, space, deferred: false, _owner: owner }
    }

    /// The same memory, for a device whose work on it may run later than the call that enqueues it.
    pub fn deferred(self) -> Region {
        Region { deferred: true, ..self }
    }

    /// Whose memory it is.
    pub fn space(&self) -> Space {
        self.space
    }

    /// Where it starts.
    #[cfg(feature = "cuda")]
    pub(crate) fn start(&self) -> NonNull<u8> {
        self.start
    }

    /// Zeroed heap memory, in huge pages where it is long and the system gives some to those who
    /// ask.
    pub(crate) fn heap(device: &'static str, bytes: usize) -> Result<Region, Error> {
        let alignment = if bytes < LONG { ALIGNMENT } else { HUGE_PAGE };
        let layout =
            Layout::from_size_align(bytes.max(1), alignment).map_err(|_| Error::OutOfMemory { device, bytes })?;
        let allocate = if bytes < LONG { alloc_zeroed } else { alloc };
        // SAFETY: the layout's size is at least 1.
        let start = NonNull::new(unsafe { allocate(layout) }).ok_or(Error::OutOfMemory { device, bytes })?;
        let heap = Heap { start, layout };
        if bytes >= LONG {
            // Before the first access, which takes the pages. Where it is refused, pages are small.
            // SAFETY: whole huge pages inside the allocation, whose contents this does not change.
            unsafe { libc::madvise(start.as_ptr().cast(), bytes / HUGE_PAGE * HUGE_PAGE, libc::MADV_HUGEPAGE) };
            // SAFETY: the allocation, which nobody else has.
            unsafe { start.as_ptr().write_bytes(0, bytes) };
        }
        // SAFETY: `Heap` frees the allocation when dropped and not before; nobody else has the
        // address.
        Ok(unsafe { Region::from_raw(start, bytes, Space::Host, Box::new(heap)) })
    }
}

struct Heap {
    start: NonNull<u8>,
    layout: Layout,
}

// SAFETY: `Heap` only frees.
unsafe impl Send for Heap {}
// SAFETY: it has no methods that take `&self`.
unsafe impl Sync for Heap {}

impl Drop for Heap {
    fn drop(&mut self) {
        // SAFETY: allocated in `Region::heap` with this layout, freed once.
        unsafe { dealloc(self.start.as_ptr(), self.layout) }
    }
}

/// Where elements lie, for code that accesses them by address: a device, or another language.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Raw {
    /// Address of the first element, in `space`.
    pub pointer: NonNull<u8>,
    /// Number of elements.
    pub len: usize,
    /// Their type.
    pub dtype: DType,
    /// The memory that the address belongs to.
    pub space: Space,
}

/// `len` elements of one type inside a region, held by an operation in flight.
#[derive(Clone)]
pub struct Span {
    region: Arc<Region>,
    offset: usize,
    len: usize,
    dtype: DType,
}

impl Span {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Type of the elements.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// A region as elements of a type, as many as fit.
    ///
    /// # Errors
    /// [`Error::Misaligned`].
    pub(crate) fn whole(region: Region, dtype: DType) -> Result<Span, Error> {
        let len = region.bytes / dtype.bytes();
        Span { region: Arc::new(region), offset: 0, len, dtype }.aligned()
    }

    /// The elements of `part` at the start of these bytes of the span, whatever their type was.
    ///
    /// # Errors
    /// [`Error::Misaligned`].
    ///
    /// # Panics
    /// When the span has not so many bytes, or these hold fewer elements.
    pub(crate) fn reinterpreted(&self, bytes: Range<usize>, part: Part) -> Result<Span, Error> {
        let Part { dtype, len } = part;
        let available = self.len * self.dtype.bytes();
        assert!(bytes.start <= bytes.end && bytes.end <= available, "bytes {bytes:?} of a buffer of {available}");
        assert!(len <= bytes.len() / dtype.bytes(), "{len} × {dtype} in {} bytes", bytes.len());
        // In the region, because the bytes are those of this span, which is.
        Span { region: self.region.clone(), offset: self.offset + bytes.start, len, dtype }.aligned()
    }

    /// This span, if its address suits its type.
    fn aligned(self) -> Result<Span, Error> {
        let (address, dtype) = (self.raw().pointer.as_ptr().addr(), self.dtype);
        if address.is_multiple_of(dtype.bytes()) { Ok(self) } else { Err(Error::Misaligned { address, dtype }) }
    }

    /// Where the elements lie.
    pub fn raw(&self) -> Raw {
        // SAFETY: the constructors keep `offset` inside the region, or at its end.
        let pointer = unsafe { self.region.start.add(self.offset) };
        Raw { pointer, len: self.len, dtype: self.dtype, space: self.space() }
    }

    /// Whose memory it is.
    pub fn space(&self) -> Space {
        self.region.space
    }

    /// Address of the first element, for a processor.
    ///
    /// # Panics
    /// When it is memory of a device.
    pub fn address(&self) -> NonNull<u8> {
        assert!(self.space().is_host(), "a processor cannot access {}", self.space());
        self.raw().pointer
    }

    /// Whether a processor may access it whenever a borrow says so.
    pub(crate) fn yields_slices(&self) -> bool {
        self.space().is_host() && !self.deferred()
    }

    /// Whether work on the memory may run later than the call that enqueues it.
    pub fn deferred(&self) -> bool {
        self.region.deferred
    }

    /// The elements, for reading.
    ///
    /// # Safety
    /// Nobody may write them while the slice lives.
    ///
    /// # Panics
    /// When it is memory of a device, or of another type.
    pub unsafe fn as_slice<T: Element>(&self) -> &[T] {
        assert_eq!(self.dtype, T::DTYPE, "a kernel asked for another dtype than the buffer's");
        // SAFETY: the span lies in a live region of the host (constructors, `address`). It is
        // aligned for T: `Span::aligned` has checked its start, or that of the span from which
        // `Span::range` took it, a multiple of the element size before. Any bit pattern is a T; no
        // writer, by the caller's promise.
        unsafe { std::slice::from_raw_parts(self.address().cast().as_ptr(), self.len) }
    }

    /// The elements, for writing.
    ///
    /// # Safety
    /// Nobody else may read or write them while the slice lives.
    ///
    /// # Panics
    /// As for [`Span::as_slice`].
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn as_mut_slice<T: Element>(&self) -> &mut [T] {
        assert_eq!(self.dtype, T::DTYPE, "a kernel asked for another dtype than the buffer's");
        // SAFETY: as in `as_slice`, and exclusive by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.address().cast().as_ptr(), self.len) }
    }

    /// A part of it.
    ///
    /// # Panics
    /// When there are not so many elements.
    pub fn range(&self, range: Range<usize>) -> Span {
        assert!(range.start <= range.end && range.end <= self.len, "elements {range:?} of a buffer of {}", self.len);
        Span {
            region: self.region.clone(),
            offset: self.offset + range.start * self.dtype.bytes(),
            len: range.len(),
            dtype: self.dtype,
        }
    }
}

/// Holds the right to touch memory of a deferring device, where views in the program do not order
/// accesses in time.
///
/// Whoever turns spans into slices outside the thread that owns the buffer (a deferring stream, a
/// progress thread) takes this first when [`Span::deferred`] says so. A missing dependency then
/// gives wrong values, but never two accesses at once.
pub fn exclusive(deferred: bool) -> Option<MutexGuard<'static, ()>> {
    deferred.then(|| DEFERRED_ACCESS.lock())
}
