//! Memory with one owner ([`Buffer`]), and the borrows that kernels take ([`View`], [`ViewMut`]).
//!
//! A `Buffer` points into a [`Region`]: heap memory of a device, a piece of a communicator's arena
//! that other ranks map too, or memory of another program. Buffers that [`Buffer::divide`] made
//! share a region, and no two of them share an element. A [`Span`] is what an operation in
//! flight keeps: it holds the region alive and says where to read or write, and turning it into a
//! slice is `unsafe`, because only the operation's protocol knows that nobody else is there.

use std::any::Any;
use std::marker::PhantomData;
use std::ops::Range;
use std::ptr::NonNull;

use crate::{DType, Element, Error, Raw, Region, Space, Span};

/// Bytes of `len` elements.
pub(crate) fn byte_count(device: &'static str, dtype: DType, len: usize) -> Result<usize, Error> {
    len.checked_mul(dtype.bytes()).ok_or(Error::OutOfMemory { device, bytes: usize::MAX })
}

/// Memory on a device, with one owner.
pub struct Buffer {
    span: Span,
}

impl Buffer {
    /// The owner of a span's elements. No other buffer may own any of them.
    pub(crate) fn of(span: Span) -> Buffer {
        Buffer { span }
    }

    /// Gives up the buffer, and with it the right to lend its elements.
    pub(crate) fn into_span(self) -> Span {
        self.span
    }

    /// A buffer over a whole region, which it takes over: no two buffers share memory.
    ///
    /// # Errors
    /// [`Error::Misaligned`].
    pub fn whole(region: Region, dtype: DType) -> Result<Buffer, Error> {
        Ok(Buffer { span: Span::whole(region, dtype)? })
    }

    /// Memory of somebody else's, without a copy: `len` elements at `pointer`, which stay valid
    /// while `owner` lives.
    ///
    /// # Errors
    /// [`Error::Misaligned`]; [`Error::OutOfMemory`] when there is no such length.
    ///
    /// # Safety
    /// As for [`Region::from_raw`].
    pub unsafe fn foreign(
        pointer: NonNull<u8>,
        len: usize,
        dtype: DType,
        space: Space,
        owner: Box<dyn Any + Send + Sync>,
    ) -> Result<Buffer, Error> {
        let bytes = byte_count("foreign", dtype, len)?;
        // SAFETY: the caller's promise.
        Buffer::whole(unsafe { Region::from_raw(pointer, bytes, space, owner) }, dtype)
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.span.len()
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.span.len() == 0
    }

    /// Type of the elements.
    pub fn dtype(&self) -> DType {
        self.span.dtype()
    }

    /// Size in bytes.
    pub fn bytes(&self) -> usize {
        self.span.len() * self.span.dtype().bytes()
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

    /// Whose memory it is.
    pub fn space(&self) -> Space {
        self.span.space()
    }

    /// Whether work on the memory may run later than the call that enqueues it.
    pub fn is_deferred(&self) -> bool {
        self.span.deferred()
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
        self.span.len()
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.span.len() == 0
    }

    /// Type of the elements.
    pub fn dtype(&self) -> DType {
        self.span.dtype()
    }

    /// A part of it.
    pub fn slice(&self, range: Range<usize>) -> View<'a> {
        View { span: self.span.range(range), _borrow: PhantomData }
    }

    /// Where the elements lie. Reading them is sound once everything that writes them has run, and
    /// while the view lives.
    pub fn raw(&self) -> Raw {
        self.span.raw()
    }

    /// The elements, where a processor may read them at once: in memory of the host, on a device
    /// that runs its work at once. None elsewhere, and where the type is another.
    pub fn as_slice<T: Element>(&self) -> Option<&'a [T]> {
        if !self.span.yields_slices() || self.span.dtype() != T::DTYPE {
            return None;
        }
        // SAFETY: the span lies in a region of the host, is aligned for T (its constructors check
        // that), and any bit pattern is a T. This view borrows the buffer for 'a, which excludes
        // every `ViewMut` of these elements and keeps the region alive: no other buffer owns one of
        // them (`Buffer::whole`, `Buffer::divide`). No kernel still writes them: work on memory
        // that is not deferred has finished when its call returns, which every `Stream` promises.
        // An operation of a communicator owns its buffers until it is complete.
        Some(unsafe { std::slice::from_raw_parts(self.span.address().cast().as_ptr(), self.len()) })
    }

    /// What an operation keeps that reads these elements later.
    pub fn into_span(self) -> Span {
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
        self.span.len()
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.span.len() == 0
    }

    /// Type of the elements.
    pub fn dtype(&self) -> DType {
        self.span.dtype()
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
        let tail = self.span.range(at..self.span.len());
        (ViewMut { span: self.span.range(0..at), _borrow: PhantomData }, ViewMut { span: tail, _borrow: PhantomData })
    }

    /// As [`View::raw`], for writing too.
    pub fn raw(&self) -> Raw {
        self.span.raw()
    }

    /// As [`View::as_slice`], for writing.
    pub fn into_slice<T: Element>(self) -> Option<&'a mut [T]> {
        if !self.span.yields_slices() || self.span.dtype() != T::DTYPE {
            return None;
        }
        // SAFETY: as in `View::as_slice`; this view was the only borrow of these elements for 'a,
        // and is consumed.
        Some(unsafe { std::slice::from_raw_parts_mut(self.span.address().cast().as_ptr(), self.len()) })
    }

    /// What an operation keeps that writes these elements later.
    pub fn into_span(self) -> Span {
        self.span
    }
}
