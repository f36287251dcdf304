//! The order in which demonstrations are learnt from, and how they become packed batches.

use std::path::Path;

use rand::SeedableRng;
use rand::rngs::ChaCha8Rng;
use rand::seq::SliceRandom;

use super::Error;
use super::config::{Config, ConfigError};
use crate::batch::{BatchError, PackedBatch, Packer, TokenLayout, Trajectory};
use crate::model::{Capacity, ModelConfig, Spaces};
use crate::tasks::{Demonstrations, EpisodeView, Task};

/// Demonstrations and what the model is told about their returns.
#[derive(Debug)]
pub struct TrainingData {
    demonstrations: Demonstrations,
    /// How many of them are used, from the start.
    episodes: usize,
    /// Returns to go of all steps, divided by the scale.
    returns: Vec<f32>,
    /// Where each episode's returns start.
    starts: Vec<usize>,
    best_return: f64,
}

impl TrainingData {
    /// Generates or reads what the configuration asks for, and checks that it fits the task.
    /// `progress` is told how many episodes are there.
    pub fn prepare(config: &Config, progress: impl FnMut(usize)) -> Result<Self, Error> {
        let (demonstrations, episodes) = match (&config.data.file, &config.task) {
            (Some(file), task) => {
                let demonstrations = read(file, config, task.as_ref())?;
                let available = demonstrations.len();
                let episodes = config.data.episodes.unwrap_or(available);
                if episodes > available {
                    return Err(ConfigError::value(
                        "data.episodes",
                        episodes,
                        format!("at most the {available} of {}", file.display()),
                    )
                    .into());
                }
                (demonstrations, episodes)
            }
            (None, Some(task)) => {
                let episodes = config.data.generated_episodes();
                let share = config.data.annotated;
                let demonstrations =
                    Demonstrations::generate(task, episodes, config.seed, share, progress)
                        .map_err(|error| {
                            ConfigError::value(
                                format!("task.{}", error.argument),
                                error.found,
                                error.expected,
                            )
                        })?;
                (demonstrations, episodes)
            }
            (None, None) => {
                return Err(ConfigError::value("task", "nothing", "a task, or `data.file`").into());
            }
        };
        Ok(Self::new(
            demonstrations,
            episodes,
            config.data.return_scale,
        ))
    }

    /// The first `episodes` of a set; returns to go are divided by `return_scale`.
    pub fn new(demonstrations: Demonstrations, episodes: usize, return_scale: f64) -> Self {
        let mut returns = vec![0.0; demonstrations.steps()];
        let mut starts = Vec::with_capacity(demonstrations.len());
        let mut best_return = f64::NEG_INFINITY;
        let mut start = 0;
        for episode in demonstrations.episodes().take(episodes) {
            let mut to_go = 0.0;
            let span = &mut returns[start..start + episode.steps()];
            for (value, reward) in span.iter_mut().zip(episode.rewards).rev() {
                to_go += f64::from(*reward);
                *value = (to_go / return_scale) as f32;
            }
            best_return = best_return.max(to_go);
            starts.push(start);
            start += episode.steps();
        }
        Self {
            episodes: starts.len(),
            demonstrations,
            returns,
            starts,
            best_return,
        }
    }

    /// Number of episodes in use.
    pub fn episodes(&self) -> usize {
        self.episodes
    }

    /// How many of them are annotated.
    pub fn annotated(&self) -> usize {
        self.views().filter(|episode| episode.annotated).count()
    }

    /// The best return of a whole episode, not scaled.
    pub fn best_return(&self) -> f64 {
        self.best_return
    }

    /// What the data asks of a model: the observations and actions of the demonstrations, and
    /// episodes as long as the longest of the data or of the task.
    pub fn spaces(&self, task: Option<&Task>) -> Spaces {
        let space = self.demonstrations.space();
        Spaces {
            observation: space.shape.clone(),
            cardinalities: space.cardinalities.clone(),
            actions: self.demonstrations.action_count(),
            steps: self.longest().max(task.map_or(0, Task::max_steps)),
        }
    }

