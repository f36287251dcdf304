//! The rows of all tokens, and those that actions are predicted from.

use super::{Buffers, Result, Span};

/// What is added to the tokens by their time step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Positions {
    /// Rows [steps, width] of the constants.
    Constant(Span),
    /// Rows [steps, width] of the parameters.
    Learned(Span),
}

/// Between the rows of one kind and those of all tokens.
pub trait TokenOps: Buffers {
    /// Token rows: the embedding of the token's kind plus the position of its time step.
    /// `returns` is read only if the batch has return tokens.
    fn assemble_tokens(
        &self,
        batch: &Self::Batch,
        width: usize,
        observations: &Self::Buffer,
        actions: &Self::Buffer,
        returns: &Self::Buffer,
        positions: Positions,
        table: &Self::Buffer,
        out: &mut Self::Buffer,
    ) -> Result<()>;

    /// Gradients of [`Self::assemble_tokens`]: embeddings are overwritten; positions, where they are
    /// trained, are added to that span of `gradients`.
    fn assemble_tokens_backward(
        &self,
        batch: &Self::Batch,
        width: usize,
        grad_out: &Self::Buffer,
        grad_observations: &mut Self::Buffer,
        grad_actions: &mut Self::Buffer,
        grad_returns: &mut Self::Buffer,
        positions: Option<Span>,
        gradients: &mut Self::Buffer,
    ) -> Result<()>;

    /// out = rows of x at the observation tokens [observations, width].
    fn gather_observations(
        &self,
        batch: &Self::Batch,
        width: usize,
        x: &Self::Buffer,
        out: &mut Self::Buffer,
    ) -> Result<()>;

    /// Gradient of [`Self::gather_observations`]: rows of other tokens become 0.
    fn scatter_observations(
        &self,
        batch: &Self::Batch,
        width: usize,
        grad_out: &Self::Buffer,
        grad_x: &mut Self::Buffer,
    ) -> Result<()>;
}
