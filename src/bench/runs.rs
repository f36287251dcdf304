//! Runs of each operation on inputs of its own.

use std::cell::RefCell;

use dtmem_reference::attention::Denominator;
use dtmem_reference::content_memory::{Addressing, ContentMemory, Erase, Order, Strength};
use dtmem_reference::convolution::Grid;
use dtmem_reference::dropout::{Mask, philox};

use super::operations::{
    ACTIONS, CACHED, CARDINALITIES, CELLS, CHANNELS, FIELDS, MAPS, MIDDLE, RANK, TAPS, VIEW,
};
use super::{Operation, Result, Scale};
use crate::backend::{
    Activation, AdamW, Adapter, Attention, Backend, Codes, Convolutions, Dropped, Extent,
    FIRST_LOSS_SCALE, In, KeyValueCache, Kind, LayerNorm, Linear, METRICS, Memory, MemoryGradients,
    MemoryInputs, MemoryStart, OneHot, Out, Positions, Span, Supervised, Trained,
};
use crate::batch::{LossWeights, PackedBatch, Packer, TrainingStep, Trajectory};
use crate::spaces::{ActionSpace, Family, ObservationSpace};

/// One run of a case on its own inputs.
pub(super) type Run<'a> = Box<dyn FnMut() -> Result<()> + 'a>;

/// Of weights and adapters, which is no operation of a backend: models merge once, on the host.
pub(super) trait Merges: Backend<Element = f32> {
    /// A square weight of this width.
    fn merge(&self, width: usize) -> Result<Run<'_>>;
}

/// Numbers of unit variance, again and again from another place.
pub(super) fn numbers(len: usize, factor: f32) -> Vec<f32> {
    const BLOCK: usize = (1 << 16) + 1; // no power of two, so that rows differ
    thread_local! {
        static DRAWN: RefCell<(Vec<f32>, usize)> = const { RefCell::new((Vec::new(), 0)) };
    }
    DRAWN.with_borrow_mut(|(drawn, next)| {
        if drawn.is_empty() {
            drawn.extend((0..BLOCK).map(|index| {
                let unit = philox([index as u32, 0, 0, 0], [17, 19])[0] as f32 / u32::MAX as f32;
                (2.0 * unit - 1.0) * 3.0_f32.sqrt()
            }));
        }
        let start = *next % BLOCK;
        *next += len;
        (0..len)
            .map(|index| factor * drawn[(start + index) % BLOCK])
            .collect()
    })
}

pub(super) fn random<B: Backend<Element = f32>>(
    backend: &B,
    kind: Kind,
    len: usize,
    factor: f32,
) -> Result<B::Buffer> {
    let mut buffer = backend.buffer(len, kind)?;
    backend.upload(&numbers(len, factor), &mut buffer, 0)?;
    Ok(buffer)
}

/// What LTMB's tasks observe and do.
pub(super) fn family() -> Family {
    Family {
        observation: ObservationSpace::codes(VIEW, CARDINALITIES),
        action: ActionSpace::Discrete(ACTIONS),
    }
}

/// Random trajectories of a scale.
pub(super) fn batch(scale: &Scale, mut packer: Packer) -> Result<PackedBatch> {
    for sequence in 0..scale.sequences() {
        let steps = scale.lengths[sequence % scale.lengths.len()];
        let draw = |index: usize, limit: usize| {
            (philox([index as u32, sequence as u32, 0, 0], [3, 5])[0] as usize % limit) as u8
        };
        let observations: Vec<u8> = (0..steps * FIELDS)
            .map(|index| draw(index, CARDINALITIES[index % CARDINALITIES.len()]))
            .collect();
        let actions: Vec<u8> = (0..steps).map(|step| draw(step, ACTIONS)).collect();
        let pairs: Vec<(u32, u32)> = (0..steps as u32)
            .flat_map(|step| {
                let earlier = (step > 2 && step % 4 == 0).then_some((step, 1));
                earlier.into_iter().chain([(step, step)])
            })
            .collect();
        packer.push_trajectory(Trajectory {
            family: 0,
            observations: (&observations).into(),
            actions: (&actions).into(),
            returns: &vec![1.0; steps],
            pairs: &pairs,
            annotated: true,
        })?;
    }
    let mut batch = packer.batch().clone();
    batch.training = TrainingStep {
        number: 1,
        weights: LossWeights {
            action: 1.0 / scale.steps() as f64,
            pair: 10.0 / scale.visible() as f64,
        },
        optimiser: Some(AdamW {
            learning_rate: 1e-4,
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-8,
            weight_decay: 1e-4,
            gradient_scale: 1.0,
            step: 100,
        }),
    };
    Ok(batch)
}

