//! One optimiser step: forward, backward, clipping, AdamW.

use std::cmp::Reverse;
use std::sync::Arc;

use dtmem_reference::Scalar;

use super::activations::{Activations, Backward};
use super::forward::{Counts, Pass};
use super::{Capacity, Model, ModelError, allocate};
use crate::backend::{
    AdamW, Backend, BackendError, FIRST_LOSS_SCALE, Kind, METRICS, Metric, Span, Trained, range,
};
use crate::batch::{BatchSize, LossWeights, PackedBatch, TokenLayout, TrainingStep};

/// What makes a training need less memory on a device.
const LOWER: &str = "train.batch_tokens, model.width, model.layers or model.feed_forward, or compute \
                     with train.precision = \"bf16\"";
/// Most steps whose metrics wait on the backend.
const WAITING: usize = 256;

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
    /// Mean cross-entropy of the actions, in nats; of continuous actions the mean squared error.
    pub action_loss: f64,
    /// The attention-BCE; 0 without supervision.
    pub memory_loss: f64,
    /// Share of discrete actions predicted right; 0 where there are none.
    pub accuracy: f64,
    /// Norm of the gradient before clipping.
    pub gradient_norm: f64,
    /// What the losses were multiplied by for the gradient, where gradients may underflow.
    pub loss_scale: Option<f64>,
    /// Tokens of the batch.
    pub tokens: usize,
}

impl StepMetrics {
    /// Whether loss and gradient are finite; if not, the step changed nothing.
    pub fn is_finite(&self) -> bool {
        self.loss.is_finite() && self.gradient_norm.is_finite()
    }

    /// Whether only the scaled gradient overflowed: the step changed nothing, and the next one has a
    /// smaller loss scale.
    pub fn is_skipped(&self) -> bool {
        let scaled = self.loss_scale.is_some_and(|scale| scale > 1.0);
        scaled && self.loss.is_finite() && !self.gradient_norm.is_finite()
    }
}

/// What turns the sums of a step into its metrics.
#[derive(Debug, Clone, Copy)]
struct Measure {
    weights: LossWeights,
    /// 1 / the memory loss's denominator.
    per_pair: f64,
    /// 1 / the number of discrete actions.
    per_discrete: f64,
    tokens: usize,
}

impl Measure {
    fn new<B: Backend>(model: &Model<B>, batch: &PackedBatch) -> Self {
        let families = model.spaces.families.iter().zip(&batch.families);
        let discrete: usize = families
            .filter(|(family, _)| family.action.is_discrete())
            .map(|(_, rows)| rows.observations.len())
            .sum();
        Self {
            weights: model.loss_weights(batch),
            per_pair: model.per_pair(batch),
            per_discrete: 1.0 / discrete.max(1) as f64,
            tokens: batch.tokens(),
        }
    }

    fn metrics<T: Scalar>(&self, sums: &[T; METRICS]) -> StepMetrics {
        let sum = |metric: Metric| sums[metric as usize].to_f64();
        let action_loss = self.weights.action * sum(Metric::ActionLoss);
        StepMetrics {
            loss: action_loss + self.weights.pair * sum(Metric::MemoryLoss),
            action_loss,
            memory_loss: self.per_pair * sum(Metric::MemoryLoss),
            accuracy: self.per_discrete * sum(Metric::Correct),
            gradient_norm: sum(Metric::GradientNorm),
            loss_scale: Some(sum(Metric::LossScale)).filter(|&scale| scale > 0.0),
            tokens: self.tokens,
        }
    }
}

