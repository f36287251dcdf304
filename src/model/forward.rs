//! Forward and backward of a model, over any backend.

use dtmem_reference::dropout::Mask;

use super::activations::{Activations, Backward, BlockActivations, MemoryActivations};
use super::config::Block;
use super::network::{BlockNetwork, MemoryNetwork, ObservationEmbedding};
use super::{Model, ModelError};
use crate::backend::{
    Activation, Backend, Codes, Dropped, In, KeyValueCache, Linear, MemoryGradients, MemoryInputs,
    MemoryStart, Out, Positions,
};
use crate::batch::PackedBatch;

/// Sizes of a batch.
#[derive(Debug, Clone, Copy)]
pub(super) struct Counts {
    pub tokens: usize,
    pub observations: usize,
    pub actions: usize,
    pub returns: usize,
}

impl From<&PackedBatch> for Counts {
    fn from(batch: &PackedBatch) -> Self {
        Self {
            tokens: batch.tokens(),
            observations: batch.observation_tokens.len(),
            actions: batch.action_tokens.len(),
            returns: batch.return_tokens.len(),
        }
    }
}

/// What each summed loss counts in the gradient.
#[derive(Debug, Clone, Copy)]
pub(super) struct LossWeights {
    /// Of the cross-entropy of one action: 1 / actions of the whole batch.
    pub action: f64,
    /// Of the numerator of the memory loss: λ / its denominator over the whole batch.
    pub pair: f64,
}

/// Draws the dropout masks of one training step; none outside of training.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Masks {
    /// Seed and number of the step.
    pub training: Option<(u64, u32)>,
}

/// Where in the model dropout happens; each site of each block has its own masks.
#[derive(Debug, Clone, Copy)]
enum Site {
    Embedding,
    FeedForward(usize),
    AdaptedKeys(usize),
    AdaptedAddress(usize),
    AdaptedStrength(usize),
}

impl Site {
    fn number(self) -> u32 {
        let (block, site) = match self {
            Self::Embedding => return 0,
            Self::FeedForward(block) => (block, 1),
            Self::AdaptedKeys(block) => (block, 2),
            Self::AdaptedAddress(block) => (block, 3),
            Self::AdaptedStrength(block) => (block, 4),
        };
        block as u32 * 4 + site
    }
}

impl Masks {
    fn mask<Batch>(
        self,
        probability: f64,
        site: Site,
        batch: &Batch,
    ) -> Result<Option<Dropped<'_, Batch>>, ModelError> {
        match self.training {
            Some((seed, step)) if probability > 0.0 => {
                let mask = Mask::new(seed, step, site.number(), probability)?;
                Ok(Some(Dropped { mask, batch }))
            }
            _ => Ok(None),
        }
    }
}

/// State of episodes that are being acted in, in lockstep.
#[derive(Debug)]
pub(super) struct ActingState<'a, B: Backend> {
    /// Of each block.
    pub caches: &'a mut [KeyValueCache<B::Buffer>],
    /// Memory of each block, [episodes, N·D].
    pub memories: &'a mut [B::Buffer],
    /// Episode of each sequence of the batch.
    pub rows: &'a [usize],
    /// Cached tokens before those of the batch.
    pub prefix: usize,
    /// Whether the batch's tokens are final: the memory is written.
    pub commit: bool,
}

impl<B: Backend> Model<B> {
    /// Logits at the observation tokens, and everything before them.
    pub(super) fn forward(
        &self,
        batch: &B::Batch,
        counts: Counts,
        masks: Masks,
        mut acting: Option<ActingState<B>>,
        acts: &mut Activations<B>,
    ) -> Result<(), ModelError> {
        let backend = &self.backend;
        let network = &self.network;
        let width = self.config.width;
        self.embed(batch, counts, acts)?;
        let table = match network.positions {
            Positions::Constant(_) => &self.constants,
            Positions::Learned(_) => &self.values,
        };
        let assembled = match network.embedding_norm {
            Some(_) => &mut acts.assembled,
            None => &mut acts.residual[0],
        };
        backend.assemble_tokens(
            batch,
            width,
            &acts.observation,
            &acts.action,
            &acts.return_to_go,
            network.positions,
            table,
            assembled,
        )?;
        if let Some(norm) = &network.embedding_norm {
            backend.layer_norm(
                counts.tokens,
                norm,
                &self.values,
                &acts.assembled,
                &mut acts.residual[0],
                &mut acts.statistics,
            )?;
        }
        if let Some(mask) = masks.mask(self.config.dropout, Site::Embedding, batch)? {
            backend.dropout(mask, width, &mut acts.residual[0])?;
        }
        for index in 0..network.blocks.len() {
            self.block(index, batch, counts.tokens, masks, &mut acting, acts)?;
        }
        let stream = &acts.residual[network.blocks.len()];
        let last = match &network.final_norm {
            Some(norm) => {
                backend.layer_norm(
                    counts.tokens,
                    norm,
                    &self.values,
                    stream,
                    &mut acts.last,
                    &mut acts.last_statistics,
                )?;
                &acts.last
            }
            None => stream,
        };
        backend.gather_observations(batch, width, last, &mut acts.gathered)?;
        self.linear(
            counts.observations,
            &network.head,
            In::rows(&acts.gathered, width),
            &mut acts.none,
            None,
            Out::rows(&mut acts.logits, network.head.outputs),
        )
    }