    /// Time steps of the longest episode in use.
    pub fn longest(&self) -> usize {
        self.views()
            .map(|episode| episode.steps())
            .max()
            .unwrap_or(0)
    }

    /// Tokens of every episode in use.
    pub fn token_counts(&self, layout: TokenLayout) -> Vec<usize> {
        self.views()
            .map(|episode| episode.steps() * layout.tokens_per_step())
            .collect()
    }

    /// One episode as the packer takes it.
    pub fn trajectory(&self, episode: usize) -> Option<Trajectory<'_>> {
        let view = self.demonstrations.episode(episode)?;
        let start = *self.starts.get(episode)?;
        Some(Trajectory {
            observations: view.observations,
            actions: view.actions,
            returns: self.returns.get(start..start + view.steps())?,
            pairs: view.pairs,
            annotated: view.annotated,
        })
    }

    fn views(&self) -> impl Iterator<Item = EpisodeView<'_>> {
        self.demonstrations.episodes().take(self.episodes)
    }
}

/// Reads a demonstration file and checks it against the task.
fn read(file: &Path, config: &Config, task: Option<&Task>) -> Result<Demonstrations, Error> {
    let mut demonstrations = Demonstrations::load(file)?;
    demonstrations
        .limit_annotations(config.data.annotated)
        .map_err(|error| ConfigError::value("data.annotated", error.found, error.expected))?;
    if demonstrations.is_empty() {
        return Err(
            ConfigError::value("data.file", "no episode", "a file with episodes in it").into(),
        );
    }
    if let Some(task) = task {
        let expected = (task.observation_space(), task.actions());
        let (space, actions) = (demonstrations.space(), demonstrations.action_count());
        if (space, actions) != (&expected.0, expected.1) {
            let describe = |shape: &[usize], codes: &[usize], actions: usize| {
                format!("observations {shape:?} of {codes:?} codes and {actions} actions")
            };
            return Err(ConfigError::value(
                "data.file",
                format!(
                    "{} in {}",
                    describe(&space.shape, &space.cardinalities, actions),
                    file.display()
                ),
                format!(
                    "{}, which the task `{}` has",
                    describe(&expected.0.shape, &expected.0.cardinalities, expected.1),
                    task.name()
                ),
            )
            .into());
        }
    }
    Ok(demonstrations)
}

/// Where in the endless order of the data a batch starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
pub struct Position {
    /// Pass over the data, from 0.
    pub epoch: u64,
    /// Episodes of this pass that have been used.
    pub cursor: usize,
}

/// Chooses the episodes of every batch: each epoch is a permutation that depends on (seed, epoch)
/// only, and batches are filled in that order, without a break at the end of an epoch, until the
/// next episode would exceed the token budget.
#[derive(Debug, Clone)]
pub struct BatchOrder {
    token_counts: Vec<usize>,
    budget: usize,
    seed: u64,
    position: Position,
    /// The permutation of `position.epoch`.
    order: Vec<u32>,
}

impl BatchOrder {
    /// The order of a run. The budget must hold the longest episode, and must not exceed all
    /// episodes together (so no batch can hold an episode three times).
    pub fn new(token_counts: Vec<usize>, budget: usize, seed: u64) -> Result<Self, ConfigError> {
        let longest = token_counts.iter().copied().max().unwrap_or(0);
        let all: usize = token_counts.iter().sum();
        if budget < longest {
            return Err(ConfigError::value(
                "train.batch_tokens",
                budget,
                format!("at least {longest}, the tokens of the longest demonstration"),
            ));
        }
        if budget > all {
            return Err(ConfigError::value(
                "train.batch_tokens",
                budget,
                format!("at most {all}, the tokens of all demonstrations; or more demonstrations"),
            ));
        }
        let order = (0..token_counts.len() as u32).collect();
        let mut order = Self {
            token_counts,
            budget,
            seed,
            position: Position::default(),
            order,
        };
        order.shuffle();
        Ok(order)
    }

    /// Where the next batch starts.
    pub fn position(&self) -> Position {
        self.position
    }

