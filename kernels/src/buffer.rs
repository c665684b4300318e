//! Memory with one owner ([`Buffer`]), and the borrows that kernels take ([`View`], [`ViewMut`]).
//!
//! A `Buffer` points into a [`Region`]: heap memory of a device, or a piece of a communicator's arena that other
//! ranks map too. A [`Span`] is what an operation in flight keeps: it holds the region alive and says where to
//! read or write, and turning it into a slice is `unsafe`, because only the operation's protocol knows that nobody else is there.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::any::Any;
use std::marker::PhantomData;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;

use parking_lot::{Mutex, MutexGuard};

use crate::{DType, Element, Error};

/// Buffers start at multiples of this many bytes: a page, so that no two of them share a cache line or a TLB entry.
const ALIGNMENT: usize = 4096;

/// Serialises every access to memory of a deferring device (see [`exclusive`]).
static DEFERRED_ACCESS: Mutex<()> = Mutex::new(());

/// A range of addresses that stays valid while anything refers to it.
pub struct Region {
    start: NonNull<u8>,
    bytes: usize,
    deferred: bool,
    /// Unmaps or frees when the last reference goes.
    _owner: Box<dyn Any + Send + Sync>,
}

// SAFETY: a Region is an address range, not an access to it. Every dereference goes through `Span`, whose unsafe
// functions state what the caller must know.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

impl Region {
    /// Wraps memory that somebody else owns, such as a mapping shared with other ranks.
    ///
    /// # Safety
    /// `start..start + bytes` must be mapped readable and writable for as long as `owner` lives, must be aligned to 64 bytes, and no other
    /// `Region` of this process may overlap it unless the code that accesses both orders the accesses itself.
    pub unsafe fn from_raw(
        start: NonNull<u8>,
        bytes: usize,
        deferred: bool,
        owner: Box<dyn Any + Send + Sync>,
    ) -> Region {
        assert!(start.as_ptr().addr().is_multiple_of(64), "a region starts at a multiple of 64 bytes");
        Region { start, bytes, deferred, _owner: owner }
    }

    /// Zeroed heap memory.
    fn heap(device: &'static str, bytes: usize, deferred: bool) -> Result<Region, Error> {
        let layout =
            Layout::from_size_align(bytes.max(1), ALIGNMENT).map_err(|_| Error::OutOfMemory { device, bytes })?;
        // SAFETY: the layout's size is at least 1.
        let start = NonNull::new(unsafe { alloc_zeroed(layout) }).ok_or(Error::OutOfMemory { device, bytes })?;
        let heap = Heap { start, layout };
        // SAFETY: `Heap` frees the allocation when dropped and not before; nobody else has the address.
        Ok(unsafe { Region::from_raw(start, bytes, deferred, Box::new(heap)) })
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

    /// Address of the first element.
    pub fn address(&self) -> NonNull<u8> {
        // SAFETY: the constructors keep `offset` inside the region.
        unsafe { self.region.start.add(self.offset) }
    }

    /// Whether the memory belongs to a device that runs work later than the call.
    pub fn deferred(&self) -> bool {
        self.region.deferred
    }

    /// The elements, for reading.
    ///
    /// # Safety
    /// Nobody may write them while the slice lives.
    pub unsafe fn as_slice<T: Element>(&self) -> &[T] {
        assert_eq!(self.dtype, T::DTYPE, "a kernel asked for another dtype than the buffer's");
        // SAFETY: the span lies in a live region (constructors), aligned for T (offsets are multiples of the element size, regions of
        // 64 bytes); any bit pattern is a T; no writer, by the caller's promise.
        unsafe { std::slice::from_raw_parts(self.address().cast().as_ptr(), self.len) }
    }

    /// The elements, for writing.
    ///
    /// # Safety
    /// Nobody else may read or write them while the slice lives.
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

/// Holds the right to touch memory of a deferring device, where views in the program do not order accesses in time.
///
/// Whoever turns spans into slices outside the thread that owns the buffer (a deferring queue, a progress thread) takes
/// this first when [`Span::deferred`] says so. A missing dependency then gives wrong values, but never two accesses at once.
pub fn exclusive(deferred: bool) -> Option<MutexGuard<'static, ()>> {
    deferred.then(|| DEFERRED_ACCESS.lock())
}

/// Memory on a device, with one owner.
pub struct Buffer {
    span: Span,
}

impl Buffer {
    /// Zeroed heap memory for `len` elements; devices of the host call this.
    pub(crate) fn heap(device: &'static str, dtype: DType, len: usize, deferred: bool) -> Result<Buffer, Error> {
        let bytes = len.checked_mul(dtype.bytes()).ok_or(Error::OutOfMemory { device, bytes: usize::MAX })?;
        Ok(Buffer::whole(Region::heap(device, bytes, deferred)?, dtype))
    }

