//! The order in which demonstrations are learnt from, and how they become packed batches.

use std::ops::Range;
use std::path::Path;

use rand::SeedableRng;
use rand::rngs::ChaCha8Rng;
use rand::seq::SliceRandom;

use super::Error;
use super::config::{Config, ConfigError, DEFAULT_VALIDATION, TaskConfig};
use crate::batch::{BatchError, PackedBatch, Packer, TokenLayout, Trajectory};
use crate::model::{Capacity, ModelConfig};
use crate::spaces::{Family, Spaces};
use crate::tasks::{Demonstrations, EpisodeView, Task};

/// The demonstrations of all tasks of a run.
#[derive(Debug)]
pub struct Mixture {
    parts: Vec<Part>,
    spaces: Spaces,
}

/// Those of one task.
#[derive(Debug)]
struct Part {
    label: String,
    share: f64,
    family: usize,
    data: TrainingData,
}

impl Mixture {
    /// Generates or reads what the configuration asks for, and checks that it fits the tasks.
    /// `progress` is told how many of how many episodes are there.
    pub fn prepare(config: &Config, mut progress: impl FnMut(u64, u64)) -> Result<Self, Error> {
        let tasks = config.task_list();
        let mut mixture = Self {
            parts: Vec::with_capacity(tasks.len()),
            spaces: Spaces {
                families: Vec::new(),
                steps: 0,
            },
        };
        let generated = |task: &&TaskConfig| task.data.file.is_none();
        let total = tasks.iter().filter(generated);
        let total = total
            .map(|task| config.shared(task.data.generated_episodes()) as u64)
            .sum();
        let mut before = 0;
        for (index, task) in tasks.into_iter().enumerate() {
            let key = match config.tasks.is_empty() {
                true => String::new(),
                false => format!("tasks.{index}."),
            };
            let data = TrainingData::prepare(&task, config, &key, |done| {
                progress(before + done as u64, total);
            })?;
            if generated(&&task) {
                before += data.episodes() as u64;
            }
            let most = task.task.as_ref().map_or(0, Task::max_steps);
            let steps = data.longest().max(most);
            let family = data.demonstrations.family().clone();
            mixture.parts.push(Part {
                label: task.label.unwrap_or_default(),
                share: task.share,
                family: mixture.spaces.include(family, steps),
                data,
            });
        }
        Ok(mixture)
    }

    /// What the data asks of a model: the observations and actions of the demonstrations, and
    /// episodes as long as the longest of the data or of the tasks.
    pub fn spaces(&self) -> &Spaces {
        &self.spaces
    }

    /// For a model that knows other tasks as well: their families come first, in its order.
    pub fn extend(&mut self, known: &Spaces) {
        let mut spaces = known.clone();
        for part in &mut self.parts {
            let family = part.data.demonstrations.family().clone();
            part.family = spaces.include(family, self.spaces.steps);
        }
        self.spaces = spaces;
    }

    /// The demonstrations of every task, by its label.
    pub fn parts(&self) -> impl Iterator<Item = (&str, &TrainingData)> {
        self.parts
            .iter()
            .map(|part| (part.label.as_str(), &part.data))
    }

    /// The order in which they are learnt from.
    pub fn order(&self, config: &Config) -> Result<BatchOrder, ConfigError> {
        let layout = config.model.layout;
        let streams = self.parts.iter().map(|part| Stream {
            label: part.label.clone(),
            share: part.share,
            family: part.family,
            token_counts: part.data.token_counts(layout),
        });
        let streams: Vec<Stream> = streams.collect();
        let mut budget = config.train.batch_tokens;
        // A few demonstrations, or a small share of them, may all fit into one batch.
        if config.finetune.is_some() || streams.len() == 1 {
            budget = budget.min(most_tokens(&streams));
        }
        BatchOrder::new(streams, budget, config.seed)
    }

    /// One episode as the packer takes it.
    pub fn trajectory(&self, chosen: Chosen) -> Option<Trajectory<'_>> {
        let part = self.parts.get(chosen.task)?;
        Some(Trajectory {
            family: part.family,
            ..part.data.trajectory(chosen.episode)?
        })
    }

    fn family(&self, chosen: &Chosen) -> usize {
        self.parts.get(chosen.task).map_or(0, |part| part.family)
    }
}

