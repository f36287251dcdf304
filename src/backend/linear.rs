//! Linear maps, with adapters.

use super::{Buffers, Dropped, In, Out, Result, Span};

/// A low-rank update of some consecutive outputs of a [`Linear`].
#[derive(Debug, Clone, PartialEq)]
pub struct Adapter {
    /// First output that it changes.
    pub output: usize,
    /// Number of outputs that it changes.
    pub outputs: usize,
    /// A [rank, inputs].
    pub a: Span,
    /// B [outputs, rank].
    pub b: Span,
    /// r.
    pub rank: usize,
    /// α / r.
    pub scaling: f64,
}

/// A linear map y = x·Wᵀ + b, or y = x·W where `transposed`, with its adapters.
#[derive(Debug, Clone, PartialEq)]
pub struct Linear {
    /// W [outputs, inputs], or [inputs, outputs] where `transposed`.
    pub weight: Span,
    /// b `[outputs]`.
    pub bias: Option<Span>,
    /// Columns of x.
    pub inputs: usize,
    /// Columns of y.
    pub outputs: usize,
    /// W is used untransposed: y = x·W. An adapter's A and B still describe W, so its A takes y's
    /// place and its B that of x.
    pub transposed: bool,
    /// Whether gradients of W and b are wanted.
    pub trainable: bool,
    /// Low-rank updates, ascending by output.
    pub adapters: Vec<Adapter>,
}

impl Linear {
    /// Σ of the adapters' ranks: the width of the buffer that keeps x·Aᵀ.
    pub fn ranks(&self) -> usize {
        self.adapters.iter().map(|adapter| adapter.rank).sum()
    }
}

/// Projections of rows.
pub trait LinearOps: Buffers {
    /// y = x·Wᵀ + b + adapters. `adapted` [rows, Σ rank] keeps x̃·Aᵀ for the backward pass;
    /// `dropout` applies to the adapters' input alone.
    fn linear(
        &self,
        rows: usize,
        map: &Linear,
        parameters: &Self::Buffer,
        x: In<Self::Buffer>,
        adapted: &mut Self::Buffer,
        dropout: Option<Dropped<Self::Batch>>,
        y: Out<Self::Buffer>,
    ) -> Result<()>;

    /// Gradients of [`Self::linear`]. `grad_x` is overwritten, or added to where `accumulate`.
    fn linear_backward(
        &self,
        rows: usize,
        map: &Linear,
        parameters: &Self::Buffer,
        x: In<Self::Buffer>,
        adapted: &Self::Buffer,
        dropout: Option<Dropped<Self::Batch>>,
        grad_y: In<Self::Buffer>,
        grad_x: Option<Out<Self::Buffer>>,
        accumulate: bool,
        gradients: &mut Self::Buffer,
    ) -> Result<()>;
}
