//! What is done to one number at a time.

use dtmem_reference::dropout;

use super::{Activation, Buffers, Result};

/// A dropout mask and the batch whose tokens it is drawn for: element e of token t is drawn at
/// index (origin of t)·width + e, wherever the token's sequence stands in this batch.
#[derive(Debug)]
pub struct Dropped<'a, Batch> {
    /// The mask.
    pub mask: dropout::Mask,
    /// The batch.
    pub batch: &'a Batch,
}

impl<Batch> Clone for Dropped<'_, Batch> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<Batch> Copy for Dropped<'_, Batch> {}

/// Activations, dropout and sums.
pub trait ElementwiseOps: Buffers {
    /// y = f(x) on [rows, width].
    fn activation(
        &self,
        activation: Activation,
        len: usize,
        x: &Self::Buffer,
        y: &mut Self::Buffer,
    ) -> Result<()>;

    /// dy ← dy·f′(x), given y = f(x).
    fn activation_backward(
        &self,
        activation: Activation,
        len: usize,
        x: &Self::Buffer,
        y: &Self::Buffer,
        grad: &mut Self::Buffer,
    ) -> Result<()>;

    /// y = dropout(x) on [tokens, width], or of y itself; also its own gradient. `width` is a multiple
    /// of 4.
    fn dropout(
        &self,
        dropout: Dropped<Self::Batch>,
        width: usize,
        x: Option<&Self::Buffer>,
        y: &mut Self::Buffer,
    ) -> Result<()>;

    /// out = x + y on [rows, width], or x + dropout(y) as [`Self::dropout`] takes it.
    fn add(
        &self,
        rows: usize,
        width: usize,
        x: &Self::Buffer,
        y: &Self::Buffer,
        dropout: Option<Dropped<Self::Batch>>,
        out: &mut Self::Buffer,
    ) -> Result<()>;

    /// x += y, on the first `len` numbers.
    fn add_assign(&self, len: usize, y: &Self::Buffer, x: &mut Self::Buffer) -> Result<()>;
}