/// The demonstrations of a task, and what the model is told about their returns.
#[derive(Debug)]
pub struct TrainingData {
    demonstrations: Demonstrations,
    /// How many of them are learnt from, from the start, and how many there are with those after
    /// them that the model is only measured on.
    episodes: usize,
    all: usize,
    /// Returns to go of all steps, divided by the scale.
    returns: Vec<f32>,
    /// Where each episode's returns start.
    starts: Vec<usize>,
    best_return: f64,
}

impl TrainingData {
    /// Generates or reads what a task of a run asks for. `progress` is told how many episodes are
    /// there; `key` is what stands before the task's keys in the configuration.
    pub fn prepare(
        config: &TaskConfig,
        run: &Config,
        key: &str,
        progress: impl FnMut(usize),
    ) -> Result<Self, Error> {
        let (mut demonstrations, episodes) = match (&config.data.file, &config.task) {
            (Some(file), task) => {
                let demonstrations = read(file, config, key, task.as_ref())?;
                let available = demonstrations.len();
                let episodes = config.data.episodes.unwrap_or(available);
                if episodes > available {
                    return Err(ConfigError::value(
                        format!("{key}data.episodes"),
                        episodes,
                        format!("at most the {available} of {}", file.display()),
                    )
                    .into());
                }
                (demonstrations, run.shared(episodes))
            }
            (None, Some(task)) => {
                let episodes = run.shared(config.data.generated_episodes());
                let share = config.data.annotated;
                let demonstrations = Demonstrations::generate(
                    task, episodes, run.seed, share, progress,
                )
                .map_err(|error| {
                    ConfigError::value(
                        format!("{key}task.{}", error.argument),
                        error.found,
                        error.expected,
                    )
                })?;
                (demonstrations, episodes)
            }
            (None, None) => {
                let expected = "a task, or `data.file`";
                return Err(ConfigError::value(format!("{key}task"), "nothing", expected).into());
            }
        };
        let noise = &config.data.annotation_noise;
        if !noise.is_none() {
            demonstrations.disturb_annotations(noise, run.seed)?;
        }
        let unseen = unseen(config, key, episodes)?;
        Ok(Self {
            episodes: episodes - unseen,
            ..Self::new(demonstrations, episodes, config.data.return_scale)
        })
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
            all: starts.len(),
            demonstrations,
            returns,
            starts,
            best_return,
        }
    }

    /// What is observed and done.
    pub fn family(&self) -> &Family {
        self.demonstrations.family()
    }

    /// Numbers of the episodes that are not learnt from.
    pub fn unseen(&self) -> Range<usize> {
        self.episodes..self.all
    }

    /// Number of episodes that are learnt from.
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

    /// Time steps of the longest episode, learnt from or not.
    pub fn longest(&self) -> usize {
        let all = self.demonstrations.episodes().take(self.all);
        all.map(|episode| episode.steps()).max().unwrap_or(0)
    }

    /// Tokens of every episode in use.
    pub fn token_counts(&self, layout: TokenLayout) -> Vec<usize> {
        self.views()
            .map(|episode| episode.steps() * layout.tokens_per_step())
            .collect()
    }

    /// One episode as the packer takes it, of the model's first family.
    pub fn trajectory(&self, episode: usize) -> Option<Trajectory<'_>> {
        let view = self.demonstrations.episode(episode)?;
        let start = *self.starts.get(episode)?;
        Some(Trajectory {
            family: 0,
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

/// How many of a task's episodes are not learnt from: a share of a file that has no task to be
/// evaluated on.
fn unseen(config: &TaskConfig, key: &str, episodes: usize) -> Result<usize, ConfigError> {
    let share = match (config.data.validation, &config.task) {
        (None, Some(_)) => return Ok(0),
        (None, None) => DEFAULT_VALIDATION,
        (Some(share), _) => share,
    };
    let unseen = (episodes as f64 * share).ceil() as usize;
    if share > 0.0 && unseen >= episodes {
        return Err(ConfigError::value(
            format!("{key}data.validation"),
            share,
            format!("0, or a share that leaves some of the {episodes} episodes to learn from"),
        ));
    }
    Ok(unseen)
}

/// Reads a demonstration file and checks it against the task.
fn read(
    file: &Path,
    config: &TaskConfig,
    key: &str,
    task: Option<&Task>,
) -> Result<Demonstrations, Error> {
    let mut demonstrations = Demonstrations::load(file)?;
    demonstrations
        .limit_annotations(config.data.annotated)
        .map_err(|error| {
            let key = format!("{key}data.annotated");
            ConfigError::value(key, error.found, error.expected)
        })?;
    let key = format!("{key}data.file");
    if demonstrations.is_empty() {
        let expected = "a file with episodes in it";
        return Err(ConfigError::value(key, "no episode", expected).into());
    }
    if let Some(task) = task {
        let (found, expected) = (demonstrations.family(), task.family());
        if *found != expected {
            return Err(ConfigError::value(
                key,
                format!("{found} in {}", file.display()),
                format!("{expected}, which the task `{}` has", task.name()),
            )
            .into());
        }
    }
    Ok(demonstrations)
}

/// Where in the endless order of the data a batch starts: a place for each task.
#[derive(Debug, Clone, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(transparent)]
pub struct Position(Vec<Place>);

/// Where the next episode of a task stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Place {
    /// Pass over the task's data, from 0.
    pub epoch: u64,
    /// Episodes of this pass that have been used.
    pub cursor: usize,
    /// Tokens of this task so far.
    pub tokens: u64,
}

/// What a task gives to the order of the data.
#[derive(Debug, Clone, PartialEq)]
pub struct Stream {
    /// Its name, for errors.
    pub label: String,
    /// Its share of the tokens; 0: none of its episodes is used.
    pub share: f64,
    /// Number of its family in the model.
    pub family: usize,
    /// Tokens of each of its episodes.
    pub token_counts: Vec<usize>,
}

/// The largest budget of tokens for which no task gives more than all its episodes.
fn most_tokens(streams: &[Stream]) -> usize {
    let shares: f64 = streams.iter().map(|stream| stream.share).sum();
    let used = streams.iter().filter(|stream| stream.share > 0.0);
    used.map(|stream| {
        let all: usize = stream.token_counts.iter().sum();
        (all as f64 * shares / stream.share) as usize
    })
    .min()
    .unwrap_or(0)
}

/// An episode of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Chosen {
    /// Number of its task.
    pub task: usize,
    /// Its number among the task's.
    pub episode: usize,
}

