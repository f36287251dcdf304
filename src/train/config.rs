//! What a run is made of, read from TOML (docs/configuration.md explains every key).

use std::fmt::Display;
use std::iter;
use std::path::{Path, PathBuf};

use dtmem_reference::attention;
use serde::{Deserialize, Serialize};
use thiserror::Error;
use toml::{Table, Value};

use super::device::Precision;
use super::finetune::{self, FinetuneConfig, Method};
use crate::batch::TokenLayout;
use crate::model::{
    AdapterConfig, AttentionSpan, FrontEnd, ModelConfig, SupervisedPart, SupervisionConfig,
};
use crate::spaces::{Family, Spaces};
use crate::tasks::{AnnotationNoise, Task};

/// Demonstrations that are generated unless the configuration says how many.
const DEFAULT_EPISODES: usize = 4000;
/// Share of a file without a task that is not learnt from, unless the configuration says which.
pub const DEFAULT_VALIDATION: f64 = 0.1;

/// A whole run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Initialisation, order of the data, dropout, annotated share and demonstrations follow from
    /// it.
    #[serde(default)]
    pub seed: u64,
    /// The task; without one `data.file` is needed and nothing is evaluated.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub task: Option<Task>,
    /// Its demonstrations.
    #[serde(default)]
    pub data: DataConfig,
    /// Several tasks at once, in place of `task` and `data`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tasks: Vec<TaskConfig>,
    /// The model.
    #[serde(default)]
    pub model: ModelConfig,
    /// The memory loss.
    #[serde(default)]
    pub loss: LossConfig,
    /// The optimisation.
    pub train: TrainConfig,
    /// The base and how it is adapted; without it a model is trained from scratch.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub finetune: Option<FinetuneConfig>,
    /// The evaluation after training.
    #[serde(default)]
    pub evaluation: EvaluationConfig,
}

/// One of the tasks of a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TaskConfig {
    /// What it is called in results; default: the name of the task or of the file, with a number
    /// where another task has it as well.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub label: Option<String>,
    /// Its share of the tokens of training, beside the shares of the others; 0: it is held out, and
    /// only evaluated.
    pub share: f64,
    /// Return to ask for; default: the best one of the demonstrations.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target_return: Option<f64>,
    /// The task; without one `data.file` is needed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub task: Option<Task>,
    /// Its demonstrations.
    pub data: DataConfig,
}

impl Default for TaskConfig {
    fn default() -> Self {
        Self {
            label: None,
            share: 1.0,
            target_return: None,
            task: None,
            data: DataConfig::default(),
        }
    }
}

impl TaskConfig {
    /// Whether it is not trained on.
    pub fn is_held_out(&self) -> bool {
        self.share == 0.0
    }

    /// Whether some of its demonstrations are kept to measure the loss on.
    pub fn has_validation(&self) -> bool {
        match self.data.validation {
            Some(share) => share > 0.0,
            None => self.task.is_none(),
        }
    }

    /// `key` is where it stands.
    fn validate(&self, key: &str) -> Result<()> {
        match &self.task {
            Some(task) => task.validate().map_err(|error| {
                let key = join(key, &format!("task.{}", error.argument));
                ConfigError::value(key, error.found, error.expected)
            })?,
            None if self.data.file.is_none() => {
                return Err(ConfigError::value(
                    join(key, "task"),
                    "nothing",
                    "a table [task] with a `name`, or demonstrations of your own in `data.file`",
                ));
            }
            None => {}
        }
        real(&join(key, "share"), self.share, 0.0, 1e6)?;
        if self
            .label
            .as_deref()
            .is_some_and(|label| label.trim().is_empty())
        {
            return Err(ConfigError::value(
                join(key, "label"),
                "nothing",
                "a name, or no label",
            ));
        }
        self.data.validate(&join(key, "data"))?;
        match self.target_return {
            Some(target) => real(&join(key, "target_return"), target, -1e9, 1e9),
            None => Ok(()),
        }
    }

    fn name(&self) -> String {
        let of_file = || {
            let stem = self.data.file.as_ref()?.file_stem()?;
            Some(stem.to_string_lossy().into_owned())
        };
        match (&self.label, &self.task) {
            (Some(label), _) => label.clone(),
            (None, Some(task)) => task.name().to_owned(),
            (None, None) => of_file().unwrap_or_else(|| "own demonstrations".to_owned()),
        }
    }
}

