//! The models: parameters in one arena with named parts, both block kinds, the memory layer and
//! its adapters, forward and backward written once over [`crate::backend::Backend`].

mod acting;
mod activations;
mod adapters;
mod backward;
mod config;
mod forward;
mod network;
mod parameters;
mod trace;
mod training;

use std::sync::Arc;

use dtmem_reference::Scalar;
use thiserror::Error;

pub use acting::Actor;
pub use activations::Capacity;
pub use adapters::{AdapterWeights, NamedTensor, TRAINED_ADAPTER};
pub use config::*;
pub use parameters::{Parameter, Parameters, Start};
pub use trace::{MemoryTrace, Trace};
pub use training::{OptimiserStep, StepMetrics, Training};

pub use crate::spaces::{ActionSpace, Content, Family, ObservationSpace, SpaceError, Spaces};

use crate::backend::{Backend, BackendError, Bytes, Kind, Limits, Positions, Rank, Room};
use crate::batch::{BatchError, PackedBatch, Packer};
use activations::Activations;
use adapters::Adaptation;
use forward::{Counts, Pass};
use network::{Network, ObservationEmbedding};

/// Why a model cannot be made or run.
#[derive(Debug, Clone, PartialEq, Error)]
pub enum ModelError {
    /// A setting does not fit the others or the task.
    #[error("model setting `{setting}` is {found}, expected {expected}")]
    Setting {
        /// Name of the setting.
        setting: &'static str,
        /// Its value.
        found: String,
        /// What would fit.
        expected: String,
    },
    /// A batch is larger than the buffers were made for.
    #[error("a batch has {found} {what}, the buffers hold {capacity}")]
    Capacity {
        /// What there are too many of.
        what: &'static str,
        /// How many.
        found: usize,
        /// How many fit.
        capacity: usize,
    },
    /// Values of another model.
    #[error("{found} values for a model of {expected} parameters")]
    Values {
        /// Number of values.
        found: usize,
        /// Number of parameters.
        expected: usize,
    },
    /// Tasks that no model can have.
    #[error("model spaces: {0}")]
    Spaces(#[from] SpaceError),
    /// A batch cannot be built.
    #[error(transparent)]
    Batch(#[from] BatchError),
    /// The device's memory is full.
    #[error(
        "out of device memory: {purpose} takes {needed}, and {room}: lower {settings}, or end other \
         programs on this device"
    )]
    OutOfMemory {
        /// What memory was needed for.
        purpose: String,
        /// All of it.
        needed: Bytes,
        /// What there is.
        room: Room,
        /// What lowers it.
        settings: &'static str,
    },
    /// The backend failed.
    #[error(transparent)]
    Backend(#[from] BackendError),
    /// An operation refused its arguments.
    #[error(transparent)]
    Operation(#[from] dtmem_reference::Error),
}

impl ModelError {
    fn setting(setting: &'static str, found: impl ToString, expected: impl ToString) -> Self {
        Self::Setting {
            setting,
            found: found.to_string(),
            expected: expected.to_string(),
        }
    }
}

/// Makes the buffers for a purpose. An error of memory says how much all of them take, and which
/// settings lower it.
fn allocate<B: Backend, T>(
    backend: &B,
    purpose: impl FnOnce() -> String,
    settings: &'static str,
    work: impl Fn() -> Result<T, BackendError>,
) -> Result<T, ModelError> {
    match work() {
        Err(BackendError::OutOfMemory { needed, room }) => Err(ModelError::OutOfMemory {
            purpose: purpose(),
            needed: needed.max(backend.needed_for(|| drop(work()))),
            room,
            settings,
        }),
        other => Ok(other?),
    }
}

/// A model: its parameters on a backend and the operations that use them.
#[derive(Debug)]
pub struct Model<B: Backend> {
    backend: Arc<B>,
    config: ModelConfig,
    spaces: Spaces,
    supervision: Option<SupervisionConfig>,
    adaptation: Adaptation,
    parameters: Parameters,
    network: Network,
    values: B::Buffer,
    /// Sinusoidal positions [steps, width], where they are used.
    constants: B::Buffer,
}

impl<B: Backend> Model<B> {
    /// A model with undefined parameters: call [`Self::initialise`] or [`Self::set_values`]. All of
    /// them are trained, or only the adapter of the configuration if it has one.
    pub fn new(
        backend: B,
        config: ModelConfig,
        spaces: Spaces,
        supervision: Option<SupervisionConfig>,
    ) -> Result<Self, ModelError> {
        let trained = match &config.adapter {
            Some(_) => TrainedPart::Adapter,
            None => TrainedPart::All,
        };
        Self::partly_trained(backend, config, spaces, &[], supervision, trained)
    }

    /// As [`Self::new`], with all parameters frozen but those of one part and those of `new`
    /// families, which are not among the `known` spaces: they belong to the adapter where that is
    /// trained, or else to the model itself.
    pub fn partly_trained(
        backend: B,
        config: ModelConfig,
        known: Spaces,
        new: &[Family],
        supervision: Option<SupervisionConfig>,
        trained: TrainedPart,
    ) -> Result<Self, ModelError> {
        let adapter = config.adapter.as_ref();
        let adaptation = Adaptation::new(trained, adapter, known.families.len(), new);
        let mut spaces = known;
        spaces.families.extend_from_slice(new);
        validate(&config, &spaces, supervision.as_ref(), trained)?;
        validate_sizes(&config, backend.name(), backend.limits())?;
        let (parameters, network) = Parameters::plan(|declare| {
            Network::declare(declare, &config, &spaces, supervision.as_ref(), &adaptation)
        });
        for family in &network.families {
            if let ObservationEmbedding::Convolution(front_end, _) = &family.observation
                && let Err(reason) = backend.check_convolutions(front_end)
            {
                let expected = format!("linear: {} takes no such grid, {reason}", backend.name());
                return Err(ModelError::setting("front_end", "convolution", expected));
            }
        }
        let values = allocate(
            &backend,
            || format!("a model of {} parameters", parameters.count(false)),
            "model.width, model.layers or model.feed_forward",
            || backend.buffer(parameters.len(), Kind::Parameter),
        )?;
        let table = match network.positions {
            Positions::Constant(_) => sinusoids(spaces.steps, config.width),
            Positions::Learned(_) => Vec::new(),
        };
        let mut constants = backend.buffer(table.len(), Kind::Parameter)?;
        backend.upload(&table, &mut constants, 0)?;
        Ok(Self {
            backend: Arc::new(backend),
            config,
            spaces,
            supervision,
            adaptation,
            parameters,
            network,
            values,
            constants,
        })
    }

    /// Sets the initial values of a seed.
    pub fn initialise(&mut self, seed: u64) -> Result<(), ModelError> {
        let values = self.parameters.initial(seed);
        self.set_values(&values)
    }

    /// All parameters, by name.
    pub fn parameters(&self) -> &[Parameter] {
        self.parameters.list()
    }

    /// Number of parameters.
    pub fn parameter_count(&self) -> usize {
        self.parameters.count(false)
    }

    /// Number of parameters that training changes.
    pub fn trained_count(&self) -> usize {
        self.parameters.count(true)
    }

    /// Length of the start of the arena, which is what training changes: with the gaps between
    /// parameters.
    pub fn trained_len(&self) -> usize {
        self.parameters.trained()
    }

    /// The whole arena; [`Parameter::span`] says what stands where.
    pub fn values(&self) -> Result<Vec<B::Element>, ModelError> {
        let mut values = vec![B::Element::default(); self.parameters.len()];
        self.backend.download(&self.values, 0, &mut values)?;
        Ok(values)
    }

    /// Replaces the whole arena.
    pub fn set_values(&mut self, values: &[B::Element]) -> Result<(), ModelError> {
        if values.len() != self.parameters.len() {
            return Err(ModelError::Values {
                found: values.len(),
                expected: self.parameters.len(),
            });
        }
        Ok(self.backend.upload(values, &mut self.values, 0)?)
    }

    /// Which one this is of several ranks that train it together.
    pub fn rank(&self) -> Rank {
        self.backend.rank()
    }

    /// The settings that the model was made from.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The memory loss that it is trained with.
    pub fn supervision(&self) -> Option<&SupervisionConfig> {
        self.supervision.as_ref()
    }

    /// What its tasks ask of it.
    pub fn spaces(&self) -> &Spaces {
        &self.spaces
    }

    /// A packer for this model's batches.
    pub fn packer(&self) -> Packer {
        let segment = Some(self.config.segment_steps).filter(|&steps| steps > 0);
        Packer::new(self.config.layout, &self.spaces.families, segment)
    }

    /// What a family of tasks observes and does.
    pub fn family(&self, family: usize) -> Result<&Family, ModelError> {
        self.spaces.families.get(family).ok_or_else(|| {
            let expected = format!("below {}", self.spaces.families.len());
            ModelError::setting("family", family, expected)
        })
    }

    /// Action logits at every observation of a batch of whole episodes: of one family after another,
    /// each [its observations, its actions].
    pub fn logits(&self, batch: &PackedBatch) -> Result<Vec<B::Element>, ModelError> {
        let acts = self.evaluate(batch)?;
        let mut logits = Vec::new();
        for ((rows, family), acts) in batch
            .families
            .iter()
            .zip(&self.spaces.families)
            .zip(&acts.families)
        {
            let start = logits.len();
            let len = rows.observations.len() * family.action.outputs();
            logits.resize(start + len, B::Element::default());
            self.backend
                .download(&acts.logits, 0, &mut logits[start..])?;
        }
        Ok(logits)
    }

    /// A forward pass without dropout, in buffers of its own.
    fn evaluate(&self, batch: &PackedBatch) -> Result<Activations<B>, ModelError> {
        let counts = Counts::from(batch);
        let capacity = Capacity::of(batch);
        self.check(batch, &capacity)?;
        let mut acts = Activations::new(&*self.backend, &self.network, &self.config, &capacity)?;
        let mut staged = B::Batch::default();
        self.backend.stage(batch, &mut staged)?;
        let pass = Pass {
            batch: &staged,
            counts,
            families: &batch.families,
            training: None,
        };
        self.forward(pass, None, &mut acts)?;
        Ok(acts)
    }

    /// Checks a batch against buffers and spaces before it is computed on.
    fn check(&self, batch: &PackedBatch, capacity: &Capacity) -> Result<(), ModelError> {
        let families = batch.families.iter().zip(&capacity.observations);
        let of_families = families.flat_map(|(rows, &capacity)| {
            [
                (
                    "observations of a family",
                    rows.observations.len(),
                    capacity,
                ),
                ("actions of a family", rows.actions.len(), capacity),
            ]
        });
        for (what, found, capacity) in [
            ("tokens", batch.tokens(), capacity.tokens),
            (
                "returns",
                batch.return_tokens.len(),
                capacity.all_observations(),
            ),
            ("sequences", batch.sequences(), capacity.sequences),
            ("segments", batch.segments(), capacity.segments),
            ("segments in one sequence", batch.links(), capacity.links),
            ("families", batch.families.len(), self.spaces.families.len()),
            (
                "time steps",
                batch
                    .token_time
                    .iter()
                    .max()
                    .map_or(0, |&time| time as usize + 1),
                self.spaces.steps,
            ),
        ]
        .into_iter()
        .chain(of_families)
        {
            if found > capacity {
                return Err(ModelError::Capacity {
                    what,
                    found,
                    capacity,
                });
            }
        }
        Ok(())
    }
}

/// Sinusoidal positions (Vaswani et al. 2017): sin(t·ω_i), cos(t·ω_i) in turn, ω_i = 10000^(−2i/D).
fn sinusoids<T: Scalar>(steps: usize, width: usize) -> Vec<T> {
    let mut table = Vec::with_capacity(steps * width);
    for step in 0..steps {
        for column in 0..width {
            let exponent = (column - column % 2) as f64 / width as f64;
            let angle = step as f64 / 10_000f64.powf(exponent);
            table.push(T::from_f64(if column % 2 == 0 {
                angle.sin()
            } else {
                angle.cos()
            }));
        }
    }
    table
}

/// Checks settings against each other and against the tasks.
fn validate(
    config: &ModelConfig,
    spaces: &Spaces,
    supervision: Option<&SupervisionConfig>,
    trained: TrainedPart,
) -> Result<(), ModelError> {
    for (name, value, limit) in [
        ("width", config.width, 1 << 16),
        ("layers", config.layers, 1 << 10),
        ("heads", config.heads, 1 << 10),
        ("feed_forward", config.feed_forward, 1 << 20),
        ("families", spaces.families.len(), 1 << 10),
        ("steps", spaces.steps, 1 << 24),
    ] {
        if value == 0 || value > limit {
            return Err(ModelError::setting(name, value, format!("1 to {limit}")));
        }
    }
    if !config.width.is_multiple_of(config.heads) {
        return Err(ModelError::setting(
            "width",
            config.width,
            format!("a multiple of heads = {}", config.heads),
        ));
    }
    if !config.width.is_multiple_of(4) {
        return Err(ModelError::setting(
            "width",
            config.width,
            "a multiple of 4",
        ));
    }
    if !(0.0..1.0).contains(&config.dropout) {
        return Err(ModelError::setting(
            "dropout",
            config.dropout,
            "0 or more and less than 1",
        ));
    }
    if !(config.observation_gain >= 0.0 && config.observation_gain.is_finite()) {
        return Err(ModelError::setting(
            "observation_gain",
            config.observation_gain,
            "0 or more",
        ));
    }
    for family in &spaces.families {
        family.validate()?;
    }
    let of_grids = spaces.families.iter().any(|f| f.observation.is_grid());
    if config.front_end == FrontEnd::Convolution && !of_grids {
        let expected = "`linear`: no task has observations that are a grid of cells";
        return Err(ModelError::setting("front_end", "convolution", expected));
    }
    if config.attention == AttentionSpan::Segment && config.segment_steps == 0 {
        return Err(ModelError::setting(
            "segment_steps",
            0,
            "at least 1 with attention = \"segment\"",
        ));
    }
    if let Some(memory) = &config.memory {
        if memory.slots == 0 {
            return Err(ModelError::setting("memory.slots", 0, "at least 1"));
        }
        if !memory.strength_bias.is_finite() {
            return Err(ModelError::setting(
                "memory.strength_bias",
                memory.strength_bias,
                "a finite number",
            ));
        }
    }
    if let Some(adapter) = &config.adapter {
        validate_adapter(config, adapter)?;
    }
    let missing = match trained {
        TrainedPart::Adapter if config.adapter.is_none() => "an adapter",
        TrainedPart::Memory if config.memory.is_none() => "a memory",
        _ => "",
    };
    if !missing.is_empty() {
        let expected = format!("{missing}, which is all that is to be trained");
        return Err(ModelError::setting("model", "without it", expected));
    }
    let Some(supervision) = supervision else {
        return Ok(());
    };
    if supervision.layer >= config.layers {
        return Err(ModelError::setting(
            "loss.layer",
            supervision.layer + 1,
            format!("1 to {}", config.layers),
        ));
    }
    match &supervision.part {
        SupervisedPart::Heads(heads) => validate_heads(heads, config)?,
        SupervisedPart::Memory if config.memory.is_none() => {
            let expected = "a memory layer with a supervised memory";
            return Err(ModelError::setting("memory", "nothing", expected));
        }
        SupervisedPart::Memory => {}
    }
    if !(supervision.lambda > 0.0 && supervision.lambda.is_finite()) {
        return Err(ModelError::setting(
            "loss.lambda",
            supervision.lambda,
            "more than 0",
        ));
    }
    Ok(())
}

/// Checks the sizes of a configuration against those that a backend takes.
fn validate_sizes(config: &ModelConfig, backend: &str, limits: Limits) -> Result<(), ModelError> {
    let head_width = config.width / config.heads;
    if let Some(widths) = limits.head_widths
        && !widths.contains(&head_width)
    {
        let expected = format!(
            "so many that width / heads, now {head_width}, is one of {widths:?}, as {backend} needs"
        );
        return Err(ModelError::setting("heads", config.heads, expected));
    }
    let width = match config.memory {
        Some(_) => ("width", config.width, limits.memory_width),
        None => ("width", config.width, limits.width),
    };
    let slots = config.memory.as_ref().map_or(0, |memory| memory.slots);
    let rank = config.adapter.as_ref().map_or(0, |adapter| adapter.rank);
    for (name, value, limit) in [
        width,
        ("memory.slots", slots, limits.slots),
        ("adapter.rank", rank, limits.rank),
    ] {
        if value > limit {
            let expected = format!("at most {limit} on {backend}");
            return Err(ModelError::setting(name, value, expected));
        }
    }
    Ok(())
}

/// Supervised heads of a configuration.
fn validate_heads(heads: &[usize], config: &ModelConfig) -> Result<(), ModelError> {
    if config.attention == AttentionSpan::Segment {
        let expected = "`episode` where attention heads are supervised: pairs cross segments";
        return Err(ModelError::setting("attention", "segment", expected));
    }
    if heads.is_empty() || !heads.is_sorted_by(|a, b| a < b) {
        let expected = "at least one head, ascending, none twice";
        return Err(ModelError::setting(
            "loss.heads",
            format!("{heads:?}"),
            expected,
        ));
    }
    match heads.iter().find(|&&head| head >= config.heads) {
        Some(head) => Err(ModelError::setting(
            "loss.heads",
            head + 1,
            format!("1 to {}", config.heads),
        )),
        None => Ok(()),
    }
}

/// Checks an adapter against the model that it stands on.
fn validate_adapter(config: &ModelConfig, adapter: &AdapterConfig) -> Result<(), ModelError> {
    let expected = if config.memory.is_none() {
        (
            "adapter",
            "set".to_owned(),
            "a memory, whose projections it adapts".to_owned(),
        )
    } else if adapter.rank == 0 || adapter.rank > config.width {
        let expected = format!("1 to width = {}", config.width);
        ("adapter.rank", adapter.rank.to_string(), expected)
    } else if !adapter.alpha.is_finite() {
        (
            "adapter.alpha",
            adapter.alpha.to_string(),
            "a finite number".to_owned(),
        )
    } else if !(0.0..1.0).contains(&adapter.dropout) {
        let expected = "0 or more and less than 1".to_owned();
        ("adapter.dropout", adapter.dropout.to_string(), expected)
    } else if !adapter.has_targets() {
        let found = format!("{:?}", adapter.targets);
        (
            "adapter.targets",
            found,
            "at least one projection, none twice".to_owned(),
        )
    } else {
        return Ok(());
    };
    let (setting, found, expected) = expected;
    Err(ModelError::setting(setting, found, expected))
}
