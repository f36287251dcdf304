//! The memory over the segments of each sequence.
//!
//! The kernels take one segment of several sequences that lie one after another. So tokens are
//! brought into the order of their segments, sequences with more segments first: then those that
//! go on after a segment are the first of those that had it, and so are their memories.

use std::cmp::Reverse;
use std::ops::Range;

use super::device::{Compute, Device};
use super::memory::{Batch, Buffer};
use super::{Gpu, elementwise, tokens};
use crate::backend::{
    BackendError, In, Memory, MemoryGradients, MemoryInputs, MemoryStart, Out, Result, Span,
};
use crate::ops::content_memory::{Backward, Forward, Inputs, Shape};
use crate::ops::elementwise::BiasGradient;
use crate::ops::{Input, Output};

/// Which tokens and sequences each segment has.
///
/// Memories stand in groups: first those that the sequences start with, then those after the first
/// segment, and so on; in each group in the order of `order`.
#[derive(Debug, Default)]
pub(super) struct Chain {
    /// Sequences, those with more segments first.
    order: Vec<usize>,
    /// Tokens in the order of their segments.
    pub tokens: Vec<i32>,
    links: Vec<Link>,
    /// First memory of each group [links + 1].
    groups: Vec<usize>,
    /// Offsets of the sequences in each link, one link after another.
    pub offsets: Vec<i32>,
}

/// One segment of those sequences that have so many.
#[derive(Debug)]
struct Link {
    sequences: usize,
    tokens: Range<usize>,
    longest: usize,
    /// Among the chain's offsets.
    offsets: Range<usize>,
}

impl Chain {
    /// From the segments of each sequence and the tokens of each segment.
    pub fn new(sequence_segments: &[i32], segment_offsets: &[i32]) -> Self {
        let count = |sequence: usize| {
            (sequence_segments[sequence + 1] - sequence_segments[sequence]) as usize
        };
        let mut chain = Self {
            order: (0..sequence_segments.len().saturating_sub(1)).collect(),
            groups: vec![0],
            ..Self::default()
        };
        chain
            .order
            .sort_by_key(|&sequence| Reverse(count(sequence)));
        let most = chain.order.first().map_or(0, |&sequence| count(sequence));
        let mut memories = chain.order.len();
        for index in 0..most {
            let having = chain
                .order
                .partition_point(|&sequence| count(sequence) > index);
            let (first, first_offset) = (chain.tokens.len(), chain.offsets.len());
            let mut longest = 0;
            chain.offsets.push(0);
            for &sequence in &chain.order[..having] {
                let segment = sequence_segments[sequence] as usize + index;
                let tokens = segment_offsets[segment]..segment_offsets[segment + 1];
                longest = longest.max(tokens.len());
                chain.tokens.extend(tokens);
                chain.offsets.push((chain.tokens.len() - first) as i32);
            }
            chain.links.push(Link {
                sequences: having,
                tokens: first..chain.tokens.len(),
                longest,
                offsets: first_offset..chain.offsets.len(),
            });
            chain.groups.push(memories);
            memories += having;
        }
        chain
    }

    /// Number of memories of all groups.
    fn memories(&self) -> usize {
        let after: usize = self.links.iter().map(|link| link.sequences).sum();
        self.order.len() + after
    }

    /// The last memory of each sequence, in the order of the batch.
    fn last(&self) -> Vec<i32> {
        let mut last = vec![0; self.order.len()];
        for (place, &sequence) in self.order.iter().enumerate() {
            let group = self.links.partition_point(|link| link.sequences > place);
            last[sequence] = (self.groups[group] + place) as i32;
        }
        last
    }
}

impl<D: Device, T: Compute> Gpu<D, T> {
    fn link_shape(&self, link: &Link, memory: &Memory) -> Shape {
        Shape {
            sequences: link.sequences,
            tokens: link.tokens.len(),
            longest: link.longest,
            slots: memory.slots,
            key_width: memory.width,
            width: memory.width,
            variant: memory.variant,
        }
    }

