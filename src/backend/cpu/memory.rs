//! The content-addressed memory on the CPU: one task per sequence, its segments one after another.

use dtmem_reference as reference;
use dtmem_reference::Scalar;
use dtmem_reference::attention::Pairs;
use dtmem_reference::content_memory::{Gradients, Inputs};
use dtmem_reference::recall::recall_loss;
use ndarray::{Array2, ArrayView1, ArrayView2, ArrayViewMut1, ArrayViewMut2, Axis, concatenate, s};
use rayon::prelude::*;

use super::views::{
    columns, columns_mut, front, front_mut, matrix, matrix_mut, named, part, part_mut,
};
use super::{Cpu, ELEMENTS};
use crate::backend::{
    BackendError, Buffers, Kind, METRICS, Memory, MemoryGradients, MemoryInputs, MemoryOps,
    MemoryStart, Metric, Result, Span,
};
use crate::batch::PackedBatch;

/// The rows of a memory call, and the chain over the segments of each sequence.
pub(super) struct Chains<'a, T> {
    backend: &'a Cpu<T>,
    memory: &'a Memory,
    batch: &'a PackedBatch,
    address_key: ArrayView2<'a, T>,
    strength_key: ArrayView2<'a, T>,
    value: ArrayView2<'a, T>,
    key_strength: Option<ArrayView1<'a, T>>,
    strength_bias: T,
}

/// What a supervised memory layer keeps of one sequence with C recalled tokens.
#[derive(Debug, Clone, Default)]
pub struct Recall<T> {
    /// Recalled tokens, relative to the start of the sequence, ascending.
    tokens: Vec<i32>,
    /// The memory's columns for them, after each segment [segments, N, C].
    traces: Vec<T>,
    /// Gradient of what is read in them [tokens, C].
    gradient: Vec<T>,
    /// Numerator of the loss.
    pub(super) loss: f64,
}

/// The memory after each segment [segments, N·D], and the sequences' recall.
#[derive(Debug, Default)]
pub struct MemoryState<T> {
    pub(super) states: Vec<T>,
    pub(super) recalls: Vec<Recall<T>>,
}

impl<'a, T: Scalar> Chains<'a, T> {
    pub(super) fn new(
        backend: &'a Cpu<T>,
        memory: &'a Memory,
        batch: &'a PackedBatch,
        parameters: &'a [T],
        inputs: MemoryInputs<'a, Vec<T>>,
    ) -> Result<Self> {
        let (rows, width) = (batch.tokens(), memory.width);
        Ok(Self {
            backend,
            memory,
            batch,
            address_key: columns("memory", inputs.address_key, rows, width)?,
            strength_key: columns("memory", inputs.strength_key, rows, width)?,
            value: columns("memory", inputs.value, rows, width)?,
            key_strength: match inputs.key_strength {
                Some(buffer) => Some(ArrayView1::from(front("memory", buffer, rows)?)),
                None => None,
            },
            strength_bias: match memory.strength_bias {
                Some(span) => part("memory", parameters, span)?[0],
                None => T::zero(),
            },
        })
    }

    fn state(&self) -> usize {
        self.memory.slots * self.memory.width
    }

