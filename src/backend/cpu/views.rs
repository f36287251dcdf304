//! Parts of buffers as the reference's matrices, checked.

use std::ops::Range;

use dtmem_reference as reference;
use ndarray::{ArrayView2, ArrayViewMut2, s};

use crate::backend::{BackendError, Codes, In, OneHot, Out, Result, Span};
use crate::batch::{FamilyRows, PackedBatch};

/// Attaches the operation's name to an error of the reference.
pub(super) fn named<R>(operation: &'static str, result: reference::Result<R>) -> Result<R> {
    result.map_err(|source| BackendError::Operation { operation, source })
}

pub(super) fn part<'a, T>(operation: &'static str, buffer: &'a [T], span: Span) -> Result<&'a [T]> {
    buffer.get(span.range()).ok_or(BackendError::Buffer {
        operation,
        found: buffer.len(),
        expected: span.range().end,
    })
}

pub(super) fn part_mut<'a, T>(
    operation: &'static str,
    buffer: &'a mut [T],
    span: Span,
) -> Result<&'a mut [T]> {
    let found = buffer.len();
    buffer.get_mut(span.range()).ok_or(BackendError::Buffer {
        operation,
        found,
        expected: span.range().end,
    })
}

pub(super) fn front<'a, T>(
    operation: &'static str,
    buffer: &'a [T],
    len: usize,
) -> Result<&'a [T]> {
    part(operation, buffer, Span { offset: 0, len })
}

pub(super) fn front_mut<'a, T>(
    operation: &'static str,
    buffer: &'a mut [T],
    len: usize,
) -> Result<&'a mut [T]> {
    part_mut(operation, buffer, Span { offset: 0, len })
}

/// [rows, columns] at the start of a slice.
pub(super) fn matrix<'a, T>(
    operation: &'static str,
    buffer: &'a [T],
    rows: usize,
    columns: usize,
) -> Result<ArrayView2<'a, T>> {
    let buffer = front(operation, buffer, rows * columns)?;
    ArrayView2::from_shape((rows, columns), buffer).map_err(|_| BackendError::Buffer {
        operation,
        found: buffer.len(),
        expected: rows * columns,
    })
}

/// [`matrix`] to write.
pub(super) fn matrix_mut<'a, T>(
    operation: &'static str,
    buffer: &'a mut [T],
    rows: usize,
    columns: usize,
) -> Result<ArrayViewMut2<'a, T>> {
    let buffer = front_mut(operation, buffer, rows * columns)?;
    let found = buffer.len();
    ArrayViewMut2::from_shape((rows, columns), buffer).map_err(|_| BackendError::Buffer {
        operation,
        found,
        expected: rows * columns,
    })
}

/// Some columns of wider rows.
pub(super) fn columns<'a, T>(
    operation: &'static str,
    x: In<'a, Vec<T>>,
    rows: usize,
    columns: usize,
) -> Result<ArrayView2<'a, T>> {
    let (row, column) = (x.start / x.stride, x.start % x.stride);
    let all = part(operation, x.buffer, rows_from(row, rows, x.stride))?;
    let all = matrix(operation, all, rows, x.stride)?;
    if column + columns > x.stride {
        return Err(BackendError::Buffer {
            operation,
            found: x.stride,
            expected: column + columns,
        });
    }
    Ok(all.slice_move(s![.., column..column + columns]))
}

/// [`columns`] to write.
pub(super) fn columns_mut<'a, T>(
    operation: &'static str,
    x: Out<'a, Vec<T>>,
    rows: usize,
    columns: usize,
) -> Result<ArrayViewMut2<'a, T>> {
    let (row, column) = (x.start / x.stride, x.start % x.stride);
    let all = part_mut(operation, x.buffer, rows_from(row, rows, x.stride))?;
    let all = matrix_mut(operation, all, rows, x.stride)?;
    if column + columns > x.stride {
        return Err(BackendError::Buffer {
            operation,
            found: x.stride,
            expected: column + columns,
        });
    }
    Ok(all.slice_move(s![.., column..column + columns]))
}

/// Two different parts at once.
pub(super) fn two_parts<'a, T>(
    operation: &'static str,
    buffer: &'a mut [T],
    first: Span,
    second: Span,
) -> Result<(&'a mut [T], &'a mut [T])> {
    let found = buffer.len();
    match buffer.get_disjoint_mut([first.range(), second.range()]) {
        Ok([first, second]) => Ok((first, second)),
        Err(_) => Err(BackendError::Buffer {
            operation,
            found,
            expected: first.range().end.max(second.range().end),
        }),
    }
}

pub(super) fn span(range: &Range<usize>) -> Span {
    Span {
        offset: range.start,
        len: range.len(),
    }
}

pub(super) fn rows_of<'a>(
    operation: &'static str,
    batch: &'a PackedBatch,
    family: usize,
) -> Result<&'a FamilyRows> {
    batch.families.get(family).ok_or(BackendError::Buffer {
        operation,
        found: batch.families.len(),
        expected: family + 1,
    })
}

/// The codes of a family's observations.
pub(super) fn observation_codes<'a>(
    operation: &'static str,
    batch: &'a PackedBatch,
    family: usize,
) -> Result<&'a [u8]> {
    let codes = &rows_of(operation, batch, family)?.codes;
    part(operation, &batch.observations, span(codes))
}

/// Numbers of `rows` rows from `first` on.
pub(super) fn rows_from(first: usize, rows: usize, width: usize) -> Span {
    Span {
        offset: first * width,
        len: rows * width,
    }
}

/// The codes that a one-hot map reads [rows, fields], and which rows of their kind these are.
pub(super) fn code_matrix<'a>(
    batch: &'a PackedBatch,
    codes: Codes,
    map: &OneHot,
) -> Result<(ArrayView2<'a, u8>, Span)> {
    const NAME: &str = "one_hot";
    let (codes, rows) = match codes {
        Codes::Observations(family) => (
            observation_codes(NAME, batch, family)?,
            &rows_of(NAME, batch, family)?.observations,
        ),
        Codes::Actions(family) => {
            let rows = &rows_of(NAME, batch, family)?.actions;
            (part(NAME, &batch.actions, span(rows))?, rows)
        }
    };
    let codes = matrix(NAME, codes, rows.len(), map.offsets.len())?;
    Ok((codes, span(rows)))
}
