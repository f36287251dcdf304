//! A look inside: what a forward pass over a finished episode attended to, read and wrote.
//!
//! No operation gives these numbers away, and none has to: they follow from what a forward pass
//! keeps for its backward pass, so this works on every backend.

use std::ops::Range;

use dtmem_reference::Scalar;
use dtmem_reference::attention::LOG_FLOOR;
use dtmem_reference::content_memory::{Inputs, Order};
use ndarray::{Array1, Array2, Axis, Zip, s};

use super::activations::{Activations, MemoryActivations};
use super::config::{AttentionSpan, SupervisedPart};
use super::network::MemoryNetwork;
use super::{Model, ModelError};
use crate::backend::{Backend, Span};
use crate::batch::PackedBatch;

/// What happened inside of a model over the first sequence of a batch, of T tokens in S segments.
#[derive(Debug, Clone, PartialEq)]
pub struct Trace {
    /// First token of each segment, and T: S + 1 numbers.
    pub segments: Vec<usize>,
    /// Attention probabilities [T, T] of each head of each layer; zero where a query does not look.
    pub attention: Vec<Vec<Array2<f64>>>,
    /// The memory of each layer; none if the model has no memory.
    pub memory: Vec<MemoryTrace>,
}

/// What one memory layer of N slots did (SPEC section 4).
#[derive(Debug, Clone, PartialEq)]
pub struct MemoryTrace {
    /// Whether a token reads before or after its segment's write.
    pub order: Order,
    /// w [T, N]: which slots a token addresses, to read and to write.
    pub address: Array2<f64>,
    /// w·β [T, N]: how much of a token's value each slot takes.
    pub written: Array2<f64>,
    /// keep [S, N]: how much of each slot a segment leaves.
    pub keep: Array2<f64>,
}

impl MemoryTrace {
    /// Effective attention through the memory: E [T, T] and what is left of M₀ `[T]`.
    ///
    /// E_qp = Σ_i w_iq · (Π keep_i over the segments between the write of p and the read of q) ·
    /// w_ip β_ip is the share of token p's value in what token q reads, so that
    /// y_q = Σ_p E_qp v_p + Σ_i w_iq · (Π keep_i over the segments before the read) · M₀_i.
    /// The second value is the sum of the last factors before M₀_i. `segments` are those of the
    /// [`Trace`].
    pub fn recall(&self, segments: &[usize]) -> (Array2<f64>, Array1<f64>) {
        let (tokens, slots) = self.address.dim();
        let mut recalled = Array2::zeros((tokens, tokens));
        let mut of_start = Array1::zeros(tokens);
        // What is left of each token's write, and of M₀, before the segment at hand.
        let mut left = Array2::<f64>::zeros((tokens, slots));
        let mut start = Array1::<f64>::ones(slots);
        for (segment, bounds) in segments.windows(2).enumerate() {
            let rows = bounds[0]..bounds[1];
            let written_before = self.order == Order::WriteThenRead;
            if written_before {
                self.write(segment, rows.clone(), &mut left, &mut start);
            }
            let seen = if written_before { rows.end } else { rows.start };
            let w = self.address.slice(s![rows.clone(), ..]);
            recalled
                .slice_mut(s![rows.clone(), ..seen])
                .assign(&w.dot(&left.slice(s![..seen, ..]).t()));
            of_start.slice_mut(s![rows.clone()]).assign(&w.dot(&start));
            if !written_before {
                self.write(segment, rows, &mut left, &mut start);
            }
        }
        (recalled, of_start)
    }

    /// A segment's write: it leaves less of everything before, and all of its own.
    fn write(
        &self,
        segment: usize,
        rows: Range<usize>,
        left: &mut Array2<f64>,
        start: &mut Array1<f64>,
    ) {
        let keep = self.keep.row(segment);
        *start *= &keep;
        let (mut earlier, later) = left.view_mut().split_at(Axis(0), rows.start);
        earlier *= &keep;
        let (mut own, _) = later.split_at(Axis(0), rows.len());
        own.assign(&self.written.slice(s![rows, ..]));
    }
}

impl<B: Backend> Model<B> {
    /// Attention probabilities of one head, counted from 0, over the first sequence of a batch:
    /// [T, T], zero where a query does not look.
    pub fn attention_map(
        &self,
        batch: &PackedBatch,
        layer: usize,
        head: usize,
    ) -> Result<Array2<f64>, ModelError> {
        for (setting, found, limit) in [
            ("layer", layer, self.config.layers),
            ("head", head, self.config.heads),
        ] {
            if found >= limit {
                return Err(ModelError::setting(setting, found, format!("< {limit}")));
            }
        }
        let acts = self.evaluate(batch)?;
        self.attention_of(batch, &acts, layer, head)
    }

