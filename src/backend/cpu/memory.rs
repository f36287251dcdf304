//! The content-addressed memory on the CPU: one task per sequence, its segments one after another.

use dtmem_reference as reference;
use dtmem_reference::Scalar;
use dtmem_reference::content_memory::{Gradients, Inputs};
use ndarray::{ArrayView1, ArrayView2, ArrayViewMut1, ArrayViewMut2, Axis, s};

use super::{Cpu, columns, front, part};
use crate::backend::{Memory, MemoryInputs, Result};
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

    /// Sequences `from .. to`; `states` and `read` hold their segments and tokens only.
    pub(super) fn forward(
        &self,
        from: usize,
        to: usize,
        start: &(dyn Fn(usize) -> &'a [T] + Sync),
        states: &mut [T],
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
            let (read, read_right) =
                read.split_at(Axis(0), self.tokens(split) - self.tokens(first));
            let (left, right) = rayon::join(
                || self.forward(from, middle, start, states, read),
                || self.forward(middle, to, start, states_right, read_right),
            );
            return left.and(right);
        }
        let mut scratch = self.backend.scratch();
        let mut memory = start(from);
        let mut states = states;
        let mut read = read;
        for segment in first..last {
            let (next, rest) = std::mem::take(&mut states).split_at_mut(self.state());
            states = rest;
            let (y, rest) = read.split_at(Axis(0), self.tokens(segment + 1) - self.tokens(segment));
            read = rest;
            let inputs = self.inputs(self.matrix(memory)?, segment);
            self.memory
                .variant
                .forward(inputs, self.matrix_mut(next)?, y, &mut scratch)?;
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
        states: &[T],
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
            let (states, states_right) = states.split_at((split - first) * self.state());
            let (grad_read, grad_read_right) = grad_read.split_at(Axis(0), rows);
            let (grad, grad_right) = grad.split(rows, (middle - from) * 2 * self.state());
            let (left, right) = rayon::join(
                || self.backward(from, middle, initial, states, grad_read, grad),
                || {
                    self.backward(
                        middle,
                        to,
                        initial,
                        states_right,
                        grad_read_right,
                        grad_right,
                    )
                },
            );
            return Ok(left? + right?);
        }
        let mut scratch = self.backend.scratch();
        let mut bias = T::zero();
        let (mut grad_memory, mut grad_next) = grad.states.split_at_mut(self.state());
        grad_memory.fill(T::zero());
        for segment in (first..last).rev() {
            std::mem::swap(&mut grad_memory, &mut grad_next);
            let index = segment - first;
            let memory = match index.checked_sub(1) {
                Some(index) => &states[index * self.state()..][..self.state()],
                None => initial,
            };
            let rows = self.tokens(segment) - self.tokens(first)
                ..self.tokens(segment + 1) - self.tokens(first);
            let mut strength_bias = T::zero();
            let gradients = Gradients {
                memory: self.matrix_mut(grad_memory)?,
                address_key: grad.address_key.slice_mut(s![rows.clone(), ..]),
                strength_key: grad.strength_key.slice_mut(s![rows.clone(), ..]),
                value: grad.value.slice_mut(s![rows.clone(), ..]),
                key_strength: grad
                    .key_strength
                    .as_mut()
                    .map(|x| x.slice_mut(s![rows.clone()])),
                strength_bias: &mut strength_bias,
            };
            self.memory.variant.backward(
                self.inputs(self.matrix(memory)?, segment),
                self.matrix(grad_next)?,
                grad_read.slice(s![rows.clone(), ..]),
                gradients,
                &mut scratch,
            )?;
            bias += strength_bias;
        }
        // After an odd number of swaps the result stands in the second half.
        if (last - first) % 2 == 1 {
            grad_next.copy_from_slice(grad_memory);
        }
        Ok(bias)
    }
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
