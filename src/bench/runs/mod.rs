//! Runs of each operation on inputs of its own: a file for each family, as in `backend/`.

mod attention;
mod elementwise;
mod embeddings;
mod layer_norm;
mod linear;
mod losses;
mod memory;
mod optimiser;
mod tokens;

use std::cell::RefCell;

use dtmem_reference::dropout::{Mask, philox};

use crate::backend::{AdamW, Backend, Dropped, Kind, Span};
use crate::batch::{LossWeights, PackedBatch, Packer, TrainingStep, Trajectory};
use crate::bench::operations::{ACTIONS, CARDINALITIES, FIELDS, VIEW};
use crate::bench::{Operation, Result, Scale};
use crate::spaces::{ActionSpace, Family, ObservationSpace};

/// One run of a case on its own inputs.
pub(in crate::bench) type Run<'a> = Box<dyn FnMut() -> Result<()> + 'a>;

/// Of weights and adapters, which is no operation of a backend: models merge once, on the host.
pub(in crate::bench) trait Merges: Backend<Element = f32> {
    /// A square weight of this width.
    fn merge(&self, width: usize) -> Result<Run<'_>>;
}

/// Numbers of unit variance, again and again from another place.
pub(in crate::bench) fn numbers(len: usize, factor: f32) -> Vec<f32> {
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

pub(in crate::bench) fn random<B: Backend<Element = f32>>(
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
pub(in crate::bench) fn family() -> Family {
    Family {
        observation: ObservationSpace::codes(VIEW, CARDINALITIES),
        action: ActionSpace::Discrete(ACTIONS),
    }
}

/// Random annotated trajectories of so many steps each, of the packer's first family: observations of `fields` codes,
/// below `cardinalities` in turn, and actions below `actions`. Errors: a packer for other observations or actions.
pub fn push_random(
    packer: &mut Packer,
    fields: usize,
    cardinalities: &[usize],
    actions: usize,
    lengths: impl IntoIterator<Item = usize>,
) -> Result<()> {
    for (sequence, steps) in lengths.into_iter().enumerate() {
        let draw = |index: usize, limit: usize| {
            (philox([index as u32, sequence as u32, 0, 0], [3, 5])[0] as usize % limit) as u8
        };
        let observations: Vec<u8> = (0..steps * fields)
            .map(|index| draw(index, cardinalities[index % cardinalities.len()]))
            .collect();
        let actions: Vec<u8> = (0..steps).map(|step| draw(step, actions)).collect();
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
    Ok(())
}

/// Trajectories of a scale.
fn push_lengths(scale: &Scale, packer: &mut Packer) -> Result<()> {
    let lengths = (0..scale.repeats).flat_map(|_| scale.lengths.iter().copied());
    push_random(packer, FIELDS, &CARDINALITIES, ACTIONS, lengths)
}

/// A batch of a scale.
pub(in crate::bench) fn batch(scale: &Scale, mut packer: Packer) -> Result<PackedBatch> {
    push_lengths(scale, &mut packer)?;
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

/// Inputs for an operation, and what runs it on them once.
pub(in crate::bench) fn prepare<'a, B: Merges>(
    backend: &'a B,
    operation: Operation,
    scale: &Scale,
) -> Result<Run<'a>> {
    match operation {
        Operation::Attention => attention::attention(backend, scale, false, false),
        Operation::AttentionBackward => attention::attention(backend, scale, false, true),
        Operation::AttentionBce => attention::attention(backend, scale, true, false),
        Operation::AttentionBceBackward => attention::attention(backend, scale, true, true),
        Operation::AttentionCached => attention::attention_cached(backend, scale),
        Operation::ContentMemory => memory::memory(backend, scale, false, false),
        Operation::ContentMemoryBackward => memory::memory(backend, scale, false, true),
        Operation::ContentMemoryRecall => memory::memory(backend, scale, true, false),
        Operation::ContentMemoryRecallBackward => memory::memory(backend, scale, true, true),
        Operation::Linear => linear::linear(backend, scale, None, false),
        Operation::LoraLinear => {
            linear::linear(backend, scale, Some(linear::Adapters::Plain), false)
        }
        Operation::LoraLinearBackward => {
            linear::linear(backend, scale, Some(linear::Adapters::Plain), true)
        }
        Operation::LoraDropout => {
            linear::linear(backend, scale, Some(linear::Adapters::Dropout), false)
        }
        Operation::LoraDropoutBackward => {
            linear::linear(backend, scale, Some(linear::Adapters::Dropout), true)
        }
        Operation::LoraMerge => backend.merge(scale.width),
        Operation::LayerNorm => layer_norm::layer_norm(backend, scale, false),
        Operation::LayerNormBackward => layer_norm::layer_norm(backend, scale, true),
        Operation::OneHot => embeddings::one_hot(backend, scale, false),
        Operation::OneHotBackward => embeddings::one_hot(backend, scale, true),
        Operation::Convolutions => embeddings::convolutions(backend, scale, false),
        Operation::ConvolutionsBackward => embeddings::convolutions(backend, scale, true),
        Operation::Tokens => tokens::tokens(backend, scale, false),
        Operation::TokensBackward => tokens::tokens(backend, scale, true),
        Operation::CrossEntropy => losses::cross_entropy(backend, scale),
        Operation::SquaredError => losses::squared_error(backend, scale),
        Operation::Activation => elementwise::activation(backend, scale, false),
        Operation::ActivationBackward => elementwise::activation(backend, scale, true),
        Operation::Dropout => elementwise::dropout(backend, scale),
        Operation::Add => elementwise::add(backend, scale),
        // A step brings its own model: see `step`.
        Operation::Norm | Operation::AdamW | Operation::Step => {
            optimiser::update(backend, scale, operation)
        }
    }
}

#[cfg(all(test, feature = "host"))]
mod tests {
    use half::bf16;

    use super::*;
    use crate::backend::gpu::{Gpu, HostDevice};
    use crate::batch::TokenLayout;
    use crate::bench::step::Step;

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
