//! The convolutional front end: 3×3, padding 1, stride 1, on grids.
//!
//! Feature maps are [channels, positions] per sample (channel-major), position = vx·height + vy,
//! so flattening is free.

use ndarray::{ArrayView1, ArrayView2, ArrayViewMut1, ArrayViewMut2};

use crate::{Result, Scalar};

/// A grid of one-hot cells: `width`×`height` positions, `cardinalities.len()` fields per cell.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Grid {
    /// Extent of the first axis (vx).
    pub width: usize,
    /// Extent of the second axis (vy).
    pub height: usize,
    /// Number of values of each field of a cell, e.g. [11, 6, 3].
    pub cardinalities: Vec<usize>,
}

impl Grid {
    /// One-hot channels: the sum of the cardinalities.
    pub fn channels(&self) -> usize {
        self.cardinalities.iter().sum()
    }
    /// width · height.
    pub fn positions(&self) -> usize {
        self.width * self.height
    }
}

/// First convolution on one-hot cells: a sum of weight rows.
///
/// `codes` [rows, positions·fields] as in an observation ([vx][vy][field]); `weight`
/// [channels·9, out], input-major: row (channel·3 + kx)·3 + ky; `y` [rows, out·positions].
pub fn one_hot_forward<T: Scalar>(
    grid: &Grid,
    codes: ArrayView2<u8>,
    weight: ArrayView2<T>,
    bias: ArrayView1<T>,
    y: ArrayViewMut2<T>,
) -> Result<()> {
    let _ = (grid, codes, weight, bias, y);
    todo!()
}

/// Gradients of [`one_hot_forward`]: dweight and dbias are added to.
pub fn one_hot_backward<T: Scalar>(
    grid: &Grid,
    codes: ArrayView2<u8>,
    dy: ArrayView2<T>,
    dweight: ArrayViewMut2<T>,
    dbias: ArrayViewMut1<T>,
) -> Result<()> {
    let _ = (grid, codes, dy, dweight, dbias);
    todo!()
}

/// Second convolution. `x` [rows, in·positions]; `weight` [out, in·9] with column
/// (channel·3 + kx)·3 + ky (PyTorch's order for an [out, in, 3, 3] weight); `y`
/// [rows, out·positions]; `columns` [in·9, positions] is scratch.
pub fn forward<T: Scalar>(
    grid: &Grid,
    x: ArrayView2<T>,
    weight: ArrayView2<T>,
    bias: ArrayView1<T>,
    y: ArrayViewMut2<T>,
    columns: &mut Vec<T>,
) -> Result<()> {
    let _ = (grid, x, weight, bias, y, columns);
    todo!()
}

/// Gradients of [`forward`]: dx is overwritten, dweight and dbias are added to.
pub fn backward<T: Scalar>(
    grid: &Grid,
    x: ArrayView2<T>,
    weight: ArrayView2<T>,
    dy: ArrayView2<T>,
    dx: ArrayViewMut2<T>,
    dweight: ArrayViewMut2<T>,
    dbias: ArrayViewMut1<T>,
    columns: &mut Vec<T>,
) -> Result<()> {
    let _ = (grid, x, weight, dy, dx, dweight, dbias, columns);
    todo!()
}
