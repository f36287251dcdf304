//! The content-addressed memory.

use dtmem_reference::content_memory::{Addressing, ContentMemory, Erase, Order, Strength};

use super::{Arena, Run, numbers, random, staged};
use crate::backend::{
    Backend, In, Kind, METRICS, Memory, MemoryGradients, MemoryInputs, MemoryStart, Out,
};
use crate::bench::{Result, Scale};

pub(super) fn memory<'a, B: Backend<Element = f32>>(
    backend: &'a B,
    scale: &Scale,
    supervised: bool,
    backward: bool,
) -> Result<Run<'a>> {
    let (tokens, width, slots) = (scale.tokens(), scale.width, scale.slots);
    let mut arena = Arena::default();
    let memory = Memory {
        variant: ContentMemory {
            addressing: Addressing::Cosine,
            strength: Strength::Sigmoid,
            erase: Erase::Coupled,
            order: Order::ReadThenWrite,
            top_k: None,
            scale: 1.0 / (width as f64).sqrt(),
            epsilon: 1e-6,
        },
        slots,
        width,
        initial: arena.span(slots * width),
        strength_bias: Some(arena.span(1)),
        supervised,
        trainable: true,
    };
    let mut strength = backend.buffer(tokens, Kind::Activation)?;
    let positive: Vec<f32> = numbers(tokens, 1.0).iter().map(|x| 1.0 + x.abs()).collect();
    backend.upload(&positive, &mut strength, 0)?;
    let longest = scale.lengths.iter().copied().max().unwrap_or(0);
    let mut state = backend.memory_state(
        &memory,
        scale.sequences(),
        scale.segments(),
        longest.div_ceil(scale.segment_steps),
    )?;
    let mut metrics = backend.buffer(METRICS, Kind::Exact)?;
    let mut read = backend.buffer(tokens * width, Kind::Activation)?;
    let layer = Layer {
        backend,
        batch: staged(backend, scale)?,
        memory,
        parameters: random(backend, Kind::Parameter, arena.0, 1.0)?,
        keys: random(backend, Kind::Activation, tokens * 2 * width, 1.0)?,
        projected: random(backend, Kind::Activation, tokens * 3 * width, 1.0)?,
        strength,
    };
    if !backward {
        return Ok(Box::new(move || {
            layer.forward(&mut state, &mut read, &mut metrics)
        }));
    }
    layer.forward(&mut state, &mut read, &mut metrics)?;
    let grad_read = random(backend, Kind::Activation, tokens * width, 1.0)?;
    let mut grad_keys = backend.buffer(tokens * 2 * width, Kind::Activation)?;
    let mut grad_projected = backend.buffer(tokens * 3 * width, Kind::Activation)?;
    let mut grad_strength = backend.buffer(tokens, Kind::Activation)?;
    let mut states = backend.buffer(2 * scale.sequences() * slots * width, Kind::Activation)?;
    let mut gradients = random(backend, Kind::Exact, arena.0, 1.0)?;
    Ok(Box::new(move || {
        let input_gradients = MemoryGradients {
            keys: &mut grad_keys,
            value: Out::columns(&mut grad_projected, 3 * width, 2 * width),
            key_strength: Some(&mut grad_strength),
        };
        Ok(backend.memory_backward(
            &layer.batch,
            &layer.memory,
            &layer.parameters,
            layer.inputs(),
            &state,
            &grad_read,
            input_gradients,
            &mut states,
            &mut gradients,
        )?)
    }))
}

/// A block's memory layer, and what it gets.
struct Layer<'a, B: Backend> {
    backend: &'a B,
    batch: B::Batch,
    memory: Memory,
    parameters: B::Buffer,
    keys: B::Buffer,
    projected: B::Buffer,
    strength: B::Buffer,
}

impl<B: Backend> Layer<'_, B> {
    fn inputs(&self) -> MemoryInputs<'_, B::Buffer> {
        let width = self.memory.width;
        MemoryInputs {
            address_key: In::columns(&self.keys, 2 * width, 0),
            strength_key: In::columns(&self.keys, 2 * width, width),
            value: In::columns(&self.projected, 3 * width, 2 * width),
            key_strength: Some(&self.strength),
        }
    }

    fn forward(
        &self,
        state: &mut B::MemoryState,
        read: &mut B::Buffer,
        metrics: &mut B::Buffer,
    ) -> Result<()> {
        Ok(self.backend.memory(
            &self.batch,
            &self.memory,
            &self.parameters,
            MemoryStart::Learned,
            self.inputs(),
            state,
            read,
            metrics,
        )?)
    }
}
