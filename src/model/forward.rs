//! The forward pass of a model, over any backend.

use dtmem_reference::dropout::Mask;

use super::activations::{Activations, FamilyActivations, MemoryActivations};
use super::config::Block;
use super::network::{
    ActionEmbedding, FamilyNetwork, MemoryNetwork, Network, ObservationEmbedding,
};
use super::{Model, ModelError};
use crate::backend::{
    Activation, Backend, Codes, Dropped, In, KeyValueCache, Linear, MemoryInputs, MemoryStart, Out,
    Positions, Reals, Residual,
};
use crate::batch::{FamilyRows, PackedBatch};

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

/// What one pass over a batch is told.
#[derive(Debug)]
pub(super) struct Pass<'a, B: Backend> {
    pub batch: &'a B::Batch,
    pub counts: Counts,
    /// Rows of each family.
    pub families: &'a [FamilyRows],
    /// Seed and number of the training step, from which dropout is drawn; none outside of training.
    pub training: Option<(u64, u32)>,
}

/// Where in the model dropout happens; each site of each block has its own masks.
#[derive(Debug, Clone, Copy)]
pub(super) enum Site {
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

impl<'a, B: Backend> Pass<'a, B> {
    /// The families that the batch has observations of, with their numbers and rows.
    pub fn families_of(
        self,
        network: &'a Network,
    ) -> impl Iterator<Item = (usize, (&'a FamilyNetwork, &'a FamilyRows))> {
        let families = network.families.iter().zip(self.families).enumerate();
        families.filter(|(_, (_, rows))| !rows.observations.is_empty())
    }

    pub fn mask(
        self,
        probability: f64,
        site: Site,
    ) -> Result<Option<Dropped<'a, B::Batch>>, ModelError> {
        match self.training {
            Some((seed, step)) if probability > 0.0 => {
                let mask = Mask::new(seed, step, site.number(), probability)?;
                Ok(Some(Dropped {
                    mask,
                    batch: self.batch,
                }))
            }
            _ => Ok(None),
        }
    }
}

impl<B: Backend> Clone for Pass<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<B: Backend> Copy for Pass<'_, B> {}

/// State of episodes that are being acted in, in lockstep.
#[derive(Debug)]
pub(super) struct ActingState<'a, B: Backend> {
    /// Of each block.
    pub caches: &'a mut [KeyValueCache<B::Buffer>],
    /// Memory of each block, [episodes, N·D].
    pub memories: &'a mut [B::Buffer],
    /// Whether the batch's tokens are final: the memory is written.
    pub commit: bool,
}