    /// Continues from a position that [`Self::position`] gave; false if there is no such position.
    pub fn seek(&mut self, position: Position) -> bool {
        if position.cursor >= self.order.len() {
            return false;
        }
        self.position = position;
        self.shuffle();
        true
    }

    /// Puts the next batch's episodes into `episodes`.
    pub fn next_batch(&mut self, episodes: &mut Vec<usize>) {
        episodes.clear();
        let mut tokens = 0;
        loop {
            let episode = self.order[self.position.cursor] as usize;
            tokens += self.token_counts[episode];
            if tokens > self.budget {
                break;
            }
            episodes.push(episode);
            self.position.cursor += 1;
            if self.position.cursor == self.order.len() {
                self.position.cursor = 0;
                self.position.epoch += 1;
                self.shuffle();
            }
        }
    }

    /// Number of batches until every episode has been used `epochs` times; the last one goes on
    /// into the next epoch.
    pub fn steps_of(&self, epochs: u64) -> u64 {
        let mut order = self.clone();
        order.seek(Position::default());
        let mut episodes = Vec::new();
        let mut steps = 0;
        while order.position.epoch < epochs {
            order.next_batch(&mut episodes);
            steps += 1;
        }
        steps
    }

    /// Upper bounds of every batch.
    pub fn capacity(&self, model: &ModelConfig) -> Capacity {
        let per_step = model.layout.tokens_per_step();
        let shortest = self.token_counts.iter().copied().min().unwrap_or(1).max(1);
        let observations = self.budget / per_step;
        let sequences = self.budget / shortest;
        let segments = match model.segment_steps {
            0 => sequences,
            // Every segment but the last of a sequence is full.
            steps => sequences + observations / steps,
        };
        Capacity {
            tokens: self.budget,
            observations,
            sequences,
            segments,
        }
    }

    /// The permutation of the current epoch: a Fisher–Yates shuffle from the identity.
    fn shuffle(&mut self) {
        let mut key = [0; 32];
        key[..8].copy_from_slice(&self.seed.to_le_bytes());
        key[8..16].copy_from_slice(&self.position.epoch.to_le_bytes());
        for (index, place) in self.order.iter_mut().zip(0..) {
            *index = place;
        }
        self.order.shuffle(&mut ChaCha8Rng::from_seed(key));
    }
}

/// Draws batches in order. Nothing is allocated once the buffers have grown to a batch's size.
#[derive(Debug)]
pub struct Batches<'a> {
    data: &'a TrainingData,
    order: BatchOrder,
    packer: Packer,
    episodes: Vec<usize>,
}

impl<'a> Batches<'a> {
    /// Batches of `data` in an order, packed by the model's packer.
    pub fn new(data: &'a TrainingData, order: BatchOrder, packer: Packer) -> Self {
        Self {
            data,
            order,
            packer,
            episodes: Vec::new(),
        }
    }

    /// Where the next batch starts.
    pub fn position(&self) -> Position {
        self.order.position()
    }

    /// Continues from a position; false if there is no such position.
    pub fn seek(&mut self, position: Position) -> bool {
        self.order.seek(position)
    }

