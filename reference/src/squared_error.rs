//! Squared error of predicted numbers.

use ndarray::{ArrayView2, ArrayViewMut2};

use crate::error::check_shape;
use crate::{Result, Scalar};

/// Loss and gradient in one pass. A row's loss is (1/size) · Σ (y − t)², its gradient
/// dy = scale · (2/size) · (y − t). `y`, `targets`, `dy` [rows, size]; a row whose number in `known`
/// \[rows\] is negative has no target: no loss, and a gradient of 0. Gives the sum of the losses, in
/// f64 and not scaled.
pub fn forward_backward<T: Scalar>(
    y: ArrayView2<T>,
    targets: ArrayView2<f32>,
    known: &[i32],
    scale: T,
    mut dy: ArrayViewMut2<T>,
) -> Result<f64> {
    let (rows, size) = y.dim();
    check_shape("targets", targets.shape(), &[rows, size])?;
    check_shape("known", &[known.len()], &[rows])?;
    check_shape("dy", dy.shape(), &[rows, size])?;
    let each = 1.0 / size.max(1) as f64;
    let factor = scale * T::from_f64(2.0 * each);
    let mut loss = 0.0;
    for (row, &known) in known.iter().enumerate() {
        for column in 0..size {
            let place = [row, column];
            if known < 0 {
                dy[place] = T::zero();
                continue;
            }
            let difference = y[place] - T::from_f64(f64::from(targets[place]));
            dy[place] = factor * difference;
            loss += each * difference.to_f64().powi(2);
        }
    }
    Ok(loss)
}
