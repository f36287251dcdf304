//! The memory over the segments of each sequence, one after another: see [`Chain`](chain::Chain).

use std::ops::Range;
use std::sync::atomic::Ordering;

use super::Gpu;
use super::batch::Batch;
use super::buffers::Buffer;
use super::chain::{self, Link};
use super::device::{Compute, Device};
use super::linear::extent;
use crate::backend::{
    BackendError, Buffers, In, Kind, Memory, MemoryGradients, MemoryInputs, MemoryOps, MemoryStart,
    Metric, Out, Result, Span, range,
};
use crate::ops::content_memory::{Backward, Forward, Inputs, Shape};
use crate::ops::elementwise::{self, BiasGradient};
use crate::ops::recall::{Columns, Loss, LossShape, Widen, WidenShape};
use crate::ops::{Input, Output, tokens};

/// What a memory layer keeps for its backward pass. Both grow to what a batch needs whose recalled
/// tokens have columns in the memory.
#[derive(Debug)]
pub struct MemoryState<D: Device, T: Compute> {
    /// See [`Chain`](chain::Chain).
    memories: Buffer<D, T>,
    /// Gradient of the recall, in the order of segments.
    recall: Buffer<D, T>,
}

/// How wide the rows of a memory are in a batch.
#[derive(Debug, Clone, Copy)]
struct Widths {
    /// D, of keys and of what the model reads.
    model: usize,
    /// C, carried along for the recalled tokens of the batch: 0 where there are none.
    columns: usize,
}

impl Widths {
    /// D + C, of slots and values.
    fn slot(self) -> usize {
        self.model + self.columns
    }

    /// Numbers of a memory.
    fn state(self, memory: &Memory) -> usize {
        memory.slots * self.slot()
    }

    /// Places of a, s, v and κ of so many tokens.
    fn of_inputs(self, tokens: usize) -> [Range<usize>; 4] {
        in_turn([self.model, self.model, self.slot(), 1].map(|width| tokens * width))
    }
}

/// The inputs of a memory, in the order of segments.
struct Packed<'a, T> {
    address_key: Input<'a, T>,
    strength_key: Input<'a, T>,
    value: Input<'a, T>,
    key_strength: Option<Input<'a, T>>,
}

impl<D: Device, T: Compute> MemoryOps for Gpu<D, T> {
    type MemoryState = MemoryState<D, T>;

    fn memory_state(
        &self,
        memory: &Memory,
        sequences: usize,
        segments: usize,
        links: usize,
    ) -> Result<Self::MemoryState> {
        let memories = chain::memories(sequences, segments, links);
        let numbers = memories * memory.slots * memory.width;
        Ok(MemoryState {
            memories: self.buffer(numbers, Kind::Activation)?,
            recall: self.buffer(0, Kind::Activation)?,
        })
    }

