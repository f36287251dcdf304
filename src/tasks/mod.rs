//! The tasks: LTMB's Hallway, Counting and Ordering, and Recall (SPEC section 7), with experts and demonstrations.

use std::fmt::{self, Display};
use std::str::FromStr;

use rand::SeedableRng;
use rand::rngs::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use serde_json::Value;

pub mod counting;
mod demonstrations;
mod file;
pub mod grid;
pub mod hallway;
mod noise;
pub mod ordering;
pub mod recall;

pub use demonstrations::{Demonstrations, EpisodeView, Invalid};
pub use file::{DemonstrationError, write_beside};
pub use noise::AnnotationNoise;
pub use recall::RecallKind;

use crate::spaces::{ActionSpace, Family, ObservationSpace};
use counting::{Counting, CountingLayout};
use hallway::{Hallway, HallwayLayout};
use ordering::{Ordering, OrderingLayout};
use recall::Recall;

/// The largest length (or number of context steps) a task accepts.
pub const MAX_LENGTH: usize = 10_000;

/// A task with its parameters. In TOML: `name = "hallway"` and, for each parameter that is not the paper's, its value.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "name", rename_all = "snake_case", deny_unknown_fields)]
pub enum Task {
    /// Find the hallway that holds the object shown at the start.
    Hallway {
        /// Number of hallways.
        #[serde(default = "defaults::hallway")]
        length: usize,
    },
    /// Count objects over many rooms; leave the test rooms by the door that tells the parity.
    Counting {
        /// Number of rooms.
        #[serde(default = "defaults::counting")]
        length: usize,
        /// Probability that a room after the first is a test room.
        #[serde(default = "defaults::test_frequency")]
        test_frequency: f64,
        /// Probability that a cell of a normal room holds no object.
        #[serde(default = "defaults::empty_frequency")]
        empty_frequency: f64,
    },
    /// Of two objects, name the one that was shown first.
    Ordering {
        /// Number of choices.
        #[serde(default = "defaults::ordering")]
        length: usize,
    },
    /// Answer what an earlier step said.
    Recall {
        /// What is recalled.
        #[serde(default = "defaults::kind")]
        kind: RecallKind,
        /// Number of (key, value) pairs; `associative` only.
        #[serde(default = "defaults::pairs")]
        pairs: usize,
        /// Number of context steps before the query.
        #[serde(default = "defaults::steps")]
        steps: usize,
    },
}

/// The paper's parameters; Recall's are ours.
mod defaults {
    use super::RecallKind;

    pub fn hallway() -> usize {
        30
    }
    pub fn counting() -> usize {
        20
    }
    pub fn test_frequency() -> f64 {
        0.3
    }
    pub fn empty_frequency() -> f64 {
        0.1
    }
    pub fn ordering() -> usize {
        50
    }
    pub fn kind() -> RecallKind {
        RecallKind::Associative
    }
    pub fn pairs() -> usize {
        4
    }
    pub fn steps() -> usize {
        16
    }
}

/// What episodes are for. Each split draws from streams of its own, so that training never sees an evaluation episode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Split {
    /// Episodes to learn from.
    Demonstration,
    /// Episodes to measure success on.
    Evaluation,
}

/// What one step brought.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Outcome {
    /// The reward.
    pub reward: f64,
    /// The task ended the episode.
    pub terminated: bool,
    /// The step limit ended the episode; both can be set.
    pub truncated: bool,
    /// The episode ended in success.
    pub success: bool,
}

impl Outcome {
    /// Whether the episode is over.
    pub fn over(&self) -> bool {
        self.terminated || self.truncated
    }
}

/// A running episode. Steps are counted from 0. After its end nothing is promised about it but that it does not panic.
pub trait Environment: Send {
    /// Writes what is seen now, [`ObservationSpace::fields`] codes.
    fn observe(&self, codes: &mut [u8]);

    /// Takes one action. An action that the task does not know changes nothing, but takes a step.
    fn step(&mut self, action: usize) -> Outcome;

    /// The action the expert takes now, if it took all the earlier ones as well.
    fn expert(&self) -> usize;

    /// Appends the steps that the action to take now depends on; for the grid tasks also the present step, last.
    fn recalls(&self, steps: &mut Vec<u32>);
}

