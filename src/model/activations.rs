//! What a forward pass keeps and a backward pass writes, allocated once for the largest batch.

use super::config::ModelConfig;
use super::network::{
    ActionEmbedding, BlockNetwork, FamilyNetwork, MemoryNetwork, Network, ObservationEmbedding,
};
use crate::backend::{Backend, Kind, METRICS, Result};
use crate::batch::PackedBatch;

/// Upper bounds of the batches that buffers are made for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Capacity {
    /// Packed tokens.
    pub tokens: usize,
    /// Observations of each family (and at most as many actions, and returns of all).
    pub observations: Vec<usize>,
    /// Sequences.
    pub sequences: usize,
    /// Segments of all sequences.
    pub segments: usize,
    /// Segments of one sequence.
    pub links: usize,
}

impl Capacity {
    /// That of a batch.
    pub fn of(batch: &PackedBatch) -> Self {
        let families = batch.families.iter();
        Self {
            tokens: batch.tokens(),
            observations: families.map(|rows| rows.observations.len()).collect(),
            sequences: batch.sequences(),
            segments: batch.segments(),
            links: batch.links(),
        }
    }

    /// Observations of all families.
    pub(super) fn all_observations(&self) -> usize {
        self.observations.iter().sum()
    }
}

/// Results of every operation that a later one reads again.
#[derive(Debug)]
pub(super) struct Activations<B: Backend> {
    pub families: Vec<FamilyActivations<B>>,
    /// Of all families.
    pub observation_in: B::Buffer,
    pub observation: B::Buffer,
    pub action_in: B::Buffer,
    pub action: B::Buffer,
    pub return_value: B::Buffer,
    pub return_to_go: B::Buffer,
    /// Assembled tokens, and the embedding norm's statistics.
    pub assembled: B::Buffer,
    pub statistics: B::Buffer,
    /// The input of each block, and the output of the last: `layers + 1` of them.
    pub residual: Vec<B::Buffer>,
    pub blocks: Vec<BlockActivations<B>>,
    pub last: B::Buffer,
    pub last_statistics: B::Buffer,
    pub gathered: B::Buffer,
    pub metrics: B::Buffer,
    /// Scratch [tokens, width].
    pub branch: B::Buffer,
    /// What operations without an adapter are given in its place.
    pub none: B::Buffer,
}

/// The part of one family: rows are those of its observations.
#[derive(Debug)]
pub(super) struct FamilyActivations<B: Backend> {
    /// Observations and actions that are real numbers.
    pub reals: B::Buffer,
    pub real_actions: B::Buffer,
    /// Of convolutions, and of patches before and after ReLU.
    pub middle: B::Buffer,
    pub out: B::Buffer,
    pub logits: B::Buffer,
    /// Its losses.
    pub metrics: B::Buffer,
}

/// The part of one block.
#[derive(Debug)]
pub(super) struct BlockActivations<B: Backend> {
    /// `pre_ln`: LN(x), the input of attention. `post_ln`: x + Attn(x), the input of its norm.
    pub attention_side: B::Buffer,
    pub attention_statistics: B::Buffer,
    pub qkv: B::Buffer,
    pub attended: B::Buffer,
    pub attention: B::AttentionState,
    /// The residual stream after attention.
    pub middle: B::Buffer,
    pub memory: Option<MemoryActivations<B>>,
    /// As `attention_side`, for the feed-forward layer.
    pub feed_forward_side: B::Buffer,
    pub feed_forward_statistics: B::Buffer,
    pub up: B::Buffer,
    pub hidden: B::Buffer,
}

/// The part of a memory layer.
#[derive(Debug)]
pub(super) struct MemoryActivations<B: Backend> {
    pub normed: B::Buffer,
    pub statistics: B::Buffer,
    /// Wk x, Ŵk x, Ŵv x side by side.
    pub projected: B::Buffer,
    pub projected_adapted: B::Buffer,
    /// a and s side by side.
    pub keys: B::Buffer,
    pub address_adapted: B::Buffer,
    pub strength_adapted: B::Buffer,
    pub key_strength_in: B::Buffer,
    pub key_strength: B::Buffer,
    pub state: B::MemoryState,
    pub read: B::Buffer,
    /// The residual stream after the memory layer.
    pub out: B::Buffer,
}