    fn memory(
        &self,
        batch: &Self::Batch,
        memory: &Memory,
        parameters: &Self::Buffer,
        start: MemoryStart<Self::Buffer>,
        inputs: MemoryInputs<Self::Buffer>,
        kept: &mut Self::MemoryState,
        read: &mut Self::Buffer,
        metrics: &mut Self::Buffer,
    ) -> Result<()> {
        let _range = range("memory");
        let device = &self.device;
        let chain = &batch.chain;
        let widths = self.widths(batch, memory);
        let (tokens, state) = (batch.tokens, widths.state(memory));
        self.grow(&mut kept.memories, chain.memories() * state)?;
        self.start_chain(batch, memory, parameters, start, widths, &mut kept.memories)?;

        let slot = widths.slot();
        let [.., inputs_end] = widths.of_inputs(tokens);
        let places = in_turn([inputs_end.end, tokens * slot]);
        let mut packed = self.activations.lock(device, places[1].end)?;
        if chain.filled {
            packed.zero(device, places[1].clone())?;
        }
        let [packed, mut packed_read] = packed.output(device)?.parts(places)?;
        let packed = self.gather_inputs(batch, widths, &inputs, packed)?;
        for (index, link) in chain.links.iter().enumerate() {
            let shape = self.link_shape(batch, link, memory, widths);
            let [before, after] = [0, 1].map(|next| chain.groups[index + next] * state);
            let len = link.sequences * state;
            let [before, after] = kept
                .memories
                .write(device, 0..chain.memories() * state)?
                .parts([before..before + len, after..after + len])?;
            let before = before.as_input();
            let mut workspace = self.floats.lock(device, shape.forward_workspace::<T>()?)?;
            let tensors = Forward {
                inputs: self
                    .link_inputs(batch, link, memory, widths, parameters, &packed, before)?,
                memory_next: after,
                read: packed_read.reborrow(),
                workspace: workspace.output(device)?,
            };
            shape.forward_by(self.version, device, tensors)?;
        }
        if widths.columns == 0 {
            let read = Out::rows(read, widths.model);
            return self.scatter(batch, (packed_read.as_input(), slot), widths.model, read);
        }
        self.grow(&mut kept.recall, tokens * widths.columns)?;
        let shape = LossShape {
            tokens,
            width: widths.model,
            columns: widths.columns,
        };
        let mut workspace = self.floats.lock(device, shape.workspace()?)?;
        let [_, weight] = batch.weights(device)?;
        let loss = Metric::MemoryLoss as usize;
        let tensors = Loss {
            y: packed_read.as_input(),
            to: batch.ints(device, &batch.int.chain_tokens)?,
            earlier: batch.ints(device, &batch.int.recall_earlier)?,
            wanted: batch.ints(device, &batch.int.recall_wanted)?,
            weight,
            read: read
                .write(device, 0..tokens * widths.model)?
                .rows(widths.model),
            gradient: kept.recall.write(device, 0..tokens * widths.columns)?,
            loss: metrics.write_exact(device, loss..loss + 1)?,
            workspace: workspace.output(device)?,
        };
        Ok(shape.loss_and_gradient(device, tensors)?)
    }

