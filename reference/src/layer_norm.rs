//! Layer normalisation over the last axis.

use ndarray::{ArrayView1, ArrayView2, ArrayViewMut1, ArrayViewMut2, Zip};

use crate::error::check_shape;
use crate::{Error, Result, Scalar, lanes};

/// y = (x − mean) · rstd · weight + bias, with mean and rstd = 1/√(variance + epsilon) per row.
/// The variance is that of the row itself (divided by width) and taken around the mean, in a
/// second pass.
///
/// `x`, `y` [rows, width]; `weight`, `bias` \[width\]; `mean`, `rstd` \[rows\] are kept for [`backward`].
pub fn forward<T: Scalar>(
    x: ArrayView2<T>,
    weight: ArrayView1<T>,
    bias: ArrayView1<T>,
    epsilon: f64,
    mut y: ArrayViewMut2<T>,
    mut mean: ArrayViewMut1<T>,
    mut rstd: ArrayViewMut1<T>,
) -> Result<()> {
    let (rows, width) = x.dim();
    check_shape("weight", weight.shape(), &[width])?;
    check_shape("bias", bias.shape(), &[width])?;
    check_shape("y", y.shape(), &[rows, width])?;
    check_shape("mean", mean.shape(), &[rows])?;
    check_shape("rstd", rstd.shape(), &[rows])?;
    if !(epsilon > 0.0 && epsilon.is_finite()) {
        return Err(Error::value("epsilon", epsilon, "a positive number"));
    }
    let epsilon = T::from_f64(epsilon);
    let share = share_of_one(width);
    Zip::from(x.rows())
        .and(y.rows_mut())
        .and(&mut mean)
        .and(&mut rstd)
        .for_each(|x, y, mean, rstd| {
            let centre = lanes::sum(x, x, |x, _| x) * share;
            let variance = lanes::sum(x, x, |x, _| (x - centre) * (x - centre)) * share;
            let scale = (variance + epsilon).sqrt().recip();
            (*mean, *rstd) = (centre, scale);
            Zip::from(y)
                .and(x)
                .and(weight)
                .and(bias)
                .for_each(|y, &x, &weight, &bias| *y = (x - centre) * scale * weight + bias);
        });
    Ok(())
}

/// Gradients of [`forward`]. With x̂ = (x − mean)·rstd and g = dy·weight:
/// dx = rstd · (g − mean(g) − x̂ · mean(g·x̂)); dweight += Σ dy·x̂; dbias += Σ dy.
///
/// Shapes as in [`forward`].
pub fn backward<T: Scalar>(
    x: ArrayView2<T>,
    weight: ArrayView1<T>,
    mean: ArrayView1<T>,
    rstd: ArrayView1<T>,
    dy: ArrayView2<T>,
    mut dx: ArrayViewMut2<T>,
    mut dweight: ArrayViewMut1<T>,
    mut dbias: ArrayViewMut1<T>,
) -> Result<()> {
    let (rows, width) = x.dim();
    check_shape("weight", weight.shape(), &[width])?;
    check_shape("mean", mean.shape(), &[rows])?;
    check_shape("rstd", rstd.shape(), &[rows])?;
    check_shape("dy", dy.shape(), &[rows, width])?;
    check_shape("dx", dx.shape(), &[rows, width])?;
    check_shape("dweight", dweight.shape(), &[width])?;
    check_shape("dbias", dbias.shape(), &[width])?;
    let share = share_of_one(width);
    Zip::from(x.rows())
        .and(dy.rows())
        .and(dx.rows_mut())
        .and(mean)
        .and(rstd)
        .for_each(|x, dy, mut dx, &mean, &rstd| {
            let normal = |x| (x - mean) * rstd;
            Zip::from(&mut dx)
                .and(dy)
                .and(weight)
                .for_each(|g, &dy, &weight| *g = dy * weight);
            let g_mean = lanes::sum(dx.view(), x, |g, _| g) * share;
            let g_slope = lanes::sum(dx.view(), x, |g, x| g * normal(x)) * share;
            Zip::from(dx)
                .and(x)
                .for_each(|dx, &x| *dx = rstd * (*dx - g_mean - normal(x) * g_slope));
            Zip::from(&mut dweight)
                .and(&mut dbias)
                .and(dy)
                .and(x)
                .for_each(|dweight, dbias, &dy, &x| {
                    *dweight += dy * normal(x);
                    *dbias += dy;
                });
        });
    Ok(())
}

/// 1/width, the factor from a sum to a mean; 1 for an empty row.
fn share_of_one<T: Scalar>(width: usize) -> T {
    T::from_f64(1.0 / width.max(1) as f64)
}
