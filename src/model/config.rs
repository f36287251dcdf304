//! What a model is made of.

use dtmem_reference::attention::Denominator;
use dtmem_reference::content_memory::{self, ContentMemory};
use serde::{Deserialize, Serialize};

use crate::batch::{PackedBatch, TokenLayout};

/// ε of cosine addressing (SPEC section 4).
const COSINE_EPSILON: f64 = 1e-6;

/// Where the layer normalisations of a block stand (SPEC section 2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Block {
    /// x = LN(x + f(x)), ReLU: AttentionTuner.
    PostLn,
    /// x += f(LN x), GELU, a last LN: Decision Transformer, DT-Mem.
    PreLn,
}

/// How an observation becomes a row (SPEC section 6).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FrontEnd {
    /// Two 3×3 convolutions, then a linear map and tanh. Needs a grid of cells.
    Convolution,
    /// One linear map of the one-hot codes, then tanh.
    Linear,
}

/// What attention sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AttentionSpan {
    /// The episode so far.
    Episode,
    /// The current segment so far: only the memory crosses segments.
    Segment,
}

/// Slot score (SPEC section 4).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AddressingKind {
    /// Cosine with key strength.
    Cosine,
    /// Scaled dot product (the paper).
    Dot,
}

/// Write strength (SPEC section 4).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StrengthKind {
    /// Sigmoid with a learned bias.
    Sigmoid,
    /// Softmax over slots (the paper).
    Softmax,
}

/// Erase rule (SPEC section 4).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EraseKind {
    /// Erase where you write.
    Coupled,
    /// Erase where you address and do not write (the paper).
    Paper,
}

/// Order of reading and writing (SPEC section 4).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OrderKind {
    /// Read the memory as it was before the segment.
    ReadThenWrite,
    /// Read what the segment has written (the paper).
    WriteThenRead,
}

/// The memory layer of every block.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MemoryConfig {
    /// N.
    pub slots: usize,
    /// Slot score.
    pub addressing: AddressingKind,
    /// Only the k best slots per token are addressed; 0: all.
    pub top_k: usize,
    /// Write strength.
    pub strength: StrengthKind,
    /// Start of b of the sigmoid strength.
    pub strength_bias: f64,
    /// Erase rule.
    pub erase: EraseKind,
    /// Order of reading and writing.
    pub order: OrderKind,
}

impl Default for MemoryConfig {
    fn default() -> Self {
        Self {
            slots: 64,
            addressing: AddressingKind::Cosine,
            top_k: 0,
            strength: StrengthKind::Sigmoid,
            strength_bias: 0.0,
            erase: EraseKind::Coupled,
            order: OrderKind::ReadThenWrite,
        }
    }
}

impl MemoryConfig {
    /// The memory of tokens of a width.
    pub fn variant(&self, width: usize) -> ContentMemory {
        ContentMemory {
            addressing: match self.addressing {
                AddressingKind::Cosine => content_memory::Addressing::Cosine,
                AddressingKind::Dot => content_memory::Addressing::Dot,
            },
            strength: match self.strength {
                StrengthKind::Sigmoid => content_memory::Strength::Sigmoid,
                StrengthKind::Softmax => content_memory::Strength::Softmax,
            },
            erase: match self.erase {
                EraseKind::Coupled => content_memory::Erase::Coupled,
                EraseKind::Paper => content_memory::Erase::Paper,
            },
            order: match self.order {
                OrderKind::ReadThenWrite => content_memory::Order::ReadThenWrite,
                OrderKind::WriteThenRead => content_memory::Order::WriteThenRead,
            },
            top_k: (self.top_k > 0).then_some(self.top_k),
            scale: 1.0 / (width as f64).sqrt(),
            epsilon: COSINE_EPSILON,
        }
    }
}

/// A projection of the memory that an adapter can stand on (SPEC section 4).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AdapterTarget {
    /// Wq.
    AddressQuery,
    /// Wk.
    AddressKey,
    /// Ŵq.
    StrengthQuery,
    /// Ŵk.
    StrengthKey,
    /// Ŵv.
    Value,
}

impl AdapterTarget {
    /// All of them.
    pub const ALL: [Self; 5] = [
        Self::AddressQuery,
        Self::AddressKey,
        Self::StrengthQuery,
        Self::StrengthKey,
        Self::Value,
    ];