    fn embed(
        &self,
        batch: &B::Batch,
        counts: Counts,
        acts: &mut Activations<B>,
    ) -> Result<(), ModelError> {
        let backend = &self.backend;
        let width = self.config.width;
        match &self.network.observation {
            ObservationEmbedding::Linear(map) => backend.one_hot(
                batch,
                Codes::Observations,
                map,
                &self.values,
                &mut acts.observation_in,
            )?,
            ObservationEmbedding::Convolution(front_end, map) => {
                backend.convolutions(
                    batch,
                    front_end,
                    &self.values,
                    &mut acts.convolution_middle,
                    &mut acts.convolution_out,
                )?;
                self.linear(
                    counts.observations,
                    map,
                    In::rows(&acts.convolution_out, map.inputs),
                    &mut acts.none,
                    None,
                    Out::rows(&mut acts.observation_in, width),
                )?;
            }
        }
        let map = &self.network.action;
        backend.one_hot(
            batch,
            Codes::Actions,
            map,
            &self.values,
            &mut acts.action_in,
        )?;
        for (len, x, y) in [
            (
                counts.observations,
                &acts.observation_in,
                &mut acts.observation,
            ),
            (counts.actions, &acts.action_in, &mut acts.action),
        ] {
            backend.activation(Activation::Tanh, len * width, x, y)?;
        }
        if let Some(map) = &self.network.return_to_go {
            backend.returns(batch, &mut acts.return_value)?;
            self.linear(
                counts.returns,
                map,
                In::rows(&acts.return_value, 1),
                &mut acts.none,
                None,
                Out::rows(&mut acts.return_to_go, width),
            )?;
        }
        Ok(())
    }

