//! How tasks look: names of actions, and observations as the page draws them.

use serde::Serialize;

use super::encode::letters;
use crate::tasks::recall::{CUES, KEYS, RecallKind};
use crate::tasks::{Task, grid};

/// Names of the actions.
pub(super) fn action_names(task: &Task) -> Vec<String> {
    const GRID: [&str; grid::ACTIONS] = [
        "turn left",
        "turn right",
        "forward",
        "pick up",
        "drop",
        "toggle",
        "done",
    ];
    match task {
        Task::Recall { kind, .. } => {
            let what = match kind {
                RecallKind::Delayed => "cue",
                RecallKind::Associative => "value",
            };
            let answers = (1..=kind.answers()).map(|answer| format!("{what} {answer}"));
            answers.chain(["wait".to_owned()]).collect()
        }
        _ => GRID.map(str::to_owned).to_vec(),
    }
}

/// Observations as the page draws them.
#[derive(Debug, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub(super) enum Frames {
    /// A 7×7 view, `[vx][vy][type, colour, state]`, a letter for each code.
    Grid {
        /// One text per step.
        steps: Vec<String>,
    },
    /// Symbols side by side.
    Symbols {
        /// For each step, what is shown and which one.
        steps: Vec<Vec<(&'static str, Option<u8>)>>,
    },
    /// Codes of any other kind.
    Codes {
        /// One list per step.
        steps: Vec<Vec<u8>>,
    },
}

impl Frames {
    pub fn new(task: &Task, observations: &[u8]) -> Self {
        let frames = observations.chunks(task.observation_space().fields().max(1));
        if let Task::Recall { kind, .. } = task {
            let steps = frames.map(|codes| symbols(*kind, codes)).collect();
            return Self::Symbols { steps };
        }
        let is_grid = task.observation_space().shape == [grid::VIEW, grid::VIEW, 3];
        match frames.clone().map(letters).collect() {
            Some(steps) if is_grid => Self::Grid { steps },
            _ => Self::Codes {
                steps: frames.map(<[u8]>::to_vec).collect(),
            },
        }
    }
}

/// What the two codes of Recall mean ([`crate::tasks::recall`]).
fn symbols(kind: RecallKind, codes: &[u8]) -> Vec<(&'static str, Option<u8>)> {
    let (name, cues) = match kind {
        RecallKind::Delayed => ("cue", CUES as u8),
        RecallKind::Associative => ("key", KEYS as u8),
    };
    let query = (kind.cardinalities()[1] - 1) as u8;
    let [symbol, companion] = [0, 1].map(|field| codes.get(field).copied().unwrap_or(0));
    let mut shown = Vec::new();
    if symbol > cues {
        shown.push(("distractor", Some(symbol - cues)));
    } else if symbol > 0 {
        shown.push((name, Some(symbol)));
    }
    if companion == query {
        shown.push(("query", None));
    } else if companion > 0 {
        shown.push(("value", Some(companion)));
    }
    shown
}
