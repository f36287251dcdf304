//! Adam and AdamW over flat arrays, and gradient norms.

use crate::{Result, Scalar};

/// Hyper-parameters of one step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamW {
    /// Learning rate of this step.
    pub learning_rate: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
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
pub fn adamw<T: Scalar>(
    hyper: &AdamW,
    gradient: &[T],
    parameter: &mut [T],
    first_moment: &mut [T],
    second_moment: &mut [T],
) -> Result<()> {
    let _ = (hyper, gradient, parameter, first_moment, second_moment);
    todo!()
}

/// Σ g², accumulated in f64.
pub fn sum_of_squares<T: Scalar>(gradient: &[T]) -> f64 {
    let _ = gradient;
    todo!()
}

/// The factor that brings a gradient of this norm down to `max_norm`: min(1, max_norm/norm).
pub fn clip_scale(norm: f64, max_norm: f64) -> f64 {
    let _ = (norm, max_norm);
    todo!()
}
