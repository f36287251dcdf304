//! Layer normalisation over the last axis.

use ndarray::{ArrayView1, ArrayView2, ArrayViewMut1, ArrayViewMut2};

use crate::error::check_shape;
use crate::{Result, Scalar};

/// y = (x − mean) · rstd · weight + bias, with mean and rstd = 1/√(variance + epsilon) per row.
///
/// `x`, `y` [rows, width]; `weight`, `bias` [width]; `mean`, `rstd` [rows] are kept for [`backward`].
pub fn forward<T: Scalar>(
    x: ArrayView2<T>,
    weight: ArrayView1<T>,
    bias: ArrayView1<T>,
    epsilon: f64,
    y: ArrayViewMut2<T>,
    mean: ArrayViewMut1<T>,
    rstd: ArrayViewMut1<T>,
) -> Result<()> {
    let _ = (x, weight, bias, epsilon, y, mean, rstd);
    check_shape("x", &[], &[])?;
    todo!()
}

/// Gradients of [`forward`]. With x̂ = (x − mean)·rstd and g = dy·weight:
/// dx = rstd · (g − mean(g) − x̂ · mean(g·x̂)); dweight += Σ dy·x̂; dbias += Σ dy.
pub fn backward<T: Scalar>(
    x: ArrayView2<T>,
    weight: ArrayView1<T>,
    mean: ArrayView1<T>,
    rstd: ArrayView1<T>,
    dy: ArrayView2<T>,
    dx: ArrayViewMut2<T>,
    dweight: ArrayViewMut1<T>,
    dbias: ArrayViewMut1<T>,
) -> Result<()> {
    let _ = (x, weight, mean, rstd, dy, dx, dweight, dbias);
    todo!()
}