/// Chooses the episodes of every batch. Each comes from the task that has had the fewest tokens for
/// its share so far. Each pass over a task's episodes is a permutation that depends on (seed, pass,
/// task) only. Batches are filled in that order, without a break at the end of a pass, until the
/// next episode would exceed the token budget.
#[derive(Debug, Clone)]
pub struct BatchOrder {
    lanes: Vec<Lane>,
    budget: usize,
    seed: u64,
}

/// The order of one task.
#[derive(Debug, Clone)]
struct Lane {
    stream: Stream,
    place: Place,
    /// The permutation of `place.epoch`.
    order: Vec<u32>,
}

impl Lane {
    /// A Fisher–Yates shuffle from the identity.
    fn shuffle(&mut self, seed: u64, task: usize) {
        let mut key = [0; 32];
        key[..8].copy_from_slice(&seed.to_le_bytes());
        key[8..16].copy_from_slice(&self.place.epoch.to_le_bytes());
        key[16..24].copy_from_slice(&(task as u64).to_le_bytes());
        for (index, place) in self.order.iter_mut().zip(0..) {
            *index = place;
        }
        self.order.shuffle(&mut ChaCha8Rng::from_seed(key));
    }
}

impl BatchOrder {
    /// The order of a run. The budget must hold the longest episode, and no task's share of it may
    /// exceed all its episodes together.
    pub fn new(
        streams: impl IntoIterator<Item = Stream>,
        budget: usize,
        seed: u64,
    ) -> Result<Self, ConfigError> {
        let streams: Vec<Stream> = streams.into_iter().collect();
        let shares: f64 = streams.iter().map(|stream| stream.share).sum();
        let several = streams.len() > 1;
        let mut lanes = Vec::with_capacity(streams.len());
        for (task, stream) in streams.into_iter().enumerate() {
            let counts = stream.token_counts.iter().copied();
            let (longest, all) = (counts.clone().max().unwrap_or(0), counts.sum::<usize>());
            let of_task = match several {
                true => format!(" of `{}`", stream.label),
                false => String::new(),
            };
            if stream.share > 0.0 && budget < longest {
                return Err(ConfigError::value(
                    "train.batch_tokens",
                    budget,
                    format!("at least {longest}, the tokens of the longest demonstration{of_task}"),
                ));
            }
            if budget as f64 * stream.share > all as f64 * shares {
                let most = (all as f64 * shares / stream.share) as usize;
                let why = match several {
                    true => format!("which its share of makes the {all} tokens of all"),
                    false => "the tokens of all".to_owned(),
                };
                return Err(ConfigError::value(
                    "train.batch_tokens",
                    budget,
                    format!(
                        "at most {most}, {why} demonstrations{of_task}; or more demonstrations"
                    ),
                ));
            }
            let mut lane = Lane {
                order: (0..stream.token_counts.len() as u32).collect(),
                place: Place::default(),
                stream,
            };
            lane.shuffle(seed, task);
            lanes.push(lane);
        }
        Ok(Self {
            lanes,
            budget,
            seed,
        })
    }