    fn memory_backward(
        &self,
        batch: &Self::Batch,
        memory: &Memory,
        parameters: &Self::Buffer,
        inputs: MemoryInputs<Self::Buffer>,
        kept: &Self::MemoryState,
        grad_read: &Self::Buffer,
        input_gradients: MemoryGradients<Self::Buffer>,
        grad_states: &mut Self::Buffer,
        gradients: &mut Self::Buffer,
    ) -> Result<()> {
        let _range = range("memory_backward");
        let device = &self.device;
        let chain = &batch.chain;
        let widths = self.widths(batch, memory);
        let (width, slot, state) = (widths.model, widths.slot(), widths.state(memory));
        let tokens = batch.tokens;
        let sequences = chain.links.first().map_or(0, |link| link.sequences);
        self.grow(grad_states, 2 * sequences * state)?;
        let [.., inputs_end] = widths.of_inputs(tokens);
        let places = in_turn([inputs_end.end, tokens * slot, inputs_end.end]);
        let mut packed = self.activations.lock(device, places[2].end)?;
        if chain.filled {
            packed.zero(device, places[2].clone())?;
        }
        let [packed, mut packed_grad_read, packed_gradients] =
            packed.output(device)?.parts(places)?;
        let packed = self.gather_inputs(batch, widths, &inputs, packed)?;
        let of_recall = kept.recall.read(device, 0..tokens * widths.columns)?;
        self.gather_wide(
            batch,
            In::rows(grad_read, width),
            widths,
            Columns::Given(of_recall),
            packed_grad_read.reborrow(),
        )?;
        let packed_grad_read = packed_grad_read.as_input();
        let [
            mut address_gradient,
            mut strength_key_gradient,
            mut value_gradient,
            mut strength_gradient,
        ] = packed_gradients.parts(widths.of_inputs(tokens))?;

        // The gradients of the memories after and before a link change places from link to link. They
        // stay 0 for memories that no later segment has read.
        let places = [0, sequences * state];
        self.zero(
            grad_states,
            Span {
                offset: 0,
                len: 2 * sequences * state,
            },
        )?;
        let mut after = 0;
        for (index, link) in chain.links.iter().enumerate().rev() {
            let shape = self.link_shape(batch, link, memory, widths);
            let len = link.sequences * state;
            let [grad_after, d_memory] = grad_states
                .write(device, 0..2 * sequences * state)?
                .parts([places[after], places[1 - after]].map(|start| start..start + len))?;
            let partial = shape.backward_workspace()?;
            let mut workspace = self.floats.lock(device, partial + 1)?;
            workspace.zero(device, partial..partial + 1)?;
            let [workspace, unused] = workspace
                .output(device)?
                .parts([0..partial, partial..partial + 1])?;
            let before = chain.groups[index] * state;
            let before = kept.memories.read(device, before..before + len)?;
            let tensors = Backward {
                inputs: self
                    .link_inputs(batch, link, memory, widths, parameters, &packed, before)?,
                grad_memory_next: grad_after.as_input(),
                grad_read: packed_grad_read.part(0..tokens * slot)?,
                d_memory,
                d_address_key: address_gradient.reborrow().rows(width),
                d_strength_key: strength_key_gradient.reborrow().rows(width),
                d_value: value_gradient.reborrow().rows(slot),
                d_key_strength: packed
                    .key_strength
                    .as_ref()
                    .map(|_| strength_gradient.reborrow()),
                d_strength_bias: match memory.strength_bias {
                    Some(span) if memory.trainable => {
                        Some(gradients.write_exact(device, span.range())?)
                    }
                    Some(_) => Some(unused),
                    None => None,
                },
                workspace,
            };
            shape.backward_by(self.version, device, tensors)?;
            after = 1 - after;
        }
        let MemoryGradients {
            keys,
            value,
            key_strength,
        } = input_gradients;
        for (x, start) in [(address_gradient, 0), (strength_key_gradient, width)] {
            let to = Out::columns(&mut *keys, 2 * width, start);
            self.scatter(batch, (x.as_input(), width), width, to)?;
        }
        self.scatter(batch, (value_gradient.as_input(), slot), width, value)?;
        if let Some(out) = key_strength {
            let to = Out::rows(out, 1);
            self.scatter(batch, (strength_gradient.as_input(), 1), 1, to)?;
        }
        if !memory.trainable || sequences == 0 {
            return Ok(());
        }
        // Σ over the sequences of what has reached their first memories.
        let ends = [places[after], places[1 - after]].map(|start| start..start + sequences * state);
        let [mut first, free] = grad_states
            .write(device, 0..2 * sequences * state)?
            .parts(ends)?;
        if widths.columns > 0 {
            // Without what was carried along, of which there is no parameter.
            let rows = sequences * memory.slots;
            let mut narrow = free.slice(0..rows * width)?;
            self.copy_rows(
                [rows; 3],
                width,
                (first.as_input(), slot),
                None,
                None,
                (narrow.reborrow(), width),
            )?;
            first = narrow;
        }
        let shape = elementwise::Shape {
            rows: sequences,
            width: memory.slots * width,
        };
        let mut workspace = self.floats.lock(device, shape.workspace()?)?;
        let tensors = elementwise::Backward {
            activation: None,
            dropout: None,
            dy: first.as_input().rows(memory.slots * width),
            dx: None,
            bias: Some(BiasGradient {
                dbias: gradients.write_exact(device, memory.initial.range())?,
                workspace: workspace.output(device)?,
            }),
        };
        Ok(shape.backward(device, tensors)?)
    }

