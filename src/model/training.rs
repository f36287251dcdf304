//! One optimiser step: forward, backward, clipping, AdamW.

use dtmem_reference::Scalar;
use dtmem_reference::optimiser::clip_scale;

use super::activations::{Activations, Backward};
use super::forward::{Counts, Masks};
use super::{Capacity, Model, ModelError};
use crate::backend::{AdamW, Backend, METRICS, Metric, Span};
use crate::batch::PackedBatch;

/// Settings of the optimiser for one step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct OptimiserStep {
    /// Learning rate.
    pub learning_rate: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to √v̂.
    pub epsilon: f64,
    /// Decoupled weight decay of the matrices.
    pub weight_decay: f64,
    /// Largest gradient norm.
    pub clip: Option<f64>,
}

/// What one step measured, before its update.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepMetrics {
    /// action_loss + λ·memory_loss.
    pub loss: f64,
    /// Mean cross-entropy of the actions, in nats.
    pub action_loss: f64,
    /// The attention-BCE; 0 without supervision.
    pub memory_loss: f64,
    /// Share of actions predicted right.
    pub accuracy: f64,
    /// Norm of the gradient before clipping.
    pub gradient_norm: f64,
    /// Tokens of the batch.
    pub tokens: usize,
}

impl StepMetrics {
    /// Whether loss and gradient are finite; if not, the step changed nothing.
    pub fn is_finite(&self) -> bool {
        self.loss.is_finite() && self.gradient_norm.is_finite()
    }
}

/// Everything that training needs beside the parameters, allocated once.
#[derive(Debug)]
pub struct Training<B: Backend> {
    capacity: Capacity,
    batch: B::Batch,
    activations: Activations<B>,
    backward: Backward<B>,
    gradients: B::Buffer,
    first_moment: B::Buffer,
    second_moment: B::Buffer,
}

impl<B: Backend> Training<B> {
    /// Buffers for batches up to `capacity`, and moments of zero.
    pub fn new(model: &Model<B>, capacity: Capacity) -> Result<Self, ModelError> {
        let (backend, network, config) = (&model.backend, &model.network, &model.config);
        let trained = model.parameters.trained();
        let mut training = Self {
            capacity,
            batch: B::Batch::default(),
            activations: Activations::new(backend, network, config, capacity)?,
            backward: Backward::new(backend, network, config, capacity)?,
            gradients: backend.buffer(trained)?,
            first_moment: backend.buffer(trained)?,
            second_moment: backend.buffer(trained)?,
        };
        let all = Span {
            offset: 0,
            len: trained,
        };
        backend.zero(&mut training.first_moment, all)?;
        backend.zero(&mut training.second_moment, all)?;
        Ok(training)
    }

    /// Loss and gradients of a batch, without an update. Dropout masks are a function of the seed
    /// and the number of the step.
    pub fn gradients(
        &mut self,
        model: &Model<B>,
        batch: &PackedBatch,
        seed: u64,
        step: u64,
    ) -> Result<StepMetrics, ModelError> {
        model.check(batch, self.capacity)?;
        let backend = &model.backend;
        backend.stage(batch, &mut self.batch)?;
        let counts = Counts::from(batch);
        let masks = Masks {
            training: Some((seed, step as u32)),
        };
        backend.zero(&mut self.gradients, model.trained_span())?;
        let acts = &mut self.activations;
        model.forward(&self.batch, counts, masks, None, acts)?;
        model.backward(
            &self.batch,
            counts,
            masks,
            acts,
            &mut self.backward,
            &mut self.gradients,
        )?;
        let mut metrics = [B::Element::default(); METRICS];
        backend.download(&acts.metrics, 0, &mut metrics)?;
        let metric = |metric: Metric| metrics[metric as usize].to_f64();
        let rows = counts.observations.max(1) as f64;
        let action_loss = metric(Metric::ActionLoss) / rows;
        let (lambda, memory_loss) = match &model.supervision {
            Some(supervision) => (supervision.lambda, metric(Metric::MemoryLoss)),
            None => (0.0, 0.0),
        };
        let spans = [model.parameters.decayed, model.parameters.plain];
        Ok(StepMetrics {
            loss: action_loss + lambda * memory_loss,
            action_loss,
            memory_loss,
            accuracy: metric(Metric::Correct) / rows,
            gradient_norm: backend.norm(&self.gradients, &spans)?,
            tokens: counts.tokens,
        })
    }

    /// The gradients of the last call of [`Self::gradients`] or [`Self::step`]: the trained part of
    /// the arena.
    pub fn gradient_values(&self, model: &Model<B>) -> Result<Vec<B::Element>, ModelError> {
        download(model, &self.gradients)
    }

    /// One optimiser step, number `step` from 1. Nothing is updated if the loss or the gradient is
    /// not finite: see [`StepMetrics::is_finite`].
    pub fn step(
        &mut self,
        model: &mut Model<B>,
        batch: &PackedBatch,
        seed: u64,
        step: u64,
        optimiser: &OptimiserStep,
    ) -> Result<StepMetrics, ModelError> {
        let metrics = self.gradients(model, batch, seed, step)?;
        if !metrics.is_finite() {
            return Ok(metrics);
        }
        let scale = optimiser
            .clip
            .map_or(1.0, |clip| clip_scale(metrics.gradient_norm, clip));
        for (span, weight_decay) in [
            (model.parameters.decayed, optimiser.weight_decay),
            (model.parameters.plain, 0.0),
        ] {
            let hyper = AdamW {
                learning_rate: optimiser.learning_rate,
                beta1: optimiser.beta1,
                beta2: optimiser.beta2,
                epsilon: optimiser.epsilon,
                weight_decay,
                gradient_scale: scale,
                step,
            };
            model.backend.adamw(
                &hyper,
                span,
                &self.gradients,
                &mut model.values,
                &mut self.first_moment,
                &mut self.second_moment,
            )?;
        }
        Ok(metrics)
    }

    /// First and second moments of the trained part of the arena.
    pub fn moments(&self, model: &Model<B>) -> Result<[Vec<B::Element>; 2], ModelError> {
        Ok([
            download(model, &self.first_moment)?,
            download(model, &self.second_moment)?,
        ])
    }

    /// Replaces the moments.
    pub fn set_moments(
        &mut self,
        model: &Model<B>,
        first: &[B::Element],
        second: &[B::Element],
    ) -> Result<(), ModelError> {
        let expected = model.parameters.trained();
        for (values, moment) in [
            (first, &mut self.first_moment),
            (second, &mut self.second_moment),
        ] {
            if values.len() != expected {
                return Err(ModelError::Values {
                    found: values.len(),
                    expected,
                });
            }
            model.backend.upload(values, moment, 0)?;
        }
        Ok(())
    }
}

fn download<B: Backend>(
    model: &Model<B>,
    buffer: &B::Buffer,
) -> Result<Vec<B::Element>, ModelError> {
    let mut values = vec![B::Element::default(); model.parameters.trained()];
    model.backend.download(buffer, 0, &mut values)?;
    Ok(values)
}

impl<B: Backend> Model<B> {
    /// The trained part of the arena: its start.
    fn trained_span(&self) -> Span {
        Span {
            offset: 0,
            len: self.parameters.trained(),
        }
    }
}
