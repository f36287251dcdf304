//! Softmax cross-entropy with integer targets.

use ndarray::{ArrayView2, ArrayViewMut2};

use crate::error::check_shape;
use crate::{Error, Result, Scalar};

/// What [`forward_backward`] sums over its rows.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Sums {
    /// Σ of the rows' losses −log softmax(logits)\[target\], in nats.
    pub loss: f64,
    /// Rows whose largest logit (the first of equals) is the target; never a row with a NaN.
    pub correct: usize,
}

/// Loss and gradient in one pass: dlogits = scale · (softmax(logits) − one_hot(target)).
/// `logits`, `dlogits` [rows, classes]; `targets` \[rows\]. Use scale = 1/rows for the mean.
/// The loss is summed in f64 and not scaled.
pub fn forward_backward<T: Scalar>(
    logits: ArrayView2<T>,
    targets: &[i32],
    scale: T,
    mut dlogits: ArrayViewMut2<T>,
) -> Result<Sums> {
    let (rows, classes) = logits.dim();
    check_shape("targets", &[targets.len()], &[rows])?;
    check_shape("dlogits", dlogits.shape(), &[rows, classes])?;
    let class = |target: i32| usize::try_from(target).ok().filter(|&t| t < classes);
    if let Some(row) = targets.iter().position(|&target| class(target).is_none()) {
        return Err(Error::value(
            "targets",
            format!("{} at row {row}", targets[row]),
            format!("a class from 0 to below {classes}"),
        ));
    }
    let mut sums = Sums::default();
    let targets = targets.iter().filter_map(|&target| class(target));
    for ((logits, mut dlogits), target) in logits
        .rows()
        .into_iter()
        .zip(dlogits.rows_mut())
        .zip(targets)
    {
        let chosen = logits[target];
        let largest = logits.fold(T::neg_infinity(), |largest, &l| largest.max(l));
        let mut total = T::zero();
        for (probability, &logit) in dlogits.iter_mut().zip(logits) {
            *probability = (logit - largest).exp();
            total += *probability;
        }
        dlogits *= scale / total;
        dlogits[target] -= scale;
        sums.loss += total.to_f64().ln() - (chosen - largest).to_f64();
        let beaten = |(i, &logit): (usize, &T)| {
            if i < target {
                logit < chosen
            } else {
                logit <= chosen
            }
        };
        sums.correct += usize::from(logits.iter().enumerate().all(beaten));
    }
    Ok(sums)
}
