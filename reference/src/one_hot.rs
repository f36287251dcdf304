//! A linear map of one-hot inputs: a sum of weight rows. With one field it is an embedding.

use ndarray::{ArrayView1, ArrayView2, ArrayViewMut1, ArrayViewMut2};

use crate::error::check_shape;
use crate::{Error, Result, Scalar, linear};

/// y_r = bias + Σ_f weight[offsets\[f\] + codes[r, f]].
///
/// `codes` [rows, fields]; `offsets` \[fields\]: the first weight row of each field, increasing;
/// `weight` [inputs, width], stored input-major (one row per one-hot input); `bias` \[width\]; `y`
/// [rows, width]. A field ends where the next one begins, the last one with the weight; a code
/// beyond the end of its field is an error.
pub fn forward<T: Scalar>(
    codes: ArrayView2<u8>,
    offsets: &[usize],
    weight: ArrayView2<T>,
    bias: Option<ArrayView1<T>>,
    mut y: ArrayViewMut2<T>,
) -> Result<()> {
    let (inputs, width) = weight.dim();
    check_codes(codes, offsets, inputs)?;
    check_shape("y", y.shape(), &[codes.nrows(), width])?;
    if let Some(bias) = bias {
        check_shape("bias", bias.shape(), &[width])?;
    }
    for (codes, mut y) in codes.rows().into_iter().zip(y.rows_mut()) {
        match bias {
            Some(bias) => y.assign(&bias),
            None => y.fill(T::zero()),
        }
        for (&code, &offset) in codes.iter().zip(offsets) {
            add(weight.row(offset + usize::from(code)), y.view_mut());
        }
    }
    Ok(())
}

/// dweight[offsets\[f\] + codes[r, f]] += dy_r; dbias += Σ dy_r. `dy`, `dweight` and `dbias` may be
/// the same range of columns of the full arrays (the way to split this over threads).
pub fn backward<T: Scalar>(
    codes: ArrayView2<u8>,
    offsets: &[usize],
    dy: ArrayView2<T>,
    mut dweight: ArrayViewMut2<T>,
    dbias: Option<ArrayViewMut1<T>>,
) -> Result<()> {
    let (inputs, width) = dweight.dim();
    check_codes(codes, offsets, inputs)?;
    check_shape("dy", dy.shape(), &[codes.nrows(), width])?;
    if let Some(dbias) = dbias {
        linear::backward_bias(dy, dbias)?;
    }
    for (codes, dy) in codes.rows().into_iter().zip(dy.rows()) {
        for (&code, &offset) in codes.iter().zip(offsets) {
            add(dy, dweight.row_mut(offset + usize::from(code)));
        }
    }
    Ok(())
}

/// sum += x: the inner loop of both directions, on slices where the rows are contiguous.
fn add<T: Scalar>(x: ArrayView1<T>, mut sum: ArrayViewMut1<T>) {
    match (x.as_slice(), sum.as_slice_mut()) {
        (Some(x), Some(sum)) => {
            for (sum, &x) in sum.iter_mut().zip(x) {
                *sum += x;
            }
        }
        _ => sum += &x,
    }
}

/// Checks that every code names a weight row of its own field; shapes as in [`forward`].
pub fn check_codes(codes: ArrayView2<u8>, offsets: &[usize], inputs: usize) -> Result<()> {
    check_shape("offsets", &[offsets.len()], &[codes.ncols()])?;
    let ends = offsets.iter().skip(1).copied().chain([inputs]);
    for (field, (&offset, end)) in offsets.iter().zip(ends).enumerate() {
        if offset >= end {
            return Err(Error::value(
                "offsets",
                format!("{offset} for field {field}"),
                format!("less than {end}, where that field ends"),
            ));
        }
        let extent = end - offset;
        let wrong = |&code: &u8| usize::from(code) >= extent;
        if let Some(row) = codes.column(field).iter().position(wrong) {
            return Err(Error::value(
                "codes",
                format!("{} at row {row}, field {field}", codes[[row, field]]),
                format!("less than {extent}"),
            ));
        }
    }
    Ok(())
}
