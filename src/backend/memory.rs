//! The content-addressed memory over the segments of a sequence.

use std::fmt::Debug;

use dtmem_reference::content_memory::ContentMemory;

use super::{Buffers, In, Out, Result, Span};

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
    /// Each sequence at its episode's row of a state [rows, N·D]: the batch says which.
    State(&'a B),
}

/// Reading and writing the memory.
pub trait MemoryOps: Buffers {
    /// The memory after each segment, and what else [`Self::memory`] keeps for its backward pass.
    type MemoryState: Debug + Send + Sync;

    /// A state for up to so many sequences, segments of all of them, and `links`: segments of one.
    fn memory_state(
        &self,
        memory: &Memory,
        sequences: usize,
        segments: usize,
        links: usize,
    ) -> Result<Self::MemoryState>;

    /// The chain over the segments of each sequence; `read` [tokens, D]. A supervised memory writes
    /// [`Metric::MemoryLoss`](super::Metric::MemoryLoss).
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

    /// Gradients of [`Self::memory`] from the learned start, with those of the memory loss · its weight
    /// in the batch. `grad_states` [2·sequences, N·D] is scratch, and may grow.
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

    /// Acting: the row of each sequence's episode in `to` [rows, N·D] becomes its last state.
    fn commit_memory(
        &self,
        batch: &Self::Batch,
        memory: &Memory,
        state: &Self::MemoryState,
        to: &mut Self::Buffer,
    ) -> Result<()>;
}