    /// The attention of every head and the memory of every layer over the first sequence of a
    /// batch, after one forward pass.
    pub fn trace(&self, batch: &PackedBatch) -> Result<Trace, ModelError> {
        let acts = self.evaluate(batch)?;
        let segments = batch.segments_of_first();
        let mut attention = Vec::with_capacity(self.config.layers);
        let mut memory = Vec::new();
        for (layer, block) in self.network.blocks.iter().enumerate() {
            let heads = (0..self.config.heads)
                .map(|head| self.attention_of(batch, &acts, layer, head))
                .collect::<Result<_, _>>()?;
            attention.push(heads);
            if let (Some(network), Some(acts)) = (&block.memory, &acts.blocks[layer].memory) {
                memory.push(self.memory_of(network, acts, &segments)?);
            }
        }
        Ok(Trace {
            segments,
            attention,
            memory,
        })
    }

    /// What the memory loss teaches, over the first sequence of a batch: the attention [T, T] of
    /// each supervised head, or the supervised memory's recall [T, T]. Nothing without supervision.
    pub fn supervised_maps(&self, batch: &PackedBatch) -> Result<Vec<Array2<f64>>, ModelError> {
        let Some(supervision) = &self.supervision else {
            return Ok(Vec::new());
        };
        let (acts, layer) = (self.evaluate(batch)?, supervision.layer);
        match &supervision.part {
            SupervisedPart::Heads(heads) => heads
                .iter()
                .map(|&head| self.attention_of(batch, &acts, layer, head))
                .collect(),
            SupervisedPart::Memory => {
                let (block, acts) = (&self.network.blocks[layer], &acts.blocks[layer]);
                let segments = batch.segments_of_first();
                let memory = block.memory.iter().zip(&acts.memory);
                memory
                    .map(|(network, acts)| {
                        let memory = self.memory_of(network, acts, &segments)?;
                        Ok(memory.recall(&segments).0)
                    })
                    .collect()
            }
        }
    }

    /// Numerator of the memory loss of the first sequence of a batch (SPEC section 3), summed over
    /// supervised heads; [`divisor`](super::SupervisionConfig::divisor) gives its denominator. 0
    /// without supervision, and where the sequence is not annotated.
    pub fn memory_loss(&self, batch: &PackedBatch) -> Result<f64, ModelError> {
        let supervision = self.supervision.as_ref();
        let Some(supervision) = supervision.filter(|_| batch.annotated.first() == Some(&1)) else {
            return Ok(0.0);
        };
        let tokens = batch.tokens_of(0).len();
        let offsets = |query: usize| batch.pair_offsets[query] as usize;
        let wanted = |query: usize| &batch.pair_keys[offsets(query)..offsets(query + 1)];
        // The keys that may count, of which a query has those before an end: all that it may attend
        // to, or those that some later segment recalls and that were written before its own.
        let segments = batch.segments_of_first();
        let mut keys = Vec::new();
        match &supervision.part {
            SupervisedPart::Heads(_) => keys.extend(0..tokens as i32),
            SupervisedPart::Memory => batch.recalled_tokens(0, &mut keys),
        }
        let end = |query: usize| match &supervision.part {
            SupervisedPart::Heads(_) => query + 1,
            SupervisedPart::Memory => {
                let bounds = segments.iter().take_while(|&&start| start <= query);
                bounds.last().copied().unwrap_or_default()
            }
        };
        let mut loss = 0.0;
        for map in self.supervised_maps(batch)? {
            for query in 0..tokens {
                let end = end(query) as i32;
                for key in keys.iter().take_while(|&&key| key < end) {
                    let share = map[[query, *key as usize]].clamp(0.0, 1.0);
                    let right = match wanted(query).contains(key) {
                        true => share,
                        false => 1.0 - share,
                    };
                    loss -= right.ln().clamp(LOG_FLOOR, 0.0);
                }
            }
        }
        Ok(loss)
    }

    /// A_ij = exp(scale · q_i·k_j − lse_i).
    fn attention_of(
        &self,
        batch: &PackedBatch,
        acts: &Activations<B>,
        layer: usize,
        head: usize,
    ) -> Result<Array2<f64>, ModelError> {
        let (width, heads) = (self.config.width, self.config.heads);
        let head_width = width / heads;
        let tokens = batch.cu_seqlens.get(1).map_or(0, |&end| end as usize);
        let acts = &acts.blocks[layer];
        let qkv = self.fetch(&acts.qkv, 0, tokens * 3 * width)?;
        let lse = self.fetch(self.backend.log_sum_exp(&acts.attention), 0, tokens * heads)?;
        let by_segment = self.config.attention == AttentionSpan::Segment;
        let scale = self.network.blocks[layer].attention.scale();
        let row = |token: usize, part: usize| {
            &qkv[token * 3 * width + part * width + head * head_width..][..head_width]
        };
        let mut map = Array2::zeros((tokens, tokens));
        let mut start = 0;
        for query in 0..tokens {
            if by_segment && batch.segment_offsets.contains(&(query as i32)) {
                start = query;
            }
            for key in start..=query {
                let score: f64 = row(query, 0)
                    .iter()
                    .zip(row(key, 1))
                    .map(|(q, k)| q.to_f64() * k.to_f64())
                    .sum();
                map[[query, key]] = (scale * score - lse[query * heads + head].to_f64()).exp();
            }
        }
        Ok(map)
    }