    /// The name of its module: that of its parameters, less `.weight`.
    pub fn name(self) -> &'static str {
        match self {
            Self::AddressQuery => "address_query",
            Self::AddressKey => "address_key",
            Self::StrengthQuery => "strength_query",
            Self::StrengthKey => "strength_key",
            Self::Value => "value",
        }
    }
}

/// Low-rank adapters on the memory's projections (SPEC section 5).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AdapterConfig {
    /// r.
    pub rank: usize,
    /// α; the update is scaled by α/r.
    pub alpha: f64,
    /// Dropout on the adapters' input.
    pub dropout: f64,
    /// Which projections, in every layer; at least one, none twice.
    pub targets: Vec<AdapterTarget>,
}

impl Default for AdapterConfig {
    fn default() -> Self {
        Self {
            rank: 8,
            alpha: 16.0,
            dropout: 0.0,
            targets: AdapterTarget::ALL.to_vec(),
        }
    }
}

impl AdapterConfig {
    /// α/r.
    pub fn scaling(&self) -> f64 {
        self.alpha / self.rank as f64
    }

    /// Whether the targets are a set of at least one.
    pub fn has_targets(&self) -> bool {
        let targets = &self.targets;
        let twice = |(index, target)| targets[..index].contains(target);
        !targets.is_empty() && !targets.iter().enumerate().any(twice)
    }
}

/// Which parameters training changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TrainedPart {
    /// All of the model's own; adapters are frozen.
    All,
    /// The memory layers' own: norm, projections, initial slots, biases.
    Memory,
    /// The adapter of [`ModelConfig::adapter`].
    Adapter,
    /// None.
    Nothing,
}

/// A model, apart from the task's sizes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ModelConfig {
    /// Block kind.
    pub block: Block,
    /// Token layout.
    pub layout: TokenLayout,
    /// Front end of grids of codes; other codes go through a linear map in any case.
    pub front_end: FrontEnd,
    /// D.
    pub width: usize,
    /// Number of blocks.
    pub layers: usize,
    /// H; D/H is the head width.
    pub heads: usize,
    /// Width of the feed-forward layer.
    pub feed_forward: usize,
    /// Dropout on the token embeddings and on the feed-forward output.
    pub dropout: f64,
    /// Scale of the observation map's initial weights: std g/√(active inputs); 0: PyTorch's default.
    pub observation_gain: f64,
    /// What attention sees.
    pub attention: AttentionSpan,
    /// Time steps of a segment (memory writes, segment attention); 0: the whole episode.
    pub segment_steps: usize,
    /// The memory layer; without it blocks have attention and feed-forward only.
    pub memory: Option<MemoryConfig>,
    /// An adapter that is trained, while everything else is frozen.
    pub adapter: Option<AdapterConfig>,
}

impl Default for ModelConfig {
    fn default() -> Self {
        Self {
            block: Block::PostLn,
            layout: TokenLayout::ObsAction,
            front_end: FrontEnd::Convolution,
            width: 512,
            layers: 4,
            heads: 2,
            feed_forward: 2048,
            dropout: 0.1,
            observation_gain: 0.0,
            attention: AttentionSpan::Episode,
            segment_steps: 0,
            memory: None,
            adapter: None,
        }
    }
}

/// What the memory loss teaches to recall.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SupervisedPart {
    /// Attention heads, from 0, ascending: AttentionTuner.
    Heads(Vec<usize>),
    /// The memory layer: the pairs whose tokens stand in different segments.
    Memory,
}

/// The memory loss.
#[derive(Debug, Clone, PartialEq)]
pub struct SupervisionConfig {
    /// λ.
    pub lambda: f64,
    /// Supervised layer, from 0.
    pub layer: usize,
    /// Which part of it.
    pub part: SupervisedPart,
    /// What the loss is divided by.
    pub denominator: Denominator,
}

impl SupervisionConfig {
    /// Σ over annotated sequences of den_b (SPEC section 3), for every supervised head.
    pub fn divisor(&self, batch: &PackedBatch) -> f64 {
        let of_sequence = |sequence: usize| {
            let tokens = batch.tokens_of(sequence).len() as f64;
            match self.denominator {
                Denominator::Square => tokens * tokens,
                Denominator::Causal => tokens * (tokens + 1.0) / 2.0,
            }
        };
        let annotated = (0..batch.sequences()).filter(|&sequence| batch.annotated[sequence] != 0);
        let parts = match &self.part {
            SupervisedPart::Heads(heads) => heads.len(),
            SupervisedPart::Memory => 1,
        };
        parts as f64 * annotated.map(of_sequence).sum::<f64>()
    }
}