/// The demonstrations.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DataConfig {
    /// How many; default: 4000 generated ones, or all of the file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub episodes: Option<usize>,
    /// Share of the episodes whose pairs are used.
    pub annotated: f64,
    /// What is wrong with these pairs.
    #[serde(skip_serializing_if = "AnnotationNoise::is_none")]
    pub annotation_noise: AnnotationNoise,
    /// Returns to go are divided by this.
    pub return_scale: f64,
    /// Share of the episodes, the last ones, that is not learnt from, and that the loss is measured
    /// on; default: [`DEFAULT_VALIDATION`] without a task, 0 with one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub validation: Option<f64>,
    /// Read them from here instead of generating them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file: Option<PathBuf>,
}

impl Default for DataConfig {
    fn default() -> Self {
        Self {
            episodes: None,
            annotated: 1.0,
            annotation_noise: AnnotationNoise::default(),
            return_scale: 1.0,
            validation: None,
            file: None,
        }
    }
}

impl DataConfig {
    /// Number of episodes to generate.
    pub fn generated_episodes(&self) -> usize {
        self.episodes.unwrap_or(DEFAULT_EPISODES)
    }
}

/// What the memory loss is divided by (SPEC section 3).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DenominatorKind {
    /// Squared lengths.
    Square,
    /// Causal pairs.
    Causal,
}

/// What the memory loss teaches to recall.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Supervise {
    /// Attention heads: AttentionTuner.
    Attention,
    /// The memory layer.
    Memory,
}

/// The memory loss.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LossConfig {
    /// Weight λ; 0: no memory loss.
    pub lambda: f64,
    /// What is supervised.
    pub supervise: Supervise,
    /// Supervised layer, counted from 1.
    pub layer: usize,
    /// Supervised attention heads, counted from 1, ascending.
    pub heads: Vec<usize>,
    /// What it is divided by.
    pub denominator: DenominatorKind,
}

impl Default for LossConfig {
    fn default() -> Self {
        Self {
            lambda: 10.0,
            supervise: Supervise::Attention,
            layer: 1,
            heads: vec![1],
            denominator: DenominatorKind::Square,
        }
    }
}

/// Optimiser.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OptimiserKind {
    /// Without weight decay.
    Adam,
    /// With decoupled weight decay.
    Adamw,
}

/// Learning rate over the steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ScheduleKind {
    /// The same after the warm-up.
    Constant,
    /// Half a cosine from the rate to 0.
    Cosine,
}

/// The optimisation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TrainConfig {
    /// Optimiser steps; this or `epochs`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub steps: Option<u64>,
    /// Passes over the demonstrations; this or `steps`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub epochs: Option<u64>,
    /// Most tokens of a batch.
    pub batch_tokens: usize,
    /// Parts of a batch that threads compute side by side. Part of the arithmetic: the same number
    /// gives the same bits on any number of threads.
    pub shards: usize,
    /// What a GPU computes in.
    pub precision: Precision,
    /// Optimiser.
    pub optimiser: OptimiserKind,
    /// Highest learning rate.
    pub learning_rate: f64,
    /// Learning rate over the steps.
    pub schedule: ScheduleKind,
    /// Steps over which the learning rate grows linearly.
    pub warmup_steps: u64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Largest norm of the gradient; 0: no clipping.
    pub clip: f64,
    /// Steps between two lines of `metrics.jsonl`.
    pub log_every: u64,
    /// Steps between two checkpoints.
    pub checkpoint_every: u64,
}

impl Default for TrainConfig {
    fn default() -> Self {
        Self {
            steps: None,
            epochs: None,
            batch_tokens: 4096,
            shards: 2,
            precision: Precision::default(),
            optimiser: OptimiserKind::Adam,
            learning_rate: 1e-4,
            schedule: ScheduleKind::Constant,
            warmup_steps: 0,
            weight_decay: 0.0,
            clip: 0.0,
            log_every: 50,
            checkpoint_every: 500,
        }
    }
}