    /// The chain over the segments again, from the layer's inputs and with the definition.
    fn memory_of(
        &self,
        network: &MemoryNetwork,
        acts: &MemoryActivations<B>,
        segments: &[usize],
    ) -> Result<MemoryTrace, ModelError> {
        let memory = &network.memory;
        let (width, slots) = (memory.width, memory.slots);
        let tokens = segments.last().copied().unwrap_or(0);
        let variant = memory.variant;
        let rows = |columns: usize, numbers: Vec<B::Element>| {
            Array2::from_shape_vec((numbers.len() / columns, columns), numbers)
                .map_err(|_| ModelError::setting("memory", "no rows", format!("of {columns}")))
        };
        let keys = rows(2 * width, self.fetch(&acts.keys, 0, tokens * 2 * width)?)?;
        let projected = self.fetch(&acts.projected, 0, tokens * 3 * width)?;
        let projected = rows(3 * width, projected)?;
        let key_strength = match &network.key_strength {
            Some(_) => Some(Array1::from(self.fetch(&acts.key_strength, 0, tokens)?)),
            None => None,
        };
        let parameter = |span: Span| self.fetch(&self.values, span.offset, span.len);
        let strength_bias = match memory.strength_bias {
            Some(span) => parameter(span)?.first().copied().unwrap_or_default(),
            None => B::Element::default(),
        };
        let mut now = rows(width, parameter(memory.initial)?)?;
        let mut next = now.clone();
        let mut w = Array2::from_elem((tokens, slots), B::Element::default());
        let mut beta = w.clone();
        let mut read = Array2::from_elem((tokens, width), B::Element::default());
        let mut keep = Array2::ones((segments.len().saturating_sub(1), slots));
        let mut scratch = Vec::new();
        for (bounds, mut keep) in segments.windows(2).zip(keep.rows_mut()) {
            let tokens = s![bounds[0]..bounds[1], ..];
            let inputs = Inputs {
                memory: now.view(),
                address_key: keys.slice(s![bounds[0]..bounds[1], ..width]),
                strength_key: keys.slice(s![bounds[0]..bounds[1], width..]),
                value: projected.slice(s![bounds[0]..bounds[1], 2 * width..]),
                key_strength: key_strength
                    .as_ref()
                    .map(|all| all.slice(s![bounds[0]..bounds[1]])),
                strength_bias,
            };
            let (mut w, mut beta) = (w.slice_mut(tokens), beta.slice_mut(tokens));
            variant.address(inputs, w.view_mut(), beta.view_mut())?;
            for (w, beta) in w.axis_iter(Axis(0)).zip(beta.axis_iter(Axis(0))) {
                for ((keep, &w), &beta) in keep.iter_mut().zip(w).zip(beta) {
                    *keep *= 1.0 - variant.erase.erased(w, beta).to_f64();
                }
            }
            variant.forward(
                inputs,
                next.view_mut(),
                read.slice_mut(tokens),
                &mut scratch,
            )?;
            std::mem::swap(&mut now, &mut next);
        }
        let written = Zip::from(&w)
            .and(&beta)
            .map_collect(|w, beta| w.to_f64() * beta.to_f64());
        Ok(MemoryTrace {
            order: variant.order,
            address: w.mapv(|w| w.to_f64()),
            written,
            keep,
        })
    }

