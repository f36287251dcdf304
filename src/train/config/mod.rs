//! What a run is made of, read from TOML (docs/configuration.md explains every key).

mod check;
mod error;
mod read;

use std::iter;
use std::path::PathBuf;

use dtmem_reference::attention;
use serde::{Deserialize, Serialize};

use super::device::Precision;
use super::finetune::FinetuneConfig;
use crate::model::{ModelConfig, SupervisedPart, SupervisionConfig};
use crate::tasks::{AnnotationNoise, Task};
pub(super) use check::join;
pub use check::{least_parameters, validate_adapter, validate_model, validate_spaces};
pub use error::{ConfigError, Result};
pub(crate) use read::{apply_override, describe};

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

/// The evaluation after training, and during it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EvaluationConfig {
    /// Number of unseen episodes.
    pub episodes: u64,
    /// Their seed.
    pub seed: u64,
    /// Optimiser steps between two evaluations during training; 0: there is only the one at the end.
    pub every: u64,
    /// Return to ask for; default: the best one of the demonstrations.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target_return: Option<f64>,
}

impl Default for EvaluationConfig {
    fn default() -> Self {
        Self {
            episodes: 500,
            seed: 0,
            every: 0,
            target_return: None,
        }
    }
}

impl Config {
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
}