    fn commit_memory(
        &self,
        batch: &Self::Batch,
        memory: &Memory,
        kept: &Self::MemoryState,
        to: &mut Self::Buffer,
    ) -> Result<()> {
        let _range = range("commit_memory");
        let device = &self.device;
        let state = memory.slots * memory.width;
        let acting = batch.acting()?;
        let [from, rows_to] = [&acting.last, &acting.rows].map(|at| batch.ints(device, at));
        let count = acting.rows.len();
        let (memories, rows) = (batch.chain.memories(), to.len / state);
        self.copy_rows(
            [count, memories, rows],
            state,
            (kept.memories.read(device, 0..memories * state)?, state),
            Some(from?),
            Some(rows_to?),
            (to.write(device, 0..rows * state)?, state),
        )
    }
}

impl<D: Device, T: Compute> Gpu<D, T> {
    fn widths(&self, batch: &Batch<D, T>, memory: &Memory) -> Widths {
        Widths {
            model: memory.width,
            columns: match memory.supervised {
                true => batch.recalled.columns,
                false => 0,
            },
        }
    }

    fn link_shape(
        &self,
        batch: &Batch<D, T>,
        link: &Link,
        memory: &Memory,
        widths: Widths,
    ) -> Shape {
        Shape {
            sequences: link.sequences,
            tokens: batch.tokens,
            longest: link.longest,
            slots: memory.slots,
            key_width: widths.model,
            width: widths.slot(),
            variant: memory.variant,
        }
    }

    /// Another buffer in the place of one that is too small; its content is lost.
    fn grow(&self, buffer: &mut Buffer<D, T>, len: usize) -> Result<()> {
        if buffer.len < len {
            *buffer = Buffer::new(self, len.next_power_of_two(), Kind::Activation)?;
            self.grown.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
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
        let range = extent(tokens, width, x.stride, x.start);
        self.copy_rows(
            [tokens; 3],
            width,
            (x.buffer.read(device, range)?, x.stride),
            Some(batch.ints(device, &batch.int.chain_tokens)?),
            None,
            (y, width),
        )
    }

    /// As [`Self::gather`], with the columns that are carried along behind those of the buffer.
    fn gather_wide(
        &self,
        batch: &Batch<D, T>,
        x: In<'_, Buffer<D, T>>,
        widths: Widths,
        columns: Columns<'_, T>,
        y: Output<'_, T>,
    ) -> Result<()> {
        let (device, width) = (&self.device, widths.model);
        if widths.columns == 0 {
            return self.gather(batch, x, width, y);
        }
        let range = extent(batch.tokens, width, x.stride, x.start);
        let shape = WidenShape {
            rows: batch.tokens,
            group: 1,
            sources: batch.tokens,
            width,
            columns: widths.columns,
        };
        let [x] = x
            .buffer
            .read(device, range)?
            .rows(x.stride)
            .columns([width]);
        let from = batch.ints(device, &batch.int.chain_tokens)?;
        let tensors = Widen {
            x,
            from,
            columns,
            y,
        };
        Ok(shape.widen(device, tensors)?)
    }

    /// The inverse of [`Self::gather`], of the first columns of rows every `stride` elements.
    fn scatter(
        &self,
        batch: &Batch<D, T>,
        (x, stride): (Input<'_, T>, usize),
        width: usize,
        y: Out<'_, Buffer<D, T>>,
    ) -> Result<()> {
        let device = &self.device;
        let tokens = batch.tokens;
        let range = extent(tokens, width, y.stride, y.start);
        self.copy_rows(
            [tokens; 3],
            width,
            (x, stride),
            None,
            Some(batch.ints(device, &batch.int.chain_tokens)?),
            (y.buffer.write(device, range)?, y.stride),
        )
    }

    /// a, s, v and κ in the order of segments, where [`Widths::of_inputs`] says. In the columns that are carried along,
    /// the value of a recalled token is 1 in its own.
    fn gather_inputs<'a>(
        &self,
        batch: &Batch<D, T>,
        widths: Widths,
        inputs: &MemoryInputs<'_, Buffer<D, T>>,
        packed: Output<'a, T>,
    ) -> Result<Packed<'a, T>> {
        let width = widths.model;
        let [
            mut address_key,
            mut strength_key,
            mut value,
            mut key_strength,
        ] = packed.parts(widths.of_inputs(batch.tokens))?;
        self.gather(batch, inputs.address_key, width, address_key.reborrow())?;
        self.gather(batch, inputs.strength_key, width, strength_key.reborrow())?;
        let own = batch.ints(&self.device, &batch.int.recall_own)?;
        let columns = Columns::OneHot(own);
        self.gather_wide(batch, inputs.value, widths, columns, value.reborrow())?;
        if let Some(strength) = inputs.key_strength {
            let to = key_strength.reborrow();
            self.gather(batch, In::rows(strength, 1), 1, to)?;
        }
        Ok(Packed {
            address_key: address_key.into_input(),
            strength_key: strength_key.into_input(),
            value: value.into_input(),
            key_strength: inputs
                .key_strength
                .is_some()
                .then(|| key_strength.into_input()),
        })
    }