/// Everything that training needs beside the parameters, allocated once.
///
/// A batch is divided into parts of whole sequences, of about the same number of tokens: a shard
/// for each, on each rank as many. A shard goes forward and backward on its own, so that threads,
/// and ranks, meet once a step. The number of parts is part of the arithmetic (their gradients are
/// added in order): the same number gives the same bits on any number of threads.
#[derive(Debug)]
pub struct Training<B: Backend> {
    capacity: Capacity,
    shards: Vec<Shard<B>>,
    first_moment: B::Buffer,
    second_moment: B::Buffer,
    /// As [`FIRST_LOSS_SCALE`].
    loss_scale: B::Buffer,
    /// Of a whole step; with several ranks, of what comes before they meet, and after.
    recordings: [B::Recording; 2],
    /// Sums of the steps that wait to be collected [WAITING, METRICS], and what they measure.
    sums: B::Buffer,
    waiting: Vec<Measure>,
    /// One number.
    flag: B::Buffer,
    /// Metrics that had to make room for further ones.
    collected: Vec<StepMetrics>,
    /// Sequences of the batch, longest first.
    order: Vec<usize>,
    /// Those of each rank's shards.
    parts: Vec<Part>,
}

/// A part of a batch.
#[derive(Debug, Clone, Default)]
struct Part {
    sequences: Vec<usize>,
    tokens: usize,
}

/// What one part needs.
#[derive(Debug)]
struct Shard<B: Backend> {
    /// Which part.
    number: usize,
    /// With room for what fills a batch up.
    size: BatchSize,
    part: PackedBatch,
    batch: B::Batch,
    activations: Activations<B>,
    backward: Backward<B>,
    gradients: B::Buffer,
}

impl<B: Backend> Shard<B> {
    fn new(model: &Model<B>, capacity: &Capacity, number: usize) -> Result<Self, BackendError> {
        let (backend, network, config) = (&*model.backend, &model.network, &model.config);
        Ok(Self {
            number,
            size: BatchSize {
                tokens: capacity.tokens,
                rows: capacity.observations.clone(),
                returns: match config.layout {
                    TokenLayout::ObsAction => 0,
                    TokenLayout::ReturnObsAction => capacity.all_observations(),
                },
                sequences: capacity.sequences,
                segments: capacity.segments,
                links: capacity.links,
                segment_tokens: match config.segment_steps {
                    0 => model.spaces.steps,
                    steps => steps,
                } * config.layout.tokens_per_step(),
                steps: model.spaces.steps,
            },
            part: PackedBatch::default(),
            batch: B::Batch::default(),
            activations: Activations::new(backend, network, config, capacity)?,
            backward: Backward::new(backend, network, config, capacity)?,
            gradients: backend.buffer(model.parameters.trained(), Kind::Exact)?,
        })
    }

    fn stage(
        &mut self,
        model: &Model<B>,
        batch: &PackedBatch,
        parts: &[Part],
        training: TrainingStep,
    ) -> Result<(), ModelError> {
        let backend = &*model.backend;
        batch.select(&parts[self.number].sequences, &mut self.part);
        self.part.training = training;
        if backend.wants_one_size() {
            self.part.fill_up(&self.size, &model.spaces.families);
        }
        Ok(backend.stage(&self.part, &mut self.batch)?)
    }

    fn run(
        &mut self,
        model: &Model<B>,
        seed: u64,
        loss_scale: &B::Buffer,
    ) -> Result<(), ModelError> {
        let backend = &*model.backend;
        backend.scale_losses(&mut self.batch, loss_scale)?;
        let pass = Pass {
            batch: &self.batch,
            counts: Counts::from(&self.part),
            families: &self.part.families,
            training: Some((seed, self.part.training.number)),
        };
        let acts = &mut self.activations;
        backend.zero(&mut self.gradients, model.trained_span())?;
        backend.zero(
            &mut acts.metrics,
            Span {
                offset: 0,
                len: METRICS,
            },
        )?;
        // There may be more parts than sequences.
        if self.part.tokens() == 0 {
            return Ok(());
        }
        let forward = range("forward");
        model.forward(pass, None, acts)?;
        drop(forward);
        let _backward = range("backward");
        model.backward(pass, acts, &mut self.backward, &mut self.gradients)
    }
}