fn packer(scale: &Scale) -> Packer {
    Packer::new(scale.layout, &[family()], Some(scale.segment_steps))
}

fn staged<B: Backend>(backend: &B, scale: &Scale) -> Result<B::Batch> {
    let mut to = B::Batch::default();
    backend.stage(&batch(scale, packer(scale))?, &mut to)?;
    Ok(to)
}

/// Parts of a parameter buffer, each at a multiple of 64 numbers.
#[derive(Default)]
struct Arena(usize);

impl Arena {
    fn span(&mut self, len: usize) -> Span {
        let offset = self.0.next_multiple_of(64);
        self.0 = offset + len;
        Span { offset, len }
    }
}

/// Inputs for an operation, and what runs it on them once.
pub(super) fn prepare<'a, B: Merges>(
    backend: &'a B,
    operation: Operation,
    scale: &Scale,
) -> Result<Run<'a>> {
    match operation {
        Operation::Attention => attention(backend, scale, false, false),
        Operation::AttentionBackward => attention(backend, scale, false, true),
        Operation::AttentionBce => attention(backend, scale, true, false),
        Operation::AttentionBceBackward => attention(backend, scale, true, true),
        Operation::AttentionCached => attention_cached(backend, scale),
        Operation::ContentMemory => memory(backend, scale, false, false),
        Operation::ContentMemoryBackward => memory(backend, scale, false, true),
        Operation::ContentMemoryRecall => memory(backend, scale, true, false),
        Operation::ContentMemoryRecallBackward => memory(backend, scale, true, true),
        Operation::Linear => linear(backend, scale, None, false),
        Operation::LoraLinear => linear(backend, scale, Some(Adapters::Plain), false),
        Operation::LoraLinearBackward => linear(backend, scale, Some(Adapters::Plain), true),
        Operation::LoraDropout => linear(backend, scale, Some(Adapters::Dropout), false),
        Operation::LoraDropoutBackward => linear(backend, scale, Some(Adapters::Dropout), true),
        Operation::LoraMerge => backend.merge(scale.width),
        Operation::LayerNorm => layer_norm(backend, scale, false),
        Operation::LayerNormBackward => layer_norm(backend, scale, true),
        Operation::OneHot => one_hot(backend, scale, false),
        Operation::OneHotBackward => one_hot(backend, scale, true),
        Operation::Convolutions => convolutions(backend, scale, false),
        Operation::ConvolutionsBackward => convolutions(backend, scale, true),
        Operation::Tokens => tokens(backend, scale, false),
        Operation::TokensBackward => tokens(backend, scale, true),
        Operation::CrossEntropy => cross_entropy(backend, scale),
        Operation::SquaredError => squared_error(backend, scale),
        Operation::Activation => activation(backend, scale, false),
        Operation::ActivationBackward => activation(backend, scale, true),
        Operation::Dropout => dropout(backend, scale),
        Operation::Add => add(backend, scale),
        // A step brings its own model: see `step`.
        Operation::Norm | Operation::AdamW | Operation::Step => update(backend, scale, operation),
    }
}