impl<B: Backend> Activations<B> {
    pub fn new(
        backend: &B,
        network: &Network,
        config: &ModelConfig,
        capacity: &Capacity,
    ) -> Result<Self> {
        let (tokens, observations) = (capacity.tokens, capacity.all_observations());
        let rows = tokens * config.width;
        let steps = observations * config.width;
        let with_returns = usize::from(network.return_to_go.is_some());
        Ok(Self {
            families: network
                .families
                .iter()
                .zip(&capacity.observations)
                .map(|(family, &observations)| {
                    FamilyActivations::new(backend, family, observations)
                })
                .collect::<Result<_>>()?,
            observation_in: backend.buffer(steps, Kind::Activation)?,
            observation: backend.buffer(steps, Kind::Activation)?,
            action_in: backend.buffer(steps, Kind::Activation)?,
            action: backend.buffer(steps, Kind::Activation)?,
            return_value: backend.buffer(observations * with_returns, Kind::Activation)?,
            return_to_go: backend.buffer(steps * with_returns, Kind::Activation)?,
            assembled: backend.buffer(rows, Kind::Activation)?,
            statistics: backend.buffer(2 * tokens, Kind::Exact)?,
            residual: (0..=config.layers)
                .map(|_| backend.buffer(rows, Kind::Activation))
                .collect::<Result<_>>()?,
            blocks: network
                .blocks
                .iter()
                .map(|block| BlockActivations::new(backend, block, config, capacity))
                .collect::<Result<_>>()?,
            last: backend.buffer(rows, Kind::Activation)?,
            last_statistics: backend.buffer(2 * tokens, Kind::Exact)?,
            gathered: backend.buffer(steps, Kind::Activation)?,
            metrics: backend.buffer(METRICS, Kind::Exact)?,
            branch: backend.buffer(rows, Kind::Activation)?,
            none: backend.buffer(0, Kind::Activation)?,
        })
    }
}

impl<B: Backend> FamilyActivations<B> {
    fn new(backend: &B, family: &FamilyNetwork, observations: usize) -> Result<Self> {
        let lens = FrontEndLens::new(family, observations);
        Ok(Self {
            reals: backend.buffer(lens.reals, Kind::Activation)?,
            real_actions: backend.buffer(lens.real_actions, Kind::Activation)?,
            middle: backend.buffer(lens.middle, Kind::Activation)?,
            out: backend.buffer(lens.out, Kind::Activation)?,
            logits: backend.buffer(observations * family.head.outputs, Kind::Activation)?,
            metrics: backend.buffer(METRICS, Kind::Exact)?,
        })
    }
}

impl<B: Backend> BlockActivations<B> {
    fn new(
        backend: &B,
        block: &BlockNetwork,
        config: &ModelConfig,
        capacity: &Capacity,
    ) -> Result<Self> {
        let tokens = capacity.tokens;
        let rows = tokens * config.width;
        Ok(Self {
            attention_side: backend.buffer(rows, Kind::Activation)?,
            attention_statistics: backend.buffer(2 * tokens, Kind::Exact)?,
            qkv: backend.buffer(3 * rows, Kind::Activation)?,
            attended: backend.buffer(rows, Kind::Activation)?,
            attention: backend.attention_state(&block.attention, tokens)?,
            middle: backend.buffer(rows, Kind::Activation)?,
            memory: match &block.memory {
                Some(memory) => Some(MemoryActivations::new(backend, memory, capacity)?),
                None => None,
            },
            feed_forward_side: backend.buffer(rows, Kind::Activation)?,
            feed_forward_statistics: backend.buffer(2 * tokens, Kind::Exact)?,
            up: backend.buffer(tokens * config.feed_forward, Kind::Activation)?,
            hidden: backend.buffer(tokens * config.feed_forward, Kind::Activation)?,
        })
    }
}

impl<B: Backend> MemoryActivations<B> {
    fn new(backend: &B, network: &MemoryNetwork, capacity: &Capacity) -> Result<Self> {
        let tokens = capacity.tokens;
        let rows = tokens * network.memory.width;
        Ok(Self {
            normed: backend.buffer(rows, Kind::Activation)?,
            statistics: backend.buffer(2 * tokens, Kind::Exact)?,
            projected: backend.buffer(3 * rows, Kind::Activation)?,
            projected_adapted: backend.buffer(tokens * network.keys.ranks(), Kind::Activation)?,
            keys: backend.buffer(2 * rows, Kind::Activation)?,
            address_adapted: backend
                .buffer(tokens * network.address_query.ranks(), Kind::Activation)?,
            strength_adapted: backend
                .buffer(tokens * network.strength_query.ranks(), Kind::Activation)?,
            key_strength_in: backend.buffer(tokens, Kind::Activation)?,
            key_strength: backend.buffer(tokens, Kind::Activation)?,
            state: backend.memory_state(
                &network.memory,
                capacity.sequences,
                capacity.segments,
                capacity.links,
            )?,
            read: backend.buffer(rows, Kind::Activation)?,
            out: backend.buffer(rows, Kind::Activation)?,
        })
    }
}

