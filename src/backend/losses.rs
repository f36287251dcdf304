//! Losses of predicted actions, and their scale.

use super::{Buffers, Result};

/// Where loss scaling starts: the scale, and the good steps since it has changed last.
pub const FIRST_LOSS_SCALE: [f64; 2] = [65536.0, 0.0];

/// What training lowers, with its gradient.
pub trait LossOps: Buffers {
    /// Cross-entropy of a family's targets: writes [`Metric::ActionLoss`] (the sum),
    /// [`Metric::Correct`] and dlogits [the family's observations, actions] of the sum · its weight
    /// in the batch.
    ///
    /// [`Metric::ActionLoss`]: super::Metric::ActionLoss
    /// [`Metric::Correct`]: super::Metric::Correct
    fn cross_entropy(
        &self,
        batch: &Self::Batch,
        family: usize,
        actions: usize,
        logits: &Self::Buffer,
        grad_logits: &mut Self::Buffer,
        metrics: &mut Self::Buffer,
    ) -> Result<()>;

    /// Squared error of a family's continuous actions, the mean over the `size` numbers of each:
    /// writes [`Metric::ActionLoss`] (the sum), [`Metric::Correct`] = 0 and the gradient [the
    /// family's observations, size] of the sum · its weight in the batch. Rows whose target is
    /// negative count for nothing.
    ///
    /// [`Metric::ActionLoss`]: super::Metric::ActionLoss
    /// [`Metric::Correct`]: super::Metric::Correct
    fn squared_error(
        &self,
        batch: &Self::Batch,
        family: usize,
        size: usize,
        outputs: &Self::Buffer,
        grad_outputs: &mut Self::Buffer,
        metrics: &mut Self::Buffer,
    ) -> Result<()>;

    /// Multiplies the weights of the losses in a staged batch by the scale in `loss_scale` (see
    /// [`FIRST_LOSS_SCALE`]), if this backend computes in a type whose gradients would underflow.
    fn scale_losses(&self, batch: &mut Self::Batch, loss_scale: &Self::Buffer) -> Result<()>;
}
