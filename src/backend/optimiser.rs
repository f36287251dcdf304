//! The optimiser.

use super::{Buffers, Result};

/// The trained part of the arenas: their start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Trained {
    /// Numbers.
    pub len: usize,
    /// How many of them, from the first, weight decay applies to.
    pub decayed: usize,
}

/// One step over the arenas.
pub trait OptimiserOps: Buffers {
    /// Writes [`Metric::GradientNorm`], √Σ g² of the first `len` gradients, and
    /// [`Metric::GradientScale`], which makes it at most `clip`. Where losses are scaled, g is what
    /// it would be without that; then [`Metric::LossScale`] is written, and the scale is lowered
    /// where the norm is not finite and raised after many steps where it is.
    ///
    /// [`Metric::GradientNorm`]: super::Metric::GradientNorm
    /// [`Metric::GradientScale`]: super::Metric::GradientScale
    /// [`Metric::LossScale`]: super::Metric::LossScale
    fn norm(
        &self,
        len: usize,
        gradients: &Self::Buffer,
        clip: Option<f64>,
        loss_scale: &mut Self::Buffer,
        metrics: &mut Self::Buffer,
    ) -> Result<()>;

    /// The batch's AdamW step on the start of the four arenas, with gradients ·
    /// [`Metric::GradientScale`]. Where that is NaN nothing changes.
    ///
    /// [`Metric::GradientScale`]: super::Metric::GradientScale
    fn adamw(
        &self,
        batch: &Self::Batch,
        trained: Trained,
        metrics: &Self::Buffer,
        gradients: &Self::Buffer,
        parameters: &mut Self::Buffer,
        first_moment: &mut Self::Buffer,
        second_moment: &mut Self::Buffer,
    ) -> Result<()>;
}