    /// A buffer over a whole region, which it takes over: no two buffers share memory.
    pub fn whole(region: Region, dtype: DType) -> Buffer {
        let len = region.bytes / dtype.bytes();
        Buffer { span: Span { region: Arc::new(region), offset: 0, len, dtype } }
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.span.len
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.span.len == 0
    }

    /// Type of the elements.
    pub fn dtype(&self) -> DType {
        self.span.dtype
    }

    /// Size in bytes.
    pub fn bytes(&self) -> usize {
        self.span.len * self.span.dtype.bytes()
    }

    /// All elements, for reading.
    pub fn view(&self) -> View<'_> {
        View { span: self.span.clone(), _borrow: PhantomData }
    }

    /// All elements, for writing.
    pub fn view_mut(&mut self) -> ViewMut<'_> {
        ViewMut { span: self.span.clone(), _borrow: PhantomData }
    }

    /// Some elements, for reading.
    pub fn slice(&self, range: Range<usize>) -> View<'_> {
        View { span: self.span.range(range), _borrow: PhantomData }
    }

    /// Some elements, for writing.
    pub fn slice_mut(&mut self, range: Range<usize>) -> ViewMut<'_> {
        ViewMut { span: self.span.range(range), _borrow: PhantomData }
    }

    /// What an operation keeps that has taken this buffer over.
    pub fn span(&self) -> Span {
        self.span.clone()
    }
}

impl std::fmt::Debug for Buffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Buffer({} × {})", self.len(), self.dtype())
    }
}

/// A shared borrow of elements.
#[derive(Clone)]
pub struct View<'a> {
    span: Span,
    _borrow: PhantomData<&'a Buffer>,
}

impl<'a> View<'a> {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.span.len
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.span.len == 0
    }

    /// Type of the elements.
    pub fn dtype(&self) -> DType {
        self.span.dtype
    }

    /// A part of it.
    pub fn slice(&self, range: Range<usize>) -> View<'a> {
        View { span: self.span.range(range), _borrow: PhantomData }
    }

    pub(crate) fn into_span(self) -> Span {
        self.span
    }
}

/// An exclusive borrow of elements.
pub struct ViewMut<'a> {
    span: Span,
    _borrow: PhantomData<&'a mut Buffer>,
}

impl<'a> ViewMut<'a> {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.span.len
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.span.len == 0
    }

    /// Type of the elements.
    pub fn dtype(&self) -> DType {
        self.span.dtype
    }

    /// The same elements for a shorter time.
    pub fn reborrow(&mut self) -> ViewMut<'_> {
        ViewMut { span: self.span.clone(), _borrow: PhantomData }
    }

    /// The same elements for reading.
    pub fn as_view(&self) -> View<'_> {
        View { span: self.span.clone(), _borrow: PhantomData }
    }

    /// A part of it.
    pub fn slice(self, range: Range<usize>) -> ViewMut<'a> {
        ViewMut { span: self.span.range(range), _borrow: PhantomData }
    }

    /// Two disjoint parts: the first `at` elements and the rest.
    pub fn split_at(self, at: usize) -> (ViewMut<'a>, ViewMut<'a>) {
        let tail = self.span.range(at..self.span.len);
        (ViewMut { span: self.span.range(0..at), _borrow: PhantomData }, ViewMut { span: tail, _borrow: PhantomData })
    }

    pub(crate) fn into_span(self) -> Span {
        self.span
    }
}