fn attention<'a, B: Backend<Element = f32>>(
    backend: &'a B,
    scale: &Scale,
    bce: bool,
    backward: bool,
) -> Result<Run<'a>> {
    let (tokens, width) = (scale.tokens(), scale.width);
    let attention = Attention {
        heads: scale.heads,
        head_width: width / scale.heads,
        extent: Extent::Sequence,
        supervised: bce.then(|| Supervised {
            heads: vec![0],
            denominator: Denominator::Square,
        }),
    };
    let batch = staged(backend, scale)?;
    let qkv = random(backend, Kind::Activation, tokens * 3 * width, 1.0)?;
    let mut out = backend.buffer(tokens * width, Kind::Activation)?;
    let mut state = backend.attention_state(&attention, tokens)?;
    let mut metrics = random(backend, Kind::Exact, METRICS, 1.0)?;
    if !backward {
        return Ok(Box::new(move || {
            let (out, metrics) = (&mut out, &mut metrics);
            Ok(backend.attention(&batch, &attention, &qkv, out, &mut state, metrics)?)
        }));
    }
    backend.attention(&batch, &attention, &qkv, &mut out, &mut state, &mut metrics)?;
    let grad_out = random(backend, Kind::Activation, tokens * width, 1.0)?;
    let mut grad_qkv = backend.buffer(tokens * 3 * width, Kind::Activation)?;
    Ok(Box::new(move || {
        let grad = &mut grad_qkv;
        Ok(backend.attention_backward(&batch, &attention, &qkv, &out, &state, &grad_out, grad)?)
    }))
}

/// The tokens of one step of each episode, behind those that are cached.
fn attention_cached<'a, B: Backend<Element = f32>>(
    backend: &'a B,
    scale: &Scale,
) -> Result<Run<'a>> {
    let (tokens, width, episodes) = (scale.tokens(), scale.width, scale.sequences());
    let attention = Attention {
        heads: scale.heads,
        head_width: width / scale.heads,
        extent: Extent::Sequence,
        supervised: None,
    };
    let batch = staged(backend, scale)?;
    let longest = scale.lengths.iter().max().copied().unwrap_or(0);
    let capacity = CACHED + longest * scale.layout.tokens_per_step();
    let cached = || random(backend, Kind::Activation, episodes * capacity * width, 1.0);
    let mut cache = KeyValueCache {
        keys: cached()?,
        values: cached()?,
        capacity,
    };
    let rows: Vec<usize> = (0..episodes).collect();
    let qkv = random(backend, Kind::Activation, tokens * 3 * width, 1.0)?;
    let mut out = backend.buffer(tokens * width, Kind::Activation)?;
    let mut state = backend.attention_state(&attention, tokens)?;
    Ok(Box::new(move || {
        let (out, state) = (&mut out, &mut state);
        Ok(backend.attention_cached(
            &batch, &attention, &qkv, &mut cache, &rows, CACHED, out, state,
        )?)
    }))
}

fn memory<'a, B: Backend<Element = f32>>(
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
    let batch = staged(backend, scale)?;
    let parameters = random(backend, Kind::Parameter, arena.0, 1.0)?;
    let keys = random(backend, Kind::Activation, tokens * 2 * width, 1.0)?;
    let projected = random(backend, Kind::Activation, tokens * 3 * width, 1.0)?;
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
    let (start, inputs) = (
        MemoryStart::Learned,
        memory_inputs(width, &keys, &projected, &strength),
    );
    backend.memory(
        &batch,
        &memory,
        &parameters,
        start,
        inputs,
        &mut state,
        &mut read,
        &mut metrics,
    )?;
    if !backward {
        return Ok(Box::new(move || {
            let inputs = memory_inputs(width, &keys, &projected, &strength);
            let (start, read) = (MemoryStart::Learned, &mut read);
            Ok(backend.memory(
                &batch,
                &memory,
                &parameters,
                start,
                inputs,
                &mut state,
                read,
                &mut metrics,
            )?)
        }));
    }
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
            &batch,
            &memory,
            &parameters,
            memory_inputs(width, &keys, &projected, &strength),
            &state,
            &grad_read,
            input_gradients,
            &mut states,
            &mut gradients,
        )?)
    }))
}