    /// Most tokens of a batch.
    pub fn budget(&self) -> usize {
        self.budget
    }

    /// Where the next batch starts.
    pub fn position(&self) -> Position {
        Position(self.lanes.iter().map(|lane| lane.place).collect())
    }

    /// Continues from a position that [`Self::position`] gave; false if there is no such position.
    pub fn seek(&mut self, position: &Position) -> bool {
        let fits = |(lane, place): (&Lane, &Place)| place.cursor < lane.order.len();
        if position.0.len() != self.lanes.len() || !self.lanes.iter().zip(&position.0).all(fits) {
            return false;
        }
        for (task, (lane, place)) in self.lanes.iter_mut().zip(&position.0).enumerate() {
            lane.place = *place;
            lane.shuffle(self.seed, task);
        }
        true
    }

    /// The task that has had the fewest tokens for its share; the first of equals.
    fn next_task(&self) -> Option<usize> {
        let due = |lane: &Lane| lane.place.tokens as f64 / lane.stream.share;
        let trained = self.lanes.iter().enumerate();
        trained
            .filter(|(_, lane)| lane.stream.share > 0.0 && !lane.order.is_empty())
            .min_by(|(_, a), (_, b)| due(a).total_cmp(&due(b)))
            .map(|(task, _)| task)
    }

    /// Puts the next batch's episodes into `episodes`.
    pub fn next_batch(&mut self, episodes: &mut Vec<Chosen>) {
        episodes.clear();
        let mut tokens = 0;
        while let Some(task) = self.next_task() {
            let lane = &mut self.lanes[task];
            let episode = lane.order[lane.place.cursor] as usize;
            let count = lane.stream.token_counts[episode];
            tokens += count;
            if tokens > self.budget {
                break;
            }
            episodes.push(Chosen { task, episode });
            lane.place.tokens += count as u64;
            lane.place.cursor += 1;
            if lane.place.cursor == lane.order.len() {
                lane.place.cursor = 0;
                lane.place.epoch += 1;
                lane.shuffle(self.seed, task);
            }
        }
    }

    /// Number of batches until every episode of every task that has a share has been used `epochs`
    /// times; the last one goes on into the next epoch.
    pub fn steps_of(&self, epochs: u64) -> u64 {
        let mut order = self.clone();
        let start = Position(vec![Place::default(); order.lanes.len()]);
        order.seek(&start);
        let mut episodes = Vec::new();
        let mut steps = 0;
        let unfinished = |lane: &Lane| lane.stream.share > 0.0 && lane.place.epoch < epochs;
        while order.lanes.iter().any(unfinished) {
            order.next_batch(&mut episodes);
            steps += 1;
        }
        steps
    }