    /// The next batch.
    pub fn next_batch(&mut self) -> Result<&PackedBatch, BatchError> {
        self.order.next_batch(&mut self.episodes);
        self.packer.clear();
        let trajectories = self
            .episodes
            .iter()
            .filter_map(|&e| self.data.trajectory(e));
        for trajectory in trajectories {
            self.packer.push_trajectory(trajectory)?;
        }
        Ok(self.packer.batch())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The episodes of the first batches, and how many of them each batch has.
    fn take(order: &mut BatchOrder, batches: usize) -> (Vec<usize>, Vec<usize>) {
        let (mut all, mut sizes, mut batch) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..batches {
            order.next_batch(&mut batch);
            all.extend(&batch);
            sizes.push(batch.len());
        }
        (all, sizes)
    }

    proptest! {
        #[test]
        fn every_epoch_is_a_permutation_and_batches_are_as_full_as_they_can_be(
            counts in prop::collection::vec(1_usize..9, 1..30),
            extra in 0_usize..40,
            seed: u64,
        ) {
            let all: usize = counts.iter().sum();
            let longest = counts.iter().copied().max().unwrap();
            let budget = (longest + extra).min(all);
            let mut order = BatchOrder::new(counts.clone(), budget, seed).unwrap();
            let (episodes, sizes) = take(&mut order, 3 * counts.len());
            for epoch in episodes.chunks_exact(counts.len()) {
                let mut sorted = epoch.to_vec();
                sorted.sort_unstable();
                prop_assert!(sorted.into_iter().eq(0..counts.len()));
            }
            let mut start = 0;
            for size in sizes {
                let tokens: usize = episodes[start..start + size].iter().map(|&e| counts[e]).sum();
                prop_assert!(size > 0 && tokens <= budget);
                start += size;
                if let Some(&next) = episodes.get(start) {
                    prop_assert!(tokens + counts[next] > budget);
                }
            }
        }

        #[test]
        fn order_continues_from_any_position(
            counts in prop::collection::vec(1_usize..9, 2..20),
            done in 0_usize..20,
            seed: u64,
        ) {
            let budget = counts.iter().sum::<usize>().min(16);
            let mut straight = BatchOrder::new(counts.clone(), budget, seed).unwrap();
            take(&mut straight, done);
            let mut resumed = BatchOrder::new(counts, budget, seed).unwrap();
            prop_assert!(resumed.seek(straight.position()));
            prop_assert_eq!(take(&mut straight, 10), take(&mut resumed, 10));
        }

        #[test]
        fn steps_of_epochs_use_every_episode_so_often(
            counts in prop::collection::vec(1_usize..9, 1..20),
            epochs in 1_u64..5,
        ) {
            let budget = counts.iter().copied().max().unwrap();
            let mut order = BatchOrder::new(counts.clone(), budget, 0).unwrap();
            let steps = order.steps_of(epochs) as usize;
            let wanted = counts.len() * epochs as usize;
            prop_assert!(take(&mut order.clone(), steps).0.len() >= wanted);
            prop_assert!(take(&mut order, steps - 1).0.len() < wanted);
        }
    }

    #[test]
    fn seeds_and_epochs_give_different_orders() {
        let order = |seed| take(&mut BatchOrder::new(vec![1; 50], 50, seed).unwrap(), 2).0;
        let (a, b) = (order(0), order(1));
        assert_ne!(a, b);
        assert_ne!(a[..50], a[50..]);
    }

    #[test]
    fn budget_that_does_not_fit_the_data_says_what_would() {
        let error = |budget| {
            let order = BatchOrder::new(vec![4, 6], budget, 0);
            order.unwrap_err().to_string()
        };
        assert!(error(5).contains("at least 6"), "{}", error(5));
        assert!(error(11).contains("at most 10"), "{}", error(11));
    }

    #[test]
    fn position_outside_of_the_data_is_refused() {
        let mut order = BatchOrder::new(vec![1, 1], 1, 0).unwrap();
        assert!(!order.seek(Position {
            epoch: 0,
            cursor: 2
        }));
    }

    #[test]
    fn returns_to_go_sum_what_is_left_and_are_scaled() {
        let task: Task = serde_json::from_str(r#"{"name":"recall","steps":3,"pairs":2}"#).unwrap();
        let space = task.observation_space();
        let mut set = Demonstrations::new(space, task.actions()).unwrap();
        for rewards in [[1.0, 0.0, 4.0], [0.0, 0.0, 2.0]] {
            set.push(EpisodeView {
                observations: &[0; 6],
                actions: &[0; 3],
                rewards: &rewards,
                pairs: &[],
                annotated: true,
            })
            .unwrap();
        }
        let data = TrainingData::new(set, 2, 2.0);
        assert_eq!(data.trajectory(0).unwrap().returns, [2.5, 2.0, 2.0]);
        assert_eq!(data.trajectory(1).unwrap().returns, [1.0, 1.0, 1.0]);
        assert_eq!(data.best_return(), 5.0);
        assert!(data.trajectory(2).is_none());
    }
}
