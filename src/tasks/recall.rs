//! Recall: answer what a much earlier step said, among distractors (SPEC section 7). Made to see a memory alone.
//!
//! An observation is two codes, `[symbol, companion]`. With A = 18 cues (`delayed`) or 16 keys (`associative`):
//!
//! | symbol | meaning |
//! |---|---|
//! | 0 | nothing |
//! | 1 … A | a cue, or a key |
//! | A+1 … A+16 | a distractor |
//!
//! | companion | meaning |
//! |---|---|
//! | 0 | nothing |
//! | 1 … 16 | a value (`associative` only) |
//! | the last, 1 or 17 | this step is the query |
//!
//! `delayed`: (cue, nothing), distractors, then (nothing, query). `associative`: (key, value) pairs among
//! (distractor, nothing), then (key, query). Actions are the answers, cue or value counted from 0, and one more,
//! `wait`, which the expert takes before the query. Before the query every action is accepted.

use rand::RngExt;
use rand::seq::{SliceRandom, index};
use serde::{Deserialize, Serialize};

use super::{Environment, Outcome, TaskError, validate_length};

/// Number of cues of `delayed`.
pub const CUES: usize = 18;
/// Number of keys of `associative`, and the most pairs an episode can have.
pub const KEYS: usize = 16;
/// Number of values of `associative`.
pub const VALUES: usize = 16;
/// Number of distractors.
pub const DISTRACTORS: usize = 16;

/// What is recalled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RecallKind {
    /// The cue of the first step.
    Delayed,
    /// The value that came with the queried key.
    Associative,
}

impl RecallKind {
    /// Number of answers; the action `wait` comes after them.
    pub fn answers(self) -> usize {
        match self {
            Self::Delayed => CUES,
            Self::Associative => VALUES,
        }
    }

    /// Number of codes of `[symbol, companion]`.
    pub fn cardinalities(self) -> [usize; 2] {
        match self {
            Self::Delayed => [1 + CUES + DISTRACTORS, 2],
            Self::Associative => [1 + KEYS + DISTRACTORS, 1 + VALUES + 1],
        }
    }

    fn query_marker(self) -> u8 {
        (self.cardinalities()[1] - 1) as u8
    }
}

/// Checks the parameters: `pairs` matters to `associative` only.
pub(super) fn validate(kind: RecallKind, pairs: usize, steps: usize) -> Result<(), TaskError> {
    validate_length(steps).map_err(|error| TaskError {
        argument: "steps",
        ..error
    })?;
    if kind == RecallKind::Associative && !(1..=KEYS.min(steps)).contains(&pairs) {
        let expected = format!(
            "1 to {} (at most {KEYS}, and one step each)",
            KEYS.min(steps)
        );
        return Err(TaskError::new("pairs", pairs, expected));
    }
    Ok(())
}

/// The environment: an episode of K context steps and one query.
#[derive(Clone, Debug)]
pub struct Recall {
    kind: RecallKind,
    /// `[symbol, companion]` of every step, the query last.
    steps: Vec<[u8; 2]>,
    /// The step that answers the query.
    source: usize,
    answer: usize,
    now: usize,
}

impl Recall {
    /// Draws an episode of `steps` context steps.
    ///
    /// # Errors
    /// `steps` or `pairs` out of range.
    pub fn random(
        kind: RecallKind,
        pairs: usize,
        steps: usize,
        rng: &mut impl RngExt,
    ) -> Result<Self, TaskError> {
        validate(kind, pairs, steps)?;
        let first_distractor = 1 + if kind == RecallKind::Delayed {
            CUES
        } else {
            KEYS
        };
        let mut shown: Vec<[u8; 2]> = (0..steps)
            .map(|_| {
                [
                    (first_distractor + rng.random_range(0..DISTRACTORS)) as u8,
                    0,
                ]
            })
            .collect();
        let (query, source, answer) = match kind {
            RecallKind::Delayed => {
                let cue = rng.random_range(0..CUES);
                shown[0] = [1 + cue as u8, 0];
                (0, 0, cue)
            }
            RecallKind::Associative => {
                let mut keys: Vec<u8> = (1..=KEYS as u8).collect();
                keys.shuffle(rng);
                let places = index::sample(rng, steps, pairs);
                for (place, key) in places.iter().zip(keys) {
                    shown[place] = [key, 1 + rng.random_range(0..VALUES as u8)];
                }
                let source = places.index(rng.random_range(0..pairs));
                let [key, value] = shown[source];
                (key, source, usize::from(value - 1))
            }
        };
        shown.push([query, kind.query_marker()]);
        Ok(Self {
            kind,
            steps: shown,
            source,
            answer,
            now: 0,
        })
    }

    /// Whether the current step is the query.
    fn queried(&self) -> bool {
        self.now + 1 == self.steps.len()
    }
}

impl Environment for Recall {
    fn observe(&self, codes: &mut [u8]) {
        let shown = self.steps.get(self.now).copied().unwrap_or_default();
        codes
            .iter_mut()
            .zip(shown)
            .for_each(|(code, symbol)| *code = symbol);
    }

    fn step(&mut self, action: usize) -> Outcome {
        let terminated = self.queried();
        let success = terminated && action == self.answer;
        self.now += 1;
        Outcome {
            reward: if success { 1.0 } else { 0.0 },
            terminated,
            truncated: false,
            success,
        }
    }

    fn expert(&self) -> usize {
        if self.queried() {
            self.answer
        } else {
            self.kind.answers()
        }
    }

    fn recalls(&self, steps: &mut Vec<u32>) {
        if self.queried() {
            steps.push(self.source as u32);
        }
    }
}