/// As a block's memory layer has them.
fn memory_inputs<'a, T>(
    width: usize,
    keys: &'a T,
    projected: &'a T,
    strength: &'a T,
) -> MemoryInputs<'a, T> {
    MemoryInputs {
        address_key: In::columns(keys, 2 * width, 0),
        strength_key: In::columns(keys, 2 * width, width),
        value: In::columns(projected, 3 * width, 2 * width),
        key_strength: Some(strength),
    }
}

/// How a linear map is adapted.
#[derive(Clone, Copy, PartialEq)]
enum Adapters {
    Plain,
    Dropout,
}

/// The feed-forward layer's first product, or three frozen projections with adapters.
fn linear<'a, B: Backend<Element = f32>>(
    backend: &'a B,
    scale: &Scale,
    adapters: Option<Adapters>,
    backward: bool,
) -> Result<Run<'a>> {
    let (rows, inputs) = (scale.tokens(), scale.width);
    let (outputs, projections) = match adapters {
        Some(_) => (3 * inputs, 3),
        None => (scale.feed_forward, 0),
    };
    let mut arena = Arena::default();
    let map = Linear {
        adapters: (0..projections)
            .map(|index| Adapter {
                output: index * inputs,
                outputs: inputs,
                a: arena.span(RANK * inputs),
                b: arena.span(inputs * RANK),
                rank: RANK,
                scaling: 2.0,
            })
            .collect(),
        weight: arena.span(inputs * outputs),
        bias: adapters.is_none().then(|| arena.span(outputs)),
        inputs,
        outputs,
        transposed: false,
        trainable: adapters.is_none(),
    };
    let batch = staged(backend, scale)?;
    let dropped = adapters == Some(Adapters::Dropout);
    let parameters = random(backend, Kind::Parameter, arena.0, 0.05)?;
    let x = random(backend, Kind::Activation, rows * inputs, 1.0)?;
    let mut adapted = random(backend, Kind::Activation, rows * map.ranks(), 1.0)?;
    let mut y = random(backend, Kind::Activation, rows * outputs, 1.0)?;
    if !backward {
        return Ok(Box::new(move || {
            let (x, y) = (In::rows(&x, inputs), Out::rows(&mut y, outputs));
            let dropout = dropped.then_some(drop_tenth(&batch));
            Ok(backend.linear(rows, &map, &parameters, x, &mut adapted, dropout, y)?)
        }));
    }
    let mut grad_x = backend.buffer(rows * inputs, Kind::Activation)?;
    let mut gradients = random(backend, Kind::Exact, arena.0, 1.0)?;
    Ok(Box::new(move || {
        Ok(backend.linear_backward(
            rows,
            &map,
            &parameters,
            In::rows(&x, inputs),
            &adapted,
            dropped.then_some(drop_tenth(&batch)),
            In::rows(&y, outputs),
            Some(Out::rows(&mut grad_x, inputs)),
            false,
            &mut gradients,
        )?)
    }))
}

fn layer_norm<'a, B: Backend<Element = f32>>(
    backend: &'a B,
    scale: &Scale,
    backward: bool,
) -> Result<Run<'a>> {
    let (rows, width) = (scale.tokens(), scale.width);
    let mut arena = Arena::default();
    let norm = LayerNorm {
        weight: arena.span(width),
        bias: arena.span(width),
        width,
        epsilon: 1e-5,
        trainable: true,
    };
    let parameters = random(backend, Kind::Parameter, arena.0, 1.0)?;
    let x = random(backend, Kind::Activation, rows * width, 1.0)?;
    let mut y = backend.buffer(rows * width, Kind::Activation)?;
    let mut statistics = backend.buffer(2 * rows, Kind::Exact)?;
    backend.layer_norm(rows, &norm, &parameters, &x, None, &mut y, &mut statistics)?;
    if !backward {
        return Ok(Box::new(move || {
            Ok(backend.layer_norm(rows, &norm, &parameters, &x, None, &mut y, &mut statistics)?)
        }));
    }
    let mut grad_x = backend.buffer(rows * width, Kind::Activation)?;
    let mut gradients = random(backend, Kind::Exact, arena.0, 1.0)?;
    Ok(Box::new(move || {
        Ok(backend.layer_norm_backward(
            rows,
            &norm,
            &parameters,
            &x,
            &statistics,
            &y,
            &mut grad_x,
            false,
            None,
            &mut gradients,
        )?)
    }))
}