/// A whole episode, as the expert plays it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Episode {
    /// Codes, `[steps, fields]`; each observation is the one before its action.
    pub observations: Vec<u8>,
    /// Actions, `[steps]`.
    pub actions: Vec<u8>,
    /// Rewards, `[steps]`.
    pub rewards: Vec<f32>,
    /// Memory dependency pairs (recalling step, recalled step), sorted, each once.
    pub pairs: Vec<(u32, u32)>,
    /// Whether the episode ended in success.
    pub success: bool,
}

/// An argument or a layout that a task does not accept.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{argument}`: found {found}, expected {expected}")]
pub struct TaskError {
    /// The argument, or the part of the layout.
    pub argument: &'static str,
    /// What it was.
    pub found: String,
    /// What it should be.
    pub expected: String,
}

impl TaskError {
    pub(crate) fn new(argument: &'static str, found: impl Display, expected: impl Display) -> Self {
        Self {
            argument,
            found: found.to_string(),
            expected: expected.to_string(),
        }
    }
}

fn validate_length(length: usize) -> Result<(), TaskError> {
    if !(1..=MAX_LENGTH).contains(&length) {
        return Err(TaskError::new(
            "length",
            length,
            format!("1 to {MAX_LENGTH}"),
        ));
    }
    Ok(())
}

fn validate_frequency(argument: &'static str, frequency: f64) -> Result<(), TaskError> {
    if !(0.0..=1.0).contains(&frequency) {
        return Err(TaskError::new(argument, frequency, "a probability, 0 to 1"));
    }
    Ok(())
}

impl Display for Task {
    /// As [`FromStr`] reads it: `hallway,length=2`.
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(self.name())?;
        let Ok(Value::Object(entries)) = serde_json::to_value(self) else {
            return Ok(());
        };
        for (key, value) in entries.iter().filter(|(key, _)| *key != "name") {
            match value {
                Value::String(text) => write!(out, ",{key}={text}")?,
                other => write!(out, ",{key}={other}")?,
            }
        }
        Ok(())
    }
}

impl FromStr for Task {
    type Err = TaskError;

    /// Reads a name and, after commas, the parameters that are not the defaults: `hallway`,
    /// `recall,kind=delayed,steps=9`.
    fn from_str(text: &str) -> Result<Self, TaskError> {
        let expected = "NAME or NAME,parameter=value,…";
        let mut parts = text.split(',').map(str::trim);
        let name = parts.next().unwrap_or_default();
        let mut entries = serde_json::Map::from_iter([("name".to_owned(), name.into())]);
        for part in parts {
            let (key, value) = part
                .split_once('=')
                .ok_or_else(|| TaskError::new("task", part, expected))?;
            let value = serde_json::from_str(value).unwrap_or_else(|_| value.into());
            entries.insert(key.to_owned(), value);
        }
        let task: Self = serde_json::from_value(Value::Object(entries))
            .map_err(|error| TaskError::new("task", format!("`{text}` ({error})"), expected))?;
        task.validate()?;
        Ok(task)
    }
}