    fn block(
        &self,
        index: usize,
        batch: &B::Batch,
        rows: usize,
        masks: Masks,
        acting: &mut Option<ActingState<B>>,
        acts: &mut Activations<B>,
    ) -> Result<(), ModelError> {
        let backend = &self.backend;
        let block = &self.network.blocks[index];
        let width = self.config.width;
        let len = rows * width;
        let Activations {
            residual,
            blocks,
            metrics,
            branch,
            none,
            ..
        } = acts;
        let (before, after) = residual.split_at_mut(index + 1);
        let (x, y) = (&before[index], &mut after[0]);
        let acts = &mut blocks[index];
        let pre = self.config.block == Block::PreLn;

        if pre {
            backend.layer_norm(
                rows,
                &block.attention_norm,
                &self.values,
                x,
                &mut acts.attention_side,
                &mut acts.attention_statistics,
            )?;
        }
        let attention_in = if pre { &acts.attention_side } else { x };
        self.linear(
            rows,
            &block.qkv,
            In::rows(attention_in, width),
            none,
            None,
            Out::rows(&mut acts.qkv, 3 * width),
        )?;
        match acting {
            None => backend.attention(
                batch,
                &block.attention,
                &acts.qkv,
                &mut acts.attended,
                &mut acts.lse,
                metrics,
            )?,
            Some(state) => backend.attention_cached(
                batch,
                &block.attention,
                &acts.qkv,
                &mut state.caches[index],
                state.rows,
                state.prefix,
                &mut acts.attended,
                &mut acts.lse,
            )?,
        }
        self.linear(
            rows,
            &block.attention_out,
            In::rows(&acts.attended, width),
            none,
            None,
            Out::rows(branch, width),
        )?;
        if pre {
            backend.add(len, x, branch, &mut acts.middle)?;
        } else {
            backend.add(len, x, branch, &mut acts.attention_side)?;
            backend.layer_norm(
                rows,
                &block.attention_norm,
                &self.values,
                &acts.attention_side,
                &mut acts.middle,
                &mut acts.attention_statistics,
            )?;
        }

        if let (Some(memory), Some(acts_memory)) = (&block.memory, &mut acts.memory) {
            let x = &acts.middle;
            self.memory(
                index,
                memory,
                batch,
                rows,
                masks,
                acting,
                x,
                acts_memory,
                branch,
                none,
            )?;
        }
        let stream = acts
            .memory
            .as_ref()
            .map_or(&acts.middle, |memory| &memory.out);

        if pre {
            backend.layer_norm(
                rows,
                &block.feed_forward_norm,
                &self.values,
                stream,
                &mut acts.feed_forward_side,
                &mut acts.feed_forward_statistics,
            )?;
        }
        let feed_forward_in = if pre { &acts.feed_forward_side } else { stream };
        let wide = block.up.outputs;
        self.linear(
            rows,
            &block.up,
            In::rows(feed_forward_in, width),
            none,
            None,
            Out::rows(&mut acts.up, wide),
        )?;
        backend.activation(block.activation, rows * wide, &acts.up, &mut acts.hidden)?;
        self.linear(
            rows,
            &block.down,
            In::rows(&acts.hidden, wide),
            none,
            None,
            Out::rows(branch, width),
        )?;
        if let Some(mask) = masks.mask(self.config.dropout, Site::FeedForward(index), batch)? {
            backend.dropout(mask, width, branch)?;
        }
        if pre {
            backend.add(len, stream, branch, y)?;
        } else {
            backend.add(len, stream, branch, &mut acts.feed_forward_side)?;
            backend.layer_norm(
                rows,
                &block.feed_forward_norm,
                &self.values,
                &acts.feed_forward_side,
                y,
                &mut acts.feed_forward_statistics,
            )?;
        }
        Ok(())
    }

    /// out = x + Memory(LN x), in every block kind.
    fn memory(
        &self,
        index: usize,
        network: &MemoryNetwork,
        batch: &B::Batch,
        rows: usize,
        masks: Masks,
        acting: &mut Option<ActingState<B>>,
        x: &B::Buffer,
        acts: &mut MemoryActivations<B>,
        branch: &mut B::Buffer,
        none: &mut B::Buffer,
    ) -> Result<(), ModelError> {
        let backend = &self.backend;
        let width = self.config.width;
        backend.layer_norm(
            rows,
            &network.norm,
            &self.values,
            x,
            &mut acts.normed,
            &mut acts.statistics,
        )?;
        let [on_keys, on_address, on_strength] = self.adapter_masks(masks, index, batch)?;
        self.linear(
            rows,
            &network.keys,
            In::rows(&acts.normed, width),
            &mut acts.projected_adapted,
            on_keys,
            Out::rows(&mut acts.projected, 3 * width),
        )?;
        self.linear(
            rows,
            &network.address_query,
            In::columns(&acts.projected, 3 * width, 0),
            &mut acts.address_adapted,
            on_address,
            Out::columns(&mut acts.keys, 2 * width, 0),
        )?;
        self.linear(
            rows,
            &network.strength_query,
            In::columns(&acts.projected, 3 * width, width),
            &mut acts.strength_adapted,
            on_strength,
            Out::columns(&mut acts.keys, 2 * width, width),
        )?;
        if let Some(map) = &network.key_strength {
            self.linear(
                rows,
                map,
                In::rows(&acts.normed, width),
                none,
                None,
                Out::rows(&mut acts.key_strength_in, 1),
            )?;
            backend.activation(
                Activation::OnePlus,
                rows,
                &acts.key_strength_in,
                &mut acts.key_strength,
            )?;
        }
        let start = match acting {
            None => MemoryStart::Learned,
            Some(state) => MemoryStart::State(&state.memories[index], state.rows),
        };
        let inputs = memory_inputs(
            network,
            width,
            &acts.keys,
            &acts.projected,
            &acts.key_strength,
        );
        backend.memory(
            batch,
            &network.memory,
            &self.values,
            start,
            inputs,
            &mut acts.states,
            &mut acts.read,
        )?;
        if let Some(state) = acting.as_mut().filter(|state| state.commit) {
            let to = &mut state.memories[index];
            backend.commit_memory(batch, &network.memory, &acts.states, state.rows, to)?;
        }
        self.linear(
            rows,
            &network.out,
            In::rows(&acts.read, width),
            none,
            None,
            Out::rows(branch, width),
        )?;
        backend.add(rows * width, x, branch, &mut acts.out)?;
        Ok(())
    }

