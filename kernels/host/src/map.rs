//! Tensor maps: what a kernel is given to load boxes of a matrix by.

use crate::{Error, Result, View};

/// Tells a map from other bits; also in runtime/bulk.cpp.
const MAGIC: u64 = 0x7061_6d20_726f_736e;
/// Of a box, which is all that the model knows of the swizzle of 128 bytes.
const ROW_BYTES: usize = 128;
const MOST_BOX_ROWS: u32 = 256;
const MOST_EXTENT: u64 = 1 << 32;
const STRIDE_END: u64 = 1 << 40;

/// A matrix in global memory, and the box of it that one instruction loads, as plain data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Boxes {
    /// Of the first element: a multiple of 16.
    pub address: u64,
    /// Bytes of an element: 1, 2, 4 or 8.
    pub element: usize,
    /// 1 to 2³².
    pub columns: u64,
    /// 1 to 2³².
    pub rows: u64,
    /// Bytes from row to row: a multiple of 16 below 2⁴⁰.
    pub stride: u64,
    /// As many as are 128 bytes.
    pub box_columns: u32,
    /// 1 to 256.
    pub box_rows: u32,
}

/// For `const __grid_constant__ ptx::TensorMap`: [`Boxes`] in the executor's own encoding. Boxes arrive with the swizzle
/// of 128 bytes.
#[repr(C, align(64))]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TensorMap([u64; 16]);

impl TensorMap {
    /// Of a matrix without elements: nothing can be loaded by it.
    pub const EMPTY: Self = Self([0; 16]);

    /// Errors: [`Error::Map`].
    pub fn new(boxes: Boxes) -> Result<Self> {
        let Boxes {
            address,
            element,
            columns,
            rows,
            stride,
            box_columns,
            box_rows,
        } = boxes;
        let row_bytes = (box_columns as usize).saturating_mul(element);
        let rules = [
            (
                "address",
                address,
                "a multiple of 16",
                address != 0 && address.is_multiple_of(16),
            ),
            (
                "element",
                element as u64,
                "1, 2, 4 or 8 bytes",
                [1, 2, 4, 8].contains(&element),
            ),
            (
                "columns",
                columns,
                "1 to 2^32",
                (1..=MOST_EXTENT).contains(&columns),
            ),
            ("rows", rows, "1 to 2^32", (1..=MOST_EXTENT).contains(&rows)),
            (
                "stride",
                stride,
                "a multiple of 16 below 2^40",
                stride.is_multiple_of(16) && stride < STRIDE_END,
            ),
            (
                "box_columns",
                box_columns.into(),
                "128 bytes",
                row_bytes == ROW_BYTES,
            ),
            (
                "box_rows",
                box_rows.into(),
                "1 to 256",
                (1..=MOST_BOX_ROWS).contains(&box_rows),
            ),
        ];
        for (what, found, expected, holds) in rules {
            if !holds {
                return Err(Error::Map {
                    what,
                    found,
                    expected,
                });
            }
        }
        let mut words = [0; 16];
        words[..8].copy_from_slice(&[
            MAGIC,
            address,
            element as u64,
            columns,
            rows,
            stride,
            box_columns.into(),
            box_rows.into(),
        ]);
        Ok(Self(words))
    }

    /// The bits of one that [`words`](Self::words) gave; `None` for others.
    pub fn from_words(words: [u64; 16]) -> Option<Self> {
        (words[0] == MAGIC || words == Self::EMPTY.0).then_some(Self(words))
    }

    /// Its bits.
    pub fn words(&self) -> [u64; 16] {
        self.0
    }

    /// The memory from the matrix' first to its last element.
    pub fn view(&self) -> View {
        let [_, address, element, columns, rows, stride, ..] = self.0;
        View {
            address,
            bytes: (rows.saturating_sub(1) * stride + columns * element) as usize,
        }
    }
}
