//! Adam and AdamW over flat arrays, and gradient norms.

use ndarray::ArrayView1;

use crate::error::check_shape;
use crate::{Error, Result, Scalar, lanes};

/// Hyper-parameters of one step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamW {
    /// Learning rate of this step.
    pub learning_rate: f64,
    /// Decay of the first moment, 0 ≤ β₁ < 1.
    pub beta1: f64,
    /// Decay of the second moment, 0 ≤ β₂ < 1.
    pub beta2: f64,
    /// Added to √v̂.
    pub epsilon: f64,
    /// Decoupled weight decay (0: Adam).
    pub weight_decay: f64,
    /// Every gradient is multiplied by this first (clipping, loss scaling).
    pub gradient_scale: f64,
    /// Number of this step, from 1, for the bias corrections.
    pub step: u64,
}

/// p ← p·(1 − lr·decay) − lr · m̂/(√v̂ + ε), with m ← β₁m + (1−β₁)g, v ← β₂v + (1−β₂)g²,
/// m̂ = m/(1−β₁ᵗ), v̂ = v/(1−β₂ᵗ). All slices have the same length.
///
/// Errors: slices of different lengths, a β outside of [0, 1), step 0.
pub fn adamw<T: Scalar>(
    hyper: &AdamW,
    gradient: &[T],
    parameter: &mut [T],
    first_moment: &mut [T],
    second_moment: &mut [T],
) -> Result<()> {
    check_shape("gradient", &[gradient.len()], &[parameter.len()])?;
    check_shape("first_moment", &[first_moment.len()], &[parameter.len()])?;
    check_shape("second_moment", &[second_moment.len()], &[parameter.len()])?;
    for (name, beta) in [("beta1", hyper.beta1), ("beta2", hyper.beta2)] {
        if !(0.0..1.0).contains(&beta) {
            return Err(Error::value(name, beta, "at least 0 and less than 1"));
        }
    }
    if hyper.step == 0 {
        return Err(Error::value("step", 0, "at least 1"));
    }
    // The factors of a whole step are computed in f64 and rounded once.
    let steps = hyper.step as f64;
    let correction1 = 1.0 - hyper.beta1.powf(steps);
    let correction2 = 1.0 - hyper.beta2.powf(steps);
    let scale = T::from_f64(hyper.gradient_scale);
    let (beta1, rest1) = (T::from_f64(hyper.beta1), T::from_f64(1.0 - hyper.beta1));
    let (beta2, rest2) = (T::from_f64(hyper.beta2), T::from_f64(1.0 - hyper.beta2));
    let kept = T::from_f64(1.0 - hyper.learning_rate * hyper.weight_decay);
    let rate = T::from_f64(hyper.learning_rate / correction1);
    let spread = T::from_f64(correction2.sqrt().recip());
    let epsilon = T::from_f64(hyper.epsilon);
    let moments = first_moment.iter_mut().zip(second_moment);
    for ((p, &g), (m, v)) in parameter.iter_mut().zip(gradient).zip(moments) {
        let g = g * scale;
        *m = beta1 * *m + rest1 * g;
        *v = beta2 * *v + rest2 * g * g;
        *p = *p * kept - rate * *m / (v.sqrt() * spread + epsilon);
    }
    Ok(())
}

/// Σ g², accumulated in f64 in an order that depends on nothing but the length.
pub fn sum_of_squares<T: Scalar>(gradient: &[T]) -> f64 {
    let gradient = ArrayView1::from(gradient);
    lanes::sum(gradient, gradient, |g, _| g.to_f64() * g.to_f64())
}

/// The factor that brings a gradient of this norm down to `max_norm`: min(1, max_norm/norm), 1 for
/// a norm of 0, NaN for a norm that is not finite.
pub fn clip_scale(norm: f64, max_norm: f64) -> f64 {
    if !norm.is_finite() {
        f64::NAN
    } else if norm <= max_norm {
        1.0
    } else {
        max_norm / norm
    }
}