    /// Most tokens that a batch has of each of so many families. A task has never more tokens than
    /// its share of all and its longest episode, and never less than its share without the longest
    /// episode of each other task.
    fn most_of(&self, families: usize) -> Vec<usize> {
        let streams = || self.lanes.iter().map(|lane| &lane.stream);
        let shares: f64 = streams().map(|stream| stream.share).sum();
        let used = || streams().filter(|stream| stream.share > 0.0);
        let longest = |stream: &Stream| stream.token_counts.iter().copied().max().unwrap_or(0);
        let slack: usize = used().map(longest).sum();
        let mut most = vec![0; families];
        for stream in used() {
            let share = (self.budget as f64 * stream.share / shares).ceil() as usize;
            most[stream.family] = self.budget.min(most[stream.family] + share + slack);
        }
        most
    }

    /// Upper bounds of every batch, for a model of so many families.
    pub fn capacity(&self, model: &ModelConfig, families: usize) -> Capacity {
        let per_step = model.layout.tokens_per_step();
        let lanes = self.lanes.iter().filter(|lane| lane.stream.share > 0.0);
        let counts = lanes.flat_map(|lane| lane.stream.token_counts.iter().copied());
        let shortest = counts.clone().min().unwrap_or(1).max(1);
        let longest = counts.max().unwrap_or(0) / per_step;
        let observations = self.budget / per_step;
        let sequences = self.budget / shortest;
        let of_families = self.most_of(families);
        let segments = match model.segment_steps {
            0 => sequences,
            // Every segment but the last of a sequence is full.
            steps => sequences + observations / steps,
        };
        Capacity {
            tokens: self.budget,
            observations: of_families.iter().map(|most| most / per_step).collect(),
            sequences,
            segments,
            links: match model.segment_steps {
                0 => 1,
                steps => longest.div_ceil(steps),
            },
        }
    }
}

/// Draws batches in order. Nothing is allocated once the buffers have grown to a batch's size.
#[derive(Debug)]
pub struct Batches<'a> {
    data: &'a Mixture,
    order: BatchOrder,
    packer: Packer,
    episodes: Vec<Chosen>,
}

