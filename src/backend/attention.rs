//! Packed attention, its supervised heads, and its cache.

use std::fmt::Debug;

use dtmem_reference::attention::{Denominator, Mask};

use super::{Buffers, Result};

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

/// Keys and values of tokens before the batch's, for acting: as many rows, of as many tokens, as the batch's
/// [`Acting`](crate::batch::Acting) says.
#[derive(Debug)]
pub struct KeyValueCache<B> {
    /// Keys [rows, capacity, width].
    pub keys: B,
    /// Values [rows, capacity, width].
    pub values: B,
}

/// Attention between the tokens of a sequence, or of a segment.
pub trait AttentionOps: Buffers {
    /// What [`Self::attention`] keeps for its backward pass.
    type AttentionState: Debug + Send + Sync;

    /// A state for up to `tokens` tokens.
    fn attention_state(&self, attention: &Attention, tokens: usize)
    -> Result<Self::AttentionState>;

    /// The log-sum-exp of every query [tokens, heads].
    fn log_sum_exp<'a>(&self, state: &'a Self::AttentionState) -> &'a Self::Buffer;

    /// Packed causal attention; `out` [tokens, width]. A supervised layer writes
    /// [`Metric::MemoryLoss`](super::Metric::MemoryLoss).
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

    /// Acting: the batch's tokens follow cached ones, as it says. Writes their keys and values to the cache behind these.
    fn attention_cached(
        &self,
        batch: &Self::Batch,
        attention: &Attention,
        qkv: &Self::Buffer,
        cache: &mut KeyValueCache<Self::Buffer>,
        out: &mut Self::Buffer,
        state: &mut Self::AttentionState,
    ) -> Result<()>;
}
