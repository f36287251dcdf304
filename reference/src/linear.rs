//! Linear maps y = x·Wᵀ + b, as separate products so that a caller can split each over threads.

use ndarray::linalg::general_mat_mul;
use ndarray::{ArrayView1, ArrayView2, ArrayViewMut1, ArrayViewMut2};

use crate::error::check_shape;
use crate::{Result, Scalar};

/// y = beta·y + x·weightᵀ + bias. `x` [rows, in]; `weight` [out, in]; `bias` \[out\]; `y` [rows, out].
/// With beta = 0 the old content of `y` is not read (it may be NaN).
pub fn forward<T: Scalar>(
    x: ArrayView2<T>,
    weight: ArrayView2<T>,
    bias: Option<ArrayView1<T>>,
    beta: T,
    mut y: ArrayViewMut2<T>,
) -> Result<()> {
    let (rows, inputs) = x.dim();
    let outputs = weight.nrows();
    check_shape("weight", weight.shape(), &[outputs, inputs])?;
    check_shape("y", y.shape(), &[rows, outputs])?;
    let Some(bias) = bias else {
        general_mat_mul(T::one(), &x, &weight.t(), beta, &mut y);
        return Ok(());
    };
    check_shape("bias", bias.shape(), &[outputs])?;
    for mut row in y.rows_mut() {
        if beta.is_zero() {
            row.assign(&bias);
        } else {
            row.zip_mut_with(&bias, |y, &bias| *y = beta * *y + bias);
        }
    }
    general_mat_mul(T::one(), &x, &weight.t(), T::one(), &mut y);
    Ok(())
}

/// dx = beta·dx + dy·weight. `dy` [rows, out]; `weight` [out, in]; `dx` [rows, in].
/// With beta = 0 the old content of `dx` is not read.
pub fn backward_input<T: Scalar>(
    dy: ArrayView2<T>,
    weight: ArrayView2<T>,
    beta: T,
    mut dx: ArrayViewMut2<T>,
) -> Result<()> {
    let (rows, outputs) = dy.dim();
    let inputs = weight.ncols();
    check_shape("weight", weight.shape(), &[outputs, inputs])?;
    check_shape("dx", dx.shape(), &[rows, inputs])?;
    general_mat_mul(T::one(), &dy, &weight, beta, &mut dx);
    Ok(())
}

/// dweight += dyᵀ·x. `dy` [rows, out]; `x` [rows, in]; `dweight` [out, in].
pub fn backward_weight<T: Scalar>(
    dy: ArrayView2<T>,
    x: ArrayView2<T>,
    mut dweight: ArrayViewMut2<T>,
) -> Result<()> {
    let (rows, outputs) = dy.dim();
    let inputs = x.ncols();
    check_shape("x", x.shape(), &[rows, inputs])?;
    check_shape("dweight", dweight.shape(), &[outputs, inputs])?;
    general_mat_mul(T::one(), &dy.t(), &x, T::one(), &mut dweight);
    Ok(())
}

/// dbias += Σ over rows of dy. `dy` [rows, out]; `dbias` \[out\].
pub fn backward_bias<T: Scalar>(dy: ArrayView2<T>, mut dbias: ArrayViewMut1<T>) -> Result<()> {
    check_shape("dbias", dbias.shape(), &[dy.ncols()])?;
    for row in dy.rows() {
        dbias += &row;
    }
    Ok(())
}
