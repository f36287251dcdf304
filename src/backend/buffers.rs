//! Memory of a backend, and the batches in it.

use std::fmt::Debug;

use dtmem_reference::Scalar;

use super::Result;
use crate::batch::PackedBatch;

/// A part of a flat buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Span {
    /// Index of the first number.
    pub offset: usize,
    /// How many.
    pub len: usize,
}

impl Span {
    /// The index range.
    pub fn range(self) -> std::ops::Range<usize> {
        self.offset..self.offset + self.len
    }

    /// From the start of this span to the end of `last`; both lie in one buffer, this one first.
    pub fn through(self, last: Span) -> Span {
        Span {
            offset: self.offset,
            len: (last.offset + last.len).saturating_sub(self.offset),
        }
    }
}

/// What a buffer holds, which decides how precisely: a backend may compute in a narrow type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Results of operations and their gradients.
    Activation,
    /// Parameters and tables: kept exactly, and as operations read them.
    Parameter,
    /// Gradients of parameters, moments, statistics, losses.
    Exact,
}

/// Rows to read: row r, column c is `buffer[start + r·stride + c]`.
#[derive(Debug)]
pub struct In<'a, B> {
    /// Where the rows stand.
    pub buffer: &'a B,
    /// Distance of two rows.
    pub stride: usize,
    /// Index of the first number.
    pub start: usize,
}

impl<B> Clone for In<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<B> Copy for In<'_, B> {}

impl<'a, B> In<'a, B> {
    /// Rows that fill the buffer.
    pub fn rows(buffer: &'a B, width: usize) -> Self {
        Self::columns(buffer, width, 0)
    }

    /// Rows of the whole buffer from `row` on.
    pub fn rows_from(buffer: &'a B, width: usize, row: usize) -> Self {
        Self::columns(buffer, width, row * width)
    }

    /// Columns from `start` of rows that are `stride` wide.
    pub fn columns(buffer: &'a B, stride: usize, start: usize) -> Self {
        Self {
            buffer,
            stride,
            start,
        }
    }
}

/// Rows to write, as [`In`].
#[derive(Debug)]
pub struct Out<'a, B> {
    /// Where the rows stand.
    pub buffer: &'a mut B,
    /// Distance of two rows.
    pub stride: usize,
    /// Index of the first number.
    pub start: usize,
}

impl<'a, B> Out<'a, B> {
    /// Rows that fill the buffer.
    pub fn rows(buffer: &'a mut B, width: usize) -> Self {
        Self::columns(buffer, width, 0)
    }

    /// Rows of the whole buffer from `row` on.
    pub fn rows_from(buffer: &'a mut B, width: usize, row: usize) -> Self {
        Self::columns(buffer, width, row * width)
    }

    /// Columns from `start` of rows that are `stride` wide.
    pub fn columns(buffer: &'a mut B, stride: usize, start: usize) -> Self {
        Self {
            buffer,
            stride,
            start,
        }
    }
}

/// What every operation stands on: buffers are flat, and reused.
pub trait Buffers: Send + Sync {
    /// Type of one number as it travels to and from the host.
    type Element: Scalar;

    /// Floating-point memory.
    type Buffer: Debug + Send + Sync;

    /// A batch in the backend's memory.
    type Batch: Default + Debug + Send + Sync;

    /// A buffer of `len` numbers. Its content is not defined.
    fn buffer(&self, len: usize, kind: Kind) -> Result<Self::Buffer>;

    /// Copies from the host.
    fn upload(&self, from: &[Self::Element], to: &mut Self::Buffer, offset: usize) -> Result<()>;

    /// Copies to the host.
    fn download(&self, from: &Self::Buffer, offset: usize, to: &mut [Self::Element]) -> Result<()>;

    /// Brings a batch to the backend, reusing the memory of `to`. What was asked for before may
    /// still be going on.
    fn stage(&self, batch: &PackedBatch, to: &mut Self::Batch) -> Result<()>;

    /// buffer\[span\] = 0.
    fn zero(&self, buffer: &mut Self::Buffer, span: Span) -> Result<()>;

    /// Copies `len` numbers from the start of one buffer to `offset` in another of its kind.
    fn copy(
        &self,
        from: &Self::Buffer,
        to: &mut Self::Buffer,
        offset: usize,
        len: usize,
    ) -> Result<()>;
}
