//! Acting in a task, and counting successes.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::Error;
use super::config::{Config, ConfigError, TaskConfig};
use super::data::TrainingData;
use crate::backend::Backend;
use crate::batch::{PackedBatch, Trajectory};
use crate::model::{Actor, Model, ModelError};
use crate::spaces::ActionSpace;
use crate::tasks::{Split, Task};

/// About so many tokens of demonstrations are measured at once.
const VALIDATION_TOKENS: usize = 4096;
/// 0.975 quantile of the normal distribution.
const Z: f64 = 1.959_963_984_540_054;

/// Which episodes, and what the model is told about the return.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Conditions {
    /// How many episodes.
    pub episodes: u64,
    /// Their seed, in [`Split::Evaluation`].
    pub seed: u64,
    /// The return to ask for.
    pub target_return: f64,
    /// Returns are divided by this.
    pub return_scale: f64,
}

/// The result.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Evaluation {
    /// Episodes played.
    pub episodes: u64,
    /// Episodes that ended in success.
    pub successes: u64,
    /// Mean return.
    pub mean_return: f64,
    /// Tokens computed.
    pub tokens: u64,
    /// Seconds taken.
    pub seconds: f64,
}

impl Evaluation {
    /// Share of successes.
    pub fn success_rate(&self) -> f64 {
        self.successes as f64 / self.episodes.max(1) as f64
    }

    /// Its 95 % interval.
    pub fn interval(&self) -> [f64; 2] {
        wilson(self.successes, self.episodes)
    }
}

/// What one of the tasks of a run came to.
#[derive(Debug, Clone, PartialEq)]
pub struct TaskResult {
    /// The task's name among those of the run.
    pub label: String,
    /// The task.
    pub task: Task,
    /// Whether it was not trained on.
    pub held_out: bool,
    /// What the model did.
    pub evaluation: Evaluation,
}

/// Which episodes of all tasks.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Episodes {
    /// How many of each task.
    pub each: u64,
    /// Their seed, in [`Split::Evaluation`].
    pub seed: u64,
}

/// [`evaluate`] on each of the tasks that are more than a file. `target_returns` has one for each
/// of `tasks`; `progress` is told how many of how many episodes are done.
pub fn evaluate_all<B: Backend<Element = f32>>(
    model: &Model<B>,
    tasks: &[TaskConfig],
    target_returns: &[f64],
    episodes: Episodes,
    stop: &AtomicBool,
    mut progress: impl FnMut(u64, u64),
) -> Result<Option<Vec<TaskResult>>, Error> {
    let played: Vec<_> = tasks
        .iter()
        .zip(target_returns)
        .filter_map(|(config, target)| Some((config, config.task.as_ref()?, target)))
        .collect();
    let total = episodes.each * played.len() as u64;
    let mut results = Vec::with_capacity(played.len());
    for (config, task, &target_return) in played {
        let conditions = Conditions {
            episodes: episodes.each,
            seed: episodes.seed,
            target_return,
            return_scale: config.data.return_scale,
        };
        let before = results.len() as u64 * episodes.each;
        let watch = |done| progress(before + done, total);
        let Some(evaluation) = evaluate(model, task, &conditions, stop, watch)? else {
            return Ok(None);
        };
        results.push(TaskResult {
            label: config.label.clone().unwrap_or_default(),
            task: task.clone(),
            held_out: config.is_held_out(),
            evaluation,
        });
    }
    Ok(Some(results))
}

/// The loss on demonstrations that were not learnt from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Validation {
    /// The task's name among those of the run.
    pub label: String,
    /// How many of them.
    pub episodes: u64,
    /// Mean cross-entropy of their actions in nats, or mean squared error of continuous ones.
    pub loss: f64,
    /// Share of the actions predicted right; none where they are continuous.
    pub accuracy: Option<f64>,
    /// The memory loss, without λ; none without one, and where no demonstration is annotated.
    pub memory_loss: Option<f64>,
    /// Tokens computed.
    #[serde(skip)]
    pub tokens: u64,
    /// Seconds taken.
    #[serde(skip)]
    pub seconds: f64,
}

/// The demonstrations of a run's tasks that keep some of them from learning, by the task's label.
pub fn validation_data(config: &Config) -> Result<Vec<(String, TrainingData)>, Error> {
    let tasks = config.task_list().into_iter();
    tasks
        .filter(TaskConfig::has_validation)
        .map(|task| {
            let data = TrainingData::prepare(&task, config, "", |_| {})?;
            Ok((task.label.unwrap_or_default(), data))
        })
        .collect()
}