/// The evaluation after training.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EvaluationConfig {
    /// Number of unseen episodes.
    pub episodes: u64,
    /// Their seed.
    pub seed: u64,
    /// Return to ask for; default: the best one of the demonstrations.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target_return: Option<f64>,
}

impl Default for EvaluationConfig {
    fn default() -> Self {
        Self {
            episodes: 500,
            seed: 0,
            target_return: None,
        }
    }
}

/// A configuration that cannot be used.
#[derive(Debug, Clone, PartialEq, Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("{file}: {message}")]
    Read {
        /// The file.
        file: String,
        /// What the system says.
        message: String,
    },
    /// Not TOML.
    #[error("{file}: not TOML: {message}")]
    Syntax {
        /// Where it was read.
        file: String,
        /// What the parser says, with line and column.
        message: String,
    },
    /// A `--set` that is not `key=value`, or reaches into something that is no table.
    #[error("--set {argument}: {message}")]
    Override {
        /// The argument.
        argument: String,
        /// What is wrong.
        message: String,
    },
    /// A key that does not exist.
    #[error("{origin}: unknown key `{key}` in {table}: {hint}")]
    UnknownKey {
        /// File or argument.
        origin: String,
        /// The key.
        key: String,
        /// Where it stands.
        table: String,
        /// The nearest key, and all of them.
        hint: String,
    },
    /// A key of another type, or one that is missing.
    #[error("{origin}: `{key}`: {message}")]
    Type {
        /// File or argument.
        origin: String,
        /// The dotted key.
        key: String,
        /// Found and expected.
        message: String,
    },
    /// A value out of its range, or one that does not fit another.
    #[error("`{key}`: found {found}, expected {expected}")]
    Value {
        /// The dotted key.
        key: String,
        /// Its value.
        found: String,
        /// What it may be, and what to do.
        expected: String,
    },
}

impl ConfigError {
    /// A [`Self::Value`].
    pub(crate) fn value(
        key: impl Into<String>,
        found: impl Display,
        expected: impl Into<String>,
    ) -> Self {
        Self::Value {
            key: key.into(),
            found: found.to_string(),
            expected: expected.into(),
        }
    }
}

/// Result of a check.
pub type Result<T> = std::result::Result<T, ConfigError>;

impl Config {
    /// Reads a file, applies `key=value` overrides and checks everything that can be checked
    /// without the data. What `[finetune]` leaves open is taken from the base.
    pub fn load(file: &Path, overrides: &[String]) -> Result<Self> {
        Self::load_finetune(file, overrides, Table::new())
    }

    /// As [`Self::load`], with keys of `[finetune]` from elsewhere.
    pub fn load_finetune(file: &Path, overrides: &[String], finetune: Table) -> Result<Self> {
        let name = file.display().to_string();
        let text = std::fs::read_to_string(file).map_err(|error| ConfigError::Read {
            file: name.clone(),
            message: error.to_string(),
        })?;
        let mut table = read(&name, &text, overrides)?;
        if !finetune.is_empty() {
            let found = table
                .entry("finetune")
                .or_insert_with(|| Value::Table(Table::new()));
            match found.as_table_mut() {
                Some(found) => found.extend(finetune),
                None => return Err(ConfigError::value("finetune", &*found, "a table")),
            }
        }
        finetune::complete(&mut table)?;
        Self::from_table(&name, table, overrides)
    }

    /// As [`Self::load`], from text alone; `origin` stands for it in errors.
    pub fn parse(origin: &str, text: &str, overrides: &[String]) -> Result<Self> {
        Self::from_table(origin, read(origin, text, overrides)?, overrides)
    }

    /// As [`Self::parse`]; what `[finetune]` leaves open is taken from the base.
    pub fn parse_on_base(origin: &str, text: &str, overrides: &[String]) -> Result<Self> {
        let mut table = read(origin, text, overrides)?;
        finetune::complete(&mut table)?;
        Self::from_table(origin, table, overrides)
    }

    fn from_table(origin: &str, table: Table, overrides: &[String]) -> Result<Self> {
        let config: Self = serde_path_to_error::deserialize(table)
            .map_err(|error| describe(origin, overrides, &error))?;
        config.validate()?;
        Ok(config)
    }