fn one_hot<'a, B: Backend<Element = f32>>(
    backend: &'a B,
    scale: &Scale,
    backward: bool,
) -> Result<Run<'a>> {
    let width = scale.width;
    let mut arena = Arena::default();
    let first = [0, CARDINALITIES[0], CARDINALITIES[0] + CARDINALITIES[1]];
    let map = OneHot {
        weight: arena.span(CELLS * CHANNELS * width),
        bias: arena.span(width),
        offsets: (0..FIELDS)
            .map(|field| field / first.len() * CHANNELS + first[field % first.len()])
            .collect(),
        inputs: CELLS * CHANNELS,
        width,
        trainable: true,
    };
    let batch = staged(backend, scale)?;
    if backward {
        let grad_out = random(backend, Kind::Activation, scale.steps() * width, 1.0)?;
        let mut gradients = random(backend, Kind::Exact, arena.0, 1.0)?;
        return Ok(Box::new(move || {
            let (codes, to) = (Codes::Observations(0), &mut gradients);
            Ok(backend.one_hot_backward(&batch, codes, &map, &grad_out, to)?)
        }));
    }
    let parameters = random(backend, Kind::Parameter, arena.0, 0.05)?;
    let mut out = backend.buffer(scale.steps() * width, Kind::Activation)?;
    Ok(Box::new(move || {
        Ok(backend.one_hot(&batch, Codes::Observations(0), &map, &parameters, &mut out)?)
    }))
}

fn convolutions<'a, B: Backend<Element = f32>>(
    backend: &'a B,
    scale: &Scale,
    backward: bool,
) -> Result<Run<'a>> {
    let cells = scale.steps() * CELLS;
    let mut arena = Arena::default();
    let front_end = Convolutions {
        grid: Grid {
            width: VIEW[0],
            height: VIEW[1],
            cardinalities: CARDINALITIES.to_vec(),
        },
        weight1: arena.span(CHANNELS * TAPS * MIDDLE),
        bias1: arena.span(MIDDLE),
        weight2: arena.span(MAPS * MIDDLE * TAPS),
        bias2: arena.span(MAPS),
        middle: MIDDLE,
        out: MAPS,
        trainable: true,
    };
    let batch = staged(backend, scale)?;
    let parameters = random(backend, Kind::Parameter, arena.0, 0.05)?;
    let mut middle = backend.buffer(cells * MIDDLE, Kind::Activation)?;
    let mut out = backend.buffer(cells * MAPS, Kind::Activation)?;
    backend.convolutions(&batch, 0, &front_end, &parameters, &mut middle, &mut out)?;
    if !backward {
        return Ok(Box::new(move || {
            Ok(backend.convolutions(&batch, 0, &front_end, &parameters, &mut middle, &mut out)?)
        }));
    }
    let mut grad_out = random(backend, Kind::Activation, cells * MAPS, 1.0)?;
    let mut grad_middle = backend.buffer(cells * MIDDLE, Kind::Activation)?;
    let mut gradients = random(backend, Kind::Exact, arena.0, 1.0)?;
    Ok(Box::new(move || {
        Ok(backend.convolutions_backward(
            &batch,
            0,
            &front_end,
            &parameters,
            &middle,
            &out,
            &mut grad_out,
            &mut grad_middle,
            &mut gradients,
        )?)
    }))
}