/// The loss on each task's demonstrations that were not learnt from. None if `stop` was set
/// meanwhile.
pub fn validate_all<'a, B: Backend<Element = f32>>(
    model: &Model<B>,
    tasks: impl Iterator<Item = (&'a str, &'a TrainingData)>,
    stop: &AtomicBool,
) -> Result<Option<Vec<Validation>>, Error> {
    tasks
        .filter(|(_, data)| !data.unseen().is_empty())
        .map(|(label, data)| validate(model, label.to_owned(), data, stop))
        .collect()
}

/// The loss on a task's demonstrations that were not learnt from.
fn validate<B: Backend<Element = f32>>(
    model: &Model<B>,
    label: String,
    data: &TrainingData,
    stop: &AtomicBool,
) -> Result<Option<Validation>, Error> {
    let start = Instant::now();
    let family = model.spaces().position(data.family()).ok_or_else(|| {
        let expected = "demonstrations of what the model observes and does";
        ConfigError::value("data.file", data.family(), expected)
    })?;
    let action = data.family().action;
    let mut packer = model.packer();
    let mut alone = model.packer();
    let mut of_memory = [0.0; 2];
    let (mut loss, mut correct, mut actions, mut tokens) = (0.0, 0_u64, 0_u64, 0);
    let mut measure = |batch: &PackedBatch| -> Result<(), Error> {
        let outputs = model.logits(batch)?;
        let width = action.outputs();
        for (row, output) in outputs.chunks_exact(width).enumerate() {
            match action {
                ActionSpace::Discrete(_) => {
                    let target = usize::try_from(batch.targets[row]).unwrap_or_default();
                    loss += cross_entropy(output, target);
                    let best = |(index, &logit): (usize, &f32)| match index < target {
                        true => logit < output[target],
                        false => logit <= output[target],
                    };
                    correct += u64::from(output.iter().enumerate().all(best));
                }
                ActionSpace::Continuous(size) => {
                    let targets = &batch.real_targets[row * size..][..size];
                    let squares = output
                        .iter()
                        .zip(targets)
                        .map(|(y, t)| f64::from(y - t).powi(2));
                    loss += squares.sum::<f64>() / size as f64;
                }
            }
            actions += 1;
        }
        tokens += batch.tokens() as u64;
        Ok(())
    };
    for episode in data.unseen() {
        if stop.load(Ordering::Relaxed) {
            return Ok(None);
        }
        let Some(trajectory) = data.trajectory(episode) else {
            continue;
        };
        let trajectory = Trajectory {
            family,
            ..trajectory
        };
        if let Some(supervision) = model.supervision() {
            alone.clear();
            alone.push_trajectory(trajectory)?;
            of_memory[0] += model.memory_loss(alone.batch())?;
            of_memory[1] += supervision.divisor(alone.batch());
        }
        packer.push_trajectory(trajectory)?;
        if packer.batch().tokens() >= VALIDATION_TOKENS {
            measure(packer.batch())?;
            packer.clear();
        }
    }
    if packer.batch().tokens() > 0 {
        measure(packer.batch())?;
    }
    let share = 1.0 / actions.max(1) as f64;
    Ok(Some(Validation {
        label,
        episodes: data.unseen().len() as u64,
        loss: loss * share,
        accuracy: action.is_discrete().then_some(correct as f64 * share),
        memory_loss: (of_memory[1] > 0.0).then_some(of_memory[0] / of_memory[1]),
        tokens,
        seconds: start.elapsed().as_secs_f64(),
    }))
}

/// −log softmax(logits)\[target\].
fn cross_entropy(logits: &[f32], target: usize) -> f64 {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&l| f64::from(l - largest).exp()).sum();
    sum.ln() - f64::from(logits[target] - largest)
}

/// Wilson's 95 % interval of a share.
pub fn wilson(successes: u64, episodes: u64) -> [f64; 2] {
    if episodes == 0 {
        return [0.0, 1.0];
    }
    let n = episodes as f64;
    let share = successes as f64 / n;
    let denominator = 1.0 + Z * Z / n;
    let centre = (share + Z * Z / (2.0 * n)) / denominator;
    let half = Z * (share * (1.0 - share) / n + Z * Z / (4.0 * n * n)).sqrt() / denominator;
    // At 0 and n successes the bound is exactly 0 or 1; rounding must not miss it.
    let low = if successes == 0 { 0.0 } else { centre - half };
    let high = if successes >= episodes {
        1.0
    } else {
        centre + half
    };
    [low.max(0.0), high.min(1.0)]
}