    /// The whole configuration with its defaults, as TOML.
    pub fn to_toml(&self) -> Result<String> {
        toml::to_string(self).map_err(|error| ConfigError::Syntax {
            file: "the resolved configuration".to_owned(),
            message: error.to_string(),
        })
    }

    /// Checks every value that does not depend on the data.
    pub fn validate(&self) -> Result<()> {
        whole("seed", self.seed, 0, MOST_SEED)?;
        self.validate_tasks()?;
        validate_model(&self.model)?;
        self.validate_loss()?;
        let method = self.finetune.as_ref().map(|finetune| finetune.method);
        if (method == Some(Method::Lora)) != self.model.adapter.is_some() {
            return Err(ConfigError::value(
                "model.adapter",
                match self.model.adapter {
                    Some(_) => "an adapter",
                    None => "nothing",
                },
                "an adapter with `dtmem finetune --method lora`, and only there: all else is frozen",
            ));
        }
        let share = self.finetune.as_ref().map_or(1.0, |from| from.share);
        if !(share > 0.0 && share <= 1.0) {
            let expected = "above 0, at most 1";
            return Err(ConfigError::value("finetune.share", share, expected));
        }
        self.train.validate()?;
        self.evaluation.validate()
    }

    fn validate_tasks(&self) -> Result<()> {
        if self.tasks.is_empty() {
            let [task] = &self.task_list()[..] else {
                return Ok(());
            };
            return task.validate("");
        }
        for (key, is_set) in [
            ("task", self.task.is_some()),
            ("data", self.data != DataConfig::default()),
            (
                "evaluation.target_return",
                self.evaluation.target_return.is_some(),
            ),
        ] {
            if is_set {
                return Err(ConfigError::value(
                    key,
                    "a value beside [[tasks]]",
                    "one in each of [[tasks]], which have tables `task` and `data` and a \
                     `target_return` of their own",
                ));
            }
        }
        for (index, task) in self.tasks.iter().enumerate() {
            task.validate(&format!("tasks.{index}"))?;
        }
        if self.tasks.iter().all(TaskConfig::is_held_out) {
            return Err(ConfigError::value(
                "tasks",
                "a share of 0 in each",
                "at least one that is trained on",
            ));
        }
        Ok(())
    }

    /// The tasks of the run, each by a name of its own: `[[tasks]]`, or `[task]` as a list of one.
    pub fn task_list(&self) -> Vec<TaskConfig> {
        if self.tasks.is_empty() {
            let task = TaskConfig {
                target_return: self.evaluation.target_return,
                task: self.task.clone(),
                data: self.data.clone(),
                ..TaskConfig::default()
            };
            return vec![TaskConfig {
                label: Some(task.name()),
                ..task
            }];
        }
        let mut list: Vec<TaskConfig> = Vec::with_capacity(self.tasks.len());
        for task in &self.tasks {
            let name = task.name();
            let taken =
                |label: &String| list.iter().any(|other| other.label.as_ref() == Some(label));
            let label = iter::once(name.clone())
                .chain((2..).map(|number| format!("{name}-{number}")))
                .find(|label| !taken(label));
            list.push(TaskConfig {
                label,
                ..task.clone()
            });
        }
        list
    }

    fn validate_loss(&self) -> Result<()> {
        let (loss, model) = (&self.loss, &self.model);
        real("loss.lambda", loss.lambda, 0.0, 1e9)?;
        if loss.lambda == 0.0 {
            return Ok(());
        }
        if !(1..=model.layers).contains(&loss.layer) {
            return Err(ConfigError::value(
                "loss.layer",
                loss.layer,
                format!("1 to model.layers = {}", model.layers),
            ));
        }
        let ascending = loss.heads.is_sorted_by(|a, b| a < b);
        let inside = loss.heads.iter().all(|h| (1..=model.heads).contains(h));
        if loss.heads.is_empty() || !ascending || !inside {
            return Err(ConfigError::value(
                "loss.heads",
                format!("{:?}", loss.heads),
                format!(
                    "at least one head, ascending, each 1 to model.heads = {}",
                    model.heads
                ),
            ));
        }
        let by_segment = model.attention == AttentionSpan::Segment;
        match loss.supervise {
            Supervise::Attention if by_segment => Err(ConfigError::value(
                "loss.lambda",
                loss.lambda,
                "0 with model.attention = \"segment\", because pairs cross segments; or \
                 model.attention = \"episode\", or loss.supervise = \"memory\"",
            )),
            Supervise::Memory if model.memory.is_none() || model.segment_steps == 0 => {
                Err(ConfigError::value(
                    "loss.supervise",
                    "memory",
                    "\"attention\", or a memory that is written more than once an episode: \
                     [model.memory] and model.segment_steps",
                ))
            }
            _ => Ok(()),
        }
    }