impl<B: Backend> Training<B> {
    /// Buffers for batches up to `capacity` in `shards` shards, and moments of zero.
    pub fn new(model: &Model<B>, capacity: Capacity, shards: usize) -> Result<Self, ModelError> {
        let backend = &*model.backend;
        if shards == 0 {
            return Err(ModelError::setting("shards", shards, "at least 1"));
        }
        model.adaptation.check_trained()?;
        // Given longest first to the emptiest, a part is at most one sequence above the mean.
        let longest = model.spaces.steps * model.config.layout.tokens_per_step();
        let rank = backend.rank();
        let parts = shards * rank.of;
        let tokens = capacity
            .tokens
            .min(capacity.tokens.div_ceil(parts) + longest);
        let families = capacity.observations.iter();
        let of_shard = Capacity {
            tokens,
            observations: families.map(|&rows| rows.min(tokens)).collect(),
            segments: capacity.segments.min(tokens),
            ..capacity
        };
        let trained = model.parameters.trained();
        let purpose = || format!("training on batches of {tokens} tokens");
        let (shards, [first_moment, second_moment]) = allocate(backend, purpose, LOWER, || {
            let numbers = rank.number * shards..(rank.number + 1) * shards;
            let shards: Result<Vec<_>, _> = numbers
                .map(|number| Shard::new(model, &of_shard, number))
                .collect();
            let moment = || backend.buffer(trained, Kind::Exact);
            Ok((shards?, [moment()?, moment()?]))
        })?;
        let mut training = Self {
            order: Vec::with_capacity(capacity.sequences),
            capacity,
            shards,
            first_moment,
            second_moment,
            loss_scale: backend.buffer(FIRST_LOSS_SCALE.len(), Kind::Exact)?,
            recordings: Default::default(),
            sums: backend.buffer(WAITING * METRICS, Kind::Exact)?,
            waiting: Vec::with_capacity(WAITING),
            flag: backend.buffer(1, Kind::Exact)?,
            collected: Vec::new(),
            parts: vec![Part::default(); parts],
        };
        backend.zero(&mut training.first_moment, model.trained_span())?;
        backend.zero(&mut training.second_moment, model.trained_span())?;
        training.set_loss_scale(model, FIRST_LOSS_SCALE)?;
        Ok(training)
    }

    /// Gives every sequence to a part.
    fn divide(&mut self, batch: &PackedBatch) {
        self.order.clear();
        self.order.extend(0..batch.sequences());
        self.order
            .sort_unstable_by_key(|&sequence| (Reverse(batch.tokens_of(sequence).len()), sequence));
        for part in &mut self.parts {
            part.sequences.clear();
            part.tokens = 0;
        }
        for &sequence in &self.order {
            if let Some(part) = self.parts.iter_mut().min_by_key(|part| part.tokens) {
                part.sequences.push(sequence);
                part.tokens += batch.tokens_of(sequence).len();
            }
        }
        for part in &mut self.parts {
            part.sequences.sort_unstable();
        }
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
        self.stage(model, batch, step, None)?;
        self.accumulate(model, seed)?;
        self.meet(model)?;
        self.norm(model, None)?;
        let mut sums = [B::Element::default(); METRICS];
        let metrics = &self.shards[0].activations.metrics;
        model.backend.download(metrics, 0, &mut sums)?;
        Ok(Measure::new(model, batch).metrics(&sums))
    }

    /// Divides a batch and brings it to the backend.
    fn stage(
        &mut self,
        model: &Model<B>,
        batch: &PackedBatch,
        step: u64,
        optimiser: Option<AdamW>,
    ) -> Result<(), ModelError> {
        model.check(batch, &self.capacity)?;
        self.divide(batch);
        let training = TrainingStep {
            number: step as u32,
            weights: model.loss_weights(batch),
            optimiser,
        };
        let (backend, parts) = (&*model.backend, &self.parts);
        backend.for_each(&mut self.shards, |shard| {
            shard.stage(model, batch, parts, training)
        })
    }

