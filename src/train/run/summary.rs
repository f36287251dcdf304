//! What a run comes to.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::without_memory;
use crate::backend::Backend;
use crate::model::Model;
use crate::tasks::write_beside;
use crate::train::evaluate::{TaskResult, Validation, wilson};
use crate::train::finetune::Adaptation;
use crate::train::metrics::{Record, per_second};
use crate::train::{Error, plots};

/// The last line on stdout.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Summary {
    /// Name of the task; none for demonstrations of one's own, and for several tasks.
    pub task: Option<String>,
    /// Share of the episodes of all tasks that ended in success.
    pub success_rate: Option<f64>,
    /// Its 95 % interval.
    pub interval: Option<[f64; 2]>,
    /// Unseen episodes played.
    pub episodes: u64,
    /// Each of several tasks.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tasks: Vec<TaskSummary>,
    /// The loss on demonstrations that were kept from learning, of each task that has such.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub validation: Vec<Validation>,
    /// Optimiser steps behind the model.
    pub steps: u64,
    /// Seconds of training (`train`) or of acting (`eval`).
    pub seconds: f64,
    /// Tokens of these seconds; none of them is padding.
    pub real_tokens_per_s: f64,
    /// Number of parameters.
    pub parameters: usize,
    /// How many of them are trained.
    pub trained_parameters: usize,
    /// How a base was adapted, and what its own tasks lost by it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub adaptation: Option<Adaptation>,
}

/// A line of `evaluations.jsonl`: what the model was worth during training.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Evaluated {
    /// Optimiser steps done.
    pub step: u64,
    /// Tokens learnt from so far.
    pub tokens: u64,
    /// Each task that can be played, also if it is the only one.
    pub tasks: Vec<TaskSummary>,
    /// The loss on demonstrations that were kept from learning, of each task that has such.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub validation: Vec<Validation>,
}

impl Record for Evaluated {
    fn step(&self) -> u64 {
        self.step
    }
}

/// What one of several tasks came to.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TaskSummary {
    /// Its name among the tasks of the run.
    pub label: String,
    /// Name of the task.
    pub task: String,
    /// Whether it was not trained on.
    pub held_out: bool,
    /// Share of its episodes that ended in success.
    pub success_rate: f64,
    /// Its 95 % interval.
    pub interval: [f64; 2],
    /// About the success rate without memory.
    pub without_memory: f64,
    /// Mean return of its episodes.
    pub mean_return: f64,
    /// Unseen episodes played.
    pub episodes: u64,
}

impl From<&TaskResult> for TaskSummary {
    fn from(result: &TaskResult) -> Self {
        let evaluation = &result.evaluation;
        Self {
            label: result.label.clone(),
            task: result.task.name().to_owned(),
            held_out: result.held_out,
            success_rate: evaluation.success_rate(),
            interval: evaluation.interval(),
            without_memory: result.task.chance(),
            mean_return: evaluation.mean_return,
            episodes: evaluation.episodes,
        }
    }
}

impl Summary {
    /// The summary of a model that was trained or only evaluated for `seconds`, over `tokens`.
    pub fn new<B: Backend<Element = f32>>(
        results: &[TaskResult],
        model: &Model<B>,
        steps: u64,
        tokens: u64,
        seconds: f64,
    ) -> Self {
        let sum = |of: fn(&TaskResult) -> u64| results.iter().map(of).sum::<u64>();
        let episodes = sum(|result| result.evaluation.episodes);
        let successes = sum(|result| result.evaluation.successes);
        let (task, tasks) = match results {
            [] => (None, Vec::new()),
            [only] => (Some(only.task.name().to_owned()), Vec::new()),
            several => (None, several.iter().map(TaskSummary::from).collect()),
        };
        Self {
            task,
            success_rate: (episodes > 0).then(|| successes as f64 / episodes as f64),
            interval: (episodes > 0).then(|| wilson(successes, episodes)),
            episodes,
            tasks,
            validation: Vec::new(),
            steps,
            seconds,
            real_tokens_per_s: per_second(tokens, seconds),
            parameters: model.parameter_count(),
            trained_parameters: model.trained_count(),
            adaptation: None,
        }
    }
}

pub(super) fn save_summary(path: &Path, summary: &Summary) -> Result<(), Error> {
    let mut text = serde_json::to_string(summary)
        .map_err(|error| Error::file(path, "contents", error, "numbers"))?;
    text.push('\n');
    write_beside(path, text.as_bytes()).map_err(Error::io("write it", path))
}

/// Success rates, each with its interval and what it is to be compared with.
pub fn result_lines(results: &[TaskResult]) -> Vec<String> {
    let line = |result: &TaskResult| {
        let evaluation = &result.evaluation;
        let [low, high] = evaluation.interval();
        let called = match (results.len(), result.held_out) {
            (1, _) => String::new(),
            (_, false) => format!("{}: ", result.label),
            (_, true) => format!("{} (held out): ", result.label),
        };
        format!(
            "{called}success rate {:.1} % (95 % interval {:.1} to {:.1}), mean return {:.3}, on {} \
             unseen episodes; {}",
            100.0 * evaluation.success_rate(),
            100.0 * low,
            100.0 * high,
            evaluation.mean_return,
            evaluation.episodes,
            without_memory(&result.task)
        )
    };
    results.iter().map(line).collect()
}

/// A loss on demonstrations that were kept from learning.
pub fn validation_line(validation: &Validation) -> String {
    let predicted = match validation.accuracy {
        Some(accuracy) => format!(", {:.1} % of the actions right", 100.0 * accuracy),
        None => " (squared error)".to_owned(),
    };
    let memory = validation.memory_loss.map_or(String::new(), |loss| {
        format!(", memory loss {}", plots::significant(loss))
    });
    format!(
        "{}: loss {:.4}{predicted}{memory}, on {} unseen demonstrations",
        validation.label, validation.loss, validation.episodes
    )
}