    /// How many demonstrations are learnt from, of so many.
    pub fn shared(&self, episodes: usize) -> usize {
        let share = self
            .finetune
            .as_ref()
            .map_or(1.0, |finetune| finetune.share);
        ((episodes as f64 * share).round() as usize).clamp(1, episodes.max(1))
    }

    /// The memory loss as the model takes it; none if λ is 0.
    pub fn supervision(&self) -> Option<SupervisionConfig> {
        let loss = &self.loss;
        (loss.lambda > 0.0).then(|| SupervisionConfig {
            lambda: loss.lambda,
            layer: loss.layer.saturating_sub(1),
            part: match loss.supervise {
                Supervise::Attention => {
                    SupervisedPart::Heads(loss.heads.iter().map(|h| h.saturating_sub(1)).collect())
                }
                Supervise::Memory => SupervisedPart::Memory,
            },
            denominator: match loss.denominator {
                DenominatorKind::Square => attention::Denominator::Square,
                DenominatorKind::Causal => attention::Denominator::Causal,
            },
        })
    }

    /// The first key in which another configuration would train another model, with its value
    /// there and here. How long a run goes on, what it logs and how it is evaluated may differ.
    pub fn difference(&self, other: &Self) -> Result<Option<(String, String, String)>> {
        let as_table = |config: &Self| -> Result<Table> {
            let mut config = config.clone();
            let defaults = TrainConfig::default();
            config.train.log_every = defaults.log_every;
            config.train.checkpoint_every = defaults.checkpoint_every;
            config.evaluation = EvaluationConfig::default();
            Table::try_from(config).map_err(|error| ConfigError::Syntax {
                file: "a configuration".to_owned(),
                message: error.to_string(),
            })
        };
        let (mine, theirs) = (as_table(self)?, as_table(other)?);
        Ok(first_difference("", &mine, &theirs))
    }
}

/// The largest seed that TOML can hold.
const MOST_SEED: u64 = i64::MAX as u64;
/// Far above anything trainable, low enough that sizes computed from it do not overflow.
const MOST_PARAMETERS: f64 = 4e9;

fn whole(key: &str, value: u64, least: u64, most: u64) -> Result<()> {
    if !(least..=most).contains(&value) {
        return Err(ConfigError::value(key, value, format!("{least} to {most}")));
    }
    Ok(())
}

fn real(key: &str, value: f64, least: f64, most: f64) -> Result<()> {
    if !(least..=most).contains(&value) {
        return Err(ConfigError::value(
            key,
            value,
            format!("a number from {least} to {most}"),
        ));
    }
    Ok(())
}

fn probability(key: &str, value: f64) -> Result<()> {
    if !(0.0..1.0).contains(&value) {
        return Err(ConfigError::value(key, value, "at least 0 and below 1"));
    }
    Ok(())
}

fn positive(key: &str, value: f64) -> Result<()> {
    if !(value > 0.0 && value.is_finite()) {
        return Err(ConfigError::value(key, value, "a number above 0"));
    }
    Ok(())
}

impl DataConfig {
    /// `key` is where it stands.
    fn validate(&self, key: &str) -> Result<()> {
        if let Some(episodes) = self.episodes {
            whole(&join(key, "episodes"), episodes as u64, 1, 100_000_000)?;
        }
        real(&join(key, "annotated"), self.annotated, 0.0, 1.0)?;
        self.annotation_noise.validate().map_err(|error| {
            let key = join(key, &format!("annotation_noise.{}", error.argument));
            ConfigError::value(key, error.found, error.expected)
        })?;
        if let Some(validation) = self.validation {
            probability(&join(key, "validation"), validation)?;
        }
        positive(&join(key, "return_scale"), self.return_scale)
    }
}

