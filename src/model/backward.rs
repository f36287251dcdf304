//! The backward pass of a model, over any backend: [`super::forward`] read from its end.

use super::activations::{
    Activations, Backward, BlockActivations, FamilyBackward, MemoryActivations,
};
use super::config::Block;
use super::forward::{Pass, Site, memory_inputs};
use super::network::{ActionEmbedding, BlockNetwork, MemoryNetwork, ObservationEmbedding};
use super::{Model, ModelError};
use crate::backend::{
    Activation, Backend, Codes, Dropped, In, Linear, MemoryGradients, Metric, Out, Positions,
    SummandGradient,
};

/// The metrics of a family, which are added up: the first ones.
const LOSS_METRICS: usize = 2;
const _: () = assert!(Metric::ActionLoss as usize == 0 && Metric::Correct as usize == 1);

impl<B: Backend> Model<B> {
    /// Adds the gradients of the weighted losses to `gradients`.
    pub(super) fn backward(
        &self,
        pass: Pass<B>,
        acts: &mut Activations<B>,
        grads: &mut Backward<B>,
        gradients: &mut B::Buffer,
    ) -> Result<(), ModelError> {
        let Pass { batch, counts, .. } = pass;
        let backend = &*self.backend;
        let network = &self.network;
        let width = self.config.width;
        for (index, (family, rows)) in pass.families_of(network) {
            let rows = &rows.observations;
            let outputs = family.head.outputs;
            let own = &mut acts.families[index];
            let grad_logits = &mut grads.families[index].logits;
            let (logits, metrics) = (&own.logits, &mut own.metrics);
            match family.action {
                ActionEmbedding::OneHot(_) => {
                    backend.cross_entropy(batch, index, outputs, logits, grad_logits, metrics)?
                }
                ActionEmbedding::Reals(_) => {
                    backend.squared_error(batch, index, outputs, logits, grad_logits, metrics)?
                }
            }
            backend.add_assign(LOSS_METRICS, &own.metrics, &mut acts.metrics)?;
            self.linear_backward(
                rows.len(),
                &family.head,
                In::rows_from(&acts.gathered, width, rows.start),
                &acts.none,
                None,
                In::rows(grad_logits, outputs),
                Some(Out::rows_from(&mut grads.observation, width, rows.start)),
                false,
                gradients,
            )?;
        }
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
                false,
                None,
                gradients,
            )?;
        }
        for index in (0..network.blocks.len()).rev() {
            let block = &network.blocks[index];
            let x = &acts.residual[index];
            let (acts, none) = (&acts.blocks[index], &acts.none);
            match self.config.block {
                Block::PostLn => {
                    self.post_ln_backward(index, block, pass, x, acts, none, grads, gradients)?
                }
                Block::PreLn => {
                    self.pre_ln_backward(index, block, pass, x, acts, none, grads, gradients)?
                }
            }
        }
        if let Some(mask) = pass.mask(self.config.dropout, Site::Embedding)? {
            backend.dropout(mask, width, None, &mut grads.stream)?;
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
                    false,
                    None,
                    gradients,
                )?;
                &grads.side
            }
            None => &grads.stream,
        };
        let positions = match network.positions {
            Positions::Learned(span) if self.parameters.trains(span) => Some(span),
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
        self.embed_backward(pass, acts, grads, gradients)
    }

    fn embed_backward(
        &self,
        pass: Pass<B>,
        acts: &Activations<B>,
        grads: &mut Backward<B>,
        gradients: &mut B::Buffer,
    ) -> Result<(), ModelError> {
        let Pass { batch, counts, .. } = pass;
        let backend = &*self.backend;
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
        for (index, (family, rows)) in pass.families_of(&self.network) {
            let own = &acts.families[index];
            match &family.action {
                _ if rows.actions.is_empty() => {}
                ActionEmbedding::OneHot(map) => {
                    let codes = Codes::Actions(index);
                    backend.one_hot_backward(batch, codes, map, &grads.action, gradients)?;
                }
                ActionEmbedding::Reals(map) => self.linear_backward(
                    rows.actions.len(),
                    map,
                    In::rows(&own.real_actions, map.inputs),
                    &acts.none,
                    None,
                    In::rows_from(&grads.action, width, rows.actions.start),
                    None,
                    false,
                    gradients,
                )?,
            }
            let (count, first) = (rows.observations.len(), rows.observations.start);
            let FamilyBackward { middle, out, .. } = &mut grads.families[index];
            let (last_map, x, grad_x) = match &family.observation {
                ObservationEmbedding::Linear(map) => {
                    let codes = Codes::Observations(index);
                    backend.one_hot_backward(batch, codes, map, &grads.observation, gradients)?;
                    continue;
                }
                ObservationEmbedding::Reals(map) => (map, &own.reals, None),
                ObservationEmbedding::Convolution(_, map)
                | ObservationEmbedding::Patches { map, .. } => {
                    (map, &own.out, Some(Out::rows(out, map.inputs)))
                }
            };
            self.linear_backward(
                count,
                last_map,
                In::rows(x, last_map.inputs),
                &acts.none,
                None,
                In::rows_from(&grads.observation, width, first),
                grad_x,
                false,
                gradients,
            )?;
            match &family.observation {
                ObservationEmbedding::Convolution(front_end, _) => backend.convolutions_backward(
                    batch,
                    index,
                    front_end,
                    &self.values,
                    &own.middle,
                    &own.out,
                    out,
                    middle,
                    gradients,
                )?,
                ObservationEmbedding::Patches {
                    count: patches,
                    patch,
                    map,
                } => {
                    let len = count * map.inputs;
                    backend.activation_backward(
                        Activation::Relu,
                        len,
                        &own.middle,
                        &own.out,
                        out,
                    )?;
                    self.linear_backward(
                        count * patches,
                        patch,
                        In::rows(&own.reals, patch.inputs),
                        &acts.none,
                        None,
                        In::rows(out, patch.outputs),
                        None,
                        false,
                        gradients,
                    )?;
                }
                ObservationEmbedding::Linear(_) | ObservationEmbedding::Reals(_) => {}
            }
        }
        Ok(())
    }

    /// `grads.stream`: gradient of the block's output on entry, of its input on return.
    fn post_ln_backward(
        &self,
        index: usize,
        block: &BlockNetwork,
        pass: Pass<B>,
        x: &B::Buffer,
        acts: &BlockActivations<B>,
        none: &B::Buffer,
        grads: &mut Backward<B>,
        gradients: &mut B::Buffer,
    ) -> Result<(), ModelError> {
        let rows = pass.counts.tokens;
        let backend = &*self.backend;
        let width = self.config.width;
        let stream = acts
            .memory
            .as_ref()
            .map_or(&acts.middle, |memory| &memory.out);
        let dropout = pass.mask(self.config.dropout, Site::FeedForward(index))?;
        let summand = dropout.map(|dropout| SummandGradient {
            dropout,
            gradient: &mut grads.branch,
        });
        backend.layer_norm_backward(
            rows,
            &block.feed_forward_norm,
            &self.values,
            &acts.feed_forward_side,
            &acts.feed_forward_statistics,
            &grads.stream,
            &mut grads.side,
            false,
            summand,
            gradients,
        )?;
        std::mem::swap(&mut grads.stream, &mut grads.side);
        let dropped = dropout.is_some();
        self.feed_forward_backward(block, pass, stream, dropped, acts, none, grads, gradients)?;
        backend.add_assign(rows * width, &grads.side, &mut grads.stream)?;
        if let (Some(memory), Some(acts_memory)) = (&block.memory, &acts.memory) {
            let x = &acts.middle;
            self.memory_backward(index, memory, pass, x, acts_memory, none, grads, gradients)?;
        }
        backend.layer_norm_backward(
            rows,
            &block.attention_norm,
            &self.values,
            &acts.attention_side,
            &acts.attention_statistics,
            &grads.stream,
            &mut grads.side,
            false,
            None,
            gradients,
        )?;
        std::mem::swap(&mut grads.stream, &mut grads.side);
        self.attention_backward(block, pass, x, acts, none, grads, gradients)?;
        backend.add_assign(rows * width, &grads.side, &mut grads.stream)?;
        Ok(())
    }

    /// As [`Self::post_ln_backward`].
    fn pre_ln_backward(
        &self,
        index: usize,
        block: &BlockNetwork,
        pass: Pass<B>,
        x: &B::Buffer,
        acts: &BlockActivations<B>,
        none: &B::Buffer,
        grads: &mut Backward<B>,
        gradients: &mut B::Buffer,
    ) -> Result<(), ModelError> {
        let rows = pass.counts.tokens;
        let backend = &*self.backend;
        let stream = acts
            .memory
            .as_ref()
            .map_or(&acts.middle, |memory| &memory.out);
        let normed = &acts.feed_forward_side;
        let dropout = pass.mask(self.config.dropout, Site::FeedForward(index))?;
        if let Some(dropout) = dropout {
            let width = self.config.width;
            backend.dropout(dropout, width, Some(&grads.stream), &mut grads.branch)?;
        }
        let dropped = dropout.is_some();
        self.feed_forward_backward(block, pass, normed, dropped, acts, none, grads, gradients)?;
        backend.layer_norm_backward(
            rows,
            &block.feed_forward_norm,
            &self.values,
            stream,
            &acts.feed_forward_statistics,
            &grads.side,
            &mut grads.stream,
            true,
            None,
            gradients,
        )?;
        if let (Some(memory), Some(acts_memory)) = (&block.memory, &acts.memory) {
            let x = &acts.middle;
            self.memory_backward(index, memory, pass, x, acts_memory, none, grads, gradients)?;
        }
        let normed = &acts.attention_side;
        self.attention_backward(block, pass, normed, acts, none, grads, gradients)?;
        backend.layer_norm_backward(
            rows,
            &block.attention_norm,
            &self.values,
            x,
            &acts.attention_statistics,
            &grads.side,
            &mut grads.stream,
            true,
            None,
            gradients,
        )?;
        Ok(())
    }

    /// From `grads.stream`, the gradient of the branch's output, or where it was `dropped` from that in
    /// `grads.branch`, to `grads.side`, that of its input `x`.
    fn feed_forward_backward(
        &self,
        block: &BlockNetwork,
        pass: Pass<B>,
        x: &B::Buffer,
        dropped: bool,
        acts: &BlockActivations<B>,
        none: &B::Buffer,
        grads: &mut Backward<B>,
        gradients: &mut B::Buffer,
    ) -> Result<(), ModelError> {
        let rows = pass.counts.tokens;
        let backend = &*self.backend;
        let (width, wide) = (self.config.width, block.up.outputs);
        let grad_down = if dropped {
            &grads.branch
        } else {
            &grads.stream
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
        pass: Pass<B>,
        x: &B::Buffer,
        acts: &BlockActivations<B>,
        none: &B::Buffer,
        grads: &mut Backward<B>,
        gradients: &mut B::Buffer,
    ) -> Result<(), ModelError> {
        let (batch, rows) = (pass.batch, pass.counts.tokens);
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
            &acts.attention,
            &grads.branch,
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
        pass: Pass<B>,
        x: &B::Buffer,
        acts: &MemoryActivations<B>,
        none: &B::Buffer,
        grads: &mut Backward<B>,
        gradients: &mut B::Buffer,
    ) -> Result<(), ModelError> {
        let (batch, rows) = (pass.batch, pass.counts.tokens);
        let backend = &*self.backend;
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
            &acts.state,
            &grads.branch,
            input_gradients,
            &mut grads.states,
            gradients,
        )?;
        let [on_keys, on_address, on_strength] = self.adapter_masks(pass, index)?;
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
            &mut grads.stream,
            true,
            None,
            gradients,
        )?;
        Ok(())
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
