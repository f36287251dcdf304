//! Layer normalisation, with the residual sum before it.

use super::{Buffers, Result, Span};

/// A layer normalisation.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LayerNorm {
    /// Weight `[width]`.
    pub weight: Span,
    /// Bias `[width]`.
    pub bias: Span,
    /// Columns.
    pub width: usize,
    /// ε.
    pub epsilon: f64,
    /// Whether gradients of weight and bias are wanted.
    pub trainable: bool,
}

/// What is added to the input of a layer normalisation.
#[derive(Debug)]
pub struct Residual<'a, B> {
    /// The summand.
    pub summand: &'a B,
    /// Where the sum is kept.
    pub sum: &'a mut B,
}

/// Normalisation of rows.
pub trait LayerNormOps: Buffers {
    /// y = LayerNorm(x), or with a residual of their sum; `statistics` [2, rows] keeps mean and rstd.
    fn layer_norm(
        &self,
        rows: usize,
        norm: &LayerNorm,
        parameters: &Self::Buffer,
        x: &Self::Buffer,
        residual: Option<Residual<Self::Buffer>>,
        y: &mut Self::Buffer,
        statistics: &mut Self::Buffer,
    ) -> Result<()>;

    /// Gradients of [`Self::layer_norm`]; with a residual, `x` is the sum. `grad_x` is overwritten, or
    /// added to where `accumulate`.
    fn layer_norm_backward(
        &self,
        rows: usize,
        norm: &LayerNorm,
        parameters: &Self::Buffer,
        x: &Self::Buffer,
        statistics: &Self::Buffer,
        grad_y: &Self::Buffer,
        grad_x: &mut Self::Buffer,
        accumulate: bool,
        gradients: &mut Self::Buffer,
    ) -> Result<()>;
}