/// Plays episodes never seen in training, with the greedy action and the full history. `progress`
/// is told how many episodes are done. None if `stop` was set meanwhile.
pub fn evaluate<B: Backend<Element = f32>>(
    model: &Model<B>,
    task: &Task,
    conditions: &Conditions,
    stop: &AtomicBool,
    mut progress: impl FnMut(u64),
) -> Result<Option<Evaluation>, Error> {
    let start = Instant::now();
    let family = model.spaces().position(&task.family()).ok_or_else(|| {
        let found = format!("{}, with {}", task.name(), task.family());
        ConfigError::value(
            "task",
            found,
            "a task that observes and acts as the model does",
        )
    })?;
    let mut batch = model.episodes_at_once() as u64;
    let mut result = Evaluation {
        episodes: 0,
        successes: 0,
        mean_return: 0.0,
        tokens: 0,
        seconds: 0.0,
    };
    let mut sum = 0.0;
    while result.episodes < conditions.episodes {
        let first = result.episodes;
        let count = batch.min(conditions.episodes - first);
        let episodes = first..first + count;
        let done = match play(model, family, task, conditions, episodes, stop) {
            // Somebody else has taken what was free.
            Err(Error::Model(ModelError::OutOfMemory { .. })) if count > 1 => {
                batch = count / 2;
                continue;
            }
            done => done?,
        };
        let Some(done) = done else { return Ok(None) };
        result.episodes += count;
        result.successes += done.successes;
        result.tokens += done.tokens;
        sum += done.returns;
        progress(result.episodes);
    }
    result.mean_return = sum / result.episodes.max(1) as f64;
    result.seconds = start.elapsed().as_secs_f64();
    Ok(Some(result))
}

struct Played {
    successes: u64,
    tokens: u64,
    returns: f64,
}

fn play<B: Backend<Element = f32>>(
    model: &Model<B>,
    family: usize,
    task: &Task,
    conditions: &Conditions,
    episodes: std::ops::Range<u64>,
    stop: &AtomicBool,
) -> Result<Option<Played>, Error> {
    let mut environments = episodes
        .map(|episode| task.reset(Split::Evaluation, conditions.seed, episode))
        .collect::<Result<Vec<_>, _>>()?;
    let mut actor = Actor::new(model, family, environments.len())?;
    let fields = task.observation_space().fields();
    let per_step = model.config().layout.tokens_per_step();
    let mut active: Vec<usize> = (0..environments.len()).collect();
    let mut rewards = vec![0.0; environments.len()];
    let mut observations = Vec::new();
    let mut returns = Vec::new();
    let mut played = Played {
        successes: 0,
        tokens: 0,
        returns: 0.0,
    };
    while !active.is_empty() {
        if stop.load(Ordering::Relaxed) {
            return Ok(None);
        }
        observations.resize(active.len() * fields, 0);
        returns.clear();
        for (codes, &episode) in observations.chunks_exact_mut(fields).zip(&active) {
            environments[episode].observe(codes);
            let to_go = conditions.target_return - rewards[episode];
            returns.push((to_go / conditions.return_scale) as f32);
        }
        let actions = actor.act(model, &active, &observations, &returns)?;
        played.tokens += (active.len() * per_step) as u64;
        let mut actions = actions.bytes().iter();
        active.retain(|&episode| {
            let action = actions.next().copied().unwrap_or_default();
            let outcome = environments[episode].step(action.into());
            rewards[episode] += outcome.reward;
            played.successes += u64::from(outcome.over() && outcome.success);
            !outcome.over()
        });
    }
    played.returns = rewards.iter().sum();
    Ok(Some(played))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interval_agrees_with_published_values() {
        // R: prop.test(81, 263, correct = FALSE)
        let [low, high] = wilson(81, 263);
        assert!((low - 0.2553).abs() < 5e-4 && (high - 0.3662).abs() < 5e-4);
        assert_eq!(wilson(0, 10)[0], 0.0);
        assert!((wilson(0, 10)[1] - 0.2775).abs() < 5e-4);
        assert_eq!(wilson(10, 10)[1], 1.0);
        assert_eq!(wilson(0, 0), [0.0, 1.0]);
    }
}