    fn matrix<'s>(&self, state: &'s [T]) -> reference::Result<ArrayView2<'s, T>> {
        ArrayView2::from_shape((self.memory.slots, self.memory.width), state)
            .map_err(|_| reference::Error::value("state", state.len(), self.state()))
    }

    fn matrix_mut<'s>(&self, state: &'s mut [T]) -> reference::Result<ArrayViewMut2<'s, T>> {
        let found = state.len();
        ArrayViewMut2::from_shape((self.memory.slots, self.memory.width), state)
            .map_err(|_| reference::Error::value("state", found, self.state()))
    }

    /// First and last segment of sequences `from .. to`, first and last token of segments.
    fn segments(&self, sequence: usize) -> usize {
        self.batch.sequence_segments[sequence] as usize
    }

    fn tokens(&self, segment: usize) -> usize {
        self.batch.segment_offsets[segment] as usize
    }

    fn inputs<'s>(&'s self, memory: ArrayView2<'s, T>, segment: usize) -> Inputs<'s, T> {
        let rows = s![self.tokens(segment)..self.tokens(segment + 1), ..];
        Inputs {
            memory,
            address_key: self.address_key.slice(rows),
            strength_key: self.strength_key.slice(rows),
            value: self.value.slice(rows),
            key_strength: self
                .key_strength
                .as_ref()
                .map(|x| x.slice(s![self.tokens(segment)..self.tokens(segment + 1)])),
            strength_bias: self.strength_bias,
        }
    }

    /// Starts the recall of a sequence: finds the tokens that later segments recall.
    fn start_recall(&self, sequence: usize, recall: &mut Recall<T>) {
        recall.tokens.clear();
        recall.traces.clear();
        recall.gradient.clear();
        recall.loss = 0.0;
        if !self.memory.supervised {
            return;
        }
        self.batch.recalled_tokens(sequence, &mut recall.tokens);
        let len = self.batch.tokens_of(sequence).len() * recall.tokens.len();
        recall.gradient.resize(len, T::zero());
    }

    /// Memory and values of segment number `index` of a sequence, with a column for every recalled
    /// token: [N, D + C] and [T, D + C].
    fn traced(
        &self,
        memory: &[T],
        recall: &Recall<T>,
        segment: usize,
        index: usize,
        start: usize,
    ) -> reference::Result<[Array2<T>; 2]> {
        let (slots, width, columns) = (self.memory.slots, self.memory.width, recall.tokens.len());
        let rows = self.tokens(segment)..self.tokens(segment + 1);
        let mut traced = Array2::zeros((slots, width + columns));
        traced
            .slice_mut(s![.., ..width])
            .assign(&self.matrix(memory)?);
        if let Some(before) = index.checked_sub(1) {
            let traces = recall.traces[before * slots * columns..].iter();
            let to = traced.slice_mut(s![.., width..]);
            to.into_iter().zip(traces).for_each(|(to, &x)| *to = x);
        }
        let mut values = Array2::zeros((rows.len(), width + columns));
        values
            .slice_mut(s![.., ..width])
            .assign(&self.value.slice(s![rows.clone(), ..]));
        for (column, &token) in recall.tokens.iter().enumerate() {
            let token = start + token as usize;
            if rows.contains(&token) {
                values[[token - rows.start, width + column]] = T::one();
            }
        }
        Ok([traced, values])
    }

    /// One segment with its recall: the memory after it, the reads and the loss.
    fn traced_forward(
        &self,
        [memory, values]: [Array2<T>; 2],
        recall: &mut Recall<T>,
        segment: usize,
        start: usize,
        next: &mut [T],
        mut read: ArrayViewMut2<T>,
        scratch: &mut Vec<T>,
    ) -> reference::Result<()> {
        let (width, columns) = (self.memory.width, recall.tokens.len());
        let rows = self.tokens(segment)..self.tokens(segment + 1);
        let inputs = Inputs {
            value: values.view(),
            ..self.inputs(memory.view(), segment)
        };
        let mut traced_next = Array2::zeros(memory.dim());
        let mut traced_read = Array2::zeros(values.dim());
        let outputs = (traced_next.view_mut(), traced_read.view_mut());
        self.memory
            .variant
            .forward(inputs, outputs.0, outputs.1, scratch)?;
        self.matrix_mut(next)?
            .assign(&traced_next.slice(s![.., ..width]));
        read.assign(&traced_read.slice(s![.., ..width]));
        recall.traces.extend(traced_next.slice(s![.., width..]));
        let gradient = &mut recall.gradient[(rows.start - start) * columns..];
        let gradient = &mut gradient[..rows.len() * columns];
        recall.loss += recall_loss(
            traced_read.slice(s![.., width..]),
            &recall.tokens,
            (rows.start - start) as i32,
            Pairs {
                offsets: &self.batch.pair_offsets[rows.start..=rows.end],
                keys: &self.batch.pair_keys,
            },
            self.batch.training.weights.pair,
            ArrayViewMut2::from_shape((rows.len(), columns), gradient)
                .expect("a slice of this very size"),
        )?;
        Ok(())
    }

    /// Sequences `from .. to`; `states`, `recalls` and `read` hold their segments, sequences and
    /// tokens only.
    pub(super) fn forward(
        &self,
        from: usize,
        to: usize,
        start: &(dyn Fn(usize) -> &'a [T] + Sync),
        states: &mut [T],
        recalls: &mut [Recall<T>],
        read: ArrayViewMut2<T>,
    ) -> reference::Result<()> {
        if from == to {
            return Ok(());
        }
        let (first, last) = (self.segments(from), self.segments(to));
        if to - from > 1 {
            let middle = from.midpoint(to);
            let split = self.segments(middle);
            let (states, states_right) = states.split_at_mut((split - first) * self.state());
            let (recalls, recalls_right) = recalls.split_at_mut(middle - from);
            let (read, read_right) =
                read.split_at(Axis(0), self.tokens(split) - self.tokens(first));
            let (left, right) = rayon::join(
                || self.forward(from, middle, start, states, recalls, read),
                || self.forward(middle, to, start, states_right, recalls_right, read_right),
            );
            return left.and(right);
        }
        let mut scratch = self.backend.scratch();
        let recall = &mut recalls[0];
        self.start_recall(from, recall);
        let first_token = self.tokens(first);
        let mut memory = start(from);
        let mut states = states;
        let mut read = read;
        for segment in first..last {
            let (next, rest) = std::mem::take(&mut states).split_at_mut(self.state());
            states = rest;
            let (y, rest) = read.split_at(Axis(0), self.tokens(segment + 1) - self.tokens(segment));
            read = rest;
            if recall.tokens.is_empty() {
                let inputs = self.inputs(self.matrix(memory)?, segment);
                let next = self.matrix_mut(next)?;
                self.memory.variant.forward(inputs, next, y, &mut scratch)?;
            } else {
                let traced = self.traced(memory, recall, segment, segment - first, first_token)?;
                self.traced_forward(traced, recall, segment, first_token, next, y, &mut scratch)?;
            }
            memory = next;
        }
        Ok(())
    }

    /// Sequences `from .. to`. Returns the gradient of the strength bias; that of the start is left
    /// in the first half of each sequence's `grad_states`.
    pub(super) fn backward(
        &self,
        from: usize,
        to: usize,
        initial: &[T],
        kept: Kept<T>,
        grad_read: ArrayView2<T>,
        mut grad: ChainGradients<T>,
    ) -> reference::Result<T> {
        if from == to {
            return Ok(T::zero());
        }
        let (first, last) = (self.segments(from), self.segments(to));
        if to - from > 1 {
            let middle = from.midpoint(to);
            let split = self.segments(middle);
            let rows = self.tokens(split) - self.tokens(first);
            let (states, states_right) = kept.states.split_at((split - first) * self.state());
            let (recalls, recalls_right) = kept.recalls.split_at(middle - from);
            let (grad_read, grad_read_right) = grad_read.split_at(Axis(0), rows);
            let (grad, grad_right) = grad.split(rows, (middle - from) * 2 * self.state());
            let left = Kept { states, recalls };
            let right = Kept {
                states: states_right,
                recalls: recalls_right,
            };
            let (left, right) = rayon::join(
                || self.backward(from, middle, initial, left, grad_read, grad),
                || self.backward(middle, to, initial, right, grad_read_right, grad_right),
            );
            return Ok(left? + right?);
        }
        let mut scratch = self.backend.scratch();
        let recall = &kept.recalls[0];
        let columns = recall.tokens.len();
        let (slots, width) = (self.memory.slots, self.memory.width);
        let mut bias = T::zero();
        let mut grad_traces = Array2::zeros((slots, columns));
        let (mut grad_memory, mut grad_next) = grad.states.split_at_mut(self.state());
        grad_memory.fill(T::zero());
        for segment in (first..last).rev() {
            std::mem::swap(&mut grad_memory, &mut grad_next);
            let index = segment - first;
            let memory = match index.checked_sub(1) {
                Some(index) => &kept.states[index * self.state()..][..self.state()],
                None => initial,
            };
            let rows = self.tokens(segment) - self.tokens(first)
                ..self.tokens(segment + 1) - self.tokens(first);
            let mut strength_bias = T::zero();
            let mut value = grad.value.slice_mut(s![rows.clone(), ..]);
            let grad_read = grad_read.slice(s![rows.clone(), ..]);
            let gradients = Gradients {
                memory: self.matrix_mut(grad_memory)?,
                address_key: grad.address_key.slice_mut(s![rows.clone(), ..]),
                strength_key: grad.strength_key.slice_mut(s![rows.clone(), ..]),
                value: value.view_mut(),
                key_strength: grad
                    .key_strength
                    .as_mut()
                    .map(|x| x.slice_mut(s![rows.clone()])),
                strength_bias: &mut strength_bias,
            };
            let variant = &self.memory.variant;
            if columns == 0 {
                let inputs = self.inputs(self.matrix(memory)?, segment);
                let grad_next = self.matrix(grad_next)?;
                variant.backward(inputs, grad_next, grad_read, gradients, &mut scratch)?;
            } else {
                let [memory, values] =
                    self.traced(memory, recall, segment, index, self.tokens(first))?;
                let of_recall = &recall.gradient[rows.start * columns..rows.end * columns];
                let of_recall = ArrayView2::from_shape((rows.len(), columns), of_recall)
                    .expect("a slice of this very size");
                let grad_read = concatenate![Axis(1), grad_read, of_recall];
                let grad_next = concatenate![Axis(1), self.matrix(grad_next)?, grad_traces];
                let mut traced_memory = Array2::zeros(memory.dim());
                let mut traced_values = Array2::zeros(values.dim());
                let gradients = Gradients {
                    memory: traced_memory.view_mut(),
                    value: traced_values.view_mut(),
                    ..gradients
                };
                let inputs = Inputs {
                    value: values.view(),
                    ..self.inputs(memory.view(), segment)
                };
                let (next, read) = (grad_next.view(), grad_read.view());
                variant.backward(inputs, next, read, gradients, &mut scratch)?;
                self.matrix_mut(grad_memory)?
                    .assign(&traced_memory.slice(s![.., ..width]));
                value.assign(&traced_values.slice(s![.., ..width]));
                grad_traces.assign(&traced_memory.slice(s![.., width..]));
            }
            bias += strength_bias;
        }
        // After an odd number of swaps the result stands in the second half.
        if (last - first) % 2 == 1 {
            grad_next.copy_from_slice(grad_memory);
        }
        Ok(bias)
    }
}