/// Gradients on their way back; only the parameters' stay.
#[derive(Debug)]
pub(super) struct Backward<B: Backend> {
    /// Gradient of the residual stream [tokens, width].
    pub stream: B::Buffer,
    /// Two more of the same size.
    pub side: B::Buffer,
    pub branch: B::Buffer,
    /// [tokens, feed_forward].
    pub hidden: B::Buffer,
    /// [tokens, 3·width].
    pub qkv: B::Buffer,
    /// [tokens, 3·width], [tokens, 2·width], [tokens] and two states per sequence, with a memory.
    pub projected: B::Buffer,
    pub keys: B::Buffer,
    pub key_strength: B::Buffer,
    pub states: B::Buffer,
    pub families: Vec<FamilyBackward<B>>,
    pub observation: B::Buffer,
    pub action: B::Buffer,
    pub return_to_go: B::Buffer,
}

/// The part of one family.
#[derive(Debug)]
pub(super) struct FamilyBackward<B: Backend> {
    pub middle: B::Buffer,
    pub out: B::Buffer,
    pub logits: B::Buffer,
}

impl<B: Backend> Backward<B> {
    pub fn new(
        backend: &B,
        network: &Network,
        config: &ModelConfig,
        capacity: &Capacity,
    ) -> Result<Self> {
        let (tokens, sequences) = (capacity.tokens, capacity.sequences);
        let rows = tokens * config.width;
        let steps = capacity.all_observations() * config.width;
        let with_memory = usize::from(config.memory.is_some());
        let slots = config.memory.as_ref().map_or(0, |memory| memory.slots);
        let of_family = |(family, &observations): (&FamilyNetwork, &usize)| {
            let lens = FrontEndLens::new(family, observations);
            Ok(FamilyBackward {
                middle: backend.buffer(lens.middle, Kind::Activation)?,
                out: backend.buffer(lens.out, Kind::Activation)?,
                logits: backend.buffer(observations * family.head.outputs, Kind::Activation)?,
            })
        };
        Ok(Self {
            stream: backend.buffer(rows, Kind::Activation)?,
            side: backend.buffer(rows, Kind::Activation)?,
            branch: backend.buffer(rows, Kind::Activation)?,
            hidden: backend.buffer(tokens * config.feed_forward, Kind::Activation)?,
            qkv: backend.buffer(3 * rows, Kind::Activation)?,
            projected: backend.buffer(3 * rows * with_memory, Kind::Activation)?,
            keys: backend.buffer(2 * rows * with_memory, Kind::Activation)?,
            key_strength: backend.buffer(tokens * with_memory, Kind::Activation)?,
            states: backend.buffer(2 * sequences * slots * config.width, Kind::Activation)?,
            families: network
                .families
                .iter()
                .zip(&capacity.observations)
                .map(of_family)
                .collect::<Result<_>>()?,
            observation: backend.buffer(steps, Kind::Activation)?,
            action: backend.buffer(steps, Kind::Activation)?,
            return_to_go: backend.buffer(
                steps * usize::from(network.return_to_go.is_some()),
                Kind::Activation,
            )?,
        })
    }
}

/// Lengths of what a family's front end has between batch and embedding.
struct FrontEndLens {
    reals: usize,
    real_actions: usize,
    middle: usize,
    out: usize,
}

impl FrontEndLens {
    fn new(family: &FamilyNetwork, observations: usize) -> Self {
        let (reals, middle, out) = match &family.observation {
            ObservationEmbedding::Convolution(front_end, _) => {
                let cells = front_end.grid.positions();
                (0, cells * front_end.middle, cells * front_end.out)
            }
            ObservationEmbedding::Linear(_) => (0, 0, 0),
            ObservationEmbedding::Reals(map) => (map.inputs, 0, 0),
            ObservationEmbedding::Patches { count, patch, map } => {
                (count * patch.inputs, map.inputs, map.inputs)
            }
        };
        let real_actions = match &family.action {
            ActionEmbedding::OneHot(_) => 0,
            ActionEmbedding::Reals(map) => map.inputs,
        };
        Self {
            reals: observations * reals,
            real_actions: observations * real_actions,
            middle: observations * middle,
            out: observations * out,
        }
    }
}
