//! Layer normalisation, with the residual sum before it.

use super::{Buffers, Dropped, Result, Span};

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
pub struct Residual<'a, B: Buffers> {
    /// The summand.
    pub summand: &'a B::Buffer,
    /// What the summand goes through before.
    pub dropout: Option<Dropped<'a, B::Batch>>,
    /// Where the sum is kept.
    pub sum: &'a mut B::Buffer,
}

/// The gradient of a summand that went through dropout: that of the sum after it.
#[derive(Debug)]
pub struct SummandGradient<'a, B: Buffers> {
    /// As in [`Residual`].
    pub dropout: Dropped<'a, B::Batch>,
    /// Overwritten.
    pub gradient: &'a mut B::Buffer,
}

/// Normalisation of rows.
pub trait LayerNormOps: Buffers + Sized {
    /// y = LayerNorm(x), or with a residual of their sum; `statistics` [2, rows] keeps mean and rstd.
    fn layer_norm(
        &self,
        rows: usize,
        norm: &LayerNorm,
        parameters: &Self::Buffer,
        x: &Self::Buffer,
        residual: Option<Residual<Self>>,
        y: &mut Self::Buffer,
        statistics: &mut Self::Buffer,
    ) -> Result<()>;

    /// Gradients of [`Self::layer_norm`]; with a residual, `x` is the sum, and `grad_x` the gradient of
    /// both summands but for `summand`. `grad_x` is overwritten, or added to where `accumulate`.
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
        summand: Option<SummandGradient<Self>>,
        gradients: &mut Self::Buffer,
    ) -> Result<()>;
}