    /// Rows `from` of x, or rows of x into rows `to` of y.
    fn copy_rows(
        &self,
        [rows, x_rows, y_rows]: [usize; 3],
        width: usize,
        x: (Input<'_, T>, usize),
        from: Option<Input<'_, i32>>,
        to: Option<Input<'_, i32>>,
        y: (Output<'_, T>, usize),
    ) -> Result<()> {
        let shape = tokens::CopyShape {
            rows,
            width,
            x_rows,
            y_rows,
        };
        let [x] = x.0.rows(x.1).columns([width]);
        let [y] = y.0.rows(y.1).columns([width]);
        Ok(shape.copy(&self.device, tokens::Copy { x, from, to, y })?)
    }

    /// Columns of a buffer, brought into the order of segments.
    fn gather(
        &self,
        batch: &Batch<D, T>,
        x: In<'_, Buffer<D, T>>,
        width: usize,
        y: Output<'_, T>,
    ) -> Result<()> {
        let device = &self.device;
        let tokens = batch.tokens;
        let range = super::products::extent(tokens, width, x.stride, x.start);
        self.copy_rows(
            [tokens; 3],
            width,
            (x.buffer.read(device, range)?, x.stride),
            Some(batch.ints(device, &batch.int.chain_tokens)?),
            None,
            (y, width),
        )
    }

    /// The inverse of [`Self::gather`].
    fn scatter(
        &self,
        batch: &Batch<D, T>,
        x: Input<'_, T>,
        width: usize,
        y: Out<'_, Buffer<D, T>>,
    ) -> Result<()> {
        let device = &self.device;
        let tokens = batch.tokens;
        let range = super::products::extent(tokens, width, y.stride, y.start);
        self.copy_rows(
            [tokens; 3],
            width,
            (x, width),
            None,
            Some(batch.ints(device, &batch.int.chain_tokens)?),
            (y.buffer.write(device, range)?, y.stride),
        )
    }

    /// a, s and v, one after another, and κ, in the order of segments.
    fn gather_inputs(
        &self,
        batch: &Batch<D, T>,
        width: usize,
        inputs: &MemoryInputs<'_, Buffer<D, T>>,
        packed: Output<'_, T>,
        key_strength: Output<'_, T>,
    ) -> Result<()> {
        let size = batch.tokens * width;
        let [address, strength, value] =
            packed.parts([0..size, size..2 * size, 2 * size..3 * size])?;
        self.gather(batch, inputs.address_key, width, address)?;
        self.gather(batch, inputs.strength_key, width, strength)?;
        self.gather(batch, inputs.value, width, value)?;
        match inputs.key_strength {
            Some(strength) => self.gather(batch, In::rows(strength, 1), 1, key_strength),
            None => Ok(()),
        }
    }

    /// What the kernels read of one link.
    fn link_inputs<'a>(
        &'a self,
        batch: &'a Batch<D, T>,
        link: &Link,
        memory: &Memory,
        parameters: &'a Buffer<D, T>,
        packed: &Input<'a, T>,
        key_strength: Option<&Input<'a, T>>,
        before: Input<'a, T>,
    ) -> Result<Inputs<'a, T>> {
        let device = &self.device;
        let width = memory.width;
        let size = batch.tokens * width;
        let part = |index: usize| {
            let start = index * size + link.tokens.start * width;
            packed.part(start..start + link.tokens.len() * width)
        };
        let offsets = batch.int.chain_offsets.start + link.offsets.start;
        Ok(Inputs {
            memory: before,
            address_key: part(0)?.rows(width),
            strength_key: part(1)?.rows(width),
            value: part(2)?.rows(width),
            key_strength: match key_strength {
                Some(strength) => Some(strength.part(link.tokens.clone())?),
                None => None,
            },
            strength_bias: match memory.strength_bias {
                Some(span) => Some(parameters.read_exact(device, span.range())?),
                None => None,
            },
            cu_seqlens: batch.ints(device, &(offsets..offsets + link.offsets.len()))?,
        })
    }