/// What the forward pass of some chains kept.
#[derive(Debug, Clone, Copy)]
pub(super) struct Kept<'a, T> {
    pub(super) states: &'a [T],
    pub(super) recalls: &'a [Recall<T>],
}

/// What the backward pass of some chains writes.
pub(super) struct ChainGradients<'a, T> {
    pub(super) address_key: ArrayViewMut2<'a, T>,
    pub(super) strength_key: ArrayViewMut2<'a, T>,
    pub(super) value: ArrayViewMut2<'a, T>,
    pub(super) key_strength: Option<ArrayViewMut1<'a, T>>,
    /// [2·sequences, N·D]: two states for each sequence.
    pub(super) states: &'a mut [T],
}

impl<T> ChainGradients<'_, T> {
    fn split(self, rows: usize, states: usize) -> (Self, Self) {
        let (address_key, address_key_right) = self.address_key.split_at(Axis(0), rows);
        let (strength_key, strength_key_right) = self.strength_key.split_at(Axis(0), rows);
        let (value, value_right) = self.value.split_at(Axis(0), rows);
        let (key_strength, key_strength_right) =
            match self.key_strength.map(|x| x.split_at(Axis(0), rows)) {
                Some((left, right)) => (Some(left), Some(right)),
                None => (None, None),
            };
        let (states, states_right) = self.states.split_at_mut(states);
        (
            Self {
                address_key,
                strength_key,
                value,
                key_strength,
                states,
            },
            Self {
                address_key: address_key_right,
                strength_key: strength_key_right,
                value: value_right,
                key_strength: key_strength_right,
                states: states_right,
            },
        )
    }
}