fn cross_entropy<'a, B: Backend<Element = f32>>(backend: &'a B, scale: &Scale) -> Result<Run<'a>> {
    let len = scale.steps() * ACTIONS;
    let batch = staged(backend, scale)?;
    let logits = random(backend, Kind::Activation, len, 1.0)?;
    let mut grad = backend.buffer(len, Kind::Activation)?;
    let mut metrics = random(backend, Kind::Exact, METRICS, 1.0)?;
    Ok(Box::new(move || {
        Ok(backend.cross_entropy(&batch, 0, ACTIONS, &logits, &mut grad, &mut metrics)?)
    }))
}

/// Numbers in the place of the action codes.
fn squared_error<'a, B: Backend<Element = f32>>(backend: &'a B, scale: &Scale) -> Result<Run<'a>> {
    let len = scale.steps() * ACTIONS;
    let mut packed = batch(scale, packer(scale))?;
    packed.families[0].real_targets = 0..len;
    packed.real_targets = numbers(len, 1.0);
    let mut batch = B::Batch::default();
    backend.stage(&packed, &mut batch)?;
    let outputs = random(backend, Kind::Activation, len, 1.0)?;
    let mut grad = backend.buffer(len, Kind::Activation)?;
    let mut metrics = random(backend, Kind::Exact, METRICS, 1.0)?;
    Ok(Box::new(move || {
        Ok(backend.squared_error(&batch, 0, ACTIONS, &outputs, &mut grad, &mut metrics)?)
    }))
}

fn tokens<'a, B: Backend<Element = f32>>(
    backend: &'a B,
    scale: &Scale,
    backward: bool,
) -> Result<Run<'a>> {
    let (frames, tokens, width) = (scale.steps(), scale.tokens(), scale.width);
    let batch = staged(backend, scale)?;
    let embedded = || random(backend, Kind::Activation, frames * width, 1.0);
    let [mut observations, mut actions, mut returns] = [embedded()?, embedded()?, embedded()?];
    let mut arena = Arena::default();
    let longest = scale.lengths.iter().copied().max().unwrap_or(0);
    let positions = arena.span(longest * width);
    let mut out = random(backend, Kind::Activation, tokens * width, 1.0)?;
    if backward {
        let mut gradients = random(backend, Kind::Exact, arena.0, 1.0)?;
        return Ok(Box::new(move || {
            Ok(backend.assemble_tokens_backward(
                &batch,
                width,
                &out,
                &mut observations,
                &mut actions,
                &mut returns,
                Some(positions),
                &mut gradients,
            )?)
        }));
    }
    let table = random(backend, Kind::Parameter, arena.0, 1.0)?;
    Ok(Box::new(move || {
        Ok(backend.assemble_tokens(
            &batch,
            width,
            &observations,
            &actions,
            &returns,
            Positions::Learned(positions),
            &table,
            &mut out,
        )?)
    }))
}

fn activation<'a, B: Backend<Element = f32>>(
    backend: &'a B,
    scale: &Scale,
    backward: bool,
) -> Result<Run<'a>> {
    let len = scale.tokens() * scale.feed_forward;
    let x = random(backend, Kind::Activation, len, 1.0)?;
    let mut y = backend.buffer(len, Kind::Activation)?;
    backend.activation(Activation::Gelu, len, &x, &mut y)?;
    if !backward {
        return Ok(Box::new(move || {
            Ok(backend.activation(Activation::Gelu, len, &x, &mut y)?)
        }));
    }
    let mut grad = random(backend, Kind::Activation, len, 1.0)?;
    Ok(Box::new(move || {
        Ok(backend.activation_backward(Activation::Gelu, len, &x, &y, &mut grad)?)
    }))
}

fn dropout<'a, B: Backend<Element = f32>>(backend: &'a B, scale: &Scale) -> Result<Run<'a>> {
    let width = scale.width;
    let batch = staged(backend, scale)?;
    let mut x = random(backend, Kind::Activation, scale.tokens() * width, 1.0)?;
    Ok(Box::new(move || {
        Ok(backend.dropout(drop_tenth(&batch), width, None, &mut x)?)
    }))
}