    pub(super) fn chain_forward(
        &self,
        batch: &Batch<D, T>,
        memory: &Memory,
        parameters: &Buffer<D, T>,
        start: MemoryStart<'_, Buffer<D, T>>,
        inputs: MemoryInputs<'_, Buffer<D, T>>,
        states: &mut Buffer<D, T>,
        read: &mut Buffer<D, T>,
    ) -> Result<()> {
        let device = &self.device;
        let chain = &batch.chain;
        let (width, state) = (memory.width, memory.slots * memory.width);
        let sequences = chain.order.len();
        // Where each sequence starts.
        match start {
            MemoryStart::Learned => self.copy_rows(
                [sequences, 1, sequences],
                state,
                (parameters.read(device, memory.initial.range())?, state),
                Some(batch.ints(device, &batch.int.zeros)?),
                None,
                (states.write(device, 0..sequences * state)?, state),
            )?,
            MemoryStart::State(buffer, slots) => {
                let slots = chain.order.iter().map(|&sequence| slots[sequence] as i32);
                let slots: Vec<i32> = slots.collect();
                let mut slots = self.indices.upload(device, &slots)?;
                self.copy_rows(
                    [sequences, buffer.len / state, sequences],
                    state,
                    (buffer.read(device, 0..buffer.len)?, state),
                    Some(slots.output(device)?.as_input()),
                    None,
                    (states.write(device, 0..sequences * state)?, state),
                )?;
            }
        }

        let size = batch.tokens * width;
        let mut packed = self.activations.lock(device, 4 * size + batch.tokens)?;
        let [mut packed, mut packed_read, mut strength] = packed.output(device)?.parts([
            0..3 * size,
            3 * size..4 * size,
            4 * size..4 * size + batch.tokens,
        ])?;
        self.gather_inputs(
            batch,
            width,
            &inputs,
            packed.reborrow(),
            strength.reborrow(),
        )?;
        let (packed, strength) = (packed.as_input(), strength.as_input());
        let strength = inputs.key_strength.is_some().then_some(&strength);
        for (index, link) in chain.links.iter().enumerate() {
            let shape = self.link_shape(link, memory);
            let [before, after] = [0, 1].map(|next| chain.groups[index + next] * state);
            let len = link.sequences * state;
            let [before, after] = states
                .write(device, 0..chain.memories() * state)?
                .parts([before..before + len, after..after + len])?;
            let mut workspace = self.floats.lock(device, shape.forward_workspace::<T>()?)?;
            let tensors = Forward {
                inputs: self.link_inputs(
                    batch,
                    link,
                    memory,
                    parameters,
                    &packed,
                    strength,
                    before.as_input(),
                )?,
                memory_next: after,
                read: packed_read
                    .reborrow()
                    .slice(link.tokens.start * width..link.tokens.end * width)?,
                workspace: workspace.output(device)?,
            };
            shape.forward(device, tensors)?;
        }
        self.scatter(batch, packed_read.as_input(), width, Out::rows(read, width))
    }