    /// Computes gradients and losses of this rank's shards, into the first.
    fn accumulate(&mut self, model: &Model<B>, seed: u64) -> Result<(), ModelError> {
        let backend = &*model.backend;
        let loss_scale = &self.loss_scale;
        backend.for_each(&mut self.shards, |shard| shard.run(model, seed, loss_scale))?;
        let trained = model.parameters.trained();
        if let [first, rest @ ..] = self.shards.as_mut_slice() {
            for shard in rest {
                let metrics = &mut first.activations.metrics;
                backend.add_assign(trained, &shard.gradients, &mut first.gradients)?;
                backend.add_assign(METRICS, &shard.activations.metrics, metrics)?;
            }
        }
        Ok(())
    }

    /// Adds up over all ranks. As the losses' weights count the whole batch, the sum is what one
    /// rank would have found alone.
    fn meet(&mut self, model: &Model<B>) -> Result<(), ModelError> {
        let (backend, first) = (&*model.backend, &mut self.shards[0]);
        backend.sum_over_ranks(&mut first.gradients, model.parameters.trained())?;
        Ok(backend.sum_over_ranks(&mut first.activations.metrics, METRICS)?)
    }

    /// Whether this is so on any rank.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn any(&mut self, model: &Model<B>, flag: bool) -> Result<bool, ModelError> {
        let backend = &*model.backend;
        if backend.rank().is_alone() {
            return Ok(flag);
        }
        let mut number = [B::Element::from_f64(f64::from(u8::from(flag)))];
        backend.upload(&number, &mut self.flag, 0)?;
        backend.sum_over_ranks(&mut self.flag, 1)?;
        backend.download(&self.flag, 0, &mut number)?;
        Ok(number[0].to_f64() > 0.0)
    }

    fn norm(&mut self, model: &Model<B>, clip: Option<f64>) -> Result<(), ModelError> {
        let first = &mut self.shards[0];
        Ok(model.backend.norm(
            model.parameters.trained(),
            &first.gradients,
            clip,
            &mut self.loss_scale,
            &mut first.activations.metrics,
        )?)
    }

    /// The gradients of the last call of [`Self::gradients`] or [`Self::step`], of losses that are
    /// scaled where [`StepMetrics::loss_scale`] says so: the trained part of the arena.
    pub fn gradient_values(&self, model: &Model<B>) -> Result<Vec<B::Element>, ModelError> {
        download(model, &self.shards[0].gradients)
    }

    /// One optimiser step, number `step` from 1. Nothing is updated if the gradient is not finite:
    /// see [`StepMetrics::is_finite`]. A backend may still be at it when this returns; how the step
    /// went is asked for by [`Self::collect`].
    pub fn step(
        &mut self,
        model: &mut Model<B>,
        batch: &PackedBatch,
        seed: u64,
        step: u64,
        optimiser: &OptimiserStep,
    ) -> Result<(), ModelError> {
        let tokens = batch.tokens();
        self.try_step(model, batch, seed, step, optimiser)
            .map_err(|error| match error {
                ModelError::Backend(BackendError::OutOfMemory { needed, room }) => {
                    ModelError::OutOfMemory {
                        purpose: format!("a part of the step on a batch of {tokens} tokens"),
                        needed,
                        room,
                        settings: LOWER,
                    }
                }
                error => error,
            })
    }

    fn try_step(
        &mut self,
        model: &mut Model<B>,
        batch: &PackedBatch,
        seed: u64,
        step: u64,
        optimiser: &OptimiserStep,
    ) -> Result<(), ModelError> {
        let hyper = AdamW {
            learning_rate: optimiser.learning_rate,
            beta1: optimiser.beta1,
            beta2: optimiser.beta2,
            epsilon: optimiser.epsilon,
            weight_decay: optimiser.weight_decay,
            gradient_scale: 1.0,
            step,
        };
        self.stage(model, batch, step, Some(hyper))?;
        let shape = model.backend.shape(&self.shards[0].batch);
        let backend = Arc::clone(&model.backend);
        let [mut first, mut second] = std::mem::take(&mut self.recordings);
        // What several ranks do together cannot be recorded: each would have to do so at once.
        let done = if backend.rank().is_alone() {
            backend.repeat(&mut first, shape, || {
                self.accumulate(model, seed)?;
                self.update(model, optimiser.clip)
            })
        } else {
            backend
                .repeat(&mut first, shape, || self.accumulate(model, seed))
                .and_then(|()| self.meet(model))
                .and_then(|()| {
                    backend.repeat(&mut second, shape, || self.update(model, optimiser.clip))
                })
        };
        self.recordings = [first, second];
        done?;
        let metrics = &self.shards[0].activations.metrics;
        let place = self.waiting.len() * METRICS;
        backend.copy(metrics, &mut self.sums, place, METRICS)?;
        self.waiting.push(Measure::new(model, batch));
        if self.waiting.len() == WAITING {
            self.fetch(model)?;
        }
        Ok(())
    }

    /// Metrics of the steps since the last call, in their order. Waits for the last of them.
    pub fn collect(&mut self, model: &Model<B>) -> Result<Vec<StepMetrics>, ModelError> {
        self.fetch(model)?;
        Ok(std::mem::take(&mut self.collected))
    }

    fn fetch(&mut self, model: &Model<B>) -> Result<(), ModelError> {
        let mut sums = vec![[B::Element::default(); METRICS]; self.waiting.len()];
        model
            .backend
            .download(&self.sums, 0, sums.as_flattened_mut())?;
        let steps = self.waiting.drain(..).zip(&sums);
        self.collected
            .extend(steps.map(|(measure, sums)| measure.metrics(sums)));
        Ok(())
    }

    fn update(&mut self, model: &mut Model<B>, clip: Option<f64>) -> Result<(), ModelError> {
        let _range = range("optimiser");
        self.norm(model, clip)?;
        let first = &self.shards[0];
        let trained = Trained {
            len: model.parameters.trained(),
            decayed: model.parameters.decayed.len,
        };
        Ok(model.backend.adamw(
            &first.batch,
            trained,
            &first.activations.metrics,
            &first.gradients,
            &mut model.values,
            &mut self.first_moment,
            &mut self.second_moment,
        )?)
    }

    /// First and second moments of the trained part of the arena.
    pub fn moments(&self, model: &Model<B>) -> Result<[Vec<B::Element>; 2], ModelError> {
        Ok([
            download(model, &self.first_moment)?,
            download(model, &self.second_moment)?,
        ])
    }

    /// What losses are multiplied by for their gradient, and the good steps since that has changed:
    /// [`FIRST_LOSS_SCALE`] still, where a backend has no use for it.
    pub fn loss_scale(&self, model: &Model<B>) -> Result<[f64; 2], ModelError> {
        let mut state = [B::Element::default(); 2];
        model.backend.download(&self.loss_scale, 0, &mut state)?;
        Ok(state.map(Scalar::to_f64))
    }

    /// Replaces it.
    pub fn set_loss_scale(&mut self, model: &Model<B>, state: [f64; 2]) -> Result<(), ModelError> {
        let state = state.map(B::Element::from_f64);
        Ok(model.backend.upload(&state, &mut self.loss_scale, 0)?)
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
    /// What the sums of a batch's losses count.
    fn loss_weights(&self, batch: &PackedBatch) -> LossWeights {
        let lambda = self.supervision.as_ref().map_or(0.0, |x| x.lambda);
        LossWeights {
            action: 1.0 / batch.observation_tokens.len().max(1) as f64,
            pair: lambda * self.per_pair(batch),
        }
    }

    /// 1 / the memory loss's denominator; 0 where there is no annotated sequence.
    fn per_pair(&self, batch: &PackedBatch) -> f64 {
        let divisor = self.supervision.as_ref().map_or(0.0, |x| x.divisor(batch));
        if divisor > 0.0 { 1.0 / divisor } else { 0.0 }
    }

    /// The trained part of the arena: its start.
    fn trained_span(&self) -> Span {
        Span {
            offset: 0,
            len: self.parameters.trained(),
        }
    }
}