impl<B: Backend> Model<B> {
    /// Logits at the observation tokens, and everything before them.
    pub(super) fn forward(
        &self,
        pass: Pass<B>,
        mut acting: Option<ActingState<B>>,
        acts: &mut Activations<B>,
    ) -> Result<(), ModelError> {
        let Pass { batch, counts, .. } = pass;
        let backend = &*self.backend;
        let network = &self.network;
        let width = self.config.width;
        self.embed(pass, acts)?;
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
                None,
                &mut acts.residual[0],
                &mut acts.statistics,
            )?;
        }
        if let Some(mask) = pass.mask(self.config.dropout, Site::Embedding)? {
            backend.dropout(mask, width, None, &mut acts.residual[0])?;
        }
        for index in 0..network.blocks.len() {
            self.block(index, pass, &mut acting, acts)?;
        }
        let stream = &acts.residual[network.blocks.len()];
        let last = match &network.final_norm {
            Some(norm) => {
                backend.layer_norm(
                    counts.tokens,
                    norm,
                    &self.values,
                    stream,
                    None,
                    &mut acts.last,
                    &mut acts.last_statistics,
                )?;
                &acts.last
            }
            None => stream,
        };
        backend.gather_observations(batch, width, last, &mut acts.gathered)?;
        for (index, (family, rows)) in pass.families_of(network) {
            let rows = &rows.observations;
            self.linear(
                rows.len(),
                &family.head,
                In::rows_from(&acts.gathered, width, rows.start),
                &mut acts.none,
                None,
                Out::rows(&mut acts.families[index].logits, family.head.outputs),
            )?;
        }
        Ok(())
    }

    fn embed(&self, pass: Pass<B>, acts: &mut Activations<B>) -> Result<(), ModelError> {
        let Pass { batch, counts, .. } = pass;
        let backend = &*self.backend;
        let width = self.config.width;
        for (index, (family, rows)) in pass.families_of(&self.network) {
            let FamilyActivations {
                reals,
                real_actions,
                middle,
                out,
                ..
            } = &mut acts.families[index];
            let observations = &rows.observations;
            let (count, first) = (observations.len(), observations.start);
            let last_map = match &family.observation {
                ObservationEmbedding::Linear(map) => {
                    let codes = Codes::Observations(index);
                    backend.one_hot(batch, codes, map, &self.values, &mut acts.observation_in)?;
                    None
                }
                ObservationEmbedding::Convolution(front_end, map) => {
                    backend.convolutions(batch, index, front_end, &self.values, middle, out)?;
                    Some((map, &*out))
                }
                ObservationEmbedding::Reals(map) => {
                    backend.reals(batch, Reals::Observations(index), reals)?;
                    Some((map, &*reals))
                }
                ObservationEmbedding::Patches {
                    count: patches,
                    patch,
                    map,
                } => {
                    backend.reals(batch, Reals::Observations(index), reals)?;
                    self.linear(
                        count * patches,
                        patch,
                        In::rows(reals, patch.inputs),
                        &mut acts.none,
                        None,
                        Out::rows(middle, patch.outputs),
                    )?;
                    backend.activation(Activation::Relu, count * map.inputs, middle, out)?;
                    Some((map, &*out))
                }
            };
            if let Some((map, x)) = last_map {
                self.linear(
                    count,
                    map,
                    In::rows(x, map.inputs),
                    &mut acts.none,
                    None,
                    Out::rows_from(&mut acts.observation_in, width, first),
                )?;
            }
            if rows.actions.is_empty() {
                continue;
            }
            match &family.action {
                ActionEmbedding::OneHot(map) => {
                    let codes = Codes::Actions(index);
                    backend.one_hot(batch, codes, map, &self.values, &mut acts.action_in)?;
                }
                ActionEmbedding::Reals(map) => {
                    backend.reals(batch, Reals::Actions(index), real_actions)?;
                    self.linear(
                        rows.actions.len(),
                        map,
                        In::rows(real_actions, map.inputs),
                        &mut acts.none,
                        None,
                        Out::rows_from(&mut acts.action_in, width, rows.actions.start),
                    )?;
                }
            }
        }
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
            backend.reals(batch, Reals::Returns, &mut acts.return_value)?;
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
        pass: Pass<B>,
        acting: &mut Option<ActingState<B>>,
        acts: &mut Activations<B>,
    ) -> Result<(), ModelError> {
        let (batch, rows) = (pass.batch, pass.counts.tokens);
        let backend = &*self.backend;
        let block = &self.network.blocks[index];
        let width = self.config.width;
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
                None,
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
                &mut acts.attention,
                metrics,
            )?,
            Some(state) => backend.attention_cached(
                batch,
                &block.attention,
                &acts.qkv,
                &mut state.caches[index],
                &mut acts.attended,
                &mut acts.attention,
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
            backend.add(rows, width, x, branch, None, &mut acts.middle)?;
        } else {
            backend.layer_norm(
                rows,
                &block.attention_norm,
                &self.values,
                x,
                Some(Residual {
                    summand: branch,
                    dropout: None,
                    sum: &mut acts.attention_side,
                }),
                &mut acts.middle,
                &mut acts.attention_statistics,
            )?;
        }

        if let (Some(memory), Some(acts_memory)) = (&block.memory, &mut acts.memory) {
            let x = &acts.middle;
            self.memory(
                index,
                memory,
                pass,
                acting,
                x,
                acts_memory,
                branch,
                none,
                metrics,
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
                None,
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
        let dropout = pass.mask(self.config.dropout, Site::FeedForward(index))?;
        if pre {
            backend.add(rows, width, stream, branch, dropout, y)?;
        } else {
            backend.layer_norm(
                rows,
                &block.feed_forward_norm,
                &self.values,
                stream,
                Some(Residual {
                    summand: branch,
                    dropout,
                    sum: &mut acts.feed_forward_side,
                }),
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
        pass: Pass<B>,
        acting: &mut Option<ActingState<B>>,
        x: &B::Buffer,
        acts: &mut MemoryActivations<B>,
        branch: &mut B::Buffer,
        none: &mut B::Buffer,
        metrics: &mut B::Buffer,
    ) -> Result<(), ModelError> {
        let (batch, rows) = (pass.batch, pass.counts.tokens);
        let backend = &*self.backend;
        let width = self.config.width;
        backend.layer_norm(
            rows,
            &network.norm,
            &self.values,
            x,
            None,
            &mut acts.normed,
            &mut acts.statistics,
        )?;
        let [on_keys, on_address, on_strength] = self.adapter_masks(pass, index)?;
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
            Some(state) => MemoryStart::State(&state.memories[index]),
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
            &mut acts.state,
            &mut acts.read,
            metrics,
        )?;
        if let Some(state) = acting.as_mut().filter(|state| state.commit) {
            let to = &mut state.memories[index];
            backend.commit_memory(batch, &network.memory, &acts.state, to)?;
        }
        self.linear(
            rows,
            &network.out,
            In::rows(&acts.read, width),
            none,
            None,
            Out::rows(branch, width),
        )?;
        backend.add(rows, width, x, branch, None, &mut acts.out)?;
        Ok(())
    }

    pub(super) fn adapter_masks<'b>(
        &self,
        pass: Pass<'b, B>,
        block: usize,
    ) -> Result<[Option<Dropped<'b, B::Batch>>; 3], ModelError> {
        let probability = self.adaptation.dropout();
        Ok([
            pass.mask(probability, Site::AdaptedKeys(block))?,
            pass.mask(probability, Site::AdaptedAddress(block))?,
            pass.mask(probability, Site::AdaptedStrength(block))?,
        ])
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
}

pub(super) fn memory_inputs<'a, Buffer>(
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