impl Task {
    /// The name, as in a configuration.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Hallway { .. } => "hallway",
            Self::Counting { .. } => "counting",
            Self::Ordering { .. } => "ordering",
            Self::Recall { .. } => "recall",
        }
    }

    /// Checks the parameters.
    ///
    /// # Errors
    /// The first one out of range, by its name.
    pub fn validate(&self) -> Result<(), TaskError> {
        match *self {
            Self::Hallway { length } | Self::Ordering { length } => validate_length(length),
            Self::Counting {
                length,
                test_frequency,
                empty_frequency,
            } => counting::validate(length, test_frequency, empty_frequency),
            Self::Recall { kind, pairs, steps } => recall::validate(kind, pairs, steps),
        }
    }

    /// What its observations look like.
    pub fn observation_space(&self) -> ObservationSpace {
        match self {
            Self::Recall { kind, .. } => ObservationSpace::codes([2], kind.cardinalities()),
            _ => ObservationSpace::codes([grid::VIEW, grid::VIEW, 3], grid::CARDINALITIES),
        }
    }

    /// Number of actions.
    pub fn actions(&self) -> usize {
        match self {
            Self::Recall { kind, .. } => kind.answers() + 1,
            _ => grid::ACTIONS,
        }
    }

    /// What it has in common with tasks that observe and act in the same way.
    pub fn family(&self) -> Family {
        Family {
            observation: self.observation_space(),
            action: ActionSpace::Discrete(self.actions()),
        }
    }

    /// The most steps an episode can take.
    pub fn max_steps(&self) -> usize {
        match *self {
            Self::Hallway { length } => hallway::max_steps(length),
            Self::Counting { length, .. } => counting::max_steps(length),
            Self::Ordering { length } => ordering::max_steps(length),
            Self::Recall { steps, .. } => steps + 1,
        }
    }

    /// Success rate without memory, to be told beside every result.
    ///
    /// Hallway: one of 2L doors. Counting: see [`counting::chance`], an approximation. Ordering: a coin at each choice,
    /// 0.5^L (a fixed preference among the objects is a little better, because its choices agree with each other).
    /// Recall: one of the answers.
    pub fn chance(&self) -> f64 {
        match *self {
            Self::Hallway { length } => 0.5 / length as f64,
            Self::Counting {
                length,
                test_frequency,
                empty_frequency,
            } => counting::chance(length, test_frequency, empty_frequency),
            Self::Ordering { length } => 0.5_f64.powf(length as f64),
            Self::Recall { kind, .. } => 1.0 / kind.answers() as f64,
        }
    }

    /// Starts an episode: always the same one for the same task, split, seed and number.
    ///
    /// # Errors
    /// Parameters out of range, as [`Task::validate`] tells.
    pub fn reset(
        &self,
        split: Split,
        seed: u64,
        episode: u64,
    ) -> Result<Box<dyn Environment>, TaskError> {
        self.validate()?;
        let mut rng = generator(split, seed, episode);
        Ok(match *self {
            Self::Hallway { length } => {
                Box::new(Hallway::new(&HallwayLayout::random(length, &mut rng))?)
            }
            Self::Counting {
                length,
                test_frequency,
                empty_frequency,
            } => {
                let layout =
                    CountingLayout::random(length, test_frequency, empty_frequency, &mut rng);
                Box::new(Counting::new(length, layout)?)
            }
            Self::Ordering { length } => Box::new(Ordering::new(
                length,
                OrderingLayout::random(length, &mut rng),
            )?),
            Self::Recall { kind, pairs, steps } => {
                Box::new(Recall::random(kind, pairs, steps, &mut rng)?)
            }
        })
    }

    /// Lets the expert play the episode that [`Task::reset`] starts.
    ///
    /// # Errors
    /// Parameters out of range, as [`Task::validate`] tells.
    pub fn demonstrate(&self, split: Split, seed: u64, episode: u64) -> Result<Episode, TaskError> {
        let mut environment = self.reset(split, seed, episode)?;
        Ok(play_expert(
            environment.as_mut(),
            self.observation_space().fields(),
            self.max_steps(),
        ))
    }
}

/// Plays the expert to the end of the episode, or for `max_steps`; an observation has `fields` codes.
pub fn play_expert(environment: &mut dyn Environment, fields: usize, max_steps: usize) -> Episode {
    let mut episode = Episode::default();
    let mut recalled = Vec::new();
    for step in 0..max_steps {
        let start = episode.observations.len();
        episode.observations.resize(start + fields, 0);
        environment.observe(&mut episode.observations[start..]);

        recalled.clear();
        environment.recalls(&mut recalled);
        recalled.sort_unstable();
        recalled.dedup();
        episode
            .pairs
            .extend(recalled.iter().map(|&recalled| (step as u32, recalled)));

        let action = environment.expert();
        let outcome = environment.step(action);
        episode.actions.push(action as u8);
        episode.rewards.push(outcome.reward as f32);
        episode.success = outcome.success;
        if outcome.over() {
            break;
        }
    }
    episode
}

/// The random stream of one episode.
fn generator(split: Split, seed: u64, episode: u64) -> ChaCha8Rng {
    let mut key = [0; 32];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    key[8..16].copy_from_slice(&episode.to_le_bytes());
    key[16] = match split {
        Split::Demonstration => 0,
        Split::Evaluation => 1,
    };
    ChaCha8Rng::from_seed(key)
}