/// Checks a model's sizes, by their keys.
pub fn validate_model(model: &ModelConfig) -> Result<()> {
    whole("model.width", model.width as u64, 1, 1 << 16)?;
    whole("model.layers", model.layers as u64, 1, 1 << 10)?;
    whole("model.heads", model.heads as u64, 1, 1 << 16)?;
    whole("model.feed_forward", model.feed_forward as u64, 1, 1 << 20)?;
    whole(
        "model.segment_steps",
        model.segment_steps as u64,
        0,
        1 << 30,
    )?;
    if !model.width.is_multiple_of(model.heads) {
        let below = (1..=model.heads)
            .rev()
            .find(|heads| model.width.is_multiple_of(*heads))
            .unwrap_or(1);
        return Err(ConfigError::value(
            "model.heads",
            model.heads,
            format!(
                "a divisor of model.width = {}, such as {below}",
                model.width
            ),
        ));
    }
    probability("model.dropout", model.dropout)?;
    real(
        "model.observation_gain",
        model.observation_gain,
        0.0,
        1000.0,
    )?;
    if let Some(memory) = &model.memory {
        whole("model.memory.slots", memory.slots as u64, 1, 1 << 20)?;
        whole(
            "model.memory.top_k",
            memory.top_k as u64,
            0,
            memory.slots as u64,
        )?;
        real(
            "model.memory.strength_bias",
            memory.strength_bias,
            -100.0,
            100.0,
        )?;
    }
    if let Some(adapter) = &model.adapter {
        if model.memory.is_none() {
            return Err(ConfigError::value(
                "model.adapter",
                "adapters without a memory",
                "a table [model.memory] as well: adapters stand on the memory's projections",
            ));
        }
        validate_adapter(model, adapter)?;
    }
    let parameters = least_parameters(model, None);
    if parameters > MOST_PARAMETERS {
        return Err(ConfigError::value(
            "model",
            format!("at least {parameters:.1e} parameters"),
            format!("at most {MOST_PARAMETERS:.1e}: lower width, layers, feed_forward or slots"),
        ));
    }
    Ok(())
}

/// Checks an adapter of a model, by its keys.
pub fn validate_adapter(model: &ModelConfig, adapter: &AdapterConfig) -> Result<()> {
    whole(
        "model.adapter.rank",
        adapter.rank as u64,
        1,
        model.width as u64,
    )?;
    positive("model.adapter.alpha", adapter.alpha)?;
    probability("model.adapter.dropout", adapter.dropout)?;
    if !adapter.has_targets() {
        let names: Vec<&str> = adapter.targets.iter().map(|target| target.name()).collect();
        return Err(ConfigError::value(
            "model.adapter.targets",
            format!("{names:?}"),
            "at least one projection, none twice",
        ));
    }
    Ok(())
}

/// A lower bound of a model's number of parameters: the maps of the blocks and, if the spaces are
/// known, of the observations and the learned positions. Computed before anything is allocated.
pub fn least_parameters(model: &ModelConfig, spaces: Option<&Spaces>) -> f64 {
    let width = model.width as f64;
    let memory = model
        .memory
        .as_ref()
        .map_or(0.0, |memory| 5.0 * width * width + memory.slots as f64);
    let adapter = model
        .adapter
        .as_ref()
        .map_or(0.0, |adapter| adapter.rank as f64 * width);
    let block = 4.0 * width * width + 2.0 * width * model.feed_forward as f64 + memory + adapter;
    let outside = spaces.map_or(0.0, |spaces| {
        let cells_of = |family: &Family| -> f64 {
            let axes = family.observation.shape.iter().rev().skip(1);
            axes.map(|&axis| axis as f64).product()
        };
        let cells: f64 = spaces.families.iter().map(cells_of).sum();
        let positions = match model.layout {
            TokenLayout::ObsAction => 0.0,
            TokenLayout::ReturnObsAction => spaces.steps as f64,
        };
        (cells + positions) * width
    });
    model.layers as f64 * block + outside
}

