//! A linear map of one-hot inputs: a sum of weight rows. With one field it is an embedding.

use ndarray::{ArrayView1, ArrayView2, ArrayViewMut1, ArrayViewMut2};

use crate::{Result, Scalar};

/// y_r = bias + Σ_f weight[offsets[f] + codes[r, f]].
///
/// `codes` [rows, fields]; `offsets` [fields]: the first weight row of each field; `weight`
/// [inputs, width], stored input-major (one row per one-hot input); `y` [rows, width].
pub fn forward<T: Scalar>(
    codes: ArrayView2<u8>,
    offsets: &[usize],
    weight: ArrayView2<T>,
    bias: Option<ArrayView1<T>>,
    y: ArrayViewMut2<T>,
) -> Result<()> {
    let _ = (codes, offsets, weight, bias, y);
    todo!()
}

/// dweight[offsets[f] + codes[r, f]] += dy_r; dbias += Σ dy_r. `dy`, `dweight` and `dbias` may be
/// the same range of columns of the full arrays (the way to split this over threads).
pub fn backward<T: Scalar>(
    codes: ArrayView2<u8>,
    offsets: &[usize],
    dy: ArrayView2<T>,
    dweight: ArrayViewMut2<T>,
    dbias: Option<ArrayViewMut1<T>>,
) -> Result<()> {
    let _ = (codes, offsets, dy, dweight, dbias);
    todo!()
}