    pub(super) fn chain_backward(
        &self,
        batch: &Batch<D, T>,
        memory: &Memory,
        parameters: &Buffer<D, T>,
        inputs: MemoryInputs<'_, Buffer<D, T>>,
        states: &Buffer<D, T>,
        grad_read: &Buffer<D, T>,
        input_gradients: MemoryGradients<'_, Buffer<D, T>>,
        grad_states: &mut Buffer<D, T>,
        gradients: &mut Buffer<D, T>,
    ) -> Result<()> {
        let device = &self.device;
        let chain = &batch.chain;
        let (width, state) = (memory.width, memory.slots * memory.width);
        let (tokens, size) = (batch.tokens, batch.tokens * memory.width);
        let sequences = chain.order.len();
        let mut packed = self.activations.lock(device, 7 * size + 2 * tokens)?;
        let strengths = 7 * size;
        let [
            mut packed,
            mut packed_grad_read,
            mut packed_gradients,
            mut strength,
            mut strength_gradient,
        ] = packed.output(device)?.parts([
            0..3 * size,
            3 * size..4 * size,
            4 * size..7 * size,
            strengths..strengths + tokens,
            strengths + tokens..strengths + 2 * tokens,
        ])?;
        self.gather_inputs(
            batch,
            width,
            &inputs,
            packed.reborrow(),
            strength.reborrow(),
        )?;
        self.gather(
            batch,
            In::rows(grad_read, width),
            width,
            packed_grad_read.reborrow(),
        )?;
        let (packed, packed_grad_read) = (packed.as_input(), packed_grad_read.as_input());
        let strength = strength.as_input();
        let key_strength = inputs.key_strength.is_some().then_some(&strength);

        // The gradients of the memories after and before a link change places from link to link.
        let places = [0, sequences * state];
        let mut after = 0;
        let mut known = 0;
        for (index, link) in chain.links.iter().enumerate().rev() {
            let shape = self.link_shape(link, memory);
            let len = link.sequences * state;
            // Of memories that no later segment has read.
            let fresh = Span {
                offset: places[after] + known * state,
                len: (link.sequences - known) * state,
            };
            self.clear(grad_states, fresh)?;
            let [grad_after, d_memory] = grad_states
                .write(device, 0..2 * sequences * state)?
                .parts([places[after], places[1 - after]].map(|start| start..start + len))?;
            let partial = shape.backward_workspace()?;
            let mut workspace = self.floats.lock(device, partial + 1)?;
            workspace.zero(device, partial..partial + 1)?;
            let [workspace, unused] = workspace
                .output(device)?
                .parts([0..partial, partial..partial + 1])?;
            let of_link = |part: usize| {
                let start = part * size + link.tokens.start * width;
                start..start + link.tokens.len() * width
            };
            let [address, strength, value] =
                packed_gradients
                    .reborrow()
                    .parts([of_link(0), of_link(1), of_link(2)])?;
            let d_key_strength = match key_strength {
                Some(_) => Some(strength_gradient.reborrow().slice(link.tokens.clone())?),
                None => None,
            };
            let before = chain.groups[index] * state;
            let tensors = Backward {
                inputs: self.link_inputs(
                    batch,
                    link,
                    memory,
                    parameters,
                    &packed,
                    key_strength,
                    states.read(device, before..before + len)?,
                )?,
                grad_memory_next: grad_after.as_input(),
                grad_read: packed_grad_read
                    .part(link.tokens.start * width..link.tokens.end * width)?,
                d_memory,
                d_address_key: address.rows(width),
                d_strength_key: strength.rows(width),
                d_value: value.rows(width),
                d_key_strength,
                d_strength_bias: match memory.strength_bias {
                    Some(span) if memory.trainable => {
                        Some(gradients.write_exact(device, span.range())?)
                    }
                    Some(_) => Some(unused),
                    None => None,
                },
                workspace,
            };
            shape.backward(device, tensors)?;
            known = link.sequences;
            after = 1 - after;
        }
        let packed_gradients = packed_gradients.as_input();
        let part = |index: usize| packed_gradients.part(index * size..(index + 1) * size);
        let MemoryGradients {
            keys,
            value,
            key_strength,
        } = input_gradients;
        self.scatter(batch, part(0)?, width, Out::columns(keys, 2 * width, 0))?;
        self.scatter(batch, part(1)?, width, Out::columns(keys, 2 * width, width))?;
        self.scatter(batch, part(2)?, width, value)?;
        if let Some(out) = key_strength {
            self.scatter(batch, strength_gradient.as_input(), 1, Out::rows(out, 1))?;
        }
        if !memory.trainable || known == 0 {
            return Ok(());
        }
        // Σ over the sequences of what has reached their first memories.
        let shape = elementwise::Shape {
            rows: known,
            width: state,
        };
        let mut workspace = self.floats.lock(device, shape.workspace()?)?;
        let tensors = elementwise::Backward {
            activation: None,
            dropout: None,
            dy: grad_states
                .read(device, places[after]..places[after] + known * state)?
                .rows(state),
            dx: None,
            bias: Some(BiasGradient {
                dbias: gradients.write_exact(device, memory.initial.range())?,
                workspace: workspace.output(device)?,
            }),
        };
        Ok(shape.backward(device, tensors)?)
    }

    pub(super) fn chain_commit(
        &self,
        batch: &Batch<D, T>,
        memory: &Memory,
        states: &Buffer<D, T>,
        slots: &[usize],
        to: &mut Buffer<D, T>,
    ) -> Result<()> {
        let device = &self.device;
        let state = memory.slots * memory.width;
        let count = slots.len();
        let mut from = batch.chain.last();
        from.extend(slots.iter().map(|&slot| slot as i32));
        let mut indices = self.indices.upload(device, &from)?;
        let [from, slots] = indices
            .output(device)?
            .parts([0..count, count..2 * count])?;
        let (memories, rows) = (batch.chain.memories(), to.len / state);
        self.copy_rows(
            [count, memories, rows],
            state,
            (states.read(device, 0..memories * state)?, state),
            Some(from.as_input()),
            Some(slots.as_input()),
            (to.write(device, 0..rows * state)?, state),
        )
    }

    fn clear(&self, buffer: &mut Buffer<D, T>, span: Span) -> Result<()> {
        let memory = buffer.compute.as_mut().ok_or(BackendError::Kind)?;
        Ok(self.device.zero(memory, span.range())?)
    }
}