/// Checks a model against what it observes and does.
pub fn validate_spaces(model: &ModelConfig, spaces: &Spaces) -> Result<()> {
    let of_grids = spaces.families.iter().any(|f| f.observation.is_grid());
    if model.front_end == FrontEnd::Convolution && !of_grids {
        let shapes = spaces.families.iter().map(|f| &f.observation.shape);
        return Err(ConfigError::value(
            "model.front_end",
            "\"convolution\"",
            format!(
                "\"linear\": observations have the shape {:?}, which is no grid of cells",
                shapes.collect::<Vec<_>>()
            ),
        ));
    }
    Ok(())
}

impl TrainConfig {
    fn validate(&self) -> Result<()> {
        match (self.steps, self.epochs) {
            (Some(steps), None) => whole("train.steps", steps, 1, u64::from(u32::MAX))?,
            (None, Some(epochs)) => whole("train.epochs", epochs, 1, 1_000_000)?,
            (steps, _) => {
                return Err(ConfigError::value(
                    "train.steps",
                    if steps.is_some() {
                        "`train.epochs` as well"
                    } else {
                        "neither it nor `train.epochs`"
                    },
                    "one of the two: remove or add one",
                ));
            }
        }
        whole(
            "train.batch_tokens",
            self.batch_tokens as u64,
            1,
            MOST_BATCH_TOKENS,
        )?;
        whole("train.shards", self.shards as u64, 1, MOST_SHARDS)?;
        positive("train.learning_rate", self.learning_rate)?;
        whole(
            "train.warmup_steps",
            self.warmup_steps,
            0,
            u64::from(u32::MAX),
        )?;
        real("train.weight_decay", self.weight_decay, 0.0, 1e3)?;
        if self.optimiser == OptimiserKind::Adam && self.weight_decay > 0.0 {
            return Err(ConfigError::value(
                "train.weight_decay",
                self.weight_decay,
                "0 with optimiser = \"adam\", or optimiser = \"adamw\"",
            ));
        }
        real("train.clip", self.clip, 0.0, 1e9)?;
        whole("train.log_every", self.log_every, 1, u64::from(u32::MAX))?;
        whole(
            "train.checkpoint_every",
            self.checkpoint_every,
            1,
            u64::from(u32::MAX),
        )
    }
}

/// More shards than any CPU has cores.
const MOST_SHARDS: u64 = 1024;
/// Most tokens of a batch.
const MOST_BATCH_TOKENS: u64 = 1 << 24;

impl EvaluationConfig {
    fn validate(&self) -> Result<()> {
        whole("evaluation.episodes", self.episodes, 1, 10_000_000)?;
        whole("evaluation.seed", self.seed, 0, MOST_SEED)?;
        match self.target_return {
            Some(target) => real("evaluation.target_return", target, -1e9, 1e9),
            None => Ok(()),
        }
    }
}

/// The table of a text, with its overrides.
fn read(origin: &str, text: &str, overrides: &[String]) -> Result<Table> {
    let mut table: Table = toml::from_str(text).map_err(|error| ConfigError::Syntax {
        file: origin.to_owned(),
        message: error.to_string().trim_end().to_owned(),
    })?;
    for argument in overrides {
        apply_override(&mut table, argument)?;
    }
    Ok(table)
}

/// Sets a dotted key. The value is TOML, or else a string; an empty one removes the key, which
/// brings its default back. `train.steps` and `train.epochs` replace each other.
pub(crate) fn apply_override(table: &mut Table, argument: &str) -> Result<()> {
    let error = |message: String| ConfigError::Override {
        argument: argument.to_owned(),
        message,
    };
    let (path, text) = argument
        .split_once('=')
        .ok_or_else(|| error("expected key=value, such as train.steps=1000".to_owned()))?;
    let (path, text) = (path.trim(), text.trim());
    let keys: Vec<&str> = path.split('.').map(str::trim).collect();
    let Some((last, tables)) = keys.split_last() else {
        return Err(error("expected a key before `=`".to_owned()));
    };
    if keys.iter().any(|key| key.is_empty()) {
        return Err(error(format!("`{path}` is not a dotted key")));
    }
    let mut current = table;
    let mut tables = tables.iter();
    while let Some(key) = tables.next() {
        let mut value = current
            .entry(*key)
            .or_insert_with(|| Value::Table(Table::new()));
        // The tables of a list are counted from 0: `tasks.1.share`.
        if let Value::Array(list) = value {
            let count = list.len();
            let number = tables.next().ok_or_else(|| {
                error(format!(
                    "`{key}` is a list: expected a key of one entry, such as {key}.0.share"
                ))
            })?;
            let place = number
                .parse()
                .ok()
                .and_then(|place: usize| list.get_mut(place));
            value = place.ok_or_else(|| {
                error(format!(
                    "`{key}` is a list of {count}, counted from 0: `{number}` is none of them"
                ))
            })?;
        }
        current = value
            .as_table_mut()
            .ok_or_else(|| error(format!("`{key}` is a value, not a table")))?;
    }
    if text.is_empty() {
        current.remove(*last);
        return Ok(());
    }
    match path {
        "train.steps" => current.remove("epochs"),
        "train.epochs" => current.remove("steps"),
        _ => None,
    };
    let value = toml::from_str::<Table>(&format!("value = {text}"))
        .ok()
        .filter(|parsed| parsed.len() == 1)
        .and_then(|mut parsed| parsed.remove("value"))
        .unwrap_or_else(|| Value::String(text.to_owned()));
    current.insert((*last).to_owned(), value);
    Ok(())
}

