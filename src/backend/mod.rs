//! The operations that a model is written over, and who carries them out.
//!
//! A backend owns memory ([`Buffers::Buffer`]) and computes on it. Buffers are flat; an operation
//! is told the number of rows, and [`In`] and [`Out`] say where in a wider row its columns stand,
//! so a fused projection is read and written in place. Parameters and their gradients are one
//! buffer each; [`Span`] names a part of it. Nothing here allocates after set-up.
//!
//! Each family of operations is a trait in a file of its own, which has the same name in the folder
//! of each backend; [`Backend`] is all of them. Shapes are row-major; `rows` counts packed tokens
//! unless said otherwise. Input gradients are overwritten, parameter gradients (`gradients`) added to.

mod attention;
mod buffers;
pub mod cpu;
mod elementwise;
mod embeddings;
#[cfg(feature = "cuda")]
pub mod gpu;
mod layer_norm;
mod limits;
mod linear;
mod losses;
mod memory;
mod optimiser;
mod range;
mod ranks;
mod room;
mod tokens;

use std::fmt::Debug;

pub use dtmem_reference::activation::Activation;
pub use dtmem_reference::optimiser::AdamW;
use thiserror::Error;

pub use attention::{Attention, AttentionOps, Extent, KeyValueCache, Supervised};
pub use buffers::{Buffers, In, Kind, Out, Span};
pub use cpu::Cpu;
pub use elementwise::{Dropped, ElementwiseOps};
pub use embeddings::{Codes, Convolutions, EmbeddingOps, OneHot, Reals};
pub use layer_norm::{LayerNorm, LayerNormOps, Residual, SummandGradient};
pub use limits::Limits;
pub use linear::{Adapter, Linear, LinearOps};
pub use losses::{FIRST_LOSS_SCALE, LossOps};
pub use memory::{Memory, MemoryGradients, MemoryInputs, MemoryOps, MemoryStart};
pub use optimiser::{OptimiserOps, Trained};
pub use range::{Range, is_heard, range};
pub use ranks::{Deserted, Member, Rank};
pub use room::{Bytes, Room};
pub use tokens::{Positions, TokenOps};

/// Why a backend could not do what it was asked.
#[derive(Debug, Clone, PartialEq, Error)]
pub enum BackendError {
    /// An operation refused its arguments.
    #[error("{operation}: {source}")]
    Operation {
        /// Name of the operation.
        operation: &'static str,
        /// What was wrong.
        source: dtmem_reference::Error,
    },
    /// A buffer is shorter than an operation needs.
    #[error("{operation}: a buffer holds {found} numbers, {expected} are needed")]
    Buffer {
        /// Name of the operation.
        operation: &'static str,
        /// Its length.
        found: usize,
        /// The length that the shapes ask for.
        expected: usize,
    },
    /// The device's memory is full.
    #[error("out of device memory: {needed} are needed at once, and {room}")]
    OutOfMemory {
        /// What was asked for.
        needed: Bytes,
        /// What there is.
        room: Room,
    },
    /// A device, or a launch on it, failed.
    #[error("{reason}")]
    Device {
        /// What it says.
        reason: String,
    },
    /// A buffer of another [`Kind`] than the operation works on.
    #[error("a buffer of the wrong kind")]
    Kind,
    /// A batch that was not staged, or scratch memory that is not there.
    #[error("a batch that was not staged")]
    NotStaged,
    /// Acting with a batch that does not say what it goes on from.
    #[error("a batch of episodes in progress that does not say how far they are")]
    NotActing,
    /// An update without an optimiser's step in the batch.
    #[error("a batch without a step of the optimiser")]
    NoStep,
}

#[cfg(feature = "cuda")]
impl From<crate::ops::Error> for BackendError {
    fn from(error: crate::ops::Error) -> Self {
        match error {
            crate::ops::Error::OutOfMemory {
                needed,
                free,
                total,
            } => Self::OutOfMemory {
                needed: Bytes(needed),
                room: Room {
                    free: Bytes(free),
                    total: Bytes(total),
                },
            },
            error => Self::Device {
                reason: error.to_string(),
            },
        }
    }
}

/// Result of a backend operation.
pub type Result<T> = std::result::Result<T, BackendError>;

/// Index of each number in the metrics buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Metric {
    /// Σ of the action losses of all targets.
    ActionLoss,
    /// Number of right predictions.
    Correct,
    /// Numerator of the attention-BCE: −Σ (E log A + (1−E) log(1−A)).
    MemoryLoss,
    /// Norm of the gradient before clipping.
    GradientNorm,
    /// What the optimiser multiplies the gradient by; NaN where the norm is not finite.
    GradientScale,
    /// What the losses were multiplied by for the gradient; 0 where they were taken as they are.
    LossScale,
}

/// Length of the metrics buffer.
pub const METRICS: usize = 6;

/// Every operation, and how to have them carried out.
pub trait Backend:
    EmbeddingOps
    + TokenOps
    + LinearOps
    + ElementwiseOps
    + LayerNormOps
    + AttentionOps
    + MemoryOps
    + LossOps
    + OptimiserOps
{
    /// Operations that were recorded to be repeated, for some shapes of batches.
    type Recording: Default + Debug;

    /// Short name for messages: `cpu`.
    fn name(&self) -> &'static str;

    /// For which sizes of models its operations are made.
    fn limits(&self) -> Limits;

    /// Which one of several ranks this is that train a model together.
    fn rank(&self) -> Rank;

    /// The first `len` numbers of a buffer of [`Kind::Exact`] become their sum over all ranks, with
    /// the same bits for each of them. All ranks ask for it, in the same order.
    fn sum_over_ranks(&self, buffer: &mut Self::Buffer, len: usize) -> Result<()>;

    /// How many episodes to act in at once, each of which keeps so many numbers on the backend.
    fn episodes_at_once(&self, numbers: usize) -> usize;

    /// How many shards to divide a batch into, where so many suit threads.
    fn shards(&self, for_threads: usize) -> usize;

    /// Runs `work` on every item, side by side where the backend has threads.
    fn for_each<S: Send, E: Send>(
        &self,
        items: &mut [S],
        work: impl Fn(&mut S) -> std::result::Result<(), E> + Sync,
    ) -> std::result::Result<(), E>;

    /// Memory that the buffers made in `work` would take, which cannot be used; 0 where they take the
    /// host's.
    fn needed_for(&self, work: impl FnOnce()) -> Bytes;

    /// Whether batches should be filled up to one size, so that a step can be recorded.
    fn wants_one_size(&self) -> bool;

    /// A number that tells staged batches of different sizes, or in different memory, apart.
    fn shape(&self, batch: &Self::Batch) -> u64;

    /// Does `work`: operations on always the same buffers and staged batches, the same ones whenever
    /// `shape` is. A backend may record them, and then repeat what it has recorded.
    fn repeat<E: From<BackendError>>(
        &self,
        recording: &mut Self::Recording,
        shape: u64,
        work: impl FnOnce() -> std::result::Result<(), E>,
    ) -> std::result::Result<(), E>;
}
