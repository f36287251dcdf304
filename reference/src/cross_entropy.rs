//! Softmax cross-entropy with integer targets.

use ndarray::{ArrayView2, ArrayViewMut2};

use crate::{Result, Scalar};

/// What [`forward`] sums over its rows.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Sums {
    /// Σ of the rows' losses −log softmax(logits)\[target\], in nats.
    pub loss: f64,
    /// Rows whose largest logit (the first of equals) is the target.
    pub correct: usize,
}

/// Loss and gradient in one pass: dlogits = scale · (softmax(logits) − one_hot(target)).
/// `logits`, `dlogits` [rows, classes]; `targets` [rows]. Use scale = 1/rows for the mean.
pub fn forward_backward<T: Scalar>(
    logits: ArrayView2<T>,
    targets: &[i32],
    scale: T,
    dlogits: ArrayViewMut2<T>,
) -> Result<Sums> {
    let _ = (logits, targets, scale, dlogits);
    todo!()
}
