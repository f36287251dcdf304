//! Whole training steps of AttentionTuner and DT-Mem.

use std::time::Instant;

use dtmem_reference::attention::Denominator;

use super::runs::{batch, family};
use super::{Result, Scale};
use crate::backend::Backend;
use crate::batch::{PackedBatch, TokenLayout};
use crate::model::{
    AttentionSpan, Block, Capacity, Family, MemoryConfig, Model, ModelConfig, OptimiserStep,
    Spaces, SupervisedPart, SupervisionConfig, Training,
};

/// Parts of a batch for a CPU's threads.
const SHARDS: usize = 2;

const OPTIMISER: OptimiserStep = OptimiserStep {
    learning_rate: 1e-4,
    beta1: 0.9,
    beta2: 0.999,
    epsilon: 1e-8,
    weight_decay: 0.0,
    clip: None,
};

/// A model with its optimiser and a batch.
pub(super) struct Step<B: Backend> {
    model: Model<B>,
    training: Training<B>,
    batch: PackedBatch,
    number: u64,
}

impl<B: Backend<Element = f32>> Step<B> {
    /// AttentionTuner, or DT-Mem where there are return tokens.
    pub fn new(backend: B, scale: &Scale) -> Result<Self> {
        let dt_mem = scale.layout == TokenLayout::ReturnObsAction;
        let sizes = ModelConfig {
            layout: scale.layout,
            width: scale.width,
            layers: scale.layers,
            heads: scale.heads,
            feed_forward: scale.feed_forward,
            ..ModelConfig::default()
        };
        let config = match dt_mem {
            true => ModelConfig {
                block: Block::PreLn,
                attention: AttentionSpan::Segment,
                segment_steps: scale.segment_steps,
                memory: Some(MemoryConfig {
                    slots: scale.slots,
                    ..MemoryConfig::default()
                }),
                ..sizes
            },
            false => sizes,
        };
        let supervision = (!dt_mem).then(|| SupervisionConfig {
            lambda: 10.0,
            layer: 0,
            part: SupervisedPart::Heads(vec![0]),
            denominator: Denominator::Square,
        });
        let steps = scale.lengths.iter().copied().max().unwrap_or(1);
        let Family {
            observation,
            action,
        } = family();
        let spaces = Spaces::of(observation, action, steps);
        let shards = backend.shards(SHARDS);
        let mut model = Model::new(backend, config, spaces, supervision)?;
        model.initialise(0)?;
        let batch = batch(scale, model.packer())?;
        let training = Training::new(&model, Capacity::of(&batch), shards)?;
        Ok(Self {
            model,
            training,
            batch,
            number: 0,
        })
    }

    /// Seconds of so many steps, with their metrics on the host in the end, as a trainer does it.
    pub fn time(&mut self, runs: u64) -> Result<f64> {
        let start = Instant::now();
        for _ in 0..runs {
            self.number += 1;
            let (model, batch) = (&mut self.model, &self.batch);
            self.training
                .step(model, batch, 0, self.number, &OPTIMISER)?;
        }
        self.training.collect(&self.model)?;
        Ok(start.elapsed().as_secs_f64())
    }
}
