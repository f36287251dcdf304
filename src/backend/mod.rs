//! The operations that a model is written over, and who carries them out.
//!
//! A backend owns memory ([`Backend::Buffer`]) and computes on it. Buffers are flat; an operation
//! is told the number of rows, and [`In`] and [`Out`] say where in a wider row its columns stand,
//! so a fused projection is read and written in place. Parameters and their gradients are one
//! buffer each; [`Span`] names a part of it. Nothing here allocates after set-up.

pub mod cpu;
#[cfg(feature = "cuda")]
pub mod gpu;
mod range;
mod ranks;
mod room;

use std::fmt::Debug;

pub use dtmem_reference::activation::Activation;
use dtmem_reference::attention::{Denominator, Mask};
use dtmem_reference::content_memory::ContentMemory;
use dtmem_reference::convolution::Grid;
pub use dtmem_reference::optimiser::AdamW;
use dtmem_reference::{Scalar, dropout};
use thiserror::Error;

use crate::batch::PackedBatch;
pub use cpu::Cpu;
pub use range::{Range, is_heard, range};
pub use ranks::{Deserted, Member, Rank};
pub use room::{Bytes, Room};

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

/// A part of a flat buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Span {
    /// Index of the first number.
    pub offset: usize,
    /// How many.
    pub len: usize,
}

impl Span {
    /// The index range.
    pub fn range(self) -> std::ops::Range<usize> {
        self.offset..self.offset + self.len
    }

    /// From the start of this span to the end of `last`; both lie in one buffer, this one first.
    pub fn through(self, last: Span) -> Span {
        Span {
            offset: self.offset,
            len: (last.offset + last.len).saturating_sub(self.offset),
        }
    }
}

/// Rows to read: row r, column c is `buffer[start + r·stride + c]`.
#[derive(Debug)]
pub struct In<'a, B> {
    /// Where the rows stand.
    pub buffer: &'a B,
    /// Distance of two rows.
    pub stride: usize,
    /// Index of the first number.
    pub start: usize,
}

impl<B> Clone for In<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<B> Copy for In<'_, B> {}

impl<'a, B> In<'a, B> {
    /// Rows that fill the buffer.
    pub fn rows(buffer: &'a B, width: usize) -> Self {
        Self::columns(buffer, width, 0)
    }

    /// Rows of the whole buffer from `row` on.
    pub fn rows_from(buffer: &'a B, width: usize, row: usize) -> Self {
        Self::columns(buffer, width, row * width)
    }

    /// Columns from `start` of rows that are `stride` wide.
    pub fn columns(buffer: &'a B, stride: usize, start: usize) -> Self {
        Self {
            buffer,
            stride,
            start,
        }
    }
}

/// Rows to write, as [`In`].
#[derive(Debug)]
pub struct Out<'a, B> {
    /// Where the rows stand.
    pub buffer: &'a mut B,
    /// Distance of two rows.
    pub stride: usize,
    /// Index of the first number.
    pub start: usize,
}

impl<'a, B> Out<'a, B> {
    /// Rows that fill the buffer.
    pub fn rows(buffer: &'a mut B, width: usize) -> Self {
        Self::columns(buffer, width, 0)
    }

    /// Rows of the whole buffer from `row` on.
    pub fn rows_from(buffer: &'a mut B, width: usize, row: usize) -> Self {
        Self::columns(buffer, width, row * width)
    }

    /// Columns from `start` of rows that are `stride` wide.
    pub fn columns(buffer: &'a mut B, stride: usize, start: usize) -> Self {
        Self {
            buffer,
            stride,
            start,
        }
    }
}

/// The trained part of the arenas: their start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Trained {
    /// Numbers.
    pub len: usize,
    /// How many of them, from the first, weight decay applies to.
    pub decayed: usize,
}

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

/// What is added to the tokens by their time step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Positions {
    /// Rows [steps, width] of the constants.
    Constant(Span),
    /// Rows [steps, width] of the parameters.
    Learned(Span),
}

/// What attention sees of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Extent {
    /// The whole sequence.
    Sequence,
    /// The token's own segment.
    Segment,
}

/// Supervised heads of an attention layer.
#[derive(Debug, Clone, PartialEq)]
pub struct Supervised {
    /// Heads, from 0, ascending.
    pub heads: Vec<usize>,
    /// What the loss is divided by.
    pub denominator: Denominator,
}

/// Causal attention over a fused q-k-v buffer [tokens, 3·heads·head_width].
#[derive(Debug, Clone, PartialEq)]
pub struct Attention {
    /// H.
    pub heads: usize,
    /// d.
    pub head_width: usize,
    /// What a query sees.
    pub extent: Extent,
    /// The attention-BCE, on the layer that has it.
    pub supervised: Option<Supervised>,
}