impl<T: Scalar> MemoryOps for Cpu<T> {
    type MemoryState = MemoryState<T>;

    fn memory_state(
        &self,
        memory: &Memory,
        sequences: usize,
        segments: usize,
        _links: usize,
    ) -> Result<MemoryState<T>> {
        Ok(MemoryState {
            states: self.buffer(segments * memory.slots * memory.width, Kind::Exact)?,
            recalls: vec![Recall::default(); sequences],
        })
    }

    fn memory(
        &self,
        batch: &PackedBatch,
        memory: &Memory,
        parameters: &Vec<T>,
        start: MemoryStart<Vec<T>>,
        inputs: MemoryInputs<Vec<T>>,
        kept: &mut MemoryState<T>,
        read: &mut Vec<T>,
        metrics: &mut Vec<T>,
    ) -> Result<()> {
        const NAME: &str = "memory";
        let chains = Chains::new(self, memory, batch, parameters, inputs)?;
        let state = memory.slots * memory.width;
        let states = front_mut(NAME, &mut kept.states, batch.segments() * state)?;
        let read = matrix_mut(NAME, read, batch.tokens(), memory.width)?;
        let sequences = batch.sequences();
        let recalls = &mut kept.recalls[..sequences];
        let forward = match start {
            MemoryStart::Learned => {
                let initial = part(NAME, parameters, memory.initial)?;
                chains.forward(0, sequences, &|_| initial, states, recalls, read)
            }
            MemoryStart::State(buffer) => {
                let acting = batch.acting.as_ref().ok_or(BackendError::NotActing)?;
                let buffer = front(NAME, buffer, acting.rows * state)?;
                let start = |sequence: usize| &buffer[acting.episodes[sequence] * state..][..state];
                chains.forward(0, sequences, &start, states, recalls, read)
            }
        };
        named(NAME, forward)?;
        if memory.supervised {
            let metrics = front_mut(NAME, metrics, METRICS)?;
            let loss = kept.recalls[..sequences].iter().map(|x| x.loss).sum();
            metrics[Metric::MemoryLoss as usize] = T::from_f64(loss);
        }
        Ok(())
    }

