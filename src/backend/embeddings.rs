//! What becomes the rows of tokens: codes and real numbers.

use dtmem_reference::convolution::Grid;

use super::{Buffers, Result, Span};

/// A linear map of one-hot codes.
#[derive(Debug, Clone, PartialEq)]
pub struct OneHot {
    /// W [inputs, width], one row per one-hot input.
    pub weight: Span,
    /// b `[width]`.
    pub bias: Span,
    /// First input of each field.
    pub offsets: Vec<usize>,
    /// Number of inputs.
    pub inputs: usize,
    /// Columns of the result.
    pub width: usize,
    /// Whether gradients are wanted.
    pub trainable: bool,
}

/// Two 3×3 convolutions, each followed by ReLU, on one-hot cells.
#[derive(Debug, Clone, PartialEq)]
pub struct Convolutions {
    /// The cells.
    pub grid: Grid,
    /// W₁ [channels·9, middle], input-major.
    pub weight1: Span,
    /// b₁ `[middle]`.
    pub bias1: Span,
    /// W₂ [out, middle·9].
    pub weight2: Span,
    /// b₂ `[out]`.
    pub bias2: Span,
    /// Channels after the first.
    pub middle: usize,
    /// Channels after the second.
    pub out: usize,
    /// Whether gradients are wanted.
    pub trainable: bool,
}

/// Which codes of a batch a [`OneHot`] reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Codes {
    /// One row per observation token of a family.
    Observations(usize),
    /// One row per action token of a family, one field.
    Actions(usize),
}

/// Real numbers that a batch brings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reals {
    /// Returns to go, one for each return token.
    Returns,
    /// Observations of a family.
    Observations(usize),
    /// Continuous actions of a family, one row per action token.
    Actions(usize),
}

/// Rows from what a batch brings, and the gradients of the parameters behind them.
pub trait EmbeddingOps: Buffers {
    /// Sums of weight rows: the family's rows of `out` [rows of that kind, width].
    fn one_hot(
        &self,
        batch: &Self::Batch,
        codes: Codes,
        map: &OneHot,
        parameters: &Self::Buffer,
        out: &mut Self::Buffer,
    ) -> Result<()>;

    /// Gradients of [`Self::one_hot`].
    fn one_hot_backward(
        &self,
        batch: &Self::Batch,
        codes: Codes,
        map: &OneHot,
        grad_out: &Self::Buffer,
        gradients: &mut Self::Buffer,
    ) -> Result<()>;

    /// Whether the two that follow take this front end, on any number of observations.
    ///
    /// # Errors
    /// What about its grid they are not made for.
    fn check_convolutions(&self, _front_end: &Convolutions) -> Result<()> {
        Ok(())
    }

    /// Both convolutions with their ReLU: `middle` and `out` [the family's observations,
    /// channels·positions].
    fn convolutions(
        &self,
        batch: &Self::Batch,
        family: usize,
        front_end: &Convolutions,
        parameters: &Self::Buffer,
        middle: &mut Self::Buffer,
        out: &mut Self::Buffer,
    ) -> Result<()>;

    /// Gradients of [`Self::convolutions`]; `grad_out` is overwritten, `grad_middle` is scratch.
    fn convolutions_backward(
        &self,
        batch: &Self::Batch,
        family: usize,
        front_end: &Convolutions,
        parameters: &Self::Buffer,
        middle: &Self::Buffer,
        out: &Self::Buffer,
        grad_out: &mut Self::Buffer,
        grad_middle: &mut Self::Buffer,
        gradients: &mut Self::Buffer,
    ) -> Result<()>;

    /// Real numbers of the batch, row after row, at the start of `out`.
    fn reals(&self, batch: &Self::Batch, reals: Reals, out: &mut Self::Buffer) -> Result<()>;
}
