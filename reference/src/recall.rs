//! The memory loss on what a content-addressed memory recalls (SPEC section 3, on section 4).
//!
//! A memory carries one more column for each recalled token p: 0 in M₀, 1 in the value of p, 0 in
//! every other value ([`Inputs`](crate::content_memory::Inputs): slots may be wider than keys). What
//! a token q of a later segment reads in it is its recall of p,
//!
//!   R_qp = Σ_i w_iq · (product of keep_i over the segments between) · w_ip β_ip,
//!
//! the share of p's value in what q reads: for a memory what A_qp is for attention, in \[0, 1\]. The
//! loss is that of attention with R in the place of A, over recalled tokens of earlier segments.

use ndarray::{ArrayView2, ArrayViewMut2};

use crate::attention::{LOG_FLOOR, Pairs, VARIANCE_FLOOR};
use crate::error::check_shape;
use crate::{Result, Scalar};

/// Loss and gradient of one segment: T tokens and C recalled tokens of their sequence.
///
/// `recall` R [T, C]; `recalled [C]` are the tokens behind the columns, relative to the start of the
/// sequence, ascending; those from `first`, the segment's own first token, on take no part. `pairs`
/// are those of the segment's tokens. `gradient` [T, C] is overwritten with
/// c (R − E) / max(R (1 − R), 1e-12), where c is `pair_gradient` = λ/Σ den, and 0 where there is no
/// loss. Returns the numerator −Σ (E log R + (1−E) log(1−R)), each logarithm at least −100.
///
/// # Errors
/// Shapes that do not fit.
pub fn recall_loss<T: Scalar>(
    recall: ArrayView2<T>,
    recalled: &[i32],
    first: i32,
    pairs: Pairs,
    pair_gradient: f64,
    mut gradient: ArrayViewMut2<T>,
) -> Result<f64> {
    check_shape("recall", recall.shape(), &[recall.nrows(), recalled.len()])?;
    check_shape("gradient", gradient.shape(), recall.shape())?;
    check_shape(
        "pair_offsets",
        &[pairs.offsets.len()],
        &[recall.nrows() + 1],
    )?;
    let mut loss = 0.0;
    gradient.fill(T::zero());
    for (query, (row, mut gradient)) in recall
        .rows()
        .into_iter()
        .zip(gradient.rows_mut())
        .enumerate()
    {
        let wanted = pairs.of_query(query).unwrap_or(&[]);
        let columns = row.iter().zip(&mut gradient).zip(recalled);
        for ((&share, gradient), key) in columns.take_while(|(_, key)| **key < first) {
            let wanted = wanted.binary_search(key).is_ok();
            // Rounding may carry a share a little beyond 1; clamp lets a NaN through.
            let share = share.to_f64().clamp(0.0, 1.0);
            let (right, target) = if wanted {
                (share, 1.0)
            } else {
                (1.0 - share, 0.0)
            };
            loss -= right.ln().clamp(LOG_FLOOR, 0.0);
            let variance = (share * (1.0 - share)).max(VARIANCE_FLOOR);
            *gradient = T::from_f64(pair_gradient * (share - target) / variance);
        }
    }
    Ok(loss)
}