/// Turns serde's error into one that names the key, its table and, if it is unknown, the nearest
/// one. The valid keys are read from serde's own message, so they are listed in one place only:
/// the structs above.
pub(crate) fn describe(
    origin: &str,
    overrides: &[String],
    error: &serde_path_to_error::Error<toml::de::Error>,
) -> ConfigError {
    // `tasks[0].share` as `tasks.0.share`, as it is set.
    let path = error.path().to_string().replace('[', ".").replace(']', "");
    let path = if path == "." { "" } else { &path };
    let message = error.inner().message().trim();
    let origin_of = |key: &str| {
        overrides
            .iter()
            .rev()
            .find(|argument| {
                let set = argument.split('=').next().unwrap_or_default().trim();
                set == key || set.starts_with(&format!("{key}."))
            })
            .map_or_else(|| origin.to_owned(), |argument| format!("--set {argument}"))
    };
    let mut quoted = message.split('`').skip(1).step_by(2);
    if message.starts_with("unknown field")
        && let Some(key) = quoted.next()
    {
        let valid: Vec<&str> = quoted.collect();
        let table = path.strip_suffix(key).map_or(path, |t| {
            if t.is_empty() || t.ends_with('.') {
                t.trim_end_matches('.')
            } else {
                path
            }
        });
        let full = join(table, key);
        return ConfigError::UnknownKey {
            origin: origin_of(&full),
            key: key.to_owned(),
            table: if table.is_empty() {
                "the top level".to_owned()
            } else {
                format!("[{table}]")
            },
            hint: nearest(key, &valid).map_or_else(
                || "this table has no keys".to_owned(),
                |nearest| format!("did you mean `{nearest}`? Valid keys: {}", valid.join(", ")),
            ),
        };
    }
    ConfigError::Type {
        origin: origin_of(path),
        key: if path.is_empty() {
            "the top level"
        } else {
            path
        }
        .to_owned(),
        message: message.to_owned(),
    }
}

/// The word that is fewest edits away.
fn nearest<'a>(word: &str, candidates: &[&'a str]) -> Option<&'a str> {
    candidates
        .iter()
        .copied()
        .min_by_key(|candidate| strsim::damerau_levenshtein(word, candidate))
}

pub(super) fn join(table: &str, key: &str) -> String {
    if table.is_empty() {
        key.to_owned()
    } else {
        format!("{table}.{key}")
    }
}

fn first_difference(prefix: &str, a: &Table, b: &Table) -> Option<(String, String, String)> {
    let mut keys: Vec<&String> = a.keys().chain(b.keys()).collect();
    keys.sort_unstable();
    keys.dedup();
    keys.into_iter().find_map(|key| {
        let path = join(prefix, key);
        let show = |value: Option<&Value>| value.map_or("nothing".to_owned(), Value::to_string);
        match (a.get(key), b.get(key)) {
            (Some(Value::Table(a)), Some(Value::Table(b))) => first_difference(&path, a, b),
            (a, b) if a == b => None,
            (a, b) => Some((path, show(a), show(b))),
        }
    })
}