    fn fetch(
        &self,
        from: &B::Buffer,
        offset: usize,
        len: usize,
    ) -> Result<Vec<B::Element>, ModelError> {
        let mut numbers = vec![B::Element::default(); len];
        self.backend.download(from, offset, &mut numbers)?;
        Ok(numbers)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::backend::Cpu;
    use crate::batch::{TokenLayout, Trajectory};
    use crate::model::{
        AddressingKind, Block, EraseKind, FrontEnd, MemoryConfig, ModelConfig, OrderKind,
        StrengthKind,
    };
    use crate::spaces::{ActionSpace, ObservationSpace, Spaces};

    fn model(memory: MemoryConfig, segment_steps: usize, seed: u64) -> Model<Cpu<f64>> {
        let config = ModelConfig {
            block: Block::PreLn,
            layout: TokenLayout::ReturnObsAction,
            front_end: FrontEnd::Linear,
            width: 8,
            layers: 2,
            heads: 2,
            feed_forward: 16,
            dropout: 0.0,
            attention: AttentionSpan::Segment,
            segment_steps,
            memory: Some(memory),
            ..ModelConfig::default()
        };
        let observation = ObservationSpace::codes([2], [5, 3]);
        let spaces = Spaces::of(observation, ActionSpace::Discrete(4), 16);
        let mut model = Model::new(Cpu::new(), config, spaces, None).unwrap();
        model.initialise(seed).unwrap();
        model
    }

    fn close(a: f64, b: f64) -> bool {
        (a - b).abs() <= 1e-9 * (1.0 + b.abs())
    }

    fn memory() -> impl Strategy<Value = MemoryConfig> {
        (
            1_usize..6,
            prop_oneof![Just(AddressingKind::Cosine), Just(AddressingKind::Dot)],
            0_usize..3,
            prop_oneof![Just(StrengthKind::Sigmoid), Just(StrengthKind::Softmax)],
            prop_oneof![Just(EraseKind::Coupled), Just(EraseKind::Paper)],
            prop_oneof![
                Just(OrderKind::ReadThenWrite),
                Just(OrderKind::WriteThenRead)
            ],
        )
            .prop_map(
                |(slots, addressing, top_k, strength, erase, order)| MemoryConfig {
                    slots,
                    addressing,
                    top_k,
                    strength,
                    erase,
                    order,
                    ..MemoryConfig::default()
                },
            )
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        /// y_q = Σ_p E_qp v_p + Σ_i w_iq (Π keep_i) M₀_i, with the values and reads of the forward
        /// pass itself.
        #[test]
        fn the_effective_attention_explains_what_every_token_reads(
            memory in memory(),
            codes in prop::collection::vec((0_u8..5, 0_u8..3, 0_u8..4), 1..16),
            segment_steps in 1_usize..6,
            seed: u64,
        ) {
            let model = model(memory, segment_steps, seed);
            let observations: Vec<u8> = codes.iter().flat_map(|c| [c.0, c.1]).collect();
            let actions: Vec<u8> = codes.iter().map(|c| c.2).collect();
            let returns = vec![0.5; actions.len()];
            let mut packer = model.packer();
            // Something behind it must not matter.
            for _ in 0..2 {
                packer
                    .push_trajectory(Trajectory {
                        family: 0,
                        observations: (&observations).into(),
                        actions: (&actions).into(),
                        returns: &returns,
                        pairs: &[],
                        annotated: false,
                    })
                    .unwrap();
            }
            let batch = packer.batch();
            let trace = model.trace(batch).unwrap();
            let acts = model.evaluate(batch).unwrap();
            let tokens = 3 * actions.len();
            prop_assert_eq!(trace.segments.last(), Some(&tokens));
            for heads in &trace.attention {
                for row in heads.iter().flat_map(|head| head.rows()) {
                    prop_assert!(close(row.sum(), 1.0), "a row of attention sums to {}", row.sum());
                }
            }
            for ((of_layer, block), acts) in
                trace.memory.iter().zip(&model.network.blocks).zip(&acts.blocks)
            {
                let network = &block.memory.as_ref().unwrap().memory;
                let acts = acts.memory.as_ref().unwrap();
                let width = network.width;
                let read = model.fetch(&acts.read, 0, tokens * width).unwrap();
                let projected = model.fetch(&acts.projected, 0, tokens * 3 * width).unwrap();
                let Span { offset, len } = network.initial;
                let initial = model.fetch(&model.values, offset, len).unwrap();
                let (recall, of_start) = of_layer.recall(&trace.segments);
                for query in 0..tokens {
                    let bounds = trace.segments.iter().skip(1);
                    let segment = bounds.take_while(|&&end| end <= query).count();
                    let writes = segment + usize::from(of_layer.order == Order::WriteThenRead);
                    let left = |slot: usize| -> f64 {
                        (0..writes).map(|s| of_layer.keep[[s, slot]]).product()
                    };
                    let shares: Vec<f64> = (0..network.slots)
                        .map(|slot| of_layer.address[[query, slot]] * left(slot))
                        .collect();
                    prop_assert!(close(of_start[query], shares.iter().sum()));
                    for column in 0..width {
                        let written: f64 = (0..tokens)
                            .map(|p| recall[[query, p]] * projected[p * 3 * width + 2 * width + column])
                            .sum();
                        let of_start = shares.iter().enumerate();
                        let of_start: f64 = of_start
                            .map(|(slot, share)| share * initial[slot * width + column])
                            .sum();
                        let wanted = read[query * width + column];
                        prop_assert!(
                            close(written + of_start, wanted),
                            "token {query}: {} read as {wanted}", written + of_start
                        );
                    }
                }
            }
        }
    }
}