impl<'a> Batches<'a> {
    /// Batches of `data` in an order, packed by the model's packer.
    pub fn new(data: &'a Mixture, order: BatchOrder, packer: Packer) -> Self {
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
    pub fn seek(&mut self, position: &Position) -> bool {
        self.order.seek(position)
    }

    /// The next batch: its episodes in the order of their families.
    pub fn next_batch(&mut self) -> Result<&PackedBatch, BatchError> {
        self.order.next_batch(&mut self.episodes);
        self.episodes.sort_by_key(|chosen| self.data.family(chosen));
        self.packer.clear();
        let chosen = self.episodes.iter();
        for trajectory in chosen.filter_map(|&chosen| self.data.trajectory(chosen)) {
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
        let (chosen, sizes) = take_of_all(order, batches);
        (chosen.iter().map(|chosen| chosen.episode).collect(), sizes)
    }

    fn take_of_all(order: &mut BatchOrder, batches: usize) -> (Vec<Chosen>, Vec<usize>) {
        let (mut all, mut sizes, mut batch) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..batches {
            order.next_batch(&mut batch);
            all.extend(&batch);
            sizes.push(batch.len());
        }
        (all, sizes)
    }

    fn stream(share: f64, token_counts: Vec<usize>) -> Stream {
        Stream {
            label: format!("share {share}"),
            share,
            family: 0,
            token_counts,
        }
    }

    /// The order of one task.
    fn order_of(
        token_counts: Vec<usize>,
        budget: usize,
        seed: u64,
    ) -> Result<BatchOrder, ConfigError> {
        BatchOrder::new([stream(1.0, token_counts)], budget, seed)
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
            let mut order = order_of(counts.clone(), budget, seed).unwrap();
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
            let mut straight = order_of(counts.clone(), budget, seed).unwrap();
            take(&mut straight, done);
            let mut resumed = order_of(counts, budget, seed).unwrap();
            prop_assert!(resumed.seek(&straight.position()));
            prop_assert_eq!(take(&mut straight, 10), take(&mut resumed, 10));
        }

        #[test]
        fn tasks_get_their_shares_of_the_tokens_and_continue_from_any_position(
            tasks in prop::collection::vec((1_u32..9, prop::collection::vec(1_usize..9, 1..20)), 1..5),
            held_out: bool,
            done in 0_usize..30,
            seed: u64,
        ) {
            let mut streams: Vec<Stream> = tasks
                .iter()
                .map(|(share, counts)| stream(f64::from(*share), counts.clone()))
                .collect();
            if held_out {
                // Longer than any batch, and still no hindrance.
                streams.insert(0, stream(0.0, vec![1000]));
            }
            for (family, stream) in streams.iter_mut().enumerate() {
                stream.family = family;
            }
            let shares: f64 = streams.iter().map(|stream| stream.share).sum();
            let budget = 9;
            let Ok(mut order) = BatchOrder::new(streams.clone(), budget, seed) else {
                return Ok(());
            };
            take_of_all(&mut order, done);
            let mut resumed = BatchOrder::new(streams.clone(), budget, seed).unwrap();
            prop_assert!(resumed.seek(&order.position()));
            prop_assert_eq!(take_of_all(&mut order, 20), take_of_all(&mut resumed, 20));
            let most = order.most_of(streams.len());
            let mut batch = Vec::new();
            for _ in 0..20 {
                order.next_batch(&mut batch);
                for (task, (stream, &most)) in streams.iter().zip(&most).enumerate() {
                    let own = batch.iter().filter(|chosen| chosen.task == task);
                    let tokens: usize = own.map(|chosen| stream.token_counts[chosen.episode]).sum();
                    prop_assert!(tokens <= most, "{tokens} of at most {most}");
                }
            }
            let all: u64 = order.lanes.iter().map(|lane| lane.place.tokens).sum();
            for lane in &order.lanes {
                // Never further from its share than the longest episode of each task.
                let due = all as f64 * lane.stream.share / shares;
                let longest = 8.0 * streams.len() as f64;
                prop_assert!((lane.place.tokens as f64 - due).abs() <= longest);
                prop_assert!(lane.stream.share > 0.0 || lane.place.tokens == 0);
            }
        }

        #[test]
        fn steps_of_epochs_use_every_episode_so_often(
            counts in prop::collection::vec(1_usize..9, 1..20),
            epochs in 1_u64..5,
        ) {
            let budget = counts.iter().copied().max().unwrap();
            let mut order = order_of(counts.clone(), budget, 0).unwrap();
            let steps = order.steps_of(epochs) as usize;
            let wanted = counts.len() * epochs as usize;
            prop_assert!(take(&mut order.clone(), steps).0.len() >= wanted);
            prop_assert!(take(&mut order, steps - 1).0.len() < wanted);
        }
    }

    #[test]
    fn seeds_and_epochs_give_different_orders() {
        let order = |seed| take(&mut order_of(vec![1; 50], 50, seed).unwrap(), 2).0;
        let (a, b) = (order(0), order(1));
        assert_ne!(a, b);
        assert_ne!(a[..50], a[50..]);
    }

    #[test]
    fn budget_that_does_not_fit_the_data_says_what_would() {
        let error = |budget| {
            let order = order_of(vec![4, 6], budget, 0);
            order.unwrap_err().to_string()
        };
        assert!(error(5).contains("at least 6"), "{}", error(5));
        assert!(error(11).contains("at most 10"), "{}", error(11));
    }

    #[test]
    fn position_outside_of_the_data_is_refused() {
        let mut order = order_of(vec![1, 1], 1, 0).unwrap();
        let beyond = Place {
            cursor: 2,
            ..Place::default()
        };
        assert!(!order.seek(&Position(vec![beyond])));
        assert!(!order.seek(&Position(vec![Place::default(); 2])));
    }

    #[test]
    fn returns_to_go_sum_what_is_left_and_are_scaled() {
        let task: Task = serde_json::from_str(r#"{"name":"recall","steps":3,"pairs":2}"#).unwrap();
        let mut set = Demonstrations::new(task.family()).unwrap();
        for rewards in [[1.0, 0.0, 4.0], [0.0, 0.0, 2.0]] {
            set.push(EpisodeView {
                observations: (&[0_u8; 6]).into(),
                actions: (&[0_u8; 3]).into(),
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