fn drop_tenth<Batch>(batch: &Batch) -> Dropped<'_, Batch> {
    Dropped {
        mask: Mask {
            seed: 0,
            step: 1,
            site: 0,
            threshold: u32::MAX / 10,
        },
        batch,
    }
}

fn add<'a, B: Backend<Element = f32>>(backend: &'a B, scale: &Scale) -> Result<Run<'a>> {
    let (rows, width) = (scale.tokens(), scale.width);
    let [x, y] = [(); 2].map(|()| random(backend, Kind::Activation, rows * width, 1.0));
    let (x, y) = (x?, y?);
    let mut out = backend.buffer(rows * width, Kind::Activation)?;
    Ok(Box::new(move || {
        Ok(backend.add(rows, width, &x, &y, None, &mut out)?)
    }))
}

/// The norm of the gradients, or the update of the parameters of a scale's blocks.
fn update<'a, B: Backend<Element = f32>>(
    backend: &'a B,
    scale: &Scale,
    operation: Operation,
) -> Result<Run<'a>> {
    let len = scale.weights();
    let gradients = random(backend, Kind::Exact, len, 1e-3)?;
    let mut metrics = random(backend, Kind::Exact, METRICS, 1.0)?;
    let mut loss_scale = backend.buffer(FIRST_LOSS_SCALE.len(), Kind::Exact)?;
    backend.upload(&FIRST_LOSS_SCALE.map(|x| x as f32), &mut loss_scale, 0)?;
    backend.norm(len, &gradients, None, &mut loss_scale, &mut metrics)?;
    if operation == Operation::Norm {
        return Ok(Box::new(move || {
            Ok(backend.norm(len, &gradients, None, &mut loss_scale, &mut metrics)?)
        }));
    }
    let mut parameters = random(backend, Kind::Parameter, len, 0.05)?;
    let [mut first, mut second] = [
        random(backend, Kind::Exact, len, 1e-3)?,
        backend.buffer(len, Kind::Exact)?,
    ];
    let squares: Vec<f32> = numbers(len, 1e-3).iter().map(|x| x * x).collect();
    backend.upload(&squares, &mut second, 0)?;
    let batch = staged(backend, scale)?;
    let trained = Trained { len, decayed: len };
    Ok(Box::new(move || {
        Ok(backend.adamw(
            &batch,
            trained,
            &metrics,
            &gradients,
            &mut parameters,
            &mut first,
            &mut second,
        )?)
    }))
}

#[cfg(all(test, feature = "host"))]
mod tests {
    use half::bf16;

    use super::super::step::Step;
    use super::*;
    use crate::backend::gpu::{Gpu, HostDevice};
    use crate::batch::TokenLayout;

    /// On a GPU nobody is there to see that a case of the table is refused.
    #[test]
    fn every_operation_runs_on_the_gpu_backend() {
        let tiny = Scale {
            name: "paper",
            layout: TokenLayout::ObsAction,
            lengths: &[3, 2],
            repeats: 1,
            width: 32,
            heads: 2,
            feed_forward: 32,
            layers: 1,
            slots: 8,
            segment_steps: 2,
        };
        let dt_mem = Scale {
            layout: TokenLayout::ReturnObsAction,
            ..tiny
        };
        let backend = || Gpu::<HostDevice, bf16>::new(HostDevice::default());
        for scale in [tiny, dt_mem] {
            for operation in Operation::ALL {
                let cost = operation.cost(&scale, 2.0);
                assert!(cost.operations > 0.0 && cost.bytes > 0.0);
                let result = match operation {
                    Operation::Step => {
                        Step::new(backend(), &scale).and_then(|mut step| step.time(2).map(drop))
                    }
                    _ => prepare(&backend(), operation, &scale).and_then(|mut run| {
                        run()?;
                        run()
                    }),
                };
                result.unwrap_or_else(|error| panic!("{}: {error}", operation.name()));
            }
        }
    }
}