    /// What the kernels read of one link.
    fn link_inputs<'a>(
        &'a self,
        batch: &'a Batch<D, T>,
        link: &Link,
        memory: &Memory,
        widths: Widths,
        parameters: &'a Buffer<D, T>,
        packed: &Packed<'a, T>,
        before: Input<'a, T>,
    ) -> Result<Inputs<'a, T>> {
        let device = &self.device;
        let rows = |x: &Input<'a, T>, width: usize| {
            let all = x.part(0..batch.tokens * width)?;
            Ok::<_, BackendError>(all.rows(width))
        };
        let offsets = batch.int.chain_offsets.start + link.offsets.start;
        Ok(Inputs {
            memory: before,
            address_key: rows(&packed.address_key, widths.model)?,
            strength_key: rows(&packed.strength_key, widths.model)?,
            value: rows(&packed.value, widths.slot())?,
            key_strength: match &packed.key_strength {
                Some(strength) => Some(strength.part(0..batch.tokens)?),
                None => None,
            },
            strength_bias: match memory.strength_bias {
                Some(span) => Some(parameters.read_exact(device, span.range())?),
                None => None,
            },
            cu_seqlens: batch.ints(device, &(offsets..offsets + link.offsets.len()))?,
        })
    }

    /// The memories that the sequences start with. What is carried along starts at 0.
    fn start_chain(
        &self,
        batch: &Batch<D, T>,
        memory: &Memory,
        parameters: &Buffer<D, T>,
        start: MemoryStart<'_, Buffer<D, T>>,
        widths: Widths,
        memories: &mut Buffer<D, T>,
    ) -> Result<()> {
        let device = &self.device;
        let (sequences, state) = (batch.chain.starts, memory.slots * memory.width);
        let (x, sources, from) = match start {
            MemoryStart::Learned => (
                parameters.read(device, memory.initial.range())?,
                1,
                batch.ints(device, &batch.int.zeros)?.slice(0..sequences)?,
            ),
            MemoryStart::State(buffer) => (
                buffer.read(device, 0..buffer.len)?,
                buffer.len / state,
                batch.ints(device, &batch.acting()?.starts)?,
            ),
        };
        let y = memories.write(device, 0..sequences * widths.state(memory))?;
        if widths.columns == 0 {
            let rows = [sequences, sources, sequences];
            return self.copy_rows(rows, state, (x, state), Some(from), None, (y, state));
        }
        let shape = WidenShape {
            rows: sequences * memory.slots,
            group: memory.slots,
            sources,
            width: widths.model,
            columns: widths.columns,
        };
        let tensors = Widen {
            x: x.rows(widths.model),
            from,
            columns: Columns::Zeros,
            y,
        };
        Ok(shape.widen(device, tensors)?)
    }
}

/// Places of so many elements, one behind the other, each aligned for vectors.
fn in_turn<const N: usize>(lens: [usize; N]) -> [Range<usize>; N] {
    const ALIGNMENT: usize = 8;
    let mut end = 0;
    lens.map(|len| {
        let start = end;
        end = (start + len).next_multiple_of(ALIGNMENT);
        start..start + len
    })
}