    fn adapter_masks<'b>(
        &self,
        masks: Masks,
        block: usize,
        batch: &'b B::Batch,
    ) -> Result<[Option<Dropped<'b, B::Batch>>; 3], ModelError> {
        let probability = self
            .config
            .adapter
            .as_ref()
            .map_or(0.0, |adapter| adapter.dropout);
        Ok([
            masks.mask(probability, Site::AdaptedKeys(block), batch)?,
            masks.mask(probability, Site::AdaptedAddress(block), batch)?,
            masks.mask(probability, Site::AdaptedStrength(block), batch)?,
        ])
    }

    /// Adds the gradients of the weighted losses to `gradients`.
    pub(super) fn backward(
        &self,
        batch: &B::Batch,
        counts: Counts,
        masks: Masks,
        weights: LossWeights,
        acts: &mut Activations<B>,
        grads: &mut Backward<B>,
        gradients: &mut B::Buffer,
    ) -> Result<(), ModelError> {
        let backend = &self.backend;
        let network = &self.network;
        let width = self.config.width;
        backend.cross_entropy(
            batch,
            network.head.outputs,
            weights.action,
            &acts.logits,
            &mut grads.logits,
            &mut acts.metrics,
        )?;
        self.linear_backward(
            counts.observations,
            &network.head,
            In::rows(&acts.gathered, width),
            &acts.none,
            None,
            In::rows(&grads.logits, network.head.outputs),
            Some(Out::rows(&mut grads.observation, width)),
            false,
            gradients,
        )?;
        let scattered = match network.final_norm {
            Some(_) => &mut grads.side,
            None => &mut grads.stream,
        };
        backend.scatter_observations(batch, width, &grads.observation, scattered)?;
        if let Some(norm) = &network.final_norm {
            backend.layer_norm_backward(
                counts.tokens,
                norm,
                &self.values,
                &acts.residual[network.blocks.len()],
                &acts.last_statistics,
                &grads.side,
                &mut grads.stream,
                gradients,
            )?;
        }
        for index in (0..network.blocks.len()).rev() {
            let block = &network.blocks[index];
            let x = &acts.residual[index];
            let (acts, none) = (&acts.blocks[index], &acts.none);
            match self.config.block {
                Block::PostLn => self.post_ln_backward(
                    index,
                    block,
                    batch,
                    counts.tokens,
                    masks,
                    weights,
                    x,
                    acts,
                    none,
                    grads,
                    gradients,
                )?,
                Block::PreLn => self.pre_ln_backward(
                    index,
                    block,
                    batch,
                    counts.tokens,
                    masks,
                    weights,
                    x,
                    acts,
                    none,
                    grads,
                    gradients,
                )?,
            }
        }
        if let Some(mask) = masks.mask(self.config.dropout, Site::Embedding, batch)? {
            backend.dropout(mask, width, &mut grads.stream)?;
        }
        let assembled = match &network.embedding_norm {
            Some(norm) => {
                backend.layer_norm_backward(
                    counts.tokens,
                    norm,
                    &self.values,
                    &acts.assembled,
                    &acts.statistics,
                    &grads.stream,
                    &mut grads.side,
                    gradients,
                )?;
                &grads.side
            }
            None => &grads.stream,
        };
        let positions = match network.positions {
            Positions::Learned(span) if self.config.adapter.is_none() => Some(span),
            _ => None,
        };
        backend.assemble_tokens_backward(
            batch,
            width,
            assembled,
            &mut grads.observation,
            &mut grads.action,
            &mut grads.return_to_go,
            positions,
            gradients,
        )?;
        self.embed_backward(batch, counts, acts, grads, gradients)
    }

    fn embed_backward(
        &self,
        batch: &B::Batch,
        counts: Counts,
        acts: &Activations<B>,
        grads: &mut Backward<B>,
        gradients: &mut B::Buffer,
    ) -> Result<(), ModelError> {
        let backend = &self.backend;
        let width = self.config.width;
        if let Some(map) = &self.network.return_to_go {
            self.linear_backward(
                counts.returns,
                map,
                In::rows(&acts.return_value, 1),
                &acts.none,
                None,
                In::rows(&grads.return_to_go, width),
                None,
                false,
                gradients,
            )?;
        }
        for (rows, x, y, grad) in [
            (
                counts.observations,
                &acts.observation_in,
                &acts.observation,
                &mut grads.observation,
            ),
            (
                counts.actions,
                &acts.action_in,
                &acts.action,
                &mut grads.action,
            ),
        ] {
            backend.activation_backward(Activation::Tanh, rows * width, x, y, grad)?;
        }
        let map = &self.network.action;
        backend.one_hot_backward(batch, Codes::Actions, map, &grads.action, gradients)?;
        match &self.network.observation {
            ObservationEmbedding::Linear(map) => backend.one_hot_backward(
                batch,
                Codes::Observations,
                map,
                &grads.observation,
                gradients,
            )?,
            ObservationEmbedding::Convolution(front_end, map) => {
                self.linear_backward(
                    counts.observations,
                    map,
                    In::rows(&acts.convolution_out, map.inputs),
                    &acts.none,
                    None,
                    In::rows(&grads.observation, width),
                    Some(Out::rows(&mut grads.convolution_out, map.inputs)),
                    false,
                    gradients,
                )?;
                backend.convolutions_backward(
                    batch,
                    front_end,
                    &self.values,
                    &acts.convolution_middle,
                    &acts.convolution_out,
                    &mut grads.convolution_out,
                    &mut grads.convolution_middle,
                    gradients,
                )?;
            }
        }
        Ok(())
    }

    /// `grads.stream`: gradient of the block's output on entry, of its input on return.
    fn post_ln_backward(
        &self,
        index: usize,
        block: &BlockNetwork,
        batch: &B::Batch,
        rows: usize,
        masks: Masks,
        weights: LossWeights,
        x: &B::Buffer,
        acts: &BlockActivations<B>,
        none: &B::Buffer,
        grads: &mut Backward<B>,
        gradients: &mut B::Buffer,
    ) -> Result<(), ModelError> {
        let backend = &self.backend;
        let width = self.config.width;
        let stream = acts
            .memory
            .as_ref()
            .map_or(&acts.middle, |memory| &memory.out);
        backend.layer_norm_backward(
            rows,
            &block.feed_forward_norm,
            &self.values,
            &acts.feed_forward_side,
            &acts.feed_forward_statistics,
            &grads.stream,
            &mut grads.side,
            gradients,
        )?;
        std::mem::swap(&mut grads.stream, &mut grads.side);
        self.feed_forward_backward(
            index, block, batch, rows, masks, stream, acts, none, grads, gradients,
        )?;
        backend.add_assign(rows * width, &grads.side, &mut grads.stream)?;
        if let (Some(memory), Some(acts_memory)) = (&block.memory, &acts.memory) {
            let x = &acts.middle;
            self.memory_backward(
                index,
                memory,
                batch,
                rows,
                masks,
                x,
                acts_memory,
                none,
                grads,
                gradients,
            )?;
        }
        backend.layer_norm_backward(
            rows,
            &block.attention_norm,
            &self.values,
            &acts.attention_side,
            &acts.attention_statistics,
            &grads.stream,
            &mut grads.side,
            gradients,
        )?;
        std::mem::swap(&mut grads.stream, &mut grads.side);
        self.attention_backward(block, batch, rows, weights, x, acts, none, grads, gradients)?;
        backend.add_assign(rows * width, &grads.side, &mut grads.stream)?;
        Ok(())
    }

    /// As [`Self::post_ln_backward`].
    fn pre_ln_backward(
        &self,
        index: usize,
        block: &BlockNetwork,
        batch: &B::Batch,
        rows: usize,
        masks: Masks,
        weights: LossWeights,
        x: &B::Buffer,
        acts: &BlockActivations<B>,
        none: &B::Buffer,
        grads: &mut Backward<B>,
        gradients: &mut B::Buffer,
    ) -> Result<(), ModelError> {
        let backend = &self.backend;
        let width = self.config.width;
        let stream = acts
            .memory
            .as_ref()
            .map_or(&acts.middle, |memory| &memory.out);
        let normed = &acts.feed_forward_side;
        self.feed_forward_backward(
            index, block, batch, rows, masks, normed, acts, none, grads, gradients,
        )?;
        backend.layer_norm_backward(
            rows,
            &block.feed_forward_norm,
            &self.values,
            stream,
            &acts.feed_forward_statistics,
            &grads.side,
            &mut grads.branch,
            gradients,
        )?;
        backend.add_assign(rows * width, &grads.branch, &mut grads.stream)?;
        if let (Some(memory), Some(acts_memory)) = (&block.memory, &acts.memory) {
            let x = &acts.middle;
            self.memory_backward(
                index,
                memory,
                batch,
                rows,
                masks,
                x,
                acts_memory,
                none,
                grads,
                gradients,
            )?;
        }
        let normed = &acts.attention_side;
        self.attention_backward(
            block, batch, rows, weights, normed, acts, none, grads, gradients,
        )?;
        backend.layer_norm_backward(
            rows,
            &block.attention_norm,
            &self.values,
            x,
            &acts.attention_statistics,
            &grads.side,
            &mut grads.branch,
            gradients,
        )?;
        backend.add_assign(rows * width, &grads.branch, &mut grads.stream)?;
        Ok(())
    }

    /// From `grads.stream`, the gradient of the branch's output, to `grads.side`, that of its
    /// input `x`.
    fn feed_forward_backward(
        &self,
        index: usize,
        block: &BlockNetwork,
        batch: &B::Batch,
        rows: usize,
        masks: Masks,
        x: &B::Buffer,
        acts: &BlockActivations<B>,
        none: &B::Buffer,
        grads: &mut Backward<B>,
        gradients: &mut B::Buffer,
    ) -> Result<(), ModelError> {
        let backend = &self.backend;
        let (width, wide) = (self.config.width, block.up.outputs);
        let grad_down = match masks.mask(self.config.dropout, Site::FeedForward(index), batch)? {
            Some(mask) => {
                backend.copy(&grads.stream, &mut grads.branch, rows * width)?;
                backend.dropout(mask, width, &mut grads.branch)?;
                &grads.branch
            }
            None => &grads.stream,
        };
        self.linear_backward(
            rows,
            &block.down,
            In::rows(&acts.hidden, wide),
            none,
            None,
            In::rows(grad_down, width),
            Some(Out::rows(&mut grads.hidden, wide)),
            false,
            gradients,
        )?;
        let (up, hidden) = (&acts.up, &acts.hidden);
        backend.activation_backward(
            block.activation,
            rows * wide,
            up,
            hidden,
            &mut grads.hidden,
        )?;
        self.linear_backward(
            rows,
            &block.up,
            In::rows(x, width),
            none,
            None,
            In::rows(&grads.hidden, wide),
            Some(Out::rows(&mut grads.side, width)),
            false,
            gradients,
        )
    }

    /// From `grads.stream` to `grads.side`, as [`Self::feed_forward_backward`].
    fn attention_backward(
        &self,
        block: &BlockNetwork,
        batch: &B::Batch,
        rows: usize,
        weights: LossWeights,
        x: &B::Buffer,
        acts: &BlockActivations<B>,
        none: &B::Buffer,
        grads: &mut Backward<B>,
        gradients: &mut B::Buffer,
    ) -> Result<(), ModelError> {
        let width = self.config.width;
        self.linear_backward(
            rows,
            &block.attention_out,
            In::rows(&acts.attended, width),
            none,
            None,
            In::rows(&grads.stream, width),
            Some(Out::rows(&mut grads.branch, width)),
            false,
            gradients,
        )?;
        self.backend.attention_backward(
            batch,
            &block.attention,
            &acts.qkv,
            &acts.attended,
            &acts.lse,
            &grads.branch,
            weights.pair,
            &mut grads.qkv,
        )?;
        self.linear_backward(
            rows,
            &block.qkv,
            In::rows(x, width),
            none,
            None,
            In::rows(&grads.qkv, 3 * width),
            Some(Out::rows(&mut grads.side, width)),
            false,
            gradients,
        )
    }

    /// `grads.stream`: gradient of x + Memory(LN x) on entry, of x on return.
    fn memory_backward(
        &self,
        index: usize,
        network: &MemoryNetwork,
        batch: &B::Batch,
        rows: usize,
        masks: Masks,
        x: &B::Buffer,
        acts: &MemoryActivations<B>,
        none: &B::Buffer,
        grads: &mut Backward<B>,
        gradients: &mut B::Buffer,
    ) -> Result<(), ModelError> {
        let backend = &self.backend;
        let width = self.config.width;
        self.linear_backward(
            rows,
            &network.out,
            In::rows(&acts.read, width),
            none,
            None,
            In::rows(&grads.stream, width),
            Some(Out::rows(&mut grads.branch, width)),
            false,
            gradients,
        )?;
        let inputs = memory_inputs(
            network,
            width,
            &acts.keys,
            &acts.projected,
            &acts.key_strength,
        );
        let input_gradients = MemoryGradients {
            keys: &mut grads.keys,
            value: Out::columns(&mut grads.projected, 3 * width, 2 * width),
            key_strength: network
                .key_strength
                .as_ref()
                .map(|_| &mut grads.key_strength),
        };
        backend.memory_backward(
            batch,
            &network.memory,
            &self.values,
            inputs,
            &acts.states,
            &grads.branch,
            input_gradients,
            &mut grads.states,
            gradients,
        )?;
        let [on_keys, on_address, on_strength] = self.adapter_masks(masks, index, batch)?;
        for (map, adapted, mask, column) in [
            (&network.address_query, &acts.address_adapted, on_address, 0),
            (
                &network.strength_query,
                &acts.strength_adapted,
                on_strength,
                width,
            ),
        ] {
            self.linear_backward(
                rows,
                map,
                In::columns(&acts.projected, 3 * width, column),
                adapted,
                mask,
                In::columns(&grads.keys, 2 * width, column),
                Some(Out::columns(&mut grads.projected, 3 * width, column)),
                false,
                gradients,
            )?;
        }
        self.linear_backward(
            rows,
            &network.keys,
            In::rows(&acts.normed, width),
            &acts.projected_adapted,
            on_keys,
            In::rows(&grads.projected, 3 * width),
            Some(Out::rows(&mut grads.side, width)),
            false,
            gradients,
        )?;
        if let Some(map) = &network.key_strength {
            backend.activation_backward(
                Activation::OnePlus,
                rows,
                &acts.key_strength_in,
                &acts.key_strength,
                &mut grads.key_strength,
            )?;
            self.linear_backward(
                rows,
                map,
                In::rows(&acts.normed, width),
                none,
                None,
                In::rows(&grads.key_strength, 1),
                Some(Out::rows(&mut grads.side, width)),
                true,
                gradients,
            )?;
        }
        backend.layer_norm_backward(
            rows,
            &network.norm,
            &self.values,
            x,
            &acts.statistics,
            &grads.side,
            &mut grads.branch,
            gradients,
        )?;
        backend.add_assign(rows * width, &grads.branch, &mut grads.stream)?;
        Ok(())
    }

    fn linear(
        &self,
        rows: usize,
        map: &Linear,
        x: In<B::Buffer>,
        adapted: &mut B::Buffer,
        dropout: Option<Dropped<B::Batch>>,
        y: Out<B::Buffer>,
    ) -> Result<(), ModelError> {
        Ok(self
            .backend
            .linear(rows, map, &self.values, x, adapted, dropout, y)?)
    }

    fn linear_backward(
        &self,
        rows: usize,
        map: &Linear,
        x: In<B::Buffer>,
        adapted: &B::Buffer,
        dropout: Option<Dropped<B::Batch>>,
        grad_y: In<B::Buffer>,
        grad_x: Option<Out<B::Buffer>>,
        accumulate: bool,
        gradients: &mut B::Buffer,
    ) -> Result<(), ModelError> {
        Ok(self.backend.linear_backward(
            rows,
            map,
            &self.values,
            x,
            adapted,
            dropout,
            grad_y,
            grad_x,
            accumulate,
            gradients,
        )?)
    }
}

fn memory_inputs<'a, Buffer>(
    network: &MemoryNetwork,
    width: usize,
    keys: &'a Buffer,
    projected: &'a Buffer,
    key_strength: &'a Buffer,
) -> MemoryInputs<'a, Buffer> {
    MemoryInputs {
        address_key: In::columns(keys, 2 * width, 0),
        strength_key: In::columns(keys, 2 * width, width),
        value: In::columns(projected, 3 * width, 2 * width),
        key_strength: network.key_strength.as_ref().map(|_| key_strength),
    }
}