    fn memory_backward(
        &self,
        batch: &PackedBatch,
        memory: &Memory,
        parameters: &Vec<T>,
        inputs: MemoryInputs<Vec<T>>,
        kept: &MemoryState<T>,
        grad_read: &Vec<T>,
        input_gradients: MemoryGradients<Vec<T>>,
        grad_states: &mut Vec<T>,
        gradients: &mut Vec<T>,
    ) -> Result<()> {
        const NAME: &str = "memory_backward";
        let (tokens, width, sequences) = (batch.tokens(), memory.width, batch.sequences());
        let state = memory.slots * width;
        let chains = Chains::new(self, memory, batch, parameters, inputs)?;
        let keys = matrix_mut(NAME, input_gradients.keys, tokens, 2 * width)?;
        let (address_key, strength_key) = keys.split_at(Axis(1), width);
        let value = columns_mut(NAME, input_gradients.value, tokens, width)?;
        let key_strength = match input_gradients.key_strength {
            Some(buffer) => Some(ArrayViewMut1::from(front_mut(NAME, buffer, tokens)?)),
            None => None,
        };
        let grad_states = front_mut(NAME, grad_states, 2 * sequences * state)?;
        let initial = part(NAME, parameters, memory.initial)?;
        let kept = Kept {
            states: front(NAME, &kept.states, batch.segments() * state)?,
            recalls: &kept.recalls[..sequences],
        };
        let grad_read = matrix(NAME, grad_read, tokens, width)?;
        let chain_gradients = ChainGradients {
            address_key,
            strength_key,
            value,
            key_strength,
            states: &mut *grad_states,
        };
        let bias = named(
            NAME,
            chains.backward(0, sequences, initial, kept, grad_read, chain_gradients),
        )?;
        if !memory.trainable {
            return Ok(());
        }
        if let Some(span) = memory.strength_bias {
            part_mut(NAME, gradients, span)?[0] += bias;
        }
        part_mut(NAME, gradients, memory.initial)?
            .par_chunks_mut(ELEMENTS)
            .enumerate()
            .for_each(|(index, sum)| {
                for of_sequence in grad_states.chunks(2 * state) {
                    let piece = &of_sequence[index * ELEMENTS..][..sum.len()];
                    for (sum, &x) in sum.iter_mut().zip(piece) {
                        *sum += x;
                    }
                }
            });
        Ok(())
    }

    fn commit_memory(
        &self,
        batch: &PackedBatch,
        memory: &Memory,
        kept: &MemoryState<T>,
        to: &mut Vec<T>,
    ) -> Result<()> {
        const NAME: &str = "commit_memory";
        let len = memory.slots * memory.width;
        let acting = batch.acting.as_ref().ok_or(BackendError::NotActing)?;
        for (sequence, &episode) in acting.episodes.iter().enumerate() {
            let [first, end] = [0, 1].map(|next| batch.sequence_segments[sequence + next] as usize);
            if first == end {
                continue;
            }
            let row = |index: usize| Span {
                offset: index * len,
                len,
            };
            part_mut(NAME, to, row(episode))?.copy_from_slice(part(
                NAME,
                &kept.states,
                row(end - 1),
            )?);
        }
        Ok(())
    }
}