impl Attention {
    /// The mask of every model here.
    pub const MASK: Mask<'static> = Mask::Causal;

    /// H·d.
    pub fn width(&self) -> usize {
        self.heads * self.head_width
    }

    /// 1/√d.
    pub fn scale(&self) -> f64 {
        1.0 / (self.head_width as f64).sqrt()
    }
}

/// A memory layer's parameters and variant.
#[derive(Debug, Clone, PartialEq)]
pub struct Memory {
    /// The variant.
    pub variant: ContentMemory,
    /// N.
    pub slots: usize,
    /// D.
    pub width: usize,
    /// M₀ [slots, width].
    pub initial: Span,
    /// b of the sigmoid strength.
    pub strength_bias: Option<Span>,
    /// Whether recall is supervised: pairs whose tokens stand in different segments say which
    /// tokens' writes a token should read.
    pub supervised: bool,
    /// Whether gradients of M₀ and b are wanted.
    pub trainable: bool,
}

/// The inputs of a memory layer, one row per token.
#[derive(Debug)]
pub struct MemoryInputs<'a, B> {
    /// a [tokens, D].
    pub address_key: In<'a, B>,
    /// s [tokens, D].
    pub strength_key: In<'a, B>,
    /// v [tokens, D].
    pub value: In<'a, B>,
    /// κ `[tokens]`, for cosine addressing.
    pub key_strength: Option<&'a B>,
}

/// Their gradients: overwritten.
#[derive(Debug)]
pub struct MemoryGradients<'a, B> {
    /// [tokens, 2·D]: address key and strength key side by side.
    pub keys: &'a mut B,
    /// [tokens, D].
    pub value: Out<'a, B>,
    /// `[tokens]`.
    pub key_strength: Option<&'a mut B>,
}

/// Where a memory starts.
#[derive(Debug)]
pub enum MemoryStart<'a, B> {
    /// Every sequence at the learned M₀.
    Learned,
    /// Sequence b at row `slots[b]` of a state [rows, N·D].
    State(&'a B, &'a [usize]),
}

/// Keys and values of tokens before the batch's, for acting.
#[derive(Debug)]
pub struct KeyValueCache<B> {
    /// Keys [rows, capacity, width].
    pub keys: B,
    /// Values [rows, capacity, width].
    pub values: B,
    /// Tokens per row.
    pub capacity: usize,
}

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

/// Where loss scaling starts: the scale, and the good steps since it has changed last.
pub const FIRST_LOSS_SCALE: [f64; 2] = [65536.0, 0.0];

/// What a buffer holds, which decides how precisely: a backend may compute in a narrow type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Results of operations and their gradients.
    Activation,
    /// Parameters and tables: kept exactly, and as operations read them.
    Parameter,
    /// Gradients of parameters, moments, statistics, losses.
    Exact,
}

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

/// Operations on buffers. All shapes are row-major; `rows` counts packed tokens unless said
/// otherwise. Input gradients are overwritten, parameter gradients (`gradients`) added to.
pub trait Backend: Send + Sync {
    /// Type of one number as it travels to and from the host.
    type Element: Scalar;
    /// Floating-point memory.
    type Buffer: Debug + Send + Sync;
    /// A batch in the backend's memory.
    type Batch: Default + Debug + Send + Sync;
    /// Operations that were recorded to be repeated.
    type Recording: Default + Debug;
    /// What [`Self::attention`] keeps for its backward pass.
    type AttentionState: Debug + Send + Sync;
    /// The memory after each segment, and what else [`Self::memory`] keeps for its backward pass.
    type MemoryState: Debug + Send + Sync;

    /// Short name for messages: `cpu`.
    fn name(&self) -> &'static str;

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

    /// A buffer of `len` numbers. Its content is not defined.
    fn buffer(&self, len: usize, kind: Kind) -> Result<Self::Buffer>;

    /// Copies from the host.
    fn upload(&self, from: &[Self::Element], to: &mut Self::Buffer, offset: usize) -> Result<()>;

    /// Copies to the host.
    fn download(&self, from: &Self::Buffer, offset: usize, to: &mut [Self::Element]) -> Result<()>;

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

    /// Brings a batch to the backend, reusing the memory of `to`. What was asked for before may
    /// still be going on.
    fn stage(&self, batch: &PackedBatch, to: &mut Self::Batch) -> Result<()>;

    /// buffer\[span\] = 0.
    fn zero(&self, buffer: &mut Self::Buffer, span: Span) -> Result<()>;

