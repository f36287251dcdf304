//! Linear maps y = x·Wᵀ + b, as separate products so that a caller can split each over threads.

use ndarray::{ArrayView1, ArrayView2, ArrayViewMut1, ArrayViewMut2};

use crate::{Result, Scalar};

/// y = beta·y + x·weightᵀ + bias. `x` [rows, in]; `weight` [out, in]; `bias` [out]; `y` [rows, out].
/// With beta = 0 the old content of `y` is not read (it may be NaN).
pub fn forward<T: Scalar>(
    x: ArrayView2<T>,
    weight: ArrayView2<T>,
    bias: Option<ArrayView1<T>>,
    beta: T,
    y: ArrayViewMut2<T>,
) -> Result<()> {
    let _ = (x, weight, bias, beta, y);
    todo!()
}

/// dx = beta·dx + dy·weight. `dy` [rows, out]; `weight` [out, in]; `dx` [rows, in].
pub fn backward_input<T: Scalar>(
    dy: ArrayView2<T>,
    weight: ArrayView2<T>,
    beta: T,
    dx: ArrayViewMut2<T>,
) -> Result<()> {
    let _ = (dy, weight, beta, dx);
    todo!()
}

/// dweight += dyᵀ·x. `dy` [rows, out]; `x` [rows, in]; `dweight` [out, in].
pub fn backward_weight<T: Scalar>(
    dy: ArrayView2<T>,
    x: ArrayView2<T>,
    dweight: ArrayViewMut2<T>,
) -> Result<()> {
    let _ = (dy, x, dweight);
    todo!()
}

/// dbias += Σ over rows of dy.
pub fn backward_bias<T: Scalar>(dy: ArrayView2<T>, dbias: ArrayViewMut1<T>) -> Result<()> {
    let _ = (dy, dbias);
    todo!()
}