    /// Copies `len` numbers from the start of one buffer to `offset` in another of its kind.
    fn copy(
        &self,
        from: &Self::Buffer,
        to: &mut Self::Buffer,
        offset: usize,
        len: usize,
    ) -> Result<()>;

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

    /// x ← dropout(x) on [tokens, width]; also its own gradient. `width` is a multiple of 4.
    fn dropout(
        &self,
        dropout: Dropped<Self::Batch>,
        width: usize,
        x: &mut Self::Buffer,
    ) -> Result<()>;

    /// out = x + y.
    fn add(
        &self,
        len: usize,
        x: &Self::Buffer,
        y: &Self::Buffer,
        out: &mut Self::Buffer,
    ) -> Result<()>;

    /// x += y, on the first `len` numbers.
    fn add_assign(&self, len: usize, y: &Self::Buffer, x: &mut Self::Buffer) -> Result<()>;

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

    /// A state for up to `tokens` tokens.
    fn attention_state(&self, attention: &Attention, tokens: usize)
    -> Result<Self::AttentionState>;

    /// The log-sum-exp of every query [tokens, heads].
    fn log_sum_exp<'a>(&self, state: &'a Self::AttentionState) -> &'a Self::Buffer;

    /// Packed causal attention; `out` [tokens, width]. A supervised layer writes
    /// [`Metric::MemoryLoss`].
    fn attention(
        &self,
        batch: &Self::Batch,
        attention: &Attention,
        qkv: &Self::Buffer,
        out: &mut Self::Buffer,
        state: &mut Self::AttentionState,
        metrics: &mut Self::Buffer,
    ) -> Result<()>;

    /// Gradients of Σ grad_out·out + the numerator of the memory loss · its weight in the batch.
    fn attention_backward(
        &self,
        batch: &Self::Batch,
        attention: &Attention,
        qkv: &Self::Buffer,
        out: &Self::Buffer,
        state: &Self::AttentionState,
        grad_out: &Self::Buffer,
        grad_qkv: &mut Self::Buffer,
    ) -> Result<()>;

    /// Acting: the batch's tokens follow `prefix` cached ones. Writes their keys and values to the
    /// cache behind the prefix; sequence b uses cache row `rows[b]`.
    fn attention_cached(
        &self,
        batch: &Self::Batch,
        attention: &Attention,
        qkv: &Self::Buffer,
        cache: &mut KeyValueCache<Self::Buffer>,
        rows: &[usize],
        prefix: usize,
        out: &mut Self::Buffer,
        state: &mut Self::AttentionState,
    ) -> Result<()>;

    /// A state for up to so many sequences, segments of all of them, and `links`: segments of one.
    fn memory_state(
        &self,
        memory: &Memory,
        sequences: usize,
        segments: usize,
        links: usize,
    ) -> Result<Self::MemoryState>;

    /// The chain over the segments of each sequence; `read` [tokens, D].
    fn memory(
        &self,
        batch: &Self::Batch,
        memory: &Memory,
        parameters: &Self::Buffer,
        start: MemoryStart<Self::Buffer>,
        inputs: MemoryInputs<Self::Buffer>,
        state: &mut Self::MemoryState,
        read: &mut Self::Buffer,
        metrics: &mut Self::Buffer,
    ) -> Result<()>;

    /// Gradients of [`Self::memory`] from the learned start. `grad_states` [2·sequences, N·D] is
    /// scratch.
    fn memory_backward(
        &self,
        batch: &Self::Batch,
        memory: &Memory,
        parameters: &Self::Buffer,
        inputs: MemoryInputs<Self::Buffer>,
        state: &Self::MemoryState,
        grad_read: &Self::Buffer,
        input_gradients: MemoryGradients<Self::Buffer>,
        grad_states: &mut Self::Buffer,
        gradients: &mut Self::Buffer,
    ) -> Result<()>;

    /// Acting: rows `slots[b]` of `to` [.., N·D] become the last state of sequence b.
    fn commit_memory(
        &self,
        batch: &Self::Batch,
        memory: &Memory,
        state: &Self::MemoryState,
        slots: &[usize],
        to: &mut Self::Buffer,
    ) -> Result<()>;

    /// Cross-entropy of a family's targets: writes [`Metric::ActionLoss`] (the sum),
    /// [`Metric::Correct`] and dlogits [the family's observations, actions] of the sum · its weight
    /// in the batch.
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

    /// Writes [`Metric::GradientNorm`], √Σ g² of the first `len` gradients, and
    /// [`Metric::GradientScale`], which makes it at most `clip`. Where losses are scaled, g is what
    /// it would be without that; then [`Metric::LossScale`] is written, and the scale is lowered
    /// where the norm is not finite and raised after many steps where it is.
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
